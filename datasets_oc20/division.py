"""Division of frames into a part to train on and a part to judge by, by system and never by frame.

Frames of one relaxation are near copies of each other: a network that has seen some of them answers the
others well, which says nothing about the next system.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.formula import Formula
from ase.symbols import Symbols

from datasets_oc20.errors import DataError
from datasets_oc20.frame_selection import split_later_frames

LATER_SHARE = 0.25
"""Share of the frames of a single system that are judged, the last ones."""
_LATER_GAP = 0.05


@dataclass(frozen=True)
class Division:
    """Two parts of a dataset.

    Attributes:
        train: indices of the frames to train on, sorted.
        held_out: indices of the frames to judge by, sorted.
        by_time: True for the later frames of a single system, False for other systems.
        sentence: description of the division, for people.
    """

    train: np.ndarray
    held_out: np.ndarray
    by_time: bool
    sentence: str


def group_names(sids: Sequence[str], numbers: Sequence[np.ndarray]) -> list[str]:
    """Name the system of every frame.

    That is its `sid`. Where frames have none, or each has one of its own, frames of one composition are taken
    as one system: nothing tells then which of them are copies of each other.

    Args:
        sids: of every frame.
        numbers: atomic numbers `[N]` of every frame.
    """
    compositions = [
        Formula.from_dict(Counter(Symbols(np.sort(number)))).format("metal") + f" ({len(number)} atoms)"
        for number in numbers
    ]
    frames = Counter(sids)
    known = [sid for sid in sids if sid]
    if known and (len(frames) < len(sids) or len(set(compositions)) == len(sids)):
        return [sid or composition for sid, composition in zip(sids, compositions, strict=True)]
    return compositions


def divide(
    systems: Sequence[str], frame_numbers: Sequence[int], share: float, seed: int, source: str
) -> Division:
    """Hold out systems, or the last frames of a single one.

    Systems are drawn at random, without those that would make the part more than twice as large as asked for
    where others are left.

    Args:
        systems: name of every frame's system.
        frame_numbers: number of every frame in its relaxation.
        share: of the frames to hold out, above 0 and below 1.
        seed: random seed of the choice.
        source: names the data in the error.

    Raises:
        DataError: there is only one frame.
    """
    count = len(systems)
    if count < 2:
        raise DataError(
            f"{source}: one frame can be learned by heart and judged by nothing; give more frames, or others "
            "to judge by."
        )
    sizes = Counter(systems)
    if len(sizes) == 1:
        order = np.lexsort((np.arange(count), np.asarray(frame_numbers)))
        before, later = split_later_frames(count, LATER_SHARE, _LATER_GAP)
        between = count - len(before) - len(later)
        return Division(
            np.sort(order[before]),
            np.sort(order[later]),
            True,
            f"all {count} frames are of one system, {systems[0]}: its first {len(before)} frames to train on "
            f"and its last {len(later)} to judge by"
            f"{f', without the {between} between' if between else ''}, the easy case, which says nothing "
            "about other systems",
        )
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    wanted, chosen, held = share * count, set[str](), 0
    for name in names:
        if len(chosen) == len(sizes) - 1 or held >= wanted:
            break
        if held + sizes[name] <= 2 * wanted:
            chosen.add(name)
            held += sizes[name]
    if not chosen:
        chosen = {min(names, key=lambda name: sizes[name])}
    is_held = np.array([name in chosen for name in systems])
    train, held_out = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    for_training = len(sizes) - len(chosen)
    return Division(
        train,
        held_out,
        False,
        f"{for_training} system{'s' * (for_training > 1)} ({len(train)} frames) to train on and "
        f"{len(chosen)} other{'s' * (len(chosen) > 1)} ({len(held_out)} frames) to judge by",
    )
