"""Pruning during training, as Lightning callbacks for `equiformer2 train` (`configs/pruning/`).

Both go into `trainer.callbacks` of a configuration. `GradualPruning` cuts by masks while the network trains
and lets native checkpoints hold the physically smaller network; `DenseTeacher` puts a dense network's
answers in the place of the labels.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.optim import Optimizer
from torch_geometric.data import Batch

from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.calibration_data import read_structures
from equiformer2.pruning.cost.targets import MacTarget
from equiformer2.pruning.structured.apply import masked, shrink, weight_masks
from equiformer2.pruning.structured.baselines import magnitude_plan
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_methods import JOINT
from equiformer2.pruning.structured.search import GreedySearch, SearchSettings, Stage
from equiformer2.training.callbacks import NativeCheckpoints
from equiformer2.training.task import S2EFTask

log = logging.getLogger("equiformer2")

PLAN_FILE = "pruning_plan.json"


class DenseTeacher(Callback):
    """Callback that replaces the labels of every batch by the answers of a dense network.

    Args:
        checkpoint: file of the dense network.
        validation: reference of the validation: answers of the teacher, or labels of the data.
    """

    def __init__(self, checkpoint: str, validation: Literal["teacher", "labels"] = "teacher") -> None:
        self.checkpoint = checkpoint
        self.validation = validation
        self._teacher: Predictor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the teacher; refuse one that predicts another kind of energy."""
        assert isinstance(pl_module, S2EFTask)
        self._teacher = Predictor(load_checkpoint(self.checkpoint), device=pl_module.device)
        if self._teacher.energy_kind != pl_module.energy_kind:
            raise InputError(
                f"the teacher {self.checkpoint} predicts {self._teacher.energy_kind} energies and the "
                f"network in training {pl_module.energy_kind} energies: use a teacher of the same kind"
            )
        if pl_module.has_forces and not self._teacher.has_forces:
            raise InputError(f"the teacher {self.checkpoint} predicts no forces to learn from")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Replace the labels."""
        self._answer(batch)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Replace the labels unless validation compares with those of the data."""
        if self.validation == "teacher":
            self._answer(batch)

    def _answer(self, batch: Batch) -> None:
        if self._teacher is None:  # validation without a fit
            return
        answer = self._teacher.predict(batch)
        batch.energy = answer["energy"].to(batch.pos.device)
        if "forces" in answer:
            batch.forces = answer["forces"].to(batch.pos.device)
        if "has_energy" in batch:
            batch.has_energy = torch.ones_like(batch.has_energy)


