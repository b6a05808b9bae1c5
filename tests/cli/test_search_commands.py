"""Commands of a search and of what follows from it: files, statuses, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from command_line import run_command

from equiformer2.adsorption.finished_search import FinishedSearch
from equiformer2.cli.adsorption_search import search_folders
from equiformer2.errors import InputError
from tests.training.tiny_checkpoint import write_tiny_checkpoint

SEARCH = ["--calculator", "emt", "--slab", "Cu111", "--size", "2x2x3", "--fmax", "0.1", "--seed", "1"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Search of O on Cu(111), with gas references given."""
    folder = tmp_path_factory.mktemp("runs") / "o"
    options = ["--adsorbate", "*O", "--gas", "O=4.6", "--placements", "6", "--out", folder]
    assert run_command("adsorption search", *SEARCH, *options) == 0
    return folder


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(folder: Path) -> list[dict[str, object]]:
    placements = json.loads((folder / "search.json").read_text())["placements"]
    return sorted((row for row in placements if row["basin"] == row["id"]), key=lambda row: row["energy_eV"])


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files in a folder."""
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_finished_search_gives_its_result_again_and_changes_nothing(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adsorbate", "*O", "--gas", "O=4.6", "--placements", "6", "--out", searched]
    before, record = contents(searched), json.loads((searched / "search.json").read_text())
    capsys.readouterr()
    assert run_command("adsorption search", *SEARCH, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out) == record
    assert run_command("adsorption search", *SEARCH, *options) == 0
    assert f"adsorption energy {record['adsorption_energy_eV']:.4f} eV" in capsys.readouterr().out
    for place, other, name in (
        (len(options), ["--fmax", "0.05"], "fmax"),
        (4, ["--placements", "7", *options[6:]], "placements"),
        (len(options), ["--check-minima", "2"], "check minima"),
        (len(options), ["--no-stop"], "stop"),
        (2, ["--gas", "O=4.7", *options[4:]], "gas per atom"),
        (len(options), ["--mode", "symmetry"], "mode"),
        (0, ["--adsorbate", "*H", "--gas", "H=3.2", *options[4:]], "adsorbate"),
        (len(options), ["--size", "2x2x4"], "slab"),
    ):
        assert run_command("adsorption search", *SEARCH, *options[:place], *other) == 2
        error = capsys.readouterr().err
        assert "holds a finished search with other settings (" in error
        assert name in error.partition("settings (")[2].partition(")")[0].split(", ")
    assert contents(searched) == before


def test_a_search_is_one_document_with_json_and_is_not_done_twice(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adsorbate", "*O", "--gas", "O=4.6", "--placements", "6", "--out", searched]
    before = (searched / "relaxed.jsonl").read_bytes()
    assert run_command("adsorption search", *SEARCH, *options, "--overwrite", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((searched / "search.json").read_text())
    assert printed["checkpoint_sha256"] is None
    assert printed["model"]["calculator"] == "emt"
    assert (searched / "relaxed.jsonl").read_bytes() == before


def test_several_adsorbates_share_the_slab(in_folder: Path) -> None:
    options = ["--adsorbate", "*O", "*H", "--placements", "2", "--out", "both", "--gas", "O=4.6,H=3.2"]
    assert run_command("adsorption search", *SEARCH, *options) == 0
    assert [evaluations_of_the_slab(in_folder / "both" / name) > 0 for name in ("O", "H")] == [True, False]
    clean = [read(in_folder / "both" / name / "clean_slab.extxyz").positions for name in ("O", "H")]
    assert np.allclose(*clean)
    before_all = contents(in_folder / "both")
    assert run_command("adsorption search", *SEARCH, *options) == 0  # finished
    assert run_command("adsorption search", *SEARCH, *options, "--fmax", "0.2") == 2
    assert contents(in_folder / "both") == before_all
    (in_folder / "both" / "searches.json").unlink()
    (in_folder / "both" / "H" / "search.json").unlink()
    before = [(in_folder / "both" / name / "relaxed.jsonl").read_text() for name in ("O", "H")]
    assert run_command("adsorption search", *SEARCH, *options) == 0  # stopped before the end, and continued
    after = [(in_folder / "both" / name / "relaxed.jsonl").read_text() for name in ("O", "H")]
    assert before == after
    (in_folder / "both" / "searches.json").unlink()
    options[1:3] = ["*N", "*H"]  # the slab is known from another adsorbate's folder
    options[-1] = "N=4.0,H=3.2"
    assert run_command("adsorption search", *SEARCH, *options) == 0
    assert evaluations_of_the_slab(in_folder / "both" / "N") == 0


def evaluations_of_the_slab(folder: Path) -> int:
    """Calls of the model for the clean slab, in this folder."""
    rows = [json.loads(line) for line in (folder / "relaxed.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["id"] == "clean_slab")
    return int(row["model_evaluations"])


def test_one_search_of_several_fails_and_the_others_are_done(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--placements", "1", "--out", "several", "--check-minima", "0"]
    adsorbates = ["--adsorbate", "*H", "*O"]
    assert run_command("adsorption search", *SEARCH, *options, *adsorbates, "--gas", "O=4.6") == 3
    assert "error: *H on Cu111: there is no gas reference for H" in capsys.readouterr().err
    searches = json.loads(Path("several/searches.json").read_text())["searches"]
    assert searches["several/H"]["adsorption_energy_eV"] is None
    assert "no gas reference" in searches["several/H"]["error"]
    assert searches["several/O"]["error"] is None
    assert searches["several/O"]["adsorption_energy_eV"] < 0
    before = Path("several/O/relaxed.jsonl").read_bytes()
    gas = ["--gas", "O=4.6,H=3.2"]
    assert run_command("adsorption search", *SEARCH, *options, *adsorbates, *gas) == 0
    assert Path("several/O/relaxed.jsonl").read_bytes() == before
    options[3] = "none"
    capsys.readouterr()
    assert run_command("adsorption search", *SEARCH, *options, *adsorbates, "--gas", "C=1.0") == 2
    error = capsys.readouterr().err
    assert error.count("no gas reference") == 2
    assert "none of the 2 searches could be made" in error


STRANGE = """
from ase.calculators.emt import EMT
import numpy as np

