"""Length, batch size and learning rate of a fine-tuning, by number of frames, network and time."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch_geometric.data import Batch

from equiformer2.devices import usable_device
from equiformer2.finetuning.frames import Frames
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.model.parameters import count_parameters

DEFAULT_MINUTES = 18.0
"""Time that the whole command may take on this machine, table included."""
_VALIDATIONS, _FEWEST, _VALIDATION_SHARE = 12, 2, 0.25
"""Validations of a training, fewer where they would take more than this share of the time."""
UNLIMITED = 1e9
"""Seconds that no training needs."""
STARTUP_SECONDS = 8.0
"""Seconds that a training takes beside its steps: reading, checking, checkpoints and figures."""
# A run sees its frames 60 times when they are few and 5 times when they are many.
_FRAME_VISITS, _MOST_VISITS, _LEAST_VISITS = 12_000, 60.0, 5.0
_LEAST_STEPS = 10
# Where the time is short, many small steps bring more than few large ones, and so do larger ones
# (docs/results/own_data.md, other systems of OC20).
_ENOUGH_STEPS, _SMALLEST_BATCH = 300, 2
_SHORT, _SHORT_FASTER = 0.5, 2.0
_LARGE = 10_000_000
_ADAPTER_FASTER = 4.0
"""Learning rate of an adapter over that of weights: a weight moves by products of its two small factors."""
_PROBES, _PROBE_SIZE = 2, 4
"""Batches that are timed, and structures of each: one alone takes up to twice its share of a batch."""
_MARGIN = 1.5
"""Measured times are those of a quiet moment; shared processors slow down by half under minutes of load."""


@dataclass(frozen=True)
class Speed:
    """Measured seconds per structure of a pass with gradients and an update, and of one without."""

    training: float
    evaluation: float


@dataclass(frozen=True)
class Schedule:
    """Settings of one training.

    Attributes:
        frames: to train on, replay included.
        batch_size: structures per step.
        steps: optimizer steps.
        interval: steps between validations.
        patience: validations without a better one after which the training ends.
        learning_rate: largest, for a network from a checkpoint.
        scratch_learning_rate: the same for one from random weights.
        seconds: estimated time of one training, validations included.
        wanted: steps without a limit of time.
    """

    frames: int
    batch_size: int
    steps: int
    interval: int
    patience: int
    learning_rate: float
    scratch_learning_rate: float
    seconds: float
    wanted: int

    @property
    def visits(self) -> float:
        """Times that a training sees every frame."""
        return self.steps * self.batch_size / self.frames

    def describe(self) -> str:
        """Describe the choice and its reason."""
        text = (
            f"{self.steps} steps of {self.batch_size} frames ({self.visits:.1f} times each of "
            f"{self.frames}), "
            f"learning rate {self.learning_rate:g}, a validation every {self.interval} steps, early stop "
            "after "
            f"{self.patience} without a better one"
        )
        if self.steps < self.wanted:
            text += f"; {self.wanted} steps would be usual, and the time allows these (--max-minutes)"
        return text


def choose_schedule(
    config: ModelConfig,
    frames: int,
    watched: int,
    speed: Speed,
    seconds: float,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    adapts: bool = False,
) -> Schedule:
    """Choose the settings of one training.

    Args:
        config: of the network.
        frames: to train on, replay included.
        watched: frames of the validation set.
        speed: measured.
        seconds: time for this training.
        steps: given by the user, and then not limited by the time.
        batch_size: given by the user.
        learning_rate: given by the user.
        adapts: whether an adapter is trained and not the weights.
    """
    visits = min(max(_FRAME_VISITS / frames, _LEAST_VISITS), _MOST_VISITS)
    check = _MARGIN * watched * speed.evaluation
    affordable = int(_VALIDATION_SHARE * seconds / max(check, 1e-9))
    validations = min(max(affordable, _FEWEST), _VALIDATIONS)
    checks = validations * check
    possible_frames = (seconds - checks) / (_MARGIN * speed.training)
    size = batch_size or min(2 if frames < 50 else 4 if frames < 2000 else 8, frames)
    if batch_size is None and steps is None:
        while size > _SMALLEST_BATCH and possible_frames / size < min(_ENOUGH_STEPS, visits * frames / size):
            size //= 2
    wanted = max(_LEAST_STEPS, math.ceil(visits * frames / size))
    length = steps or max(_LEAST_STEPS, min(wanted, int(possible_frames / size)))
    large = count_parameters(config) > _LARGE
    rate = 1e-4 if large else 5e-4
    if adapts:
        rate *= _ADAPTER_FASTER
    elif not large and steps is None and length < _SHORT * wanted:
        rate *= _SHORT_FASTER
    return Schedule(
        frames=frames,
        batch_size=size,
        steps=length,
        interval=max(1, math.ceil(length / validations)),
        patience=max(_FEWEST, validations // 2),
        learning_rate=learning_rate or rate,
        scratch_learning_rate=4e-4 if large else 1e-3,
        seconds=length * _MARGIN * size * speed.training + checks,
        wanted=steps or wanted,
    )


def divide_time(seconds: float, wanted: Sequence[float]) -> float:
    """Limit the time of every training so that all together take so many seconds.

    A training that wants less than the others leaves them the rest.

    Args:
        seconds: for all trainings.
        wanted: time of each without a limit, s; at least one.

    Returns:
        The most that a training may take, s.
    """
    left = sorted(wanted)
    while left and seconds / len(left) > left[0]:
        seconds -= left.pop(0)
    return seconds / len(left) if left else UNLIMITED


def measure_speed(model: EquiformerV2, frames: Frames, rows: np.ndarray, device: str) -> Speed:
    """Time passes over batches of frames of all sizes, after one that does not count.

    Args:
        model: a network of the size to train; its weights stay as they are.
        frames: all frames.
        rows: those to train on.
        device: to compute on.
    """
    where = usable_device(device)
    by_size = rows[np.argsort(frames.natoms[rows], kind="stable")]
    count = min(_PROBES * _PROBE_SIZE, len(by_size))
    # The middle of each of as many parts.
    chosen = by_size[((np.arange(count) + 0.5) * len(by_size) / count).astype(int)].tolist()
    parts = [part for first in range(_PROBES) if (part := chosen[first::_PROBES])]
    batches = [Batch.from_data_list([frames.dataset[row] for row in part]).to(where) for part in parts]
    model = model.to(where).train()
    taken: dict[bool, float] = {}
    for training in (True, False):
        model.train(training)
        _pass(model, batches[0], training)
        begin = time.perf_counter()
        for batch in batches:
            _pass(model, batch, training)
        taken[training] = (time.perf_counter() - begin) / count
    model.zero_grad(set_to_none=True)
    model.eval()
    return Speed(taken[True], taken[False])


def _pass(model: EquiformerV2, batch: Batch, training: bool) -> None:
    with torch.set_grad_enabled(training):
        out = model(batch.clone())
    if training:
        sum(value.sum() for value in out.values()).backward()  # type: ignore[union-attr]
    if batch.pos.is_cuda:
        torch.cuda.synchronize()
