"""Volcano: known legs and peaks, limiting potentials of diagrams, tables that are wrong."""

import json
import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equiformer2.adsorption.diagram import diagram, gas_state
from equiformer2.adsorption.volcano import (
    SystemTable,
    named_path,
    read_diagrams,
    read_table,
    volcano,
    volcano_picture,
)
from equiformer2.errors import InputError


def scaled(*hydroxides: float) -> SystemTable:
    """Systems on exact scaling lines: O = 2 OH + 0.1, OOH = OH + 3.2 (Rossmeisl et al. 2005)."""
    energies = {f"s{x:g}": {"OH": x, "O": 2 * x + 0.1, "OOH": x + 3.2} for x in hydroxides}
    return SystemTable(energies, None, [])


def test_oxygen_reduction_has_the_peak_of_the_scaling() -> None:
    found = volcano(scaled(0.5, 0.8, 1.2), named_path("orr"))
    assert found["scaling"]["OOH"] == pytest.approx(
        {"slope": 1.0, "intercept_eV": 3.2, "mae_eV": 0.0}, abs=1e-9
    )
    # Weak side: 4.92 - 3.2 - x; strong side: x.
    assert found["peak"]["descriptor_eV"] == pytest.approx(0.858, abs=2e-3)
    assert found["peak"]["activity_V"] == pytest.approx(0.858, abs=2e-3)
    points = {point["system"]: point for point in found["points"]}
    assert points["s0.5"]["limiting_potential_V"] == pytest.approx(0.5)
    assert points["s0.5"]["limiting_step"] == "*OH -> *"
    assert points["s1.2"]["limiting_potential_V"] == pytest.approx(4.916 - 4.4, abs=1e-3)
    assert found["points"][0]["system"] == "s0.8"  # the most active first
    assert volcano_picture(found, "ORR")[:4] == b"\x89PNG"


def test_oxygen_evolution_is_limited_by_the_highest_step() -> None:
    found = volcano(scaled(0.8, 1.2, 1.9), named_path("oer"), "O-OH")
    points = {point["system"]: point for point in found["points"]}
    assert points["s1.2"]["limiting_potential_V"] == pytest.approx(1.9)
    assert points["s1.2"]["descriptor_eV"] == pytest.approx(1.3)
    assert points["s1.9"]["limiting_step"] == "*OH -> *O"
    assert found["peak"]["descriptor_eV"] == pytest.approx(1.6)


def test_hydrogen_needs_no_fit() -> None:
    energies = {"Pt": {"H": -0.09}, "Au": {"H": 0.45}}
    found = volcano(SystemTable(energies, None, []), named_path("her"))
    assert {point["system"]: point["activity_V"] for point in found["points"]} == {"Pt": -0.09, "Au": -0.45}
    assert found["peak"] == pytest.approx({"descriptor_eV": 0.0, "activity_V": 0.0, "extrapolated_eV": 0.0})
    alone = volcano(SystemTable({"Pt": energies["Pt"]}, None, []), named_path("her"))
    assert volcano_picture(alone, "HER")[:4] == b"\x89PNG"


def test_two_systems_have_points_only() -> None:
    found = volcano(scaled(0.5, 0.8), named_path("orr"))
    assert (found["legs"], found["peak"], found["scaling"]) == ([], None, {})
    assert len(found["points"]) == 2
    assert volcano(scaled(0.5, 0.5, 0.5), named_path("orr"))["legs"] == []
    assert volcano_picture(found, "ORR")[:4] == b"\x89PNG"


