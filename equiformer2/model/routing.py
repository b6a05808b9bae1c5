"""Choice of the atoms that a block updates, made before the first block or between blocks.

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
from equiformer2.model.edge_context import EVERYTHING, BlockRouting, EdgeGraph, GraphInputs


class Decision(NamedTuple):
    """The atoms and edges that one block computes.

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
    """Everything that is known before a block.

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


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Pass over a batch up to a block, from which other passes over the same structures can go on.

    They have the same bits as whole passes as long as nothing has changed before the block: the weights of
    the embedding and of the earlier blocks, and the decisions for these blocks.

    Attributes:
        block: number of the block that is next, from 0; the number of blocks where only the heads are left.
        x: `[N, K, C]` features that enter it.
        edges: edges of the batch with their geometry, which the passes share.
        attention: as in `BlockState`; None without a routing that observes it.
        decisions: decisions for the blocks before; empty without a routing.
    """

    block: int
    x: Tensor
    edges: EdgeGraph
    attention: Tensor | None = None
    decisions: tuple[Decision, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the features and of the attention; those of the shared edges are not counted."""
        tensors = [self.x] if self.attention is None else [self.x, self.attention]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def inputs(self, numbers: Tensor, structure: Tensor, natoms: Tensor) -> GraphInputs:
        """Complete the atoms (see `GraphInputs`) by the edges of this pass."""
        edges = self.edges
        return GraphInputs(numbers, structure, natoms, edges.edge_index, edges.rotations, edges.distances)

    def check(self, num_atoms: int, num_blocks: int) -> None:
        """Raise `InputError` where it does not fit a batch of `num_atoms` or a network of `num_blocks`."""
        if len(self.x) != num_atoms:
            raise InputError(f"the pass was begun on {len(self.x)} atoms and is continued on {num_atoms}")
        if not 0 <= self.block <= num_blocks:
            raise InputError(f"the pass goes on at block {self.block}, and the network has {num_blocks}")


class Routing(Protocol):
    """Decisions for one batch, block after block."""

    @property
    def observes_attention(self) -> bool:
        """`BlockState.attention` is read."""

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
        """Return the given one."""
        return Decision(self.active[state.block])


class RoutedEdges:
    """Edges of every block under a routing; those of equal decisions are made once.

    Args:
        edges: all edges.
        routing: the decisions.
        start: the pass so far; None at the beginning of a pass.

    Attributes:
        attention: `[E, H]` attention weights so far (see `BlockState`); None where the routing reads none.

    Raises:
        InputError: the routing reads attention weights of earlier blocks that `start` does not hold.
    """

    def __init__(self, edges: EdgeGraph, routing: Routing, start: Prefix | None = None) -> None:
        self.edges, self.routing = edges, routing
        self._restricted: list[tuple[Tensor | None, Tensor | None, EdgeGraph, BlockRouting]] = []
        self.attention: Tensor | None = None
        if routing.observes_attention and start is not None:
            self.attention = start.attention
            if start.block > 0 and start.attention is None:
                raise InputError(
                    "the router reads attention weights of blocks that are not run again: begin at block 0, "
                    "or with a pass under such a router"
                )

    def decide(self, block: int, x: Tensor) -> tuple[Decision, EdgeGraph, BlockRouting]:
        """Ask the routing for a block's decision.

        Args:
            block: number of the block, from 0.
            x: `[N, K, C]` features that enter it.

        Returns:
            The decision, the edges that the block computes, and their places and gates.
        """
        if self.routing.observes_attention and self.attention is None:
            self.attention = x.new_zeros(len(self.edges.distances), 1)
        decision = self.routing.decide(BlockState(block, x, self.attention))
        atoms, edges, everywhere = decision
        updated = None if atoms is None or everywhere else atoms > 0
        kept = None if edges is None else edges > 0
        graph, places = self._restrict(updated, kept)
        atom_gates = edge_gates = None
        if atoms is not None and atoms.is_floating_point():
            atom_gates = places.at_targets(atoms.to(x.dtype))[:, None, None]
        if edges is not None and edges.is_floating_point():
            edge_gates = places.at_edges(edges)
        if atom_gates is not None or edge_gates is not None:
            places = dataclasses.replace(places, atom_gates=atom_gates, edge_gates=edge_gates)
        return decision, graph, places

    def observe(
        self, decision: Decision, graph: EdgeGraph, places: BlockRouting, weights: Tensor | None
    ) -> None:
        """Keep the attention weights of a block for the decisions of the next ones.

        Args:
            decision, graph, places: as `decide` gave them.
            weights: `[e, H]` of the block's edges; None for a block without attention.
        """
        if self.attention is None or weights is None:
            return
        alpha, older = weights.to(self.attention.dtype), self.attention
        if older.shape[1] != alpha.shape[1]:
            older = older.mean(dim=1, keepdim=True).repeat(1, alpha.shape[1])
        # In proportion to the gates: as a gate closes, the table goes over into the one without the edge.
        share = places.edge_gates
        if decision.atoms is not None and decision.atoms.is_floating_point():
            of_targets = places.at_targets(decision.atoms)[graph.edge_index[1]]
            share = of_targets if share is None else of_targets * share
        if share is not None:
            alpha = torch.lerp(places.at_edges(older), alpha, share.unsqueeze(1).to(alpha.dtype))
        self.attention = alpha if places.edges is None else older.index_copy(0, places.edges, alpha)

    def _restrict(self, atoms: Tensor | None, edges: Tensor | None) -> tuple[EdgeGraph, BlockRouting]:
        if (atoms is None or bool(atoms.all())) and (edges is None or bool(edges.all())):
            return self.edges, EVERYTHING
        for known_atoms, known_edges, graph, places in self._restricted:
            if self._equal(atoms, known_atoms) and self._equal(edges, known_edges):
                return graph, places
        graph, places = self.edges.restricted(atoms, edges)
        self._restricted.append((atoms, edges, graph, places))
        return graph, places

    @staticmethod
    def _equal(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        return torch.equal(a, b)
