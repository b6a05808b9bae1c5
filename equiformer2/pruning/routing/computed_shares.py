"""Shares of atoms, edges and MACs that a routed network computes, counted from the router's decisions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.model.output_request import OutputRequest
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.cost.operations import MacRates
from equiformer2.pruning.routing.active_region import ActiveRegion
from equiformer2.pruning.routing.router import BaseRouter, BaseRouting


@dataclasses.dataclass(frozen=True)
class ComputedShares:
    """Shares of the dense network's work that a routed one does; as text, a table by block.

    Attributes:
        atoms: `L` shares of the atoms that each block updates.
        edges: `L` shares of the edges that each block computes.
        macs: share of the multiply-accumulate operations of the whole network, heads included.
    """

    atoms: tuple[float, ...]
    edges: tuple[float, ...]
    macs: float

    @property
    def token_sparsity(self) -> float:
        """Share of the updates of atoms that are skipped, over all blocks."""
        return 1 - sum(self.atoms) / len(self.atoms)

    @property
    def edge_sparsity(self) -> float:
        """Share of the edges that are skipped, over all blocks."""
        return 1 - sum(self.edges) / len(self.edges)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        rest = {"token_sparsity": self.token_sparsity, "edge_sparsity": self.edge_sparsity}
        return dataclasses.asdict(self) | rest

    def __str__(self) -> str:
        lines = ["block   atoms   edges"]
        for block, (atoms, edges) in enumerate(zip(self.atoms, self.edges, strict=True)):
            lines.append(f"{block:5}  {100 * atoms:5.1f}%  {100 * edges:5.1f}%")
        lines.append(
            f"{100 * self.token_sparsity:.1f} % of the updates and {100 * self.edge_sparsity:.1f} % of the "
            f"edges skipped; {100 * self.macs:.1f} % of the MACs left"
        )
        return "\n".join(lines)


class CountingRouter(BaseRouter):
    """Router that counts the decisions of another one, over all calls.

    Args:
        router: router that decides.
    """

    def __init__(self, router: BaseRouter) -> None:
        self.router = router
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self._dense = torch.zeros(2, dtype=torch.float64)
        self._heads = torch.zeros(2, dtype=torch.float64)
        self._blocks: list[Tensor] = []

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> BaseRouting:
        """Begin the decisions of the inner router, which are counted."""
        size = torch.tensor([len(batch.pos), len(graph.distances)], dtype=torch.float64)
        self._dense += size
        self._heads += size
        return _CountedRouting(self.router.start(batch, graph, num_blocks), graph, self._count)

    def __call__(
        self,
        model: EquiformerV2,
        batch: Batch | Data,
        graph: RadiusGraph | None = None,
        request: OutputRequest | None = None,
    ) -> dict[str, Tensor]:
        """Run `model` with the inner router; an `ActiveRegion` counts the smaller structures."""
        if isinstance(self.router, ActiveRegion) and self.router.mode != "context_only":
            graph = model.build_graph(batch) if graph is None else graph
            smaller, _ = self.router.reduce(batch)
            edges = len(model.build_graph(smaller).distances)
            self._dense += torch.tensor([len(batch.pos), len(graph.distances)])
            left = torch.tensor([len(smaller.pos), edges], dtype=torch.float64)
            self._heads += left
            for block in range(len(model.blocks)):
                self._add(block, left)
            return self.router(model, batch, request=request)
        return super().__call__(model, batch, graph, request)

    def computed_shares(self, config: ModelConfig) -> ComputedShares:
        """Return the shares over all calls since `reset`.

        Args:
            config: configuration of the network that was called, at least once.

        Returns:
            Shares of atoms, edges and operations.
        """
        atoms, edges = self._dense.tolist()
        rates = MacRates.of(config)
        left = sum(float(rate @ count) for rate, count in zip(rates.blocks, self._blocks, strict=True))
        left += float((rates.embedding + rates.heads) @ self._heads)
        return ComputedShares(
            tuple(float(count[0]) / atoms for count in self._blocks),
            tuple(float(count[1]) / max(edges, 1.0) for count in self._blocks),
            left / float(rates.total @ self._dense),
        )

    def settings(self) -> dict[str, Any]:
        """Return the inner router."""
        return {"router": self.router}

    def _count(self, block: int, decision: Decision, graph: RadiusGraph, num_atoms: int) -> None:
        self._add(block, count_decision(decision, graph, num_atoms))

    def _add(self, block: int, count: Tensor) -> None:
        while len(self._blocks) <= block:
            self._blocks.append(torch.zeros(2, dtype=torch.float64))
        self._blocks[block] += count


class _CountedRouting(BaseRouting):
    def __init__(
        self,
        routing: BaseRouting,
        graph: RadiusGraph,
        count: Callable[[int, Decision, RadiusGraph, int], None],
    ) -> None:
        self.routing, self.graph, self.count = routing, graph, count
        self.observes_attention = routing.observes_attention

    def decide(self, state: BlockState) -> Decision:
        decision = self.routing.decide(state)
        self.count(state.block, decision, self.graph, len(state.x))
        return decision


def count_decision(decision: Decision, graph: RadiusGraph, num_atoms: int) -> Tensor:
    """Count the atoms and edges that a block computes.

    Args:
        decision: decision for the block.
        graph: all edges of the batch.
        num_atoms: N, atoms of the batch.

    Returns:
        `[2]` float64: numbers of computed atoms and of computed edges.
    """
    target = graph.edge_index[1]
    atoms, computed = num_atoms, torch.ones_like(target, dtype=torch.bool)
    if decision.atoms is not None:
        mask = decision.atoms > 0
        atoms, computed = int(mask.sum()), mask[target]
    if decision.edges is not None:
        computed = computed & (decision.edges > 0)
    return torch.tensor([atoms, int(computed.sum())], dtype=torch.float64)
