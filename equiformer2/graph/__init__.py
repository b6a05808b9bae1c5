"""Periodic radius graphs: who is a neighbour of whom, through which periodic image."""

from equiformer2.graph.graph_check import checked_graph
from equiformer2.graph.radius_graph import RadiusGraph, radius_graph
from equiformer2.graph.structures import structure_index

__all__ = ["RadiusGraph", "checked_graph", "radius_graph", "structure_index"]
