"""Checks of the structures before the neighbour search, in a handful of array operations.

Everything works on a whole batch: B structures, N atoms in all. A message names the structure only
when there is more than one, and counts atoms from 0 within their structure; the error carries its index.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equiformer2.errors import InputError

MIN_DISTANCE = 0.01
"""Å. The reference drops pairs with a squared distance of at most 1e-4 Å^2 without a word."""

_MIN_LATTICE_VECTOR = 0.1
"""Å. Shorter than any bond: such a cell is in other units or broken, and has millions of images."""

MAX_EXTENT = 1e4
"""Å. Longer than any simulation cell and any molecule: such a structure is in other units or broken, and the
boxes of the neighbour search, which span it, would be too many."""

MAX_COORDINATE = 1e6
"""Å. An atom that diffuses for milliseconds comes not that far; float64 has 1e-10 Å there."""

MAX_FLOAT32_COORDINATE = 1e3
"""Å. float32 rounds coordinates to 3e-5 Å there, which moves forces by some 1e-3 eV/Å."""

_MIN_RELATIVE_VOLUME = 1e-4
"""Volume over the product of the lengths of the lattice vectors; below it the vectors are dependent."""

_MAX_DENSITY = 2.0
"""Atoms per Å^3, ten times that of diamond: more means that positions and cell are not in Å."""


def check_parameters(max_radius: float, max_neighbors: int) -> None:
    """Raise `InputError` for a cutoff or a neighbour limit that makes no graph."""
    if not 0.0 < max_radius <= 100.0:
        raise InputError(f"max_radius is {max_radius}; it must be above 0 and at most 100 Å")
    if max_neighbors < 1:
        raise InputError(f"max_neighbors is {max_neighbors}; it must be at least 1")


def counts(natoms: Tensor | int) -> Tensor:
    """Convert numbers of atoms to `[B]`; one number is that of one structure.

    Args:
        natoms: number of atoms of every structure, or of the only one.

    Raises:
        InputError: they are not whole numbers from 0, in one dimension.
    """
    try:
        numbers = torch.as_tensor(natoms)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"natoms is {natoms!r}; give the number of atoms of every structure, [B]") from error
    if (
        numbers.dtype.is_floating_point
        or numbers.dtype.is_complex
        or numbers.dtype == torch.bool
        or numbers.ndim > 1
    ):
        raise InputError(
            f"natoms has the type {numbers.dtype} and the shape {list(numbers.shape)}; "
            "give whole numbers, [B], or one for one structure"
        )
    return numbers.reshape(-1)


def check_shapes(
    positions: NDArray[np.float64],
    cells: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    natoms: NDArray[np.int64],
) -> None:
    """Raise `InputError` unless the shapes are `[N, 3]`, `[B, 3, 3]`, `[B, 3]` and `[B]` with sum N."""
    structures = len(natoms)
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise InputError(f"pos has the shape {positions.shape}; it must be [N, 3]")
    if (natoms < 0).any():
        raise InputError(f"natoms holds {natoms.min()}; give numbers of atoms")
    if natoms.sum() != len(positions):
        raise InputError(f"natoms adds up to {natoms.sum()} atoms but pos holds {len(positions)}")
    if cells.shape != (structures, 3, 3):
        raise InputError(
            f"cell has the shape {cells.shape}; {structures} structures need [{structures}, 3, 3]"
        )
    if pbc.shape != (structures, 3):
        raise InputError(f"pbc has the shape {pbc.shape}; {structures} structures need [{structures}, 3]")


def check_positions(
    positions: NDArray[np.float64], natoms: NDArray[np.int64], limit: float = MAX_COORDINATE
) -> None:
    """Raise `InputError` naming the first atom with a coordinate that is not finite or beyond `limit` (Å)."""
    sound = np.abs(positions) <= limit  # False for NaN
    if sound.all():
        return
    atom = int(np.flatnonzero(~sound.all(axis=1))[0])
    name, structure = locate_atom(atom, natoms)
    place = f"{name} has the position {positions[atom].tolist()}"
    if not np.isfinite(positions[atom]).all():
        raise InputError(f"{place}; repair its coordinates or remove the structure", structure)
    remedy = "give positions in Å and move the structure to the origin"
    if limit == MAX_FLOAT32_COORDINATE:
        remedy += ", or give them in float64, since float32 resolves no forces that far out"
    raise InputError(f"{place}, more than {limit:.0f} Å from the origin; {remedy}", structure)


def check_extents(
    positions: NDArray[np.float64],
    cells: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    natoms: NDArray[np.int64],
) -> None:
    """Raise `InputError` for a structure that spans more than `MAX_EXTENT` across its periodic directions.

    Args:
        positions: `[N, 3]` Å, wrapped into the cell along periodic directions.
        cells: `[B, 3, 3]` Å.
        pbc: `[B, 3]`.
        natoms: `[B]`.
    """
    if bool(pbc.all()) or not len(positions):
        return
    filled = np.flatnonzero(natoms)
    starts = (np.cumsum(natoms) - natoms)[filled]
    span = np.maximum.reduceat(positions, starts) - np.minimum.reduceat(positions, starts)
    # A wrapped atom is anywhere in its cell: along periodic directions the cell spans that much.
    own = (np.abs(cells) * pbc[:, :, None]).sum(axis=1)[filled]
    open_ones = np.logical_not(pbc[filled].all(axis=1, keepdims=True))
    far = ((span - own > MAX_EXTENT) & open_ones).any(axis=1)
    if not far.any():
        return
    structure = int(filled[np.flatnonzero(far)[0]])
    first = int(natoms[:structure].sum())
    here = positions[first : first + int(natoms[structure])]
    axis = int(np.argmax(np.ptp(here, axis=0)))
    atom = int(np.argmax(np.abs(here[:, axis] - np.median(here[:, axis]))))
    raise InputError(
        f"{name_structure(structure, natoms)} spans {np.ptp(here[:, axis]):.3g} Å along {'xyz'[axis]}, "
        f"where at most {MAX_EXTENT:.0f} Å make sense; atom {atom} is farthest out, at {here[atom].tolist()} "
        "Å: remove it or give positions in Å",
        structure,
    )


def check_cells(cells: NDArray[np.float64], pbc: NDArray[np.bool_], natoms: NDArray[np.int64]) -> None:
    """Raise `InputError` naming the first structure whose periodic lattice vectors span no volume."""
    if not np.isfinite(cells).all():
        structure = int(np.flatnonzero(~np.isfinite(cells).all(axis=(1, 2)))[0])
        raise InputError(
            f"the cell of {name_structure(structure, natoms)} holds NaN or infinite numbers; "
            "repair it or remove the structure",
            structure,
        )
    rows = cells * pbc[:, :, None]
    # Non-periodic axes get a unit vector of their own, so that one determinant serves every kind of pbc:
    # its root is the length, area or volume of the periodic cell.
    gram = rows @ rows.transpose(0, 2, 1) + np.eye(3) * ~pbc[:, None, :]
    squared_lengths = np.diagonal(gram, axis1=1, axis2=2)
    squared_volumes = np.linalg.det(gram)
    short = pbc & (squared_lengths < _MIN_LATTICE_VECTOR**2)
    flat = squared_volumes < _MIN_RELATIVE_VOLUME**2 * squared_lengths.prod(axis=1)
    long = pbc & (squared_lengths > MAX_EXTENT**2)
    dense = pbc.all(axis=1) & (natoms.astype(np.float64) ** 2 > _MAX_DENSITY**2 * squared_volumes)
    if not (short.any() or long.any() or flat.any() or dense.any()):
        return
    structure = int(np.flatnonzero((short | long).any(axis=1) | flat | dense)[0])
    name = name_structure(structure, natoms)
    if short[structure].any():
        axis = int(np.flatnonzero(short[structure])[0])
        raise InputError(
            f"{name} is periodic along axis {axis} but its lattice vector there is "
            f"{cells[structure, axis].tolist()} Å; give it a cell or set pbc to False along that axis",
            structure,
        )
    if long[structure].any():
        axis = int(np.flatnonzero(long[structure])[0])
        raise InputError(
            f"the lattice vector {axis} of {name} is {squared_lengths[structure, axis] ** 0.5:.3g} Å long; "
            f"cells are in Å and at most {MAX_EXTENT:.0f} Å long",
            structure,
        )
    if flat[structure]:
        raise InputError(
            f"the periodic lattice vectors of {name} are linearly dependent; "
            "repair its cell or set pbc to False along the axes that do not repeat",
            structure,
        )
    raise InputError(
        f"{name} has {natoms[structure]} atoms in {squared_volumes[structure] ** 0.5:.3g} Å^3; "
        "positions and cell must be in Å",
        structure,
    )


def check_distances(
    target: NDArray[np.int64],
    source: NDArray[np.int64],
    distance: NDArray[np.float64],
    natoms: NDArray[np.int64],
) -> None:
    """Raise `InputError` naming the first two atoms at most `MIN_DISTANCE` apart."""
    if not len(distance) or distance.min() > MIN_DISTANCE:
        return
    pair = int(np.flatnonzero(distance <= MIN_DISTANCE)[0])
    first, second = sorted((int(target[pair]), int(source[pair])))
    structure = int(np.searchsorted(np.cumsum(natoms), first, side="right"))
    offset = int(natoms[:structure].sum())
    raise InputError(
        f"atoms {first - offset} and {second - offset} of {name_structure(structure, natoms)} are "
        f"{distance[pair]:.2g} Å apart (a periodic image counts); move or remove one of them",
        structure,
    )


def name_structure(structure: int, natoms: NDArray[np.int64]) -> str:
    """Name a structure in a message; its number is left out where there is only one.

    Args:
        structure: index in the batch.
        natoms: `[B]` number of atoms of every structure.
    """
    return f"structure {structure} of the batch" if len(natoms) > 1 else "the structure"


def locate_atom(atom: int, natoms: NDArray[np.int64]) -> tuple[str, int]:
    """Name an atom of a batch as "atom 3 of structure 1 of the batch".

    Args:
        atom: index in the batch.
        natoms: `[B]` number of atoms of every structure.

    Returns:
        The name, and the index of the atom's structure.
    """
    structure = int(np.searchsorted(np.cumsum(natoms)[:-1], atom, side="right"))
    return f"atom {atom - int(natoms[:structure].sum())} of {name_structure(structure, natoms)}", structure