class Strange(EMT):
    def calculate(self, *arguments, **more):
        super().calculate(*arguments, **more)
        if len(self.atoms) == 13:
            self.results["forces"] = np.full((13, 3), np.nan)
"""


def test_a_search_without_a_result_is_kept_with_status_3(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("strange.py").write_text(STRANGE)
    options = ["--calculator", "strange:Strange", *SEARCH[2:], "--gas", "O=4.6", "--placements", "2"]
    options += ["--adsorbate", "*O", "--out", "s"]
    assert run_command("adsorption search", *options, "--json") == 3
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(Path("s/search.json").read_text())
    assert (record["best"], record["adsorption_energy_eV"]) == (None, None)
    assert {row["status"] for row in record["placements"]} <= {"failed", "merged"}
    assert "Strange gives a non-finite energy or force" in record["reason"]
    for command in (
        ["free-energy", "s", "--calculator", "emt"],
        ["neb", "s", "--calculator", "emt", "--start", "a", "--end", "b"],
        ["collect", "--search", "s", "--dft", "s/search.json"],
        ["diagram", "s", "--out", "d"],
        ["verify", "s/card.json", "--calculator", "emt"],
    ):
        assert run_command(f"adsorption {command[0]}", *command[1:]) == 2
        error = capsys.readouterr().err
        assert error.count("error:") == 1
        assert "Traceback" not in error
        assert "bug" not in error


def test_twins_with_a_draft(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_checkpoint(in_folder / "full.pt")
    options = ["--checkpoint", "full.pt", "--twin-bf16", "--draft", "full.pt", "--slab", "Cu111"]
    options += ["--size", "2x2x2", "--adsorbate", "*O", "--placements", "1", "--steps", "1"]
    assert run_command("adsorption search", *options, "--out", "s", "--json") == 3
    record = json.loads(capsys.readouterr().out)
    assert record["model"]["precision"] == ["float32", "bf16"]
    assert len(record["checkpoint_sha256"]) == 2
    assert record["draft"]["checkpoint"] == "full.pt"
    assert record["draft"]["checkpoint_sha256"] == record["checkpoint_sha256"][0]
    assert record["draft_evaluations"] == record["draft"]["evaluations"] == 2
    assert record["best"]["start_energy_eV"] is not None
    card = json.loads(Path("s/card.json").read_text())
    assert card["energy_std_eV"] > 0
    assert "spread of the committee" in Path("s/report.html").read_text()
    assert run_command("adsorption verify", "s/card.json") == 0  # with the same committee
    for wrong in (["--calculator", "emt"], ["--checkpoint", "full.pt", "--precision", "bf16"]):
        rest = [*wrong, "--twin-bf16", *options[5:]]
        assert run_command("adsorption search", *rest, "--out", "x") == 2


def test_every_search_has_its_own_folder(tmp_path: Path) -> None:
    slabs, adsorbates = ["Cu (111) 0", "Cu (1,1,-1) 0"], ["*CH*CH", "*CHCH", "x/CO.xyz"]
    folders = search_folders(tmp_path, slabs, adsorbates)
    assert len({str(folder).lower() for folder in folders}) == 6
    assert all(len(folder.relative_to(tmp_path).parts) == 2 for folder in folders)
    assert search_folders(tmp_path, slabs[:1], adsorbates[:1]) == [tmp_path]
    for same in (["a/CO.xyz", "b/CO.xyz"], ["*O", "*O"], ["*NO", "*No"]):
        with pytest.raises(InputError, match="would both be written into"):
            search_folders(tmp_path, ["Cu111"], same)


def test_a_slab_is_cut_at_the_calculator_s_lattice_constant(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--calculator", "emt", "--adsorbate", "*H", "--placements", "1", "--steps", "1"]
    cut = ["--bulk", "Cu fcc a=3.7", "--miller", "111,", "--out", "cut"]
    assert run_command("adsorption search", *options, *cut) == 2
    printed = capsys.readouterr()
    assert "are no Miller indices" in printed.err
    assert "strain" not in printed.out  # refused before the lattice is relaxed
    cut[3] = "100"
    assert run_command("adsorption search", *options, *cut) == 3
    record = json.loads(Path("cut/search.json").read_text())
    slab = record["settings"]["slab"]
    assert slab["miller"] == [1, 0, 0]
    lengths = read("cut/clean_slab.extxyz").cell.lengths()
    assert np.isclose(
        lengths[0] / round(lengths[0] / 2.54), 2.54, atol=0.02
    )  # EMT: 3.59 Å over the root of 2
    for wrong in (
        ["--bulk", "Cu"],
        ["--slab", "Cu111", "--miller", "111"],
        ["--bulk", "Cu", "--slab", "Cu111"],
    ):
        assert run_command("adsorption search", *options, *wrong, "--out", "x") == 2


def test_an_unconverged_search_has_status_3(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--adsorbate", "*O", "--placements", "2", "--steps", "1", "--out", "s"]
    assert run_command("adsorption search", *SEARCH, *options) == 3
    assert "NOT converged" in capsys.readouterr().out
    ends = ["--start", "heuristic-0000", "--end", "heuristic-0001", "--calculator", "emt"]
    assert run_command("adsorption neb", "s", *ends) == 2
    assert "heuristic-0000 has not converged (unconverged)" in capsys.readouterr().err


def test_a_card_is_verified(searched: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("adsorption verify", searched / "card.json", "--calculator", "emt", "--json") == 0
    fields = json.loads(capsys.readouterr().out)
    assert {"model_energy_eV", "max_force_eV_A", "structure_sha256"} <= set(fields)
    assert all(set(row) == {"card", "now", "ok"} and row["ok"] for row in fields.values())
    card = json.loads((searched / "card.json").read_text())
    card["verifiable"]["max_force_eV_A"] += 1.0
    Path("card.json").write_text(json.dumps(card))
    write("best.extxyz", read(searched / "best.extxyz"))
    assert run_command("adsorption verify", "card.json", "--calculator", "emt") == 3
    assert "DIFFERS" in capsys.readouterr().out
    assert run_command("adsorption verify", searched / "card.json") == 2
    assert "names no checkpoint" in capsys.readouterr().err
    assert run_command("adsorption verify", searched, "--calculator", "emt") == 2
    assert "is no trust card (is a folder, not a file; name a file): give" in capsys.readouterr().err


def test_another_model_than_the_searchs_is_refused(
    searched: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = (str(row["id"]) for row in rows(searched)[:2])
    for command in (["free-energy"], ["neb", "--start", first, "--end", last]):
        options = ["--calculator", "lj", "--overwrite"]
        assert run_command(f"adsorption {command[0]}", searched, *command[1:], *options) == 2
        error = capsys.readouterr().err
        assert "was made with another model" in error
        assert "LennardJones, not the calculator" in error


def test_a_copy_of_the_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "full.pt")
    options = ["--checkpoint", tmp_path / "full.pt", "--slab", "Cu111", "--size", "2x2x2"]
    options += ["--adsorbate", "*O", "--placements", "1", "--steps", "1", "--out", tmp_path / "s"]
    assert run_command("adsorption search", *options) == 3
    search = FinishedSearch.read(tmp_path / "s")
    own = search.model().identity()
    (tmp_path / "full.pt").rename(tmp_path / "copy.pt")
    copy = str(tmp_path / "copy.pt")
    assert search.model(copy).identity() == own
    assert search.checkpoint(copy) == copy
    with pytest.raises(InputError, match="another model"):
        search.model(EMT())


def test_dft_results_are_collected(
    searched: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, other = rows(searched)[:2]
    files = []
    for row, energy in ((best, -99.0), (other, -100.0)):
        atoms = read(searched / "trajectories" / f"{row['id']}.traj")
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
        files.append(f"{row['id']}.traj")
        write(files[-1], atoms)
    assert run_command("adsorption collect", "--search", searched, "--dft", *files, "--overwrite") == 0
    record = json.loads((searched / "collect.json").read_text())
    assert [row["id"] for row in record["ranking"]] == [other["id"], best["id"]]
    assert (record["top1_held"], record["spearman"]) == (False, pytest.approx(-1.0))
    assert "did NOT hold in DFT; rank correlation -1.00" in capsys.readouterr().out
    refused = ("molecules", "energies of your DFT"), ("vacuum", "energies of your DFT"), ("O", "--gas 'O'")
    for wrong, message in refused:
        arguments = ["--search", searched, "--dft", *files, "--overwrite", "--gas", wrong]
        assert run_command("adsorption collect", *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.pictures
def test_free_energies_make_a_diagram(
    searched: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--calculator", "emt", "--potential", "0.5", "--overwrite"]
    assert run_command("adsorption free-energy", searched, *options) == 0
    record = json.loads((searched / "free_energy.json").read_text())
    assert {"zpe_eV", "entropy_eV", "free_energy_eV", "frequencies_cm1", "imaginary"} <= set(record)
    assert len(record["frequencies_cm1"]) == 3
    assert record["electrons"] == -2.0
    assert record["model"] == json.loads((searched / "settings.json").read_text())["model"]
    assert run_command("adsorption diagram", searched, "--out", "d") == 0
    drawn = json.loads(Path("d/diagram.json").read_text())
    assert drawn["steps"][0]["change_eV"] == pytest.approx(record["free_energy_eV"])
    assert Path("d/diagram.png").stat().st_size > 5000
    assert run_command("adsorption free-energy", searched) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_command("adsorption free-energy", searched, "--overwrite") == 2
    assert "was searched with a calculator" in capsys.readouterr().err


def test_free_energies_need_references_to_molecules(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adsorbate", "*O", "--placements", "1", "--out", "s"]
    assert run_command("adsorption search", *SEARCH, *options) == 0
    assert run_command("adsorption free-energy", "s", "--calculator", "emt") == 2
    assert "--gas molecules" in capsys.readouterr().err


def test_a_barrier_between_two_minima(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = (str(row["id"]) for row in rows(searched)[:2])
    options = ["--calculator", "emt", "--start", first, "--end", last, "--images", "3"]
    status = run_command("adsorption neb", searched, *options, "--overwrite")
    folder = searched / "neb" / f"{first}-{last}"
    record = json.loads((folder / "neb.json").read_text())
    assert status == (0 if record["converged"] else 3)
    assert len(read(folder / "neb.traj", ":")) == 5
    assert record["model"]["calculator"].endswith(".EMT")
    assert record["barrier_eV"] >= max(record["energies_eV"]) - 1e-9
    assert bool(record["intermediate_minima"]) <= bool(record["warnings"])
    card = json.loads((folder / "card.json").read_text())
    assert card["barrier_eV"] == record["barrier_eV"]
    assert len(card["structures"]) == 5
    assert card["label_physics"]
    assert run_command("adsorption verify", folder / "card.json", "--calculator", "emt") == 0
    report = (searched / "report.html").read_bytes()
    assert run_command("adsorption neb", searched, *options) == status  # finished
    assert f"barrier {record['barrier_eV']:.4f} eV" in capsys.readouterr().out
    assert json.loads((folder / "neb.json").read_text()) == record
    assert (searched / "report.html").read_bytes() == report
    assert run_command("adsorption neb", searched, *options, "--fmax", "0.3") == 2
    assert "holds a finished path with other settings (fmax)" in capsys.readouterr().err
    card["barrier_eV"] += 0.1
    (folder / "card.json").write_text(json.dumps(card))
    assert run_command("adsorption verify", folder / "card.json", "--calculator", "emt") == 3
    options = ["--calculator", "emt", "--start", first, "--end", "nothing"]
    assert run_command("adsorption neb", searched, *options) == 2
    assert "has no placement nothing" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["{}", "energy", "best"])
def test_a_broken_record_is_one_sentence(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(searched, folder)
    record = json.loads((folder / "search.json").read_text())
    if broken == "energy":
        del record["placements"][0]["energy_eV"]
    elif broken == "best":
        record["best"]["id"] = "nothing"
    (folder / "search.json").write_text(json.dumps(record if broken != "{}" else {}))
    emt = ["--calculator", "emt", "--overwrite"]
    for command in (
        ["free-energy", folder, *emt],
        ["neb", folder, *emt, "--start", "a", "--end", "b"],
        ["ask", folder],
        ["collect", "--search", folder],
    ):
        assert run_command(f"adsorption {command[0]}", *command[1:]) == 2
        assert "search.json is broken, or no record of a search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adsorbate", "*Xy"], "Xy"),
        (["--adsorbate", "*O", "--slab", "Qq111"], "Qq111"),
        (["--adsorbate", "*O", "--placements", "0"], "placements"),
        (["--adsorbate", "*O", "--gas", "air"], "--gas 'air'"),
        (["--adsorbate", "*O", "--gas", "O=nan"], "--gas 'O=nan'"),
        (["--adsorbate", "*O", "--gas", "O=inf"], "--gas 'O=inf'"),
        (["--adsorbate", "*O", "--calculator", "nothing"], "there is no calculator"),
        (["--adsorbate", "*O", "--slab", "Fe110"], "No EMT-potential for Fe"),
    ],
)
def test_bad_input_is_one_sentence(
    in_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run_command("adsorption search", *SEARCH, "--out", "s", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert run_command("adsorption verify", "missing.json", "--calculator", "emt") == 2
    assert run_command("adsorption collect", "--search", "nowhere", "--dft", "x") == 2


def test_an_input_with_the_name_of_a_result_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slab = tmp_path / "clean_slab.extxyz"
    slab.write_text("mine")
    words = ["--calculator", "emt", "--slab", slab, "--adsorbate", "*O", "--gas", "O=4.6", "--out", tmp_path]
    assert run_command("adsorption", "search", *words) == 2
    assert "is read as input and lies in" in capsys.readouterr().err
    assert slab.read_text() == "mine"
