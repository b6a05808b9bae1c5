"""Training of a token router beside a network, as a Lightning callback for `equiformer2 train`."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.kernels.backend import Features
from equiformer2.model import EquiformerV2
from equiformer2.pruning.routing.ftp import FTPRouter
from equiformer2.pruning.routing.ftp_training import (
    RouterTrainer,
    RouterTraining,
    dense_answer,
    frozen,
)
from equiformer2.pruning.routing.router_files import save_router
from equiformer2.training.task import S2EFTask

ROUTER_FILE = "router.json"


class TrainRouter(Callback):
    """Callback that trains an `FTPRouter` to follow the network as it is at each step.

    After every n-th optimizer step it takes one step of its own on the batch at hand, without labels (see
    `RouterTrainer`). The network's training does not notice: the same weights come out of it as without this
    callback. `router.json` in the run folder is written whenever `last.ckpt` is, and at the end. Logged are
    `router/forces` (eV/Å), `router/energy` (eV), `router/sparsity` and `router/guide` (see `RouterLosses`).
    Several processes average their gradients.

    Args:
        levels: share of the atoms to skip: of every block but the protected ones, or one per block (None:
            all atoms are computed).
        every_n_steps: optimizer steps of the network from one step of the router to the next.
        steps: number of the router's steps, after which it stays as it is; None for all of the run's.
        weights: weights of the network that it follows, `raw` or `averaged`; None for the averaged ones where
            there are any.
        freeze_network: train the router alone. The network keeps the weights that it starts with: give
            `init_from`. Its losses are still logged.
        mode: mode of the router, see `ScoreRouter`.
        width: width of the router's gates, see `ScoreRouter`.
        keep_free: always compute free atoms and the adsorbate.
        protect_ends: compute all atoms in the first and in the last block if `levels` is one number.
        learning_rate: learning rate of the router, see `RouterTraining`.
        guide_weight: weight of the guide loss at the start.
        sparsity_weight: weight of the sparsity loss.
        energy_weight: weight of the change of the energy.
        force_weight: weight of the change of the forces.
        temperature: temperature of the Gumbel noise; 0 for none.
        seed: random seed of the router's first weights and of the Gumbel noise.

    Raises:
        InputError: a number out of its range.
    """

    def __init__(
        self,
        levels: float | list[float | None],
        every_n_steps: int = 1,
        steps: int | None = None,
        weights: Literal["raw", "averaged"] | None = None,
        freeze_network: bool = False,
        mode: Literal["topk", "threshold", "smooth"] = "topk",
        width: float = 0.1,
        keep_free: bool = False,
        protect_ends: bool = True,
        learning_rate: float = 1e-2,
        guide_weight: float = 5.0,
        sparsity_weight: float = 5.0,
        energy_weight: float = 1.0,
        force_weight: float = 1.0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1:
            raise InputError(f"TrainRouter: every_n_steps is {every_n_steps}: give 1 or more")
        if steps is not None and steps < 1:
            raise InputError(f"TrainRouter: steps is {steps}: give 1 or more, or leave it out")
        self.every_n_steps, self.steps, self.weights = every_n_steps, steps, weights
        self.freeze_network, self.seed = freeze_network, seed
        self.router = FTPRouter(
            levels, mode=mode, width=width, keep_free=keep_free, protect_ends=protect_ends, seed=seed
        )
        self._settings = RouterTraining(
            learning_rate=learning_rate,
            guide_weight=guide_weight,
            sparsity_weight=sparsity_weight,
            energy_weight=energy_weight,
            force_weight=force_weight,
            temperature=temperature,
        )
        self._frozen: list[nn.Parameter] = []
        self._training: RouterTrainer | None = None
        self._stored: dict[str, Any] | None = None
        self._seen = 0

    # ---- before the first step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze the network, before the optimizer and DDP look at it."""
        if stage != "fit":
            return
        network = self._network(pl_module)
        if not network.config.regress_forces:
            raise InputError(
                "TrainRouter: the router is trained on direct forces, too: use model.forces: direct"
            )
        self.router.trainable_levels(len(network.blocks))
        if self.freeze_network:
            # One parameter stays: Lightning's loop needs a loss to differentiate. It gets no step, either.
            assert isinstance(pl_module, S2EFTask)
            self._frozen = [p for p in pl_module.model.parameters() if p.requires_grad][:-1]
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a backend that cannot skip atoms."""
        self._network(pl_module).check_backend(Features(routing=True))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the training of the router, or continue that of a resumed run."""
        steps = self.steps
        if steps is None:
            whole_run = trainer.estimated_stepping_batches
            if not math.isfinite(whole_run):
                raise InputError(
                    "TrainRouter: the run has no number of steps: set trainer.max_epochs or "
                    "trainer.max_steps, or give steps"
                )
            steps = max(1, int(whole_run) // self.every_n_steps)
        self._training = RouterTrainer(self.router, dataclasses.replace(self._settings, steps=steps))
        if self._stored is not None:
            self._training.load_state_dict(self._stored)
        self._seen = trainer.global_step

    # ---- steps

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Remove the gradients of a frozen network, so that its optimizer changes nothing."""
        if self.freeze_network:
            optimizer.zero_grad()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Take a step of the router if one is due."""
        training, step = self._training, trainer.global_step
        assert training is not None
        if step == self._seen:  # gradients are accumulated
            return
        self._seen = step
        if step % self.every_n_steps or training.done >= training.settings.steps:
            return
        assert isinstance(pl_module, S2EFTask)

        def average(value: Tensor) -> Tensor:
            mean = trainer.strategy.reduce(value.to(pl_module.device), reduce_op="mean")
            assert isinstance(mean, Tensor)
            return mean.to(value.device)

        network = self._network(pl_module)
        # Noise of its own for every step and process, so that no state of a generator has to be kept.
        entropy = np.random.SeedSequence((self.seed, training.done, trainer.global_rank))
        noise = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        with frozen(network):
            dense = dense_answer(network, batch)
            losses = training.step(network, batch, dense, noise, average)
        values = {
            "router/forces": losses.forces * pl_module.normalizers.forces.std,
            "router/energy": losses.energy * pl_module.normalizers.energy.std,
            "router/sparsity": losses.sparsity,
            "router/guide": losses.guide,
        }
        pl_module.log_dict(values, batch_size=batch.num_graphs)

    def _network(self, module: pl.LightningModule) -> EquiformerV2:
        if not isinstance(module, S2EFTask):
            raise InputError("TrainRouter works with the network of equiformer2 train only")
        if self.weights == "averaged" and module.averaged is None:
            raise InputError("TrainRouter: there are no averaged weights with task.ema_decay: 0: use raw")
        network = module.model if self.weights == "raw" else module.best_weights
        assert isinstance(network, EquiformerV2)
        return network

    # ---- files and checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the router beside the checkpoint."""
        self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the trained router."""
        self._save(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the weights of a frozen network be trained again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            save_router(Path(trainer.default_root_dir) / ROUTER_FILE, self.router)

    def state_dict(self) -> dict[str, Any]:
        """Return the router's settings and the state of its training, for the checkpoint of the run."""
        training = self._stored if self._training is None else self._training.state_dict()
        return {"router": self._rule(), "training": training}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of the training from the checkpoint of a resumed run.

        Raises:
            InputError: the run trained a router with other settings.
        """
        for name, mine in self._rule().items():
            theirs = state_dict["router"][name]
            if theirs != mine:
                raise InputError(
                    f"the run to resume trained a router with {name} {theirs!r}, this one has {mine!r}: "
                    "resume with the run's own config.yaml"
                )
        self._stored = state_dict["training"]

    def _rule(self) -> dict[str, Any]:
        return {name: value for name, value in self.router.settings().items() if name != "weights"}
