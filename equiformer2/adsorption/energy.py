"""Adsorption energies, by the kind of energy the model predicts.

A model of OC20's referenced energies predicts E(slab + adsorbate) - E(slab) - E(gas) directly. A
total-energy model predicts E(slab + adsorbate) alone, and slab and gas references are subtracted here.
Which of the two a model is comes from its checkpoint and is never guessed.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from equiformer2.adsorption.anomalies import Anomaly, check_anomalies
from equiformer2.adsorption.dispersion_terms import check_gas_source, dispersion_summary, dispersion_terms
from equiformer2.adsorption.references import GasReference, check_gas_references, gas_reference
from equiformer2.errors import InputError
from equiformer2.inference.atoms import ADSORBATE, check_atoms, fixed_mask, oc20_tags
from equiformer2.inference.dispersion import dispersion_of
from equiformer2.inference.named_calculators import resolve_energy_kind
from equiformer2.inference.relaxation import RelaxationResult, relax

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdsorptionResult:
    """Outcome of `adsorption_energy`.

    Attributes:
        energy: the adsorption energy, eV (negative: bound).
        energy_kind: what the model predicts, "adsorption" or "total".
        terms: eV; for a total-energy model "slab_and_adsorbate", "slab" and "gas" (the sum subtracted); for
            one of adsorption energies with D3 dispersion "d3_slab" and "d3_gas", which are subtracted.
        gas: what was subtracted for the adsorbate and where it is from (total-energy models only).
        initial: slab plus adsorbate before the relaxation, with OC20 tags.
        system: relaxation of slab plus adsorbate.
        slab: relaxation of the clean slab (total-energy models without a given slab energy).
        anomaly_checks: the verdict of every rule, see `equiformer2.adsorption.anomalies`.
        clean_slab: the slab with which the surface was compared; where it was relaxed with the forces of an
            adsorption-energy model it has no energy, since that would have no meaning.
        compared_with: `clean_slab` in words: "initial slab" or "relaxed clean slab".
        energy_std: standard deviation of the adsorption energy over the members of a committee, eV; None
            without one, and for total energies, whose errors cancel in part in the differences.
        d3: D3 dispersion apart (`adsorption.dispersion_terms`); None without.
    """

    energy: float
    energy_kind: str
    terms: dict[str, float]
    gas: GasReference | None
    initial: Atoms
    system: RelaxationResult
    slab: RelaxationResult | None
    clean_slab: Atoms
    compared_with: str
    anomaly_checks: list[Anomaly] = field(default_factory=list)
    energy_std: float | None = None
    d3: dict[str, Any] | None = None

    @property
    def anomalies(self) -> list[Anomaly]:
        """The anomalies that are present."""
        return [anomaly for anomaly in self.anomaly_checks if anomaly.present]

    @property
    def gas_references(self) -> dict[str, float]:
        """The gas references used, eV per atom; empty without, and with the adsorbate in vacuum."""
        return {} if self.gas is None else self.gas.per_atom

    @property
    def adsorbate_formula(self) -> str:
        """Chemical formula of the adsorbate atoms."""
        return str(self.initial[self.initial.get_tags() == ADSORBATE].get_chemical_formula())

    @property
    def name(self) -> str:
        """Formulas of adsorbate and slab, as "O on Pt36"."""
        slab = self.initial[self.initial.get_tags() != ADSORBATE]
        return f"{self.adsorbate_formula} on {slab.get_chemical_formula()}"

    @property
    def converged(self) -> bool:
        """Whether every relaxation reached its threshold."""
        others = [part.converged for part in (self.slab, self.gas) if part is not None]
        return self.system.converged and all(others)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a JSON record."""
        return {
            "adsorption_energy_eV": self.energy,
            "adsorption_energy_std_eV": self.energy_std,
            "model_energy_kind": self.energy_kind,
            "terms_eV": self.terms,
            "d3_eV": self.d3,
            "gas_references_eV_per_atom": self.gas_references,
            "gas": None if self.gas is None else self.gas.summary(),
            "adsorbate": self.adsorbate_formula,
            "converged": self.converged,
            "max_force_eV_A": self.system.max_force,
            "anomalies": [{**anomaly.summary(), "sentence": anomaly.sentence} for anomaly in self.anomalies],
            "anomaly_checks": [
                {**anomaly.summary(), "present": anomaly.present} for anomaly in self.anomaly_checks
            ],
            "surface_compared_with": self.compared_with,
            "system": self.system.summary(),
            "slab": None if self.slab is None else self.slab.summary(),
        }


