"""Tiny networks of experts and files of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from model_helpers import random_model, small_config

from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.checkpoint.expert_files import ExpertContents, TaskInfo, write_experts
from equiformer2.checkpoint.samples import Samples
from equiformer2.experts import ExpertNetwork, ExpertSettings

TASKS = ("dft", "teacher")
NORMALIZERS = {
    "dft": Normalizers(Normalizer(-0.7, 2.0), Normalizer(0.0, 2.5)),
    "teacher": Normalizers(Normalizer(1.5, 3.0), Normalizer(0.0, 2.5), torch.linspace(-5, 5, 90)),
}
KINDS = {"dft": "adsorption", "teacher": "total"}


def network(
    num_experts: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> ExpertNetwork:
    """Experts that differ much, with other heads for both tasks and a gate that prefers some experts."""
    config = {"num_layers": 1, "grid_resolution": 6, "max_neighbors": 6} | changes
    plain = random_model(small_config(**config), dtype, seed)
    settings = ExpertSettings(num_experts=num_experts, channels=6, hidden_channels=8, spread=0.5)
    experts = ExpertNetwork(plain, settings, TASKS, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for stack in experts.task_weights().values():
            stack[1] += 0.2 * torch.randn(stack[1].shape, generator=generator)
        experts.gate.out.weight.mul_(8)
    return experts


def compositions(num_elements: int = 90) -> dict[str, torch.Tensor]:
    """Mean compositions of the training data of both tasks."""
    found = {}
    for name, shares in (("dft", {29: 0.75, 8: 0.25}), ("teacher", {78: 0.5, 29: 0.5})):
        found[name] = torch.zeros(num_elements, dtype=torch.float64)
        for number, share in shares.items():
            found[name][number] = share
    return found


def contents_of(
    experts: ExpertNetwork,
    source: str = "tiny.safetensors",
    samples: Mapping[str, Samples] | None = None,
) -> ExpertContents:
    return ExpertContents(
        source=source,
        config=experts.config,
        settings=experts.settings.to_dict(),
        tasks={
            name: TaskInfo(
                name,
                KINDS[name],
                NORMALIZERS[name],
                compositions()[name],
                {"frames": 7},  # type: ignore[arg-type]
                None if samples is None else samples.get(name),
            )
            for name in TASKS
        },
        weights={"raw": experts.weights()},
        provenance={"origin": "random weights"},
        experts=tuple(range(experts.settings.num_experts)),
    )


def write_network(path: Path, experts: ExpertNetwork) -> Path:
    write_experts(path, contents_of(experts, str(path)))
    return path
