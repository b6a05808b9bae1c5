"""Lattice constants: the calculator's own, those of the table, and strained slabs."""

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from equiformer2.adsorption.bulks import find_bulk
from equiformer2.adsorption.lattice_constants import RPBE_FCC, RPBE_SOURCE, relaxed_bulk, strain_notices
from equiformer2.errors import InputError


class NoStress(EMT):
    """EMT without its stress."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012


class AdsorptionEnergies(Calculator):
    """A model of adsorption energies, which knows no bulks."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012
    energy_kind = "adsorption"

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        raise AssertionError("it must not be asked")


def minimum(symbol: str) -> float:
    """EMT's lattice constant, by a fit through energies."""
    scale = np.linspace(0.98, 1.02, 9)
    start = bulk(symbol).cell.array
    energies = []
    for factor in scale:
        atoms = bulk(symbol)
        atoms.set_cell(start * factor, scale_atoms=True)
        atoms.calc = EMT()
        energies.append(atoms.get_potential_energy())
    fit = np.polynomial.Polynomial.fit(scale, energies, 4)
    roots = fit.deriv().roots()
    best = float(roots[(abs(roots.imag) < 1e-9) & (roots.real > 0.98) & (roots.real < 1.02)].real[0])
    return best * find_bulk(symbol).lattice_constant


@pytest.mark.parametrize("calculator", [EMT, NoStress])
@pytest.mark.parametrize("symbol", ["Cu", "Pt"])
def test_cubic_bulks_get_the_calculators_lattice_constant(symbol: str, calculator: type) -> None:
    own = minimum(symbol)
    for start in (0.95, 1.05):
        result = relaxed_bulk(f"{symbol} fcc a={own * start}", calculator())
        assert result.bulk.lattice_constant == pytest.approx(own, rel=1e-4)
        assert result.strain == pytest.approx(1 / start - 1, abs=1e-3)
        assert result.method == "energy"
    assert result.summary()["lattice_constant_A"] == result.bulk.lattice_constant


def test_other_bulks_are_relaxed_with_the_stress() -> None:
    result = relaxed_bulk("CuAu L1_0 a=4.0 c=3.7", EMT(), fmax=0.005)
    assert result.method == "stress"
    assert result.converged
    atoms = result.bulk.atoms.copy()
    atoms.calc = EMT()
    assert np.abs(atoms.get_stress() * atoms.get_volume()).max() < 0.02
    without = relaxed_bulk("CuAu L1_0 a=4.0 c=3.7", NoStress())
    assert without.method == "energy"
    assert "no stress" in without.notices[0]
    assert without.energy > result.energy - 1e-6


def test_layers_in_a_cubic_cell_are_no_cubic_crystal() -> None:
    """L1_0 of one lattice constant is tetragonal: c is relaxed, too."""
    result = relaxed_bulk("CuAu L1_0", EMT(), fmax=0.005)
    assert result.method == "stress"
    a, _, c = result.bulk.atoms.cell.lengths()
    assert c / a == pytest.approx(0.905, abs=0.005)
    assert result.energy < relaxed_bulk("CuAu L1_0", NoStress()).energy - 0.03
    assert relaxed_bulk("Cu3Au L1_2", EMT()).method == "energy"


def test_models_of_adsorption_energies_get_the_table() -> None:
    result = relaxed_bulk("Pt", AdsorptionEnergies())
    assert result.bulk.lattice_constant == pytest.approx(RPBE_FCC["Pt"])
    assert RPBE_SOURCE in result.notices[0]
    cubic = relaxed_bulk(bulk("Cu", cubic=True), None)
    assert cubic.bulk.atoms.cell.lengths() == pytest.approx([RPBE_FCC["Cu"]] * 3)
    unknown = relaxed_bulk("Fe", AdsorptionEnergies())
    assert unknown.strain == 0
    assert "no lattice constant of RPBE is known" in unknown.notices[0]
    assert not unknown.converged
    # bcc Cu and an alloy are not in the table of fcc metals.
    for other in ("Cu bcc a=2.9", "Cu3Pt L1_2 a=3.7"):
        assert "no lattice constant" in relaxed_bulk(other, None).notices[0]


def test_strained_bulks_are_told() -> None:
    assert "-1.8% from RPBE's 3.676" in strain_notices(find_bulk("Cu"))[0]
    assert not strain_notices(find_bulk("Cu fcc a=3.68"))
    assert not strain_notices(find_bulk("Fe"))


def test_no_minimum() -> None:
    with pytest.raises(
        InputError, match=r"Fe .*: EMT failed with NotImplementedError: No EMT-potential for Fe"
    ):
        relaxed_bulk("Fe", EMT())
    with pytest.raises(InputError, match="no minimum within 12% of its lattice constant"):
        relaxed_bulk("Cu fcc a=5.0", LennardJones(sigma=2.2, epsilon=0.4, rc=6.0))
