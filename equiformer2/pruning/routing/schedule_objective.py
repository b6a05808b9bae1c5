"""Loss and operations of the schedules of a router, batch by batch; what two have in common is run once."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.batch_threads import side_by_side
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.model.routing import BlockState, Decision, Prefix
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.cost.operations import MacRates
from equiformer2.pruning.cost.work import Work
from equiformer2.pruning.routing.batch_geometry import BatchGeometry
from equiformer2.pruning.routing.computed_shares import ComputedShares, CountingRouter, count_decision
from equiformer2.pruning.routing.router import BaseRouter, ScoreRouter

PREFIX_BYTES = 2**30
"""Memory that the features of earlier passes may take, by default."""


class RoutedModel:
    """Network under a router, called like a network; counts the computed atoms, edges and MACs.

    Args:
        model: the network.
        router: router that decides.

    Attributes:
        model: the network.
        router: the router.
    """

    def __init__(self, model: EquiformerV2, router: BaseRouter) -> None:
        self.model, self.router, self._counter = model, router, CountingRouter(router)

    def __call__(self, batch: Batch, graph: RadiusGraph | None = None) -> Mapping[str, Tensor]:
        """Return `energy [B]` and `forces [N, 3]`, in normalised units."""
        return self._counter(self.model, batch, graph)

    def computed_shares(self) -> ComputedShares:
        """Return the shares of the dense network's work over all calls so far."""
        return self._counter.computed_shares(self.model.config)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Result of a schedule on one part of the structures; those of all parts add up.

    Attributes:
        loss: contribution to the loss L, eV; infinite where the network broke down.
        macs: contribution to the share of the dense network's MACs over all structures.
        dense: the same of the dense network: the part's own share.
        passes: work that was done for it, in passes of the dense network over one structure (`cost.work`).
            Blocks that an earlier schedule had run alike are not counted.
    """

    loss: float
    macs: float
    dense: float
    passes: float


class ScheduleObjective:
    """Objective of `search_schedule`: discrepancy to the dense network and MACs, without labels.

    A part of the structures is one batch of the calibration. Features that enter a block are kept for other
    schedules with the same decisions in all blocks before, which go on from there; losses are the same to the
    last bit. Of routers that decide by the structure alone the MACs follow without running the network.

    Args:
        model: the network.
        calibration: structures with the dense network's answers.
        make_router: from levels to a router, for instance `StaticRouter` or `router.with_levels`; the routers
            differ in their levels alone.
        prefix_bytes: most memory for these features, bytes; those used last stay. The embedding of all
            structures and the geometry of their edges, which all passes share, come on top.

    Attributes:
        model: the network.
        calibration: the structures.
        make_router: from levels to a router.
        parts: number of parts.
        threads: number of batches that are measured at a time.
    """

    def __init__(
        self,
        model: EquiformerV2,
        calibration: Calibration,
        make_router: Callable[[Sequence[float]], BaseRouter],
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        self.model, self.calibration, self.make_router = model, calibration, make_router
        self.parts = len(calibration.batches)
        self.threads = side_by_side(None, model.sphere_embedding.weight.device)
        self._rates, self._work = MacRates.of(model.config), Work(model.config, calibration.sizes)
        self._sizes = torch.tensor(calibration.sizes, dtype=torch.float64)[:, 1:]
        self._dense = float(self._rates.total @ self._sizes.sum(0))
        self._prefixes = _PrefixStore(prefix_bytes)
        self._geometric = _GeometricDecisions(model, calibration)

    def __call__(self, levels: Sequence[float]) -> tuple[float, float]:
        """Return the loss (eV) and the share of the dense MACs of a schedule on all structures.

        Args:
            levels: fraction of the atoms to skip in every block.
        """
        parts = [self.measure(levels, part) for part in range(self.parts)]
        return sum(part.loss for part in parts), sum(part.macs for part in parts)

    def macs(self, levels: Sequence[float]) -> float | None:
        """Return the share of the dense MACs, or None where only the network can tell.

        Args:
            levels: fraction of the atoms to skip in every block.
        """
        decided = self._geometric.decide(self.make_router(levels))
        if decided is None:
            return None
        return self._macs([each.counts.sum(0) for each in decided], self._sizes.sum(0)) / self._dense

    def measure(self, levels: Sequence[float], part: int) -> Measurement:
        """Run the network under a schedule on one part of the structures.

        Args:
            levels: fraction of the atoms to skip in every block.
            part: number of the part.

        Returns:
            Contributions of the part.
        """
        graph, num_atoms = self.calibration.graphs[part], int(self._sizes[part, 0])
        router, keys = self.make_router(levels), list[Hashable](levels)
        active: BaseRouter | list[Tensor | None] = router
        decided = self._geometric.decide(router)
        if decided is not None:
            active, keys = [d.masks[part] for d in decided], [d.names[part] for d in decided]
        start, decisions = self._prefixes.longest(part, keys), list[Decision]()

        def keep(prefix: Prefix) -> None:
            if prefix.block == len(keys):
                decisions.extend(prefix.decisions)
            elif start is None or prefix.block > start.block:
                self._prefixes.put(part, keys[: prefix.block], prefix)

        errors = self.calibration.errors(part, self.model, active=active, start=start, keep=keep)
        counts = [count_decision(decision, graph, num_atoms) for decision in decisions]
        return Measurement(
            self.calibration.loss_on(range(self.parts), {part: errors}),
            self._macs(counts, self._sizes[part]) / self._dense,
            float(self._rates.total @ self._sizes[part]) / self._dense,
            self._work.of_routed_pass(part, counts, None if start is None else start.block),
        )

    def _macs(self, counts: Sequence[Tensor], size: Tensor) -> float:
        """Operations of the whole network where the blocks compute `counts` atoms and edges."""
        rates = self._rates
        blocks = sum(float(rate @ count) for rate, count in zip(rates.blocks, counts, strict=True))
        return blocks + float((rates.heads + rates.embedding) @ size)


class _PrefixStore:
    """Features that enter blocks, by part and by the decisions for all blocks before.

    Those that enter the first block are always kept, all others within `limit` bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self._lock = limit, 0, Lock()
        self._first: dict[int, Prefix] = {}
        self._later: OrderedDict[Hashable, Prefix] = OrderedDict()

    def longest(self, part: int, keys: Sequence[Hashable]) -> Prefix | None:
        """The pass that has gone furthest with these decisions; None where none has begun."""
        with self._lock:
            for block in range(len(keys) - 1, 0, -1):
                key = part, tuple(keys[:block])
                if key in self._later:
                    self._later.move_to_end(key)
                    return self._later[key]
            return self._first.get(part)

    def put(self, part: int, keys: Sequence[Hashable], prefix: Prefix) -> None:
        """Keep a pass; those used least lately make room."""
        with self._lock:
            if not keys:
                self._first[part] = prefix
                return
            key = part, tuple(keys)
            if key in self._later:
                return
            self._later[key] = prefix
            self.used += prefix.num_bytes
            while self.used > self.limit:
                self.used -= self._later.popitem(last=False)[1].num_bytes


