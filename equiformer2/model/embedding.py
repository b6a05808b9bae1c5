"""Embedding of the atoms' surroundings (paper Figure 1c)."""

from torch import Tensor, nn

from equiformer2.kernels import sum_rotated
from equiformer2.kernels.backend import Backend
from equiformer2.model.attention import element_embedding, radial_input_size
from equiformer2.model.config import ModelConfig
from equiformer2.model.edge_context import EdgeGraph, joined
from equiformer2.model.radial import RadialFunction, RadialWeights
from equiformer2.model.so3 import DerivedConstants
from equiformer2.model.so3.grid import truncation_scales


class EdgeDegreeEmbedding(DerivedConstants):
    """Radial functions times spherical harmonics, summed over edges, divided by the average degree."""

    scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.source_embedding, self.target_embedding = None, None
        if config.block_atom_edge_embedding:
            self.source_embedding = element_embedding(config)
            self.target_embedding = element_embedding(config)
        num_outputs = (config.lmax + 1) * config.sphere_channels
        self.rad_func = RadialFunction(radial_input_size(config), config.edge_channels, num_outputs)
        self.degrees = config.lmax, config.mmax
        scale = truncation_scales(config.lmax, config.mmax) / config.avg_degree
        self.add_constant("scale", scale)

    def forward(self, edges: EdgeGraph, backend: Backend) -> Tensor:
        """Sum over the edges into every atom: `[N, K, C]`."""
        own = None
        if self.source_embedding is not None and self.target_embedding is not None:
            own = (self.source_embedding, self.target_embedding)
        weights, tables = self.rad_func.plain_weights(), edges.element_tables(own)
        return joined([self._sum(part.graph, weights, tables, backend) for part in edges.parts(backend)])

    def _sum(
        self,
        edges: EdgeGraph,
        weights: RadialWeights,
        tables: tuple[Tensor, Tensor] | None,
        backend: Backend,
    ) -> Tensor:
        hidden = weights.hidden(edges.basis(), edges.element_pairs(tables))
        radial = nn.functional.linear(hidden, weights.output, weights.bias)
        envelope = edges.envelope()
        if envelope is not None:
            radial = radial * envelope.to(radial.dtype).unsqueeze(1)
        # Only m = 0 is non-zero in the edge frame.
        values = radial.unflatten(1, (self.degrees[0] + 1, -1))
        total = sum_rotated(
            values,
            edges.rotations,
            edges.edge_index[1],
            edges.num_atoms,
            self.degrees,
            backend,
            edges.neighbors(backend),
        )
        return total * self.scale
