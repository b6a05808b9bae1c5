"""Which systems and which frames of a relaxation to use. Everything here is deterministic.

Frames of one relaxation are near copies of each other, so honest figures come from a split by system, and a
weaker kind ("how well does it go on with relaxations it has begun to see") from blocks of later frames.
"""

import math
import random
from collections.abc import Iterable

import numpy as np


def hold_out_systems(systems: Iterable[str], count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split systems into (training, unseen) with `count` unseen ones; both sorted.

    Raises:
        ValueError: fewer than one system would be left for training.
    """
    ordered = sorted(systems)
    if not 0 <= count < len(ordered):
        raise ValueError(f"cannot hold out {count} of {len(ordered)} systems")
    unseen = set(random.Random(seed).sample(ordered, count))
    return [name for name in ordered if name not in unseen], sorted(unseen)


def split_later_frames(
    count: int, fraction: float, gap: float = 0.1, tail: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Split the frames 0 … count-1 of a relaxation into (training, later) indices.

    The later block is the last `fraction` of the frames, or with `tail` a block that ends this much earlier:
    the frames behind it are for training too. The `gap` (also a fraction of all frames) beside the block
    belongs to neither, because its frames are near copies of the block's. At least one frame is kept on
    either side where there are two or more.

    Raises:
        ValueError: the fractions are negative or leave nothing.
    """
    if not (0.0 <= fraction < 1.0 and gap >= 0.0 and tail >= 0.0 and fraction + gap + tail < 1.0):
        raise ValueError(
            f"later fraction {fraction}, gap {gap} and tail {tail} must be positive and below 1 together"
        )
    end = count - round(count * tail)
    later = min(math.ceil(count * fraction), end - 1)
    skipped = round(count * gap) if later else 0
    before = np.arange(max(end - later - skipped, 1))
    behind = np.arange(min(end + skipped, count), count)
    return np.concatenate([before, behind]), np.arange(end - later, end)


def spread_frames(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the indices 0 … count-1, evenly spread, first and last included (sorted)."""
    if wanted >= count:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64))


def informative_frames(max_forces: np.ndarray, wanted: int) -> np.ndarray:
    """At most `wanted` frames of a relaxation that teach most (sorted indices).

    Half are spread evenly over the relaxation, so that its whole range of energies is there; the others
    are those with the largest force on a free atom (`max_forces [count]`, eV/Å), since most frames of
    a relaxation are nearly at rest. Ties go to the earlier frame.
    """
    count = len(max_forces)
    if wanted >= count:
        return np.arange(count)
    chosen = set(spread_frames(count, (wanted + 1) // 2).tolist())
    for index in np.argsort(-max_forces, kind="stable").tolist():
        if len(chosen) == wanted:
            break
        chosen.add(index)
    return np.array(sorted(chosen), dtype=np.int64)
