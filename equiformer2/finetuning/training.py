"""One training of a fine-tuning: its configuration for the trainer, and its result."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.callbacks import Callback, EarlyStopping

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from equiformer2.checkpoint.adapter_files import Base, read_adapter, write_adapter
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.checkpoint.tensor_files import plain, sha256
from equiformer2.files import write_bytes
from equiformer2.finetuning.folder import FineTuneSettings
from equiformer2.finetuning.judging import AFTER, SCRATCH
from equiformer2.finetuning.schedule import Schedule
from equiformer2.finetuning.start import Start, write_start
from equiformer2.finetuning.trained_part import TimeLeft, TrainedPart, trained_part
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.model.folding import plain_state
from equiformer2.shipped import find_checkpoint
from equiformer2.training.configuration import parse
from equiformer2.training.run import RunConfig, train
from equiformer2.training.start import FITTED

#: Weights of the losses of normalised energies and forces (configs/study.yaml).
_ENERGY, _FORCES, _AVERAGE = 20.0, 100.0, 0.99
_WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""
_CHECKPOINT_SECONDS = 60.0
_OVERTIME = 1.3
"""A training ends after this many times its estimated time, on a machine that has become slow."""


@dataclass(frozen=True)
class Case:
    """A training: which start, which part of the data, which seed.

    Attributes:
        network: `after` (fine-tuned) or `scratch`.
        share: of the training frames.
        seed: random seed.
    """

    network: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and files."""
        word = "tuned" if self.network == AFTER else "scratch"
        part = "" if self.share == 1.0 else f"-{round(1 / self.share)}th"
        return f"{word}-seed{self.seed}{part}"

    @property
    def title(self) -> str:
        """Name for people."""
        word = "fine-tuning" if self.network == AFTER else "training from scratch"
        part = "" if self.share == 1.0 else f" on 1/{round(1 / self.share)} of the frames"
        return f"{word}{part}, seed {self.seed}"

    @property
    def is_result(self) -> bool:
        """Tell whether its network is a result: tuned on all frames. The others are for comparison."""
        return self.network == AFTER and self.share == 1.0


