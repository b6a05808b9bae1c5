"""Running out of memory names the batch and what to change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from equiformer2 import EquiformerV2
from equiformer2.errors import InputError
from equiformer2.training.callbacks import is_out_of_memory
from equiformer2.training.configuration import parse
from equiformer2.training.run import train
from equiformer2.training.task import S2EFTask

PIB = 2**50


def run(arguments: list[str], folder: Path, *more: str) -> None:
    train(parse([*arguments, f"--runs_dir={folder}", "--name=run", "--trainer.max_epochs=1", *more]))


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


def test_a_training_batch_is_named(
    tmp_path: Path, tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []

    def backward(task: S2EFTask, *_: Any) -> None:
        batch = batches[-1]
        edges = len(task.model.build_graph(batch).distances)  # type: ignore[operator]
        seen.append((batch.num_graphs, len(batch.pos), edges))
        allocate()

    batches: list[Batch] = []
    forward = EquiformerV2.forward

    def noting(model: EquiformerV2, batch: Batch, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        batches.append(batch)
        return forward(model, batch, *arguments, **named)

    monkeypatch.setattr(EquiformerV2, "forward", noting)
    monkeypatch.setattr(S2EFTask, "backward", backward)
    with pytest.raises(InputError) as error:
        run(tiny_arguments, tmp_path)
    structures, atoms, edges = seen[0]
    assert str(error.value) == (
        f"out of memory at training step 0, in a batch of {structures} structures, {atoms:,} atoms, "
        f"{edges:,} edges: lower data.max_edges or data.batch_size, or set "
        "task.activation_checkpointing: true"
    )
    assert edges > atoms


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_validation_batch_is_named(
    error: Exception, tmp_path: Path, tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(S2EFTask, "validation_step", full)
    with pytest.raises(
        InputError, match=r"^out of memory in validation, in a batch of 5 .* data\.batch_size$"
    ):
        run(
            tiny_arguments,
            tmp_path,
            "--task.activation_checkpointing=true",
            "--trainer.limit_train_batches=1",
        )


def test_other_errors_stay_as_they_are(
    tmp_path: Path, tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(S2EFTask, "training_step", broken)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        run(tiny_arguments, tmp_path)
