"""What the making of a router has found so far, on disk: killed, it goes on to the same router."""

import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from equiformer2.errors import InputError
from equiformer2.files import write_bytes

_FORMAT = "equiformer2.routing_state/1"


class RoutingState:
    """Schedules that were tried, stage by stage, and the state of a router's training.

    A genetic search with the same seed tries the same schedules, so it is continued by looking up those
    that were tried before.

    Args:
        path: of the file, read where it exists; None to keep nothing.
        fingerprint: what the result depends on, as JSON can hold it.

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
        """`evaluate` that looks up what was evaluated before under this name."""
        known = self.tried.setdefault(stage, {})

        def look_up(levels: Sequence[float]) -> tuple[float, float]:
            key = tuple(levels)
            if key not in known:
                known[key] = evaluate(levels)
                self.save()
            return known[key]

        return look_up

    def keep_training(self, training: dict[str, Any]) -> None:
        """`keep` of `train_router`."""
        self.training = training
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
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
            stored = torch.load(path, map_location="cpu", weights_only=True)
            if stored["format"] != _FORMAT:
                raise KeyError("format")
            known, tried, self.training = stored["fingerprint"], stored["tried"], stored["training"]
            self.tried = {stage: dict(items) for stage, items in tried.items()}
        except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise InputError(f"{path} is no state of a router: give another file or remove it") from error
        for key in sorted({*known, *self.fingerprint}):
            if known.get(key) != self.fingerprint.get(key):
                raise InputError(
                    f"{path} is the state of another router: {key} was {known.get(key)!r} and is "
                    f"{self.fingerprint.get(key)!r} now; give another file or remove it"
                )
