"""In a step the host never waits for the device: nothing is read from a tensor, sizes are known.

Watched on a CPU, where waiting costs nothing but shows: whatever would read a value, or make a tensor whose
size depends on values, is refused. What has to wait is the search of edges, whose number nobody knows before
(counted below), and the check of the atomic numbers before it.
"""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from stand_in import StandIn
from tiny_checkpoint import TINY
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import Batch

from datasets_oc20 import OC20Lmdb
from datasets_oc20.datamodule import collate
from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.training.callbacks import Summary
from equiformer2.training.guard import FiniteGuard
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.optim import OptimSettings, update_average
from equiformer2.training.resume import ResumeCheckpoint
from equiformer2.training.task import S2EFTask, TaskSettings
from tests.observed import observed

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


class Values(TorchDispatchMode):
    """Tells `seen` of operations that make the host wait, wherever in torch they come from."""

    def __init__(self, seen: Callable[[str], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        size_of_repeats = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in READS_VALUES or by_mask or size_of_repeats:
            self.seen(str(func))
        return func(*args, **(kwargs or {}))


class Host(TorchFunctionMode):
    """Tells `seen` of tensors that go to the host, which on a CPU is no operation at all."""

    def __init__(self, seen: Callable[[str], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        to_cpu = name == "to" and ("cpu" in args[1:] or kwargs.get("device") == "cpu")
        if name in TO_THE_HOST or (to_cpu and not kwargs.get("non_blocking")):
            self.seen(name)
            with torch._C.DisableTorchFunctionSubclass(), waiting_allowed():  # counted once
                return func(*args, **kwargs)
        return func(*args, **kwargs)


_allowed = 0


@contextmanager
def waiting_allowed() -> Iterator[None]:
    global _allowed
    _allowed += 1
    try:
        yield
    finally:
        _allowed -= 1


@contextmanager
def telling(seen: Callable[[str], None]) -> Iterator[None]:
    def tell(what: str) -> None:
        if not _allowed:
            seen(what)

    with Host(tell), Values(tell):
        yield


def refuse(what: str) -> None:
    raise AssertionError(f"{what} makes the host wait")


def never_waiting() -> AbstractContextManager[None]:
    return telling(refuse)


def may_wait(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with waiting_allowed():
            return function(*args, **kwargs)

    return call


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


NORMALIZERS = Normalizers(energy=Normalizer(2.5, 0.5), forces=Normalizer(0.0, 0.2))


class WaitsForEdges(EquiformerV2):
    """The network, whose edges may be waited for."""

    build_graph = may_wait(EquiformerV2.build_graph)
    _checked_numbers = may_wait(EquiformerV2._checked_numbers)


class UnreadGuard(FiniteGuard):
    """On a GPU the guard reads the verdict on a step during the next one."""

    def check(self) -> None:
        """Read nothing."""


class Watched(S2EFTask):
    """The task on a CPU, without what it does on the host in any case."""

    _corrupted = may_wait(S2EFTask._corrupted)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard = UnreadGuard()


class Unlogged(Watched):
    def _log_training(self, *_: Any) -> None:
        """Log nothing: there is no trainer."""


class WatchedSummary(Summary):
    on_train_batch_end = watched(Summary.on_train_batch_end)


class WatchedCheckpoint(ResumeCheckpoint):
    on_train_batch_end = watched(ResumeCheckpoint.on_train_batch_end)


def network(kind: type[EquiformerV2] = WaitsForEdges, **changes: Any) -> EquiformerV2:
    """With everything that only training has."""
    config = TINY | {"alpha_drop": 0.1, "drop_path_rate": 0.1, "proj_drop": 0.1, "num_layers": 2, **changes}
    return kind(ModelConfig(**config))


def some_batch(lmdb_path: Path, *numbers: int) -> Batch:
    return collate([OC20Lmdb(lmdb_path)[number] for number in numbers])


def task_of(model: nn.Module, kind: type[S2EFTask] = Watched, **settings: Any) -> S2EFTask:
    settings = {"backend": "torch", **settings}
    normalizers = NORMALIZERS.for_gradient() if model.config.forces == "gradient" else NORMALIZERS  # type: ignore[union-attr]
    return kind(model, normalizers, "adsorption", TaskSettings(**settings), OptimSettings(), seed=7)


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_a_step_reads_nothing_from_the_device(
    tmp_path: Path, lmdb_path: Path, settings: dict[str, Any]
) -> None:
    task = task_of(StandIn())
    data = ResumableDataModule(
        train=str(lmdb_path), val=str(lmdb_path), energy_kind="adsorption", batch_size=3, seed=7
    )
    watch = Watch()
    trainer = pl.Trainer(
        max_steps=6,
        accelerator="cpu",
        callbacks=[watch, WatchedSummary(), WatchedCheckpoint(tmp_path / "last.ckpt")],
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=100,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(task, datamodule=data)
    assert watch.steps == (11 if "accumulate_grad_batches" in settings else 6)  # seven in an epoch


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({}, {"activation_checkpointing": True}),
        ({"forces": "none"}, {}),
        ({"forces": "gradient"}, {}),
        ({"forces": "gradient", "stress": True}, {"stress_coefficient": 1.0}),
        ({"dens": True}, {"dens": {"probability": 1.0}}),
        ({"smooth_cutoff": True, "norm_type": "rms_norm_sh", "use_swiglu_s2_act": True}, {}),
    ],
    ids=["direct", "checkpointing", "energy", "gradient", "stress", "dens", "v3"],
)
def test_the_network_reads_nothing_from_the_device(
    lmdb_path: Path, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    task = task_of(network(**changes), Unlogged, **settings).train()
    task._trainer = SimpleNamespace(accumulate_grad_batches=1, current_epoch=0, global_step=0, global_rank=0)  # type: ignore[assignment]
    batch = some_batch(lmdb_path, 0, 7, 13)
    if "stress" in changes:
        batch.stress = torch.zeros(3, 3, 3)
    task.training_step(batch, 0)  # constants are computed once
    with never_waiting():
        task.training_step(batch, 1).backward()
        update_average(task.averaged, task.model, 0.9)  # type: ignore[arg-type]
    assert any(parameter.grad is not None for parameter in task.model.parameters())
    with torch.inference_mode(), never_waiting():
        task.eval().validation_step(batch, 0)
    assert task.val_metrics.compute()["energy_mae"] > 0


@pytest.mark.parametrize("strict", [True, False])
def test_the_search_of_edges_waits_three_times(
    lmdb_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    module = sys.modules["equiformer2.graph.radius_graph"]  # the function of this name hides it
    monkeypatch.setattr(module, "on_device", lambda _: True)  # as on a GPU
    model = network(max_neighbors=5, enforce_max_neighbors_strictly=strict)
    for numbers in ([0], [0, 7], [0, 7, 13, 19]):
        seen: list[str] = []

        def note(name: str, seen: list[str] = seen) -> None:
            if all(frame.name != "_on_host" for frame in traceback.extract_stack()):
                seen.append(name)

        batch = some_batch(lmdb_path, *numbers)
        with telling(note), observed(module._on_host) as input_read:
            graph = EquiformerV2.build_graph(model, batch)  # `model` lets its own wait
        assert len(graph.distances) > 4 * len(batch.pos)
        # The input for its checks; how many pairs there are; how many edges are tied and stay.
        assert len(input_read) + len(seen) == 3, seen


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
        lambda x: torch.repeat_interleave(torch.arange(1), x[None].long()),
    ],
)
def test_waiting_is_noticed(waits: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError), never_waiting():
        waits(torch.tensor(1.0))
