"""Corrections by species: files, what they change, refusals."""

import json
from pathlib import Path

import pytest

from equiformer2.adsorption.conventions import conventions
from equiformer2.adsorption.corrections import Corrections
from equiformer2.adsorption.volcano import SystemTable
from equiformer2.errors import InputError

GIVEN = {"H2O": -0.1, "H2": 0.08, "*OH": -0.3, "CO2": 0.45}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(GIVEN)),
        ("with header.csv", "species,eV\nH2O,-0.1\nH2,0.08\n\n *OH , -0.3\nCO2,0.45\n"),
        ("plain.csv", "\ufeffH2O,-0.1\r\nH2,0.08\r\n*OH,-0.3\r\nCO2,0.45"),
        ("a.txt", "H2O,-0.1\nH2,0.08\n*OH,-0.3\nCO2,0.45\n"),
    ],
)
def test_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = Corrections.read(tmp_path / name)
    assert found.species == GIVEN
    assert found.summary()["file"] == str(tmp_path / name)
    assert len(found.summary()["file_sha256"]) == 64


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "holds no species"),
        ("a.csv", "species,eV\n", "holds no species"),
        ("a.csv", "CO,0.1\nCO,0.1", "gives CO twice"),
        ("a.csv", "CO,0.1\nH2", "row 2 is no species with an energy"),
        ("a.csv", "CO,much", "row 1 is no species with an energy"),
        ("a.csv", "CO,nan", "correction of CO is nan"),
        ("a.csv", "CO,-14.8e3", "correction of CO is -14800"),
        ("a.csv", "carbon monoxide,0.1", "'carbon monoxide' is no species"),
        ("a.json", "[1, 2]", "no JSON object"),
        ("a.json", '{"CO": "0.1"}', "correction of CO is '0.1'"),
        ("a.json", '{"CO": true}', "correction of CO is True"),
        ("a.json", "{", "a.json"),
        ("a.json", "{}", "holds no species"),
        ("a.csv", "\0\1\2", "a.csv"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        Corrections.read(tmp_path / name)


def test_a_formation_is_corrected_for_what_it_uses_up() -> None:
    corrections = Corrections(GIVEN)
    # * + H2O -> *OH + 1/2 H2
    for name in ("*OH", "OH"):
        used = corrections.of(name, {"H2O": 1.0}, -1.0)
        assert used == pytest.approx({"H2O": 0.1, "H2": 0.04, "*OH": -0.3})
    assert corrections.of("*O", {}, 0.0) == {}
    told = corrections.told(corrections.of("*H", {}, 1.0))
    assert told.startswith("corrections (eV): H2 +0.08; not used here: H2O, *OH, CO2; O2 and CO2 come from")


def test_the_convention_of_the_literature_is_corrected() -> None:
    plain = conventions(-1.0, "adsorption", "OH")
    found = conventions(-1.0, "adsorption", "OH", corrections=Corrections(GIVEN), name="*OH")
    # In OC20's convention *OH is of H2O - 1/2 H2.
    change = found["literature"]["energy_eV"] - plain["literature"]["energy_eV"]
    assert change == pytest.approx(0.1 + 0.04 - 0.3)
    assert found["oc20"] == plain["oc20"]
    assert {"H2O", "H2", "*OH", "O2 by way of water"} == set(found["literature"]["corrections_eV"])


def test_systems_of_a_table_are_corrected_once() -> None:
    table = SystemTable({"A": {"OH": 0.8, "O": 1.5}, "B": {"OH": 1.0}}, None, [])
    found = table.corrected(Corrections(GIVEN))
    assert found.energies["A"]["OH"] == pytest.approx(0.8 + 0.14 - 0.3)
    # * + H2O -> *O + H2
    assert found.energies["A"]["O"] == pytest.approx(1.5 + 0.1 + 0.08)
    assert found.corrections == {"H2O": -0.1, "H2": 0.08, "*OH": -0.3}
    with pytest.raises(InputError, match="corrected already"):
        found.corrected(Corrections(GIVEN))


def test_gases_of_a_name_without_a_formula_are_not_forgotten() -> None:
    table = SystemTable({"A": {"hydroxide": 0.8, "OH": 0.8}}, None, [])
    with pytest.raises(InputError, match=r"correction of H2 cannot be applied to \*hydroxide"):
        table.corrected(Corrections({"H2": 0.1}))
    assert table.corrected(Corrections({"*hydroxide": 0.1})).energies["A"] == {"hydroxide": 0.9, "OH": 0.8}


@pytest.mark.parametrize(
    ("gas", "fits"),
    [
        ({"source": "vacuum", "per_atom_eV": {}}, True),
        ({"source": "molecules", "per_atom_eV": {"O": -7.2}}, False),
        (None, False),
    ],
)
def test_corrections_are_of_energies_with_one_gas_reference(
    tmp_path: Path, gas: dict[str, object] | None, fits: bool
) -> None:
    """DFT less model holds the difference of the references, too: electronvolts for an atom in vacuum."""
    file = tmp_path / "a.json"
    of_model = {"identity": {"x": 1}, "gas": {"source": "vacuum", "per_atom_eV": {}}}
    file.write_text(
        json.dumps({"schema": "adsorption-corrections/1", "species_eV": {"*O": 4.0}, "model": of_model})
    )
    corrections = Corrections.read(file)
    if fits:
        corrections.check_model({"x": 1}, gas)
    else:
        with pytest.raises(InputError, match=r"other gas references \(vacuum\)"):
            corrections.check_model({"x": 1}, gas)
    Corrections({"*O": 0.1}).check_model({"x": 1}, gas)
