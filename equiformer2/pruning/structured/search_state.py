"""State of a search for a plan between two steps, and its file."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.pruning.fingerprints import as_stored, check_same_work
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.values import Items, Number, Optional, Rule, Switch, Whole, mapping

_FORMAT = "equiformer2.pruning_search"
_VERSION = 2
_NUMBER = Number(-1e300, 1e300)


@dataclass(frozen=True)
class Step:
    """One cut that was made.

    Attributes:
        cut: name of the cut.
        cost: cost of the plan afterwards, in the unit of the target.
        loss: loss of the plan afterwards on the calibration structures, eV; None where nothing was tried.
        tried: number of cuts that were tried on the calibration structures.
        passes: work of the search so far (see `cost.work`).
    """

    cut: str
    cost: float
    loss: float | None
    tried: int
    passes: float

    @staticmethod
    def read(value: Any, name: str) -> "Step":
        """Check a stored step; a `values.Rule`."""
        keys = {"cut", "cost", "loss", "tried", "passes"}
        if set(mapping(value, name)) != keys or not isinstance(value["cut"], str):
            raise InputError(f"{name} must hold cut (a text), cost, loss, tried and passes")
        return Step(
            value["cut"],
            _NUMBER.read(value["cost"], f"{name}.cost"),
            Optional(_NUMBER).read(value["loss"], f"{name}.loss"),
            Whole(0, 2**31).read(value["tried"], f"{name}.tried"),
            _NUMBER.read(value["passes"], f"{name}.passes"),
        )


@dataclass
class SearchState:
    """State of a search between two steps.

    Attributes:
        fingerprint: everything that the search depends on; a state of another search is refused.
        plan: cuts made so far.
        loss: loss of `plan`, eV.
        steps: the cuts one by one.
        damages: name of a cut -> its damage when it was last tried, eV².
        ratios: dimension -> root of the damage over the score of the latest trials.
        stage: number of the present stage.
        ranked: number of steps after which the importance was computed by which cuts are ranked now.
        ranked_plan: plan after these steps.
        done: True once the search has ended.
    """

    fingerprint: dict[str, Any]
    plan: PruningPlan
    loss: float = 0.0
    steps: list[Step] = field(default_factory=list)
    damages: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    stage: int = 0
    ranked: int = 0
    ranked_plan: PruningPlan | None = None
    done: bool = False

    @property
    def passes(self) -> float:
        """Work of the search so far, in passes of the dense network (see `cost.work`)."""
        return self.steps[-1].passes if self.steps else 0.0

    def save(self, path: Path) -> None:
        """Write the state as JSON, atomically."""
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
            "ranked": self.ranked,
            "ranked_plan": None if self.ranked_plan is None else self.ranked_plan.to_dict(),
            "done": self.done,
        }
        write_json(path, values, make_folder=True)

    @classmethod
    def load(cls, path: Path, fingerprint: dict[str, Any]) -> "SearchState":
        """Read a file of `save` for a search of this `fingerprint`.

        Args:
            path: file to read.
            fingerprint: everything that the present search depends on.

        Returns:
            The stored state.

        Raises:
            InputError: the file is no such state, or one of another search; the difference is named.
        """

        def named(values: Any, rule: Rule, name: str) -> dict[str, Any]:
            return {key: rule.read(value, f"{name}.{key}") for key, value in mapping(values, name).items()}

        try:
            values = read_json(path)
            if values.get("format") != _FORMAT:
                raise InputError("its format is another one")
            if values.get("version") != _VERSION:
                raise InputError("another version of the package has written it")
            ranked = values.get("ranked_plan")
            state = cls(
                fingerprint=dict(mapping(values.get("fingerprint"), "fingerprint")),
                plan=PruningPlan.from_dict(values.get("plan"), "plan"),
                loss=_NUMBER.read(values.get("loss"), "loss"),
                steps=Items(Step).read(values.get("steps"), "steps"),
                damages=named(values.get("damages"), _NUMBER, "damages"),
                ratios=named(values.get("ratios"), Items(_NUMBER), "ratios"),
                stage=Whole(0, 1000).read(values.get("stage"), "stage"),
                ranked=Whole(0, 2**31).read(values.get("ranked"), "ranked"),
                ranked_plan=None if ranked is None else PruningPlan.from_dict(ranked, "ranked_plan"),
                done=Switch().read(values.get("done"), "done"),
            )
        except InputError as error:
            raise InputError(
                f"{path} is no state of a pruning search ({error}): give another file or remove it"
            ) from error
        check_same_work(path, state.fingerprint, as_stored(fingerprint))
        return state
