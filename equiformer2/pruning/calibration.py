"""How far a changed network is from the dense one, on structures without labels.

    L = mean over systems of ( |E - E_dense| / atoms + λ * mean over free atoms of ||F - F_dense|| )

The dense network is its own teacher, so any structures of the users' domain will do. Systems count equally,
however many frames each has: frames of one relaxation are near copies of each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import Normalizers
from equiformer2.errors import InputError, naming_structures
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2

#: What a network reads, and what the discrepancy needs; labels are not among them.
UNLABELLED = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "tags", "fixed", "sid", "fid")
FORCE_WEIGHT = 1.0
"""λ, Å. The paper's training loss weighs forces 50 times as much as the energy of a structure; per atom
of an OC20 structure (78 on average) that is 0.6."""

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

    @property
    def by_system(self) -> np.ndarray:
        """`[S]` losses, eV; what a system does not have counts as 0."""
        energy, forces = (np.where(np.isnan(values), 0.0, values) for values in (self.energy, self.forces))
        return energy + self.force_weight * forces

    @property
    def loss(self) -> float:
        """L, eV."""
        return float(self.by_system.mean())

    def averages(self) -> dict[str, float | None]:
        """Means over systems; None for what no system has."""
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
        model: the dense network, in evaluation mode while it answers.
        normalizers: from its units to eV and eV/Å.
        structures: at least one; labels are not read.
        batch_size: structures per forward pass.
        force_weight: λ, Å.

    Attributes:
        structures: without labels.
        batches: the same on the network's device.
        graphs: their edges; cuts do not change them.

    Raises:
        InputError: no structures, or one that the network cannot take (named by `sid` and `fid`).
    """

    def __init__(
        self,
        model: EquiformerV2,
        normalizers: Normalizers,
        structures: Sequence[Data],
        batch_size: int = 8,
        force_weight: float = FORCE_WEIGHT,
    ) -> None:
        if not structures:
            raise InputError("there are no structures to calibrate on: give at least one")
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}: give at least 1 structure")
        if not force_weight >= 0:
            raise InputError(f"the force weight is {force_weight}: give 0 or more (Å)")
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
        self.graphs: list[RadiusGraph] = []
        for batch in self.batches:
            with naming_structures(batch):
                self.graphs.append(model.build_graph(batch))
        self.dense = self.answers(model)

    @property
    def size(self) -> tuple[int, int]:
        """Atoms and edges of all structures."""
        edges = sum(graph.edge_index.shape[1] for graph in self.graphs)
        return sum(structure.pos.shape[0] for structure in self.structures), edges

    @torch.no_grad()
    def answers(self, model: Network) -> list[dict[str, Tensor]]:
        """Outputs of `model` for every batch, normalised units; it runs in evaluation mode."""
        training = isinstance(model, torch.nn.Module) and model.training
        if training:
            model.eval()  # type: ignore[attr-defined]
        try:
            return [dict(model(b, graph=g)) for b, g in zip(self.batches, self.graphs, strict=True)]
        finally:
            if training:
                model.train()  # type: ignore[attr-defined]

    def discrepancy(self, model: Network) -> Discrepancy:
        """`model` (called as `model(batch, graph=…)`) against the dense network."""
        return self.compare(self.answers(model))

    def loss(self, model: Network) -> float:
        """L of `model`, eV; infinite when it answers something that is not finite."""
        loss = self.discrepancy(model).loss
        return loss if np.isfinite(loss) else float("inf")

    def compare(
        self,
        answers: Sequence[Mapping[str, Tensor]],
        reference: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> Discrepancy:
        """`answers` (as `answers()` gives them) against the dense network's, or against `reference`."""
        columns = [
            structure_errors(out, expected, batch, self.energy_std, self.force_std)
            for out, expected, batch in zip(answers, reference or self.dense, self.batches, strict=True)
        ]
        table = torch.cat(columns).cpu().numpy()
        return by_system(self.systems, self._system_of, table, self.force_weight)


def unlabelled(structure: Data) -> Data:
    """A copy with nothing but what a network may know."""
    return Data(**{name: structure[name] for name in UNLABELLED})


def structure_errors(
    out: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    batch: Batch,
    energy_std: float,
    force_std: float,
) -> Tensor:
    """Per structure |ΔE| / atoms (eV), mean ||ΔF|| and mean |ΔF component| (eV/Å), `[B, 3]` float64.

    `out` and `reference` hold `energy [B]` and `forces [N, 3]`, in units of `energy_std` and `force_std`.
    Forces are those of free atoms; without any, and where one of the two lacks a field, there is NaN. An
    error that is no number because the network broke down is infinite.
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


def by_system(
    systems: Sequence[str], system_of: np.ndarray, table: np.ndarray, force_weight: float
) -> Discrepancy:
    """Average `table` `[structures, 3]` of `structure_errors` over the frames of each system."""
    means = np.full((len(systems), 3), np.nan)
    for index in range(len(systems)):
        rows = table[system_of == index]
        for column in range(3):
            known = rows[~np.isnan(rows[:, column]), column]
            if len(known):
                means[index, column] = known.mean()
    return Discrepancy(tuple(systems), means[:, 0], means[:, 1], means[:, 2], force_weight)
