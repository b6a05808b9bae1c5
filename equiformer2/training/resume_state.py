"""Read and keep checkpoints to resume from.

Everything in a checkpoint is checked before, or while, the trainer restores itself from it.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from datasets_oc20 import DataError
from equiformer2.checkpoint.tensor_files import read_tensors
from equiformer2.errors import InputError
from equiformer2.files import whole_file


def read_resume_state(path: Path) -> dict[str, Any]:
    """Read `last.ckpt`, a Lightning checkpoint that this package has written.

    Returns:
        Its content by part, on the CPU.

    Raises:
        InputError: it is damaged or another file; where there is a checkpoint before it, that is named.
    """
    try:
        state = read_tensors(path)
    except InputError as error:
        raise InputError(f"{error}{_remedy(path)}") from error
    if "global_step" not in state or "equiformer2" not in state:
        raise InputError(
            f"ckpt_path: {path} is not a checkpoint to resume from (checkpoints/last.ckpt of a run); "
            "to start from the weights of a native checkpoint use init_from"
        )
    problem = _first_problem(state)
    if problem is not None:
        raise InputError(f"ckpt_path: {path} was edited or is damaged: {problem}{_remedy(path)}")
    return state


def _remedy(path: Path) -> str:
    """End of a message about a checkpoint that cannot be used."""
    before = OlderCheckpoints(path, 0).latest()
    if before is not None and before.resolve() != path.resolve():
        return f"; to go on from the one before it give --ckpt_path {before}"
    return "; start anew under another name, with --init_from best.pt of this run to keep its weights"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _first_problem(state: Mapping[str, Any]) -> str | None:
    """Describe the first part that is missing or of the wrong type; None for a sound state."""

    def holds(key: str) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, dict) and isinstance(value.get(key), dict)

    def holds_one(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)

    def holds_tensors(value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
        )

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "global_step": ("a step", _is_count),
        "epoch": ("an epoch", _is_count),
        "state_dict": ("tensors by name", holds_tensors),
        "optimizer_states": ("one optimizer's state", holds_one),
        "lr_schedulers": ("one schedule's state", holds_one),
        "loops": ("the progress of the loops", holds("fit_loop")),
        "callbacks": ("the callbacks' states", lambda states: isinstance(states, dict)),
        "equiformer2": ("the run's own part", holds("normalizers")),
        "pytorch-lightning_version": ("a version", lambda version: isinstance(version, str)),
    }
    for key, (kind, is_kind) in kinds.items():
        if key not in state:
            return f"it has no {key}"
        if not is_kind(state[key]):
            return f"{key} is not {kind}"
    own = state["equiformer2"]
    for key in ("energy_kind", "seed"):
        if key not in own:
            return f"it has no equiformer2.{key}"
    resumed = state["callbacks"].get("ResumeCheckpoint")
    if not isinstance(resumed, dict) or not isinstance(resumed.get("random"), dict):
        return "callbacks.ResumeCheckpoint has no state of the random generators"
    row = resumed.get("row", {})
    if not isinstance(row, dict) or not all(isinstance(k, str) and is_number(v) for k, v in row.items()):
        return "the row of its last step is not made of numbers"
    if row and not _is_count(row.get("step")):
        return "the row of its last step has no step"
    return None


def check_while_restoring(trainer: pl.Trainer, path: Path) -> None:
    """Make `trainer` raise `InputError` for a checkpoint that it cannot restore itself from.

    Lightning's loops, schedules and optimizers take any content, and fail, or count wrongly, later; so these
    parts are compared with the run's own.

    Args:
        trainer: before `fit`.
        path: the checkpoint, named in errors.
    """
    connector = trainer._checkpoint_connector
    restore_modules, restore_training = (
        connector._restore_modules_and_callbacks,
        connector.restore_training_state,
    )

    def modules(*args: Any, **kwargs: Any) -> None:
        with restoring(path):
            restore_modules(*args, **kwargs)

    def training() -> None:
        with restoring(path):
            state = connector._loaded_checkpoint
            if not state:  # a last validation restores nothing
                return
            _check_form(trainer.fit_loop.state_dict(), state["loops"]["fit_loop"], "loops")
            schedule = trainer.lr_scheduler_configs[0].scheduler
            _check_form(schedule.state_dict(), state["lr_schedulers"][0], "lr_schedulers")
            restore_training()
            optimizer = trainer.optimizers[0]
            for parameter in (one for group in optimizer.param_groups for one in group["params"]):
                moments: dict[str, Any] = optimizer.state.get(parameter) or {}
                for name in ("exp_avg", "exp_avg_sq") if moments else ():
                    value = moments.get(name)
                    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                        raise ValueError(f"the optimizer's {name} is not that of its parameter")

    connector._restore_modules_and_callbacks = modules  # type: ignore[method-assign]
    connector.restore_training_state = training  # type: ignore[method-assign]


@contextmanager
def restoring(path: Path | str | None) -> Iterator[None]:
    """Turn errors inside the context into an `InputError` about the checkpoint `path`.

    Errors that already name a file or a key pass unchanged.
    """
    try:
        yield
    except (InputError, DataError, OSError, MisconfigurationException):
        raise
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(
            f"ckpt_path: {path} was edited or is damaged, and cannot be resumed from "
            f"({type(error).__name__}: {first}){_remedy(Path(path or '.'))}"
        ) from error


def _check_form(expected: Any, found: Any, where: str) -> None:
    """Raise `ValueError` where `found` lacks a key of `expected` or holds no number where that has one."""
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            raise ValueError(f"{where} is no mapping")
        for key, value in expected.items():
            if key not in found:
                raise ValueError(f"{where} has no {key}")
            _check_form(value, found[key], f"{where}.{key}")
    elif isinstance(expected, bool):
        if not isinstance(found, bool):
            raise ValueError(f"{where} is {found!r}")
    elif isinstance(expected, int) and not _is_count(found):
        raise ValueError(f"{where} is {found!r}")


_NUMBERED = re.compile(r"step_(\d+)\.ckpt")


class OlderCheckpoints:
    """Checkpoints before the last one, kept beside it as `step_N.ckpt`.

    Args:
        last: path of `last.ckpt`.
        count: number of older checkpoints to keep.
    """

    def __init__(self, last: Path, count: int) -> None:
        self.last, self.count = last, count

    def keep(self, step: int) -> None:
        """Give the present `last.ckpt`, which is about to be replaced, the name `step_N.ckpt` as well.

        Nothing happens where there is no such checkpoint, it has that name already, or `count` is 0.

        Raises:
            OSError: the disk is full, on file systems without hard links; elsewhere it costs no space.
        """
        kept = self.last.with_name(f"step_{step}.ckpt")
        if self.count < 1 or not self.last.exists() or kept.exists():
            return
        try:
            os.link(self.last, kept)
        except OSError:
            with self.last.open("rb") as source, whole_file(kept) as copy:
                shutil.copyfileobj(source, copy)

    def remove_surplus(self) -> None:
        """Remove all `step_N.ckpt` but the `count` that were written last."""
        paths = self._by_age()
        for path in paths[: max(0, len(paths) - self.count)]:
            path.unlink()

    def latest(self) -> Path | None:
        """Path of the `step_N.ckpt` that was written last, None without one."""
        return next(reversed(self._by_age()), None)

    def _by_age(self) -> list[Path]:
        matches = [(path, _NUMBERED.fullmatch(path.name)) for path in self.last.parent.iterdir()]
        aged = [(path.stat().st_mtime_ns, int(match[1]), path) for path, match in matches if match]
        return [path for *_, path in sorted(aged)]
