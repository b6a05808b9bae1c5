"""Reading a checkpoint to resume from: everything in it is checked before, or while, it is put to use."""

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
    """The content of a Lightning checkpoint of ours.

    Raises:
        InputError: it is damaged or another file; where there is a checkpoint before it, that is named.
    """
    try:
        state = read_tensors(path)
    except InputError as error:
        raise InputError(f"{error}{_way_out(path)}") from error
    if "global_step" not in state or "equiformer2" not in state:
        raise InputError(
            f"ckpt_path: {path} is not a checkpoint to resume from (checkpoints/last.ckpt of a run); "
            "to start from the weights of a native checkpoint use init_from"
        )
    problem = _problem(state)
    if problem is not None:
        raise InputError(f"ckpt_path: {path} was edited or is damaged: {problem}{_way_out(path)}")
    return state


def _way_out(path: Path) -> str:
    before = latest(path.parent)
    if before is not None and before.resolve() != path.resolve():
        return f"; to go on from the one before it give --ckpt_path {before}"
    return "; start anew under another name, with --init_from best.pt of this run to keep its weights"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _problem(state: Mapping[str, Any]) -> str | None:
    """Half a sentence about the first part that is missing or of another type; None for a sound state."""
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "global_step": ("a step", _is_count),
        "epoch": ("an epoch", _is_count),
        "state_dict": ("tensors by name", _holds_tensors),
        "optimizer_states": ("one optimizer's state", _is_one_mapping),
        "lr_schedulers": ("one schedule's state", _is_one_mapping),
        "loops": ("the progress of the loops", lambda loops: _is_mapping(loops, "fit_loop")),
        "callbacks": ("the callbacks' states", lambda states: isinstance(states, dict)),
        "equiformer2": ("the run's own part", lambda own: _is_mapping(own, "normalizers")),
        "pytorch-lightning_version": ("a version", lambda version: isinstance(version, str)),
    }
    for key, (wanted, is_right) in kinds.items():
        if key not in state:
            return f"it has no {key}"
        if not is_right(state[key]):
            return f"{key} is not {wanted}"
    own = state["equiformer2"]
    for key in ("energy_kind", "seed"):
        if key not in own:
            return f"it has no equiformer2.{key}"
    resumed = state["callbacks"].get("ResumeCheckpoint")
    if not isinstance(resumed, dict) or not isinstance(resumed.get("random"), dict):
        return "callbacks.ResumeCheckpoint has no state of the random generators"
    row = resumed.get("row", {})
    if not isinstance(row, dict) or not all(isinstance(k, str) and _is_number(v) for k, v in row.items()):
        return "the row of its last step is not made of numbers"
    if row and not _is_count(row.get("step")):
        return "the row of its last step has no step"
    return None


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _is_one_mapping(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)


def _is_mapping(value: Any, key: str) -> bool:
    return isinstance(value, dict) and isinstance(value.get(key), dict)


def tell_what_does_not_fit(trainer: pl.Trainer, path: Path) -> None:
    """Let what fails while `trainer` restores itself from `path` be an `InputError`.

    What would not fail is compared: Lightning's loops take any content, and fail, or count wrongly, later.
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
            _check_moments(trainer.optimizers[0])

    connector._restore_modules_and_callbacks = modules  # type: ignore[method-assign]
    connector.restore_training_state = training  # type: ignore[method-assign]


@contextmanager
def restoring(path: Path | str | None) -> Iterator[None]:
    """Inside, whatever fails is an `InputError` about the checkpoint `path`; errors that tell more stay."""
    try:
        yield
    except (InputError, DataError, OSError, MisconfigurationException):
        raise
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(
            f"ckpt_path: {path} was edited or is damaged, and cannot be resumed from "
            f"({type(error).__name__}: {first}){_way_out(Path(path or '.'))}"
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


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` where AdamW's running averages are not those of its parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter)
            if moments:
                for name in ("exp_avg", "exp_avg_sq"):
                    if not isinstance(moments.get(name), torch.Tensor) or (
                        moments[name].shape != parameter.shape
                    ):
                        raise ValueError(f"the optimizer's {name} is not that of its parameter")


_NAME = re.compile(r"step_(\d+)\.ckpt")


def keep_under_step(last: Path, step: int, count: int) -> None:
    """Give the checkpoint `last`, which is about to be replaced, the name `step_N.ckpt` as well.

    Nothing happens where there is no such checkpoint, it has that name already, or `count` is 0.

    Raises:
        OSError: the disk is full, on file systems without hard links; elsewhere it costs no space.
    """
    kept = last.with_name(f"step_{step}.ckpt")
    if count < 1 or not last.exists() or kept.exists():
        return
    try:
        os.link(last, kept)
    except OSError:
        with last.open("rb") as source, whole_file(kept) as copy:
            shutil.copyfileobj(source, copy)


def remove_older(last: Path, count: int) -> None:
    """Remove all `step_N.ckpt` beside `last` but the `count` that were written last."""
    found = [(path.stat().st_mtime_ns, int(match[1]), path) for path, match in _numbered(last.parent)]
    for _, _, path in sorted(found)[: max(0, len(found) - count)]:
        path.unlink()


def latest(folder: Path) -> Path | None:
    """The `step_N.ckpt` that was written last."""
    found = [(path.stat().st_mtime_ns, int(match[1]), path) for path, match in _numbered(folder)]
    return max(found)[2] if found else None


def _numbered(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return [(path, match) for path, match in matches if match is not None]