@dataclasses.dataclass(frozen=True)
class _Decided:
    """Decision of a geometric router for one block at one level.

    Attributes:
        masks: atoms of each part that are computed, or gates; None for all.
        names: a name per part, equal for equal masks.
        counts: `[parts, 2]` numbers of computed atoms and edges.
    """

    masks: tuple[Tensor | None, ...]
    names: tuple[Hashable, ...]
    counts: Tensor


class _GeometricDecisions:
    """Decisions of routers that read no features, each made once for all structures."""

    def __init__(self, model: EquiformerV2, calibration: Calibration) -> None:
        self.num_blocks, self.dtype = len(model.blocks), model.sphere_embedding.weight.dtype
        self.calibration = calibration
        self._geometry: BatchGeometry | None = None
        self._known: dict[tuple[int, float | None], _Decided] = {}

    def decide(self, router: BaseRouter) -> list[_Decided] | None:
        """The decisions for all blocks; None for a router that reads features."""
        if not isinstance(router, ScoreRouter):
            return None
        out = []
        for block, level in enumerate(router.block_levels(self.num_blocks)):
            scores = router.scores_of(block)
            if scores is None:
                return None
            if (scores, level) not in self._known:
                self._known[scores, level] = self._decided(router, block, level)
            out.append(self._known[scores, level])
        return out

    def _decided(self, router: ScoreRouter, block: int, level: float | None) -> _Decided:
        if self._geometry is None:
            self._geometry = self._all_structures()
        geometry, batches = self._geometry, self.calibration.batches
        sizes = [len(batch.pos) for batch in batches]
        if level is None:
            whole = [
                count_decision(Decision(), *pair) for pair in zip(self.calibration.graphs, sizes, strict=True)
            ]
            return _Decided((None,) * len(sizes), (None,) * len(sizes), torch.stack(whole))
        nothing = geometry.pos.new_empty(len(geometry.pos), 0)
        decision = router.decide(geometry, BlockState(block, nothing, None), level, None)
        assert decision.atoms is not None
        masks = decision.atoms.split(sizes)
        names = [None if bool((mask == 1).all()) else mask.cpu().numpy().tobytes() for mask in masks]
        counts = [
            count_decision(Decision(mask), graph, len(mask))
            for mask, graph in zip(masks, self.calibration.graphs, strict=True)
        ]
        return _Decided(masks, tuple(names), torch.stack(counts))

    def _all_structures(self) -> BatchGeometry:
        """The geometry of all structures as one batch, with the edges of the parts."""
        batches, graphs = (
            self.calibration.batches,
            [g.in_precision(self.dtype) for g in self.calibration.graphs],
        )
        first = np.cumsum([0, *(len(batch.pos) for batch in batches)])
        graph = RadiusGraph(
            torch.cat(
                [graph.edge_index + int(atom) for graph, atom in zip(graphs, first, strict=False)], dim=1
            ),
            *(
                torch.cat([getattr(graph, name) for graph in graphs])
                for name in ("cell_offsets", "vectors", "distances")
            ),
        )
        structures = [data for batch in batches for data in batch.to_data_list()]
        return BatchGeometry.from_batch(Batch.from_data_list(structures), graph)
