"""Graph of a batch as the network reads it: inputs, edges with their geometry, the part of a block."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from equiformer2.kernels.backend import TRITON, Backend, Neighbors
from equiformer2.kernels.chunks import chunks
from equiformer2.kernels.rotation import narrow_packed
from equiformer2.model.folding import read
from equiformer2.model.radial import ElementPairs, smooth_envelope

Embeddings = tuple[nn.Embedding, nn.Embedding]
"""Element embeddings of source and target."""


@dataclasses.dataclass(frozen=True)
class GraphInputs:
    """Everything that the network computes from, on its device and in its precision.

    Attributes:
        numbers: `[N]` atomic numbers.
        structure: `[N]` index of the structure of each atom.
        natoms: `[B]`; only its size is read.
        edge_index: `[2, E]`, source j and target i, sorted by target.
        rotations: `[E, P + 1]` Wigner-D entries of the edges (see `kernels.rotation`).
        distances: `[E]` Å.
    """

    numbers: Tensor
    structure: Tensor
    natoms: Tensor
    edge_index: Tensor
    rotations: Tensor
    distances: Tensor


@dataclasses.dataclass(frozen=True)
class EdgeEncoding:
    """Parts of the network by which all of its layers read the edges.

    Attributes:
        distance_basis: `[E]` Å to `[E, B]`.
        shared_embedding: element embeddings common to all blocks, or None.
        bytes_per_edge: the most that an attention layer holds per edge.
        fades_at: Å, where messages fade to zero (`radial.smooth_envelope`), None where they do not.
    """

    distance_basis: Callable[[Tensor], Tensor]
    shared_embedding: Embeddings | None
    bytes_per_edge: int
    fades_at: float | None


class Part(NamedTuple):
    """Some target atoms with all their incoming edges.

    Attributes:
        graph: these edges; targets are counted from the first atom of the part.
        atoms, edges: their places among all targets and edges.
    """

    graph: "EdgeGraph"
    atoms: slice
    edges: slice


@dataclasses.dataclass(frozen=True)
class EdgeGraph:
    """Edges of a batch, sorted by target, and their geometry.

    Attributes:
        edge_index: `[2, E]`, source j and target i.
        rotations: `[E, P + 1]` Wigner-D entries (see `kernels.rotation`).
        distances: `[E]` Å.
        elements: `[2, E]` atomic numbers of source and target.
        num_atoms: N, the number of target atoms.
        encoding: the parts of the network that read distances and elements.
    """

    edge_index: Tensor
    rotations: Tensor
    distances: Tensor
    elements: Tensor
    num_atoms: int
    encoding: EdgeEncoding
    _memory: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    _neighbors: list[Neighbors] = dataclasses.field(default_factory=list)

    def basis(self) -> Tensor:
        """`[E, B]` distance basis, common to all layers."""
        if "basis" not in self._memory:
            self._memory["basis"] = self.encoding.distance_basis(self.distances)
        return self._memory["basis"]

    def envelope(self) -> Tensor | None:
        """`[E]` factors of the messages, None for 1."""
        if "envelope" not in self._memory:
            if self.encoding.fades_at is None:
                return None
            self._memory["envelope"] = smooth_envelope(self.distances, self.encoding.fades_at)
        return self._memory["envelope"]

    def neighbors(self, backend: Backend) -> Neighbors | None:
        """Both directions of the edges, which the backend `triton` sums by; None for the others."""
        if backend is not TRITON:
            return None
        if not self._neighbors:
            self._neighbors.append(Neighbors.from_edges(self.edge_index, self.num_atoms))
        return self._neighbors[0]

    def rotations_up_to(self, kept: tuple[int, int], degrees: tuple[int, int]) -> Tensor:
        """`rotations`, which are of `degrees` (highest degree and order), cut to those of `kept`."""
        if kept == degrees:
            return self.rotations
        name = f"rotations {kept}"
        if name not in self._memory:
            self._memory[name] = narrow_packed(self.rotations, degrees, kept)
        return self._memory[name]

    def element_tables(self, own_embedding: Embeddings | None) -> tuple[Tensor, Tensor] | None:
        """Read the element embeddings for a radial function: its own, or the shared ones, or none."""
        embedding = own_embedding or self.encoding.shared_embedding
        return None if embedding is None else (read(embedding[0]), read(embedding[1]))

    def element_pairs(self, tables: tuple[Tensor, Tensor] | None) -> ElementPairs | None:
        """Tables of both ends of the edges, with the elements that are there."""
        return None if tables is None else ElementPairs(*tables, self.elements[0], self.elements[1])

    def parts(self, backend: Backend) -> Iterator[Part]:
        """Consecutive target atoms with all their incoming edges, few enough for the memory of a chunk.

        With gradients there is one part: what the backward pass needs has to be kept anyway. An atom with
        more edges than a chunk takes is a part of its own.
        """
        everything = Part(self, slice(0, self.num_atoms), slice(None))
        # Backends that always compute all atoms take all of their edges at once, too.
        if torch.is_grad_enabled() or not backend.routing:
            yield everything
            return
        slices = list(chunks(len(self.distances), self.encoding.bytes_per_edge, self.distances.device))
        if len(slices) <= 1:
            yield everything
            return
        target = self.edge_index[1].contiguous()
        bounds = torch.tensor([part.stop - 1 for part in slices], device=target.device)
        last_atoms = (target[bounds] + 1).unique().tolist()
        last_atoms[-1] = self.num_atoms
        first = 0
        ends = torch.searchsorted(target, torch.tensor([0, *last_atoms], device=target.device)).tolist()
        for number, stop in enumerate(last_atoms):
            edges = slice(ends[number], ends[number + 1])
            yield Part(self._narrowed(edges, first, stop), slice(first, stop), edges)
            first = stop

    def _narrowed(self, edges: slice, first: int, stop: int) -> "EdgeGraph":
        source, target = self.edge_index[:, edges]
        return EdgeGraph(
            torch.stack((source, target - first)),
            self.rotations[edges],
            self.distances[edges],
            self.elements[:, edges],
            stop - first,
            self.encoding,
        )

    def restricted(
        self, atoms: Tensor | None, edges: Tensor | None = None
    ) -> "tuple[EdgeGraph, BlockRouting]":
        """Some target atoms alone, and some of their incoming edges alone.

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
        graph = EdgeGraph(
            torch.stack((source[kept], target[kept])),
            self.rotations[kept],
            self.distances[kept],
            self.elements[:, kept],
            self.num_atoms if targets is None else len(targets),
            self.encoding,
        )
        return graph, BlockRouting(targets, kept)


