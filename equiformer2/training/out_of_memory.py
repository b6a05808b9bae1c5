"""Out of memory: which batch did not fit, and what to change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.training.task import S2EFTask

#: What torch, oneDNN, cuBLAS and the CUDA driver say in a RuntimeError of no class of its own.
_SAY_SO = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "could not create a memory object",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAY_SO)


class BatchAtWork(Callback):
    """Remembers the batch that is worked on, so that running out of memory can be explained."""

    def __init__(self) -> None:
        self._work: tuple[str, Batch] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._work = f"at training step {trainer.global_step}", batch

    def on_train_batch_end(self, *_: Any) -> None:
        self._work = None

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._work = "in validation", batch

    def on_validation_batch_end(self, *_: Any) -> None:
        self._work = None

    @contextmanager
    def named(self, task: S2EFTask) -> Iterator[None]:
        """Inside, running out of memory during a batch is an error that describes the batch.

        Raises:
            InputError: with the batch's sizes and the keys to change.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if self._work is None or not is_out_of_memory(error):
                raise
            where, batch = self._work
            change = "lower data.max_edges or data.batch_size"
            if not task.settings.activation_checkpointing:
                change += ", or set task.activation_checkpointing: true"
            raise InputError(
                f"out of memory {where}, in a batch of {_sizes(batch, task)}: {change}"
            ) from error


def _sizes(batch: Batch, task: S2EFTask) -> str:
    sizes = f"{batch.num_graphs:,} structures, {batch.pos.shape[0]:,} atoms"
    try:
        edges = task.model.build_graph(batch.cpu()).distances.shape[0]  # type: ignore[operator]
    except (RuntimeError, MemoryError, AttributeError):
        # No memory for this either; or tests' stand-in for the network.
        return sizes
    return f"{sizes}, {edges:,} edges"
