"""What the numbers of a record say: medians, speed-ups and whether they reach what the project promises."""

import statistics
from typing import Any

from benchmarks.part_memory import peak_of

GOAL_SIZES = ("31M", "83M")
# Times faster than the reference, by device, operation and precision of ours. On a GPU both run in TF32.
SPEED_GOALS: dict[tuple[str, str, str], float] = {
    ("cpu", "forward", "float32"): 2.2,
    ("cpu", "training_step", "float32"): 2.2,
    ("cpu", "forward", "bf16"): 4.0,
    ("cuda", "forward", "tf32"): 6.0,
    ("cuda", "training_step", "tf32"): 4.0,
}
# Share of the reference's peak memory of a training step.
MEMORY_GOALS = {"cpu": 1 / 3, "cuda": 1 / 4}


def median(call: dict[str, Any]) -> float:
    """Seconds of a timed call."""
    return statistics.median(call["seconds"])


def baseline(calls: list[dict[str, Any]], ours: dict[str, Any]) -> dict[str, Any] | None:
    """The call of the reference that one of ours is measured against: its fastest way to do the same.

    In the same precision; bf16 is measured against the fastest of the reference's precisions.
    """
    kind = ours["operation"].removesuffix("_as_shipped")
    same = [
        call
        for call in calls
        if call["implementation"] == "reference" and call["operation"].removesuffix("_as_shipped") == kind
    ]
    exact = [call for call in same if call["precision"] == ours["precision"]]
    return min(exact or same, key=median, default=None)


def speed_up(calls: list[dict[str, Any]], ours: dict[str, Any]) -> float | None:
    """Median of the reference's fastest call over our median."""
    found = baseline(calls, ours)
    return None if found is None else median(found) / median(ours)


def speed_goal(device: str, size: str, call: dict[str, Any]) -> float | None:
    """The promised speed-up of one of our calls, if there is a promise."""
    if size not in GOAL_SIZES:
        return None
    return SPEED_GOALS.get((device, call["operation"], call["precision"]))


def memory_goal(device: str, size: str) -> float | None:
    """The promised share of the reference's peak memory, if there is a promise."""
    return MEMORY_GOALS[device] if size in GOAL_SIZES else None


def memory_ratio(record: dict[str, Any], backend: str = "auto") -> float | None:
    """Our peak over the reference's."""
    reference, ours = peak_of(record, "reference"), peak_of(record, "ours", backend)
    return None if reference is None or ours is None else ours["peak"] / reference["peak"]