def test_tables_are_read(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("system, *OH, O_eV, OOH\n\nPt(111), 0.8,1.6,4.0\nAu(111),1.4,2.9,\n", encoding="utf-8")
    table = read_table(file)
    assert table.energies["Pt(111)"] == {"OH": 0.8, "O": 1.6, "OOH": 4.0}
    found = volcano(table, named_path("orr"))
    assert found["notes"] == ["Au(111) is left out: it has no free energy of *OOH"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the columns system"),
        ("name,OH\na,1\n", "the columns system"),
        ("system,OH,OH\na,1,2\n", "each once"),
        ("system,OH\n", "no system"),
        ("system,OH\na,x\n", "row 2, column OH: 'x' is no finite"),
        ("system,OH\na,inf\n", "'inf' is no finite"),
        ("system,OH\na,1\na,2\n", "row 3 is a again"),
        ("system,OH\n,1\n", "has no name"),
        ("system,OH\na,1,2\n", "3 cells"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_table(file)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.text(st.sampled_from('sytem,OH*_V-.19e"\n\0 é\u2028'), max_size=12), max_size=6))
def test_any_text_is_a_table_or_refused(pieces: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.csv"
        file.write_text("system,OH\na,1\n" + "".join(pieces), encoding="utf-8")
        with suppress(InputError):
            table = read_table(file)
            assert all(math.isfinite(x) for one in table.energies.values() for x in one.values())


def test_wrong_questions_are_refused() -> None:
    with pytest.raises(InputError, match="descriptor 'CO' is not one"):
        volcano(scaled(0.5), named_path("orr"), "CO")
    with pytest.raises(InputError, match="reaction 'xyz' is unknown"):
        named_path("xyz")
    with pytest.raises(InputError, match="no system has free energies of all of H"):
        volcano(scaled(0.5), named_path("her"))
    with pytest.raises(InputError, match="that takes electrons in every step"):
        volcano(scaled(0.5), [*named_path("oer"), *named_path("oer")[:1]])


def test_diagrams_give_their_own_limiting_potentials(tmp_path: Path) -> None:
    folders = []
    for metal, x in (("pt", 0.7), ("ir", 0.3), ("au", 1.5)):
        states = [
            {"adsorbate": f"*{name}", "free_energy_eV": energy - n * 0.5, "electrons": -n, "gases": {}}
            for name, energy, n in (("OH", x, 1.0), ("O", 2 * x, 2.0), ("OOH", x + 3.2, 3.0))
        ]
        balanced = diagram([*states, gas_state("O2", 298.15, 0.5)], 0.5)
        folder = tmp_path / metal / "oer"
        folder.mkdir(parents=True)
        record = {**balanced, "potential_against_rhe_V": 0.5}
        (folder / "diagram.json").write_text(json.dumps(record))
        folders.append(folder)
        table = read_diagrams([folder])
        (point,) = volcano(table, table.path or [])["points"]
        assert point["limiting_potential_V"] == pytest.approx(balanced["limiting_potential_V"])
        assert point["system"] == "oer"
    broken = tmp_path / "broken"
    broken.mkdir()
    table = read_diagrams([*folders, broken])
    assert set(table.energies) == {"pt", "ir", "au"}
    assert len(table.notes) == 1
    assert volcano(table, table.path or [])["scaling"]["O"]["slope"] == pytest.approx(2.0)
    doubtful = json.loads((folders[0] / "diagram.json").read_text())
    doubtful |= {"converged": False, "warnings": ["*OH: two imaginary modes"]}
    (folders[0] / "diagram.json").write_text(json.dumps(doubtful))
    told = " ".join(read_diagrams(folders).notes)
    assert "pt: one of its states has not converged" in told
    assert "pt: *OH: two imaginary modes" in told
    with pytest.raises(InputError, match="given twice"):
        read_diagrams([folders[0], folders[0]])
    with pytest.raises(InputError, match=r"broken/diagram\.json is left out: .*No such file"):
        read_diagrams([broken])


def write_diagram(folder: Path, *names: str, **changes: Any) -> Path:
    """Diagram of these adsorbates and O2, of one model, at 298.15 K and with one gas reference."""
    conditions = {"temperature_K": 298.15, "pressures_bar": {}}
    conditions["gas_references"] = {"source": "molecules", "per_atom_eV": {"O": -7.2}}
    conditions |= {key: value for key, value in changes.items() if key in conditions}
    states = [
        {"adsorbate": f"*{name}", "free_energy_eV": 0.9 * n, "electrons": -float(n), "gases": {}} | conditions
        for n, name in enumerate(names, 1)
    ]
    o2 = gas_state("O2", conditions["temperature_K"], 0.0, conditions["pressures_bar"])
    folder.mkdir()
    record = {
        **diagram([*states, o2], 0.0),
        "potential_against_rhe_V": 0.0,
        "model": changes.get("model", "a"),
    }
    (folder / "diagram.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature_K": 400.0}, "another temperature"),
        ({"pressures_bar": {"H2O": 1.0}}, "another pressures"),
        ({"model": "b"}, "another model"),
        ({"gas_references": {"source": "molecules", "per_atom_eV": {"O": -7.0}}}, "other gas references"),
        ({"pressures_bar": {"H2": 10.0}}, "H2 has 10 bar"),
    ],
)
def test_diagrams_of_other_conditions_are_left_out(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    first = write_diagram(tmp_path / "a", "OH", "O", "OOH")
    second = write_diagram(tmp_path / "b", "OH", "O", "OOH", **changes)
    table = read_diagrams([first, second])
    assert set(table.energies) == {"a"}
    assert message in table.notes[0]


def test_an_adsorbate_that_is_two_states_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\*OH is more than one of its states"):
        read_diagrams([write_diagram(tmp_path / "a", "OH", "OH", "OOH")])


def test_a_named_path_ends_at_the_temperature_of_the_diagrams(tmp_path: Path) -> None:
    table = read_diagrams([write_diagram(tmp_path / "a", "OH", "O", "OOH", temperature_K=700.0)])
    path = named_path("oer", table.temperature, table.pressures)
    assert table.path is not None
    assert path[-1].energy == pytest.approx(table.path[-1].energy)
    assert path[-1].energy != pytest.approx(named_path("oer")[-1].energy, abs=0.1)
