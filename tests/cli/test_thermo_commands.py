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


@pytest.mark.pictures
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
    assert run_command("adsorption diagram", carbon, carbon, "--out", tmp_path / "x") == 2
    assert "are the same state" in capsys.readouterr().err


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
    assert run_command("adsorption diagram", copy, "--out", tmp_path / "d") == 3
    assert f"warning: *CHO: {sentence}" in capsys.readouterr().out
    assert f"*CHO: {sentence}" in json.loads((tmp_path / "d" / "diagram.json").read_text())["warnings"]


@pytest.mark.pictures
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


def test_one_file_of_corrections_serves_all(
    carbon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "of this project.csv"
    file.write_text("species,eV\nCO,0.1\n*CHO,-0.2\n*OH,-0.3\nCO2,0.45\n")
    given = ["--corrections", file]
    assert run_command("adsorption free-energy", carbon, *EMT) == 0
    plain = free_energy(carbon)
    assert plain["corrections_eV"] == {}
    capsys.readouterr()
    assert run_command("adsorption diagram", carbon, *given, "--out", tmp_path / "d") == 0
    assert "corrections (eV): CO +0.1, *CHO -0.2; not used here: *OH, CO2" in capsys.readouterr().out
    drawn = json.loads((tmp_path / "d" / "diagram.json").read_text())
    # * + CO + H+ + e- -> *CHO
    assert drawn["steps"][0]["change_eV"] == pytest.approx(plain["free_energy_eV"] - 0.1 - 0.2)  # type: ignore[operator]
    assert drawn["corrections_eV"] == {"CO": 0.1, "*CHO": -0.2}
    assert drawn["corrections"]["file"] == str(file)
    assert run_command("adsorption free-energy", carbon, *EMT, *given) == 0
    corrected = free_energy(carbon)
    assert corrected["free_energy_eV"] == pytest.approx(drawn["steps"][0]["change_eV"])
    assert corrected["corrections_eV"] == pytest.approx({"CO": -0.1, "*CHO": -0.2})
    assert corrected["corrections"] == drawn["corrections"]
    assert run_command("adsorption diagram", carbon, "--out", tmp_path / "e") == 0
    assert (
        json.loads((tmp_path / "e" / "diagram.json").read_text())["corrections_eV"] == drawn["corrections_eV"]
    )
    capsys.readouterr()
    assert run_command("adsorption diagram", carbon, *given, "--out", tmp_path / "f") == 2
    assert "is corrected already: leave --corrections out" in capsys.readouterr().err
    table = tmp_path / "orr.csv"
    table.write_text("system,OH,O,OOH\nA,0.8,1.55,4.0\n")
    options = ["--reaction", "orr", "--out", tmp_path / "v"]
    assert run_command("adsorption volcano", table, *options, *given) == 0
    (point,) = json.loads((tmp_path / "v" / "volcano.json").read_text())["points"]
    assert point["free_energies_eV"] == pytest.approx({"OH": 0.5, "O": 1.55, "OOH": 4.0})
    assert (
        run_command("adsorption volcano", tmp_path / "e", tmp_path / "missing", "--out", tmp_path / "w") == 0
    )
    record = json.loads((tmp_path / "w" / "volcano.json").read_text())
    assert record["corrections_eV"] == drawn["corrections_eV"]
    # A search has them in the convention of the literature, on its card.
    options = ["--adsorbate", "*CHO", "--gas", "molecules", "--placements", "1", *given]
    search = [*options, "--steps", "0", "--check-minima", "0", "--out", tmp_path / "s"]
    assert run_command("adsorption search", *SEARCH, *search) == 3
    card = json.loads((tmp_path / "s" / "card.json").read_text())
    found = card["conventions"]["literature"]
    assert (found["corrections_eV"]["CO"], found["corrections_eV"]["*CHO"]) == pytest.approx((-0.1, -0.2))
    assert card["settings"]["corrections"]["file_sha256"] == drawn["corrections"]["file_sha256"]
    assert "corrections (eV): CO -0.1" in (tmp_path / "s" / "report.html").read_text()
    capsys.readouterr()
    file.write_text("CO,0.2\n")
    assert run_command("adsorption search", *SEARCH, *search) == 2
    assert "other settings (corrections)" in capsys.readouterr().err
