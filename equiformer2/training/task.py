"""The Lightning task: wires the network, the loss, the optimizer, the moving average and the metrics."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_geometric.data import Batch

from equiformer2.checkpoint import Normalizers
from equiformer2.checkpoint.tensor_files import plain
from equiformer2.errors import InputError, naming_structures
from equiformer2.model import ModelConfig
from equiformer2.model.denoising import without_denoising
from equiformer2.training.config_values import check_finite
from equiformer2.training.corruption import Corrupted, DensSettings, corrupt
from equiformer2.training.guard import FiniteGuard
from equiformer2.training.losses import Terms, energy_l1, force_l2, stress_l1
from equiformer2.training.metrics import S2EFMetrics
from equiformer2.training.optim import (
    OptimSettings,
    apply_settings,
    average_decay,
    build_optimizer,
    build_schedule,
    update_average,
)

#: Key of everything in a Lightning checkpoint that Lightning does not know about.
STATE_KEY = "equiformer2"

#: Keys of the model configuration that shape training, not what the weights mean: they may change.
NOT_IN_WEIGHTS = {"alpha_drop", "drop_path_rate", "proj_drop", "weight_init", "dens", "stress"}


@dataclass(frozen=True)
class TaskSettings:
    """Loss, moving average and what to watch.

    Args:
        energy_coefficient: weight of the energy's mean absolute error (the paper's λ_E).
        force_coefficient: weight of the mean norm of the force error (λ_F).
        stress_coefficient: weight of the stress' mean absolute error; needs `model.stress` and data with it.
        ema_decay: decay of the exponential moving average of the weights per step; 0 keeps none.
        ema_warmup: let the decay grow from 2/11 in the first steps, so that short runs do not average
            over their initial weights. The reference does not.
        activation_checkpointing: recompute each block in the backward pass; less memory, more time.
        backend: runs the hot operations: `auto`, `torch`, `cpp`, `compile`, `triton` (`kernels.backend`).
        monitor: validation metric that decides which weights are the best.
        dens: denoising as an auxiliary task; null for none.
        non_finite: what to do with a step whose loss or gradient is not finite: `stop` the run and write its
            batch into the run's folder, or `skip` the step, which leaves weights and optimizer as they are.
        max_skipped_steps: with `skip`, the run stops when more steps than this follow each other.
    """

    energy_coefficient: float = 2.0
    force_coefficient: float = 100.0
    stress_coefficient: float = 0.0
    ema_decay: float = 0.999
    ema_warmup: bool = True
    activation_checkpointing: bool = False
    backend: Literal["auto", "torch", "cpp", "compile", "triton"] = "auto"
    monitor: Literal[
        "forces_mae", "energy_mae", "energy_forces_within_threshold", "forces_cosine_similarity"
    ] = "forces_mae"
    non_finite: Literal["stop", "skip"] = "stop"
    max_skipped_steps: int = 10
    dens: DensSettings | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dens, Mapping):
            check_finite(self.dens, "task.dens")
            object.__setattr__(self, "dens", DensSettings(**self.dens))
        check_finite({**vars(self), "dens": None}, "task")
        if self.dens is not None and self.backend == "compile":
            raise InputError("task.backend: compile encodes no forces; use auto with task.dens")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"task.ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        if self.max_skipped_steps < 1:
            raise InputError(f"task.max_skipped_steps must be at least 1, not {self.max_skipped_steps}")
        for name in ("energy_coefficient", "force_coefficient", "stress_coefficient"):
            if not getattr(self, name) >= 0:
                raise InputError(f"task.{name} must not be negative, it is {getattr(self, name)}")
        if not (self.energy_coefficient or self.force_coefficient or self.stress_coefficient or self.dens):
            raise InputError(
                "task.energy_coefficient and task.force_coefficient are both 0, so that nothing would be "
                "learned: give at least one of them"
            )


class S2EFTask(pl.LightningModule):
    """Structure to energy and forces.

    Args:
        model: the network; takes a batch, gives `energy` [B], `forces` [N, 3] and, with `config.stress`,
            `stress` [B, 3, 3] in normalised units, and has `config`, `no_weight_decay()`,
            `activation_checkpointing`, `backend` and `check_backend()`.
        normalizers: between eV and the network's units.
        energy_kind: `adsorption` or `total`, the kind of the training data.
        settings, optim: see their classes.
        seed: of dropout and drop path. Every micro-batch draws from its own generator, a function of
            (seed, epoch, batch, process), so that a resumed run repeats the uninterrupted one.

    Raw weights live in `self.model`, averaged ones in `self.averaged` (None without averaging); both are
    in the state dict. Validation runs the averaged ones.

    Attributes:
        export: from one of them to what native checkpoints hold; pruning makes it smaller.
        base: fingerprint of the network whose weights are held, of a run that trains an adapter; the state to
            resume from then leaves these weights out. None for other runs.
    """

    averaged: nn.Module | None
    export: Callable[[nn.Module], nn.Module]

    def __init__(
        self,
        model: nn.Module,
        normalizers: Normalizers,
        energy_kind: str,
        settings: TaskSettings,
        optim: OptimSettings,
        seed: int = 0,
    ) -> None:
        super().__init__()
        normalizers.check_model(model.config, "data.normalizers")  # type: ignore[arg-type]
        if settings.stress_coefficient > 0 and not model.config.stress:  # type: ignore[union-attr]
            raise InputError("task.stress_coefficient needs model.stress: true, with model.forces: gradient")
        # Networks come in evaluation mode, and Lightning trains in the mode that it finds.
        self.model = model.train()
        self.normalizers = normalizers
        self.energy_kind = energy_kind
        self.settings = settings
        self.optim = optim
        self.seed = seed
        self.averaged = None
        self.export = lambda network: network
        self.base: str | None = None
        if settings.ema_decay > 0:
            # Weights that are held are those of both.
            held = {id(p): p for p in model.parameters() if not p.requires_grad}
            self.averaged = copy.deepcopy(model, held).requires_grad_(False).eval()
        for network in (self.model, self.averaged):
            if network is not None:
                network.backend = settings.backend  # type: ignore[assignment]
        if settings.activation_checkpointing:
            model.activation_checkpointing = True  # type: ignore[assignment]
        self.val_metrics = S2EFMetrics(forces=self.has_forces)
        self.guard = FiniteGuard(settings.max_skipped_steps if settings.non_finite == "skip" else 0)
        self._step_values: Tensor | float = 0.0

    @property
    def has_forces(self) -> bool:
        """True for a network that predicts forces."""
        return bool(self.model.config.forces != "none")  # type: ignore[union-attr]

    @property
    def best_weights(self) -> nn.Module:
        """The averaged network where there is one, else the raw one."""
        return self.averaged if self.averaged is not None else self.model

    def exported(self, network: nn.Module) -> nn.Module:
        """Convert one of the networks to the form of native checkpoints, without parts for training alone."""
        return self.export(without_denoising(network))

    def train(self, mode: bool = True) -> "S2EFTask":
        """Training mode for the raw network only: the average never drops anything."""
        super().train(mode)
        if self.averaged is not None:
            self.averaged.eval()
        return self

    def on_fit_start(self) -> None:
        """Refuse a backend that cannot run here, before the first step."""
        self.model.check_backend()  # type: ignore[operator]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted loss of one micro-batch; averages over all processes and accumulated batches.

        See `losses`.
        """
        loss, logged, out = self.losses(batch, batch_idx)
        self.guard.watch(self.global_step, loss, batch, out)
        values = self._of_step(torch.stack([loss.detach(), *logged.values()]), batch_idx)
        self._log_training(values[0], dict(zip(logged, values[1:].unbind(), strict=True)), batch.num_graphs)
        return loss

    def losses(self, batch: Batch, batch_idx: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Compute the weighted loss of one micro-batch.

        Returns:
            The loss, its parts to be logged, and the outputs of the network.
        """
        terms = Terms.from_batch(batch)
        noisy = self._corrupted(batch, batch_idx)
        out = self._forward_with_own_randomness(batch, batch_idx, noisy)
        target_energy = self.normalizers.normalize_energy(batch.energy, batch)
        energy = energy_l1(
            out["energy"] if noisy is None else noisy.energy(out, target_energy),
            target_energy,
            batch.get("has_energy"),
            terms.energies if terms else None,
        )
        loss = self.settings.energy_coefficient * energy
        logged = {"train/energy_mae": energy.detach() * self.energy_unit(out["energy"], target_energy, batch)}
        if self.has_forces:
            target = self.normalizers.normalize_forces(batch.forces)
            free, free_atoms = ~batch.fixed.bool(), terms.free_atoms if terms else None
            predicted = out["forces"] if noisy is None else noisy.forces(out, target)
            forces = force_l2(predicted, target, free, free_atoms)
            loss = loss + self.settings.force_coefficient * forces
            logged["train/forces_l2"] = forces.detach() * self.normalizers.forces.std
            if noisy is not None:
                noise = force_l2(noisy.noise(out), noisy.target, free, free_atoms)
                loss = loss + noisy.settings.coefficient * noise
                logged["train/denoising_l2"] = noise.detach() * noisy.settings.noise_std
        # Structures without a volume have none; no error of theirs.
        stress = out.pop("stress", None)
        if stress is not None and self.settings.stress_coefficient > 0:
            target = self.normalizers.normalize_stress(batch.stress)
            error = stress_l1(stress, target, batch.pbc.all(dim=1), terms.stresses if terms else None)
            loss = loss + self.settings.stress_coefficient * error
            logged["train/stress_mae"] = error.detach() * self.normalizers.energy.std
        return loss, logged, out

    def energy_unit(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor | float:
        """Factor, in eV, from the mean of this batch's normalised errors to that of its errors.

        Args:
            predicted, target: `[B]` normalised energies.
            batch: the structures.
        """
        return self.normalizers.energy.std

    def _of_step(self, values: Tensor, batch_idx: int) -> Tensor:
        """The values of micro-batches, averaged over those of the optimizer step so far."""
        together = self.trainer.accumulate_grad_batches
        if together == 1:
            return values
        before = self._step_values if batch_idx % together else 0.0
        self._step_values = before + values / together
        return self._step_values

    def _log_training(self, loss: Tensor, errors: dict[str, Tensor], batch_size: int) -> None:
        names, values = list(errors), torch.stack([loss, *errors.values()])
        if self.trainer.world_size > 1 and (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # Each process holds its share of the global mean (see `losses`).
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        self.log("train/loss", values[0], prog_bar=True, batch_size=batch_size)
        if self.settings.backend == "compile":
            networks = [network for network in (self.model, self.averaged) if network is not None]
            graphs = sum(network.compiled_graphs for network in networks)  # type: ignore[misc]
            # Made on the device: Lightning would copy a number there and wait.
            self.log("train/compiled_graphs", loss.new_full((), float(graphs)), batch_size=batch_size)
        self.log_dict(dict(zip(names, values[1:].unbind(), strict=True)), batch_size=batch_size)

    def _seed(self, batch_idx: int, *purpose: int) -> int:
        entropy = (self.seed, self.current_epoch, batch_idx, self.global_rank, *purpose)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)

    def _corrupted(self, batch: Batch, batch_idx: int) -> Corrupted | None:
        settings = self.settings.dens
        return None if settings is None else corrupt(batch, settings, self._seed(batch_idx, 1))

    def _forward_with_own_randomness(
        self, batch: Batch, batch_idx: int, noisy: Corrupted | None
    ) -> dict[str, Tensor]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), naming_structures(batch):
            torch.manual_seed(self._seed(batch_idx))
            out: dict[str, Tensor] = self.model(batch) if noisy is None else noisy.predict(self.model)
        return out

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Adds one batch to the validation metrics; returns its predictions (averaged weights; eV, eV/Å)."""
        with naming_structures(batch):
            out = {name: value.float() for name, value in self.best_weights(batch).items()}
        prediction = self.normalizers.denormalize(out, batch)
        self.val_metrics.update(prediction, batch)
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        # Float32 because not every device reduces float64; the processes' sums are already added up.
        values = {f"val/{name}": value.float() for name, value in self.val_metrics.compute().items()}
        self.log_dict(values)
        self.val_metrics.reset()

    def on_train_start(self) -> None:
        """A resumed run goes on with the settings that it is given, not with those of its checkpoint."""
        schedule = self.trainer.lr_scheduler_configs[0].scheduler
        apply_settings(self.trainer.optimizers[0], schedule, self.model, self.optim)  # type: ignore[arg-type]

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """AdamW, and the learning rate of every optimizer step."""
        optimizer = build_optimizer(self.model, self.optim)
        total_steps = float(self.trainer.estimated_stepping_batches)
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        timer = next((c for c in self.trainer.callbacks if isinstance(c, Timer)), None)  # type: ignore[attr-defined]
        schedule = build_schedule(
            optimizer,
            self.optim,
            steps_per_epoch=math.ceil(steps_per_epoch) if math.isfinite(steps_per_epoch) else math.inf,
            total_steps=total_steps,
            elapsed_fraction=None if timer is None else lambda: self._elapsed_fraction(timer),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _elapsed_fraction(self, timer: Timer) -> float:
        """Share of the time budget used, agreed between processes: their learning rates must be equal."""
        elapsed, remaining = timer.time_elapsed(), timer.time_remaining()
        assert remaining is not None
        fraction = min(1.0, elapsed / (elapsed + remaining))
        return float(self.trainer.strategy.broadcast(fraction))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Spoil the gradients of a loss that is not finite, which may be finite, for all processes to see."""
        sound = torch.isfinite(loss.detach())
        super().backward(loss * torch.where(sound, 1.0, math.nan), *args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by global norm and log the norm before clipping; refuse a gradient that is not finite."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_grad_norm)
        self.log("train/grad_norm", norm)
        self.guard.judge(optimizer, norm)
        if self.settings.non_finite == "skip":
            self.log("train/skipped_steps", self.guard.skipped)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step, then one step of the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None:
            # global_step counts this step only after the hook returns
            decay = average_decay(self.settings.ema_decay, self.global_step + 1, self.settings.ema_warmup)
            update_average(self.averaged, self.model, decay)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run must agree on; none is written behind a step that stops the run."""
        self.guard.check()
        checkpoint[STATE_KEY] = {
            "normalizers": self.normalizers.to_dict(),
            "energy_kind": self.energy_kind,
            "seed": self.seed,
            "guard": self.guard.state_dict(),
            "model": self._model_settings(),
        }
        if self.base is not None:
            # They are in the file that the run starts from, which is many times larger than the adapter.
            checkpoint[STATE_KEY]["base"] = self.base
            held = self._held()
            checkpoint["state_dict"] = {
                name: value for name, value in checkpoint["state_dict"].items() if name not in held
            }

    def _held(self) -> dict[str, Tensor]:
        """Weights of both networks that are not trained, by their names in the state dictionary."""
        names = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        state = self.state_dict()
        return {
            full: state[full]
            for full in (f"{network}.{name}" for network in ("model", "averaged") for name in names)
            if full in state
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another model, other data units, another kind of energy or another seed."""
        state = checkpoint.get(STATE_KEY)
        if state is None:
            raise InputError("the file to resume from was not written by this program's training")
        if state.get("base") != self.base:
            raise InputError(
                "the run to resume trains an adapter of another network, or no adapter: give it its own "
                "init_from and adapter settings"
            )
        if self.base is not None:
            checkpoint["state_dict"] = {**self._held(), **checkpoint["state_dict"]}
        self._check_same_model(checkpoint["state_dict"], state.get("model", {}))
        if type(self.normalizers).from_dict(state["normalizers"]) != self.normalizers:
            raise InputError(
                "the run to resume used other normalizers: give it the same data and data settings, and if "
                "it began with init_from, the same init_from with ckpt_path: auto"
            )
        for name in ("energy_kind", "seed"):
            if state[name] != getattr(self, name):
                raise InputError(
                    f"the run to resume had {name} {state[name]!r}, this one has {getattr(self, name)!r}: "
                    "resume with the run's own config.yaml"
                )
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])

    def _model_settings(self) -> dict[str, Any]:
        """Settings that the weights belong to; some, such as cutoffs and grids, show in no tensor."""
        config = self.model.config
        if not isinstance(config, ModelConfig):  # tests train stand-ins
            return {}
        settings = plain(config.to_dict())
        return {name: value for name, value in settings.items() if name not in NOT_IN_WEIGHTS}

    def _check_same_model(self, theirs: dict[str, Tensor], settings: dict[str, Any]) -> None:
        mine, own = self.state_dict(), self._model_settings()
        changed = [
            f"model.{name} was {settings[name]!r} and is now {value!r}"
            for name, value in own.items()
            if name in settings and settings[name] != value
        ]
        if changed:
            raise InputError(
                f"the run to resume trains another model: {'; '.join(changed)}; "
                "resume with the run's own config.yaml"
            )
        different = [
            name
            for name in sorted({*mine, *theirs})
            if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape
        ]
        if different and all(name.startswith("averaged.") for name in different):
            here, there = ("no", "an") if self.averaged is None else ("an", "no")
            raise InputError(
                f"the run to resume keeps {there} average of its weights and this one {here} average: give "
                "it the "
                "run's own task.ema_decay"
            )
        if different:
            raise InputError(
                f"the run to resume trains another model: {len(different)} tensors are not in both or have "
                f"another shape, the first is {different[0]}; resume with the run's own config.yaml"
            )
