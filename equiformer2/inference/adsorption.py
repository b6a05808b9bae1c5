"""Adsorption energies, by the kind of energy the model predicts.

A model of OC20's referenced energies predicts E(slab + adsorbate) - E(slab) - E(gas) directly. A
total-energy model predicts E(slab + adsorbate) alone, and slab and gas references are subtracted here.
Which of the two a model is comes from its checkpoint and is never guessed.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from equiformer2.errors import InputError
from equiformer2.inference.anomalies import find_anomalies
from equiformer2.inference.atoms import ADSORBATE, check_atoms, fixed_mask, oc20_tags
from equiformer2.inference.relaxation import RelaxationResult, relax

logger = logging.getLogger(__name__)

OC20_GAS_REFERENCES = {"H": -3.477, "O": -7.204, "C": -7.282, "N": -8.083}
"""eV per atom, from H2, H2O, CO and N2 with OC20's own DFT settings (VASP, RPBE); Chanussot et al. 2021."""

ENERGY_KINDS = ("adsorption", "total")


@dataclass(frozen=True)
class AdsorptionResult:
    """Outcome of `adsorption_energy`.

    Attributes:
        energy: the adsorption energy, eV (negative: bound).
        energy_kind: what the model predicts, "adsorption" or "total".
        terms: eV; for a total-energy model "slab_and_adsorbate", "slab" and "gas" (the sum subtracted).
        gas_references: eV per atom of the elements used (total-energy models only).
        initial: slab plus adsorbate before the relaxation, with OC20 tags.
        system: relaxation of slab plus adsorbate.
        slab: relaxation of the clean slab (total-energy models without a given slab energy).
        anomalies: sentences, see `equiformer2.inference.anomalies`.
    """

    energy: float
    energy_kind: str
    terms: dict[str, float]
    gas_references: dict[str, float]
    initial: Atoms
    system: RelaxationResult
    slab: RelaxationResult | None
    anomalies: list[str] = field(default_factory=list)

    @property
    def adsorbate_formula(self) -> str:
        """Chemical formula of the adsorbate atoms."""
        return str(self.initial[self.initial.get_tags() == ADSORBATE].get_chemical_formula())

    @property
    def converged(self) -> bool:
        """Whether every relaxation reached its threshold."""
        return self.system.converged and (self.slab is None or self.slab.converged)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a JSON record."""
        return {
            "adsorption_energy_eV": self.energy,
            "model_energy_kind": self.energy_kind,
            "terms_eV": self.terms,
            "gas_references_eV_per_atom": self.gas_references,
            "adsorbate": self.adsorbate_formula,
            "converged": self.converged,
            "anomalies": self.anomalies,
            "system": self.system.summary(),
            "slab": None if self.slab is None else self.slab.summary(),
        }


def adsorption_energy(
    system: Atoms,
    calculator: Calculator,
    *,
    energy_kind: str | None = None,
    slab_energy: float | None = None,
    gas_references: Mapping[str, float] | None = None,
    optimizer: str = "LBFGS",
    fmax: float = 0.05,
    steps: int = 300,
    folder: str | Path | None = None,
    progress: bool = False,
) -> AdsorptionResult:
    """Relax slab plus adsorbate and return its adsorption energy.

    With an adsorption-energy model the model's energy of the relaxed system is the result. With a
    total-energy model the relaxed clean slab (the same slab without its adsorbate, or `slab_energy`)
    and the gas references of the adsorbate's atoms are subtracted.

    Args:
        system: slab plus adsorbate; adsorbate atoms carry tag 2 (see `oc20_tags`), fixed atoms stay.
        calculator: an ASE calculator; its `energy_kind` says what it predicts.
        energy_kind: "adsorption" or "total", for a calculator that does not say; must not contradict it.
        slab_energy: eV of the relaxed clean slab from the same method (total-energy models only).
        gas_references: eV per atom by element, beside or instead of `OC20_GAS_REFERENCES`, which hold for
            OC20's RPBE energies only (total-energy models only).
        optimizer, fmax, steps, progress: as in `relax`.
        folder: where `relaxation.traj` (and `slab.traj`) go; nothing is written if None.

    Raises:
        InputError: unknown or contradictory kind of energy, references given to an adsorption-energy model,
            an element without a gas reference, no adsorbate atoms, and what `relax` raises.
    """
    kind = resolve_energy_kind(calculator, energy_kind)
    if kind == "adsorption" and (slab_energy is not None or gas_references):
        raise InputError(
            "the model predicts adsorption energies, which already have slab and gas references subtracted: "
            "leave out the slab energy and the gas references"
        )
    if slab_energy is not None and not math.isfinite(slab_energy):
        raise InputError(f"the slab energy is {slab_energy}: give a finite energy in eV")
    check_atoms(system)
    initial = _with_adsorbate_tags(system)
    adsorbate = initial.get_tags() == ADSORBATE
    used = _gas_references(initial[adsorbate], gas_references) if kind == "total" else {}

    settings: dict[str, Any] = {"optimizer": optimizer, "fmax": fmax, "steps": steps, "progress": progress}
    relaxed = relax(
        initial,
        calculator,
        trajectory=_inside(folder, "relaxation.traj"),
        label="slab + adsorbate",
        **settings,
    )
    terms: dict[str, float] = {}
    slab = None
    energy = relaxed.energy
    if kind == "total":
        if slab_energy is None:
            slab = relax(
                initial[~adsorbate],
                calculator,
                trajectory=_inside(folder, "slab.traj"),
                label="clean slab",
                **settings,
            )
            slab_energy = slab.energy
        gas = sum(used[symbol] for symbol in initial[adsorbate].get_chemical_symbols())
        energy = relaxed.energy - slab_energy - gas
        terms = {"slab_and_adsorbate": relaxed.energy, "slab": slab_energy, "gas": gas}
    return AdsorptionResult(
        energy=energy,
        energy_kind=kind,
        terms=terms,
        gas_references=used,
        initial=initial,
        system=relaxed,
        slab=slab,
        anomalies=find_anomalies(initial, relaxed.atoms, initial.get_tags()),
    )


def resolve_energy_kind(calculator: Calculator, declared: str | None = None) -> str:
    """The calculator's kind of energy, or the declared one where it does not say.

    Raises:
        InputError: neither says, they contradict each other, or the word is unknown.
    """
    if declared is not None and declared not in ENERGY_KINDS:
        raise InputError(f"the energy kind {declared!r} is unknown: use one of {', '.join(ENERGY_KINDS)}")
    own = getattr(calculator, "energy_kind", None)
    if own is None and declared is None:
        raise InputError(
            "the checkpoint does not say whether it predicts adsorption or total energies: "
            'declare it with energy kind "adsorption" or "total"'
        )
    if own is not None and declared is not None and own != declared:
        raise InputError(
            f"the checkpoint predicts {own} energies, not {declared} energies as declared: "
            "drop the declaration or use another checkpoint"
        )
    return str(own if own is not None else declared)


def _with_adsorbate_tags(system: Atoms) -> Atoms:
    tags, notice = oc20_tags(system)
    if notice:
        logger.warning(notice)
    adsorbate = tags == ADSORBATE
    if not adsorbate.any():
        raise InputError(
            "no atom is marked as adsorbate: give its atoms tag 2, name their indices, "
            "or give slab and adsorbate separately"
        )
    if adsorbate.all():
        raise InputError("every atom is marked as adsorbate (tag 2): mark slab atoms with tags 0 and 1")
    held = np.flatnonzero(adsorbate & fixed_mask(system))
    if len(held):
        raise InputError(
            f"atom {held[0]} ({system.get_chemical_symbols()[held[0]]}) is both adsorbate (tag 2) and fixed: "
            "if the tags are layer numbers, retag the slab with 0 (fixed) and 1 (free)"
        )
    if not fixed_mask(system).any():
        logger.warning(
            "no slab atom is fixed, so the whole slab relaxes; OC20's energies have the subsurface fixed"
        )
    system = system.copy()
    system.set_tags(tags)
    return system


def _gas_references(adsorbate: Atoms, given: Mapping[str, float] | None) -> dict[str, float]:
    known = {**OC20_GAS_REFERENCES, **(given or {})}
    counts = Counter(adsorbate.get_chemical_symbols())
    missing = sorted(set(counts) - set(known))
    if missing:
        raise InputError(
            f"there is no gas reference for {', '.join(missing)} of the adsorbate: "
            f"give the energy per atom in eV, as in {missing[0]}=-1.23"
        )
    used = {symbol: float(known[symbol]) for symbol in sorted(counts)}
    wrong = [symbol for symbol, value in used.items() if not math.isfinite(value)]
    if wrong:
        raise InputError(f"the gas reference of {wrong[0]} is not a finite energy: give eV per atom")
    return used


def _inside(folder: str | Path | None, name: str) -> Path | None:
    return None if folder is None else Path(folder) / name
