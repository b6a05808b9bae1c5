"""Discrepancy of a changed network to the dense one, on structures without labels.

    L = mean over systems of ( |E - E_dense| / atoms + λ * mean over free atoms of ||F - F_dense|| )

The dense network is its own teacher, so any structures of the users' domain will do. Systems count equally,
however many frames each has: frames of one relaxation are near copies of each other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.batch_threads import map_batches
from equiformer2.checkpoint import Normalizers
from equiformer2.errors import InputError, naming_structures
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2

#: Fields that a network reads or the discrepancy needs; labels are not among them.
UNLABELLED = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "tags", "fixed", "sid", "fid")
FORCE_WEIGHT = 1.0
"""Weight λ of forces in the loss, Å.

The paper's training loss weighs forces 50 times as much as the energy of a structure; per atom of an OC20
structure (78 on average) that is 0.6.
"""

Network = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True)
class Discrepancy:
    """Errors against the dense network (or against labels), by system and on average.

    Attributes:
        systems: names of the S systems.
        energy: `[S]` mean |E - E_dense| / atoms, eV; NaN where energies are not compared.
        forces: `[S]` mean ||F - F_dense|| over free atoms, eV/Å; NaN for a system without free atoms.
        force_mae: `[S]` mean absolute error of the force components of free atoms, eV/Å.
        force_weight: λ, Å.
    """

    systems: tuple[str, ...]
    energy: np.ndarray
    forces: np.ndarray
    force_mae: np.ndarray
    force_weight: float

    @classmethod
    def from_structures(
        cls, systems: Sequence[str], system_of: np.ndarray, table: np.ndarray, force_weight: float
    ) -> "Discrepancy":
        """Average the errors of structures over the frames of each system.

        Args:
            systems: names of the S systems.
            system_of: `[structures]` index of each structure's system.
            table: `[structures, 3]` of `structure_errors`.
            force_weight: λ, Å.

        Returns:
            Errors by system.
        """
        means = np.full((len(systems), 3), np.nan)
        for index in range(len(systems)):
            rows = table[system_of == index]
            for column in range(3):
                known = rows[~np.isnan(rows[:, column]), column]
                if len(known):
                    means[index, column] = known.mean()
        return cls(tuple(systems), means[:, 0], means[:, 1], means[:, 2], force_weight)

    @property
    def by_system(self) -> np.ndarray:
        """Losses of the systems, `[S]` eV; of energy and forces, one that a system does not have counts as 0.

        NaN for a system that has neither, such as one without labels.
        """
        energy, forces = (np.where(np.isnan(values), 0.0, values) for values in (self.energy, self.forces))
        neither = np.isnan(self.energy) & np.isnan(self.forces)
        return np.where(neither, np.nan, energy + self.force_weight * forces)

    @property
    def loss(self) -> float:
        """Loss L, eV; 0 where no system has errors."""
        known = self.by_system[~np.isnan(self.by_system)]
        return float(known.mean()) if len(known) else 0.0

    def averages(self) -> dict[str, float | None]:
        """Return means over systems; None for errors that no system has."""
        values = {
            "loss": self.by_system,
            "energy_per_atom": self.energy,
            "force_norm": self.forces,
            "force_mae": self.force_mae,
        }
        return {name: float(np.nanmean(v)) if not np.isnan(v).all() else None for name, v in values.items()}


class Calibration:
    """Structures with the dense network's answers, computed once and kept.

    Args:
        model: dense network; it answers in evaluation mode.
        normalizers: units of its outputs, for eV and eV/Å.
        structures: at least one; labels are not read. Searches try most cuts on the first ones alone: arrange
            them by `mixed_systems`.
        batch_size: structures per forward pass.
        force_weight: λ, Å.

    Attributes:
        structures: the structures without labels.
        systems: names of their systems (`sid`).
        batches: the structures in batches, on the network's device.
        graphs: edges of the batches; cuts do not change them.
        dense: answers of the dense network for the batches, normalised units.

    Raises:
        InputError: no structures, or one that the network cannot take (named by `sid` and `fid`).
    """

    def __init__(
        self,
        model: EquiformerV2,
        normalizers: Normalizers,
        structures: Sequence[Data],
        batch_size: int = 2,
        force_weight: float = FORCE_WEIGHT,
    ) -> None:
        if not structures:
            raise InputError("there are no structures to calibrate on: give at least one")
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}: give at least 1 structure")
        if not 0 <= force_weight < math.inf:
            raise InputError(f"the force weight is {force_weight}: give a number of at least 0 (Å)")
        self.energy_std, self.force_std = normalizers.energy.std, normalizers.forces.std
        self.force_weight = force_weight
        device = model.sphere_embedding.weight.device
        self.structures = [unlabelled(structure) for structure in structures]
        self.batches: list[Batch] = []
        for start in range(0, len(structures), batch_size):
            self.batches.append(Batch.from_data_list(self.structures[start : start + batch_size]).to(device))
        names = [name for batch in self.batches for name in batch.sid]
        self.systems = tuple(dict.fromkeys(names))
        self._system_of = np.array([self.systems.index(name) for name in names])
        ends = np.cumsum([batch.num_graphs for batch in self.batches]).tolist()
        self._rows = [slice(*pair) for pair in zip([0, *ends[:-1]], ends, strict=True)]
        self.graphs: list[RadiusGraph] = []
        for batch in self.batches:
            with naming_structures(batch):
                self.graphs.append(model.build_graph(batch))
        self.dense = self.answers(model)

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of atoms and of edges of all structures."""
        edges = sum(graph.edge_index.shape[1] for graph in self.graphs)
        return sum(structure.pos.shape[0] for structure in self.structures), edges

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Numbers of structures, atoms and edges of every batch."""
        return [
            (batch.num_graphs, batch.num_nodes, graph.edge_index.shape[1])
            for batch, graph in zip(self.batches, self.graphs, strict=True)
        ]

    def answers(self, model: Network) -> list[dict[str, Tensor]]:
        """Run a network on every batch, in evaluation mode; on a CPU several batches at a time.

        Args:
            model: called as `model(batch, graph=…)`. What is no plain network gets one batch at a time: it
                may count what it does.

        Returns:
            Outputs per batch, normalised units.
        """
        with in_evaluation_mode(model):
            plain = isinstance(model, EquiformerV2) and model.backend != "compile"
            batches = range(len(self.batches))
            return list(
                map_batches(
                    lambda index: self.answer(index, model),
                    batches,
                    count=len(batches) if plain else 1,
                    device=self.batches[0].pos.device,
                )
            )

    @torch.no_grad()
    def answer(self, index: int, model: Network, **given: Any) -> dict[str, Tensor]:
        """Run a network on one batch. Calls for several batches do not depend on each other.

        Args:
            index: number of the batch.
            model: network in evaluation mode, called as `model(batch, graph=…)`.
            **given: further arguments of that call, such as `start` and `keep` of `EquiformerV2`.

        Returns:
            Outputs, normalised units.
        """
        return dict(model(self.batches[index], graph=self.graphs[index], **given))

    def errors(self, index: int, model: Network, **given: Any) -> Tensor:
        """Compare a network with the dense one on one batch, as `structure_errors`; arguments of `answer`."""
        out = self.answer(index, model, **given)
        return structure_errors(out, self.dense[index], self.batches[index], self.energy_std, self.force_std)

    def loss_on(self, batches: Sequence[int], errors: Mapping[int, Tensor]) -> float:
        """Average errors over the systems of some batches.

        Args:
            batches: numbers of the batches.
            errors: number of a batch -> `errors` of it. Batches that are missing count as if they had none,
                so that the result is a lower bound of the loss: it is a mean of terms that are not negative.

        Returns:
            Loss L on these batches alone, eV; infinite if an answer was not finite.
        """
        rows = [errors.get(index, torch.zeros(self.batches[index].num_graphs, 3)).cpu() for index in batches]
        systems = np.concatenate([self._system_of[self._rows[index]] for index in batches])
        present, places = np.unique(systems, return_inverse=True)
        names = [self.systems[index] for index in present]
        table = torch.cat([values.double() for values in rows]).numpy()
        loss = Discrepancy.from_structures(names, places, table, self.force_weight).loss
        return loss if np.isfinite(loss) else float("inf")

    def discrepancy(self, model: Network) -> Discrepancy:
        """Compare a network, called as `model(batch, graph=…)`, with the dense one."""
        return self.compare(self.answers(model))

    def loss(self, model: Network) -> float:
        """Return the loss L of a network, eV; infinite if one of its answers is not finite."""
        loss = self.discrepancy(model).loss
        return loss if np.isfinite(loss) else float("inf")

    def compare(
        self,
        answers: Sequence[Mapping[str, Tensor]],
        reference: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> Discrepancy:
        """Compare stored answers with those of the dense network.

        Args:
            answers: outputs per batch, as `answers()` gives them.
            reference: labels to compare with instead of the dense network's answers; NaN where a structure
                has none.

        Returns:
            Errors by system.
        """
        columns = []
        for out, expected, batch in zip(answers, reference or self.dense, self.batches, strict=True):
            errors = structure_errors(out, expected, batch, self.energy_std, self.force_std)
            if reference is not None:
                errors[_unlabelled_errors(expected, batch)] = torch.nan
            columns.append(errors)
        table = torch.cat(columns).cpu().numpy()
        return Discrepancy.from_structures(self.systems, self._system_of, table, self.force_weight)


@contextmanager
def in_evaluation_mode(model: Network) -> Iterator[None]:
    """Context in which a network is in evaluation mode; other callables are left alone."""
    training = isinstance(model, torch.nn.Module) and model.training
    if training:
        model.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if training:
            model.train()  # type: ignore[attr-defined]


def unlabelled(structure: Data) -> Data:
    """Copy a structure without its labels: `UNLABELLED` fields alone."""
    return Data(**{name: structure[name] for name in UNLABELLED})


def structure_errors(
    out: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    batch: Batch,
    energy_std: float,
    force_std: float,
) -> Tensor:
    """Compute the errors of every structure of a batch, of forces over free atoms.

    Args:
        out: `energy [B]` and `forces [N, 3]`, in normalised units; both may be absent.
        reference: outputs to compare with, in the same units.
        batch: the structures.
        energy_std: unit of the energies, eV.
        force_std: unit of the forces, eV/Å.

    Returns:
        `[B, 3]` float64: |ΔE| / atoms (eV), mean ||ΔF|| and mean |ΔF component| (eV/Å). NaN where one of the
        two lacks a field or there are no free atoms; infinite where the network broke down.
    """
    natoms = batch.natoms.view(-1).double()
    missing = torch.full_like(natoms, float("nan"))
    energy = missing
    if "energy" in out and "energy" in reference:
        energy = (out["energy"].double() - reference["energy"].double()).abs() * energy_std / natoms
        energy = torch.nan_to_num(energy, nan=float("inf"), posinf=float("inf"))
    if "forces" not in out or "forces" not in reference:
        return torch.stack((energy, missing, missing), dim=1)
    free = ~batch.fixed.bool()
    structure, error = batch.batch[free], (out["forces"] - reference["forces"])[free].double() * force_std
    per_atom = torch.stack((error.norm(dim=1), error.abs().mean(dim=1)), dim=1)
    per_atom = torch.nan_to_num(per_atom, nan=float("inf"), posinf=float("inf"))
    count = torch.zeros_like(natoms).index_add(0, structure, torch.ones_like(per_atom[:, 0]))
    total = natoms.new_zeros(len(natoms), 2).index_add(0, structure, per_atom)
    return torch.cat((energy[:, None], total / count[:, None]), dim=1)  # 0 / 0 is NaN


def _unlabelled_errors(labels: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Mark the errors `[B, 3]` of `structure_errors` for which a structure has no label: NaN in `labels`."""
    missing = torch.zeros(batch.num_graphs, 3, dtype=torch.bool, device=batch.pos.device)
    if "energy" in labels:
        missing[:, 0] = labels["energy"].isnan()
    if "forces" in labels:
        missing[batch.batch[labels["forces"].isnan().any(dim=1)], 1:] = True
    return missing