@dataclasses.dataclass(frozen=True)
class BlockRouting:
    """Part of the atoms and edges that a block computes, and their gates.

    Attributes:
        targets: `[n]` atoms that are updated, None for all. The edges of the block count these.
        edges: `[e]` which edges of the whole batch are read, None for all.
        atom_gates: `[n, 1, 1]` factors of both branches, None for 1.
        edge_gates: `[e]` positive factors of exp(logit) in the attention softmax, None for 1.
    """

    targets: Tensor | None = None
    edges: Tensor | None = None
    atom_gates: Tensor | None = None
    edge_gates: Tensor | None = None

    def at_targets(self, values: Tensor) -> Tensor:
        """Rows of the target atoms of `values`, which has one per atom."""
        return values if self.targets is None else values[self.targets]

    def at_edges(self, values: Tensor) -> Tensor:
        """Rows of the block's edges of `values`, which has one per edge of the whole batch."""
        return values if self.edges is None else values[self.edges]

    def put_targets(self, values: Tensor, rows: Tensor) -> Tensor:
        """`values`, one per atom, with those of the target atoms replaced by `rows`."""
        return rows if self.targets is None else values.index_copy(0, self.targets, rows)


EVERYTHING = BlockRouting()
"""All atoms and edges, without gates."""


def joined(parts: list[Tensor]) -> Tensor:
    """The rows of all parts, one after another."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
