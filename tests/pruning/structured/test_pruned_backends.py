"""Pruned networks on every backend."""

import dataclasses

import pytest
import torch
from model_helpers import batch_of, cluster, lone_atom, loss_of, random_model
from plans import MANY, config_of
from torch import Tensor

from equiformer2 import EquiformerV2
from equiformer2.kernels.cpu import library
from equiformer2.model import compiled
from equiformer2.pruning import BlockPlan
from equiformer2.pruning.structured.apply import shrink

# Two unequal blocks with lower degrees and orders; one branch of the second is missing.
PLAN = dataclasses.replace(
    MANY, blocks=(MANY.blocks[0], BlockPlan(lmax=1, mmax=0, heads=(1,), feed_forward=False))
)


def with_gradients(model: EquiformerV2) -> dict[str, Tensor]:
    out = model(batch_of(cluster(), lone_atom()))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss_of(out), list(trained.values()))
    return {name: value.detach() for name, value in (out | dict(zip(trained, grads, strict=True))).items()}


@pytest.mark.parametrize(
    "backend", ["cpp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("compile", "triton"))]
)
def test_same_answers_and_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if not torch.cuda.is_available():
            monkeypatch.setenv("TRITON_INTERPRET", "1")
    elif backend == "cpp":
        if library.Compiler.find() is None:
            pytest.skip(library.NO_COMPILER)
    else:
        # Traced as for inductor, but without a C++ compiler.
        monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    config = config_of(grid_resolution=8, num_distance_basis=8, max_neighbors=3)
    model = shrink(random_model(config), PLAN)
    model.backend = "torch"
    expected = with_gradients(model)
    model.backend = backend
    for name, value in with_gradients(model).items():
        scale = expected[name].abs().max().clamp(min=1e-3)
        assert (value - expected[name]).abs().max() <= 2e-5 * scale, name
