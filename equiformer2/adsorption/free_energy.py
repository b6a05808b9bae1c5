"""Free energy of a relaxed adsorbate: vibrations, entropy, gas references and the hydrogen electrode.

The adsorbate's atoms vibrate on a slab that is held. Direct forces are no gradient, so their Hessian is not
symmetric and may have imaginary modes where there are none: the symmetric part is taken, and how much was
taken away is told.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ase.build
import numpy as np
from ase import Atoms, units
from ase.thermochemistry import HarmonicThermo, IdealGasThermo
from ase.vibrations import VibrationsData

from equiformer2.errors import InputError
from equiformer2.inference.atoms import ADSORBATE, fixed_mask
from equiformer2.inference.engines import Engineable
from equiformer2.inference.many import predict

#: cm^-1; softer modes count as these, because a harmonic mode of no frequency has infinite entropy.
LOWEST_FREQUENCY = 50.0
_STEP = 0.01  # Å
_INVERSE_CM = units.invcm  # eV
#: Free energy of H2 + 1/2 O2 -> H2O (liquid) at 298.15 K, eV, from experiment; used because DFT's O2 is bad.
WATER_FORMATION = -2.458
#: Pa; water vapour of this pressure is in equilibrium with liquid water at 298 K.
_WATER_PRESSURE = 3534.0
_BAR = 1e5


@dataclass(frozen=True)
class _Gas:
    """Molecule of a reference: experimental fundamentals (cm^-1; NIST), shape, and pressure in Pa."""

    frequencies: tuple[float, ...]
    geometry: Literal["linear", "nonlinear"]
    symmetry_number: int
    pressure: float = _BAR
    spin: float = 0.0


GASES = {
    "H2": _Gas((4161.2,), "linear", 2),
    "H2O": _Gas((1594.7, 3657.1, 3755.9), "nonlinear", 2, _WATER_PRESSURE),
    "CO": _Gas((2143.3,), "linear", 1),
    "CO2": _Gas((667.4, 667.4, 1333.0, 2349.1), "linear", 2),
    "N2": _Gas((2329.9,), "linear", 2),
}


def gas_correction(molecule: str, temperature: float) -> float:
    """Zero-point energy, heat and entropy of a gas of `GASES` (ideal), eV: what its energy lacks to be free.

    Args:
        molecule: formula.
        temperature: K.
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
    return float(thermo.get_gibbs_energy(temperature, gas.pressure, verbose=False))


@dataclass(frozen=True)
class Vibrations:
    """Harmonic vibrations of an adsorbate.

    Attributes:
        frequencies: `[3 n]` cm^-1, ascending; imaginary ones negative.
        asymmetry: largest difference between an element of the Hessian and its mirror image, eV/Å².
        largest_element: largest element of the Hessian, eV/Å².
    """

    frequencies: np.ndarray
    asymmetry: float
    largest_element: float

    @property
    def imaginary(self) -> np.ndarray:
        """Sizes of the imaginary frequencies, cm^-1."""
        return -self.frequencies[self.frequencies < 0.0]

    def thermo(self, temperature: float, lowest: float = LOWEST_FREQUENCY) -> dict[str, float]:
        """Compute the harmonic contributions.

        Args:
            temperature: K.
            lowest: cm^-1; softer modes count as this, imaginary ones too.

        Returns:
            `zpe_eV`, `heat_eV` (internal energy above it) and `entropy_eV` (temperature times entropy).

        Raises:
            InputError: the lowest frequency is not above 0.
        """
        if not lowest > 0.0:
            raise InputError(f"the lowest frequency is {lowest:g} cm^-1: give one above 0")
        energies = np.maximum(np.abs(self.frequencies) * (self.frequencies > 0.0), lowest) * _INVERSE_CM
        thermo = HarmonicThermo(energies, potentialenergy=0.0)
        zero_point = float(energies.sum() / 2.0)
        heat = float(thermo.get_internal_energy(temperature, verbose=False)) - zero_point
        entropy = float(thermo.get_entropy(temperature, verbose=False)) * temperature
        return {"zpe_eV": zero_point, "heat_eV": heat, "entropy_eV": entropy}


def vibrations(atoms: Atoms, model: Engineable, indices: Sequence[int] | None = None) -> Vibrations:
    """Compute vibrations by displacing atoms by 0.01 Å in both senses, all structures in batches.

    Args:
        atoms: relaxed slab with adsorbate.
        model: any model with forces.
        indices: atoms that vibrate; None for the adsorbate's (tag 2).

    Raises:
        InputError: no atom to displace, a held one, or what the model refuses.
    """
    chosen = (
        np.flatnonzero(atoms.get_tags() == ADSORBATE) if indices is None else np.array(indices, dtype=int)
    )
    if not len(chosen):
        raise InputError("no atom is marked as adsorbate (tag 2): give the indices of those that vibrate")
    if fixed_mask(atoms)[chosen].any():
        raise InputError("an atom that is held cannot vibrate: give others")
    displaced = []
    for atom in chosen:
        for axis in range(3):
            for sense in (1.0, -1.0):
                moved = atoms.copy()
                moved.positions[atom, axis] += sense * _STEP
                displaced.append(moved)
    forces = np.array([one.get_forces(apply_constraint=False)[chosen] for one in predict(displaced, model)])
    plus, minus = forces[0::2], forces[1::2]
    hessian = -(plus - minus).reshape(3 * len(chosen), 3 * len(chosen)) / (2.0 * _STEP)
    symmetric = (hessian + hessian.T) / 2.0
    data = VibrationsData(atoms, symmetric.reshape(len(chosen), 3, len(chosen), 3), indices=chosen)
    found = np.asarray(data.get_frequencies())
    frequencies = np.sort(np.where(np.abs(found.imag) > np.abs(found.real), -np.abs(found.imag), found.real))
    return Vibrations(frequencies, float(np.abs(hessian - hessian.T).max()), float(np.abs(hessian).max()))


