"""Write `last.ckpt`, from which a stopped run continues as if it had never stopped."""

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
from equiformer2.training.resume_state import OlderCheckpoints, restoring
from equiformer2.training.stopping import StoppedBySignal, StopRequest, leave_signals_to_stop_request

log = logging.getLogger("equiformer2")

_VALIDATION_PROGRESS = "epoch_loop.val_loop.batch_progress"


class ResumeCheckpoint(Checkpoint):
    """Write `last.ckpt`, everything that a run needs to continue, atomically.

    It is written after each validation (after each epoch without a validation set), every `every_n_steps`
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
            served = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            # An epoch that `limit_train_batches` ends is over before the loader is.
            is_over = served >= trainer.num_training_batches
            loader.load_state_dict({"served": 0 if is_over else served})
        self._saved_step = trainer.global_step
        if self._restored and trainer.is_global_zero:
            with restoring(trainer.ckpt_path):
                state = self._restored
                torch.set_rng_state(state["torch"])
                if len(state["cuda"]) == torch.cuda.device_count() and torch.cuda.is_available():
                    torch.cuda.set_rng_state_all(state["cuda"])
                kind, keys, *rest = state["numpy"]
                np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
                version, words, gauss_next = state["python"]
                random.setstate((version, tuple(words), gauss_next))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # No checkpoint holds the gradients that the next micro-batch adds to.
        if step == self._saved_step or trainer.fit_loop._should_accumulate():
            return
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            # A checkpoint of this moment would continue without the validation; one is written after it.
            return
        stop = self._stop.agreed(pl_module.device)
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if stop or due or trainer.should_stop or step == trainer.max_steps:
            self._row = self._row_to_log(trainer)
            self._save(trainer)
            if stop and self._row:
                # The process ends before Lightning gives the step to the loggers.
                metrics = {name: value for name, value in self._row.items() if name != "step"}
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=int(self._row["step"]))
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
            log.info(
                f"stopped by {name} at step {trainer.global_step}; the same command goes on from here, "
                "`train` with --ckpt_path auto"
            )
            raise StoppedBySignal(stop, trainer.is_global_zero)

    @staticmethod
    def _row_to_log(trainer: pl.Trainer) -> dict[str, float]:
        """Metrics that Lightning is about to log for the last step; empty where it logs nothing."""
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return {}
        metrics = trainer.callback_metrics.items()
        row = {name: float(value) for name, value in metrics if not name.startswith("val/")}
        return {**row, "epoch": trainer.current_epoch, "step": trainer.global_step - 1}

    def _save(self, trainer: pl.Trainer) -> None:
        older = OlderCheckpoints(self.path, self.keep_last - 1)
        if trainer.is_global_zero and self._saved_step != trainer.global_step:
            older.keep(self._saved_step)
        # All states are written and not the weights alone. They are read as tensors and plain values
        # (`resume_state.read_resume_state`, `Trainer.fit(weights_only=True)`).
        trainer.save_checkpoint(self.path, weights_only=False)
        if trainer.is_global_zero:
            older.remove_surplus()
        self._saved_step = trainer.global_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning's record of the validation becomes that of one interrupted in its first batch, which is
        # repeated after a restart, or of none at all. One interrupted later would be continued, without the
        # sums of its metrics; and after a restart the record keeps the interrupted batch, so that every later
        # restart would take a finished validation for an interrupted one.
        progress = checkpoint["loops"]["fit_loop"][_VALIDATION_PROGRESS]
        begun = self._before_validation
        current = progress["current"]["completed"]
        total = progress["total"]["completed"] - (current if begun else 0)
        for counts, completed in (("total", total), ("current", 0 if begun else current)):
            progress[counts].update(
                ready=completed + begun, started=completed + begun, processed=completed, completed=completed
            )
        if begun:
            progress["is_last_batch"] = False

    def state_dict(self) -> dict[str, Any]:
        # In types that are read with `weights_only`.
        kind, keys, *rest = np.random.get_state(legacy=True)
        generators = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "python": list(random.getstate()),
        }
        return {
            "random": generators,
            "row": self._row,
            "before_validation": self._before_validation,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["random"]


def rows_until(state: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Select the rows of `metrics.csv` that were logged before a `last.ckpt` was written.

    The process may have been killed before the checkpoint's last row was written, or long after it.

    Args:
        state: content of `last.ckpt`.
        rows: rows of `metrics.csv`, by column.

    Returns:
        The rows up to the checkpoint's step, completed by the row that the checkpoint holds.
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


def seed_generators(seed: int, process: int, step: int) -> None:
    """Seed the global random generators of Python, NumPy and torch.

    Neither the network nor the order of the data draws from them; callbacks and user code may.

    Args:
        seed: random seed of the run.
        process: rank of this process.
        step: optimizer step at which the run starts.
    """
    first, second, *words = np.random.SeedSequence((seed, process, step)).generate_state(6).tolist()
    torch.manual_seed(first << 32 | second)
    np.random.seed(words)
    random.seed(first << 32 | second)
