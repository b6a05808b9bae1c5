"""Optimizer and learning-rate schedule of the paper: AdamW, linear warm-up, cosine decay."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from equiformer2.errors import InputError
from equiformer2.training.config_values import check_finite

#: Where torch 2.6 and later have a fused AdamW.
_FUSED_DEVICES = {"cuda", "cpu", "xpu", "mps"}


@dataclass(frozen=True)
class OptimSettings:
    """AdamW and its schedule; the defaults are the paper's for OC20 S2EF-2M (Table 7).

    Args:
        lr: largest learning rate, reached at the end of the warm-up.
        weight_decay: AdamW's decoupled decay; 0 for what the model names in `no_weight_decay()`.
        betas: AdamW's running-average coefficients.
        warmup_epochs: length of the linear warm-up in epochs; fractions allowed.
        warmup_factor: share of `lr` that the warm-up starts from.
        lr_min_factor: share of `lr` at the end of the cosine.
        schedule: `cosine` or `constant` (both after the warm-up).
        clip_grad_norm: largest Euclidean norm of all gradients together; longer ones are scaled down.
    """

    lr: float = 2e-4
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 0.1
    warmup_factor: float = 0.2
    lr_min_factor: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_grad_norm: float = 100.0

    def __post_init__(self) -> None:
        check_finite(vars(self), "optim")
        for name in ("lr", "clip_grad_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"optim.{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "warmup_epochs"):
            if not getattr(self, name) >= 0:
                raise InputError(f"optim.{name} must not be negative, it is {getattr(self, name)}")
        for name in ("warmup_factor", "lr_min_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"optim.{name} is a share of optim.lr from 0 to 1, not {getattr(self, name)}"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas must be at least 0 and below 1, not {list(self.betas)}")
        if self.schedule not in ("cosine", "constant"):
            raise InputError(f"optim.schedule is 'cosine' or 'constant', not '{self.schedule}'")


def build_optimizer(model: nn.Module, settings: OptimSettings) -> Optimizer:
    """Build AdamW over the trainable parameters; those in `model.no_weight_decay()` do not decay.

    One fused kernel updates everything, where torch has one for the device.
    """
    skip: set[str] = model.no_weight_decay()  # type: ignore[operator]
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if name not in skip], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in named if name in skip], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        fused=all(p.device.type in _FUSED_DEVICES for _, p in named),
    )


def build_schedule(
    optimizer: Optimizer,
    settings: OptimSettings,
    steps_per_epoch: float,
    total_steps: float,
    elapsed_fraction: Callable[[], float] | None = None,
) -> LambdaLR:
    """Build the learning-rate schedule, per optimizer step.

    Args:
        optimizer: whose learning rates are scaled.
        settings: shape of the schedule.
        steps_per_epoch: optimizer steps per epoch, for the length of the warm-up.
        total_steps: optimizer steps of the whole run; infinite when only time limits it.
        elapsed_fraction: share of the time budget used so far, in runs limited by time alone.

    Raises:
        InputError: a cosine over a run that has no end.
    """
    if math.isinf(total_steps) and elapsed_fraction is None and settings.schedule == "cosine":
        raise InputError(
            "the cosine schedule needs the length of the run: set trainer.max_epochs, trainer.max_steps or "
            "trainer.max_time, or optim.schedule: constant"
        )
    warmup_steps = settings.warmup_epochs * steps_per_epoch if math.isfinite(steps_per_epoch) else 0.0

    def factor(step: int) -> float:
        if math.isfinite(total_steps):
            progress = step / max(total_steps, 1)
        else:
            progress = elapsed_fraction() if elapsed_fraction is not None else 0.0
        if step <= warmup_steps and warmup_steps > 0:
            warmed = step / warmup_steps
            return settings.warmup_factor * (1.0 - warmed) + warmed
        if settings.schedule == "constant":
            return 1.0
        # The reference's cosine (fairchem-core 1.10 `CosineLRLambda`) runs over the whole run and is not
        # shifted by the warm-up.
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return settings.lr_min_factor + (1.0 - settings.lr_min_factor) * cosine

    return LambdaLR(optimizer, factor)


def apply_settings(
    optimizer: Optimizer, schedule: LambdaLR, model: nn.Module, settings: OptimSettings
) -> None:
    """Apply `settings` to an optimizer and a schedule that were restored from a checkpoint.

    Where these are the checkpoint's own nothing changes.
    """
    fresh = build_optimizer(model, settings).param_groups
    for group, new, factor in zip(optimizer.param_groups, fresh, schedule.lr_lambdas, strict=True):
        group["betas"], group["weight_decay"] = new["betas"], new["weight_decay"]
        if group["initial_lr"] != new["lr"]:
            group["initial_lr"] = new["lr"]
            group["lr"] = new["lr"] * factor(schedule.last_epoch)
    schedule.base_lrs = [new["lr"] for new in fresh]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Take one step of the exponential moving average: `average = decay * average + (1 - decay) * model`.

    Args:
        average: network of averaged weights, changed in place.
        model: network in training.
        decay: share of the average that stays.
    """
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True)
        if theirs.requires_grad
    ]
    if pairs:
        torch._foreach_lerp_([mine for mine, _ in pairs], [theirs for _, theirs in pairs], 1.0 - decay)
    for (name, mine), theirs in zip(average.named_buffers(), model.buffers(), strict=True):
        # Buffers of the network are constants, those of a parametrization may be states of its own.
        if "parametrizations." in name:
            mine.copy_(theirs)


def average_decay(decay: float, step: int, warmup: bool) -> float:
    """Compute the decay of the average after optimizer step `step` (counted from 1).

    With `warmup` it starts small and approaches `decay` (`min(decay, (1 + step) / (10 + step))`, as in
    TensorFlow's moving averages), so that short runs do not average over their initial weights.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
