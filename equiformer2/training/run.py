"""Train a network: from settings to a finished run folder."""

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

from equiformer2.adapters import AdapterSettings
from equiformer2.checkpoint.training_data import KEY
from equiformer2.errors import InputError
from equiformer2.experts import ExpertSettings
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.model.parametrizations import low_rank_maps
from equiformer2.training.adapter_part import AdapterPart, scoring_device, with_start_model
from equiformer2.training.callbacks import BatchAtWork, NativeCheckpoints, ParityFigures, Summary
from equiformer2.training.config_values import ignored_settings
from equiformer2.training.expert_part import ExpertPart, check_experts
from equiformer2.training.expert_task import ExpertTask
from equiformer2.training.figures import draw_loss_curves
from equiformer2.training.folder import (
    RunFolder,
    WholeFiles,
)
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.optim import OptimSettings
from equiformer2.training.processes import (
    SameRunEverywhere,
    check_launched_as_told,
    fingerprint,
    settings_to_compare,
    strategy_of,
)
from equiformer2.training.resume import ResumeCheckpoint, seed_generators
from equiformer2.training.resume_state import check_while_restoring, read_resume_state
from equiformer2.training.start import (
    choose_normalizers,
    describe_training_data,
    keep_predictions,
    load_start,
    read_start,
    with_pruned_blocks,
    with_whole_model,
)
from equiformer2.training.stopping import interrupts_kept
from equiformer2.training.task import S2EFTask, TaskSettings
from equiformer2.training.wandb_logging import WandbSettings, wandb_errors

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
        if self.name is not None:
            name, parts = self.name, Path(self.name).parts
            if not name.strip() or not parts or ".." in parts or Path(*parts).is_absolute():
                raise InputError(f"name is {name!r}; it must be a folder inside runs_dir")
            if not name.isprintable():
                raise InputError(f"name is {name!r}; it must hold no line breaks or other control characters")
            longest = max(len(part.encode()) for part in parts)
            if longest > _LONGEST_NAME or len(name.encode()) > 4 * _LONGEST_NAME:
                raise InputError(
                    f"name is {name[:40]!r}…, which is too long: give at most {_LONGEST_NAME} bytes"
                )
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


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run.

    Attributes:
        run: name, seed and starting point.
        model: hyper-parameters of the network.
        task: loss, moving average, monitored metric.
        optim: optimizer and learning-rate schedule.
        wandb: Weights & Biases.
        adapter: low-rank maps that are trained in place of the weights; rank 0 for none.
        experts: mixture of experts that is trained on several data sets; 0 experts for a plain network.
        data: arguments of the data module.
        trainer: arguments of Lightning's `Trainer`.
        text: the resolved configuration as YAML, which is saved with the run.
    """

    run: RunSettings
    model: ModelConfig
    task: TaskSettings
    optim: OptimSettings
    wandb: WandbSettings
    adapter: AdapterSettings
    experts: ExpertSettings
    data: dict[str, Any]
    trainer: dict[str, Any]
    text: str


def train(config: RunConfig) -> Path:
    """Train, validate and draw the figures of one run.

    Args:
        config: settings of the run.

    Returns:
        Folder of the run.

    Raises:
        InputError, datasets_oc20.DataError: anything wrong with the settings, the data or a checkpoint.
        OSError: the folder cannot be written.
    """
    callbacks = config.trainer["callbacks"] or []
    check_experts(config.experts, config.data, config.task, config.adapter.rank, callbacks)
    model, text = with_start_model(config.model, config.adapter, config.run.init_from, config.text)
    if config.experts.num_experts and config.run.init_from is not None:
        model, text = with_whole_model(model, config.run.init_from, text)
    model, text = with_pruned_blocks(model, config.run.init_from, text)
    config = replace(config, model=model, text=text)
    if config.model.dens and config.task.dens is None:
        raise InputError("model.dens is for task.dens, which is not set: set it, or leave model.dens out")
    if config.task.dens is not None and not config.model.dens:
        values = yaml.safe_load(config.text)
        values["model"]["dens"] = True
        text = yaml.safe_dump(values, sort_keys=False)
        config = replace(config, model=replace(config.model, dens=True), text=text)
    run = config.run
    folder = RunFolder(Path(run.runs_dir) / (run.name or "run"), run.ckpt_path)
    if run.init_from is not None and folder.resume_from is not None and not folder.continues:
        raise InputError(
            f"ckpt_path resumes the run of {folder.resume_from} and init_from starts a new one: "
            "give one of them"
        )
    begin = 0
    if folder.resume_from is not None:
        begin = int(read_resume_state(folder.resume_from)["global_step"])
    with folder.open():
        for sentence in ignored_settings(config):
            log.warning(sentence)
        data = ResumableDataModule(**config.data)
        data.setup("fit")
        _Training(config, data, folder, begin).run()
    return folder.path


class _Training:
    """One run, from opened data to figures.

    Args:
        config: settings of the run.
        data: data module, set up.
        folder: folder of the run, opened.
        begin: optimizer step that the run starts from.
    """

    def __init__(self, config: RunConfig, data: ResumableDataModule, folder: RunFolder, begin: int) -> None:
        self.config, self.data, self.folder, self.begin = config, data, folder, begin
        self._check_targets()
        self.part: AdapterPart | ExpertPart | None = None
        self.task = self._make_task() if config.experts.num_experts == 0 else self._make_expert_task()
        self.parity = ParityFigures()

    def run(self) -> None:
        """Fit, complete the validation, and write logs and figures."""
        origin = {
            "config": self.config.text,
            "init_from": self.config.run.init_from,
            KEY: self.part.training_data
            if isinstance(self.part, ExpertPart)
            else describe_training_data(self.data, self.start, self.task.normalizers),
        }
        self.native = NativeCheckpoints(self.folder.checkpoints, origin, self.part)
        self.task.guard.folder = self.folder.path
        work = BatchAtWork()
        callbacks = [
            SameRunEverywhere(lambda: {**self._shared_facts(), "ckpt_path": f"step {self.begin}"}),
            Summary(),
            self.parity,
            self.native,
            ResumeCheckpoint(
                self.folder.last, self.config.run.checkpoint_every_n_steps, self.config.run.keep_last
            ),
            work,
        ]
        trainer = self._make_trainer(callbacks)
        if self.folder.resume_from is not None:
            check_while_restoring(trainer, self.folder.resume_from)
        self.folder.save_config(self.config.text)
        seed_generators(self.config.run.seed, trainer.global_rank, self.begin)
        trainable = sum(p.numel() for p in self.task.model.parameters() if p.requires_grad)
        pruned = sum(each.size - each.kept for each in low_rank_maps(self.task.model).values())
        log.info(f"run folder {self.folder.path}; {trainable - pruned:,} trainable parameters")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                with wandb_errors():
                    logger.experiment  # noqa: B018  # logs in now, and not when the first row comes
        with interrupts_kept(), work.named(self.task), _trainer_errors():
            trainer.fit(self.task, datamodule=self.data, ckpt_path=self.folder.resume_from, weights_only=True)
            if trainer.limit_val_batches != 0:
                self._complete_validation(trainer)
        if not trainer.is_global_zero:
            return
        if trainer.global_step == self.begin:
            log.warning(
                f"no step was trained: the run ended at step {self.begin}, as far as trainer.max_epochs, "
                "max_steps or max_time go; raise them to train on"
            )
        for logger in trainer.loggers:
            logger.save()
        draw_loss_curves(self.folder.metrics, self.folder.figures / "loss.png")
        figures = [self.folder.figures / "loss.png", *self.parity.draw(self.folder.figures)]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for path in figures:
                    logger.log_image(path.stem, [str(path)])
                logger.experiment.finish()

    def _check_targets(self) -> None:
        """Raise `InputError` for data without forces when the model is to learn them."""
        if self.config.model.forces == "none" and self.config.data.get("forces_only") is not None:
            raise InputError(
                "data.forces_only is for models with forces, and model.forces is none: leave it out"
            )
        for dataset in self.data.datasets.values():
            if self.config.model.forces != "none" and "forces" not in dataset[0]:
                raise InputError(
                    f"{dataset.describe(0)}: the record has no forces to train on; "
                    "set model.forces: none for a model of energies only (with init_from, too: its force "
                    "head is left behind)"
                )
        if self.config.task.stress_coefficient > 0 and "stress" not in self.data.datasets["train"][0]:
            raise InputError(
                f"{self.data.datasets['train'].describe(0)}: the record has no stress to train on; "
                "set task.stress_coefficient: 0"
            )

    def _make_task(self) -> S2EFTask:
        run = self.config.run
        path = run.init_from
        start = self.start = None if path is None else read_start(path, self.data, run.refit_normalizers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model = EquiformerV2(self.config.model)
        normalizers = choose_normalizers(
            self.data, start, path, run.refit_normalizers, self.config.model.forces
        )
        if start is not None:
            load_start(model, start, str(path))
            keep_predictions(model, start.normalizers, normalizers)
            if self.config.adapter.rank > 0:
                self.part = AdapterPart(model, start, str(path), self.config.adapter, run.seed)
        task = S2EFTask(
            model, normalizers, self.data.energy_kind, self.config.task, self.config.optim, run.seed
        )
        if isinstance(self.part, AdapterPart):
            task.base = self.part.base.fingerprint
            if self.folder.resume_from is None:  # else the masks come with the state
                self._prune_adapter(task, self.part)
        return task

    def _make_expert_task(self) -> ExpertTask:
        config, seed = self.config, self.config.run.seed
        self.part = ExpertPart(config.experts, self.data, config.model.forces, config.run.init_from)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            plain = EquiformerV2(config.model)
        return ExpertTask(
            self.part.network(plain, seed),
            self.part.normalizers,
            self.data.energy_kind,
            config.task,
            config.optim,
            seed,
        )

    def _prune_adapter(self, task: S2EFTask, adapter: AdapterPart) -> None:
        """Choose the entries of the adapter to train, in every process alike."""
        trainer = self.config.trainer
        given = trainer["devices"] if isinstance(trainer["devices"], list) else []
        device = scoring_device(trainer["accelerator"], given)
        adapter.prune(task.model, self.data, lambda batch: task.losses(batch, 0)[0], device)
        if task.averaged is not None:
            task.averaged.load_state_dict(task.model.state_dict())

    def _complete_validation(self, trainer: pl.Trainer) -> None:
        """Validate where a limit on the steps ended the run between two validations.

        A run that was killed after its last validation repeats it for the figures, without logging it again.
        """
        if self.native.validated_step != trainer.global_step:
            trainer.validate(self.task, datamodule=self.data, verbose=False)
        elif self.parity.is_empty and trainer.is_global_zero and trainer.world_size == 1:
            loggers, trainer.loggers = trainer.loggers, []
            trainer.validate(self.task, datamodule=self.data, verbose=False)
            trainer.loggers = loggers

    def _make_trainer(self, callbacks: list[pl.Callback]) -> pl.Trainer:
        settings = dict(self.config.trainer)
        if settings["precision"] not in _PRECISIONS:
            raise InputError(
                f"trainer.precision is {settings['precision']!r}; it is '32-true', 'bf16-mixed' or "
                "'64-true': weights stay in float32, and fp16 would need scaled gradients"
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
                logger=self.folder.loggers(self.config.wandb),
                default_root_dir=self.folder.path,
                # The batch sampler shares out the data between processes itself.
                use_distributed_sampler=False,
            )
            check_launched_as_told(trainer)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"trainer: {error}") from error
        return trainer

    def _shared_facts(self) -> dict[str, str]:
        """Settings and data that all processes must share; files may lie elsewhere on every node."""
        paths = {"train", "val", "forces_only", "tasks"}
        settings = {name: value for name, value in self.config.data.items() if name not in paths}
        return {
            **settings_to_compare(
                model=self.config.model,
                task=self.config.task,
                optim=self.config.optim,
                adapter=self.config.adapter,
                experts=self.config.experts,
                data=settings,
                trainer=self.config.trainer,
            ),
            **{f"data.{name}": fingerprint(dataset.natoms) for name, dataset in self.data.datasets.items()},
        }


@contextmanager
def _trainer_errors() -> Iterator[None]:
    """Turn Lightning's errors about limits and intervals that do not fit the data into `InputError`."""
    try:
        yield
    except MisconfigurationException as error:
        raise InputError(f"trainer: {error}") from error
    except ValueError as error:
        if isinstance(error, InputError) or "val_check_interval" not in str(error):
            raise
        raise InputError(f"trainer: {error}") from error
