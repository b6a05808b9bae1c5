"""One training run, from settings to a folder."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.training.callbacks import NativeCheckpoints, ParityFigures, Summary
from equiformer2.training.config_values import ignored_settings
from equiformer2.training.figures import draw_loss_curves
from equiformer2.training.folder import (
    RunFolder,
    WandbSettings,
    WholeFiles,
    count_parameters,
    import_wandb,
    wandb_errors_told,
)
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.optim import OptimSettings
from equiformer2.training.out_of_memory import BatchAtWork
from equiformer2.training.processes import (
    SameRunEverywhere,
    check_launched_as_told,
    fingerprint,
    settings_to_compare,
    strategy_of,
)
from equiformer2.training.resume import ResumeCheckpoint, seed_generators
from equiformer2.training.resume_state import read_resume_state, tell_what_does_not_fit
from equiformer2.training.start import (
    choose_normalizers,
    describe_targets,
    keep_predictions,
    load_start,
    read_start,
    with_pruned_blocks,
)
from equiformer2.training.stopping import interrupts_kept
from equiformer2.training.task import S2EFTask, TaskSettings

log = logging.getLogger("equiformer2")

# File systems take 255 bytes for a name.
_LONGEST_NAME = 200
#: All that Lightning's names of these three can be.
_PRECISIONS = (None, "32-true", "32", 32, "bf16-mixed", "bf16", "64-true", "64", 64)


@dataclass(frozen=True)
class RunSettings:
    """Name, seed and starting point of a run.

    Args:
        name: the run's folder inside `runs_dir`; the name of the config file if not given.
        runs_dir: where run folders are made.
        seed: of the initial weights, the order of the data, dropout and the global random generators.
        ckpt_path: resume exactly from this Lightning checkpoint; `last` is the run's own, and `auto` that one
            where it is there and a new start where it is not, for jobs that are put back into the queue.
        init_from: start from the weights of this checkpoint (native, OCP or fairchem v1) as a new run; a run
            that began so is resumed with the same.
        refit_normalizers: with `init_from`, take mean, spread and per-element references of the training
            data instead of the checkpoint's; its heads are rescaled, so that its forces stay what they are.
            The kind of energy may then differ.
        checkpoint_every_n_steps: also save `last.ckpt` every so many optimizer steps.
        keep_last: how many checkpoints to resume from are kept: `last.ckpt` and those before it.
    """

    name: str | None = None
    runs_dir: str = "runs"
    seed: int = 0
    ckpt_path: str | None = None
    init_from: str | None = None
    refit_normalizers: bool = False
    checkpoint_every_n_steps: int | None = None
    keep_last: int = 2

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not self.runs_dir.strip():
            raise InputError("runs_dir is empty: name a folder, '.' for this one")
        if self.refit_normalizers and self.init_from is None:
            raise InputError("refit_normalizers is for init_from, which is not set: leave it out")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be at least 0 and below 2**63, not {self.seed}")
        if self.checkpoint_every_n_steps is not None and self.checkpoint_every_n_steps < 1:
            raise InputError("checkpoint_every_n_steps must be at least 1")
        if self.keep_last < 1:
            raise InputError(f"keep_last must be at least 1, not {self.keep_last}")


def _check_name(name: str | None) -> None:
    if name is None:
        return
    parts = Path(name).parts
    if not name.strip() or not parts or ".." in parts or Path(*parts).is_absolute():
        raise InputError(f"name is {name!r}; it must be a folder inside runs_dir")
    if not name.isprintable():
        raise InputError(f"name is {name!r}; it must hold no line breaks or other control characters")
    if max(len(part.encode()) for part in parts) > _LONGEST_NAME or len(name.encode()) > 4 * _LONGEST_NAME:
        raise InputError(f"name is {name[:40]!r}…, which is too long: give at most {_LONGEST_NAME} bytes")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs; `text` is the resolved configuration that is saved with it."""

    run: RunSettings
    model: ModelConfig
    task: TaskSettings
    optim: OptimSettings
    wandb: WandbSettings
    data: dict[str, Any]
    trainer: dict[str, Any]
    text: str


