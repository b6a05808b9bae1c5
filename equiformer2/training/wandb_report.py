"""Results of an evaluation in Weights & Biases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equiformer2.errors import InputError
from equiformer2.training.folder import WandbSettings


def import_wandb() -> Any:
    """The module `wandb`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            "--wandb-project is given but wandb is not installed: pip install '.[wandb]', or leave it out"
        ) from error
    return wandb


def log_results(
    settings: WandbSettings,
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]],
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]],
    figures: Sequence[Path],
) -> None:
    """Log one run with `metrics` (dataset to metric to value), error tables and figures.

    Args:
        settings: project, entity and whether to stay offline (`WANDB_MODE=offline` works as well).
        folder: where W&B writes its files.
        name: of the run.
        config: what was evaluated.
        metrics: become `DATASET/METRIC` in the summary.
        tables: title to rows by name.
        figures: PNG files.
    """
    wandb = import_wandb()
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=name,
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
