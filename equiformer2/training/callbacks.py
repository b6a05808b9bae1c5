"""Callbacks of a run: native checkpoints, the printed summary, parity figures, out-of-memory errors."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch_geometric.data import Batch

from equiformer2.checkpoint import save_checkpoint
from equiformer2.checkpoint.contents import WeightsKind
from equiformer2.errors import InputError
from equiformer2.training.adapter_part import AdapterPart
from equiformer2.training.expert_part import ExpertPart
from equiformer2.training.figures import draw_parity
from equiformer2.training.metrics import HIGHER_IS_BETTER
from equiformer2.training.task import S2EFTask

log = logging.getLogger("equiformer2")

#: Words of torch, oneDNN, cuBLAS and the CUDA driver for a failed allocation, in a plain RuntimeError.
_ALLOCATION_FAILURES = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "could not create a memory object",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def validation_values(trainer: pl.Trainer) -> dict[str, float]:
    """Collect the validation metrics last logged, by name without `val/`."""
    return {
        name.removeprefix("val/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/")
    }


class NativeCheckpoints(Callback):
    """`last.pt` and `best.pt`: the native format, raw and averaged weights in one file.

    Both are written after validations; `best.pt` when the monitored metric is the best so far. Without a
    validation set, `last.pt` is written when training ends. A run that trains an adapter writes its adapter
    files instead, `last_adapter.pt` and `best_adapter.pt`, of the averaged weights where there are such; one
    of experts `last_experts.safetensors` and `best_experts.safetensors`.

    Args:
        folder: for the files.
        provenance: origin of the weights.
        part: adapter or experts of the run, or None.
    """

    def __init__(
        self, folder: Path, provenance: dict[str, Any], part: AdapterPart | ExpertPart | None = None
    ) -> None:
        self.folder = folder
        self.provenance = provenance
        self.part = part
        self.best_score: float | None = None
        self.validated_step: int | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, S2EFTask)
        if trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        values = validation_values(trainer)
        monitor = pl_module.settings.monitor if pl_module.has_forces else "energy_mae"
        score = values.get(monitor)
        # A NaN is better than nothing, and worse than every number.
        better = score is not None and (
            self.best_score is None
            or math.isnan(self.best_score)
            or (score > self.best_score if monitor in HIGHER_IS_BETTER else score < self.best_score)
        )
        if better:
            self.best_score = score
        for name in ["last.pt"] + ["best.pt"] * better:
            self._save(trainer, pl_module, self.folder / name, values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, S2EFTask)
        self._save(trainer, pl_module, self.folder / "last.pt", validation_values(trainer))

    def _save(self, trainer: pl.Trainer, task: S2EFTask, path: Path, values: dict[str, float]) -> None:
        task.guard.check()
        if not trainer.is_global_zero:
            return

        def on_cpu(network: nn.Module) -> dict[str, Tensor]:
            return {name: value.detach().cpu() for name, value in network.state_dict().items()}

        provenance = {
            **self.provenance,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "validation": values,
        }
        if isinstance(self.part, AdapterPart):
            path = path.with_stem(f"{path.stem}_adapter")
            self.part.write(path, task.best_weights, task.normalizers, task.energy_kind, provenance)
            return
        if isinstance(self.part, ExpertPart):
            networks: dict[WeightsKind, nn.Module] = {"raw": task.model}
            if task.averaged is not None:
                networks["averaged"] = task.averaged
            self.part.write(path.with_name(f"{path.stem}_experts.safetensors"), networks, provenance)
            return
        model = task.exported(task.model)
        save_checkpoint(
            path,
            model=model,  # type: ignore[arg-type]  # tests train stand-ins
            raw_state=on_cpu(model),
            averaged_state=None if task.averaged is None else on_cpu(task.exported(task.averaged)),
            normalizers=task.normalizers,
            energy_kind=task.energy_kind,
            provenance=provenance,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]
        self.validated_step = state_dict.get("validated_step")


class Summary(Callback):
    """One printed line per validation, and structures and atoms per second of all processes in the log."""

    def __init__(self) -> None:
        self._start = self._mark = time.monotonic()
        self._structures = self._atoms = self._logged_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = self._mark = time.monotonic()
        self._structures = self._atoms = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._structures += batch.num_graphs
        self._atoms += batch.pos.shape[0]
        step = trainer.global_step
        if step == self._logged_step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now = time.monotonic()
        # Processes take equal batches: what one of them does in a time, all of them do.
        each = trainer.world_size / (now - self._mark)
        rates = {
            "train/structures_per_second": self._structures * each,
            "train/atoms_per_second": self._atoms * each,
        }
        pl_module.log_dict(rates, batch_size=batch.num_graphs)
        pl_module.log("lr", trainer.optimizers[0].param_groups[0]["lr"], batch_size=batch.num_graphs)
        self._logged_step, self._mark, self._structures, self._atoms = step, now, 0, 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        values = validation_values(trainer)
        parts = [f"epoch {trainer.current_epoch}", f"step {trainer.global_step}"]
        parts.append(f"{time.monotonic() - self._start:.0f} s")
        if "train/loss" in trainer.callback_metrics:
            parts.append(f"train loss {float(trainer.callback_metrics['train/loss']):.4g}")
        parts.append(f"val energy MAE {values['energy_mae']:.4f} eV")
        if "forces_mae" in values:
            parts.append(f"force MAE {values['forces_mae']:.4f} eV/Å")
            parts.append(f"force cosine {values['forces_cosine_similarity']:.3f}")
            parts.append(f"EFwT {100 * values['energy_forces_within_threshold']:.2f} %")
        log.info("  ".join(parts))


class ParityFigures(Callback):
    """Keeps what the last validation predicted and draws it against the targets.

    Of a large validation set an even sample of about `limit` energies and as many force components is kept;
    with several processes, of what the first one saw. It stays on the device until the end of the epoch: no
    batch makes the host wait.

    Args:
        limit: largest size of a sample.

    Attributes:
        pairs: `[n, 2]` target and predicted values after an epoch, by `energy` (eV) and `forces` (eV/Å).
    """

    def __init__(self, limit: int = 50_000) -> None:
        self.limit = limit
        self._samples: dict[str, list[Tensor]] = {}
        self.pairs: dict[str, np.ndarray] = {}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples, self.pairs = {"energy": [], "forces": []}, {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        quota = max(1, int(self.limit / max(1, sum(trainer.num_val_batches))))
        every = torch.ones_like(batch.natoms, dtype=torch.bool)
        self._samples["energy"].append(self._even_sample(batch.energy, outputs["energy"], every, quota))
        if "forces" in outputs:
            free = ~batch.fixed.bool()[:, None].expand(-1, 3)
            self._samples["forces"].append(self._even_sample(batch.forces, outputs["forces"], free, quota))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        energies, forces = self._samples["energy"], self._samples["forces"]
        if energies:
            # The one time that the host waits.
            samples = torch.cat([*energies, *forces]).cpu().numpy()
            parts = np.split(samples, [sum(map(len, energies))])
            self.pairs = {
                name: part[part[:, 2] > 0, :2] for name, part in zip(("energy", "forces"), parts, strict=True)
            }
        self._samples = {}

    @staticmethod
    def _even_sample(target: Tensor, predicted: Tensor, chosen: Tensor, most: int) -> Tensor:
        """Draw an even sample of the chosen values, whose number the host does not know.

        Args:
            target, predicted: n values each, of one shape.
            chosen: bool, n values: which may be in the sample.
            most: largest size of the sample.

        Returns:
            `[m, 3]` float64 with m = min(n, most): target, predicted, and 1, or 0 where fewer than m are
            chosen.
        """
        target, predicted, chosen = target.reshape(-1), predicted.reshape(-1), chosen.reshape(-1)
        first_chosen = torch.argsort(~chosen, stable=True)
        size, count = min(most, len(chosen)), chosen.sum()
        place = torch.arange(size, device=chosen.device)
        rows = first_chosen[torch.where(count <= size, place, place * count // size)]
        return torch.stack((target[rows].double(), predicted[rows].double(), (place < count).double()), dim=1)

    @property
    def is_empty(self) -> bool:
        """True until the first validation."""
        return not self.pairs

    def draw(self, folder: Path) -> list[Path]:
        """Write `parity_energy.png` and `parity_forces.png`, where there are values.

        Returns:
            The files written.
        """
        written = []
        for name, label, unit in (("energy", "energy", "eV"), ("forces", "force component", "eV/Å")):
            pairs = self.pairs.get(name, np.zeros((0, 2)))
            if len(pairs):
                mae = np.abs(pairs[:, 0] - pairs[:, 1]).mean()
                note = f"validation, MAE {mae:.4f} {unit}, n = {len(pairs)}"
                written.append(folder / f"parity_{name}.png")
                draw_parity(pairs[:, 0], pairs[:, 1], label, unit, note, written[-1])
        return written


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION_FAILURES)


class BatchAtWork(Callback):
    """Remember the batch being computed, to explain running out of memory."""

    def __init__(self) -> None:
        self._work: tuple[str, Batch] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._work = f"at training step {trainer.global_step}", batch

    def on_train_batch_end(self, *_: Any) -> None:
        self._work = None

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._work = "in validation", batch

    def on_validation_batch_end(self, *_: Any) -> None:
        self._work = None

    @contextmanager
    def named(self, task: S2EFTask) -> Iterator[None]:
        """Turn running out of memory during a batch into an error that describes the batch.

        Raises:
            InputError: with the batch's sizes and the keys to change.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if self._work is None or not is_out_of_memory(error):
                raise
            where, batch = self._work
            change = "lower data.max_edges or data.batch_size"
            if not task.settings.activation_checkpointing:
                change += ", or set task.activation_checkpointing: true"
            sizes = f"{batch.num_graphs:,} structures, {batch.pos.shape[0]:,} atoms"
            # There may be no memory for the graph either, and the network of a test has none.
            with suppress(RuntimeError, MemoryError, AttributeError):
                edges = task.model.build_graph(batch.cpu()).distances.shape[0]  # type: ignore[operator]
                sizes += f", {edges:,} edges"
            raise InputError(f"out of memory {where}, in a batch of {sizes}: {change}") from error
