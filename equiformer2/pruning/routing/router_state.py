"""State of the search for a router on disk: after an interruption it goes on to the same router."""

import dataclasses
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from equiformer2.checkpoint.tensor_files import read_tensors
from equiformer2.errors import InputError
from equiformer2.files import write_bytes
from equiformer2.pruning.fingerprints import as_stored, check_same_work
from equiformer2.pruning.routing.schedule_objective import Measurement
from equiformer2.pruning.routing.sparsity_schedule import Objective
from equiformer2.values import Items, Number, Whole, mapping, shown

_FORMAT = "equiformer2.routing_state/2"
_SAVE_EVERY = 5.0
"""Seconds of a search that may be lost."""


class RoutingState:
    """Schedules that were tried, stage by stage, and the state of a router's training.

    A genetic search with the same seed tries the same schedules, so it is continued by looking up those
    that were tried before.

    Args:
        path: file of the state, read if it exists; None keeps nothing.
        fingerprint: everything that the result depends on, as JSON can hold it.

    Attributes:
        tried: stage -> levels of all blocks and number of the part of the structures -> results there.
        training: state of the training, as `train_router` gives it to `keep`; None before.

    Raises:
        InputError: the file is none of this kind, or belongs to another fingerprint.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.fingerprint = path, as_stored(fingerprint)
        self.tried: dict[str, dict[tuple[tuple[float, ...], int], Measurement]] = {}
        self._saved, self._lock = time.monotonic(), Lock()
        self.training: dict[str, Any] | None = None
        if path is not None and path.exists():
            self._load(path)

    def remembered(self, stage: str, objective: Objective) -> Objective:
        """Wrap an objective so that it looks up the results of earlier calls and stores new ones.

        Args:
            stage: name of the search; each has results of its own.
            objective: loss and operations of schedules.

        Returns:
            An objective with the same results.
        """
        known = self.tried.setdefault(stage, {})

        class Remembered:
            parts, threads = objective.parts, objective.threads
            macs = staticmethod(objective.macs)

            @staticmethod
            def measure(levels: Sequence[float], part: int) -> Measurement:
                key = tuple(levels), part
                if key not in known:
                    known[key] = objective.measure(levels, part)
                    with self._lock:
                        if time.monotonic() - self._saved > _SAVE_EVERY:
                            self.save()
                return known[key]

        return Remembered()

    def keep_training(self, training: dict[str, Any]) -> None:
        """Store the state of a training; for `keep` of `train_router`."""
        self.training = training
        self.save()

    def save(self) -> None:
        """Write the file atomically."""
        self._saved = time.monotonic()
        if self.path is None:
            return
        # Other threads may add results meanwhile.
        tried = {stage: list(known.items()) for stage, known in self.tried.items()}
        buffer = io.BytesIO()
        torch.save(
            {
                "format": _FORMAT,
                "fingerprint": self.fingerprint,
                "tried": {
                    stage: [(*key, dataclasses.astuple(result)) for key, result in known]
                    for stage, known in tried.items()
                },
                "training": self.training,
            },
            buffer,
        )
        write_bytes(self.path, buffer.getvalue(), make_folder=True)

    def _load(self, path: Path) -> None:
        try:
            stored = read_tensors(path)
            if stored.get("format") != _FORMAT:
                raise InputError("its format is another one")
            known = mapping(stored.get("fingerprint"), "fingerprint")
            tried = mapping(stored.get("tried"), "tried")
            self.tried = {stage: dict(map(self._read_trial, items)) for stage, items in tried.items()}
            training = stored.get("training")
            self.training = None if training is None else dict(mapping(training, "training"))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path} is no state of a router ({error}): give another file or remove it"
            ) from error
        check_same_work(path, known, self.fingerprint, "router")

    @staticmethod
    def _read_trial(item: Any) -> tuple[tuple[tuple[float, ...], int], Measurement]:
        """Levels of all blocks and number of the part; results, with an infinite loss of a broken network."""
        levels, part, (loss, *rest) = item
        levels = Items(Number(), 256).read(levels, "levels")
        if not isinstance(loss, float) or loss != loss:
            raise InputError(f"a loss is {shown(loss)}")
        names = ("macs", "dense", "passes")
        numbers = [Number(0.0, 1e9).read(value, name) for name, value in zip(names, rest, strict=True)]
        return (tuple(levels), Whole(0, 2**31).read(part, "part")), Measurement(loss, *numbers)
