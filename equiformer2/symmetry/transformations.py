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
    restore_forces: Callable[[Tensor], Tensor]
    copies: int = 1


Transformation = Callable[[Data, torch.Generator], Transformed | None]


def essential(data: Data, **changes: object) -> Data:
    """A new structure of the fields that a model may read, some of them changed."""
    fields = {name: data[name] for name in _ATOM_FIELDS if name in data}
    fields |= {"pos": data.pos, "cell": data.cell.view(1, 3, 3), "pbc": data.pbc.view(1, 3)}
    fields |= {"natoms": len(data.pos)}
    return Data(**(fields | changes))


def repeat_call(data: Data, generator: torch.Generator) -> Transformed:
    """Nothing changes: what is left is the scatter between two calls."""
    return Transformed(essential(data), _add_copies)


def rotate(data: Data, generator: torch.Generator) -> Transformed:
    """A random proper rotation of positions and cell; forces turn along."""
    matrix = _random_rotation(generator)
    here = matrix.to(data.pos)
    turned = essential(data, pos=data.pos @ here.t(), cell=data.cell.view(1, 3, 3) @ here.t())
    return Transformed(turned, lambda forces: _add_copies(forces @ matrix.to(forces)))


def translate(data: Data, generator: torch.Generator) -> Transformed:
    """Another origin."""
    shift = _MAX_SHIFT * (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1)
    return Transformed(essential(data, pos=data.pos + shift.to(data.pos)), _add_copies)


def permute(data: Data, generator: torch.Generator) -> Transformed:
    """Another numbering of the atoms."""
    order = torch.randperm(len(data.pos), generator=generator)
    back = torch.argsort(order)
    fields = {name: data[name][order] for name in _ATOM_FIELDS if name in data}
    moved = essential(data, pos=data.pos[order], **fields)
    return Transformed(moved, lambda forces: _add_copies(forces[back]))


def choose_images(data: Data, generator: torch.Generator) -> Transformed | None:
    """Other periodic images of the atoms: wrapped or not is the same structure."""
    periodic = data.pbc.view(3)
    if not periodic.any():
        return None
    images = torch.randint(-2, 3, (len(data.pos), 3), generator=generator) * periodic
    return Transformed(
        essential(data, pos=data.pos + images.to(data.pos) @ data.cell.view(3, 3)), _add_copies
    )


def choose_lattice_vectors(data: Data, generator: torch.Generator) -> Transformed | None:
    """Other vectors of the same lattice: sums of the old ones, a left-handed set."""
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
    return Transformed(essential(data, cell=cell), _add_copies)


def repeat_cell(data: Data, generator: torch.Generator) -> Transformed | None:
    """A cell twice as long along one periodic axis: twice the extensive energy, the same forces."""
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


def _add_copies(forces: Tensor) -> Tensor:
    return forces.unsqueeze(0)


def _random_rotation(generator: torch.Generator) -> Tensor:
    """Uniformly distributed proper rotation `[3, 3]`, float64."""
    matrix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(matrix)
    q = q * torch.sign(torch.diagonal(r))
    return q * torch.sign(torch.linalg.det(q))
