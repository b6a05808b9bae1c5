"""Features that enter the blocks of a network, kept for later passes that differ from some block on."""

import math
from collections.abc import Iterable, Sequence

from equiformer2.model.config import ModelConfig
from equiformer2.model.routing import Prefix

LIMIT_BYTES = 1 << 30


class StoredPasses:
    """Passes of the present network over calibration batches, as far as the memory goes.

    The features in front of a block take 4 K C bytes per atom, and the geometry of the edges, which the
    passes over a batch share, 4 (P + B) bytes per edge (P rotation entries, B functions of the distance): 220
    and 110 MB for 32 structures of 50 atoms and the 31M network. Where this is more than the limit, the
    features of every second block are kept, or of fewer; passes then begin at the one before.

    Args:
        config: configuration of the network.
        sizes: numbers of structures, atoms and edges of every batch (`Calibration.sizes`).
        limit: bytes that may be used. As much again as for the features is set aside for the passes of
            candidates.

    Attributes:
        blocks: numbers of the blocks in front of which features are kept, ascending; the number of blocks
            stands for the heads.
    """

    def __init__(
        self, config: ModelConfig, sizes: Sequence[tuple[int, int, int]], limit: int = LIMIT_BYTES
    ) -> None:
        atoms, edges = (sum(size[column] for size in sizes) for column in (1, 2))
        entries = sum((2 * min(l, config.mmax) + 1) * (2 * l + 1) for l in range(config.lmax + 1))
        room = limit - 4 * edges * (entries + 1 + config.num_distance_basis)
        one = 2 * 4 * atoms * (config.lmax + 1) ** 2 * config.sphere_channels
        last = config.num_layers
        stride = math.ceil((last + 1) * one / room) if room >= one else last + 2
        self.blocks = [] if stride > last + 1 else [b for b in range(last + 1) if (last - b) % stride == 0]
        self._passes: dict[int, dict[int, Prefix]] = {}

    def put(self, batch: int, passes: Iterable[Prefix], first: int = 0) -> None:
        """Replace what is known of a batch.

        Args:
            batch: its number.
            passes: the pass so far at blocks after `first`; those at other than `blocks` are ignored.
            first: block up to which the features that are kept still hold.
        """
        held = {block: known for block, known in self._passes.get(batch, {}).items() if block <= first}
        new = {known.block: known for known in passes if known.block in self.blocks}
        self._passes[batch] = {**new, **held}

    def before(self, batch: int, block: int | None) -> Prefix | None:
        """Return the pass over a batch from which to go on.

        Args:
            batch: its number.
            block: first block that is changed; None where the embedding is.

        Returns:
            The latest at or before `block`; None for a whole pass.
        """
        known = self._passes.get(batch, {})
        usable = [] if block is None else [number for number in known if number <= block]
        return known[max(usable)] if usable else None
