"""Active region of a slab: held subsurface atoms are context only, removed, or lumped.

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
from equiformer2.pruning.routing.router import BaseRouter, BaseRouting, levels_per_block
from equiformer2.values import Switch, shown

MODES = ("context_only", "remove_tag0", "supernode", "supernode_per_element")
_APART = 0.5
"""Least distance of super-nodes, Å: edges between them need a direction."""
_DEFINED = 1e-3
"""Length of the mean of unit vectors below which atoms have no circular mean along an axis."""


class ActiveRegion(BaseRouter):
    """Router by tags: held atoms with tag 0 are context.

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
        mode: one of the modes above.
        protect_ends: with `context_only`, update all atoms in the first and in the last block.

    Raises:
        InputError: an unknown mode.
    """

    def __init__(self, mode: str = "context_only", protect_ends: bool = False) -> None:
        if mode not in MODES:
            raise InputError(f"the mode {shown(mode)} is not known: use one of {', '.join(MODES)}")
        self.mode, self.protect_ends = mode, Switch().read(protect_ends, "protect_ends")

    @property
    def abrupt(self) -> bool:
        """False: the selection depends on tags alone."""
        return False

    @property
    def changes_structure(self) -> bool:
        """True unless all atoms stay sources, as they do with `context_only`."""
        return self.mode != "context_only"

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> BaseRouting:
        """Begin the decisions of `context_only` for one batch.

        Args:
            batch: structures with `tags` and `fixed`.
            graph: their edges.
            num_blocks: number of blocks of the network.

        Returns:
            Decisions, block after block.

        Raises:
            InputError: the mode changes the structure, so that `router(model, batch)` must be called.
        """
        if self.mode != "context_only":
            raise InputError(f"{self.mode} changes the structure: call router(model, batch)")
        return _ContextOnly(
            BatchGeometry.from_batch(batch, graph), levels_per_block(0.0, num_blocks, self.protect_ends)
        )

    def __call__(
        self,
        model: EquiformerV2,
        batch: Batch | Data,
        graph: RadiusGraph | None = None,
        request: OutputRequest | None = None,
    ) -> dict[str, Tensor]:
        """Run `model` on the active region.

        Args:
            model: the network.
            batch: structures with `tags` and `fixed`.
            graph: edges of the whole structures, which only `context_only` can use; None to find them.
            request: outputs that are wanted; None for all.

        Returns:
            `energy [B]` and `forces [N, 3]`, in normalised units; removed atoms have zero forces.
        """
        if self.mode == "context_only":
            return super().__call__(model, batch, graph, request)
        smaller, kept = self.reduce(batch)
        if request is not None and request.force_atoms is not None:
            force_atoms = request.force_atoms[smaller.atom_of.clamp(min=0)] & (smaller.atom_of >= 0)
            request = request._replace(force_atoms=force_atoms)
        out = model(smaller, request=request)
        if "forces" in out:
            forces = out["forces"].new_zeros(len(batch.pos), 3)
            real = smaller.atom_of >= 0
            out["forces"] = forces.index_copy(0, kept, out["forces"][real])
        return out

    def reduce(self, batch: Batch | Data) -> tuple[Batch, Tensor]:
        """Make the smaller structures.

        Args:
            batch: structures with `tags` and `fixed`.

        Returns:
            The smaller structures, and the atoms `[n]` of the batch that they still hold, in their order.
            `atom_of` of the structures is the atom of the batch, or -1 for super-nodes, which come last.

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
        """Return the arguments that make this router again."""
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
        new = len(groups)
        lattice = _Lattice(cell, pbc)
        nodes = [lattice.circular_mean(batch.pos[group], batch.pos[anchors]) for _, group in groups]
        if lattice.closest(nodes) < _APART:
            raise InputError(
                f"super-nodes of two elements are less than {_APART} Å apart: use the mode 'supernode'", index
            )

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


class _Lattice:
    """Shortest lattice vectors of a cell `[3, 3]` Å, as float64; non-periodic axes are made orthogonal."""

    def __init__(self, cell: Tensor, pbc: Tensor) -> None:
        reduced, _ = minkowski_reduce(cell.detach().cpu().double().numpy(), pbc.cpu().numpy())
        self.pbc, self.vectors = pbc, torch.as_tensor(np.array(reduced)).to(cell.device)
        axes, rest = pbc.nonzero().flatten().tolist(), (~pbc).nonzero().flatten().tolist()
        if rest:
            basis = torch.eye(3, dtype=self.vectors.dtype, device=cell.device)
            self.vectors[rest] = torch.linalg.svd(self.vectors[axes])[2][len(axes) :] if axes else basis
        self.inverse = torch.linalg.inv(self.vectors)

    def circular_mean(self, pos: Tensor, anchors: Tensor) -> Tensor:
        """Mean position `[3]` Å of atoms.

        Fractional coordinates are averaged as angles along periodic axes and plainly along the others. Atoms
        that are spread evenly along an axis (a whole layer) have no mean there: then that of the anchors is
        taken.

        Args:
            pos: `[n, 3]` Å.
            anchors: `[m, 3]` Å, for instance the adsorbate.

        Raises:
            InputError: neither the atoms nor the anchors have a mean.
        """
        fractional, anchor = pos.double() @ self.inverse, anchors.double() @ self.inverse
        mean = fractional.mean(dim=0)
        for axis in self.pbc.nonzero().flatten().tolist():
            place = None
            for values in (fractional[:, axis], anchor[:, axis]):
                vector = torch.exp(2j * math.pi * values).mean()
                if vector.abs() > _DEFINED:
                    place = vector.angle() / (2 * math.pi)
                    break
            if place is None:
                raise InputError(
                    "held atoms and adsorbate are spread evenly: there is no place for a super-node"
                )
            mean[axis] = place
        return (mean @ self.vectors).to(pos.dtype)

    def closest(self, nodes: list[Tensor]) -> float:
        """Smallest distance of two points, Å, over periodic images; infinite for fewer than two."""
        distances = [math.inf]
        for i, node in enumerate(nodes):
            for other in nodes[:i]:
                fractional = (node - other).double() @ self.inverse
                vector = (fractional - torch.round(fractional) * self.pbc) @ self.vectors
                distances.append(float(vector.norm()))
        return min(distances)


class _ContextOnly(BaseRouting):
    """Decisions that update all atoms but the context."""

    def __init__(self, geometry: BatchGeometry, levels: tuple[float | None, ...]) -> None:
        self.geometry, self.levels = geometry, levels

    def decide(self, state: BlockState) -> Decision:
        return Decision(None if self.levels[state.block] is None else ~self.geometry.context)