def train(config: RunConfig) -> Path:
    """Train, validate, draw; returns the run's folder.

    Raises:
        InputError, datasets_oc20.DataError: anything wrong with the settings, the data or a checkpoint.
        OSError: the folder cannot be written.
    """
    model, text = with_pruned_blocks(config.model, config.run.init_from, config.text)
    config = _with_denoising(replace(config, model=model, text=text))
    run = config.run
    folder = RunFolder(Path(run.runs_dir) / (run.name or "run"), run.ckpt_path)
    if run.init_from is not None and folder.resume_from is not None and not folder.continues:
        raise InputError(
            f"ckpt_path resumes the run of {folder.resume_from} and init_from starts a new one: "
            "give one of them"
        )
    if config.wandb.project is not None:
        import_wandb("wandb.project")
    begin = 0
    if folder.resume_from is not None:
        begin = int(read_resume_state(folder.resume_from)["global_step"])
    with folder.open():
        for sentence in ignored_settings(config):
            log.warning(sentence)
        data = ResumableDataModule(**config.data)
        data.setup("fit")
        _check_forces(config, data)
        task = _task(config, data)
        _run(config, task, data, folder, begin)
    return folder.path


def _with_denoising(config: RunConfig) -> RunConfig:
    """`task.dens` decides whether the network has the parts that it trains."""
    if config.model.dens == (config.task.dens is not None):
        return config
    if config.model.dens:
        raise InputError("model.dens is for task.dens, which is not set: set it, or leave model.dens out")
    values = yaml.safe_load(config.text)
    values["model"]["dens"] = True
    text = yaml.safe_dump(values, sort_keys=False)
    return replace(config, model=replace(config.model, dens=True), text=text)


def _check_forces(config: RunConfig, data: ResumableDataModule) -> None:
    """Raise `InputError` for data without forces when the model is to learn them."""
    if config.model.forces == "none" and config.data.get("forces_only") is not None:
        raise InputError("data.forces_only is for models with forces, and model.forces is none: leave it out")
    for dataset in data.datasets.values():
        if config.model.forces != "none" and "forces" not in dataset[0]:
            raise InputError(
                f"{dataset.describe(0)}: the record has no forces to train on; "
                "set model.forces: none for a model of energies only (with init_from, too: its force head is "
                "left behind)"
            )
    if config.task.stress_coefficient > 0 and "stress" not in data.datasets["train"][0]:
        raise InputError(
            f"{data.datasets['train'].describe(0)}: the record has no stress to train on; "
            "set task.stress_coefficient: 0"
        )


