"""Running out of memory names the batch and what to change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.training.callbacks import is_out_of_memory
from equiformer2.training.configuration import parse
from equiformer2.training.run import train
from equiformer2.training.task import S2EFTask
from tests.hooks import fails, with_hooks

PIB = 2**50


def allocate(*_: Any) -> None:
    torch.empty(PIB, dtype=torch.uint8)


def test_the_allocators_own_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as error:
        allocate()
    assert is_out_of_memory(error.value)
    for found in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        assert is_out_of_memory(found)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")):
        assert not is_out_of_memory(other)


def run(arguments: list[str], folder: Path, *more: str, **hooks: Callable[..., None]) -> None:
    config = parse([*arguments, f"--runs_dir={folder}", "--name=run", "--trainer.max_epochs=1", *more])
    train(with_hooks(config, **hooks))


def test_a_training_batch_is_named(tmp_path: Path, tiny_arguments: list[str]) -> None:
    seen: list[tuple[int, int, int]] = []
    batches: list[Batch] = []

    def note(trainer: pl.Trainer, task: S2EFTask, batch: Batch, number: int) -> None:
        batches.append(batch)

    def backward(trainer: pl.Trainer, task: S2EFTask, loss: torch.Tensor) -> None:
        edges = len(task.model.build_graph(batches[-1]).distances)  # type: ignore[operator]
        seen.append((batches[-1].num_graphs, len(batches[-1].pos), edges))
        allocate()

    with pytest.raises(InputError) as error:
        run(tiny_arguments, tmp_path, on_train_batch_start=note, on_before_backward=backward)
    structures, atoms, edges = seen[0]
    message = str(error.value)
    assert message.startswith("out of memory at training step 0")
    for part in (f"{structures} structures", f"{atoms:,} atoms", f"{edges:,} edges", "data.max_edges"):
        assert part in message
    assert "task.activation_checkpointing: true" in message
    assert edges > atoms


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_validation_batch_is_named(error: Exception, tmp_path: Path, tiny_arguments: list[str]) -> None:
    limits = ("--task.activation_checkpointing=true", "--trainer.limit_train_batches=1")
    with pytest.raises(
        InputError, match=r"^out of memory in validation, in a batch of 5 .* data\.batch_size$"
    ):
        run(tiny_arguments, tmp_path, *limits, on_validation_batch_end=fails(error))


def test_other_errors_stay_as_they_are(tmp_path: Path, tiny_arguments: list[str]) -> None:
    error = RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes cannot"):
        run(tiny_arguments, tmp_path, on_before_backward=fails(error))
