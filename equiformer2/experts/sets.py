"""Sets of experts per task or composition, and the nearest one for a structure.

A composition x is described by the gate's answers to it for every task of the network: the vector v(x) of all
coefficients c_te(x). Compositions that the mixture treats alike are near each other, whatever their elements.
PreMoe (2505.17639) describes a query in the same way by the first router's answers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.experts import scores

Per = Literal["task", "composition"]
PER: tuple[str, ...] = get_args(Per)
_ROUNDING = 1e-6


@dataclass(frozen=True)
class ExpertSet:
    """Experts that stay for systems of one kind.

    Attributes:
        task: of the systems.
        experts: indices, ascending.
        key: `[tasks * K]` mean of v over the systems.
        composition: `[elements]` mean composition of the systems, shares of atoms.
        reach: largest distance from the key at which a system of the task lies; for a set of one composition,
            largest distance of one of the task's compositions to the nearest other one.
    """

    task: str
    experts: tuple[int, ...]
    key: Tensor
    composition: Tensor
    reach: float


@dataclass(frozen=True)
class Match:
    """Nearest set of a structure.

    Attributes:
        chosen: the set.
        distance: of the keys.
        far: farther from the key than the systems that the set was made of; not looked at by the baseline.
        second: name of the nearest set of another task, or None.
        second_distance: its distance.
    """

    chosen: ExpertSet
    distance: float
    far: bool
    second: str | None
    second_distance: float | None

    @property
    def tied(self) -> bool:
        """The nearest set of another task is as near, rounding aside: the first was taken."""
        return self.second_distance is not None and self.second_distance <= self.distance + _ROUNDING


def make_sets(
    answers: Mapping[str, Tensor],
    compositions: Mapping[str, Tensor],
    number: int,
    top: int,
    per: Per = "task",
) -> list[ExpertSet]:
    """Make the sets of all tasks.

    Args:
        answers: task -> `[systems, tasks, K]`: coefficients of its systems for every task, in the order of
            this mapping.
        compositions: task -> `[systems, elements]`.
        number: experts per set.
        top: k of the scores (`scores.tcess`).
        per: one set per task, or one per composition of every task.

    Raises:
        InputError: `per` is unknown.
    """
    if per not in PER:
        raise InputError(f"sets are made per {' or '.join(PER)}, not per {per!r}")
    sets = []
    for place, (task, values) in enumerate(answers.items()):
        own, shares = values[:, place], compositions[task].double()
        vectors = values.double().flatten(1)
        if per == "task":
            key = vectors.mean(0)
            chosen = scores.highest(scores.tcess(own, top), number, own)
            reach = float((vectors - key).norm(dim=1).max())
            sets.append(ExpertSet(task, chosen, key, shares.mean(0), reach))
            continue
        # Frames of one relaxation have one composition.
        rows = sorted({tuple(row): place for place, row in enumerate(shares.tolist())}.values())
        apart = torch.cdist(vectors[rows], vectors[rows])
        apart.fill_diagonal_(math.inf)
        reach = float(apart.min(1).values.max()) if len(rows) > 1 else 0.0
        for row in rows:
            chosen = scores.highest(own[row], number, own[[row]])
            sets.append(ExpertSet(task, chosen, vectors[row], shares[row], reach))
    return sets


def nearest(sets: Sequence[ExpertSet], key: Tensor) -> Match:
    """Find the set whose key is nearest to that of a structure, of equal ones the first.

    Args:
        sets: at least one.
        key: `[tasks * K]` v of the structure.
    """
    distances = [float((each.key - key.double()).norm()) for each in sets]
    match = _match(sets, distances)
    return replace(match, far=match.distance > match.chosen.reach * (1 + _ROUNDING) + _ROUNDING)


def nearest_composition(sets: Sequence[ExpertSet], composition: Tensor) -> Match:
    """Find the set whose mean composition is nearest: the baseline, which asks no gate.

    Args:
        sets: at least one.
        composition: `[elements]` shares of atoms.
    """
    return _match(sets, [float((each.composition - composition.double()).norm()) for each in sets])


def _match(sets: Sequence[ExpertSet], distances: Sequence[float]) -> Match:
    least = min(distances) + _ROUNDING
    best = next(index for index, distance in enumerate(distances) if distance <= least)
    chosen = sets[best]
    others = [index for index, each in enumerate(sets) if each.task != chosen.task]
    second = min(others, key=distances.__getitem__, default=None)
    return Match(
        chosen,
        distances[best],
        False,
        None if second is None else sets[second].task,
        None if second is None else distances[second],
    )
