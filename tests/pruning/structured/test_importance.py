"""Importance of heads, channels and branches against finite differences of gates put in by hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_helpers import cluster, random_model, slab, small_config
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.errors import InputError
from equiformer2.pruning.structured.importance import (
    UNITS,
    gradient_importance,
    labelled,
    magnitude_importance,
    probe,
)

NORMALIZERS = Normalizers(energy=Normalizer(-0.7, 2.0), forces=Normalizer(0.0, 2.5))
STEP = 1e-5


def objective(out: dict[str, Tensor], batch: Batch) -> Tensor:
    weights = torch.linspace(-1, 1, out["forces"].numel(), dtype=out["forces"].dtype)
    return out["energy"].sum() + (out["forces"].flatten() * weights).sum()


def scaled(x: Tensor, index: Any, factor: float) -> Tensor:
    x = x.clone()
    x[index] *= factor
    return x


def difference(model: EquiformerV2, structure: Any, hook: Callable[[float], list[Any]]) -> float:
    """Central difference of the objective with respect to what `hook(factor)` scales."""
    model.backend = "torch"  # calls every module that a hook may be on
    values = []
    for factor in (1 + STEP, 1 - STEP):
        handles = hook(factor)
        with torch.no_grad():
            batch = Batch.from_data_list([structure])
            values.append(float(objective(model(batch), batch)))
        for handle in handles:
            handle.remove()
    return (values[0] - values[1]) / (2 * STEP)


def multiplied(out: Any, factor: float) -> Any:
    """The output of a branch (of attention with its weights) times a factor."""
    return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor


def gates(block: Any, unit: str, index: int) -> Callable[[float], list[Any]]:
    """Hooks that scale what one unit contributes."""
    attention = block.ga

    def put(factor: float) -> list[Any]:
        if unit == "heads":
            return [
                attention.alpha_dropout.register_forward_hook(
                    lambda m, a, out: scaled(out, (slice(None), index), factor)
                )
            ]
        if unit == "attn_hidden":
            return [
                attention.activation.register_forward_hook(
                    lambda m, a, out: scaled(out, (..., index), factor)
                )
            ]
        if unit == "branches":
            branch = (block.ga, block.ffn)[index]
            return [branch.register_forward_hook(lambda m, a, out: multiplied(out, factor))]
        layer = attention.proj if unit == "values" else block.ffn.so3_linear_2
        return [layer.register_forward_pre_hook(lambda m, a: (scaled(a[0], (..., index), factor),))]

    return put


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_gate_act": True, "use_grid_mlp": False, "use_m_share_rad": True, "mmax": 2},
        {"use_sep_s2_act": False, "lmax": 3, "mmax": 2},
    ],
    ids=["default", "gates", "plain S2"],
)
def test_derivative_of_every_gate(options: dict[str, Any]) -> None:
    model = random_model(small_config(**options), torch.float64)
    structure = cluster(torch.float64)
    found = gradient_importance(model, [structure], objective)
    for number, block in enumerate(model.blocks):
        for unit in UNITS:
            values = getattr(found, unit)[number]
            assert len(values) > 1
            for index in {0, len(values) - 1}:
                expected = abs(difference(model, structure, gates(block, unit, index)))
                assert float(values[index]) == pytest.approx(expected, rel=1e-5, abs=1e-8), (unit, index)


def test_taylor_adds_what_makes_the_unit() -> None:
    model = random_model(dtype=torch.float64)
    structure = cluster(torch.float64)
    found = gradient_importance(model, [structure], objective, method="taylor")
    attention = model.blocks[1].ga

    def whole_channel(factor: float) -> list[Any]:
        """Both sides of an attention hidden channel: in front of the activation and behind it."""
        return [
            attention.activation.register_forward_pre_hook(
                lambda m, a: (*(scaled(x, (..., 2), factor) for x in a[:2]), *a[2:])
            ),
            *gates(model.blocks[1], "attn_hidden", 2)(factor),
        ]

    expected = abs(difference(model, structure, whole_channel))
    assert float(found.attn_hidden[1][2]) == pytest.approx(expected, rel=1e-5)

    class Restore:
        def __init__(self, before: Tensor) -> None:
            self.before = before

        def remove(self) -> None:
            attention.alpha_dot.data.copy_(self.before)

    def whole_head(factor: float) -> list[Any]:
        """Attention vector, its weights, and the values twice (made and read)."""
        restore = Restore(attention.alpha_dot.detach().clone())
        attention.alpha_dot.data[1] *= factor
        return [
            restore,
            attention.alpha_norm.register_forward_pre_hook(
                lambda m, a: (scaled(a[0], (slice(None), 1), factor),)
            ),
            *gates(model.blocks[1], "heads", 1)(factor),
            *gates(model.blocks[1], "heads", 1)(factor),
        ]

    expected = abs(difference(model, structure, whole_head))
    assert float(found.heads[1][1]) == pytest.approx(expected, rel=1e-5)


def test_a_unit_that_nothing_reads_has_no_importance() -> None:
    model = random_model()
    with torch.no_grad():
        model.blocks[0].ga.proj.weight[:, :, :3] = 0  # the values of head 0
        model.blocks[1].ffn.so3_linear_2.weight[:, :, 4] = 0
    found = gradient_importance(model, [cluster()], objective)
    assert float(found.heads[0][0]) == 0
    assert float(found.heads[0][1]) > 0
    assert float(found.ffn_hidden[1][4]) == 0
    assert int((found.ffn_hidden[1] > 0).sum()) == 9


def test_mean_of_absolute_values_over_structures() -> None:
    model = random_model(dtype=torch.float64)
    first, second = cluster(torch.float64), slab(torch.float64)
    together = gradient_importance(model, [first, second], objective)
    apart = [gradient_importance(model, [structure], objective) for structure in (first, second)]
    for unit in UNITS:
        for block in range(2):
            mean = sum(getattr(one, unit)[block] for one in apart) / 2
            torch.testing.assert_close(getattr(together, unit)[block], mean)


def test_the_network_is_left_as_it_was() -> None:
    model = random_model().train()
    model.blocks[0].requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    structure = cluster()
    structure.fixed = torch.arange(7) < 3
    gradient_importance(model, [structure], probe(NORMALIZERS))
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())


def test_objectives() -> None:
    model = random_model()
    structure = cluster()
    structure.fixed = torch.arange(7) < 3
    structure.energy, structure.forces = torch.tensor([0.3]), torch.ones(7, 3)
    once = gradient_importance(model, [structure], probe(NORMALIZERS, seed=3))
    again = gradient_importance(model, [structure], probe(NORMALIZERS, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(once.heads, again.heads, strict=True))
    trained = gradient_importance(model, [structure], labelled(NORMALIZERS))
    assert all(bool((values > 0).all()) for values in trained.heads)
    structure.fixed = torch.ones(7, dtype=torch.bool)  # nothing but the energy is left
    for choice in (probe(NORMALIZERS), labelled(NORMALIZERS)):
        assert bool((gradient_importance(model, [structure], choice).heads[0] > 0).all())


def test_magnitude_is_the_norm_of_the_weights() -> None:
    model = random_model()
    before = magnitude_importance(model)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(2)
    after = magnitude_importance(model)
    for unit in UNITS:
        for block in range(2):
            torch.testing.assert_close(getattr(after, unit)[block], 2 * getattr(before, unit)[block])


def test_no_structures() -> None:
    with pytest.raises(InputError, match="no structures"):
        gradient_importance(random_model(), [], objective)
