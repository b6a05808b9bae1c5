"""The state of a search on disk: a killed search continues to the plan that it would have found."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.pruning.plan import PruningPlan
from equiformer2.values import Items, Number, Optional, Rule, Switch, Whole, mapping

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
            if values.get("format") != _FORMAT or values.get("version") != _VERSION:
                raise InputError("its format is another one")
            state = cls(
                fingerprint=dict(mapping(values.get("fingerprint"), "fingerprint")),
                plan=PruningPlan.from_dict(values.get("plan"), "plan"),
                loss=_NUMBER.read(values.get("loss"), "loss"),
                steps=Items(_Step()).read(values.get("steps"), "steps"),
                damages=_named(values.get("damages"), _NUMBER, "damages"),
                ratios=_named(values.get("ratios"), Items(_NUMBER), "ratios"),
                stage=Whole(0, 1000).read(values.get("stage"), "stage"),
                done=Switch().read(values.get("done"), "done"),
            )
        except InputError as error:
            raise InputError(
                f"{path} is no state of a pruning search ({error}): give another file or remove it"
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


_NUMBER = Number(-1e300, 1e300)


class _Step:
    """Rule of a step."""

    def read(self, value: Any, name: str) -> Step:
        """See `values.Rule`."""
        if set(mapping(value, name)) != {"cut", "cost", "loss", "tried"} or not isinstance(value["cut"], str):
            raise InputError(f"{name} must hold cut (a text), cost, loss and tried")
        return Step(
            value["cut"],
            _NUMBER.read(value["cost"], f"{name}.cost"),
            Optional(_NUMBER).read(value["loss"], f"{name}.loss"),
            Whole(0, 2**31).read(value["tried"], f"{name}.tried"),
        )


def _named(values: Any, rule: Rule, name: str) -> dict[str, Any]:
    return {key: rule.read(value, f"{name}.{key}") for key, value in mapping(values, name).items()}
