"""What every block needs to know of the graph."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from equiformer2.kernels.backend import triton_neighbors
from equiformer2.kernels.chunks import chunks
from equiformer2.kernels.rotation import narrow_packed
from equiformer2.model.folding import read
from equiformer2.model.radial import ElementPairs, smooth_envelope


@dataclasses.dataclass(frozen=True)
class EdgeContext:
    """Edges of a batch, sorted by target.

    Attributes:
        edge_index: `[2, E]`, source j and target i.
        rotations: Wigner-D entries of the edges, `[E, P + 1]` (see `kernels.rotation`).
        distances: `[E]` Å.
        distance_basis: `[E]` to `[E, B]`.
        elements: `[2, E]` atomic numbers of source and target.
        shared_embedding: element embeddings (source, target) common to all blocks, or None.
        num_atoms: N, the number of target atoms.
        bytes_per_edge: what an attention layer holds per edge, at most.
        fades_at: Å, where messages fade to zero (`radial.smooth_envelope`), None where they do not.
        targets: `[N]` which atoms are the targets, None for all atoms. `edge_index[1]` counts targets.
        kept: `[E]` which edges of the whole batch these are, None for all edges.
        gates: `[E]` positive factors of exp(logit) in the attention softmax, None for 1.
        observed: where attention layers leave their weights (`[E, H]` in pieces), None for nowhere.
    """

    edge_index: Tensor
    rotations: Tensor
    distances: Tensor
    distance_basis: Callable[[Tensor], Tensor]
    elements: Tensor
    shared_embedding: tuple[nn.Embedding, nn.Embedding] | None
    num_atoms: int
    bytes_per_edge: int
    fades_at: float | None = None
    targets: Tensor | None = None
    kept: Tensor | None = None
    gates: Tensor | None = None
    observed: list[Tensor] | None = None
    _memory: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def basis(self) -> Tensor:
        """`[E, B]` distance basis, common to all layers."""
        if "basis" not in self._memory:
            self._memory["basis"] = self.distance_basis(self.distances)
        return self._memory["basis"]

    def envelope(self) -> Tensor | None:
        """`[E]` factors of the messages, None for 1."""
        if "envelope" not in self._memory:
            if self.fades_at is None:
                return None
            self._memory["envelope"] = smooth_envelope(self.distances, self.fades_at)
        return self._memory["envelope"]

    def rotations_up_to(self, kept: tuple[int, int], degrees: tuple[int, int]) -> Tensor:
        """`rotations`, which are of `degrees` (highest degree and order), cut to those of `kept`."""
        if kept == degrees:
            return self.rotations
        name = f"rotations {kept}"
        if name not in self._memory:
            self._memory[name] = narrow_packed(self.rotations, degrees, kept)
        return self._memory[name]

    def element_tables(
        self, own_embedding: tuple[nn.Embedding, nn.Embedding] | None
    ) -> tuple[Tensor, Tensor] | None:
        """Read the element embeddings for a radial function: its own, or the shared ones, or none."""
        embedding = own_embedding or self.shared_embedding
        return None if embedding is None else (read(embedding[0]), read(embedding[1]))

    def element_pairs(self, tables: tuple[Tensor, Tensor] | None) -> ElementPairs | None:
        """Tables of both ends of the edges, with the elements that are there."""
        return None if tables is None else ElementPairs(*tables, self.elements[0], self.elements[1])

    def parts(self) -> "Iterator[tuple[slice, EdgeContext]]":
        """Consecutive target atoms with all their incoming edges, few enough for the memory of a chunk.

        With gradients there is one part: what the backward pass needs has to be kept anyway. An atom with
        more edges than a chunk takes is a part of its own.
        """
        if torch.compiler.is_compiling():
            yield slice(0, self.num_atoms), self
            return
        slices = list(chunks(len(self.distances), self.bytes_per_edge, self.distances.device))
        if torch.is_grad_enabled() or len(slices) <= 1 or triton_neighbors() is not None:
            yield slice(0, self.num_atoms), self
            return
        target = self.edge_index[1].contiguous()
        bounds = torch.tensor([part.stop - 1 for part in slices], device=target.device)
        last_atoms = (target[bounds] + 1).unique().tolist()
        last_atoms[-1] = self.num_atoms
        first = 0
        edges = torch.searchsorted(target, torch.tensor([0, *last_atoms], device=target.device)).tolist()
        for number, stop in enumerate(last_atoms):
            yield slice(first, stop), self._narrowed(slice(edges[number], edges[number + 1]), first, stop)
            first = stop

    def _narrowed(self, edges: slice, first: int, stop: int) -> "EdgeContext":
        source, target = self.edge_index[:, edges]
        return dataclasses.replace(
            self,
            edge_index=torch.stack((source, target - first)),
            rotations=self.rotations[edges],
            distances=self.distances[edges],
            elements=self.elements[:, edges],
            num_atoms=stop - first,
            gates=None if self.gates is None else self.gates[edges],
            _memory={},
        )

    def restricted(self, atoms: Tensor | None, edges: Tensor | None = None) -> "EdgeContext":
        """Only some target atoms, and only some of their incoming edges.

        Args:
            atoms: bool `[N]`, None for all.
            edges: bool `[E]`, None for all.
        """
        source, target = self.edge_index
        targets = None
        keep = torch.ones_like(target, dtype=torch.bool) if edges is None else edges
        if atoms is not None:
            targets = atoms.nonzero().squeeze(1)
            keep = keep & atoms[target]
            target = (torch.cumsum(atoms, 0) - 1)[target]
        kept = keep.nonzero().squeeze(1)
        return dataclasses.replace(
            self,
            edge_index=torch.stack((source[kept], target[kept])),
            rotations=self.rotations[kept],
            distances=self.distances[kept],
            elements=self.elements[:, kept],
            num_atoms=self.num_atoms if targets is None else len(targets),
            targets=targets,
            kept=kept,
            _memory={},
        )

    def at_targets(self, values: Tensor) -> Tensor:
        """Rows of the target atoms of `values`, which has one per atom."""
        return values if self.targets is None else values[self.targets]

    def at_edges(self, values: Tensor) -> Tensor:
        """Rows of these edges of `values`, which has one per edge of the whole batch."""
        return values if self.kept is None else values[self.kept]

    def put_targets(self, values: Tensor, rows: Tensor) -> Tensor:
        """`values`, one per atom, with those of the target atoms replaced."""
        return rows if self.targets is None else values.index_copy(0, self.targets, rows)


def by_parts(layer: Callable[[EdgeContext, slice], Tensor], edges: EdgeContext) -> Tensor:
    """`layer(edges of a part, its atoms)` of every part, `[N, …]`."""
    outputs = [layer(part, atoms) for atoms, part in edges.parts()]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
