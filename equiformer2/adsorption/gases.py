"""Thermochemistry of the gases that adsorbates are made of, from experiment.

DFT's O2 and CO2 are wrong by tenths of an eV. So they come by way of water and of CO: their energies are
those of H2O, H2 and CO, with the reaction energies of experiment.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ase.build
from ase import units
from ase.thermochemistry import IdealGasThermo

from equiformer2.errors import InputError

_INVERSE_CM = units.invcm  # eV
_BAR = 1e5  # Pa
_KJ_PER_MOL = units.kJ / units.mol  # eV


@dataclass(frozen=True)
class Gas:
    """Molecule in the gas phase.

    Attributes:
        frequencies: fundamentals, cm^-1 (Shimanouchi 1972, in the NIST WebBook; diatomics: Huber and Herzberg
            1979, there).
        zero_point: zero-point energy, cm^-1, anharmonic (diatomics: Irikura, J. Phys. Chem. Ref. Data 2007,
            36, 389; H2O and CO2: their spectra, which half of the fundamentals falls short of by 1 to 4 %).
        geometry: shape for the rotations.
        symmetry_number: of the rotations.
        spin: of the electrons.
        pressure: bar, unless another is given.
    """

    frequencies: tuple[float, ...]
    zero_point: float
    geometry: Literal["linear", "nonlinear"]
    symmetry_number: int
    spin: float = 0.0
    pressure: float = 1.0


GASES = {
    "H2": Gas((4161.2,), 2179.3, "linear", 2),
    # Water vapour of this pressure is in equilibrium with liquid water at room temperature.
    "H2O": Gas((1594.7, 3657.1, 3755.9), 4638.0, "nonlinear", 2, pressure=0.03534),
    "CO": Gas((2143.3,), 1081.7, "linear", 1),
    "CO2": Gas((667.4, 667.4, 1333.0, 2349.1), 2535.0, "linear", 2),
    "N2": Gas((2329.9,), 1175.8, "linear", 2),
    "O2": Gas((1556.2,), 787.4, "linear", 2, spin=1.0),
}

#: kJ/mol; enthalpies of formation at 0 K from H2, O2 and graphite (NIST-JANAF, Chase 1998).
_FORMATION_0K = {"H2O": -238.921, "CO": -113.805, "CO2": -393.151}

#: Molecules that are used up, or with a minus sign set free, where water forms and CO2 is reduced.
_WATER = {"H2": 1.0, "O2": 0.5, "H2O": -1.0}
_REDUCED_CO2 = {"CO2": 1.0, "H2": 1.0, "CO": -1.0, "H2O": -1.0}


def check_pressures(pressures: Mapping[str, float]) -> None:
    """Raise `InputError` for a molecule that is not in `GASES`, or a pressure that is not above 0."""
    for name, pressure in pressures.items():
        if name not in GASES:
            raise InputError(f"a pressure of {name} has no meaning here: give those of {', '.join(GASES)}")
        if not (math.isfinite(pressure) and pressure > 0.0):
            raise InputError(f"the pressure of {name} is {pressure:g} bar: give one above 0")


def zero_point_energy(molecule: str) -> float:
    """Zero-point energy of a gas of `GASES`, eV."""
    return GASES[molecule].zero_point * _INVERSE_CM


def thermal_correction(
    molecule: str, temperature: float, pressures: Mapping[str, float] | None = None
) -> float:
    """Free energy of a gas of `GASES` above its state at 0 K, as an ideal gas, eV: enthalpy less entropy.

    Args:
        molecule: formula.
        temperature: K.
        pressures: bar, by formula; the others have those of `GASES`.
    """
    gas = GASES[molecule]
    thermo = IdealGasThermo(
        [frequency * _INVERSE_CM for frequency in gas.frequencies],
        gas.geometry,
        potentialenergy=0.0,
        atoms=ase.build.molecule(molecule),
        symmetrynumber=gas.symmetry_number,
        spin=gas.spin,
    )
    pressure = (pressures or {}).get(molecule, gas.pressure) * _BAR
    total = float(thermo.get_gibbs_energy(temperature, pressure, verbose=False))
    return total - float(thermo.get_ZPE_correction())


def gas_correction(molecule: str, temperature: float, pressures: Mapping[str, float] | None = None) -> float:
    """Zero-point energy, heat and entropy of a gas, eV: what its electronic energy lacks to be free.

    Args:
        molecule, temperature, pressures: as in `thermal_correction`.
    """
    return zero_point_energy(molecule) + thermal_correction(molecule, temperature, pressures)


def water_formation(temperature: float, pressures: Mapping[str, float] | None = None) -> float:
    """Free energy of H2 + 1/2 O2 -> H2O from experiment, eV: -2.46 at 298 K for liquid water.

    Args:
        temperature, pressures: as in `thermal_correction`.
    """
    enthalpy = _FORMATION_0K["H2O"] * _KJ_PER_MOL
    return enthalpy - _thermal(_WATER, temperature, pressures)


def co2_reduction(temperature: float, pressures: Mapping[str, float] | None = None) -> float:
    """Free energy of CO2 + H2 -> CO + H2O from experiment, eV.

    Args:
        temperature, pressures: as in `thermal_correction`.
    """
    enthalpy = (_FORMATION_0K["CO"] + _FORMATION_0K["H2O"] - _FORMATION_0K["CO2"]) * _KJ_PER_MOL
    return enthalpy - _thermal(_REDUCED_CO2, temperature, pressures)


def water_formation_energy() -> float:
    """Electronic energy of H2 + 1/2 O2 -> H2O from experiment, eV: without zero-point energies, at 0 K."""
    return _FORMATION_0K["H2O"] * _KJ_PER_MOL + sum(
        number * zero_point_energy(name) for name, number in _WATER.items()
    )


def _thermal(used: Mapping[str, float], temperature: float, pressures: Mapping[str, float] | None) -> float:
    return sum(number * thermal_correction(name, temperature, pressures) for name, number in used.items())
