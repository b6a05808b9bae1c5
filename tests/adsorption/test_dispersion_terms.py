"""D3 of an adsorption energy: the difference of the parts, by any kind of energy, on cards and recomputed."""

import json
from pathlib import Path

import ase.build
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from test_basins import slab, with_adsorbate

from equiformer2.adsorption import adsorption_energy, find_adsorption_energy
from equiformer2.adsorption.cards import verify_card
from equiformer2.adsorption.convergence import convergence_table
from equiformer2.adsorption.coverage_series import CoverageSettings, coverage_series
from equiformer2.adsorption.finished_search import FinishedSearch
from equiformer2.adsorption.free_energy import vibrations
from equiformer2.errors import InputError

pytest.importorskip("dftd3.ase")

from equiformer2.inference.dispersion import Dispersion, DispersionCalculator

D3 = Dispersion("pbe")


class Referenced(EMT):
    """Effective medium theory with numbers that are taken for adsorption energies."""

    energy_kind = "adsorption"


def start() -> Atoms:
    return with_adsorbate(slab(size=(2, 2, 3)), "OH", "fcc")


@pytest.mark.parametrize("gas", ["vacuum", "molecules"])
def test_total_energies_have_d3_in_every_term(gas: str) -> None:
    found = adsorption_energy(start(), DispersionCalculator(EMT(), D3), gas_references=gas, fmax=0.1)
    assert found.d3 is not None
    assert found.gas is not None
    assert found.d3["slab_and_adsorbate"] == pytest.approx(D3.energy(found.system.atoms))
    assert found.d3["slab"] == pytest.approx(D3.energy(found.clean_slab))
    molecules = {name: D3.energy(one.atoms) for name, one in found.gas.relaxations.items()}
    expected = molecules["HO"] if gas == "vacuum" else molecules["H2O"] - molecules["H2"] / 2
    assert found.d3["gas"] == pytest.approx(expected)
    # Without it, the same structures have EMT's energies.
    plain = 0.0
    for sign, atoms in ((1, found.system.atoms), (-1, found.clean_slab)):
        bare = atoms.copy()
        bare.calc = EMT()
        plain += sign * bare.get_potential_energy(apply_constraint=False)
    references = found.terms["gas"] - found.d3["gas"]
    assert found.energy == pytest.approx(plain - references + found.d3["difference"], abs=1e-6)
    assert -1.0 < found.d3["difference"] < 0.0


def test_adsorption_energies_have_the_difference_added() -> None:
    found = adsorption_energy(start(), DispersionCalculator(Referenced(), D3), fmax=0.1)
    assert found.compared_with == "relaxed clean slab"
    gas = D3.energy(ase.build.molecule("H2O")) - D3.energy(ase.build.molecule("H2")) / 2
    assert found.terms["d3_gas"] == pytest.approx(gas)
    bare = found.system.atoms.copy()
    bare.calc = EMT()
    network = bare.get_potential_energy(apply_constraint=False)
    assert found.d3 is not None
    assert found.energy == pytest.approx(network + found.d3["difference"], abs=1e-6)
    assert found.summary()["d3_eV"]["functional"] == "pbe"


def test_a_search_tells_it_on_the_card(tmp_path: Path) -> None:
    settings = {"placements": 1, "mode": "symmetry", "fmax": 0.3, "steps": 30}
    calculator = DispersionCalculator(Referenced(), D3)
    found = find_adsorption_energy(slab(size=(2, 2, 2)), "*O", calculator, out=tmp_path, **settings)  # type: ignore[arg-type]
    card = json.loads((tmp_path / "card.json").read_text())
    parts = card["d3_eV"]
    assert parts["slab_and_adsorbate"] == pytest.approx(D3.energy(found.best))
    assert parts["difference"] == pytest.approx(parts["slab_and_adsorbate"] - parts["slab"] - parts["gas"])
    assert found.record["d3_eV"] == parts
    bare = found.best.copy()
    bare.calc = EMT()
    network = bare.get_potential_energy(apply_constraint=False)
    assert found.energy == pytest.approx(network + parts["difference"], abs=1e-5)
    # The same model without D3 is given, and the card says that D3 is to be added.
    assert all(row["ok"] for row in verify_card(tmp_path / "card.json", Referenced()).values())
    search = FinishedSearch.read(tmp_path)
    frequencies = vibrations(search.best, search.model(Referenced())).frequencies
    expected = vibrations(search.best, DispersionCalculator(EMT(), D3)).frequencies
    assert frequencies == pytest.approx(expected, abs=0.01)


def test_energies_without_d3_are_refused() -> None:
    calculator = DispersionCalculator(EMT(), D3)
    for given in ({"gas_references": {"O": -1.0, "H": -1.0}}, {"gas_references": "oc20"}):
        with pytest.raises(InputError, match="--gas vacuum or --gas molecules"):
            adsorption_energy(start(), calculator, **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="slab energy that is given has no D3"):
        adsorption_energy(start(), calculator, slab_energy=1.0)


def test_energies_that_do_not_subtract_d3_of_the_slab_are_refused() -> None:
    calculator = DispersionCalculator(Referenced(), D3)
    settings = CoverageSettings(placements=1, steps=0)
    with pytest.raises(InputError, match="D3 dispersion within the slab"):
        coverage_series(slab(size=(2, 2, 3)), "*O", calculator, [1], settings)
    with pytest.raises(InputError, match="D3 dispersion within the slab"):
        convergence_table("Cu", "100", calculator, adsorbate="*O")
