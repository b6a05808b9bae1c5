"""Commands from minima to free energies, diagrams and volcanoes: options, files, refusals."""

import json
from pathlib import Path

import pytest
from command_line import run_command

SEARCH = ["--calculator", "emt", "--slab", "Cu111", "--size", "2x2x2", "--free-layers", "1", "--fmax", "0.1"]
EMT = ["--calculator", "emt", "--overwrite"]


@pytest.fixture(scope="module")
def carbon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Search of CHO on Cu(111), referred to EMT's molecules."""
    folder = tmp_path_factory.mktemp("runs") / "cho"
    options = ["--adsorbate", "*CHO", "--gas", "molecules", "--placements", "1", "--out", folder]
    assert run_command("adsorption search", *SEARCH, *options) == 0
    return folder


def free_energy(folder: Path) -> dict[str, object]:
    return json.loads((folder / "free_energy.json").read_text())  # type: ignore[no-any-return]


def test_records_have_three_conventions(carbon: Path) -> None:
    for name in ("search.json", "card.json"):
        record = json.loads((carbon / name).read_text())
        found = record["conventions"]
        assert set(found) == {"oc20", "calculator", "literature"}
        assert {one["energy_eV"] for one in found.values()} == {record["adsorption_energy_eV"]}
        assert found["oc20"]["reaction"] == "* + CO + 1/2 H2 -> *CHO"
    assert "* + CO + 1/2 H2" in (carbon / "report.html").read_text().replace("&gt;", ">")


