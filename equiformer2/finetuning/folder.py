"""Settings of a fine-tuning and the folder that it writes, which the same command continues."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets_oc20.errors import DataError
from datasets_oc20.locking import exclusive
from equiformer2.adapters import AdapterSettings
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_json
from equiformer2.shipped import find_checkpoint
from equiformer2.training.wandb_logging import WandbSettings

_FOLDERS = ("data", "runs")
_TASK = "task.json"
_FILES = (_TASK, "prepared.json", "before.json", "finetune.json", "curve.png", "parity.png")
_MODEL = re.compile(r"(?:model|adapter)(?:_\d+)?\.pt")
#: Settings that change nothing of the results.
_FREE = ("out", "overwrite", "wandb")


@dataclass(frozen=True)
class FineTuneSettings:
    """Settings of a fine-tuning; the defaults are what the command does by itself.

    Attributes:
        data: files of frames to learn.
        checkpoint: file to start from, or the name of a shipped model.
        out: folder for the results.
        val: files of frames to judge by; held out of `data` when empty.
        weights: `raw` or `averaged`; None for the averaged ones where the file has them.
        energy_kind: of data, and of a checkpoint, that do not declare it.
        reset_head: replace normalizers, references and heads that do not fit the data.
        isolated_atoms: file of isolated atoms with their energies.
        freeze: number of blocks to hold, or `all`; None for none, the embeddings included.
        replay: files of the checkpoint's original data to mix in.
        replay_weights: frames of each of them per new frame; one number for all of them.
        old: files of the checkpoint's original data on which forgetting is measured.
        scratch: also train the same network from random weights.
        seeds: number of trainings, with seeds `seed`, `seed + 1`, ….
        seed: random seed of the division, of new weights and of the order of the data.
        curve: also train on 1/8, 1/4 and 1/2 of the data.
        max_minutes: time for everything; None for 18 min per training of seeds and curve.
        steps, batch_size, learning_rate: None for a choice by the number of frames.
        device: `cpu`, `cuda`, ….
        adapter: train an adapter in place of the weights; None for the weights.
        overwrite: replace the results of another call in `out`.
        wandb: Weights & Biases.
    """

    data: tuple[str, ...]
    checkpoint: str
    out: Path
    val: tuple[str, ...] = ()
    weights: str | None = None
    energy_kind: str | None = None
    reset_head: bool = False
    isolated_atoms: str | None = None
    freeze: str | None = None
    replay: tuple[str, ...] = ()
    replay_weights: tuple[float, ...] = (1.0,)
    old: tuple[str, ...] = ()
    scratch: bool = True
    seeds: int = 1
    seed: int = 0
    curve: bool = False
    max_minutes: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    device: str = "cpu"
    adapter: AdapterSettings | None = None
    overwrite: bool = False
    wandb: WandbSettings = field(default_factory=WandbSettings)

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("steps", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}: give at least {least}")
        for name in ("max_minutes", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} is {value}: give a number above 0")
        if self.adapter is not None and self.adapter.rank < 1:
            raise InputError(f"--adapter-rank is {self.adapter.rank}: give at least 1")
        if self.adapter is not None and self.freeze is not None:
            raise InputError("--adapter holds all weights of the network: leave --freeze out")
        weights = self.replay_weights
        if not all(0 < weight < float("inf") for weight in weights):
            raise InputError(f"--replay-weight is {list(weights)}: give numbers above 0")
        if self.replay and len(weights) not in (1, len(self.replay)):
            raise InputError(
                f"--replay-weight has {len(weights)} numbers and --replay {len(self.replay)} files: give one "
                "number, or one per file"
            )

    @property
    def inputs(self) -> list[str]:
        """All files and folders that are read."""
        isolated = [self.isolated_atoms] if self.isolated_atoms else []
        return [
            *self.data,
            *self.val,
            *self.replay,
            *self.old,
            *isolated,
            *([self.adapter.start] if self.adapter is not None and self.adapter.start else []),
            str(find_checkpoint(self.checkpoint)),
        ]

    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on, in plain values: settings, and sizes and times of files."""
        settings = {name: value for name, value in asdict(self).items() if name not in _FREE}
        settings |= {name: list(value) for name, value in settings.items() if isinstance(value, tuple)}
        settings["adapter"] = None if self.adapter is None else self.adapter.to_dict()
        files = {path: _fingerprint(Path(path)) for path in self.inputs[:-1]}
        return {**settings, "files": files, "checkpoint": sha256(find_checkpoint(self.checkpoint))}


