"""Splits of imported frames by groups, which never divide a trajectory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datasets_oc20.errors import DataError
from datasets_oc20.own_data.checks import Place

PARTS = ("train", "val", "test")
_GROUPS: dict[str, Callable[[Place], str]] = {
    "system": lambda place: place.facts.sid,
    "composition": lambda place: place.facts.reduced,
    "source": lambda place: place.file,
    "key": lambda place: place.facts.group,
}
GROUPINGS = tuple(name for name in _GROUPS if name != "key")


@dataclass(frozen=True)
class SplitOptions:
    """Choice of a split.

    Attributes:
        by: "system", "composition" (ratio of the elements), "source" (file), or "key" (`--group-key`).
        fractions: shares of the frames for train, val and, where a third is given, test.
        seed: random seed of the order of the groups.

    Raises:
        DataError: another grouping, or fractions that are not positive or not 1 together.
    """

    by: str = "system"
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in _GROUPS:
            raise DataError(f"frames are split by {', '.join(_GROUPS)}, not by {self.by!r}.")
        sizes = self.fractions
        if not 2 <= len(sizes) <= len(PARTS) or not min(sizes) > 0 or abs(sum(sizes) - 1) > 1e-6:
            raise DataError(
                f"the fractions {', '.join(f'{size:g}' for size in sizes)} must be two or three positive "
                "numbers, for train, val and test, that are 1 together."
            )


def split_frames(frames: Sequence[Place], options: SplitOptions) -> list[str]:
    """Assign every frame to a part.

    Groups that share a trajectory (frames of one calculation, or neighbours in a file that follow from each
    other) are kept together. Groups come in a random order, and each goes to the part that lacks most of its
    share.

    Returns:
        Name of the part of every frame.

    Raises:
        DataError: there are fewer groups than parts.
    """
    name_of = _GROUPS[options.by]
    joined = _Joined()
    for place in frames:
        joined.join(("group", name_of(place)), ("run", f"{place.file}\0{place.facts.run}"))
    group_of = [joined.root(("group", name_of(place))) for place in frames]
    sizes: dict[tuple[str, str], int] = {}
    for group in group_of:
        sizes[group] = sizes.get(group, 0) + 1
    parts = PARTS[: len(options.fractions)]
    if len(sizes) < len(parts):
        what = {"key": "value of the group key", "source": "source file"}.get(options.by, options.by)
        if len({name_of(place) for place in frames}) >= len(parts):
            what = f"group of a {what} and the trajectories in it, which stay together"
        raise DataError(
            f"the {len(frames)} frames are of {len(sizes)} {what}{'s' if len(sizes) > 1 else ''}, too few "
            f"for {len(parts)} parts ({', '.join(parts)}) without dividing one; add data, split by something "
            f"else ({', '.join(GROUPINGS)}, or --group-key), or import without --split."
        )
    wanted = [share * len(frames) for share in options.fractions]
    filled = [0.0] * len(parts)
    random = np.random.default_rng(options.seed)
    order = [sorted(sizes)[number] for number in random.permutation(len(sizes))]
    part_of: dict[tuple[str, str], str] = {}
    for turn, group in enumerate(order):
        empty = [number for number, size in enumerate(filled) if not size]
        choices = empty if len(order) - turn <= len(empty) else range(len(parts))
        best = max(choices, key=lambda number: (wanted[number] - filled[number]) / wanted[number])
        filled[best] += sizes[group]
        part_of[group] = parts[best]
    return [part_of[group] for group in group_of]


class _Joined:
    """Sets of names that are joined one after the other."""

    def __init__(self) -> None:
        self._parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(self, name: tuple[str, str]) -> tuple[str, str]:
        """Return the name that stands for the set of `name`."""
        self._parent.setdefault(name, name)
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def join(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        """Join the sets of two names; a group stands for its trajectories."""
        first, second = sorted((self.root(one), self.root(other)))
        self._parent[second] = first
