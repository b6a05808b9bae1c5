"""Gases: their free energies beside the tables of NIST, and reactions whose energies are from experiment."""

import pytest
from ase import units

from equiformer2.adsorption.gases import (
    GASES,
    check_pressures,
    co2_reduction,
    gas_correction,
    thermal_correction,
    water_formation,
    water_formation_energy,
    zero_point_energy,
)
from equiformer2.errors import InputError

KJ = units.kJ / units.mol

# J/mol/K and kJ/mol: entropy, and enthalpy above 0 K, at 298.15 K and 1 bar (NIST-JANAF).
TABLES = {
    "H2": (130.680, 8.467),
    "H2O": (188.834, 9.904),
    "CO": (197.653, 8.671),
    "CO2": (213.783, 9.364),
    "N2": (191.609, 8.670),
    "O2": (205.147, 8.683),
}


def test_every_gas_is_compared_with_a_table() -> None:
    assert set(TABLES) == set(GASES)


@pytest.mark.parametrize(("molecule", "entropy", "enthalpy"), [(name, *row) for name, row in TABLES.items()])
def test_heat_and_entropy_are_those_of_the_tables(molecule: str, entropy: float, enthalpy: float) -> None:
    expected = (enthalpy - 0.29815 * entropy) * KJ
    assert thermal_correction(molecule, 298.15, {molecule: 1.0}) == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize(
    ("molecule", "zero_point"),
    # eV; Peterson et al. 2010 and Nørskov et al. 2004, rounded to 0.01, with DFT's frequencies.
    [("H2", 0.27), ("H2O", 0.57), ("CO", 0.13), ("CO2", 0.31), ("N2", 0.15), ("O2", 0.10)],
)
def test_zero_point_energies(molecule: str, zero_point: float) -> None:
    assert zero_point_energy(molecule) == pytest.approx(zero_point, abs=0.01)
    difference = gas_correction(molecule, 300.0) - thermal_correction(molecule, 300.0)
    assert difference == pytest.approx(zero_point_energy(molecule))


def test_pressure_changes_the_free_energy_by_its_logarithm() -> None:
    change = thermal_correction("CO", 500.0, {"CO": 10.0}) - thermal_correction("CO", 500.0)
    assert change == pytest.approx(units.kB * 500.0 * 2.302585, abs=1e-6)
    assert thermal_correction("H2", 500.0, {"CO": 10.0}) == thermal_correction("H2", 500.0)


def test_water_and_co2_are_those_of_experiment() -> None:
    assert water_formation(298.15) == pytest.approx(-2.46, abs=0.003)
    # Gases at 1 bar, NIST-JANAF: -228.582 and 28.6 kJ/mol.
    assert water_formation(298.15, {"H2O": 1.0}) == pytest.approx(-228.582 * KJ, abs=0.005)
    assert co2_reduction(298.15, {"H2O": 1.0}) == pytest.approx(28.6 * KJ, abs=0.005)
    # Atomisation energies without zero-point energy: H2O 232.6, H2 109.5, O2 120.2 kcal/mol.
    expected = -(232.6 - 109.5 - 120.2 / 2) * units.kcal / units.mol
    assert water_formation_energy() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("pressures", "message"),
    [({"CH4": 1.0}, "CH4 has no meaning"), ({"H2": 0.0}, "H2 is 0 bar"), ({"CO": float("nan")}, "CO is nan")],
)
def test_pressures_without_sense_are_refused(pressures: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_pressures(pressures)
