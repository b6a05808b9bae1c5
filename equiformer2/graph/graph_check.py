"""Check a graph that the caller gives: kernels read and write memory by its indices."""

import torch

from equiformer2.errors import InputError
from equiformer2.graph.radius_graph import RadiusGraph


def checked_graph(graph: RadiusGraph, num_atoms: int) -> RadiusGraph:
    """Check that `graph` is one of `num_atoms` atoms as `radius_graph` makes them, and return it.

    The indices themselves are looked at on a CPU only: elsewhere that would wait for the device.

    Args:
        graph: the graph, on any device.
        num_atoms: N, the number of atoms of the batch.

    Raises:
        InputError: wrong types or shapes, atoms that do not exist, or edges that are not sorted by target.
    """
    edge_index = graph.edge_index
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise InputError(f"graph.edge_index has the shape {tuple(edge_index.shape)}; it must be [2, E]")
    if edge_index.dtype != torch.int64:
        raise InputError(f"graph.edge_index is {edge_index.dtype}; it must be int64: convert it with .long()")
    edges = edge_index.shape[1]
    for name, tensor, shape in (
        ("vectors", graph.vectors, (edges, 3)),
        ("distances", graph.distances, (edges,)),
    ):
        if tensor.shape != shape:
            raise InputError(
                f"graph.{name} has the shape {tuple(tensor.shape)}; "
                f"the {edges} edges of graph.edge_index need {shape}"
            )
    if edge_index.device.type == "cpu" and edges:
        lowest, highest = edge_index.aminmax()
        if lowest < 0 or highest >= num_atoms:
            edge = int(((edge_index < 0) | (edge_index >= num_atoms)).any(0).nonzero()[0])
            source, target = edge_index[:, edge].tolist()
            raise InputError(
                f"edge {edge} of graph.edge_index goes from atom {source} to atom {target}, "
                f"but the batch has {num_atoms} atoms, counted from 0"
            )
        falls = edge_index[1, 1:] < edge_index[1, :-1]
        if falls.any():
            edge = int(falls.nonzero()[0]) + 1
            before, after = edge_index[1, edge - 1 : edge + 1].tolist()
            raise InputError(
                f"edge {edge} of graph.edge_index ends at atom {after}, the one before it at atom {before}: "
                "sort the edges by their target, edge_index[1]"
            )
    return graph
