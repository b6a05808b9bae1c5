"""`last.ckpt`: from it a stopped run goes on as if nothing had happened."""

import logging
import random
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch_geometric.data import Batch

from equiformer2.training.loader import ResumableLoader
from equiformer2.training.resume_state import keep_under_step, remove_older, restoring
from equiformer2.training.stopping import StoppedBySignal, StopRequest, leave_signals_to_stop_request

log = logging.getLogger("equiformer2")

_VALIDATION_PROGRESS = "epoch_loop.val_loop.batch_progress"


class ResumeCheckpoint(Checkpoint):
    """`last.ckpt`, everything needed to continue, replaced atomically.

    Written after each validation (after each epoch without a validation set), every `every_n_steps`
    optimizer steps if given, when a limit of time or steps ends the run in the middle of an epoch, and when a
    signal of `STOP_SIGNALS` has come: then after the optimizer step (or in the validation) that is going on,
    and `StoppedBySignal` ends the run.

    Kept besides what Lightning keeps: the state of the global random generators (of the first process) and
    the metrics of the last step, which Lightning gives to the loggers only after its callbacks.

    Args:
        path: of `last.ckpt`.
        every_n_steps: see above.
        keep_last: how many checkpoints are kept; those before the last are `step_N.ckpt` beside it.
    """

    def __init__(self, path: Path, every_n_steps: int | None = None, keep_last: int = 1) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self._stop = StopRequest()
        self._saved_step = 0
        self._before_validation = False
        self._restored: dict[str, Any] = {}
        self._row: dict[str, float] = {}

    # ---- when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # The processes know each other by now. A signal before the first step is answered after it.
        if trainer.state.fn == TrainerFn.FITTING:
            leave_signals_to_stop_request(trainer)
            if not self._stop.listen(trainer.is_global_zero):
                log.info(
                    "not in the main thread, which alone hears signals: last.ckpt is written after "
                    "validations and every checkpoint_every_n_steps"
                )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop.stop_listening()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop.stop_listening()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning restores a loader's state while it sets the loader up, and `configure_optimizers` has it
        # set up, to count steps, before the loops know their state; so the position is restored here.
        loader = trainer.train_dataloader
        if isinstance(loader, ResumableLoader):
            loader.load_state_dict({"served": trainer.fit_loop.epoch_loop.batch_progress.current.ready})
        self._saved_step = trainer.global_step
        if self._restored and trainer.is_global_zero:
            with restoring(trainer.ckpt_path):
                _restore_random_state(self._restored)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved_step or _accumulates(trainer):
            return
        if _validation_follows(trainer):
            # A checkpoint of this moment would go on without the validation; it comes after that.
            return
        stop = self._stop.agreed(pl_module.device)
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if stop or due or trainer.should_stop or step == trainer.max_steps:
            self._row = _logged_row(trainer)
            self._save(trainer)
            if stop:
                # The process ends before Lightning gives the step to the loggers.
                _log(trainer, self._row)
            self._row = {}
        self._end(trainer, stop)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        stop = self._stop.agreed(pl_module.device)
        if stop:
            self._before_validation = True
            self._save(trainer)
            self._before_validation = False
        self._end(trainer, stop)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A limit of steps or time ends the epoch early; saved again now, the rest of it would count as done.
        is_whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not trainer.enable_validation and (is_whole or self._saved_step != trainer.global_step):
            self._save(trainer)

    def _end(self, trainer: pl.Trainer, stop: int) -> None:
        if stop:
            name = signal.Signals(stop).name
            log.info(f"stopped by {name} at step {trainer.global_step}; --ckpt_path auto goes on from here")
            raise StoppedBySignal(stop, trainer.is_global_zero)

    # ---- what

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self._saved_step != trainer.global_step:
            keep_under_step(self.path, self._saved_step, self.keep_last - 1)
        trainer.save_checkpoint(self.path, weights_only=False)
        if trainer.is_global_zero:
            remove_older(self.path, self.keep_last - 1)
        self._saved_step = trainer.global_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _set_validation_progress(
            checkpoint["loops"]["fit_loop"][_VALIDATION_PROGRESS], self._before_validation
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "random": _random_state(),
            "row": self._row,
            "before_validation": self._before_validation,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["random"]


def rows_until(state: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the rows of `metrics.csv`, those that belong before the content `state` of a `last.ckpt`.

    The process may have been killed before the checkpoint's last row was written, or long after it.
    """
    step = int(state["global_step"])
    own = state["callbacks"].get(ResumeCheckpoint.__qualname__, {})
    before_validation = own.get("before_validation", False)
    kept = [
        row
        for row in rows
        if int(row["step"]) < step
        and not (before_validation and int(row["step"]) == step - 1 and not row.get("train/loss"))
    ]
    last = own.get("row")
    if last and not any(int(row["step"]) == last["step"] and row.get("train/loss") for row in kept):
        kept.append(last)
    return kept


def _logged_row(trainer: pl.Trainer) -> dict[str, float]:
    """What Lightning is about to log for the step that has just been taken; empty when that is nothing."""
    if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
        return {}
    metrics = trainer.callback_metrics.items()
    row = {name: float(value) for name, value in metrics if not name.startswith("val/")}
    return {**row, "epoch": trainer.current_epoch, "step": trainer.global_step - 1}


def _log(trainer: pl.Trainer, row: Mapping[str, float]) -> None:
    metrics = {name: value for name, value in row.items() if name != "step"}
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(metrics, step=int(row["step"]))


def _accumulates(trainer: pl.Trainer) -> bool:
    """Whether the next micro-batch adds to the gradients at hand, which no checkpoint holds."""
    return trainer.fit_loop._should_accumulate()


def _validation_follows(trainer: pl.Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _set_validation_progress(progress: dict[str, Any], begun: bool) -> None:
    """Make Lightning's record of validation that of one interrupted in its first batch, or of none going on.

    The first it does again after a restart, with the step and epoch of the interrupted one; one interrupted
    later it would continue, with the sums of the metrics missing. After a restart its own record keeps the
    batch that was interrupted, so that every later restart would take a finished validation for interrupted.
    """
    done = progress["total"]["completed"]
    if begun:
        done -= progress["current"]["completed"]
    current = 0 if begun else progress["current"]["completed"]
    for counts, before in (("total", done), ("current", current)):
        progress[counts].update(
            ready=before + begun, started=before + begun, processed=before, completed=before
        )
    if begun:
        progress["is_last_batch"] = False


def seed_generators(seed: int, process: int, step: int) -> None:
    """Seed the global generators: what draws from them is a function of these three, too.

    The network does not, and neither does the order of the data.
    """
    first, second, *words = np.random.SeedSequence((seed, process, step)).generate_state(6).tolist()
    torch.manual_seed(first << 32 | second)
    np.random.seed(words)
    random.seed(first << 32 | second)


def _random_state() -> dict[str, Any]:
    """The global generators, in types that are read with `weights_only`."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": list(random.getstate()),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, following = state["python"]
    random.setstate((version, tuple(words), following))
