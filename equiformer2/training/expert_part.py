"""Experts of a run: made of a plain network, with units per task, and written as its result."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from datasets_oc20 import OC20DataModule
from datasets_oc20.frame_selection import spread_frames
from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Checkpoint, Normalizer, Normalizers
from equiformer2.checkpoint.checkpoint import load_checkpoint, read_contents
from equiformer2.checkpoint.contents import WeightsKind, check_energy_kind
from equiformer2.checkpoint.expert_files import (
    ExpertContents,
    ExpertWeights,
    TaskInfo,
    check_task_name,
    write_experts,
)
from equiformer2.checkpoint.samples import MOST_ATOMS, Samples
from equiformer2.checkpoint.training_data import KEY
from equiformer2.errors import InputError
from equiformer2.experts import ExpertNetwork, ExpertSettings
from equiformer2.experts.normalizers import TaskNormalizers
from equiformer2.model import EquiformerV2
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.start import describe_training_data, keep_predictions, load_start
from equiformer2.training.task import TaskSettings

log = logging.getLogger("equiformer2")
_OF_PRUNING = "equiformer2.pruning."

_SAMPLES = 32
"""Most training structures of a task that the file holds: for scores of experts, and what pruning changes."""


def check_experts(
    settings: ExpertSettings,
    data: dict[str, Any],
    task: TaskSettings,
    adapter_rank: int,
    callbacks: Sequence[object],
) -> None:
    """Refuse a configuration of experts that cannot be trained, before anything is read.

    Args:
        settings: of the experts.
        data: arguments of the data module.
        task: of the run.
        adapter_rank: of its adapter.
        callbacks: of the trainer that are configured.

    Raises:
        InputError: experts without tasks or tasks without experts, or settings that experts do not go with.
    """
    tasks = data.get("tasks")
    if settings.num_experts == 1:
        raise InputError(
            "experts.num_experts is 1, which is a plain network: give 2 or more experts, or 0 for none"
        )
    if settings.num_experts == 0:
        if tasks is not None:
            raise InputError(
                "data.tasks is for a network of experts: set experts.num_experts, or give data.train alone"
            )
        return
    if tasks is None:
        raise InputError(
            "experts.num_experts needs data.tasks, the data sets to train together by name: for one set give "
            "one task"
        )
    for name in tasks:
        check_task_name(name, "data.tasks")
    reasons = {
        "task.dens": task.dens is not None,
        "task.stress_coefficient": task.stress_coefficient > 0,
        "task.backend: compile": task.backend == "compile",
        "adapter.rank": adapter_rank > 0,
        # They prune and distill a network's own weights.
        "trainer.callbacks": any(type(each).__module__.startswith(_OF_PRUNING) for each in callbacks),
    }
    for key, wrong in reasons.items():
        if wrong:
            raise InputError(f"{key} does not go with experts (experts.num_experts): leave one of them out")


class ExpertPart:
    """The experts of a run.

    Args:
        settings: of the experts.
        data: with the data of every task, set up.
        forces: of the model, `direct`, `gradient` or `none`.
        init_from: plain checkpoint whose weights all experts start from, or None.

    Attributes:
        start: what `init_from` holds.
        normalizers: of every task, made of its training data.
    """

    def __init__(
        self, settings: ExpertSettings, data: ResumableDataModule, forces: str, init_from: str | None
    ) -> None:
        self.settings, self.data, self.init_from = settings, data, init_from
        self.start: Checkpoint | None = None
        if init_from is not None:
            # Only forces and features are taken over: the energies of every task have units of their own.
            kind = read_contents(init_from).energy_kind or next(iter(data.parts.values())).energy_kind
            self.start = load_checkpoint(init_from, energy_kind=kind)
        self.normalizers = TaskNormalizers(self._units(forces))

    def _units(self, forces: str) -> dict[str, Normalizers]:
        """Fit the normalizers of every task; the spread of the forces is one for all."""
        parts = self.data.parts

        def pooled(name: str) -> float:
            weights = {task: len(part.training) * self.data.repeats[task] for task, part in parts.items()}
            squares = sum(w * parts[task].normalizers[name][1] ** 2 for task, w in weights.items())  # type: ignore[literal-required]
            return math.sqrt(squares / sum(weights.values()))

        of_forces = pooled("forces") if forces != "gradient" else pooled("energy")
        units = {}
        for name, part in parts.items():
            mean, std = part.normalizers["energy"]
            # The gradient of an energy has its unit, and forces have one unit in all tasks.
            energy = Normalizer(mean, of_forces if forces == "gradient" else std)
            references = part.normalizers["linear_references"]
            units[name] = Normalizers(energy, Normalizer(0.0, of_forces), references)
            after = "" if references is None else " after linear references"
            log.info(
                f"task {name}: {len(part.training)} structures, {part.energy_kind} energies "
                f"{energy.mean:.4f} ± {energy.std:.4f} eV{after}, forces ± {of_forces:.4f} eV/Å"
            )
        return units

    def network(self, plain: EquiformerV2, seed: int) -> ExpertNetwork:
        """Make the network of experts of a plain one.

        Args:
            plain: with random weights, in the place of which those of `init_from` come.
            seed: of the differences between experts.
        """
        if self.start is None:
            return ExpertNetwork(plain, self.settings, list(self.data.parts), seed)
        load_start(plain, self.start, str(self.init_from))
        before = self.start.normalizers
        keep_predictions(plain, before, Normalizers(before.energy, self.normalizers.forces))
        network = ExpertNetwork(plain, self.settings, list(self.data.parts), seed)
        with torch.no_grad():
            for name, stack in network.task_weights().items():
                if ".so3_linear_2." in name:
                    for number, units in enumerate(self.normalizers.tasks.values()):
                        stack[number] *= before.energy.std / units.energy.std
        return network

    @cached_property
    def training_data(self) -> dict[str, Any]:
        """Contents of the training data of every task (`checkpoint.training_data`), by task."""
        return {
            name: describe_training_data(part, self.start, self.normalizers.tasks[name])
            for name, part in self.data.parts.items()
        }

    def write(
        self, path: AnyPath, networks: Mapping[WeightsKind, nn.Module], provenance: dict[str, Any]
    ) -> None:
        """Write the expert file of the networks in training.

        Args:
            path: of the file.
            networks: raw, and averaged where there is an average.
            provenance: plain values: origin of the weights.
        """
        weights: dict[WeightsKind, ExpertWeights] = {}
        for kind, network in networks.items():
            assert isinstance(network, ExpertNetwork)
            config, weights[kind] = network.config, network.weights()
        write_experts(
            path,
            ExpertContents(
                source=str(path),
                config=config,
                settings=self.settings.to_dict(),
                tasks={
                    name: self._task(name, part, config.max_num_elements)
                    for name, part in self.data.parts.items()
                },
                weights=weights,
                provenance=provenance,
                experts=tuple(range(self.settings.num_experts)),
            ),
        )

    def _task(self, name: str, part: OC20DataModule, num_elements: int) -> TaskInfo:
        shares = torch.from_numpy(part.mean_composition())
        composition = torch.zeros(num_elements, dtype=torch.float64)
        known = min(num_elements, len(shares))
        composition[:known] = shares[:known]
        kind = check_energy_kind(part.energy_kind, f"data.tasks.{name}")
        told = {KEY: self.training_data[name]}
        return TaskInfo(name, kind, self.normalizers.tasks[name], composition, told, self.samples[name])

    @cached_property
    def samples(self) -> dict[str, Samples]:
        """A few training structures of every task, evenly spread, so that most are of other systems."""
        chosen = {}
        for name, part in self.data.parts.items():
            rows = spread_frames(len(part.datasets["train"]), _SAMPLES)
            structures = [part.datasets["train"][int(row)] for row in rows]
            # Of structures of very many atoms there are as many as a file may hold.
            most = MOST_ATOMS // max(int(each.natoms) for each in structures)
            fewer = spread_frames(len(structures), max(1, most))
            chosen[name] = Samples.from_structures([structures[place] for place in fewer])
        return chosen