def test_hindered_entropy_and_pressures(carbon: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("adsorption free-energy", carbon, *EMT) == 0
    harmonic = free_energy(carbon)
    barriers = ["--entropy", "hindered", "--translation-barrier", "0.1", "--rotation-barrier", "0.02"]
    capsys.readouterr()
    assert run_command("adsorption free-energy", carbon, *EMT, *barriers) == 0
    assert "barrier of rotation: 0.020 eV (given)" in capsys.readouterr().out
    hindered = free_energy(carbon)
    assert hindered["entropy_eV"] != harmonic["entropy_eV"]
    assert hindered["harmonic"]["entropy_eV"] == pytest.approx(harmonic["entropy_eV"])  # type: ignore[index]
    assert run_command("adsorption free-energy", carbon, *EMT, "--pressure", "CO=10,H2=1") == 0
    lower = harmonic["free_energy_eV"] - free_energy(carbon)["free_energy_eV"]  # type: ignore[operator]
    assert lower == pytest.approx(0.05916, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--translation-barrier", "0.1"], "no meaning with --entropy harmonic"),
        (["--entropy", "hindered"], "give --translation-barrier"),
        (["--pressure", "CO"], "--pressure 'CO' is no gas"),
        (["--pressure", "CO=1,CO=2"], "gives CO twice"),
        (["--pressure", "CH4=1"], "CH4 has no meaning"),
        (["--pressure", "H2=10", "--potential", "0.2"], "against H2 of 1 bar"),
        (["--temperature", "-1"], "the temperature is -1"),
    ],
)
def test_wrong_options_are_one_sentence(
    carbon: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run_command("adsorption free-energy", carbon, *EMT, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_structure_far_from_a_minimum_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adsorbate", "*O", "--gas", "molecules", "--placements", "1"]
    far = [*options, "--steps", "0", "--out", tmp_path / "far"]
    assert run_command("adsorption search", *SEARCH, *far) == 3
    assert run_command("adsorption free-energy", tmp_path / "far", *EMT) == 2
    assert "it is no minimum of this model" in capsys.readouterr().err
    assert not (tmp_path / "far" / "free_energy.json").exists()


def test_a_diagram_at_several_potentials(
    carbon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("adsorption free-energy", carbon, *EMT) == 0
    options = ["--start", "CO2", "--potentials", "0", "-0.5", "--out", tmp_path]
    assert run_command("adsorption diagram", carbon, *options) == 0
    record = json.loads((tmp_path / "diagram.json").read_text())
    assert [state["adsorbate"] for state in record["states"]] == ["CO2(g)", "*CHO"]
    assert record["steps"][0]["electrons"] == 3.0
    assert record["steps"][0]["gases"] == {"H2O": -1.0}
    assert len(record["at_potentials"]) == 2
    assert "limiting potential" in capsys.readouterr().out
    assert (tmp_path / "diagram.png").stat().st_size > 5000
    assert run_command("adsorption diagram", carbon, "--end", "CH4", "--out", tmp_path / "x") == 2
    assert "no gas CH4" in capsys.readouterr().err


def test_a_diagram_with_an_unconverged_state_has_status_3(
    carbon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("adsorption free-energy", carbon, *EMT) == 0
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("search.json", "settings.json"):
        (copy / name).write_bytes((carbon / name).read_bytes())
    sentence = "the structure has not converged (largest force 0.200 eV/Å)"
    changed = free_energy(carbon) | {"converged": False, "warnings": [sentence]}
    (copy / "free_energy.json").write_text(json.dumps(changed))
    assert run_command("adsorption diagram", carbon, copy, "--out", tmp_path / "d") == 3
    assert f"warning: *CHO: {sentence}" in capsys.readouterr().out
    assert f"*CHO: {sentence}" in json.loads((tmp_path / "d" / "diagram.json").read_text())["warnings"]


def test_a_volcano_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    table.write_text("system,H\nPt,-0.09\nAu,0.45\nNi,-0.3\n", encoding="utf-8")
    out = tmp_path / "v"
    assert run_command("adsorption volcano", table, "--reaction", "her", "--out", out) == 0
    assert "Pt " in capsys.readouterr().out
    record = json.loads((out / "volcano.json").read_text())
    assert record["schema"] == "adsorption-volcano/1"
    assert [point["system"] for point in record["points"]] == ["Pt", "Ni", "Au"]
    assert (out / "volcano.png").stat().st_size > 5000
    for wrong, message in (
        ([table, "--out", tmp_path / "x"], "give --reaction"),
        ([table, "--reaction", "her", "--out", out], "exists already"),
        ([tmp_path / "missing.csv", "--reaction", "her", "--out", tmp_path / "x"], "missing.csv"),
        ([tmp_path, "--out", tmp_path / "x"], "diagram.json"),
        ([table, tmp_path, "--reaction", "her", "--out", tmp_path / "x"], "one CSV file, or folders"),
    ):
        assert run_command("adsorption volcano", *wrong) == 2
        assert message in capsys.readouterr().err


class TestDispersion:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("dftd3.ase")

    def test_it_is_told_apart(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        placed = ["--adsorbate", "O", "--site", "fcc", "--d3", "pbe", "--out", tmp_path / "e"]
        assert run_command("adsorption energy", *SEARCH, *placed) == 0
        record = json.loads((tmp_path / "e" / "adsorption_energy.json").read_text())
        assert record["model"]["d3"] == {"functional": "pbe", "damping": "d3bj"}
        assert f"{record['d3_eV']['difference']:.4f} eV" in capsys.readouterr().out
        relaxed = tmp_path / "e" / "relaxed.extxyz"
        options = ["--calculator", "emt", "--d3", "pbe/d3zero", "--out", tmp_path / "r", "--fmax", "0.5"]
        assert run_command("relax", relaxed, *options) == 0
        model = json.loads((tmp_path / "r" / "relaxation.json").read_text())["model"]
        assert model["d3"]["energy_eV"] < 0.0

    def test_wrong_uses_are_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        placed = ["--adsorbate", "O", "--out", tmp_path / "e"]
        for options, message in (
            (["--d3", "nosuch"], "no parameters of the functional 'nosuch'"),
            (["--d3", "pbe", "--gas", "O=1"], "--gas vacuum or --gas molecules"),
        ):
            assert run_command("adsorption energy", *SEARCH, *placed, *options) == 2
            assert message in capsys.readouterr().err
