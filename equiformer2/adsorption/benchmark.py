"""Any model against DFT's adsorption energies: errors, and anomalies as CatBench counts them.

CatBench: J. Moon et al., https://github.com/JinukMoon/catbench (MIT). Slab, slab with adsorbate, and
molecules are relaxed from DFT's structures, each once. With a model of adsorption energies the energy of the
slab with adsorbate is all, as in CatBench's mode `oc20`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import find_mic, get_distances
from scipy.stats import spearmanr
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.catbench import Reaction
from equiformer2.adsorption.dft_ledger import structure_digest
from equiformer2.errors import InputError
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.engines import Engine
from equiformer2.inference.many import Relaxation
from equiformer2.inference.pictures import new_figure, png_bytes
from equiformer2.inference.relaxation_store import RelaxationStore

CLASSES = ("normal", "energy_anomaly", "adsorbate_migration", "unphysical_relaxation", "failed")
#: Å; a slab atom that moves farther makes a relaxation unphysical (CatBench 1.1.6, as all numbers here).
_SLAB_MOVES = 0.5
#: eV; a larger error is an anomaly of the energy.
_ENERGY = 2.0
#: Relative change of a distance between an adsorbate's atom and another that means migration.
_BOND_CHANGE = 0.2
#: Å; longer distances do not count.
_BOND_CUTOFF = 6.0
#: Reactions of an adsorbate from which on its shift is fitted.
_FEWEST_FOR_SHIFT = 5


@dataclass(frozen=True)
class Evaluated:
    """One reaction, by DFT and by the model.

    Attributes:
        reaction: name.
        adsorbate: its name.
        dft: adsorption energy, eV.
        model: of the relaxed structures, eV; None where it failed.
        single_point: of DFT's structures, eV; None likewise.
        kind: one of `CLASSES`.
        slab_displacement: largest of an atom of the clean slab, Å; None for models of adsorption energies.
        substrate_displacement: likewise of the slab's atoms beside the adsorbate, Å.
        bond_change: largest relative change of a distance of the adsorbate.
        reason: sentence about a failure.
    """

    reaction: str
    adsorbate: str
    dft: float
    model: float | None
    single_point: float | None
    kind: str
    slab_displacement: float | None = None
    substrate_displacement: float | None = None
    bond_change: float | None = None
    reason: str | None = None

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {
            "reaction": self.reaction,
            "adsorbate": self.adsorbate,
            "dft_eV": self.dft,
            "model_eV": self.model,
            "single_point_eV": self.single_point,
            "class": self.kind,
            "slab_displacement_A": self.slab_displacement,
            "substrate_displacement_A": self.substrate_displacement,
            "bond_change": self.bond_change,
            "reason": self.reason,
        }


def evaluate(
    reactions: Sequence[Reaction],
    engine: Engine,
    energy_kind: str,
    folder: AnyPath,
    settings: RelaxationSettings,
    molecules: Mapping[str, float] | None = None,
) -> list[Evaluated]:
    """Relax every structure once, and make adsorption energies of them.

    Args:
        reactions: see `read_catbench`.
        engine: the model (`open_engine`).
        energy_kind: its, `"adsorption"` or `"total"`.
        folder: keeps the relaxations; a run that was stopped goes on.
        settings: of the relaxations.
        molecules: energies in place of the model's, eV, by the names of the file (`H2gas`).

    Raises:
        InputError: a folder of other relaxations, a molecule that no reaction has, and what the model refuses
            at all.
    """
    given = dict(molecules or {})
    unknown = sorted(
        set(given) - {name for reaction in reactions for name in reaction.terms if "gas" in name}
    )
    if unknown:
        raise InputError(f"no reaction has the molecule {unknown[0]}: give names of the file, such as H2gas")
    starts: dict[str, Atoms] = {}
    for reaction in reactions:
        if energy_kind == "adsorption":
            starts.setdefault(_name(reaction.system), reaction.system)
        else:
            terms = {name: term for name, term in reaction.terms.items() if name not in given}
            starts.update({_name(atoms): atoms for atoms, _ in terms.values()})
    done: dict[str, Relaxation] = {}
    with RelaxationStore(folder, {"model": engine.identity(), "benchmark": "CatBench"}) as store:
        found = store.relax(starts.items(), engine, settings)
        for result in tqdm(found, total=len(starts), desc="relaxing", unit="structure", disable=None):
            done[result.id] = result
    return [_evaluated(reaction, done, energy_kind, given) for reaction in reactions]


def _name(atoms: Atoms) -> str:
    """Name of a structure among the relaxations; the same structure of several reactions has one."""
    return structure_digest(atoms)[:24]


def _evaluated(
    reaction: Reaction, done: Mapping[str, Relaxation], energy_kind: str, molecules: Mapping[str, float]
) -> Evaluated:
    system = done[_name(reaction.system)]
    evaluated = partial(Evaluated, reaction.name, reaction.adsorbate, reaction.energy)
    slab = None
    constant = 0.0
    if energy_kind == "adsorption":
        relaxations = [(system, 1.0)]
    else:
        if reaction.slab is None:
            return evaluated(model=None, single_point=None, kind="failed", reason="it has no clean slab")
        relaxations = []
        for name, (atoms, factor) in reaction.terms.items():
            if name in molecules:
                constant += molecules[name] * factor
            else:
                relaxations.append((done[_name(atoms)], factor))
        slab = done[_name(reaction.slab)]
    failed = [one for one, _ in relaxations if one.status == "failed" or one.energy_eV is None]
    if failed:
        reason = str(failed[0].reason)
        return evaluated(model=None, single_point=None, kind="failed", reason=reason)
    model = constant + sum(float(one.energy_eV or 0.0) * factor for one, factor in relaxations)
    single = constant + sum(float(one.start_energy_eV or 0.0) * factor for one, factor in relaxations)
    moved = None if slab is None or reaction.slab is None else _moved(reaction.slab, slab.atoms).max()
    substrate = np.ones(len(reaction.system), dtype=bool)
    substrate[list(reaction.adsorbate_atoms)] = False
    pushed = float(_moved(reaction.system, system.atoms)[substrate].max(initial=0.0))
    change = bond_change(reaction.system, system.atoms, reaction.adsorbate_atoms)
    unphysical = (
        not system.converged
        or (slab is not None and not slab.converged)
        or (moved is not None and moved > _SLAB_MOVES)
        or pushed > _SLAB_MOVES
    )
    if unphysical:
        kind = "unphysical_relaxation"
    elif change > _BOND_CHANGE:
        kind = "adsorbate_migration"
    else:
        kind = "energy_anomaly" if abs(model - reaction.energy) > _ENERGY else "normal"
    return evaluated(
        model=model,
        single_point=single,
        kind=kind,
        slab_displacement=None if moved is None else float(moved),
        substrate_displacement=pushed,
        bond_change=change,
    )


def _moved(first: Atoms, second: Atoms) -> np.ndarray:
    """Displacement of every atom, Å `[N]`."""
    return np.asarray(find_mic(second.positions - first.positions, first.cell, first.pbc)[1])


def bond_change(first: Atoms, second: Atoms, atoms: Sequence[int]) -> float:
    """Largest relative change of a distance up to 6 Å (before or after) between `atoms` and any atom."""
    if not atoms:
        return 0.0
    before, after = (
        get_distances(one.positions[list(atoms)], one.positions, cell=one.cell, pbc=one.pbc)[1]
        for one in (first, second)
    )
    near = ((before <= _BOND_CUTOFF) | (after <= _BOND_CUTOFF)) & (before > 0)
    return float((np.abs(after - before)[near] / before[near]).max(initial=0.0))


def statistics(rows: Sequence[Evaluated]) -> dict[str, Any]:
    """Summarise the errors.

    Returns:
        Plain values: `counts` by class; `mae_eV` of all, of the normal ones, and of single points;
        `spearman`; `shifted`: the same after the median error of each adsorbate was subtracted (`shift_eV`,
        fitted where at least five reactions are normal or differ in energy only), which is what other
        references of the molecules change; `by_adsorbate`.
    """
    names = list(dict.fromkeys(row.adsorbate for row in rows))
    shifts: dict[str, float | None] = {}
    for name in names:
        errors = [
            _error(row) for row in rows if row.adsorbate == name and row.kind in ("normal", "energy_anomaly")
        ]
        shifts[name] = float(np.median(errors)) if len(errors) >= _FEWEST_FOR_SHIFT else None
    by_adsorbate = {}
    for name in names:
        own = [row for row in rows if row.adsorbate == name]
        by_adsorbate[name] = {**_errors(own, {}), "reactions": len(own), "shift_eV": shifts[name]}
    return {
        **_errors(rows, {}),
        "shifted": {**_errors(rows, shifts), "shift_eV": shifts},
        "by_adsorbate": by_adsorbate,
    }


def _error(row: Evaluated) -> float:
    assert row.model is not None
    return row.model - row.dft


def _errors(rows: Sequence[Evaluated], shifts: Mapping[str, float | None]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    errors, normal, single, pairs = [], [], [], []
    for row in rows:
        if row.model is None or row.single_point is None:
            counts["failed"] += 1
            continue
        shift = shifts.get(row.adsorbate) or 0.0
        error = abs(_error(row) - shift)
        errors.append(error)
        single.append(abs(row.single_point - shift - row.dft))
        pairs.append((row.model - shift, row.dft))
        kind = row.kind
        if kind in ("normal", "energy_anomaly"):
            kind = "energy_anomaly" if error > _ENERGY else "normal"
        counts[kind] += 1
        if kind == "normal":
            normal.append(error)
    values = {"all": errors, "normal": normal, "single_point": single}
    ranked = len(pairs) > 2 and np.ptp(np.array(pairs), axis=0).all()
    return {
        "counts": {name: counts[name] for name in CLASSES},
        "mae_eV": {name: float(np.mean(one)) if one else None for name, one in values.items()},
        "spearman": float(spearmanr(*np.array(pairs).T).statistic) if ranked else None,
    }


def parity_picture(rows: Sequence[Evaluated], title: str) -> bytes:
    """Draw the model's energies against DFT's, a colour per adsorbate, anomalies as crosses, as PNG."""
    figure = new_figure(6.0, 5.4)
    axis = figure.subplots()
    known = [row for row in rows if row.model is not None]
    names = list(dict.fromkeys(row.adsorbate for row in known))
    for number, name in enumerate(names):
        for is_normal in (True, False):
            own = [row for row in known if row.adsorbate == name and (row.kind == "normal") == is_normal]
            if own:
                label = (
                    name
                    if is_normal or all(row.kind != "normal" for row in known if row.adsorbate == name)
                    else None
                )
                axis.plot(
                    [row.dft for row in own],
                    [float(row.model or 0.0) for row in own],
                    "o" if is_normal else "x",
                    color=f"C{number % 10}",
                    markersize=4,
                    label=label,
                )
    energies = [energy for row in known for energy in (row.dft, row.model) if energy is not None]
    if energies:
        ends = [min(energies) - 0.2, max(energies) + 0.2]
        axis.plot(ends, ends, "-", color="0.6", linewidth=0.8, zorder=0)
    axis.set(xlabel="adsorption energy, DFT (eV)", ylabel="model (eV)", title=title)
    axis.grid(alpha=0.3)
    if 0 < len(names) <= 20:
        axis.legend(fontsize=7, ncols=2)
    return png_bytes(figure)
