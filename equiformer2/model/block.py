"""Transformer block (paper Figure 1a)."""

from torch import Tensor, nn

from equiformer2.model.attention import SO2EquivariantGraphAttention
from equiformer2.model.config import ModelConfig
from equiformer2.model.edges import EdgeContext
from equiformer2.model.feed_forward import FeedForwardNetwork
from equiformer2.model.norm import make_norm
from equiformer2.model.regularization import EquivariantDropout, GraphDropPath
from equiformer2.model.so3 import S2Grid


class TransformerBlock(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual."""

    def __init__(self, config: ModelConfig, edge_grid: S2Grid, node_grid: S2Grid) -> None:
        super().__init__()
        self.norm_1 = make_norm(config.norm_type, config.lmax, config.sphere_channels)
        self.ga = SO2EquivariantGraphAttention(config, edge_grid, config.sphere_channels, config.alpha_drop)
        self.drop_path = GraphDropPath(config.drop_path_rate)
        self.proj_drop = EquivariantDropout(config.proj_drop)
        self.norm_2 = make_norm(config.norm_type, config.lmax, config.sphere_channels)
        self.ffn = FeedForwardNetwork(config, node_grid, config.sphere_channels)

    def forward(self, x: Tensor, edges: EdgeContext, structure: Tensor, num_structures: int) -> Tensor:
        """`x [N, K, C]`; `structure [N]` index of each atom's structure."""
        x = x + self._drop(self.ga(self.norm_1(x), edges), structure, num_structures)
        return x + self._drop(self.ffn(self.norm_2(x)), structure, num_structures)

    def _drop(self, branch: Tensor, structure: Tensor, num_structures: int) -> Tensor:
        return self.proj_drop(self.drop_path(branch, structure, num_structures))
