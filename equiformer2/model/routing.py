"""Which atoms a block updates, decided before the first block or between blocks.

An atom that a block skips keeps its features (x^{l+1} = x^l) and stays a source for the others: its incoming
edges and its feed-forward network are not computed.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.model.edge_context import EdgeContext


class Decision(NamedTuple):
    """What one block computes.

    Attributes:
        atoms: `[N]`, None for all atoms. Bool: the atoms to update. Floating point: gates g in [0, 1]; both
            residual branches become x + g * branch, computed where g > 0.
        edges: `[E]`, None for all edges. Bool: the edges to keep; the softmax runs over the kept ones.
            Floating point: gates that multiply exp(logit) before the softmax; computed where g > 0.
        everywhere: compute also atoms with the gate 0, because derivatives by the gates are wanted.
    """

    atoms: Tensor | None = None
    edges: Tensor | None = None
    everywhere: bool = False


@dataclasses.dataclass(frozen=True)
class BlockState:
    """What is known before a block.

    Attributes:
        block: its number, from 0.
        x: `[N, K, C]` features that enter it.
        attention: `[E, H]` attention weights of every edge in the last block that computed it (0 before),
            None unless the routing observes them. H heads of the last block; weights of an older block with
            another number of heads are given as their mean.
    """

    block: int
    x: Tensor
    attention: Tensor | None


class Routing(Protocol):
    """Decisions for one batch, block after block."""

    @property
    def observes_attention(self) -> bool:
        """Whether `BlockState.attention` is wanted."""

    def decide(self, state: BlockState) -> Decision:
        """The decision for block `state.block`."""


class Router(Protocol):
    """A rule that makes a `Routing` for every batch."""

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> Routing:
        """Called once per forward pass."""


class FixedRouting:
    """Given gates or masks, one per block (None for all atoms)."""

    observes_attention = False

    def __init__(self, active: Sequence[Tensor | None], num_atoms: int, num_blocks: int) -> None:
        if len(active) != num_blocks:
            raise InputError(f"active has {len(active)} entries but the network {num_blocks} blocks")
        for block, mask in enumerate(active):
            if mask is not None and mask.shape != (num_atoms,):
                raise InputError(
                    f"active[{block}] has the shape {tuple(mask.shape)} but there are {num_atoms} atoms"
                )
        self.active = active

    def decide(self, state: BlockState) -> Decision:
        """The given one."""
        return Decision(self.active[state.block])


class RoutedEdges:
    """Edges of every block under a routing; those of equal decisions are made once.

    Args:
        edges: all edges.
        routing: the decisions.
    """

    def __init__(self, edges: EdgeContext, routing: Routing) -> None:
        self.edges, self.routing = edges, routing
        self._restricted: list[tuple[Tensor | None, Tensor | None, EdgeContext]] = []
        self._attention: Tensor | None = None
        self._decision = Decision()

    def of_block(self, block: int, x: Tensor) -> tuple[EdgeContext, Tensor | None]:
        """The edges that a block computes and the gates `[n, 1, 1]` of its target atoms (None for 1)."""
        if self.routing.observes_attention and self._attention is None:
            self._attention = x.new_zeros(len(self.edges.distances), 1)
        decision = self.routing.decide(BlockState(block, x, self._attention))
        atoms, edges, everywhere = self._decision = decision
        updated = None if atoms is None or everywhere else atoms > 0
        kept = None if edges is None else edges > 0
        context = self._restrict(updated, kept)
        gates = None
        if atoms is not None and atoms.is_floating_point():
            gates = context.at_targets(atoms.to(x.dtype))[:, None, None]
        changes: dict[str, object] = {}
        if edges is not None and edges.is_floating_point():
            changes["gates"] = context.at_edges(edges)
        if self.routing.observes_attention:
            changes["observed"] = []
        return dataclasses.replace(context, **changes) if changes else context, gates  # type: ignore[arg-type]

    def record(self, edges: EdgeContext) -> None:
        """Keep the attention weights that a block computed with `edges`."""
        if self._attention is None or not edges.observed:
            return
        alpha = torch.cat(edges.observed).to(self._attention.dtype)
        older = self._attention
        if older.shape[1] != alpha.shape[1]:
            older = older.mean(dim=1, keepdim=True).repeat(1, alpha.shape[1])
        # In proportion to the gates: as a gate closes, the table goes over into the one without the edge.
        share = self._share(edges)
        if share is not None:
            alpha = torch.lerp(edges.at_edges(older), alpha, share.unsqueeze(1).to(alpha.dtype))
        self._attention = alpha if edges.kept is None else older.index_copy(0, edges.kept, alpha)

    def _share(self, edges: EdgeContext) -> Tensor | None:
        atoms, gates = self._decision.atoms, edges.gates
        if atoms is not None and atoms.is_floating_point():
            of_targets = edges.at_targets(atoms)[edges.edge_index[1]]
            return of_targets if gates is None else of_targets * gates
        return gates

    def _restrict(self, atoms: Tensor | None, edges: Tensor | None) -> EdgeContext:
        if (atoms is None or bool(atoms.all())) and (edges is None or bool(edges.all())):
            return self.edges
        for known_atoms, known_edges, context in self._restricted:
            if _equal(atoms, known_atoms) and _equal(edges, known_edges):
                return context
        context = self.edges.restricted(atoms, edges)
        self._restricted.append((atoms, edges, context))
        return context


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
