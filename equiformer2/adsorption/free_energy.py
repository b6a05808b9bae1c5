"""Free energy of a relaxed adsorbate: vibrations, entropy, gas references and the hydrogen electrode.

The adsorbate's atoms vibrate on a slab that is held. Direct forces are no gradient, so their Hessian is not
symmetric and may have imaginary modes where there are none: the symmetric part is taken, and how much was
taken away is told.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from ase import Atoms, units
from ase.thermochemistry import HarmonicThermo
from ase.vibrations import VibrationsData

from equiformer2.adsorption.gases import (
    GASES,
    check_pressures,
    co2_reduction,
    gas_correction,
    water_formation,
)
from equiformer2.errors import InputError
from equiformer2.inference.atoms import ADSORBATE, fixed_mask
from equiformer2.inference.engines import Engineable
from equiformer2.inference.many import predict

#: cm^-1; softer modes count as these, because a harmonic mode of no frequency has infinite entropy.
LOWEST_FREQUENCY = 50.0
_STEP = 0.01  # Å
#: K; outside of these classical rotations and harmonic vibrations mean nothing.
_COLDEST, _HOTTEST = 1.0, 5000.0
_ROOM, _NEAR_ROOM = 298.15, 30.0  # K
_INVERSE_CM = units.invcm  # eV


@dataclass(frozen=True)
class Vibrations:
    """Harmonic vibrations of an adsorbate.

    Attributes:
        frequencies: `[3 n]` cm^-1, ascending; imaginary ones negative.
        asymmetry: largest difference between an element of the Hessian and its mirror image, eV/Å².
        largest_element: largest element of the Hessian, eV/Å².
        max_force: largest force on a free atom of the structure itself, eV/Å; NaN where it was not computed.
    """

    frequencies: np.ndarray
    asymmetry: float
    largest_element: float
    max_force: float = np.nan

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
        with np.errstate(over="ignore"):  # near 0 K nothing is excited
            heat = float(thermo.get_internal_energy(temperature, verbose=False)) - zero_point
            entropy = float(thermo.get_entropy(temperature, verbose=False)) * temperature
        return {"zpe_eV": zero_point, "heat_eV": heat, "entropy_eV": entropy}


def vibrations(
    atoms: Atoms,
    model: Engineable,
    indices: Sequence[int] | None = None,
    largest_force: float = np.inf,
) -> Vibrations:
    """Compute vibrations by displacing atoms by 0.01 Å in both senses, all structures in batches.

    Args:
        atoms: relaxed slab with adsorbate.
        model: any model with forces.
        indices: atoms that vibrate; None for the adsorbate's (tag 2).
        largest_force: eV/Å; above it the structure is no minimum and has no vibrations.

    Raises:
        InputError: no atom to displace, a held one, too large forces, or what the model refuses.
    """
    chosen = (
        np.flatnonzero(atoms.get_tags() == ADSORBATE) if indices is None else np.array(indices, dtype=int)
    )
    if not len(chosen):
        raise InputError("no atom is marked as adsorbate (tag 2): give the indices of those that vibrate")
    if fixed_mask(atoms)[chosen].any():
        raise InputError("an atom that is held cannot vibrate: give others")
    (itself,) = predict([atoms], model)
    free = itself.get_forces(apply_constraint=False)[~fixed_mask(atoms)]
    max_force = float(np.linalg.norm(free, axis=1).max())
    if max_force > largest_force:
        raise InputError(
            f"the largest force on the structure is {max_force:.3f} eV/Å, so it is no minimum of this model "
            f"and has no vibrations (at most {largest_force:g} eV/Å): relax it with more steps"
        )
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
    asymmetry = float(np.abs(hessian - hessian.T).max())
    return Vibrations(frequencies, asymmetry, float(np.abs(hessian).max()), max_force)


class Motion(Protocol):
    """Motions of an adsorbate that replace its softest modes (`adsorption.hindered`)."""

    def thermo(self, frequencies: np.ndarray, temperature: float, lowest: float) -> dict[str, float]:
        """Compute `zpe_eV`, `heat_eV` and `entropy_eV`."""

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""


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

    def correction(self, temperature: float, pressures: Mapping[str, float] | None = None) -> float:
        """Free energy of what is used up, less its energy, eV; a pair of proton and electron is half H2."""
        total = sum(
            number * gas_correction(name, temperature, pressures) for name, number in self.gases.items()
        )
        return total + self.electrons / 2 * gas_correction("H2", temperature, pressures)

    def water_warning(self, temperature: float, pressures: Mapping[str, float]) -> str | None:
        """Warn where water has its default pressure, that of the liquid at room temperature, elsewhere.

        Args:
            temperature: K.
            pressures: bar, by formula, as they were given.
        """
        away = abs(temperature - _ROOM) > _NEAR_ROOM
        if not away or "H2O" in pressures or not self.gases.get("H2O"):
            return None
        pressure = GASES["H2O"].pressure
        return (
            f"water counts as vapour of {pressure:g} bar, the pressure of its liquid at 300 K, also at "
            f"{temperature:g} K: give its pressure (--pressure H2O=…)"
        )

    def text(self) -> str:
        """Write what is used up (and, with a minus sign, set free)."""
        numbers = {**self.gases, **({"(H+ + e-)": self.electrons} if self.electrons else {})}
        parts = [
            f"{'-' if number < 0 else '+'} {'' if abs(number) == 1 else f'{abs(number):g} '}{name}"
            for name, number in numbers.items()
        ]
        return " ".join(parts).removeprefix("+ ")


def referred_energy(record: Mapping[str, Any]) -> tuple[float, str | None]:
    """Find the adsorption energy of a search that is referred to H2, H2O, CO and N2.

    Args:
        record: content of `search.json`.

    Returns:
        eV, and a sentence where it is not known that it is referred to them; else None.

    Raises:
        InputError: it is referred to the adsorbate in vacuum.
    """
    oc20 = (record.get("conventions") or {}).get("oc20") or {}
    if oc20.get("energy_eV") is not None:
        return float(oc20["energy_eV"]), None
    source = str((record.get("gas") or {}).get("source"))
    if record["energy_kind"] == "total" and not set(source.split(" and ")) <= {"molecules", "oc20", "given"}:
        raise InputError(
            f"the adsorption energy is referred to the adsorbate in vacuum ({source}), and free energies "
            "to H2, H2O, CO and N2: search again with --gas molecules"
        )
    reason = oc20.get("reason")
    return float(record["adsorption_energy_eV"]), (
        None
        if reason is None
        else f"{reason}; the free energy is right only if they are H2O - H2, CO - H2O + H2, H2/2 and N2/2"
    )


def free_energy(
    adsorption_energy: float,
    adsorbate: Atoms,
    modes: Vibrations,
    temperature: float = 298.15,
    potential: float = 0.0,
    ph: float = 0.0,
    lowest_frequency: float = LOWEST_FREQUENCY,
    pressures: Mapping[str, float] | None = None,
    motion: Motion | None = None,
    corrections: Mapping[str, float] | None = None,
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
        pressures: bar, by molecule; the others have those of `gases.GASES`.
        motion: hindered translation and rotation in the place of the three softest modes.
        corrections: eV by species, contributions to the energy of formation (`Corrections.of`).

    Returns:
        Plain values: `free_energy_eV`, its parts, and the same number with oxygen from O2 and with carbon
        from CO2, at 0 V against the reversible hydrogen electrode.

    Raises:
        InputError: an element without a gas, values without sense, a temperature at which atoms are no
            harmonic oscillators, a pressure of H2 beside a potential or pH.
    """
    if not _COLDEST <= temperature <= _HOTTEST:
        raise InputError(f"the temperature is {temperature} K: give one from {_COLDEST:g} to {_HOTTEST:g}")
    if not np.isfinite([potential, ph]).all():
        raise InputError(f"the potential is {potential} V and the pH {ph}: give finite numbers")
    pressures = dict(pressures or {})
    check_pressures(pressures)
    if pressures.get("H2", 1.0) != 1.0 and (potential or ph):
        raise InputError(
            "an electrode's potential is against H2 of 1 bar: give a pressure of H2, or a potential and pH"
        )
    reaction = Reaction.of(adsorbate)
    harmonic = modes.thermo(temperature, lowest_frequency)
    thermo = harmonic
    if motion is not None:
        thermo = motion.thermo(modes.frequencies, temperature, lowest_frequency)
    against_rhe = potential + units.kB * temperature * np.log(10.0) * ph
    gas = reaction.correction(temperature, pressures)
    corrections = dict(corrections or {})
    total = (
        adsorption_energy + sum(corrections.values()) + thermo["zpe_eV"] + thermo["heat_eV"]
        - thermo["entropy_eV"] - gas + reaction.electrons * against_rhe
    )  # fmt: skip
    at_zero = total - reaction.electrons * against_rhe
    oxygen, carbon = reaction.gases.get("H2O", 0.0), reaction.gases.get("CO", 0.0)
    return {
        "adsorption_energy_eV": adsorption_energy,
        "entropy_model": "harmonic" if motion is None else "hindered",
        **thermo,
        "harmonic": harmonic,
        "hindered": None if motion is None else motion.summary(),
        "gas_correction_eV": gas,
        "corrections_eV": corrections,
        "pressures_bar": pressures,
        "reaction": reaction.text(),
        "gases": reaction.gases,
        "electrons": reaction.electrons,
        "potential_against_rhe_V": float(against_rhe),
        "free_energy_eV": float(total),
        # The oxygen that water would give, from O2.
        "free_energy_against_O2_eV": float(at_zero + oxygen * water_formation(temperature, pressures)),
        # The carbon that CO would give, from CO2.
        "free_energy_against_CO2_eV": float(at_zero + carbon * co2_reduction(temperature, pressures)),
        "temperature_K": temperature,
        "frequencies_cm1": modes.frequencies.tolist(),
        "imaginary": len(modes.imaginary),
        "imaginary_cm1": modes.imaginary.tolist(),
        "soft_modes": int((modes.frequencies < lowest_frequency).sum()),
        "hessian_asymmetry_eV_A2": modes.asymmetry,
        "hessian_largest_eV_A2": modes.largest_element,
        "max_force_eV_A": None if np.isnan(modes.max_force) else modes.max_force,
    }
