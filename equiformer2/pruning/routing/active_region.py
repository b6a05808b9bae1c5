"""Which part of a slab the network works on: held subsurface atoms as context only, removed, or lumped.

After PhAST (arXiv 2211.12020), which removes tag-0 atoms or replaces them by super-nodes. Its super-nodes
stand at means of Cartesian coordinates and lose their periodic images; here the mean is circular, in
fractional coordinates of the reduced cell, and the edges are those of an ordinary graph of what is left.
"""

import math
from typing import Any

import numpy as np
import torch
from ase.geometry import minkowski_reduce
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.model.output_request import OutputRequest
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.routing.batch_geometry import ADSORBATE, BatchGeometry
from equiformer2.pruning.routing.router import BaseRouter, BaseRouting, spread
from equiformer2.values import Switch, shown

MODES = ("context_only", "remove_tag0", "supernode", "supernode_per_element")
_APART = 0.5
_DEFINED = 1e-3
"""Length of the mean of unit vectors below which atoms have no circular mean along an axis."""


class ActiveRegion(BaseRouter):
    """Tag-0 atoms that are held are context.

    Modes:

    - `context_only`: they are not updated in any block but stay sources for the others. Runs with any
      trained network; distillation gets accuracy back.
    - `remove_tag0`: they are not there. Changes the zero of the energy: the network must be trained this way.
    - `supernode`: they are one atom of their most frequent element (the lightest of several). Train this way.
    - `supernode_per_element`: one atom per element. Train this way.

    A free atom with tag 0 is never removed: its force is wanted. Removed atoms get zero forces. A super-node
    does not double with the cell, so a supercell is not the same structure to the last two modes; and where a
    lattice has several sets of shortest vectors (hexagonal ones), its place depends on which are given.

    Args:
        mode: see above.
        protect_ends: `context_only`: update all atoms in the first and in the last block.
    """

    def __init__(self, mode: str = "context_only", protect_ends: bool = False) -> None:
        if mode not in MODES:
            raise InputError(f"the mode {shown(mode)} is not known: use one of {', '.join(MODES)}")
        self.mode, self.protect_ends = mode, Switch().read(protect_ends, "protect_ends")

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> BaseRouting:
        """See `BaseRouter`.

        Raises:
            InputError: the mode changes the structure, so that `router(model, batch)` must be called.
        """
        if self.mode != "context_only":
            raise InputError(f"{self.mode} changes the structure: call router(model, batch)")
        return _ContextOnly(
            BatchGeometry.from_batch(batch, graph), spread(0.0, num_blocks, self.protect_ends)
        )

    def __call__(
        self,
        model: EquiformerV2,
        batch: Batch | Data,
        graph: RadiusGraph | None = None,
        request: OutputRequest | None = None,
    ) -> dict[str, Tensor]:
        """See `BaseRouter`; a `graph` of the whole structure is of no use to the modes that change it."""
        if self.mode == "context_only":
            return super().__call__(model, batch, graph, request)
        smaller, kept = self.reduce(batch)
        if request is not None and request.force_atoms is not None:
            wanted = request.force_atoms[smaller.atom_of.clamp(min=0)] & (smaller.atom_of >= 0)
            request = request._replace(force_atoms=wanted)
        out = model(smaller, request=request)
        if "forces" in out:
            forces = out["forces"].new_zeros(len(batch.pos), 3)
            real = smaller.atom_of >= 0
            out["forces"] = forces.index_copy(0, kept, out["forces"][real])
        return out

    def reduce(self, batch: Batch | Data) -> tuple[Batch, Tensor]:
        """The smaller structures and which atoms (`[n]`) of the batch they still hold, in their order.

        `atom_of` of the result is the atom of the batch, or -1 for super-nodes, which come last.

        Raises:
            InputError: a structure would have no atoms left.
        """
        if not isinstance(batch, Batch):
            batch = Batch.from_data_list([batch])
        natoms = torch.as_tensor(batch.natoms, device=batch.pos.device).reshape(-1)
        if "tags" not in batch or "fixed" not in batch:
            raise InputError("an active region needs `tags` and `fixed`, which the batch lacks")
        context = (batch.tags == 0) & batch.fixed.bool()
        out, first = [], 0
        for index, count in enumerate(natoms.tolist()):
            here = torch.arange(first, first + count, device=batch.pos.device)
            keep = here[~context[here]]
            if len(keep) == 0:
                raise InputError("all atoms of the structure are held and have tag 0: nothing is left", index)
            out.append(self._smaller(batch, keep, here[context[here]], index))
            first += count
        smaller = Batch.from_data_list(out)
        atom_of = smaller.atom_of
        return smaller, atom_of[atom_of >= 0]

    def settings(self) -> dict[str, Any]:
        """See `BaseRouter`."""
        return {"mode": self.mode, "protect_ends": self.protect_ends}

    def _smaller(self, batch: Batch, keep: Tensor, context: Tensor, index: int) -> Data:
        cell, pbc = batch.cell.view(-1, 3, 3)[index], batch.pbc.view(-1, 3)[index]
        numbers = batch.atomic_numbers
        groups = []
        if self.mode != "remove_tag0" and len(context):
            elements, counts = numbers[context].unique(return_counts=True)
            if self.mode == "supernode":
                groups = [(elements[counts.argmax()], context)]
            else:
                groups = [(z, context[numbers[context] == z]) for z in elements]
        adsorbate = keep[batch.tags[keep] == ADSORBATE]
        anchors = adsorbate if len(adsorbate) else keep
        nodes = [circular_mean(batch.pos[g], batch.pos[anchors], cell, pbc) for _, g in groups]
        new = len(groups)
        _check_apart(nodes, cell, pbc, index)

        def joined(values: Tensor, extra: list[Tensor]) -> Tensor:
            return torch.cat((values[keep], torch.stack(extra).to(values))) if new else values[keep]

        zeros = [torch.zeros((), device=keep.device)] * new
        return Data(
            pos=joined(batch.pos, nodes),
            atomic_numbers=joined(numbers, [z for z, _ in groups]),
            tags=joined(batch.tags, zeros),
            fixed=joined(batch.fixed.bool(), [zero + 1 for zero in zeros]),
            atom_of=torch.cat((keep, keep.new_full((new,), -1))),
            cell=cell[None],
            pbc=pbc[None],
            natoms=len(keep) + new,
        )


