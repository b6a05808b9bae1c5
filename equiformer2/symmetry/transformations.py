"""The same structure written down differently, and what that must do to energy and forces.

Every function takes a structure (the data object of docs/architecture.md) and a generator, and returns a
`Transformed` one, or None where the symmetry does not exist (no supercell without a periodic axis). Random
numbers are drawn in float64, results have the type of `pos`.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch_geometric.data import Data

_ATOM_FIELDS = ("atomic_numbers", "tags", "fixed")
_MAX_SHIFT = 10.0  # Å


@dataclasses.dataclass(frozen=True)
class Transformed:
    """A structure and the way back.

    Attributes:
        data: the transformed structure.
        restore_forces: forces of the transformed structure `[N', 3]` to those expected of each original atom,
            `[copies, N, 3]`.
        copies: how often the original is contained.
    """

    data: Data
    restore_forces: Callable[[Tensor], Tensor] = lambda forces: forces.unsqueeze(0)
    copies: int = 1


Transformation = Callable[[Data, torch.Generator], Transformed | None]


def essential(data: Data, **changes: object) -> Data:
    """Copy the fields that a model may read into a new structure.

    Args:
        data: one structure.
        changes: values of fields that replace those of `data`.

    Returns:
        The structure, with `cell [1, 3, 3]` and `pbc [1, 3]`.
    """
    fields = {name: data[name] for name in _ATOM_FIELDS if name in data}
    fields |= {"pos": data.pos, "cell": data.cell.view(1, 3, 3), "pbc": data.pbc.view(1, 3)}
    fields |= {"natoms": len(data.pos)}
    return Data(**(fields | changes))


def repeat_call(data: Data, generator: torch.Generator) -> Transformed:
    """Change nothing: the deviation is the scatter between two calls."""
    return Transformed(essential(data))


def rotate(data: Data, generator: torch.Generator) -> Transformed:
    """Turn positions and cell by a uniformly distributed proper rotation; forces turn along."""
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r))
    matrix = q * torch.sign(torch.linalg.det(q))
    here = matrix.to(data.pos)
    turned = essential(data, pos=data.pos @ here.t(), cell=data.cell.view(1, 3, 3) @ here.t())
    return Transformed(turned, lambda forces: (forces @ matrix.to(forces)).unsqueeze(0))


def translate(data: Data, generator: torch.Generator) -> Transformed:
    """Move the origin by up to 10 Å along each axis."""
    shift = _MAX_SHIFT * (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1)
    return Transformed(essential(data, pos=data.pos + shift.to(data.pos)))


def permute(data: Data, generator: torch.Generator) -> Transformed:
    """Number the atoms in another sequence."""
    order = torch.randperm(len(data.pos), generator=generator)
    back = torch.argsort(order)
    fields = {name: data[name][order] for name in _ATOM_FIELDS if name in data}
    moved = essential(data, pos=data.pos[order], **fields)
    return Transformed(moved, lambda forces: forces[back].unsqueeze(0))


def choose_images(data: Data, generator: torch.Generator) -> Transformed | None:
    """Move atoms to other periodic images: wrapped or not is the same structure."""
    periodic = data.pbc.view(3)
    if not periodic.any():
        return None
    images = torch.randint(-2, 3, (len(data.pos), 3), generator=generator) * periodic
    return Transformed(essential(data, pos=data.pos + images.to(data.pos) @ data.cell.view(3, 3)))


def choose_lattice_vectors(data: Data, generator: torch.Generator) -> Transformed | None:
    """Choose other vectors of the same lattice: sums of the old ones, a left-handed set."""
    axes = data.pbc.view(3).nonzero().flatten()
    if not len(axes):
        return None
    change = torch.eye(3, dtype=torch.float64)
    for axis in axes.tolist():
        for other in axes.tolist():
            if other != axis:
                step = int(torch.randint(-1, 2, (), generator=generator))
                change[axis] += step * change[other]
    change[axes[0]] *= -1
    cell = (change.to(data.cell) @ data.cell.view(3, 3)).unsqueeze(0)
    return Transformed(essential(data, cell=cell))


def repeat_cell(data: Data, generator: torch.Generator) -> Transformed | None:
    """Double the cell along one periodic axis: twice the extensive energy, the same forces."""
    axes = data.pbc.view(3).nonzero().flatten()
    if not len(axes):
        return None
    axis = int(axes[int(torch.randint(len(axes), (), generator=generator))])
    cell = data.cell.view(3, 3)
    longer = cell.clone()
    longer[axis] *= 2
    fields = {name: torch.cat((data[name], data[name])) for name in _ATOM_FIELDS if name in data}
    doubled = essential(
        data,
        pos=torch.cat((data.pos, data.pos + cell[axis])),
        cell=longer.unsqueeze(0),
        natoms=2 * len(data.pos),
        **fields,
    )
    return Transformed(doubled, lambda forces: forces.unflatten(0, (2, -1)), copies=2)
