"""One plan for a stretch of a relaxation: the choice of atoms does not jump from step to step."""

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
        router: what decides.
        replan_every: evaluations per plan; at least 1.
        max_move: Å.

    Attributes:
        plans: how often it has planned.
    """

    def __init__(self, router: BaseRouter, replan_every: int = 10, max_move: float = 0.5) -> None:
        if not isinstance(router, BaseRouter) or isinstance(router, FrozenPlan):
            raise InputError(f"router is {shown(router)}: give the router that decides, which keeps no plan")
        self.router = router
        self.replan_every = Whole(1, 2**31).read(replan_every, "replan_every")
        self.max_move = Number(0.0, above=True).read(max_move, "max_move (Å)")
        self.plans = 0
        self._plan: _Plan | None = None

    def reset(self) -> None:
        """Forget the plan."""
        self._plan = None

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> BaseRouting:
        """See `BaseRouter`."""
        plan = self._plan
        if plan is not None and not plan.fits(batch, num_blocks, self.max_move):
            plan = None
        if plan is not None and plan.uses < self.replan_every and plan.complete:
            plan.uses += 1
            return _Replay(plan, graph, len(batch.pos))
        routing = self.router.start(batch, graph, num_blocks)
        if plan is not None and plan.complete:
            routing.previous = plan.decisions
        self._plan = _Plan(batch, graph, num_blocks)
        self.plans += 1
        return _Planning(routing, self._plan)

    def settings(self) -> dict[str, Any]:
        """See `BaseRouter`; of the inner router too."""
        return {"replan_every": self.replan_every, "max_move": self.max_move, "router": self.router}


class _Plan:
    """Decisions, and the structures that they were made for."""

    def __init__(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> None:
        self.same = {name: batch[name].clone() for name in ("atomic_numbers", "tags", "fixed", "cell", "pbc")
                     if name in batch and batch[name] is not None}  # fmt: skip
        self.natoms = torch.as_tensor(batch.natoms).reshape(-1).clone()
        self.pos = batch.pos.detach().clone()
        self.keys = _edge_keys(graph, len(batch.pos))
        self.num_blocks, self.uses = num_blocks, 1
        self.decisions: list[Decision] = []

    @property
    def complete(self) -> bool:
        """Whether the forward pass that made it came to the end."""
        return len(self.decisions) == self.num_blocks

    def fits(self, batch: Batch | Data, num_blocks: int, max_move: float) -> bool:
        """Whether `batch` holds the same structures, little moved."""
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


class _Planning(BaseRouting):
    """Passes decisions on and keeps them."""

    def __init__(self, routing: BaseRouting, plan: _Plan) -> None:
        self.routing, self.plan = routing, plan
        self.observes_attention = routing.observes_attention

    def decide(self, state: BlockState) -> Decision:
        decision = self.routing.decide(state)
        atoms, edges = (None if part is None else part.detach() for part in decision[:2])
        self.plan.decisions.append(Decision(atoms, edges))
        return decision


class _Replay(BaseRouting):
    """The decisions of a plan on the present edges."""

    def __init__(self, plan: _Plan, graph: RadiusGraph, num_atoms: int) -> None:
        self.plan = plan
        self._found: Tensor | None = None
        if any(decision.edges is not None for decision in plan.decisions):
            keys = _edge_keys(graph, num_atoms)
            order = torch.argsort(plan.keys)
            at = torch.searchsorted(plan.keys[order], keys).clamp(max=len(order) - 1)
            self._found = torch.where(plan.keys[order][at] == keys, order[at], -1)

    def decide(self, state: BlockState) -> Decision:
        atoms, edges, _ = self.plan.decisions[state.block]
        if edges is not None and self._found is not None:
            known = self._found >= 0
            new = torch.ones((), dtype=edges.dtype, device=edges.device)
            edges = torch.where(known, edges[self._found.clamp(min=0)], new)
        return Decision(atoms, edges)


def _edge_keys(graph: RadiusGraph, num_atoms: int) -> Tensor:
    """`[E]` one integer for (j, i, offset)."""
    source, target = graph.edge_index
    key = source * num_atoms + target
    for axis in range(3):
        key = key * _STEP + graph.cell_offsets[:, axis] + _STEP // 2
    return key
