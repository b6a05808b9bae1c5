"""Work of a search, counted in passes of the dense network over a structure of mean size.

Times depend on the machine and on what else it does; this number does not, and a limit that is stated in it
holds for any network: 3,000 passes of a network are 3,000 times what one force call costs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from equiformer2.model.config import ModelConfig
from equiformer2.pruning.cost.operations import MacRates, count_macs

GRADIENT = 3.0
"""Passes that one with gradients counts as: two products in the backward part for each of the forward one."""


class Work:
    """Count of the passes that a search has made over batches of structures.

    The unit is one pass of the dense network over a structure of mean size: multiply-accumulates of the
    blocks and heads that were run, over those of a whole pass. Masked networks count at their full size,
    because they are computed so.

    Args:
        config: configuration of the dense network.
        sizes: numbers of structures, atoms and edges of every batch (`Calibration.sizes`).
        passes: passes made before.

    Attributes:
        passes: passes made so far.
        show: called with every increase; does nothing at first.
    """

    def __init__(
        self,
        config: ModelConfig,
        sizes: Sequence[tuple[int, int, int]],
        passes: float = 0.0,
    ) -> None:
        self.passes = passes
        self.show: Callable[[float], None] = lambda passes: None
        self._rates = MacRates.of(config)
        counts = [count_macs(config, atoms, edges) for _, atoms, edges in sizes]
        unit = sum(count.total for count in counts) / sum(structures for structures, _, _ in sizes)
        self._unit, self._sizes = unit, [torch.tensor(size[1:], dtype=torch.float64) for size in sizes]
        self._steps = [
            [count.edge_degree / unit]
            + [sum(block.values()) / unit for block in count.blocks]
            + [(count.energy_head + sum(count.force_head.values())) / unit]
            for count in counts
        ]

    def of_pass(self, batch: int, start: int | None = None) -> float:
        """Return the passes that a batch is worth.

        Args:
            batch: its number.
            start: block that the pass begins at, the number of blocks for the heads alone; None for a whole
                pass, which also embeds the edges.

        Returns:
            At most the number of structures of a batch of mean sizes.
        """
        return sum(self._steps[batch][0 if start is None else 1 + start :])

    def of_routed_pass(self, batch: int, computed: Sequence[Tensor], start: int | None = None) -> float:
        """Return the passes that a batch is worth whose blocks skip atoms or edges.

        Args:
            batch: its number.
            computed: `[2]` per block: numbers of atoms and of edges that it computes.
            start: as in `of_pass`.

        Returns:
            At most `of_pass`.
        """
        size, rates = self._sizes[batch], self._rates
        blocks = list(zip(rates.blocks, computed, strict=True))[start or 0 :]
        macs = float(rates.heads @ size) + sum(float(rate @ count) for rate, count in blocks)
        return (macs + (float(rates.embedding @ size) if start is None else 0.0)) / self._unit

    def add(self, passes: float) -> None:
        """Count `passes` more."""
        self.passes += passes
        self.show(passes)