def _fingerprint(path: Path) -> list[Any]:
    """Sizes and times of a file, or of the files of a folder, in plain values."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [
        [file.name, status.st_size, status.st_mtime_ns]
        for file in files
        # LMDB touches its lock files whenever it reads.
        if file.is_file() and not file.name.endswith(("-lock", "lock.mdb")) and (status := file.stat())
    ]


class OutFolder:
    """The folder of results; it belongs to one command with its settings, and replaces no input.

    Args:
        settings: of the command.

    Attributes:
        path: of the folder.
        data, runs: folders inside it, for parts of the data and for trainings.

    Raises:
        InputError: the folder holds the results of another command, finished ones, or an input.
    """

    def __init__(self, settings: FineTuneSettings) -> None:
        self._settings = settings
        self.path = path = settings.out
        self.data, self.runs = path / "data", path / "runs"
        check_target(path, is_folder=True)
        for name in settings.inputs:
            if not Path(name).exists():
                raise InputError(f"{name}: there is no such file")
            self._check_input(Path(name))
        self._identity = settings.identity()

    def file(self, name: str) -> Path:
        """Path of a file of the folder."""
        return self.path / name

    def _check_input(self, given: Path) -> None:
        """Raise `InputError` if a result would replace an input or a file in an input folder."""
        inside = os.path.realpath(given)
        if given.is_dir() and os.path.realpath(self.path).startswith(inside + os.sep):
            raise InputError(
                f"{self.path} lies in {given}, of which all files are read as input: give another --out"
            )
        for own in (*(self.path / name for name in _FOLDERS), *self._results()):
            real = os.path.realpath(own)
            if inside == real or inside.startswith(real + os.sep):
                raise InputError(
                    f"{given} is read as input and lies where {self.path} keeps its results: give another "
                    "--out"
                )

    def _results(self) -> list[Path]:
        found = os.listdir(self.path) if self.path.is_dir() else []
        models = {"model.pt", "adapter.pt", *(name for name in found if _MODEL.fullmatch(name))}
        return [self.path / name for name in (*_FILES, *sorted(models))]

    @contextmanager
    def open(self) -> Iterator[bool]:
        """Make the folder, or continue in it.

        Yields:
            True where an earlier call with the same settings is continued.

        Raises:
            InputError: see the class.
            datasets_oc20.DataError: another process works in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path / ".lock", self.path):
            continues = self._take_over()
            try:
                yield continues
            except (InputError, DataError):
                # Refused data leave nothing behind.
                if not self.file("prepared.json").exists():
                    self._remove(self._taken())
                    with suppress(OSError):
                        (self.path / ".lock").unlink()
                        self.path.rmdir()
                raise

    def _taken(self) -> list[Path]:
        """List what is there, the file that tells whose folder it is last: it is removed last, too."""
        own = (*self._results(), self.data, self.runs)
        return sorted((path for path in own if os.path.lexists(path)), key=lambda path: path.name == _TASK)

    def _take_over(self) -> bool:
        """Make the folder this command's; True where it continues."""
        task, taken = self.file(_TASK), self._taken()
        if taken and not self._is_own(task):
            raise InputError(
                f"{taken[0]} exists already and was not written by this command: give another --out"
            )
        # What was stopped before it had decided anything is begun anew, whatever its settings.
        if self._settings.overwrite or not self.file("prepared.json").exists():
            self._remove(taken)
            taken = []
        if taken:
            self._check_same(read_json(task))
        else:
            write_json(task, self._identity)
        return bool(taken)

    def _is_own(self, task: Path) -> bool:
        """Tell whether this command wrote a file of settings, and so all with the names of its results."""
        if not task.exists():
            return False
        try:
            known = read_json(task)
        except InputError:
            return False
        return known.keys() >= {"data", "checkpoint", "files"}

    def _check_same(self, before: dict[str, Any]) -> None:
        different = sorted(
            name for name in {*before, *self._identity} if before.get(name) != self._identity.get(name)
        )
        if different:
            raise InputError(
                f"{self.path} holds a fine-tuning with other {', '.join(different)}: give another --out, or "
                "--overwrite to begin anew there"
            )
        if self.file("finetune.json").exists():
            raise InputError(
                f"{self.file('finetune.json')} exists already, the fine-tuning is finished: give another "
                "--out, "
                "or --overwrite to begin anew there"
            )

    @staticmethod
    def _remove(paths: Sequence[Path]) -> None:
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
