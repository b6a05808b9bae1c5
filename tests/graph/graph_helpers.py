"""Structures and comparisons for the tests of the graph."""

import itertools
from collections import Counter
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from equiformer2.graph import RadiusGraph, radius_graph


class Structures(NamedTuple):
    pos: Tensor
    cell: Tensor
    pbc: Tensor
    natoms: Tensor


def structures(*atoms: Atoms, dtype: torch.dtype = torch.float32) -> Structures:
    return Structures(
        torch.cat([torch.tensor(a.get_positions(), dtype=dtype) for a in atoms]),
        torch.stack([torch.tensor(a.cell[:], dtype=dtype) for a in atoms]),
        torch.stack([torch.tensor(a.pbc) for a in atoms]),
        torch.tensor([len(a) for a in atoms]),
    )


def graph_of(
    s: Structures, max_radius: float = 12.0, max_neighbors: int = 20, strict: bool = True
) -> RadiusGraph:
    return radius_graph(*s, max_radius=max_radius, max_neighbors=max_neighbors, strict=strict)


def edges(edge_index: Tensor, cell_offsets: Tensor) -> Counter:
    """The multiset of (source, target, image)."""
    return Counter(map(tuple, torch.cat((edge_index.T.long(), cell_offsets.long()), dim=1).tolist()))


def sorted_distances(target: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and distances, sorted by target and then distance."""
    order = sorted(range(len(target)), key=lambda e: (target[e].item(), distances[e].item()))
    return target[order].long(), distances[order]


def environments(graph: RadiusGraph) -> tuple[Tensor, Tensor, Tensor]:
    """(target, source, vector) in an order that only depends on these three: equal graphs, equal tensors."""
    generic = graph.vectors.double() @ torch.tensor([0.31, 0.57, 0.76], dtype=torch.float64)
    target, source = graph.edge_index[1], graph.edge_index[0]
    order = sorted(range(len(target)), key=lambda e: (target[e].item(), source[e].item(), generic[e].item()))
    return target[order], source[order], graph.vectors[order]


def all_pairs(s: Structures, max_radius: float) -> list[tuple[float, int, int, tuple[int, ...]]]:
    """(distance, source, target, image) of every pair of one structure, by trying every image in reach."""
    pos, cell, periodic = s.pos.double(), s.cell[0].double(), s.pbc[0].tolist()
    for axis in range(3):
        if not periodic[axis]:
            cell[axis] = torch.eye(3, dtype=torch.float64)[axis]
    inverse = torch.linalg.inv(cell)
    heights = 1.0 / torch.linalg.vector_norm(inverse, dim=0)
    fractional = pos @ inverse
    reach = (max_radius / heights).ceil() + (fractional.amax(0) - fractional.amin(0)).ceil()
    ranges = [range(-int(n), int(n) + 1) if on else range(1) for n, on in zip(reach, periodic, strict=True)]
    found = []
    for image in itertools.product(*ranges):
        shift = torch.tensor(image, dtype=torch.float64) @ cell
        distances = torch.linalg.vector_norm(pos[None] - pos[:, None] + shift, dim=-1)
        for i, j in (distances <= max_radius).nonzero().tolist():
            if i != j or any(image):
                found.append((distances[i, j].item(), j, i, image))
    return found