def circular_mean(pos: Tensor, anchors: Tensor, cell: Tensor, pbc: Tensor) -> Tensor:
    """Mean position `[3]` of atoms in a periodic cell.

    Fractional coordinates of the reduced cell are averaged as angles along periodic axes and plainly along
    the others. Atoms that are spread evenly along an axis (a whole layer) have no mean there: then that of
    the anchors is taken.

    Args:
        pos: `[n, 3]` Å.
        anchors: `[m, 3]` Å, for instance the adsorbate.
        cell, pbc: `[3, 3]` Å, `[3]`.

    Raises:
        InputError: neither the atoms nor the anchors have a mean.
    """
    lattice = _reduced(cell, pbc)
    inverse = torch.linalg.inv(lattice)
    fractional, anchor = pos.double() @ inverse, anchors.double() @ inverse
    mean = fractional.mean(dim=0)
    for axis in pbc.nonzero().flatten().tolist():
        found = None
        for values in (fractional[:, axis], anchor[:, axis]):
            vector = torch.exp(2j * math.pi * values).mean()
            if vector.abs() > _DEFINED:
                found = vector.angle() / (2 * math.pi)
                break
        if found is None:
            raise InputError("held atoms and adsorbate are spread evenly: there is no place for a super-node")
        mean[axis] = found
    return (mean @ lattice).to(pos.dtype)


def _check_apart(nodes: list[Tensor], cell: Tensor, pbc: Tensor, index: int) -> None:
    """Raise `InputError` where super-nodes of two elements all but coincide: edges need a direction."""
    lattice = _reduced(cell, pbc)
    for i, node in enumerate(nodes):
        for other in nodes[:i]:
            fractional = (node - other).double() @ torch.linalg.inv(lattice)
            vector = (fractional - torch.round(fractional) * pbc) @ lattice
            if float(vector.norm()) < _APART:
                raise InputError(
                    f"super-nodes of two elements are less than {_APART} Å apart: use the mode 'supernode'",
                    index,
                )


def _reduced(cell: Tensor, pbc: Tensor) -> Tensor:
    """`[3, 3]` float64 shortest vectors of the lattice; non-periodic axes are made orthogonal."""
    reduced, _ = minkowski_reduce(cell.detach().cpu().double().numpy(), pbc.cpu().numpy())
    lattice = torch.as_tensor(np.array(reduced)).to(cell.device)
    axes, rest = pbc.nonzero().flatten().tolist(), (~pbc).nonzero().flatten().tolist()
    if rest:
        basis = torch.eye(3, dtype=lattice.dtype, device=lattice.device)
        lattice[rest] = torch.linalg.svd(lattice[axes])[2][len(axes) :] if axes else basis
    return lattice


class _ContextOnly(BaseRouting):
    def __init__(self, system: BatchGeometry, levels: tuple[float | None, ...]) -> None:
        self.system, self.levels = system, levels

    def decide(self, state: BlockState) -> Decision:
        return Decision(None if self.levels[state.block] is None else ~self.system.context)
