"""Settings of an adapter."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from equiformer2.errors import InputError

Method = Literal["snip", "magnitude", "random", "grasp"]
"""Ways to score the entries of an adapter before it is trained (`adapters.scores`)."""
Scope = Literal["global", "layer"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class AdapterSettings:
    """Low-rank maps on a frozen network, pruned before training (SparseAdapter, He et al. 2022).

    Args:
        rank: of the maps; 0 for no adapter. Weights that are narrower get their width as rank.
        keep: share of the entries of all factors that is trained and stored; the others are zero for good.
        method: scores the entries: `snip` (change of the loss), `magnitude`, `random`, or `grasp` (change of
            the gradient's norm).
        scope: entries compete with all others (`global`), or within their weight (`layer`).
        large_sparse: c, for c times the rank at 1/c of the kept share, which are as many entries
            (the paper's Large-Sparse).
        weights: patterns of names of weights (`*` stands for anything), such as `blocks.*.ga.*`.
        scale: factor of the maps.
        frames: training structures on which the entries are scored.
        start: adapter file of the same network, whose maps the training starts with, such as those of
            `prune quantize --recover`; rank, kept entries, scale and weights are then the file's.

    Raises:
        InputError: a value is out of its range.
    """

    rank: int = 0
    keep: float = 0.2
    method: Method = "snip"
    scope: Scope = "global"
    large_sparse: int = 1
    weights: tuple[str, ...] = ("*",)
    scale: float = 2.0
    frames: int = 32
    start: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("rank", 0), ("large_sparse", 1), ("frames", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 100_000:
                raise InputError(f"adapter.{name} is {value}: give a whole number of at least {least}")
        if self.start is not None and self.rank == 0:
            raise InputError(
                "adapter.start is given and adapter.rank is 0, which trains no adapter: give both"
            )
        if not 0 < self.keep <= 1:
            raise InputError(
                f"adapter.keep is {self.keep}: give the share of the adapter that stays, above 0 and at "
                "most 1"
            )
        if not 0 < self.scale < 1e6:
            raise InputError(f"adapter.scale is {self.scale}: give a number above 0")
        if self.method not in METHODS:
            raise InputError(f"adapter.method is '{self.method}': it is one of {', '.join(METHODS)}")
        if self.scope not in get_args(Scope):
            raise InputError(f"adapter.scope is '{self.scope}': it is global or layer")
        if not self.weights or not all(isinstance(each, str) and each for each in self.weights):
            raise InputError("adapter.weights is empty: give patterns of names of weights, or leave it out")
        object.__setattr__(self, "weights", tuple(self.weights))

    @property
    def total_rank(self) -> int:
        """Rank of the maps, with Large-Sparse."""
        return self.rank * self.large_sparse

    @property
    def total_keep(self) -> float:
        """Share of their entries that stays, with Large-Sparse."""
        return self.keep / self.large_sparse

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "weights": list(self.weights)}

    def describe(self) -> str:
        """Describe the adapter in a few words."""
        if self.start is not None:
            return f"an adapter that starts with the maps of {Path(self.start).name}"
        text = f"an adapter of rank {self.total_rank}"
        if self.total_keep < 1:
            of_each = "" if self.scope == "global" else " of each weight"
            text += f", {self.total_keep:.3g} of its entries{of_each} kept by {self.method}"
        if self.weights != ("*",):
            text += f", on {', '.join(self.weights)}"
        return text
