"""One plan for a stretch of a relaxation, so that the choice of atoms does not jump from step to step."""

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph, structure_index
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.routing.router import BaseRouter, BaseRouting
from equiformer2.values import Number, Whole, shown

_STEP = 2**11
"""Periodic images of an atom are told apart up to ±1024 cells."""


class FrozenPlan(BaseRouter):
    """Keep a router's decisions for `replan_every` evaluations.

    When it plans again for the same structures, atoms that were computed get the router's hysteresis as a
    bonus, so that an atom at the edge of the selection does not go in and out. It plans anew, without
    hysteresis, for other structures (other elements, tags, cells or numbers of atoms) and when an atom has
    moved farther than `max_move` since the plan. Edges that are new since the plan are computed.

    The plan is the state of one trajectory: use one object per calculator.

    Args:
        router: router that decides.
        replan_every: evaluations per plan, at least 1.
        max_move: displacement of an atom that makes a new plan, Å.

    Attributes:
        plans: number of plans made so far.

    Raises:
        InputError: `router` is none or keeps a plan itself, or a number is out of its range.
    """

    def __init__(self, router: BaseRouter, replan_every: int = 10, max_move: float = 0.5) -> None:
        if not isinstance(router, BaseRouter) or isinstance(router, FrozenPlan):
            raise InputError(f"router is {shown(router)}: give the router that decides, which keeps no plan")
        self.router = router
        self.replan_every = Whole(1, 2**31).read(replan_every, "replan_every")
        self.max_move = Number(0.0, above=True).read(max_move, "max_move (Å)")
        self.plans = 0
        self._plan: _StoredPlan | None = None

    def reset(self) -> None:
        """Discard the plan."""
        self._plan = None

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> BaseRouting:
        """Replay the plan if it holds for `batch`, else plan again."""
        plan = self._plan
        if plan is not None and not plan.fits(batch, num_blocks, self.max_move):
            plan = None
        if plan is not None and plan.uses < self.replan_every and plan.complete:
            plan.uses += 1
            return _Replay(plan, graph)
        routing = self.router.start(batch, graph, num_blocks)
        if plan is not None and plan.complete:
            routing.previous = plan.decisions
        self._plan = _StoredPlan(batch, graph, num_blocks)
        self.plans += 1
        return _Planning(routing, self._plan)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this router again, the inner router among them."""
        return {"replan_every": self.replan_every, "max_move": self.max_move, "router": self.router}


class _StoredPlan:
    """Decisions, and the structures that they were made for."""

    def __init__(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> None:
        self.same = {name: batch[name].clone() for name in ("atomic_numbers", "tags", "fixed", "cell", "pbc")
                     if name in batch and batch[name] is not None}  # fmt: skip
        self.natoms = torch.as_tensor(batch.natoms).reshape(-1).clone()
        self.pos = batch.pos.detach().clone()
        self.keys = self.edge_keys(graph)
        self.num_blocks, self.uses = num_blocks, 1
        self.decisions: list[Decision] = []

    @property
    def complete(self) -> bool:
        """True if the forward pass that made the plan came to its end."""
        return len(self.decisions) == self.num_blocks

    def fits(self, batch: Batch | Data, num_blocks: int, max_move: float) -> bool:
        """Return True if `batch` holds the same structures, moved by at most `max_move` Å."""
        natoms = torch.as_tensor(batch.natoms).reshape(-1)
        if num_blocks != self.num_blocks or not torch.equal(natoms, self.natoms):
            return False
        for name, value in self.same.items():
            if name not in batch or batch[name].shape != value.shape or not torch.equal(batch[name], value):
                return False
        return float(self._moved(batch)) <= max_move

    def _moved(self, batch: Batch | Data) -> Tensor:
        """Largest displacement, Å; whole lattice vectors along periodic axes do not count."""
        cell, pbc = batch.cell.view(-1, 3, 3).double(), batch.pbc.view(-1, 3)
        lattice = torch.where(pbc[:, :, None], cell, torch.eye(3, dtype=cell.dtype, device=cell.device) * 1e4)
        structure = structure_index(self.natoms.to(cell.device), len(self.pos))
        moved = (batch.pos.detach() - self.pos).double().unsqueeze(1)
        images = torch.round(moved @ torch.linalg.inv(lattice)[structure])
        return (moved - images @ lattice[structure]).norm(dim=2).max()

    def edge_keys(self, graph: RadiusGraph) -> Tensor:
        """`[E]` one integer for (j, i, offset)."""
        source, target = graph.edge_index
        key = source * len(self.pos) + target
        for axis in range(3):
            key = key * _STEP + graph.cell_offsets[:, axis] + _STEP // 2
        return key


class _Planning(BaseRouting):
    """Decisions of a router, which are passed on and kept."""

    def __init__(self, routing: BaseRouting, plan: _StoredPlan) -> None:
        self.routing, self.plan = routing, plan
        self.observes_attention = routing.observes_attention

    def decide(self, state: BlockState) -> Decision:
        decision = self.routing.decide(state)
        atoms, edges = (None if part is None else part.detach() for part in decision[:2])
        self.plan.decisions.append(Decision(atoms, edges))
        return decision


class _Replay(BaseRouting):
    """Decisions of a plan on the present edges; edges that are new since the plan are computed."""

    def __init__(self, plan: _StoredPlan, graph: RadiusGraph) -> None:
        self.plan = plan
        self._place: Tensor | None = None  # of each edge in the plan, -1 for a new one
        if len(plan.keys) and any(decision.edges is not None for decision in plan.decisions):
            keys = plan.edge_keys(graph)
            order = torch.argsort(plan.keys)
            at = torch.searchsorted(plan.keys[order], keys).clamp(max=len(order) - 1)
            self._place = torch.where(plan.keys[order][at] == keys, order[at], -1)

    def decide(self, state: BlockState) -> Decision:
        atoms, edges, _ = self.plan.decisions[state.block]
        if edges is not None and not len(edges):
            edges = None  # all are new
        elif edges is not None and self._place is not None:
            new = torch.ones((), dtype=edges.dtype, device=edges.device)
            edges = torch.where(self._place >= 0, edges[self._place.clamp(min=0)], new)
        return Decision(atoms, edges)
