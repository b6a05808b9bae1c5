"""Which validation `best.pt` is of."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in import StandIn

from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.training.callbacks import NativeCheckpoints
from equiformer2.training.optim import OptimSettings
from equiformer2.training.task import S2EFTask, TaskSettings


def test_a_metric_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    written: list[tuple[int, str]] = []

    class Noted(NativeCheckpoints):
        def _save(self, trainer: Any, task: Any, path: Path, values: Any) -> None:
            written.append((trainer.global_step, path.name))

    units = Normalizers(energy=Normalizer(2.5, 0.5), forces=Normalizer(0.0, 0.2))
    task = S2EFTask(StandIn(), units, "adsorption", TaskSettings(), OptimSettings())
    callback = Noted(tmp_path, {})
    for step, error in enumerate([float("nan"), 0.5, float("nan"), 0.7, 0.4]):
        logged = {"val/forces_mae": torch.tensor(error)}
        trainer: Any = SimpleNamespace(sanity_checking=False, global_step=step, callback_metrics=logged)
        callback.on_validation_end(trainer, task)
    assert [step for step, name in written if name == "best.pt"] == [0, 1, 4]
    assert callback.best_score == pytest.approx(0.4)
