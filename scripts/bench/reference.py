"""fairchem-core's EquiformerV2 for the worker. Runs in the reference's own environment."""

import logging
from typing import Any

import torch
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2

NAME = "fairchem-core"


def build(config: dict[str, Any], parameters: dict[str, torch.Tensor] | None) -> EquiformerV2:
    """The network of one of `sizes.SIZES`, with its own random initialisation unless parameters are given."""
    logging.disable(logging.WARNING)
    model = EquiformerV2(**config)
    if parameters is not None:
        missing, unexpected = model.load_state_dict(parameters, strict=False)
        absent = set(missing) - {name for name, _ in model.named_buffers(remove_duplicate=False)}
        if unexpected or absent:
            raise ValueError(f"parameters do not fit: unexpected {unexpected}, absent {sorted(absent)}")
    return model


def set_inference_mode(model: EquiformerV2, as_shipped: bool) -> None:
    """Its forward re-enables gradients inside `no_grad`, unless `direct_forces` says that it needs none."""
    model.direct_forces = 0 if as_shipped else 1


def edges(model: EquiformerV2, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`edge_index [2, E]` (source, target) and `vectors [E, 3]` (Å) of the graph that the forward uses."""
    graph = model.generate_graph(batch, enforce_max_neighbors_strictly=model.enforce_max_neighbors_strictly)
    return graph.edge_index, graph.edge_distance_vec
