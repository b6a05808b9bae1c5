"""Transformer block (paper Figure 1a)."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from equiformer2.kernels.backend import Backend
from equiformer2.model.attention import SO2EquivariantGraphAttention
from equiformer2.model.block_config import ResolvedBlock
from equiformer2.model.config import ModelConfig
from equiformer2.model.edge_context import EVERYTHING, BlockRouting, EdgeGraph
from equiformer2.model.feed_forward import FeedForwardNetwork, SwiGLUFeedForwardNetwork
from equiformer2.model.folding import folded_in_bf16
from equiformer2.model.norm import make_norm
from equiformer2.model.regularization import EquivariantDropout, GraphDropPath
from equiformer2.model.so3 import S2Grid


class BlockOutput(NamedTuple):
    """Result of a block.

    Attributes:
        x: `[N, K, C]` features that leave it.
        attention: `[e, H]` attention weights of the edges that it computed, None unless observed (or without
            an attention branch).
    """

    x: Tensor
    attention: Tensor | None


class TransformerBlock(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual.

    In a pruned network either branch, with its norm, may be missing: `ga` or `ffn` is None.

    Attributes:
        bf16_branches: which of `ga` and `ffn` are to multiply in bfloat16 (`model.branches`).
    """

    def __init__(
        self, config: ModelConfig, block: ResolvedBlock, edge_grid: S2Grid, node_grid: S2Grid
    ) -> None:
        super().__init__()
        channels = config.sphere_channels
        self.norm_1, self.ga, self.norm_2, self.ffn = None, None, None, None
        self.bf16_branches: frozenset[str] = frozenset()
        if block.attention:
            self.norm_1 = make_norm(config.norm_type, config.lmax, channels)
            self.ga = SO2EquivariantGraphAttention(
                config, block, edge_grid, channels, config.alpha_drop, config.attn_activation
            )
        self.drop_path = GraphDropPath(config.drop_path_rate)
        self.proj_drop = EquivariantDropout(config.proj_drop)
        if block.feed_forward:
            self.norm_2 = make_norm(config.norm_type, config.lmax, channels)
            network = SwiGLUFeedForwardNetwork if config.use_swiglu_s2_act else FeedForwardNetwork
            self.ffn = network(config, block, node_grid, channels)

    def forward(
        self,
        x: Tensor,
        edges: EdgeGraph,
        structure: Tensor,
        num_structures: int,
        backend: Backend,
        routing: BlockRouting = EVERYTHING,
        observe: bool = False,
    ) -> BlockOutput:
        """Update the target atoms; the others keep their features.

        Args:
            x: `[N, K, C]` features.
            edges: the edges into the target atoms.
            structure: `[N]` index of each atom's structure.
            num_structures: B.
            backend: the implementation of the hot operations.
            routing: which atoms the targets are, and gates.
            observe: return the attention weights, too.
        """
        structure = routing.at_targets(structure)

        def drop(branch: Tensor) -> Tensor:
            kept = self.proj_drop(self.drop_path(branch, structure, num_structures))
            return kept if routing.atom_gates is None else routing.atom_gates * kept

        updated, weights = routing.at_targets(x), None
        if self.ga is not None and self.norm_1 is not None:
            normed = self.norm_1(x)
            with self._products("ga", x):
                messages, weights = self.ga(normed, edges, backend, routing, observe)
            updated = updated + drop(messages)
        if self.ffn is not None and self.norm_2 is not None:
            normed = self.norm_2(updated)
            with self._products("ffn", x):
                change = self.ffn(normed, backend)
            updated = updated + drop(change)
        return BlockOutput(routing.put_targets(x, updated), weights)

    def _products(self, branch: str, x: Tensor) -> AbstractContextManager[object]:
        """Context of the matrix products of a branch: autocast, if they are folded in bfloat16."""
        if branch in self.bf16_branches and not torch.is_grad_enabled():
            module: nn.Module = getattr(self, branch)
            if folded_in_bf16(module):
                return torch.autocast(x.device.type, torch.bfloat16)
        return nullcontext()
