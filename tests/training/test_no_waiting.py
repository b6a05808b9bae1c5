"""In a training step the host never waits for the device: nothing is read from a tensor, sizes are known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from stand_in import StandIn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.training.callbacks import Summary
from equiformer2.training.guard import FiniteGuard
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.optim import OptimSettings
from equiformer2.training.resume import ResumeCheckpoint
from equiformer2.training.task import S2EFTask, TaskSettings

#: Operations that read a value, or whose result has a size that depends on values.
READS_VALUES = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "allclose",
    "_unique2",
    "is_nonzero",
}
TO_THE_HOST = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}


class NoValues(TorchDispatchMode):
    """Refuses what makes the host wait, wherever in torch it comes from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert name not in READS_VALUES, func
        assert not by_mask, func
        return func(*args, **(kwargs or {}))


class NoHost(TorchFunctionMode):
    """Refuses tensors that go to the host, which on a CPU is no operation at all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        assert name not in TO_THE_HOST, name
        if name == "to" and ("cpu" in args[1:] or kwargs.get("device") == "cpu"):
            assert kwargs.get("non_blocking"), "to the CPU, waiting"
        return func(*args, **kwargs)


@contextmanager
def never_waiting() -> Iterator[None]:
    with NoHost(), NoValues():
        yield


def watched(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with never_waiting():
            return function(*args, **kwargs)

    return call


class Watch(pl.Callback):
    """Watches forward, loss, backward, clipping, optimizer and average of every step."""

    steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimization = trainer.fit_loop.epoch_loop.automatic_optimization
        optimization.run = watched(optimization.run)  # type: ignore[method-assign]

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_a_step_reads_nothing_from_the_device(
    tmp_path: Path, lmdb_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    # On a GPU the guard reads the verdict on a step during the next one.
    monkeypatch.setattr(FiniteGuard, "check", lambda _: None)
    for callback in (Summary, ResumeCheckpoint):
        monkeypatch.setattr(callback, "on_train_batch_end", watched(callback.on_train_batch_end))
    normalizers = Normalizers(energy=Normalizer(2.5, 0.5), forces=Normalizer(0.0, 0.2))
    task = S2EFTask(StandIn(), normalizers, "adsorption", TaskSettings(), OptimSettings(), seed=7)
    data = ResumableDataModule(
        train=str(lmdb_path), val=str(lmdb_path), energy_kind="adsorption", batch_size=3, seed=7
    )
    watch = Watch()
    trainer = pl.Trainer(
        max_steps=6,
        accelerator="cpu",
        callbacks=[watch, Summary(), ResumeCheckpoint(tmp_path / "last.ckpt")],
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=100,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(task, datamodule=data)
    assert watch.steps == (11 if "accumulate_grad_batches" in settings else 6)  # seven in an epoch


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.item(),
        lambda x: float(x),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[None][x[None] > 0],
        lambda x: torch.nonzero(x[None]),
        lambda x: torch.allclose(x, x),
        lambda x: x if x > 0 else -x,
    ],
)
def test_waiting_is_noticed(waits: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError), never_waiting():
        waits(torch.tensor(1.0))
