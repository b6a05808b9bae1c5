"""Free-energy diagrams: balanced steps, limiting potentials, folders that do not belong together."""

import json
from pathlib import Path

import pytest

from equiformer2.adsorption.diagram import diagram, diagram_picture, read_states
from equiformer2.errors import InputError


def folder(path: Path, adsorbate: str, energy: float, electrons: float, **changes: object) -> Path:
    path.mkdir()
    settings = {"slab": "a", "model": "emt", "adsorbate": adsorbate}
    found = {"free_energy_eV": energy, "electrons": electrons, "reaction": "", "temperature_K": 300.0}
    found["potential_against_rhe_V"] = 0.0
    (path / "search.json").write_text("{}")
    (path / "settings.json").write_text(
        json.dumps(settings | {k: v for k, v in changes.items() if k in settings})
    )
    (path / "free_energy.json").write_text(
        json.dumps(found | {k: v for k, v in changes.items() if k in found})
    )
    return path


def test_oxidation_of_water_is_limited_by_its_largest_step(tmp_path: Path) -> None:
    folders = [folder(tmp_path / "oh", "HO", 1.0, -1.0), folder(tmp_path / "o", "O", 2.5, -2.0)]
    balanced = diagram(read_states(folders), 0.0)
    assert [step["change_eV"] for step in balanced["steps"]] == [1.0, 1.5]
    assert [step["electrons"] for step in balanced["steps"]] == [-1.0, -1.0]
    assert balanced["limiting_potential_V"] == pytest.approx(1.5)
    assert [state["adsorbate"] for state in balanced["states"]] == ["*", "*HO", "*O"]
    (folders[0] / "search.json").write_text('{"settings": {"adsorbate": "*OH"}}')
    assert read_states(folders)[0]["adsorbate"] == "*OH"
    assert diagram_picture(balanced, "OER")[:4] == b"\x89PNG"


def test_a_reduction_is_limited_by_the_lowest_potential(tmp_path: Path) -> None:
    folders = [folder(tmp_path / "h", "H", 0.2, 1.0), folder(tmp_path / "n", "H2", 0.9, 2.0)]
    assert diagram(read_states(folders), 0.0)["limiting_potential_V"] == pytest.approx(-0.7)
    assert diagram(read_states(folders)[:1], -0.5)["limiting_potential_V"] == pytest.approx(-0.7)


def test_folders_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", "O", 1.0, -2.0)
    for name, changes, message in (
        ("b", {"slab": "b"}, "another slab"),
        ("c", {"model": "x"}, "another model"),
        ("d", {"temperature_K": 400.0}, "another temperature"),
    ):
        with pytest.raises(InputError, match=message):
            read_states([first, folder(tmp_path / name, "OH", 1.0, -1.0, **changes)])
    (first / "free_energy.json").unlink()
    with pytest.raises(InputError, match="adsorption free-energy"):
        read_states([first])
