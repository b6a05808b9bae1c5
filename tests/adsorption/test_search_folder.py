"""Another search in a folder: the old one's files go, others stay, and what DFT gave is not lost."""

import json
from pathlib import Path

import pytest
from ase.calculators.emt import EMT
from test_basins import slab

from equiformer2.adsorption.find import find_adsorption_energy
from equiformer2.adsorption.search_folder import remove_search
from equiformer2.errors import InputError


def search(folder: Path, name: str, **options: object) -> float:
    settings = {"placements": 1, "steps": 3, "fmax": 0.1, "check_minima": 0, "out": folder}
    found = find_adsorption_energy(slab(size=(2, 2, 3)), name, EMT(), **{**settings, **options})  # type: ignore[arg-type]
    assert found.energy is not None
    return found.energy


def test_overwrite_replaces_another_search_and_nothing_else(tmp_path: Path) -> None:
    oxygen = search(tmp_path / "s", "*O")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    (tmp_path / "s" / "mine.json").write_text("{}")
    (tmp_path / "s" / "free_energy.json").write_text('{"schema": "adsorption-free-energy/1"}')
    with pytest.raises(InputError, match="holds a finished search"):
        search(tmp_path / "s", "*H")
    with_outcar = tmp_path / "s" / "dft" / "01" / "OUTCAR"
    with_outcar.write_text("days of work")
    before = sorted(path.name for path in (tmp_path / "s").rglob("*"))
    with pytest.raises(InputError, match="OUTCAR is no file of the search"):
        search(tmp_path / "s", "*H", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "s").rglob("*")) == before
    with_outcar.unlink()
    hydrogen = search(tmp_path / "s", "*H", overwrite=True)
    assert hydrogen == pytest.approx(search(tmp_path / "alone", "*H"))
    assert hydrogen != pytest.approx(oxygen, abs=0.1)
    ids = {json.loads(line)["id"] for line in (tmp_path / "s" / "relaxed.jsonl").read_text().splitlines()}
    assert {path.stem for path in (tmp_path / "s" / "trajectories").iterdir()} == ids
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert {"notes.txt", "mine.json"} <= names
    assert "free_energy.json" not in names
    more_steps = search(tmp_path / "s", "*H", overwrite=True, steps=4)  # other settings are another search
    assert more_steps != pytest.approx(hydrogen, abs=1e-6)


def test_what_is_no_search_is_left_alone(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("settings.json", "relaxed.jsonl")]
    for file in files:
        file.write_text('{"checkpoint": "x"}\n')
    with pytest.raises(InputError, match="something else than a search"):
        remove_search(tmp_path)
    with pytest.raises(InputError, match="something else than a search"):
        search(tmp_path, "*O", overwrite=True)
    assert [file.read_text() for file in files] == ['{"checkpoint": "x"}\n'] * 2


def test_a_removal_that_was_stopped_goes_on(tmp_path: Path) -> None:
    search(tmp_path / "s", "*O")
    (tmp_path / "s" / "relaxed.jsonl").unlink()
    for path in (tmp_path / "s" / "trajectories").iterdir():
        path.unlink()
    remove_search(tmp_path / "s")
    assert [path.name for path in (tmp_path / "s").iterdir() if path.name != ".lock"] == []
