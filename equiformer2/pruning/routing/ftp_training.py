"""Training of FTP's router against the dense network; nothing else is trained and no labels are read."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.routing.batch_geometry import BatchGeometry
from equiformer2.pruning.routing.ftp import FTPRouter
from equiformer2.pruning.routing.geometric_routers import static_priority
from equiformer2.pruning.routing.router import BaseRouter, BaseRouting
from equiformer2.pruning.routing.score_selection import select

_KEEP_EVERY = 10

DenseAnswer = tuple[RadiusGraph, dict[str, Tensor]]
"""Edges and outputs of the dense network, in normalised units."""


@dataclasses.dataclass(frozen=True)
class RouterTraining:
    """Settings of `RouterTrainer`.

    Attributes:
        steps: number of steps, one batch each.
        learning_rate: learning rate of AdamW; it falls to 0 as a cosine.
        guide_weight: weight of the guide loss at the start; it falls linearly to 0 over `guide_steps`.
        guide_steps: steps with a guide loss; None for half of `steps`.
        sparsity_weight: weight of (s - s_achieved)², summed over blocks.
        energy_weight: weight of |E - E_dense| in normalised units.
        force_weight: weight of the mean ||F - F_dense|| over free atoms in normalised units.
        temperature: temperature of the Gumbel noise on the logits; 0 for none.
        seed: random seed of the noise and of the order of the batches.

    Raises:
        InputError: fewer than one step.
    """

    steps: int = 200
    learning_rate: float = 1e-2
    guide_weight: float = 5.0
    guide_steps: int | None = None
    sparsity_weight: float = 5.0
    energy_weight: float = 1.0
    force_weight: float = 1.0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"the router is trained for {self.steps} steps: give at least 1")


@dataclasses.dataclass(frozen=True)
class RouterLosses:
    """Losses of one training step of a router.

    Attributes:
        guide: binary cross entropy against the static router's choice, averaged over atoms and blocks.
        sparsity: sum over blocks of the mean over structures of (s - s_achieved)².
        energy: mean |E - E_dense|, normalised units.
        forces: mean ||F - F_dense|| over free atoms, normalised units.
    """

    guide: float
    sparsity: float
    energy: float
    forces: float


class RouterTrainer:
    """Training of a router's MLP, one step at a time.

    In the forward pass an atom is kept or skipped as later in use (keep where the probability is above 1/2);
    derivatives go through the probability (straight-through), for which the branches of skipped atoms
    are computed too.

    Args:
        router: its levels are the sparsities to learn; its MLP is trained in place.
        settings: see `RouterTraining`.
    """

    def __init__(self, router: FTPRouter, settings: RouterTraining) -> None:
        self.router, self.settings = router, settings
        self._optimizer = torch.optim.AdamW(router.mlp.parameters(), lr=settings.learning_rate)
        self._decay = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, settings.steps)

    @property
    def done(self) -> int:
        """Number of steps taken."""
        return self._decay.last_epoch

    def step(
        self,
        model: EquiformerV2,
        batch: Batch,
        dense: DenseAnswer,
        generator: torch.Generator,
        average: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> RouterLosses:
        """Take one step of the optimizer.

        Args:
            model: the network, `frozen`.
            batch: structures, labels are not read.
            dense: `dense_answer(model, batch)`.
            generator: random generator of the Gumbel noise.
            average: average of a tensor over the processes that take this step together.

        Returns:
            Losses of the step, averaged over the processes.
        """
        graph, expected = dense
        settings = self.settings
        training = _StraightThrough(self.router, settings.temperature, generator)
        with torch.enable_grad():
            out = model(batch, graph=graph, active=training)
            energy = (out["energy"] - expected["energy"]).abs().mean()
            geometry = training.geometry
            error = (out["forces"] - expected["forces"])[geometry.free]
            forces = (error.square().sum(dim=1) + 1e-12).sqrt().sum() / max(1, len(error))
            guide_steps = settings.guide_steps or max(1, settings.steps // 2)
            fading = max(0.0, 1 - self.done / guide_steps)
            loss = settings.energy_weight * energy + settings.force_weight * forces
            loss = (
                loss
                + settings.sparsity_weight * training.sparsity
                + settings.guide_weight * fading * training.guide
            )
        self._optimizer.zero_grad()
        loss.backward()
        for parameter in self.router.mlp.parameters():
            if parameter.grad is not None:
                parameter.grad = average(parameter.grad)
        self._optimizer.step()
        self._decay.step()
        parts = torch.stack((training.guide, training.sparsity, energy, forces)).detach()
        return RouterLosses(*average(parts).tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` goes on; readable with `weights_only`."""
        return {
            "mlp": self.router.mlp.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "decay": self._decay.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the learning rate falls to 0 over the steps of the present settings."""
        self.router.mlp.load_state_dict(state["mlp"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._decay.load_state_dict(state["decay"])
        settings = self.settings
        if self._decay.T_max != settings.steps:
            self._decay.T_max = settings.steps
            share = (1 + math.cos(math.pi * min(1.0, self.done / settings.steps))) / 2
            for group in self._optimizer.param_groups:
                group["lr"] = settings.learning_rate * share


def train_router(
    model: EquiformerV2,
    router: FTPRouter,
    batches: Sequence[Batch],
    settings: RouterTraining | None = None,
    after_step: Callable[[int, RouterLosses], None] | None = None,
    resume: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> list[RouterLosses]:
    """Train the router's MLP in place (see `RouterTrainer`), on batches in random order.

    Args:
        model: the network; its weights and mode are left as they are.
        router: its levels are the sparsities to learn.
        batches: structures, labels are not read.
        settings: see `RouterTraining`.
        after_step: called with the number of the step and its losses.
        resume: state that an earlier training gave to `keep`; training goes on from there as if it had not
            stopped.
        keep: called with the state of the training after every 10 steps and at the end.

    Returns:
        Losses of all steps, the earlier ones included.

    Raises:
        InputError: no batches, or the network predicts no forces.
    """
    settings = settings or RouterTraining()
    if not batches:
        raise InputError("the router needs at least one batch to train on")
    generator = torch.Generator().manual_seed(settings.seed)
    trainer = RouterTrainer(router, settings)
    history: list[RouterLosses] = []
    if resume is not None:
        trainer.load_state_dict(resume)
        generator.set_state(resume["generator"])
        history = [RouterLosses(*losses) for losses in resume["history"]]
    with frozen(model):
        todo = range(trainer.done, settings.steps)
        dense = [dense_answer(model, batch) for batch in batches] if todo else []
        for step in todo:
            number = int(torch.randint(len(batches), (), generator=generator))
            losses = trainer.step(model, batches[number], dense[number], generator)
            history.append(losses)
            if keep is not None and ((step + 1) % _KEEP_EVERY == 0 or step + 1 == settings.steps):
                state = trainer.state_dict() | {"generator": generator.get_state()}
                keep(state | {"history": [dataclasses.astuple(losses) for losses in history]})
            if after_step is not None:
                after_step(step, losses)
    return history


@contextmanager
def frozen(model: EquiformerV2) -> Iterator[None]:
    """Keep a network in evaluation mode and its weights without derivatives within the context."""
    trained = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)


@torch.no_grad()
def dense_answer(model: EquiformerV2, batch: Batch) -> DenseAnswer:
    """Compute the answer that a router is compared with.

    Args:
        model: the network, in evaluation mode.
        batch: structures.

    Returns:
        Edges and outputs of the dense network, in normalised units.

    Raises:
        InputError: the network predicts no forces.
    """
    if model.force_block is None:
        raise InputError("the router is trained on forces, too: the network predicts none")
    graph = model.build_graph(batch)
    return graph, model(batch, graph=graph)


class _StraightThrough(BaseRouter, BaseRouting):
    """The router's hard choice with the derivative of its probability, and the losses of the choice.

    Router and routing of one forward pass.
    """

    observes_attention = True
    geometry: BatchGeometry

    def __init__(self, router: FTPRouter, temperature: float, generator: torch.Generator) -> None:
        self.router, self.temperature, self.generator = router, temperature, generator
        self.guide, self.sparsity = torch.zeros(()), torch.zeros(())

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> BaseRouting:
        self.geometry = BatchGeometry.from_batch(batch, graph)
        self.levels = self.router.trainable_levels(num_blocks)
        self.routed = sum(level is not None for level in self.levels)
        self.priority = static_priority(self.geometry).detach()
        return self

    def settings(self) -> dict[str, Any]:
        return self.router.settings()

    def decide(self, state: BlockState) -> Decision:
        level, geometry = self.levels[state.block], self.geometry
        if level is None:
            return Decision()
        attention = None if state.attention is None else state.attention.detach()
        logits = self.router.logits(geometry, dataclasses.replace(state, attention=attention), level)
        static = select(self.priority, geometry.structure, geometry.natoms, "topk", level, 1.0)
        guide = torch.nn.functional.binary_cross_entropy_with_logits(logits, static.to(logits.dtype))
        self.guide = self.guide + guide / self.routed
        if self.temperature > 0:
            uniform = torch.rand(len(logits), generator=self.generator).clamp(1e-6, 1 - 1e-6).to(logits)
            logits = logits + self.temperature * torch.log(uniform / (1 - uniform))
        keep = torch.sigmoid(logits)
        gates = (keep > 0.5).to(keep.dtype) + keep - keep.detach()
        kept = gates.new_zeros(len(geometry.natoms)).index_add(0, geometry.structure, gates)
        achieved = 1 - kept / geometry.natoms
        self.sparsity = self.sparsity + (level - achieved).square().mean()
        return Decision(gates, everywhere=True)
