"""FTP's trained router (arXiv 2412.11494): one small network for all blocks, four low-dimensional factors."""

from typing import Any

import torch
from torch import Tensor, nn

from equiformer2.errors import InputError
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.routing.batch_geometry import ADSORBATE, FAR, BatchGeometry
from equiformer2.pruning.routing.geometric_routers import MOST_STATIC, static_priority
from equiformer2.pruning.routing.router import Levels, ScoreRouter
from equiformer2.values import Number, Whole, check_size, mapping

NUM_FACTORS, HIDDEN = 7, 64
_RANK_WIDTH = 0.2


class FTPRouter(ScoreRouter):
    """Router that keeps or skips atoms by an MLP (7 -> 64 -> 1), shared by all blocks.

    Factors of an atom in block l, all invariant:

    1. position: tag 1, tag 2 (tag 0 is neither), distance to the nearest adsorbate atom, and the place in the
       order of the static router, which stands for the original's position of a token: its rank in the
       structure (`topk`) or `static_priority` itself (`threshold`, `smooth`);
    2. a_j, the attention that the atom received in the last block that was computed;
    3. the rank of a_j: in the structure, ties averaged (`topk`); among the atoms that attend to it or
       that it attends to (`threshold`, `smooth`), which is local and smooth;
    4. s^l, the sparsity asked of the block.

    The score is the probability to keep. In the modes `threshold` and `smooth` the level of a block is still
    its sparsity s^l, and an atom is kept from the probability `cut` on; as the router is trained to keep
    1 - s^l of the atoms at 1/2, that is the default.

    Args:
        levels: s^l (see `ScoreRouter`).
        cut: probability from which on an atom is kept (`threshold`, `smooth`).
        weights: weights of the MLP, as `settings` gives them; None for random ones.
        seed: random seed of random weights.
        **options: options of `ScoreRouter`.

    Attributes:
        mlp: the MLP, float32.

    Raises:
        InputError: weights of another MLP, or an argument out of its range.
    """

    observes_attention = True

    def __init__(
        self,
        levels: Levels,
        cut: float = 0.5,
        weights: dict[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(levels, **options)
        self.cut = Number(0.0, 1.0).read(cut, "cut")
        # Without torch's own initialization, which would draw from the global generator.
        first, last = (
            nn.utils.skip_init(nn.Linear, *sizes) for sizes in ((NUM_FACTORS, HIDDEN), (HIDDEN, 1))
        )
        self.mlp = nn.Sequential(first, nn.SiLU(), last)
        generator = torch.Generator().manual_seed(Whole(0, 2**62).read(seed, "seed"))
        with torch.no_grad():
            for parameter in self.mlp.parameters():
                bound = parameter.shape[-1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
        if weights is not None:
            self._load(weights)

    def factors(self, geometry: BatchGeometry, state: BlockState, sparsity: float) -> Tensor:
        """Return the factors of every atom, about from 0 to 1.

        Args:
            geometry: geometry of the batch.
            state: features and attention before the block.
            sparsity: s^l of the block.

        Returns:
            `[N, 7]`.
        """
        assert state.attention is not None
        source, target = geometry.graph.edge_index
        received = received_attention(state.attention.detach(), source, len(geometry.pos))
        in_structure = self.mode == "topk"
        rank = geometry.rank(received) if in_structure else self._local_rank(received, source, target)
        priority = static_priority(geometry)
        columns = (
            geometry.tags == 1,
            geometry.tags == ADSORBATE,
            geometry.to_adsorbate / FAR,
            geometry.rank(priority) if in_structure else priority / MOST_STATIC,
            received / (1 + received),
            rank,
            torch.full_like(received, sparsity),
        )
        return torch.stack([column.to(received.dtype) for column in columns], dim=1)

    def logits(self, geometry: BatchGeometry, state: BlockState, sparsity: float) -> Tensor:
        """Return the logits of the probability to keep, `[N]`; arguments as of `factors`."""
        first, last = self.mlp[0], self.mlp[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        # In the precision of the features.
        factors = self.factors(geometry, state, sparsity).to(state.x.dtype)
        hidden = nn.functional.linear(factors, first.weight.to(factors), first.bias.to(factors))
        hidden = nn.functional.silu(hidden)
        return nn.functional.linear(hidden, last.weight.to(factors), last.bias.to(factors)).squeeze(1)

    def scores(self, geometry: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """Return the probability to keep, `[N]`; `level` is s^l."""
        return torch.sigmoid(self.logits(geometry, state, level))

    def decide(
        self, geometry: BatchGeometry, state: BlockState, level: float, before: Tensor | None
    ) -> Decision:
        """Select by the probability to keep: its best 1 - s^l (`topk`), or all from `cut` on."""
        at = level if self.mode == "topk" else self.cut
        return Decision(self.choose(self.scores(geometry, state, level), geometry, at, before))

    def trainable_levels(self, num_blocks: int) -> tuple[float | None, ...]:
        """Return the level of every block (None: all atoms) for training.

        Raises:
            InputError: there are levels for another number of blocks, or no block has one.
        """
        levels = self.block_levels(num_blocks)
        if all(level is None for level in levels):
            raise InputError("no block is routed: give levels, or a network of more than two blocks")
        return levels

    def to(self, device: torch.device | str) -> "FTPRouter":
        """Move the MLP to a device."""
        self.mlp.to(device)
        return self

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this router again, the weights among them."""
        weights = {name: value.tolist() for name, value in self.mlp.state_dict().items()}
        return super().settings() | {"cut": self.cut, "weights": weights}

    def _load(self, weights: dict[str, Any]) -> None:
        expected = self.mlp.state_dict()
        check_size(weights, "the router's weights")
        try:
            stored = {
                name: torch.tensor(value, dtype=torch.float32)
                for name, value in mapping(weights, "the router's weights").items()
            }
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"the router's weights are no numbers: {error}") from error
        if not all(bool(torch.isfinite(value).all()) for value in stored.values()):
            raise InputError("the router's weights hold numbers that are not finite")
        if {n: v.shape for n, v in stored.items()} != {n: v.shape for n, v in expected.items()}:
            raise InputError("the router's weights have other names or shapes than an MLP 7 -> 64 -> 1")
        self.mlp.load_state_dict(stored)

    @staticmethod
    def _local_rank(values: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """`[N]` fraction of the neighbours that have a smaller value, smoothed; 1/2 without neighbours."""
        at = torch.cat((target, source))
        other = torch.cat((source, target))
        smaller = torch.sigmoid((values[at] - values[other]) / _RANK_WIDTH)
        sums = values.new_zeros(len(values)).index_add(0, at, smaller)
        count = torch.bincount(at, minlength=len(values))
        return (sums + 0.5 * (count == 0)) / count.clamp(min=1)


def received_attention(attention: Tensor, source: Tensor, num_atoms: int) -> Tensor:
    """Sum the attention that every atom receives; 1 on average.

    Args:
        attention: `[E, H]` weights α_{j->i}.
        source: `[E]` atom j.
        num_atoms: N.

    Returns:
        `[N]` a_j = mean over heads of the sum over i of α_{j->i}.
    """
    mean = attention.mean(dim=1)
    return mean.new_zeros(num_atoms).index_add(0, source, mean)
