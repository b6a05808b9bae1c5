"""Relax and predict lists of `ase.Atoms` with any model, in batches."""

import dataclasses
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from equiformer2.batch_threads import map_batches
from equiformer2.errors import InputError
from equiformer2.inference.atoms import fixed_mask
from equiformer2.inference.batched import STRUCTURES_AT_A_TIME, Frame, RelaxationSettings, Relaxed
from equiformer2.inference.committee import largest_spread
from equiformer2.inference.engines import Engine, Engineable, open_engine

logger = logging.getLogger(__name__)


@dataclass
class Relaxation:
    """Outcome of one relaxation of several.

    Attributes:
        id: its name.
        status: `"converged"`; `"unconverged"`, all steps were taken; `"stopped"`, the spread of a committee
            ended it; `"failed"`, it cannot be relaxed at all, or what was done ended early, see `reason`.
        atoms: last good structure with energy and forces, and the spread of a committee in `info`
            (`energy_std_eV`, `max_force_std_eV_A`); the start as it was given, without results, if it cannot
            be relaxed at all. It is not wrapped into the cell, and its order is that of the start.
        energy_eV: of `atoms`, eV; None if it cannot be relaxed at all.
        start_energy_eV: of the start, eV; None likewise, and where a draft moved the start first.
        max_force_eV_A: largest force on a free atom of `atoms`, eV/Å.
        steps: steps taken, those of a draft left out.
        model_evaluations: calls of the model.
        draft_evaluations: calls of the model that drafted.
        reason: sentence about what failed or stopped it.
        trajectory: file of its frames.
        frames: start to end, each with energy and forces; empty where they are in a file, or not kept.
    """

    id: str
    status: str
    atoms: Atoms
    energy_eV: float | None = None  # noqa: N815  # keys of results files
    start_energy_eV: float | None = None  # noqa: N815
    max_force_eV_A: float | None = None  # noqa: N815
    steps: int = 0
    model_evaluations: int = 0
    draft_evaluations: int = 0
    reason: str | None = None
    trajectory: Path | None = None
    frames: list[Atoms] = field(default_factory=list, repr=False)

    @property
    def converged(self) -> bool:
        """True if the largest force is below the threshold."""
        return self.status == "converged"


def relax_many(
    structures: Iterable[Atoms],
    model: Engineable,
    *,
    settings: RelaxationSettings | None = None,
    batch_size: int | str = "auto",
    max_atoms: int | None = None,
    draft: Engineable | None = None,
    progress: bool = False,
) -> list[Relaxation]:
    """Relax a list of structures in batches.

    One that cannot be relaxed does not stop the others: its result says `failed` and why, and a warning names
    it by its number in the list.

    Args:
        structures: starts; they are not changed. Atoms that constraints hold stay; a structure with other
            constraints is not relaxed (use `relax`).
        model: checkpoint (path, name of a shipped model, loaded), `Predictor`, list of these (a committee),
            or any ASE calculator, through which structures go one after another.
        settings: of the relaxation; the default is `RelaxationSettings()`. With `frames="all"` the results
            keep every frame in memory.
        batch_size: most structures per batch; `"auto"`: 32 structures with at most 4,000 atoms together on a
            CPU, as many atoms as fit on a GPU, one structure with an ASE calculator.
        max_atoms: most atoms per batch; a larger structure is relaxed alone.
        draft: a cheaper model that moves every structure first, see `relax_draft_and_verify`.
        progress: show a bar on stderr.

    Returns:
        A result per structure, in the order of the list.

    Raises:
        InputError: something that is not about one structure: no `Atoms`, a model without forces or that
            cannot be used, settings without sense.
    """
    settings = settings or RelaxationSettings(frames="ends")
    starts = [(str(number), atoms) for number, atoms in enumerate(_checked(structures))]
    engine = open_engine(model)
    if draft is None:
        found = relax_starts(starts, engine, settings, batch_size=batch_size, max_atoms=max_atoms)
    else:
        found = relax_draft_and_verify(
            starts, open_engine(draft), engine, settings, batch_size=batch_size, max_atoms=max_atoms
        )
    bar = tqdm(
        found, total=len(starts), desc="relaxing", unit="structure", disable=None if progress else True
    )
    return sorted(bar, key=lambda result: int(result.id))


def relax_starts(
    starts: Iterable[tuple[str, Atoms]],
    engine: Engine,
    settings: RelaxationSettings | None = None,
    *,
    batch_size: int | str = "auto",
    max_atoms: int | None = None,
) -> Iterator[Relaxation]:
    """Relax named structures in batches, and give each as soon as it is done.

    Args:
        starts: (name, structure), read as places become free.
        engine: the model, see `open_engine`.
        settings: of the relaxation.
        batch_size, max_atoms: as in `relax_many`.

    Raises:
        InputError: as `relax_many`.
    """
    given: dict[int, tuple[str, Atoms]] = {}
    refused: deque[Relaxation] = deque()

    def structures() -> Iterator[tuple[int, Data]]:
        for number, (name, atoms) in enumerate(starts):
            try:
                data = engine.start(atoms, name)
            except InputError as error:
                refused.append(_refused(name, atoms, str(error)))
                continue
            given[number] = name, atoms
            yield number, data

    for relaxed in engine.relax(structures(), settings, batch_size=batch_size, max_atoms=max_atoms):
        while refused:
            yield refused.popleft()
        yield _outcome(*given.pop(relaxed.index), relaxed)
    yield from refused


