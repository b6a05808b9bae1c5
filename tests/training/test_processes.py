"""Which strategies there are, what processes compare, and who answers signals."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from equiformer2.errors import InputError
from equiformer2.training.processes import fingerprint, settings_to_compare, strategy_of
from equiformer2.training.stopping import STOP_SIGNALS, StopRequest, leave_signals_to_stop_request
from equiformer2.training.task import TaskSettings


def trainer_keys(**changed: Any) -> dict[str, Any]:
    return {"strategy": "auto", "devices": "auto", "accelerator": "cpu", "num_nodes": 1, **changed}


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "ddp_spawn", object()])
def test_untested_strategies_are_refused(strategy: Any) -> None:
    with pytest.raises(
        InputError, match=r"trainer\.strategy is .*; only 'auto' and 'ddp' are supported"
    ) as error:
        strategy_of(trainer_keys(strategy=strategy))
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("changed", "several"),
    [
        ({}, False),
        ({"devices": 2}, True),
        ({"devices": "2"}, True),
        ({"devices": [0, 1]}, True),
        ({"devices": 1}, False),
        ({"devices": 1, "num_nodes": 2}, True),
        ({"devices": 1, "strategy": "ddp"}, True),
    ],
)
def test_ddp_is_for_several_processes(changed: dict[str, Any], several: bool) -> None:
    assert isinstance(strategy_of(trainer_keys(**changed)), DDPStrategy) == several


def test_a_given_ddp_strategy_is_kept() -> None:
    own = DDPStrategy(static_graph=True)
    assert strategy_of(trainer_keys(strategy=own)) is own


def test_what_processes_compare() -> None:
    found = settings_to_compare(task=TaskSettings(), data={"batch_size": 3, "callback": object()})
    assert found["task.monitor"] == "'forces_mae'"
    assert found["data.batch_size"] == "3"
    assert "data.callback" not in found
    sizes = np.arange(1, 9, dtype=np.int32)
    assert fingerprint(sizes) == fingerprint(sizes.astype(np.int64))
    assert fingerprint(sizes) != fingerprint(sizes[::-1])
    assert fingerprint(sizes).startswith("8 structures")


def test_signals_are_noted_and_given_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    request = StopRequest()
    request.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.agreed(torch.device("cpu")) == signal.SIGUSR1
    request.stop_listening()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_lightning_leaves_signals_alone(tmp_path: Path) -> None:
    # What is replaced must be what this version of Lightning calls.
    assert hasattr(_SignalConnector, "register_signal_handlers")
    if tuple(map(int, pl.__version__.split(".")[:2])) >= (2, 6):
        assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    leave_signals_to_stop_request(trainer)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before