@dataclass(frozen=True)
class Reaction:
    """Formation of an adsorbate from gases: x CO + w H2O + 1/2 a N2 + n (H+ + e-) -> *C_x H_y O_z N_a.

    The energy of the electron and proton is that of half H2 at 0 V (computational hydrogen electrode; Nørskov
    et al. 2004). These are also the molecules that OC20's references per atom are made of, so that an energy
    referred to them is that of this reaction.

    Attributes:
        gases: molecules that are used up, by formula; negative for those that are set free.
        electrons: n, pairs of proton and electron that are used up; negative for those that are set free.
    """

    gases: dict[str, float]
    electrons: float

    @classmethod
    def of(cls, adsorbate: Atoms) -> "Reaction":
        """Balance the reaction of an adsorbate of C, H, O and N.

        Raises:
            InputError: another element.
        """
        count = Counter(adsorbate.get_chemical_symbols())
        others = sorted(set(count) - set("CHON"))
        if others:
            raise InputError(
                f"there is no gas reference for {', '.join(others)}: free energies are known for adsorbates "
                "of C, H, O and N"
            )
        water = float(count["O"] - count["C"])
        gases = {"CO": float(count["C"]), "H2O": water, "N2": count["N"] / 2}
        return cls({name: number for name, number in gases.items() if number}, count["H"] - 2.0 * water)

    def correction(self, temperature: float) -> float:
        """Free energy of what is used up, less its energy, eV; a pair of proton and electron is half H2."""
        total = sum(number * gas_correction(name, temperature) for name, number in self.gases.items())
        return total + self.electrons / 2 * gas_correction("H2", temperature)

    def text(self) -> str:
        """Write what is used up (and, with a minus sign, set free)."""
        parts = [f"{number:g} {name}" for name, number in self.gases.items()]
        parts += [f"{self.electrons:g} (H+ + e-)"] if self.electrons else []
        return " + ".join(parts)

    @staticmethod
    def check_referred(energy_kind: str, gas: Mapping[str, Any] | None) -> None:
        """Raise `InputError` where an adsorption energy is not referred to H2, H2O, CO and N2."""
        source = "" if gas is None else str(gas.get("source"))
        if energy_kind == "total" and not set(source.split(" and ")) <= {"molecules", "oc20", "given"}:
            raise InputError(
                f"the adsorption energy is referred to the adsorbate in vacuum ({source}), and free energies "
                "to H2, H2O, CO and N2: search again with --gas molecules"
            )


def free_energy(
    adsorption_energy: float,
    adsorbate: Atoms,
    modes: Vibrations,
    temperature: float = 298.15,
    potential: float = 0.0,
    ph: float = 0.0,
    lowest_frequency: float = LOWEST_FREQUENCY,
) -> dict[str, Any]:
    """Compute the free energy of formation of an adsorbate from CO, H2O, N2 and protons with electrons.

    Args:
        adsorption_energy: eV, referred to OC20's references per atom: 1/2 H2, H2O - H2, CO - H2O + H2 and
            1/2 N2.
        adsorbate: its atoms.
        modes: its vibrations.
        temperature: K.
        potential: V against the standard hydrogen electrode.
        ph: of the electrolyte.
        lowest_frequency: cm^-1, see `Vibrations.thermo`.

    Returns:
        Plain values: `free_energy_eV`, its parts, and the same number against O2 instead of water.
    """
    if not temperature > 0.0:
        raise InputError(f"the temperature is {temperature} K: give one above 0")
    reaction = Reaction.of(adsorbate)
    thermo = modes.thermo(temperature, lowest_frequency)
    against_rhe = potential + units.kB * temperature * np.log(10.0) * ph
    gas = reaction.correction(temperature)
    total = (
        adsorption_energy + thermo["zpe_eV"] + thermo["heat_eV"] - thermo["entropy_eV"] - gas
        + reaction.electrons * against_rhe
    )  # fmt: skip
    oxygen = reaction.gases.get("H2O", 0.0)
    return {
        "adsorption_energy_eV": adsorption_energy,
        **thermo,
        "gas_correction_eV": gas,
        "reaction": reaction.text(),
        "electrons": reaction.electrons,
        "potential_against_rhe_V": float(against_rhe),
        "free_energy_eV": float(total),
        # At 0 V against RHE, with the oxygen that water would give taken from O2.
        "free_energy_against_O2_eV": float(
            total - reaction.electrons * against_rhe + oxygen * WATER_FORMATION
        ),
        "temperature_K": temperature,
        "frequencies_cm1": modes.frequencies.tolist(),
        "imaginary": len(modes.imaginary),
        "imaginary_cm1": modes.imaginary.tolist(),
        "soft_modes": int((modes.frequencies < lowest_frequency).sum()),
        "hessian_asymmetry_eV_A2": modes.asymmetry,
        "hessian_largest_eV_A2": modes.largest_element,
    }
