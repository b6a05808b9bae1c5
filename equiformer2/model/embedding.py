"""Embedding of the atoms' surroundings (paper Figure 1c)."""

from torch import Tensor, nn

from equiformer2.kernels import aggregate_messages
from equiformer2.model.attention import element_embedding, radial_input_size
from equiformer2.model.config import ModelConfig
from equiformer2.model.edges import EdgeContext
from equiformer2.model.radial import RadialFunction
from equiformer2.model.so3.grid import truncation_scale


class EdgeDegreeEmbedding(nn.Module):
    """Radial functions times spherical harmonics, summed over edges, divided by the average degree."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.source_embedding, self.target_embedding = None, None
        if config.block_atom_edge_embedding:
            self.source_embedding = element_embedding(config)
            self.target_embedding = element_embedding(config)
        num_outputs = (config.lmax + 1) * config.sphere_channels
        self.rad_func = RadialFunction(radial_input_size(config), config.edge_channels, num_outputs)
        self.num_degrees = config.lmax + 1
        # Only m = 0 is non-zero in the edge frame.
        self.scale = [truncation_scale(l, config.mmax) / config.avg_degree for l in range(config.lmax + 1)]

    def forward(self, edges: EdgeContext) -> Tensor:
        """`[N, K, C]`."""
        own = None
        if self.source_embedding is not None and self.target_embedding is not None:
            own = (self.source_embedding, self.target_embedding)
        radial = self.rad_func.output(self.rad_func.hidden(edges.basis, edges.element_pairs(own)))
        blocks = [block[:, :1] for block in edges.frames.blocks]
        values = radial.unflatten(1, (self.num_degrees, -1))
        return aggregate_messages(values, None, blocks, edges.edge_index[1], edges.num_atoms, self.scale)