def _task(config: RunConfig, data: ResumableDataModule) -> S2EFTask:
    run = config.run
    path = run.init_from
    start = None if path is None else read_start(path, data, run.refit_normalizers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = EquiformerV2(config.model)
    normalizers = choose_normalizers(data, start, path, run.refit_normalizers, config.model.forces)
    if start is not None:
        load_start(model, start, str(path))
        keep_predictions(model, start.normalizers, normalizers)
    return S2EFTask(model, normalizers, data.energy_kind, config.task, config.optim, run.seed)


def _run(config: RunConfig, task: S2EFTask, data: ResumableDataModule, folder: RunFolder, begin: int) -> None:
    parity = ParityFigures()
    origin = {
        "config": config.text,
        "init_from": config.run.init_from,
        "training_data": describe_targets(data, task.normalizers.linear_references),
    }
    native = NativeCheckpoints(folder.checkpoints, origin)
    task.guard.folder = folder.path
    work = BatchAtWork()
    callbacks = [
        SameRunEverywhere(lambda: {**_facts(config, data), "ckpt_path": f"step {begin}"}),
        Summary(),
        parity,
        native,
        ResumeCheckpoint(folder.last, config.run.checkpoint_every_n_steps, config.run.keep_last),
        work,
    ]
    trainer = _trainer(config, folder, callbacks)
    if folder.resume_from is not None:
        tell_what_does_not_fit(trainer, folder.resume_from)
    folder.save_config(config.text)
    seed_generators(config.run.seed, trainer.global_rank, begin)
    log.info(f"run folder {folder.path}; {count_parameters(task.model):,} trainable parameters")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            with wandb_errors_told():
                logger.experiment  # noqa: B018  # logs in now, and not when the first row comes
    with interrupts_kept(), work.named(task), _settings_that_do_not_fit_the_data():
        trainer.fit(task, datamodule=data, ckpt_path=folder.resume_from, weights_only=True)
        if trainer.limit_val_batches != 0:
            _complete_validation(trainer, task, data, native, parity)
    if not trainer.is_global_zero:
        return
    if trainer.global_step == begin:
        log.warning(
            f"no step was trained: the run ended at step {begin}, as far as trainer.max_epochs, max_steps or "
            "max_time go; raise them to train on"
        )
    for logger in trainer.loggers:
        logger.save()
    draw_loss_curves(folder.metrics, folder.figures / "loss.png")
    figures = [folder.figures / "loss.png", *parity.draw(folder.figures)]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for path in figures:
                logger.log_image(path.stem, [str(path)])
            logger.experiment.finish()


@contextmanager
def _settings_that_do_not_fit_the_data() -> Iterator[None]:
    """Lightning's errors about limits and intervals, which only the data can tell it, as `InputError`."""
    try:
        yield
    except MisconfigurationException as error:
        raise InputError(f"trainer: {error}") from error
    except ValueError as error:
        if isinstance(error, InputError) or "val_check_interval" not in str(error):
            raise
        raise InputError(f"trainer: {error}") from error


def _complete_validation(
    trainer: pl.Trainer,
    task: S2EFTask,
    data: ResumableDataModule,
    native: NativeCheckpoints,
    parity: ParityFigures,
) -> None:
    """Validate where a limit on the steps ended the run between two validations.

    A run that was killed after its last validation repeats it for the figures, without logging it again.
    """
    if native.validated_step != trainer.global_step:
        trainer.validate(task, datamodule=data, verbose=False)
    elif parity.is_empty and trainer.is_global_zero and trainer.world_size == 1:
        loggers, trainer.loggers = trainer.loggers, []
        trainer.validate(task, datamodule=data, verbose=False)
        trainer.loggers = loggers


def _trainer(config: RunConfig, folder: RunFolder, callbacks: list[pl.Callback]) -> pl.Trainer:
    settings = dict(config.trainer)
    if settings["precision"] not in _PRECISIONS:
        raise InputError(
            f"trainer.precision is {settings['precision']!r}; it is '32-true', 'bf16-mixed' or '64-true': "
            "weights stay in float32, and fp16 would need scaled gradients"
        )
    if settings["enable_progress_bar"] is None:
        settings["enable_progress_bar"] = sys.stdout.isatty()
    if settings["enable_progress_bar"]:
        # Each refresh reads the loss from the device.
        callbacks = [TQDMProgressBar(refresh_rate=settings["log_every_n_steps"] or 50), *callbacks]
    settings["callbacks"] = [*(settings["callbacks"] or []), *callbacks]
    settings["strategy"] = strategy_of(settings)
    plugins = settings["plugins"] or []
    settings["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), WholeFiles()]
    try:
        if SLURMEnvironment.detect():
            # Lightning would answer Slurm's signal with a checkpoint and a queue of its own.
            settings["plugins"].append(SLURMEnvironment(auto_requeue=False))
        trainer = pl.Trainer(
            **settings,
            logger=folder.loggers(config.wandb),
            default_root_dir=folder.path,
            # The batch sampler shares out the data between processes itself.
            use_distributed_sampler=False,
        )
        check_launched_as_told(trainer)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"trainer: {error}") from error
    return trainer


def _facts(config: RunConfig, data: ResumableDataModule) -> dict[str, str]:
    """What all processes of a run must agree on; files may lie elsewhere on every node."""
    paths = {"train", "val", "forces_only"}
    settings = {name: value for name, value in config.data.items() if name not in paths}
    return {
        **settings_to_compare(
            model=config.model, task=config.task, optim=config.optim, data=settings, trainer=config.trainer
        ),
        **{f"data.{name}": fingerprint(dataset.natoms) for name, dataset in data.datasets.items()},
    }
