"""Commands about coverage, positions by hand and surface energies: files, statuses, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from command_line import run_command

EMT_CU = ["--calculator", "emt", "--slab", "Cu111", "--size", "2x2x3", "--fmax", "0.1"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_coverage_series_is_one_document_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--adsorbate", "*O", "--counts", "2", "1", "--placements", "2", "--gas", "O=4.6", "--out", "c"]
    assert run_command("adsorption coverage", *EMT_CU, *options, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("c/coverage.json").read_text())
    rows = printed["coverages"]
    assert [row["molecules"] for row in rows] == [1, 2]
    totals = [row["total_adsorption_energy_eV"] for row in rows]
    assert rows[1]["average_adsorption_energy_eV"] == pytest.approx(totals[1] / 2)
    assert rows[1]["differential_adsorption_energy_eV"] == pytest.approx(totals[1] - totals[0])
    assert printed["terms_eV"]["gas_per_molecule"] == 4.6
    assert printed["settings"]["slab"]["miller"] == [1, 1, 1]
    assert run_command("adsorption verify", "c/card.json", "--calculator", "emt") == 0
    before = Path("c/relaxed.jsonl").read_bytes()
    assert run_command("adsorption coverage", *EMT_CU, *options) == 0
    assert f"{totals[1]:.4f}" in capsys.readouterr().out
    assert printed == json.loads(Path("c/coverage.json").read_text())
    assert run_command("adsorption coverage", *EMT_CU, *options, "--seed", "3") == 2
    assert "holds a finished series with other settings (seed)" in capsys.readouterr().err
    assert run_command("adsorption coverage", *EMT_CU, *options, "--overwrite") == 0
    assert Path("c/relaxed.jsonl").read_bytes() == before
    assert f"{totals[1]:.4f}" in capsys.readouterr().out


def test_a_series_and_a_search_have_folders_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--adsorbate",
        "*O",
        "--placements",
        "1",
        "--steps",
        "0",
        "--gas",
        "O=4.6",
        "--check-minima",
        "0",
    ]
    assert run_command("adsorption coverage", *EMT_CU, *options, "--counts", "1", "--out", "c") == 3
    assert run_command("adsorption search", *EMT_CU, *options, "--out", "c", "--overwrite") == 2
    assert "c holds a coverage series, and no search" in capsys.readouterr().err
    assert run_command("adsorption search", *EMT_CU, *options, "--out", "s") == 3
    assert run_command("adsorption coverage", *EMT_CU, *options, "--out", "s", "--overwrite") == 2
    assert "s holds a search, and no coverage series" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adsorbate", "*O", "--counts", "0"], "must be whole, from 1 to 100"),
        (["--adsorbate", "*O", "--counts", "1,1"], "numbers for 2 adsorbates, and there are 1"),
        (["--adsorbate", "*O", "--adsorbate", "*H", "--counts", "1,1,1"], "give one number for each"),
        (["--adsorbate", "*O", "*H", "--counts", "1+1"], "neither a number of molecules nor a composition"),
        (["--adsorbate", "*O", "--adsorbate", "O"], "is given twice"),
        (["--adsorbate", "*O", "*H", "--gas", "O=4.6"], "no gas reference for H"),
        (["--adsorbate", "*XY"], "no adsorbate of OC20"),
        (["--adsorbate", "*O", "--counts", "1", "--fmax", "nan"], "fmax is nan"),
        (["--adsorbate", "*O", "--gas", "C=1"], "no gas reference for O"),
        (["--adsorbate", "C60"], "larger than the surface"),
    ],
)
def test_a_series_that_cannot_be(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("adsorption coverage", *EMT_CU, "--out", "c", *options) == 2
    assert message in capsys.readouterr().err
    assert not Path("c/coverage.json").exists()


def test_mixtures(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--adsorbate", "*O", "--adsorbate", "*H", "--counts", "1", "1,1", "--placements", "1"]
    options += ["--check-minima", "0", "--gas", "O=4.6,H=3.2", "--out", "m"]
    assert run_command("adsorption coverage", *EMT_CU, *options, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("m/coverage.json").read_text())
    assert [row["composition"] for row in printed["coverages"]] == [
        {"*O": 1, "*H": 0},
        {"*O": 0, "*H": 1},
        {"*O": 1, "*H": 1},
    ]
    totals = [row["total_adsorption_energy_eV"] for row in printed["coverages"]]
    assert printed["coverages"][2]["interaction_energy_eV"] == pytest.approx(
        totals[2] - totals[0] - totals[1]
    )
    assert run_command("adsorption verify", "m/card.json", "--calculator", "emt") == 0
    before = Path("m/relaxed.jsonl").read_bytes()
    capsys.readouterr()
    assert run_command("adsorption coverage", *EMT_CU, *options) == 0
    assert "1 *O + 1 *H" in capsys.readouterr().out
    assert Path("m/relaxed.jsonl").read_bytes() == before


def test_a_series_is_of_one_slab(capsys: pytest.CaptureFixture[str]) -> None:
    cut = ["--calculator", "emt", "--bulk", "Cu", "--keep-lattice", "--miller", "all", "--adsorbate", "*O"]
    assert run_command("adsorption coverage", *cut, "--out", "c") == 2
    assert "one slab, and there are 3" in capsys.readouterr().err


def test_positions_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    search = ["adsorption search", *EMT_CU, "--adsorbate", "*O", "--gas", "O=4.6"]
    hollow = ["--position", "1.276", "0.737"]
    assert run_command(*search, *hollow, "--position", "-5.1", "0", "--out", "p") == 0
    record = json.loads(Path("p/search.json").read_text())
    assert record["best"]["id"] == "positions-0000"
    assert len(record["placements"]) == 2
    assert record["settings"]["positions_A"] == [[1.276, 0.737], [-5.1, 0.0]]
    start = read("p/trajectories/positions-0001.traj", 0)
    assert np.allclose(start.positions[-1, :2], [-5.1, 0.0], atol=1e-6)
    capsys.readouterr()
    # One position is refused, with a warning, and the other one is taken.
    options = [*hollow, "--position", "0", "0", "--height", "1.3", "--steps", "1", "--out", "q"]
    assert run_command(*search, *options) == 3
    assert len(json.loads(Path("q/search.json").read_text())["placements"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--position", "nan", "0"], "must be two numbers x and y"),
        (["--position", "0", "0", "--height", "0.3"], "closer than a bond"),
        (["--position", "0", "0", "--height", "8"], "touches no atom of the slab"),
        (["--height", "2"], "--height has no meaning without --position"),
        (["--mode", "positions"], "needs --position X Y"),
        (["--mode", "random", "--position", "0", "0"], "--position has no meaning with --mode random"),
        (["--position", "0", "0", "--position", "1", "1", "--placements", "1"], "2 positions and only 1"),
    ],
)
def test_positions_that_cannot_be(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["adsorption search", *EMT_CU, "--adsorbate", "*O", "--gas", "O=4.6", "--out", "p"]
    assert run_command(*search, *options) == 2
    assert message in capsys.readouterr().err
    assert not Path("p").exists()


def test_the_search_begins_with_the_most_stable_plane(capsys: pytest.CaptureFixture[str]) -> None:
    # A wide lattice, so that slabs of OC20's size are small.
    options = ["--calculator", "emt", "--bulk", "Cu fcc a=5.7", "--keep-lattice", "--miller", "all"]
    options += ["--adsorbate", "*H", "--placements", "1", "--steps", "0", "--gas", "H=3.2", "--out", "s"]
    assert run_command("adsorption search", *options) == 3
    printed = capsys.readouterr().out
    assert "surface energy, (E(slab) - n E(bulk)) / 2A" in printed
    record = json.loads(Path("s/searches.json").read_text())
    rows = record["surface_energies"]["rows"]
    values = [row["surface_energy_eV_A2"] for row in rows]
    assert values == sorted(values)
    planes = ["".join(map(str, row["miller"])) for row in rows]
    assert planes != ["100", "110", "111"]  # the order in which they are cut
    assert list(record["searches"]) == [f"s/Cu_fcc_{plane}" for plane in planes]
    places = [printed.index(f"*H on Cu (fcc) ({plane})") for plane in planes]
    assert places == sorted(places)