def relax_draft_and_verify(
    starts: Iterable[tuple[str, Atoms]],
    draft_engine: Engine,
    engine: Engine,
    settings: RelaxationSettings | None = None,
    *,
    batch_size: int | str = "auto",
    max_atoms: int | None = None,
) -> Iterator[Relaxation]:
    """Relax structures with a cheap model first, and finish each with the full one.

    The answer is always a minimum of the full model, by its own forces: it goes on from the end of the draft,
    under the same threshold. Where the draft fails, the full model relaxes the start as it was given.

    Args:
        starts: (name, structure), each name once; read as places become free.
        draft_engine: the cheap model.
        engine: the full model.
        settings: of both relaxations.
        batch_size, max_atoms: as in `relax_many`, of both.

    Yields:
        Results of the full model; `model_evaluations` are its calls, `draft_evaluations` those of the draft.

    Raises:
        InputError: as `relax_many`.
    """
    settings = settings or RelaxationSettings()
    waiting: dict[str, Atoms] = {}

    def remembered() -> Iterator[tuple[str, Atoms]]:
        for name, atoms in starts:
            waiting[name] = atoms
            yield name, atoms

    drafts = relax_starts(
        remembered(), draft_engine, draft_settings(settings), batch_size=batch_size, max_atoms=max_atoms
    )
    paired = ((waiting.pop(draft.id), draft) for draft in drafts)
    yield from finish_drafts(paired, engine, settings, batch_size=batch_size, max_atoms=max_atoms)


def draft_settings(settings: RelaxationSettings) -> RelaxationSettings:
    """Settings of the drafts of relaxations with these settings."""
    return dataclasses.replace(settings, frames="ends", stop_at_spread=None)


def finish_drafts(
    drafts: Iterable[tuple[Atoms, Relaxation]],
    engine: Engine,
    settings: RelaxationSettings,
    *,
    batch_size: int | str = "auto",
    max_atoms: int | None = None,
) -> Iterator[Relaxation]:
    """Relax from the ends of drafts with the full model; from the start where the draft failed.

    Args:
        drafts: (start, draft of it), each name once; read as places become free.
        engine: the full model.
        settings: of its relaxations.
        batch_size, max_atoms: as in `relax_many`.

    Yields:
        Results as those of `relax_draft_and_verify`.

    Raises:
        InputError: as `relax_many`.
    """
    known: dict[str, Relaxation] = {}

    def moved() -> Iterator[tuple[str, Atoms]]:
        for start, draft in drafts:
            known[draft.id] = draft
            if draft.status == "failed":
                logger.warning(f"the draft of {draft.id} failed ({draft.reason}): it is left out")
                yield draft.id, start
                continue
            atoms = start.copy()
            atoms.set_positions(draft.atoms.positions, apply_constraint=False)
            yield draft.id, atoms

    for result in relax_starts(moved(), engine, settings, batch_size=batch_size, max_atoms=max_atoms):
        draft = known.pop(result.id)
        result.draft_evaluations = draft.model_evaluations
        if draft.status != "failed":
            result.start_energy_eV = None
        yield result


def predict(
    structures: Iterable[Atoms],
    model: Engineable,
    *,
    batch_size: int | str = "auto",
    max_atoms: int | None = None,
    progress: bool = False,
) -> list[Atoms]:
    """Compute energies, and forces where the model has them, of a list of structures.

    Args:
        structures: they are not changed.
        model, batch_size, max_atoms, progress: as in `relax_many`.

    Returns:
        Copies of the structures, in the order of the list, with results: `get_potential_energy()` eV,
        `get_forces()` eV/Å, and stress where the model has it. The spread of a committee is in `info`
        (`energy_std_eV`, and `max_force_std_eV_A` of atoms that are free).

    Raises:
        InputError: a structure that has no energy, by its number in the list, or a model that cannot be used.
    """
    engine = open_engine(model)
    data = []
    structures = _checked(structures)
    for number, atoms in enumerate(structures):
        try:
            data.append(engine.data(atoms, ""))
        except InputError as error:
            raise InputError(f"structure {number} of the list: {error}", number) from error
    if not data:
        return []
    largest = max(data, key=lambda one: len(one.pos))
    limits = engine.chosen_limits(largest, batch_size, max_atoms)
    most = limits.structures
    if engine.side_by_side and engine.device.type == "cpu":
        most = min(most, STRUCTURES_AT_A_TIME)
    parts = _parts([len(one.pos) for one in data], most, limits.atoms)

    def evaluate(part: range) -> list[dict[str, Tensor]]:
        return _evaluate(engine, data, part)

    found: list[Atoms] = []
    count = len(parts) if engine.side_by_side else 1
    with tqdm(
        total=len(data), desc="predicting", unit="structure", disable=None if progress else True
    ) as bar:
        for results in map_batches(evaluate, parts, count=count, device=engine.device):
            found += [_with_results(structures[len(found) + at], one) for at, one in enumerate(results)]
            bar.update(len(results))
    return found


