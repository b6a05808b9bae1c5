"""Embedding of the atoms' surroundings (paper Figure 1c)."""

from torch import Tensor

from equiformer2.kernels import sum_rotated
from equiformer2.kernels.backend import Backend
from equiformer2.model.attention import element_embedding, radial_input_size
from equiformer2.model.config import ModelConfig
from equiformer2.model.edge_context import EdgeGraph, joined
from equiformer2.model.radial import RadialFunction
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
        return joined([self._sum(part.graph, backend) for part in edges.parts(backend)])

    def _sum(self, edges: EdgeGraph, backend: Backend) -> Tensor:
        own = None
        if self.source_embedding is not None and self.target_embedding is not None:
            own = (self.source_embedding, self.target_embedding)
        radial = self.rad_func.output(self.rad_func.hidden(edges.basis(), edges.element_pairs(own)))
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
