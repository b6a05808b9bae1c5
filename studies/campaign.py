"""The settings of a pruning study: what configs/pruning/study.yaml may say."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import read_yaml
from equiformer2.errors import InputError
from equiformer2.pruning.analysis.pareto import Recovery
from equiformer2.pruning.routing import RoutingSettings
from equiformer2.training.config_values import check_finite
from studies.timed_study import TimedSettings, TimedStudy

OTHER_METHODS = {
    "precision": "Precision and pruning chosen together",
    "adapters": "Adapters",
    "experts": "Mixtures of linear experts",
}
"""Methods with studies of their own, `studies.NAME`, and the titles of their pages, docs/results/NAME.md."""


@dataclass(frozen=True)
class Distillation:
    """Optimizer steps after the cut, and whether the same network is trained from random weights, too."""

    steps: int
    scratch: bool = False


@dataclass(frozen=True)
class Part:
    """One `Study`: methods at budgets, with or without distillation.

    Attributes:
        structures, tries: None for those of the whole file.
    """

    model: str
    methods: tuple[str, ...]
    keep: tuple[float, ...]
    distill: Distillation | None = None
    structures: int | None = None
    tries: int | None = None


@dataclass(frozen=True)
class Speed:
    """Timing through the calculator.

    Attributes:
        random_weights: name -> preset of networks that are only timed.
        keep: share of the MACs of the plans that are timed.
        repeats: pairs of force calls.
        latency: share of the time that the plans of `multi_time` leave.
        threads: with which everything is timed, also what `multi_time` chooses by; None for those of torch.
    """

    random_weights: dict[str, str] = field(default_factory=dict)
    keep: float = 0.5
    repeats: int = 15
    latency: float = 0.6
    threads: int | None = None


@dataclass(frozen=True)
class Campaign:
    """Everything in the file; `Study` explains what it shares with it.

    Attributes:
        name: file name of the report without its ending.
        jobs: studies at the same time, each with its share of the cores.
        other_methods: studies with pages of their own that the report takes in, of `OTHER_METHODS`.
    """

    models: dict[str, str]
    calibration: tuple[str, ...]
    held_out: dict[str, str]
    studies: dict[str, Part]
    seeds: tuple[int, ...]
    held_out_structures: int
    structures: int
    tries: int
    router: dict[str, Any]
    distill_config: str
    distill_val: str
    speed: Speed
    jobs: int = 1
    name: str = "pruning_study"
    other_methods: tuple[str, ...] = ()

    def settings(self, name: str) -> TimedSettings:
        """Return the settings of the study `name`."""
        part = self.studies[name]
        return TimedSettings(
            methods=part.methods,
            keep=part.keep,
            seeds=self.seeds,
            structures=part.structures or self.structures,
            tries=part.tries or self.tries,
            routing=RoutingSettings(**self.router),
            latency=self.speed.latency,
            threads=self.speed.threads,
        )

    def trains_from_scratch(self, name: str) -> bool:
        """Tell whether the study `name` trains its plans from random weights, too."""
        distill = self.studies[name].distill
        return distill is not None and distill.scratch

    def study(self, name: str, out: Path) -> TimedStudy:
        """The study `name` in a folder of its own, sharing searches with those of the same network."""
        part = self.studies[name]
        recovery = None
        if part.distill is not None:
            length = f"--trainer.max_steps={part.distill.steps}"
            arguments = ("--config", self.distill_config, "--trainer.max_epochs=-1", length)
            recovery = Recovery(self.calibration, (self.distill_val,), arguments, part.distill.scratch)
        return TimedStudy(
            self.models[part.model],
            list(self.calibration),
            {title: [path] for title, path in self.held_out.items()},
            self.settings(name),
            out / name,
            recovery,
            self.held_out_structures,
            searches=out / "searches" / part.model,
        )


def read_campaign(path: Path) -> Campaign:
    """Read and check the file.

    Raises:
        InputError: it is missing, no YAML, or a key is unknown or absent; the key is named.
    """
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: name the study's settings with --config") from error
    check_finite(content, str(path))
    values = _only(Campaign, content, str(path))
    missing = [f.name for f in fields(Campaign) if f.default is MISSING and f.name not in values]
    if missing:
        raise InputError(f"{path} has no {missing[0]}: configs/pruning/study.yaml is an example")
    for key in ("models", "held_out", "studies"):
        if not isinstance(values[key], dict) or not values[key]:
            raise InputError(f"{path}: {key} is {values[key]!r}: give names and what they stand for")
    for key in ("calibration", "seeds"):
        if not isinstance(values[key], list) or not values[key]:
            raise InputError(f"{path}: {key} is {values[key]!r}: give a list, such as [0, 1, 2] for seeds")
        values[key] = tuple(values[key])
    values["other_methods"] = tuple(values.get("other_methods", ()))
    values["studies"] = {name: _part(name, given, path) for name, given in values["studies"].items()}
    values["speed"] = Speed(**_only(Speed, values["speed"], f"{path}, speed"))
    router = _only(RoutingSettings, values["router"], f"{path}, router")
    if router.get("protected") is not None:
        router["protected"] = tuple(router["protected"])
    values["router"] = router
    for name in values["other_methods"]:
        if name not in OTHER_METHODS:
            raise InputError(f"{path}: other_methods has {name!r}: known are {', '.join(OTHER_METHODS)}")
    campaign = Campaign(**values)
    if type(campaign.jobs) is not int or campaign.jobs < 1:
        raise InputError(
            f"{path}: jobs is {campaign.jobs!r}: give the number of studies at a time, at least 1"
        )
    for name, part in campaign.studies.items():
        if part.model not in campaign.models:
            raise InputError(f"{path}, studies.{name}: the model {part.model!r} is not among the models")
    return campaign


def _part(name: str, given: Any, path: Path) -> Part:
    values = _only(Part, given, f"{path}, studies.{name}")
    for key in ("model", "methods", "keep"):
        if key not in values:
            raise InputError(f"{path}, studies.{name}: {key} is missing")
    for key in ("methods", "keep"):
        if not isinstance(values[key], list):
            raise InputError(f"{path}, studies.{name}: {key} is {values[key]!r}: give a list")
    if values.get("distill") is not None:
        distill = _only(Distillation, values["distill"], f"{path}, studies.{name}.distill")
        if "steps" not in distill:
            raise InputError(f"{path}, studies.{name}.distill: steps is missing")
        values["distill"] = Distillation(**distill)
    return Part(**values | {"methods": tuple(values["methods"]), "keep": tuple(values["keep"])})


def _only(kind: type, given: Any, where: str) -> dict[str, Any]:
    known = [item.name for item in fields(kind)]
    if not isinstance(given, dict):
        raise InputError(f"{where}: give keys and values, of {', '.join(known)}")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InputError(f"{where}: the key {unknown[0]!r} is not known: use {', '.join(known)}")
    return dict(given)
