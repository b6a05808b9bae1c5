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
"""Edges and outputs in normalised units."""


@dataclasses.dataclass(frozen=True)
class RouterTraining:
    """Settings of `RouterTrainer`.

    Attributes:
        steps: batches in all.
        learning_rate: of AdamW; it falls to 0 as a cosine.
        guide_weight: of the guide loss at the start; it falls linearly to 0 over `guide_steps`.
        guide_steps: None for half of `steps`.
        sparsity_weight: of (s - s_achieved)², summed over blocks.
        energy_weight: of |E - E_dense| in normalised units.
        force_weight: of the mean ||F - F_dense|| over free atoms in normalised units.
        temperature: of the Gumbel noise on the logits; 0 for none.
        seed: of the noise and of the order of the batches.
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
    """One step.

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
    """The training of a router's MLP, one step at a time.

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
        """Steps that were taken."""
        return self._decay.last_epoch

    def step(
        self,
        model: EquiformerV2,
        batch: Batch,
        dense: DenseAnswer,
        generator: torch.Generator,
        average: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> RouterLosses:
        """One step of the optimizer.

        Args:
            model: the network, `frozen`.
            batch: structures, labels are not read.
            dense: `dense_answer(model, batch)`.
            generator: of the Gumbel noise.
            average: of gradients and losses over the processes that take this step together.
        """
        graph, expected = dense
        settings = self.settings
        training = _StraightThrough(self.router, settings.temperature, generator)
        with torch.enable_grad():
            out = model(batch, graph=graph, active=training)
            energy = (out["energy"] - expected["energy"]).abs().mean()
            system = training.system
            assert system is not None
            error = (out["forces"] - expected["forces"])[system.free]
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
        """What `load_state_dict` needs to go on as if nothing had stopped; readable with `weights_only`."""
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
        resume: what `keep` was given earlier; training goes on from there as if it had not stopped.
        keep: called with the state of the training after every 10 steps and at the end.

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
                told = [dataclasses.astuple(losses) for losses in history]
                keep({**trainer.state_dict(), "generator": generator.get_state(), "history": told})
            if after_step is not None:
                after_step(step, losses)
    return history


@contextmanager
def frozen(model: EquiformerV2) -> Iterator[None]:
    """Evaluation mode and no derivatives by the network's weights; afterwards as it was before."""
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
    """What the router is compared with: edges and outputs of the whole network.

    Raises:
        InputError: the network predicts no forces.
    """
    if model.force_block is None:
        raise InputError("the router is trained on forces, too: the network predicts none")
    graph = model.build_graph(batch)
    return graph, model(batch, graph=graph)


def routed_levels(router: FTPRouter, num_blocks: int) -> tuple[float | None, ...]:
    """Level of every block (None: all atoms), of which there is something to train.

    Raises:
        InputError: there are levels for another number of blocks, or no block has one.
    """
    levels = router.of_blocks(num_blocks)
    if all(level is None for level in levels):
        raise InputError("no block is routed: give levels, or a network of more than two blocks")
    return levels


class _StraightThrough(BaseRouter):
    """The router's hard choice with the derivative of its probability, and the losses of the choice."""

    def __init__(self, router: FTPRouter, temperature: float, generator: torch.Generator) -> None:
        self.router, self.temperature, self.generator = router, temperature, generator
        self.system: BatchGeometry | None = None
        self.guide, self.sparsity = torch.zeros(()), torch.zeros(())

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> BaseRouting:
        self.system = BatchGeometry.from_batch(batch, graph)
        return _Training(self, self.system, routed_levels(self.router, num_blocks))

    def settings(self) -> dict[str, Any]:
        return self.router.settings()


class _Training(BaseRouting):
    observes_attention = True

    def __init__(
        self, owner: _StraightThrough, system: BatchGeometry, levels: tuple[float | None, ...]
    ) -> None:
        self.owner, self.system, self.levels = owner, system, levels
        self.routed = sum(level is not None for level in levels)
        self.priority = static_priority(system).detach()

    def decide(self, state: BlockState) -> Decision:
        level = self.levels[state.block]
        if level is None:
            return Decision()
        system, owner = self.system, self.owner
        detached = dataclasses.replace(state, attention=_detached(state.attention))
        logits = owner.router.logits(system, detached, level)
        static = select(self.priority, system.structure, system.natoms, "topk", level, 1.0)
        guide = torch.nn.functional.binary_cross_entropy_with_logits(logits, static.to(logits.dtype))
        owner.guide = owner.guide + guide / self.routed
        if owner.temperature > 0:
            uniform = torch.rand(len(logits), generator=owner.generator).clamp(1e-6, 1 - 1e-6).to(logits)
            logits = logits + owner.temperature * torch.log(uniform / (1 - uniform))
        keep = torch.sigmoid(logits)
        gates = (keep > 0.5).to(keep.dtype) + keep - keep.detach()
        kept = gates.new_zeros(len(system.natoms)).index_add(0, system.structure, gates)
        achieved = 1 - kept / system.natoms
        owner.sparsity = owner.sparsity + (level - achieved).square().mean()
        return Decision(gates, everywhere=True)


def _detached(attention: Tensor | None) -> Tensor | None:
    return None if attention is None else attention.detach()
