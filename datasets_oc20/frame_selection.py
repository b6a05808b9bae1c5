"""Deterministic selection of systems and of frames of a relaxation.

Frames of one relaxation are near copies of each other, so honest figures come from a split by system. A
weaker test, extrapolation within relaxations whose beginning was trained on, uses blocks of later frames.
"""

import math
import random
from collections.abc import Iterable

import numpy as np


def hold_out_systems(systems: Iterable[str], count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split systems into training and held-out ones at random.

    Args:
        systems: ids of the systems, each once.
        count: number of systems to hold out.
        seed: random seed.

    Returns:
        The training and the held-out systems, both sorted.

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
    """Split the frames 0 … count-1 of a relaxation into a training part and a block of later frames.

    The later block is the last `fraction` of the frames, or with `tail` a block that ends this much earlier:
    the frames behind it are for training too. The `gap` (also a fraction of all frames) beside the block
    belongs to neither, because its frames are near copies of the block's. At least one frame is kept on
    either side where there are two or more.

    Args:
        count: number of frames.
        fraction: share of the frames in the later block.
        gap: share of the frames beside the block that belongs to neither part.
        tail: share of the frames behind the block (and a gap) that is for training.

    Returns:
        Training and later indices, both sorted.

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


def spread_frames(count: int, limit: int) -> np.ndarray:
    """Return at most `limit` of the indices 0 … count-1, evenly spread and sorted, first and last included.

    Args:
        count: number of frames.
        limit: maximum number of frames to choose.
    """
    if limit >= count:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, limit).round().astype(np.int64))


def informative_frames(max_forces: np.ndarray, limit: int) -> np.ndarray:
    """Choose at most `limit` frames of a relaxation that are the most instructive to train on.

    Half are spread evenly over the relaxation, so that its whole range of energies is there; the others
    are those with the largest force on a free atom, since most frames of a relaxation are nearly at rest.
    Ties go to the earlier frame.

    Args:
        max_forces: `[count]` eV/Å, the largest force on a free atom of every frame.
        limit: maximum number of frames to choose.

    Returns:
        Indices of the frames, sorted.
    """
    count = len(max_forces)
    if limit >= count:
        return np.arange(count)
    chosen = set(spread_frames(count, (limit + 1) // 2).tolist())
    for index in np.argsort(-max_forces, kind="stable").tolist():
        if len(chosen) == limit:
            break
        chosen.add(index)
    return np.array(sorted(chosen), dtype=np.int64)