def _checked(structures: Iterable[Atoms]) -> list[Atoms]:
    if isinstance(structures, Atoms):
        raise InputError("one structure was given: give a list of them, [atoms]")
    found = list(structures)
    for number, atoms in enumerate(found):
        if not isinstance(atoms, Atoms):
            raise InputError(
                f"structure {number} of the list is {type(atoms).__name__}: give ase.Atoms", number
            )
    return found


def _parts(sizes: Sequence[int], most: int, max_atoms: int | None) -> list[range]:
    """Divide structures of these numbers of atoms into batches, in order."""
    parts, first, atoms = [], 0, 0
    for number, size in enumerate(sizes):
        full = max_atoms is not None and atoms + size > max_atoms
        if number > first and (number - first == most or full):
            parts.append(range(first, number))
            first, atoms = number, 0
        atoms += size
    return [*parts, range(first, len(sizes))]


def _evaluate(engine: Engine, data: Sequence[Data], part: range) -> list[dict[str, Tensor]]:
    """Outputs of every structure of a part; in halves where the device's memory ends."""
    batch = Batch.from_data_list([data[number] for number in part])
    try:
        out = engine.predict(batch)
    except torch.OutOfMemoryError as error:
        if len(part) == 1:
            raise InputError(
                f"structure {part[0]} of the list with {len(data[part[0]].pos)} atoms does not fit into the "
                f"memory of {engine.device}: use another device or precision",
                part[0],
            ) from error
        half = len(part) // 2
        return _evaluate(engine, data, part[:half]) + _evaluate(engine, data, part[half:])
    except InputError as error:
        if error.structure is None:
            raise
        number = part[error.structure]
        raise InputError(f"structure {number} of the list: {error}", number) from error
    natoms = batch.natoms.tolist()
    per_atom = ("forces", "forces_std")
    split = {name: values.split(natoms) if name in per_atom else values for name, values in out.items()}
    return [{name: values[at] for name, values in split.items()} for at in range(len(part))]


def _with_results(atoms: Atoms, out: dict[str, Tensor]) -> Atoms:
    atoms = atoms.copy()
    results: dict[str, Any] = {"energy": float(out["energy"])}
    if "forces" in out:
        results["forces"] = out["forces"].double().numpy()
    if "stress" in out and atoms.pbc.all():
        results["stress"] = full_3x3_to_voigt_6_stress(out["stress"].double().numpy())
    if "energy_std" in out:
        atoms.info["energy_std_eV"] = float(out["energy_std"])
    if "forces_std" in out:
        spread = largest_spread(out["forces_std"].double().numpy(), ~fixed_mask(atoms))
        atoms.info["max_force_std_eV_A"] = spread
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _refused(name: str, atoms: Atoms, reason: str) -> Relaxation:
    logger.warning(f"structure {name} cannot be relaxed: {reason}")
    return Relaxation(name, "failed", atoms.copy(), reason=reason)


def _outcome(name: str, start: Atoms, relaxed: Relaxed) -> Relaxation:
    """Result of a relaxation, with the atoms as their owner knows them: not wrapped into the cell."""
    if not relaxed.frames:
        result = _refused(name, start, str(relaxed.failure))
        result.model_evaluations = relaxed.evaluations
        return result
    if relaxed.failure is not None:
        logger.warning(f"the relaxation of structure {name} failed: {relaxed.failure}")
    shift = start.positions - relaxed.start.pos.double().numpy()
    frames = [_frame_atoms(start, frame, shift) for frame in relaxed.frames]
    status = "converged" if relaxed.converged else "unconverged"
    if relaxed.failure is not None or relaxed.stopped is not None:
        status = "failed" if relaxed.failure is not None else "stopped"
    return Relaxation(
        id=name,
        status=status,
        atoms=frames[-1],
        energy_eV=relaxed.energy,
        start_energy_eV=relaxed.frames[0].energy,
        max_force_eV_A=relaxed.max_force,
        steps=relaxed.steps,
        model_evaluations=relaxed.evaluations,
        reason=relaxed.failure or relaxed.stopped,
        frames=frames,
    )


def _frame_atoms(start: Atoms, frame: Frame, shift: np.ndarray) -> Atoms:
    atoms = start.copy()
    atoms.set_positions(frame.positions + shift, apply_constraint=False)
    spread = {"energy_std_eV": frame.energy_std, "max_force_std_eV_A": frame.max_force_std}
    atoms.info.update({name: value for name, value in spread.items() if value is not None})
    atoms.calc = SinglePointCalculator(atoms, energy=frame.energy, forces=frame.forces)
    return atoms
