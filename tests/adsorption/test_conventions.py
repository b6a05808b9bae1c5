"""Conventions of an adsorption energy: balanced reactions, conversions that go back, reasons."""

from collections import Counter
from typing import Any

import pytest
from ase import Atoms

from equiformer2.adsorption.conventions import convention_lines, conventions
from equiformer2.adsorption.gases import water_formation_energy

ADSORBATES = (
    "H",
    "O",
    "OH",
    "OOH",
    "CO",
    "CHO",
    "COH",
    "C",
    "CH4",
    "CO2",
    "N",
    "NH3",
    "N2",
    "CHNO",
    "C2H5OH",
)
MOLECULES = {"source": "molecules", "label": "EMT's", "per_atom_eV": {"O": 1.0}, "molecules": {}}


def atoms_of(gases: dict[str, float]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for name, number in gases.items():
        for symbol, count in Counter(Atoms(name).get_chemical_symbols()).items():
            total[symbol] += number * count  # type: ignore[assignment]
    return {symbol: count for symbol, count in total.items() if abs(count) > 1e-12}


@pytest.mark.parametrize("adsorbate", ADSORBATES)
def test_reactions_are_balanced_and_conversions_go_back(adsorbate: str) -> None:
    count = Counter(Atoms(adsorbate).get_chemical_symbols())
    for kind, gas in (("adsorption", None), ("total", MOLECULES)):
        found = conventions(0.7, kind, Atoms(adsorbate), gas)
        for one in found.values():
            if one["energy_eV"] is not None:
                assert atoms_of(one["gases"]) == pytest.approx(dict(count))
        literature = found["literature"]
        back = literature["energy_eV"] - sum(literature["corrections_eV"].values())
        assert back == pytest.approx(found["oc20"]["energy_eV"], abs=1e-12) == 0.7
        # The difference of both reactions is so many times H2 + 1/2 O2 -> H2O.
        water = found["oc20"]["gases"].get("H2O", 0.0)
        assert sum(literature["corrections_eV"].values()) == pytest.approx(water * water_formation_energy())
        difference = Counter(literature["gases"])
        difference.subtract(found["oc20"]["gases"])
        expected = {"H2": water, "O2": water / 2, "H2O": -water}
        assert {name: n for name, n in difference.items() if n} == {n: v for n, v in expected.items() if v}


def test_reactions_are_written_out() -> None:
    found = conventions(0.7, "adsorption", Atoms("CHO"))
    assert found["oc20"]["reaction"] == "* + CO + 1/2 H2 -> *CHO"
    assert found["literature"]["energy_eV"] == found["oc20"]["energy_eV"]
    assert "no energies of molecules" in found["calculator"]["reason"]
    assert conventions(0.0, "adsorption", ["O"])["oc20"]["reaction"] == "* + H2O -> *O + H2"
    oxygen = conventions(1.5, "adsorption", ["O"])["literature"]
    assert (oxygen["reaction"], oxygen["energy_eV"]) == (
        "* + 1/2 O2 -> *O",
        pytest.approx(1.5 - 2.732, abs=1e-3),
    )
    assert conventions(0.0, "adsorption", Atoms("C"))["oc20"]["reaction"] == "* + CO + H2 -> *C + H2O"
    assert any("RPBE" in note for note in oxygen["notes"])
    assert "1.2323" in "\n".join(convention_lines(conventions(1.5, "adsorption", ["O"])))


@pytest.mark.parametrize(
    ("kind", "symbols", "gas", "provenance", "reason"),
    [
        ("adsorption", "SH", None, None, "no reference for S"),
        ("total", "OH", {"source": "vacuum", "molecules": {"HO": {}}}, None, "referred to HO in vacuum"),
        ("total", "O", {"source": "given", "per_atom_eV": {"O": 4.6}}, None, "are given, and of which"),
        ("adsorption", "O", None, ["SevenNet-0, not DFT"], "labels of the checkpoint are SevenNet-0"),
        ("adsorption", "O", None, ["OC20's DFT", "SevenNet-0"], "are OC20's DFT, SevenNet-0, and what"),
    ],
)
def test_unknown_conventions_have_a_reason(
    kind: str, symbols: str, gas: dict[str, Any] | None, provenance: Any, reason: str
) -> None:
    if provenance is not None:
        stage = {"elements": {"O": 1}, "labels": provenance, "earlier": []}
        provenance = {"training_data": stage}
    found = conventions(0.5, kind, Atoms(symbols), gas, provenance)
    for name in ("oc20", "literature"):
        assert found[name]["energy_eV"] is None
        assert found[name]["reaction"] is None
        assert reason in found[name]["reason"]
    assert (found["calculator"]["energy_eV"] is None) == (kind == "adsorption")
    assert len(convention_lines(found)) == 3


def test_a_molecule_in_vacuum_that_is_a_reference_is_known() -> None:
    gas = {"source": "vacuum", "molecules": {"CO": {}}, "label": "EMT's"}
    found = conventions(-1.0, "total", Atoms("CO"), gas)
    assert {one["energy_eV"] for one in found.values()} == {-1.0}
    assert {one["reaction"] for one in found.values()} == {"* + CO -> *CO"}
    labels = {"elements": {"O": 1}, "labels": ["OC20's DFT"], "earlier": []}
    assert conventions(0.5, "adsorption", ["O"], None, {"training_data": labels})["oc20"]["energy_eV"] == 0.5
