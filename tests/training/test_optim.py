"""AdamW's groups, the schedule's shape, the moving average."""

import math

import pytest
import torch
from torch import nn

from equiformer2.errors import InputError
from equiformer2.training.optim import (
    OptimSettings,
    average_decay,
    build_optimizer,
    build_schedule,
    update_average,
)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def no_weight_decay(self) -> set[str]:
        return {"linear.bias"}


def reference_factor(step: int, warmup: float, total: int) -> float:
    # the published schedule with warmup_factor 0.2 and lr_min_factor 0.01
    if step <= warmup:
        return 0.2 * (1 - step / warmup) + step / warmup
    if step >= total:
        return 0.01
    return 0.01 + 0.5 * 0.99 * (1 + math.cos(math.pi * step / total))


def test_named_parameters_do_not_decay() -> None:
    model = Tiny()
    decayed, kept = build_optimizer(model, OptimSettings(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert decayed["params"] == [model.linear.weight]
    assert kept["weight_decay"] == 0.0
    assert kept["params"] == [model.linear.bias]


def test_the_fused_step_equals_the_plain_one() -> None:
    def after_20_steps(fused: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 13), nn.SiLU(), nn.Linear(13, 3))
        model.no_weight_decay = lambda: {"0.bias", "2.bias"}
        optimizer = build_optimizer(model, OptimSettings(lr=1e-2, weight_decay=0.1))
        assert all(group["fused"] for group in optimizer.param_groups)
        if not fused:
            groups = [{**group, "fused": False} for group in optimizer.param_groups]
            optimizer = torch.optim.AdamW(groups)
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(5, 7)).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    fused = after_20_steps(True)
    for value, again, plain in zip(fused, after_20_steps(True), after_20_steps(False), strict=True):
        assert torch.equal(value, again)
        torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)


def test_schedule_equals_the_reference() -> None:
    optimizer = build_optimizer(Tiny(), OptimSettings(lr=1.0))
    schedule = build_schedule(optimizer, OptimSettings(lr=1.0), steps_per_epoch=40, total_steps=120)
    for step in range(130):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(reference_factor(step, 4, 120), abs=1e-12)
        optimizer.step()
        schedule.step()


def test_schedule_follows_the_clock_when_only_time_limits_the_run() -> None:
    settings = OptimSettings(lr=1.0, warmup_epochs=0)
    clock = [0.0]
    optimizer = build_optimizer(Tiny(), settings)
    schedule = build_schedule(optimizer, settings, 10, math.inf, elapsed_fraction=lambda: clock[0])
    for clock[0], expected in ((0.5, 0.505), (1.0, 0.01), (1.2, 0.01)):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_cosine_needs_an_end() -> None:
    optimizer = build_optimizer(Tiny(), OptimSettings())
    with pytest.raises(InputError, match=r"trainer\.max_time"):
        build_schedule(optimizer, OptimSettings(), 10, math.inf)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"schedule": "linear"},
        {"betas": (0.9, 1.5)},
        {"warmup_factor": 7.0},
        {"lr_min_factor": -0.1},
    ],
)
def test_settings_name_the_wrong_key(wrong: dict) -> None:
    with pytest.raises(InputError, match=f"optim.{next(iter(wrong))}"):
        OptimSettings(**wrong)


def test_moving_average() -> None:
    average, model = Tiny(), Tiny()
    expected = 0.9 * average.linear.weight.detach() + 0.1 * model.linear.weight.detach()
    update_average(average, model, 0.9)
    torch.testing.assert_close(average.linear.weight.detach(), expected)


def test_average_warms_up_to_its_decay() -> None:
    assert average_decay(0.999, 1, warmup=True) == pytest.approx(2 / 11)
    assert average_decay(0.999, 100_000, warmup=True) == 0.999
    assert average_decay(0.999, 1, warmup=False) == 0.999
