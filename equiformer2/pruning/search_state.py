"""The state of a search on disk: a killed search continues to the plan that it would have found."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import read_json
from equiformer2.errors import InputError
from equiformer2.files import write_json
from equiformer2.pruning.plan import PruningPlan

_FORMAT = "equiformer2.pruning_search"
_VERSION = 1


@dataclass(frozen=True)
class Step:
    """One cut that was made.

    Attributes:
        cut: its name.
        cost: of the plan afterwards, in the unit of the target.
        loss: of the plan afterwards on the calibration structures, eV; None where nothing was tried.
        tried: how many cuts were tried on the calibration structures.
    """

    cut: str
    cost: float
    loss: float | None
    tried: int


@dataclass
class SearchState:
    """Where a search stands.

    Attributes:
        fingerprint: what the search depends on; a state of another search is refused.
        plan: the cuts made so far.
        loss: of `plan`, eV.
        steps: the cuts one by one.
        damages: name of a cut -> what it damaged when it was last tried, eV².
        ratios: dimension -> root of the damage over the score of the latest trials.
        stage: number of the present stage.
        done: whether the search has ended.
    """

    fingerprint: dict[str, Any]
    plan: PruningPlan
    loss: float = 0.0
    steps: list[Step] = field(default_factory=list)
    damages: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    stage: int = 0
    done: bool = False

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "plan": self.plan.to_dict(),
            "loss": self.loss,
            "steps": [asdict(step) for step in self.steps],
            "damages": self.damages,
            "ratios": self.ratios,
            "stage": self.stage,
            "done": self.done,
        }
        write_json(path, values, make_folder=True)

    @classmethod
    def load(cls, path: Path, fingerprint: dict[str, Any]) -> "SearchState":
        """Read what `save` wrote for a search of this `fingerprint`.

        Raises:
            InputError: the file is no such state, or one of another search; the difference is named.
        """
        try:
            values = read_json(path)
            if values["format"] != _FORMAT or values["version"] != _VERSION:
                raise KeyError("format")
            state = cls(
                fingerprint=values["fingerprint"],
                plan=PruningPlan.from_dict(values["plan"], str(path)),
                loss=float(values["loss"]),
                steps=[Step(**step) for step in values["steps"]],
                damages=dict(values["damages"]),
                ratios={name: list(ratios) for name, ratios in values["ratios"].items()},
                stage=int(values["stage"]),
                done=bool(values["done"]),
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is no state of a pruning search: give another file or remove it"
            ) from error
        # Through JSON, because tuples come back as lists.
        wanted = json.loads(json.dumps(fingerprint))
        for key in sorted({*wanted, *state.fingerprint}):
            if wanted.get(key) != state.fingerprint.get(key):
                raise InputError(
                    f"{path} is the state of another search: {key} was {state.fingerprint.get(key)!r} and is "
                    f"{wanted.get(key)!r} now; give another file or remove it"
                )
        return state
