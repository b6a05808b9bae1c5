"""Weights & Biases: settings, errors, and the results of an evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError

# Rules of W&B's `Settings.validate_project`.
LONGEST_NAME, _FORBIDDEN_CHARACTERS = 128, "/\\#?%:"


@dataclass(frozen=True)
class WandbSettings:
    """Weights & Biases; off without a project. `WANDB_MODE=offline` works as everywhere.

    Args:
        project: project to log to.
        entity: user or team; W&B's default if not given.
        offline: write W&B's files into the run folder and send nothing.

    Raises:
        InputError: settings without a project, or a name that W&B refuses, which it would do only after the
            data are read.
    """

    project: str | None = None
    entity: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        if self.project is None:
            for name in ("entity", "offline"):
                if getattr(self, name):
                    raise InputError(f"wandb.{name} is set without wandb.project: give one, or leave it out")
        for key, value in (("wandb.project", self.project), ("wandb.entity", self.entity)):
            if value is None:
                continue
            if not value.strip() or not value.isprintable() or len(value) > LONGEST_NAME:
                raise InputError(f"{key} is {value[:40]!r}; give a name of 1 to {LONGEST_NAME} characters")
            wrong = sorted(set(value) & set(_FORBIDDEN_CHARACTERS))
            if wrong:
                has_entity = key == "wandb.project" and "/" in wrong
                hint = "; the part before / is wandb.entity" if has_entity else ""
                raise InputError(f"{key} is {value!r}, and W&B takes no {' or '.join(wrong)} in it{hint}")


@contextmanager
def wandb_errors() -> Iterator[None]:
    """Turn errors of W&B inside the context (a name, a missing login, its environment) into `InputError`."""
    import wandb

    try:
        yield
    except (wandb.errors.Error, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        first = " ".join(str(error).split())[:300]
        raise InputError(f"W&B refuses the run: {first}; or train without it: leave wandb out") from error


def log_results(
    settings: WandbSettings,
    folder: AnyPath,
    name: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]],
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]],
    figures: Sequence[Path],
) -> None:
    """Log an evaluation as one run with metrics, error tables and figures.

    Args:
        settings: project, entity and whether to stay offline.
        folder: folder for W&B's files.
        name: name of the run; cut to 128 characters.
        config: settings of the evaluation.
        metrics: dataset -> metric -> value; they become `DATASET/METRIC` in the summary.
        tables: title -> row name -> column -> value.
        figures: PNG files.

    Raises:
        InputError: W&B refuses the run.
    """
    import wandb

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with wandb_errors():
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=name[:LONGEST_NAME],
            job_type="evaluation",
            dir=str(folder),
            config=dict(config),
            mode="offline" if settings.offline else None,
        )
    try:
        for dataset, values in metrics.items():
            run.summary.update({f"{dataset}/{metric}": value for metric, value in values.items()})
        logged: dict[str, Any] = {figure.stem: wandb.Image(str(figure)) for figure in figures}
        for title, rows in tables.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            data = [[key, *(row.get(column) for column in columns)] for key, row in rows.items()]
            logged[title] = wandb.Table(columns=["name", *columns], data=data)
        if logged:
            run.log(logged)
    finally:
        run.finish()