def adsorption_energy(
    system: Atoms,
    calculator: BaseCalculator,
    *,
    energy_kind: str | None = None,
    slab_energy: float | None = None,
    gas_references: Mapping[str, float] | str | None = None,
    gas_source: str = "vacuum",
    relax_clean_slab: bool = False,
    clean_slab: Atoms | None = None,
    optimizer: str = "LBFGS",
    fmax: float = 0.05,
    steps: int = 300,
    stop_at_spread: float | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> AdsorptionResult:
    """Relax slab plus adsorbate and return its adsorption energy.

    With an adsorption-energy model the model's energy of the relaxed system is the result. With a
    total-energy model the relaxed clean slab (the same slab without its adsorbate, or `slab_energy`)
    and the energy of the adsorbate by itself are subtracted: the same calculator's energy of it in vacuum,
    unless `gas_references` says otherwise.

    Args:
        system: slab plus adsorbate; adsorbate atoms carry tag 2 (see `oc20_tags`), fixed atoms stay.
        calculator: an ASE calculator; its `energy_kind` says what it predicts.
        energy_kind: "adsorption" or "total", for a calculator that does not say; must not contradict it.
        slab_energy: eV of the relaxed clean slab from the same method (total-energy models only).
        gas_references: eV per atom of every element of the adsorbate, or a source: "vacuum" (the adsorbate,
            relaxed by itself; the default), "molecules" (per atom, from the calculator's H2, H2O, CO and N2)
            or "oc20" (`OC20_GAS_REFERENCES`, for OC20's RPBE total energies only). Total-energy models only.
        gas_source: with a table, the source for the elements that it lacks ("molecules" or "oc20").
        relax_clean_slab: compare the surface with the relaxed clean slab, as AdsorbML does. A total-energy
            model relaxes it anyway, and so does one of adsorption energies with D3 dispersion; with another
            adsorption-energy model it costs a second relaxation.
            Without it the surface is compared with the initial slab.
        clean_slab: the relaxed clean slab, its atoms in the order of the system's; nothing is relaxed for the
            comparison then.
        optimizer, fmax, steps, progress: as in `relax`.
        stop_at_spread: as in `relax`, for slab plus adsorbate.
        folder: where `relaxation.traj` (and `slab.traj`) go; nothing is written if None.

    Raises:
        InputError: unknown or contradictory kind of energy, references given to an adsorption-energy model,
            an element without a gas reference, no adsorbate atoms, and what `relax` raises.
    """
    kind = resolve_energy_kind(calculator, energy_kind)
    asked = isinstance(gas_references, str) or gas_source != "vacuum"
    if isinstance(gas_references, str):
        gas_source = gas_references
    per_atom = gas_references if isinstance(gas_references, Mapping) else None
    if kind == "adsorption" and (asked or slab_energy is not None or gas_references):
        raise InputError(
            "the model predicts adsorption energies, which already have slab and gas references subtracted: "
            "leave out the slab energy and the gas references"
        )
    if slab_energy is not None and not math.isfinite(slab_energy):
        raise InputError(f"the slab energy is {slab_energy}: give a finite energy in eV")
    check_gas_source(calculator, gas_source, per_atom)
    has_d3 = dispersion_of(calculator) is not None
    if has_d3 and slab_energy is not None:
        raise InputError("a slab energy that is given has no D3 dispersion: leave it out, and it is computed")
    check_atoms(system)
    initial = _with_adsorbate_tags(system)
    adsorbate = initial.get_tags() == ADSORBATE
    if kind == "total":
        check_gas_references(initial[adsorbate], per_atom, gas_source)
    if clean_slab is not None and not np.array_equal(clean_slab.numbers, initial.numbers[~adsorbate]):
        raise InputError("the clean slab's atoms are not those of the system's slab in the same order")

    settings: dict[str, Any] = {"optimizer": optimizer, "fmax": fmax, "steps": steps, "progress": progress}
    relaxed = relax(
        initial,
        calculator,
        trajectory=None if folder is None else Path(folder) / "relaxation.traj",
        label="slab + adsorbate",
        stop_at_spread=stop_at_spread,
        **settings,
    )
    terms: dict[str, float] = {}
    slab = gas = None
    energy = relaxed.energy
    if kind == "total":
        if slab_energy is None:
            slab = relax(
                initial[~adsorbate],
                calculator,
                trajectory=None if folder is None else Path(folder) / "slab.traj",
                label="clean slab",
                **settings,
            )
            slab_energy = slab.energy
        gas = gas_reference(initial[adsorbate], calculator, per_atom, gas_source, settings)
        energy = relaxed.energy - slab_energy - gas.energy
        terms = {"slab_and_adsorbate": relaxed.energy, "slab": slab_energy, "gas": gas.energy}
    compared_with = "relaxed clean slab"
    if clean_slab is None and slab is not None:
        clean_slab = slab.atoms
    elif clean_slab is None and (relax_clean_slab or has_d3):
        clean_slab = relax(initial[~adsorbate], calculator, label="clean slab (geometry)", **settings).atoms
        clean_slab.calc = None
    elif clean_slab is None:
        clean_slab, compared_with = initial[~adsorbate], "initial slab"
    if kind == "adsorption":
        terms = dispersion_terms(calculator, clean_slab, initial[adsorbate])
        energy -= sum(terms.values())
    return AdsorptionResult(
        energy=energy,
        energy_kind=kind,
        terms=terms,
        gas=gas,
        initial=initial,
        system=relaxed,
        slab=slab,
        clean_slab=clean_slab,
        compared_with=compared_with,
        anomaly_checks=check_anomalies(initial, relaxed.atoms, initial.get_tags(), clean_slab),
        energy_std=relaxed.energy_std if kind == "adsorption" else None,
        d3=dispersion_summary(
            calculator, relaxed.atoms, clean_slab, terms, None if gas is None else gas.summary()
        ),
    )


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
