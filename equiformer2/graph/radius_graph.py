"""Build the graph of the network: atoms as nodes, neighbours within a radius as edges."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equiformer2.graph import validation
from equiformer2.graph.device_search import find_pairs_on_device
from equiformer2.graph.nonblocking import to_device
from equiformer2.graph.search import find_pairs, wrap
from equiformer2.graph.truncation import GRID, TIE_TOLERANCE, nearest_edges, sorted_edges


@dataclass(frozen=True)
class RadiusGraph:
    """E directed edges j -> i between the atoms of a batch.

    Edges are sorted by target i, then by distance in steps of `GRID`, then by their projection on a fixed
    direction. Two calls on the same input give the same bits.
    """

    edge_index: Tensor
    """`[2, E]` int64: row 0 the source j, row 1 the target i."""
    cell_offsets: Tensor
    """`[E, 3]` int64: the periodic image of j, in lattice vectors, for the positions as given."""
    vectors: Tensor
    """`[E, 3]` Å, `pos[j] - pos[i] + cell_offsets @ cell`; differentiable in `pos` and `cell`."""
    distances: Tensor
    """`[E]` Å, the lengths of `vectors`."""

    def in_precision(self, dtype: torch.dtype) -> "RadiusGraph":
        """The same edges with vectors and distances in `dtype`, that of a network.

        From float64 they are rounded to multiples of `GRID` first: rounding errors of 1e-14 Å, which depend
        on the origin and the periodic image of an atom, then leave no trace in float32. A network at a site
        of high symmetry, whose tensors are nothing but rounding errors, would enlarge them (docs/model.md).
        """
        if self.vectors.dtype == self.distances.dtype == dtype:
            return self
        vectors, distances = self.vectors, self.distances
        if vectors.dtype == torch.float64:
            snapped = torch.round(vectors.detach() / GRID) * GRID
            # The derivative is that of the exact vectors.
            vectors = vectors + (snapped - vectors.detach()) if vectors.requires_grad else snapped
            distances = torch.linalg.vector_norm(vectors, dim=-1)
        return replace(self, vectors=vectors.to(dtype), distances=distances.to(dtype))


def radius_graph(
    pos: Tensor,
    cell: Tensor,
    pbc: Tensor,
    natoms: Tensor | int,
    *,
    max_radius: float,
    max_neighbors: int,
    strict: bool,
) -> RadiusGraph:
    """Connect each atom of each structure to its nearest neighbours within a radius.

    The rule is that of the reference (fairchem-core 1.10.0, `radius_graph_pbc`); docs/graph.md lists what is
    the same and what is not. The search runs in float64 whatever the type of `pos`, on positions wrapped into
    the cell along periodic directions, so that neither the choice among equally far neighbours nor the
    order of the edges depends on the periodic image that an atom is given in; on a GPU for positions that
    are there, but for structures so large that cell lists on the CPU are better.

    Args:
        pos: `[N, 3]` Å, wrapped into the cell or not. In float32 a structure far from the origin has lost its
            digits already, so those are limited to `validation.MAX_FLOAT32_COORDINATE`.
        cell: `[B, 3, 3]` Å, rows are lattice vectors; rows of non-periodic axes do not matter.
        pbc: `[B, 3]` bool, may differ between the structures.
        natoms: `[B]` int64; for one structure also a number.
        max_radius: Å, inclusive.
        max_neighbors: edges an atom may receive.
        strict: keep exactly the nearest `max_neighbors`, ties broken by direction; otherwise keep the whole
            degenerate shell at the cut (`nearest_edges` has both rules).

    Raises:
        InputError: NaN, infinite or too large positions or cell, atoms too far apart along a direction that
            is not periodic, atoms at most 0.01 Å apart, a periodic axis without lattice vector, linearly
            dependent lattice vectors, positions not in Å, wrong shapes.
    """
    validation.check_parameters(max_radius, max_neighbors)
    natoms = validation.counts(natoms)
    positions_array, cells_array, pbc_array, natoms_array = _on_host(pos, cell, pbc, natoms)
    pbc_array, natoms_array = pbc_array.astype(bool), natoms_array.astype("int64")
    validation.check_shapes(positions_array, cells_array, pbc_array, natoms_array)
    limit = validation.MAX_COORDINATE if pos.dtype == torch.float64 else validation.MAX_FLOAT32_COORDINATE
    validation.check_positions(positions_array, natoms_array, limit)
    validation.check_cells(cells_array, pbc_array, natoms_array)

    structure_array = np.repeat(np.arange(len(natoms_array)), natoms_array)
    structure = torch.from_numpy(structure_array)
    wrapped = wrap(positions_array, cells_array, pbc_array, structure_array)
    validation.check_extents(wrapped.positions, cells_array, pbc_array, natoms_array)
    pairs = None
    if on_device(pos.device):
        positions64, cells64 = pos.detach().double(), cell.detach().double()
        there = to_device(structure, pos.device)
        arrays = cells_array, pbc_array, natoms_array.tolist()
        pairs = find_pairs_on_device(positions64, there, *arrays, max_radius)
    if pairs is not None:
        structure = there
        target, source, shifts, distance, closest = pairs
    else:
        positions64, cells64 = torch.from_numpy(positions_array), torch.from_numpy(cells_array)
        found = find_pairs(
            wrapped,
            cells_array,
            pbc_array,
            natoms_array,
            max_radius=max_radius,
            max_neighbors=max_neighbors,
        )
        target, source, shifts, distance = map(torch.from_numpy, found)
        closest = found.distance.min(initial=math.inf)
    if closest <= validation.MIN_DISTANCE:
        columns = target.cpu().numpy(), source.cpu().numpy(), distance.cpu().numpy()
        validation.check_distances(*columns, natoms_array)

    def vectors_of(edges: Tensor) -> Tensor:
        return _edge_vectors(positions64, cells64, structure, source[edges], target[edges], shifts[edges])

    tolerance = None
    if pos.dtype != torch.float64 and len(pos):
        # Positions in float32 have the fewer digits behind the point, the farther they are from the origin.
        filled = natoms_array[natoms_array > 0]
        starts = (np.cumsum(natoms_array) - natoms_array)[natoms_array > 0]
        farthest = np.maximum.reduceat(np.abs(positions_array).max(axis=1), starts)
        rounding = 4 * float(np.finfo(np.float32).eps) * farthest
        tolerance = np.repeat(np.maximum(TIE_TOLERANCE, rounding), filled)
    edges = nearest_edges(
        target,
        distance,
        vectors_of,
        len(pos),
        max_neighbors=max_neighbors,
        strict=strict,
        tie_tolerance=tolerance,
    )
    edges = sorted_edges(edges, target, distance, vectors_of)
    edge_index = torch.stack((source[edges], target[edges])).to(pos.device)
    cell_offsets = shifts[edges].to(pos.device, torch.int64)
    vectors = _edge_vectors(
        pos.double(), cell.double(), structure.to(pos.device), edge_index[0], edge_index[1], cell_offsets
    )
    distances = torch.linalg.vector_norm(vectors, dim=-1)
    dtype = torch.promote_types(pos.dtype, torch.float32)
    return RadiusGraph(edge_index, cell_offsets, vectors.to(dtype), distances.to(dtype))


def _on_host(pos: Tensor, *others: Tensor) -> list[NDArray[Any]]:
    """Copy tensors to float64 arrays; the host waits for the device once, not for each of them."""
    tensors = [tensor.detach() for tensor in (pos, *others)]
    if on_device(pos.device):
        together = torch.cat([tensor.to(pos.device, torch.float64).reshape(-1) for tensor in tensors]).cpu()
        parts = together.split([tensor.numel() for tensor in tensors])
        tensors = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    return [tensor.cpu().to(torch.float64).contiguous().numpy() for tensor in tensors]


def on_device(device: torch.device) -> bool:
    """Tell whether the search runs on the device of the positions."""
    return device.type == "cuda"


def _edge_vectors(
    pos: Tensor, cell: Tensor, structure: Tensor, source: Tensor, target: Tensor, shifts: Tensor
) -> Tensor:
    """Compute `pos[source] - pos[target] + shifts @ cell`, `[E, 3]` Å; positions and cell in float64."""
    lattice = cell[structure[target]]
    # Not as a matrix product: autocast would round it to bf16, by 0.03 Å in a cell of 10 Å.
    return pos[source] - pos[target] + (shifts.to(pos.dtype).unsqueeze(2) * lattice).sum(dim=1)
