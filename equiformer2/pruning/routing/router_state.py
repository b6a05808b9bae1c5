"""State of the search for a router on disk: after an interruption it goes on to the same router."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from equiformer2.checkpoint.tensor_files import read_tensors
from equiformer2.errors import InputError
from equiformer2.files import write_bytes
from equiformer2.values import Items, Number, mapping, shown

_FORMAT = "equiformer2.routing_state/1"


class RoutingState:
    """Schedules that were tried, stage by stage, and the state of a router's training.

    A genetic search with the same seed tries the same schedules, so it is continued by looking up those
    that were tried before.

    Args:
        path: file of the state, read if it exists; None keeps nothing.
        fingerprint: everything that the result depends on, as JSON can hold it.

    Attributes:
        tried: stage -> levels of all blocks -> loss (eV) and share of the MACs.
        training: state of the training, as `train_router` gives it to `keep`; None before.

    Raises:
        InputError: the file is none of this kind, or belongs to another fingerprint.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.fingerprint = path, json.loads(json.dumps(fingerprint))
        self.tried: dict[str, dict[tuple[float, ...], tuple[float, float]]] = {}
        self.training: dict[str, Any] | None = None
        if path is not None and path.exists():
            self._load(path)

    def remembered(
        self, stage: str, evaluate: Callable[[Sequence[float]], tuple[float, float]]
    ) -> Callable[[Sequence[float]], tuple[float, float]]:
        """Wrap `evaluate` so that it looks up the results of earlier calls.

        Args:
            stage: name of the search; each has results of its own.
            evaluate: levels of all blocks to loss (eV) and share of the MACs.

        Returns:
            A function like `evaluate`, which stores every new result.
        """
        known = self.tried.setdefault(stage, {})

        def look_up(levels: Sequence[float]) -> tuple[float, float]:
            key = tuple(levels)
            if key not in known:
                known[key] = evaluate(levels)
                self.save()
            return known[key]

        return look_up

    def keep_training(self, training: dict[str, Any]) -> None:
        """Store the state of a training; for `keep` of `train_router`."""
        self.training = training
        self.save()

    def save(self) -> None:
        """Write the file atomically."""
        if self.path is None:
            return
        buffer = io.BytesIO()
        torch.save(
            {
                "format": _FORMAT,
                "fingerprint": self.fingerprint,
                "tried": {stage: list(known.items()) for stage, known in self.tried.items()},
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
        for key in sorted({*known, *self.fingerprint}):
            if known.get(key) != self.fingerprint.get(key):
                raise InputError(
                    f"{path} is the state of another router: {key} was {shown(known.get(key))} and is "
                    f"{shown(self.fingerprint.get(key))} now; give another file or remove it"
                )

    @staticmethod
    def _read_trial(item: Any) -> tuple[tuple[float, ...], tuple[float, float]]:
        """Levels of all blocks, and the loss (infinite where the network broke down) and share of MACs."""
        levels, (loss, macs) = item
        levels = Items(Number(), 256).read(levels, "levels")
        if not isinstance(loss, float) or loss != loss:
            raise InputError(f"a loss is {shown(loss)}")
        return tuple(levels), (loss, Number(0.0, 100.0).read(macs, "macs"))