@dataclass(frozen=True)
class Trainer:
    """Settings that all trainings of a fine-tuning share.

    Attributes:
        settings: of the command.
        base: the checkpoint of the command.
        runs: folder of the trainings.
        files: paths of the parts of the data (`parts.write_parts`).
        energy_kind: of the new data.
    """

    settings: FineTuneSettings
    base: Checkpoint
    runs: Path
    files: dict[str, list[str]]
    energy_kind: str

    def run(self, case: Case, start: Start, schedule: Schedule, after: float) -> Path:
        """Train, or continue a training that was stopped.

        Args:
            case: which training.
            start: the network, ready for the data.
            schedule: length and learning rate.
            after: estimated seconds of what follows it.

        Returns:
            The best checkpoint, or the best adapter of the command's checkpoint.
        """
        self.runs.mkdir(exist_ok=True)
        begin = self.runs / f"{case.name}.start.pt"
        if not begin.exists():
            if case.network == SCRATCH:
                write_scratch(start, begin, case.seed)
            else:
                write_start(start, begin, {"origin": "heads, references and normalizers for new data"})
        config = self._config(case, start, schedule, begin)
        part = self._part(case, config.model)
        callbacks: list[Callback] = [
            EarlyStopping(f"val/{start.watched}", patience=schedule.patience),
            part,
            TimeLeft(after),
        ]
        folder = train(replace(config, trainer=config.trainer | {"callbacks": callbacks}))
        checkpoints = folder / "checkpoints"
        if not self._adapts(case):
            return checkpoints / "best.pt"
        for name in ("last", "best"):
            self._write_adapter(checkpoints / f"{name}_adapter.pt", begin, checkpoints / f"{name}.pt")
        return checkpoints / "best.pt"

    def _adapts(self, case: Case) -> bool:
        return self.settings.adapter is not None and case.network == AFTER

    def _write_adapter(self, trained: Path, begin: Path, target: Path) -> None:
        """Write the adapter of the start as one of the checkpoint, from which the start has other heads."""
        adapter, start = read_adapter(trained), load_checkpoint(begin)
        before, after = (
            plain_state(checkpoint.model, checkpoint.model.state_dict()) for checkpoint in (self.base, start)
        )
        changed = {
            name: value
            for name, value in after.items()
            if not torch.equal(value, before[name].to(value.device))
        }
        file = find_checkpoint(self.settings.checkpoint)
        fingerprint = fingerprint_of_weights(self.base.model)
        write_adapter(
            target,
            replace(
                adapter,
                base=Base(fingerprint, sha256(file), file.name, self.base.weights),
                replaced={**changed, **adapter.replaced},
            ),
        )

    def _start_adapter(self, path: str, begin: Path) -> Path:
        """Write the adapter to start with as one of `begin`, which is the checkpoint but for its heads."""
        adapter, target = read_adapter(path), begin.with_suffix(".adapter.pt")
        fingerprint = fingerprint_of_weights(load_checkpoint(begin).model)
        base = Base(fingerprint, sha256(begin), begin.name, self.base.weights)
        write_adapter(target, replace(adapter, base=base))
        return target

    def _part(self, case: Case, model: ModelConfig) -> TrainedPart:
        if case.network == SCRATCH:
            return TrainedPart()
        return trained_part(self.settings.freeze, self.settings.adapter, model.num_layers)

    def _config(self, case: Case, start: Start, schedule: Schedule, begin: Path) -> RunConfig:
        """Write the configuration of a training beside its folder and read it as `train` does."""
        settings, model = self.settings, start.checkpoint.config
        tuned = case.network == AFTER
        share = f"{case.share:g}"
        data: dict[str, Any] = {
            "train": [*self.files[f"train-{share}"], *(self.files[f"replay-{share}"] if tuned else [])],
            "val": self.files["watched"],
            "energy_kind": self.energy_kind,
            "batch_size": schedule.batch_size,
        }
        if tuned and self.files[f"forces_only-{share}"]:
            data["forces_only"] = self.files[f"forces_only-{share}"]
        per_epoch = max(1.0, schedule.frames / schedule.batch_size)
        step_seconds = max(schedule.seconds / schedule.steps, 1e-3)
        trainer: dict[str, Any] = {
            "max_steps": schedule.steps,
            "max_epochs": -1,
            "val_check_interval": schedule.interval,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": min(10, schedule.interval),
            **_accelerator(settings.device),
        }
        if settings.steps is None:
            trainer["max_time"] = {"seconds": int(_OVERTIME * schedule.seconds) + 30}
        values = {
            "name": case.name,
            "runs_dir": str(self.runs),
            "seed": case.seed,
            "init_from": str(begin),
            "ckpt_path": "auto",
            "keep_last": 1,
            "checkpoint_every_n_steps": max(1, int(_CHECKPOINT_SECONDS / step_seconds)),
            "model": plain(model.to_dict()),
            "task": {
                "energy_coefficient": _ENERGY * start.energy_weight,
                "force_coefficient": _FORCES,
                "ema_decay": _AVERAGE,
                "monitor": start.watched,
            },
            "optim": {
                "lr": schedule.learning_rate if tuned else schedule.scratch_learning_rate,
                "warmup_epochs": _WARMUP * schedule.steps / per_epoch,
            },
            "data": data,
            "trainer": trainer,
        }
        if tuned and case.share == 1.0 and settings.wandb.project is not None:
            values["wandb"] = dict(vars(settings.wandb))
        if self._adapts(case):
            assert settings.adapter is not None
            values["adapter"] = settings.adapter.to_dict()
            if settings.adapter.start is not None:
                values["adapter"]["start"] = str(self._start_adapter(settings.adapter.start, begin))
        if model.forces == "none":
            del values["task"]["force_coefficient"]
        path = self.runs / f"{case.name}.yaml"
        write_bytes(path, yaml.safe_dump(values, sort_keys=False).encode(), make_folder=True)
        return parse(["--config", str(path)])


def write_scratch(start: Start, path: AnyPath, seed: int) -> None:
    """Write the same network with random weights and the normalizers of the data."""
    config = start.checkpoint.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EquiformerV2(config)
    save_checkpoint(
        path,
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=start.own.for_gradient() if config.forces == "gradient" else start.own,
        energy_kind=start.checkpoint.energy_kind,
        provenance={"origin": "random weights", FITTED: True},
    )


def _accelerator(device: str) -> dict[str, Any]:
    where = torch.device(device)
    if where.type == "cpu":
        return {"accelerator": "cpu", "devices": 1}
    return {
        "accelerator": "gpu" if where.type == "cuda" else where.type,
        "devices": 1 if where.index is None else [where.index],
    }
