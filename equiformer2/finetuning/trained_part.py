"""Parts of a network that a fine-tuning changes, and the time that is left.

A way to train less than the whole network is a `TrainedPart`: a callback of the trainer that changes the task
in `setup`, before the optimizer is built, and describes itself. An adapter is attached by the trainer itself
(`training.adapter_part`).
"""

import logging
import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from equiformer2.adapters import AdapterSettings
from equiformer2.errors import InputError
from equiformer2.training.task import S2EFTask

log = logging.getLogger("equiformer2")

ALL_BLOCKS = "all"


class TrainedPart(Callback):
    """The full network: nothing is held."""

    def describe(self) -> str:
        """Name what is trained."""
        return "all weights"

    def holds(self, name: str) -> bool:
        """Tell whether the parameter `name` of the network is held."""
        return False


class FrozenBlocks(TrainedPart):
    """Hold the embeddings and the first blocks; train the other blocks, the last norm and the heads.

    Args:
        frozen: number of blocks, or `all` for every one.
        blocks: number of blocks of the network.

    Raises:
        InputError: the network has fewer blocks.
    """

    def __init__(self, frozen: str, blocks: int) -> None:
        if frozen != ALL_BLOCKS and not (frozen.isascii() and frozen.isdigit() and int(frozen) <= blocks):
            raise InputError(
                f"--freeze is {frozen}, and the network has {blocks} blocks: give a number from 0 to "
                f"{blocks}, "
                "or all to train the heads alone"
            )
        self.frozen = blocks if frozen == ALL_BLOCKS else int(frozen)
        self.blocks = blocks

    def describe(self) -> str:
        """Name what is trained and what is held."""
        if self.frozen == self.blocks:
            return "the last norm and the heads; embeddings and all blocks are held"
        held = f"the first {self.frozen} of {self.blocks} blocks" if self.frozen else "no block"
        return f"all but the embeddings and {held}, which are held"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hold the parameters before the optimizer collects those to train."""
        assert isinstance(pl_module, S2EFTask)
        for name, parameter in pl_module.model.named_parameters():
            if self.holds(name):
                parameter.requires_grad_(False)

    def holds(self, name: str) -> bool:
        """Tell whether the parameter `name` of the network is held."""
        top, _, rest = name.partition(".")
        if top == "blocks":
            return int(rest.partition(".")[0]) < self.frozen
        return top not in ("norm", "energy_block", "force_block", "dens")


class AdapterAlone(TrainedPart):
    """An adapter and the last layers of the heads; all weights are held by the trainer.

    Args:
        settings: of the adapter.
    """

    def __init__(self, settings: AdapterSettings) -> None:
        self.settings = settings

    def describe(self) -> str:
        """Name what is trained and what is held."""
        return f"{self.settings.describe()}, and the last layers of the heads; all other weights are held"


def trained_part(freeze: str | None, adapter: AdapterSettings | None, blocks: int) -> TrainedPart:
    """Choose the part of a network that is trained.

    Args:
        freeze: blocks to hold, or None.
        adapter: settings of an adapter, or None.
        blocks: number of blocks of the network.

    Raises:
        InputError: the network has fewer blocks.
    """
    if adapter is not None:
        return AdapterAlone(adapter)
    return TrainedPart() if freeze is None else FrozenBlocks(freeze, blocks)


class TimeLeft(Callback):
    """Log at every validation how long the training still takes.

    Args:
        after: estimated seconds of what follows this training in the same command.
    """

    def __init__(self, after: float) -> None:
        self._after = after
        self._begin, self._first = time.monotonic(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, also in a training that continues."""
        self._begin, self._first = time.monotonic(), trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the time that is left."""
        done, left = trainer.global_step - self._first, trainer.max_steps - trainer.global_step
        if trainer.sanity_checking or done <= 0 or left <= 0:
            return
        seconds = (time.monotonic() - self._begin) / done * left
        text = f"at most {spoken(seconds)} left of this training"
        if self._after:
            text += f", {spoken(seconds + self._after)} in all"
        log.info(text)


def spoken(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