class GradualPruning(Callback):
    """Callback that cuts in several steps while the network trains, so that the rest can take over.

    Each cut is a search (`search.GreedySearch`) or a choice by magnitude that starts from the network as it
    is then and acts through masks on the raw and the averaged weights. Its size follows the cubic schedule of
    Zhu & Gupta (2017): 1 - (1 - k / cuts)^3 of the whole reduction is made after cut k. Native checkpoints
    written by the run hold the physically smaller network at any time, and `pruning_plan.json` in the run
    folder its plan.

    Args:
        keep: share of the multiply-accumulates that stays in the end.
        data: files of calibration structures, as in `read_structures`; labels are not read.
        first_step: optimizer step of the first cut.
        every_n_steps: optimizer steps from one cut to the next.
        cuts: number of cuts.
        method: `search` (by the change of the outputs) or `magnitude`.
        structures: number of calibration structures.
        tries: number of cuts tried per step of the search.
        seed: random seed of the choice of structures and of the search.

    Raises:
        InputError: a number out of its range.
    """

    def __init__(
        self,
        keep: float,
        data: str | list[str],
        first_step: int = 0,
        every_n_steps: int = 200,
        cuts: int = 5,
        method: Literal["search", "magnitude"] = "search",
        structures: int = 32,
        tries: int = 8,
        seed: int = 0,
    ) -> None:
        if not 0 < keep < 1:
            raise InputError(f"GradualPruning: keep is {keep}; give the share that stays, between 0 and 1")
        if cuts < 1 or every_n_steps < 1 or first_step < 0:
            raise InputError(
                "GradualPruning: cuts and every_n_steps must be at least 1, first_step at least 0"
            )
        self.keep, self.data, self.cuts = keep, data, cuts
        self.first_step, self.every_n_steps = first_step, every_n_steps
        self.method, self.structures, self.tries, self.seed = method, structures, tries, seed
        self.plan: PruningPlan | None = None
        self.done = 0
        self._masks = ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the calibration structures; put the masks of a resumed run back."""
        task = self._task(pl_module)
        self._structures = read_structures(self.data, self.structures, self.seed)
        config = task.model.config
        if self.plan is None:
            self.plan = PruningPlan.keep_all(config)  # type: ignore[arg-type]
        task.export = self._export
        self._mask(task, trainer.optimizers)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Cut if a cut is due at this step."""
        due = self.first_step + self.done * self.every_n_steps
        if self.done == self.cuts or trainer.global_step < due or trainer.global_step == 0:
            return
        task = self._task(pl_module)
        text = self._next_plan(task).to_json() if trainer.is_global_zero else ""
        self.plan = PruningPlan.from_json(trainer.strategy.broadcast(text))
        self.done += 1
        self._mask(task, trainer.optimizers)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, NativeCheckpoints):
                callback.best_score = None  # a larger network's
        if trainer.is_global_zero:
            self.plan.save(Path(trainer.default_root_dir) / PLAN_FILE)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn when training ended before the last cut."""
        if self.done < self.cuts:
            log.warning(
                f"training ended after {self.done} of {self.cuts} cuts: the network is larger than asked for"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the masks off."""
        self._masks.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the plan and the number of cuts made, for the checkpoint of the run."""
        return {"plan": None if self.plan is None else self.plan.to_dict(), "done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the plan and the number of cuts from the checkpoint of a resumed run."""
        plan = state_dict["plan"]
        self.plan = None if plan is None else PruningPlan.from_dict(plan)
        self.done = state_dict["done"]

    def _share(self, cut: int) -> float:
        """Share of the operations that stays after cut number `cut`, counted from 1."""
        return 1 - (1 - self.keep) * (1 - (1 - cut / self.cuts) ** 3)

    def _next_plan(self, task: S2EFTask) -> PruningPlan:
        network, plan = task.best_weights, self.plan
        assert isinstance(network, EquiformerV2)
        assert plan is not None
        with torch.no_grad():
            calibration = Calibration(
                network, task.normalizers, self._structures
            )  # answers of the masked network
        self._masks.close()
        target = MacTarget(network.config, self._share(self.done + 1), *calibration.size)
        if self.method == "magnitude":
            return magnitude_plan(network, target.fraction_of, target.fraction, start=plan)
        settings = SearchSettings((Stage(JOINT),), tries=self.tries, seed=self.seed + self.done)
        search = GreedySearch(
            network, task.normalizers, calibration, target.fraction_of, target.fraction, settings,
            start=plan, progress=False,
        )  # fmt: skip
        return search.run().plan

    def _mask(self, task: S2EFTask, optimizers: Sequence[Optimizer]) -> None:
        self._masks.close()
        assert self.plan is not None
        masks = weight_masks(task.model, self.plan)  # type: ignore[arg-type]
        parameters = dict(task.model.named_parameters())
        for optimizer in optimizers:
            for name, kept in masks.items():
                # Momentum from before would move what is cut.
                for value in optimizer.state.get(parameters[name], {}).values():
                    if isinstance(value, torch.Tensor) and value.shape == kept.shape:
                        value.masked_fill_(~kept, 0.0)
        for network in (task.model, task.averaged):
            if network is not None:
                # For good: a resumed run does not know what they were, and the next cut must be the same.
                weights = dict(network.named_parameters())
                with torch.no_grad():
                    for name, kept in masks.items():
                        weights[name].masked_fill_(~kept, 0.0)
                self._masks.enter_context(masked(network, self.plan))  # type: ignore[arg-type]

    def _export(self, network: nn.Module) -> nn.Module:
        assert isinstance(network, EquiformerV2)
        assert self.plan is not None
        return shrink(network, self.plan)

    @staticmethod
    def _task(module: pl.LightningModule) -> S2EFTask:
        if not isinstance(module, S2EFTask):
            raise InputError("GradualPruning works with the network of equiformer2 train only")
        return module
