"""Runs that are killed before a step."""

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl

from equiformer2.training.run import RunConfig, train


class KilledError(Exception):
    pass


class Killer(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


def train_until_killed(config: RunConfig, step: int) -> None:
    """Train with the callbacks of `config` and kill the run after `step` optimizer steps."""
    callbacks = config.trainer["callbacks"]
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    with pytest.raises(KilledError):
        train(replace(config, trainer=config.trainer | {"callbacks": [*callbacks, Killer(step)]}))
