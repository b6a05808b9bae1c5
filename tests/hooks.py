"""Runs with something of a test's own in Lightning's hooks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl

from equiformer2.training.run import RunConfig


class Hooks(pl.Callback):
    """A callback made of functions, by the name of the hook."""

    def __init__(self, **hooks: Callable[..., None]) -> None:
        for name, hook in hooks.items():
            setattr(self, name, hook)


def with_hooks(config: RunConfig, **hooks: Callable[..., None]) -> RunConfig:
    """The run with these hooks beside its own callbacks."""
    return replace(config, trainer={**config.trainer, "callbacks": [Hooks(**hooks)]})


def fails(error: BaseException) -> Callable[..., None]:
    """A hook that raises `error`."""

    def fail(*_: Any) -> None:
        raise error

    return fail
