"""What every block needs to know of the graph."""

import dataclasses

from torch import Tensor, nn

from equiformer2.model.radial import ElementPairs


@dataclasses.dataclass(frozen=True)
class EdgeContext:
    """Edges of a batch, sorted by target.

    Attributes:
        edge_index: `[2, E]`, source j and target i.
        rotations: Wigner-D entries of the edges, `[E, P + 1]` (see `kernels.rotation`).
        basis: `[E, B]` distance basis.
        elements: `[2, E]` atomic numbers of source and target.
        shared_embedding: element embeddings (source, target) common to all blocks, or None.
        num_atoms: N.
    """

    edge_index: Tensor
    rotations: Tensor
    basis: Tensor
    elements: Tensor
    shared_embedding: tuple[nn.Embedding, nn.Embedding] | None
    num_atoms: int

    def element_pairs(self, own_embedding: tuple[nn.Embedding, nn.Embedding] | None) -> ElementPairs | None:
        """Element embeddings for a radial function: the module's own, or the shared ones, or none."""
        embedding = own_embedding or self.shared_embedding
        if embedding is None:
            return None
        return ElementPairs(embedding[0].weight, embedding[1].weight, self.elements[0], self.elements[1])
