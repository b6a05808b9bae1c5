"""equiformer2 for the worker."""

from typing import Any

import torch

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import model_from_reference
from equiformer2.graph import radius_graph

NAME = "equiformer2"


def build(config: dict[str, Any], parameters: dict[str, torch.Tensor] | None) -> EquiformerV2:
    """The network of one of `sizes.SIZES` with the reference's parameters."""
    if parameters is None:
        raise ValueError("the parameters of the comparison are drawn by the reference")
    return model_from_reference(config, parameters)


def set_inference_mode(model: EquiformerV2, as_shipped: bool) -> None:
    """`no_grad` is enough here: there is one mode."""


def edges(model: EquiformerV2, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`edge_index [2, E]` (source, target) and `vectors [E, 3]` (Å) of the graph that the forward uses."""
    config = model.config
    graph = radius_graph(
        batch.pos,
        batch.cell,
        batch.pbc,
        batch.natoms,
        max_radius=config.max_radius,
        max_neighbors=config.max_neighbors,
        strict=config.enforce_max_neighbors_strictly,
    )
    return graph.edge_index, graph.vectors
