"""Precisions of the parts of a network that fit a limit of bytes or time, from what each part needs."""

from collections.abc import Mapping, Sequence

from equiformer2.errors import InputError
from equiformer2.pruning.precision.compact import matrix_bytes

#: Best first.
PRECISIONS = ("float32", "bf16", "int8", "int4")
Choice = dict[str, str]
"""Part -> precision."""


class PartSizes:
    """Cost of every part in the precisions that it may have, and the room that the parts share.

    Args:
        costs: part -> precision -> bytes in a file, at most, or time.
        room: for all parts together, in the same unit.
    """

    def __init__(self, costs: Mapping[str, Mapping[str, int]], room: int) -> None:
        self.costs, self.room = costs, room

    @classmethod
    def of_matrices(
        cls, parts: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, ...]], room: int
    ) -> "PartSizes":
        """Count the bytes of every part.

        Args:
            parts: part -> its modules.
            shapes: module -> shape of its matrix.
            room: bytes for all parts together.
        """
        costs = {
            part: {p: sum(matrix_bytes(shapes[module], p) for module in modules) for p in PRECISIONS}
            for part, modules in parts.items()
        }
        return cls(costs, room)

    def total(self, choice: Mapping[str, str]) -> int:
        """Return the cost of a choice."""
        return sum(self.costs[part][precision] for part, precision in choice.items())

    def smallest(self) -> Choice:
        """Return the choice of the least cost; of equal ones the better."""
        return {
            part: min(costs, key=lambda precision: (costs[precision], PRECISIONS.index(precision)))
            for part, costs in self.costs.items()
        }

    def check(self) -> None:
        """Raise `InputError` where not even the smallest choice fits."""
        least = self.total(self.smallest())
        if least > self.room:
            raise InputError(
                f"the matrices take {least:,} bytes at least, and the limit leaves {max(0, self.room):,}"
            )


def by_sensitivity(sizes: PartSizes, losses: Mapping[str, Mapping[str, float]]) -> Choice:
    """Fill the room where it lowers the squared loss most per byte, beginning with the smallest choice.

    Errors of different parts are nearly independent: their squares add up.

    Args:
        sizes: bytes of the parts.
        losses: part -> precision -> loss with this part alone in it.
    """
    sizes.check()
    return filled(sizes, losses, sizes.smallest())


def by_information(sizes: PartSizes, bits: Mapping[str, float]) -> Choice:
    """Raise the parts that tell most about the outputs first, all by one precision before any by two.

    Args:
        sizes: bytes of the parts.
        bits: part -> mutual information.
    """
    sizes.check()
    choice = sizes.smallest()
    ranked = sorted(choice, key=lambda part: (-bits[part], part))
    for precision in ("int8", "bf16", "float32"):
        for part in ranked:
            costs = sizes.costs[part]
            if precision not in costs:
                continue
            more = costs[precision] - costs[choice[part]]
            worse = PRECISIONS.index(choice[part]) > PRECISIONS.index(precision)
            if worse and sizes.total(choice) + more <= sizes.room:
                choice[part] = precision
    return choice


def filled(sizes: PartSizes, losses: Mapping[str, Mapping[str, float]], choice: Mapping[str, str]) -> Choice:
    """Raise precisions of a choice, as `by_sensitivity` does, until nothing more fits."""
    now = dict(choice)
    left = sizes.room - sizes.total(now)
    while True:
        best: tuple[float, str, str, int] | None = None
        for part, precision in now.items():
            costs = sizes.costs[part]
            for other in PRECISIONS[: PRECISIONS.index(precision)]:
                if other not in costs:
                    continue
                more = costs[other] - costs[precision]
                gain = losses[part][precision] ** 2 - losses[part][other] ** 2
                if more > left or gain <= 0:
                    continue
                value = gain / max(more, 1)
                if best is None or value > best[0]:
                    best = value, part, other, more
        if best is None:
            return now
        _, part, other, more = best
        now[part], left = other, left - more


def fitted(sizes: PartSizes, losses: Mapping[str, Mapping[str, float]], choice: Mapping[str, str]) -> Choice:
    """Make any choice fit: lower precisions where it costs least per byte, then fill what is left.

    Args:
        sizes: bytes of the parts.
        losses: part -> precision -> loss.
        choice: part -> precision; of more parts or fewer than there are. Precisions that a part may not have
            become its cheapest one.
    """
    sizes.check()
    smallest = sizes.smallest()
    now = {
        part: choice[part] if choice.get(part) in costs else smallest[part]
        for part, costs in sizes.costs.items()
    }
    while (over := sizes.total(now) - sizes.room) > 0:
        lower = [
            (
                (losses[part][other] ** 2 - losses[part][precision] ** 2) / min(less, over),
                part,
                other,
            )
            for part, precision in now.items()
            for other in sizes.costs[part]
            if (less := sizes.costs[part][precision] - sizes.costs[part][other]) > 0
        ]
        _, part, other = min(lower)
        now[part] = other
    return filled(sizes, losses, now)
