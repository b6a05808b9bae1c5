"""Errors on systems that were used for nothing else: against the dense network, and against labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import Normalizers
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration, Network
from equiformer2.pruning.structures import labelled_energies, read_structures


@dataclass(frozen=True)
class HeldOut:
    """Structures with the dense network's answers and their own labels.

    Labels of one source only: DFT and a universal potential do not go into one number, so each has a
    `HeldOut` of its own.

    Attributes:
        name: of the set, such as `dft`.
        calibration: the structures and the dense answers.
        labels: per batch, in normalised units; what the data do not have is absent.
    """

    name: str
    calibration: Calibration
    labels: list[dict[str, Tensor]]

    @classmethod
    def read(
        cls,
        name: str,
        paths: str | Path | Sequence[str | Path],
        model: EquiformerV2,
        normalizers: Normalizers,
        energy_kind: str,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> "HeldOut":
        """From files, see `read_structures`; energies of another kind than the model's are no labels."""
        structures = read_structures(paths, limit)
        calibration = Calibration(model, normalizers, structures, batch_size)
        energies = labelled_energies(paths, energy_kind)
        labels = []
        for start in range(0, len(structures), batch_size):
            part = structures[start : start + batch_size]
            labels.append(_labels(part, normalizers, energies, calibration.batches[start // batch_size]))
        return cls(name, calibration, labels)

    @property
    def systems(self) -> tuple[str, ...]:
        """Names of the systems."""
        return self.calibration.systems

    def errors(self, network: Network) -> dict[str, Any]:
        """`to_dense` and `to_labels`, each with averages over systems (`Discrepancy.averages`)."""
        answers = self.calibration.answers(network)
        found: dict[str, Any] = {"to_dense": self.calibration.compare(answers).averages(), "to_labels": None}
        if any(self.labels):
            found["to_labels"] = self.calibration.compare(answers, self.labels).averages()
        return found


def check_unseen(held_out: Sequence[HeldOut], used: Sequence[Data], what: str) -> None:
    """Raise `InputError` when a system of `used` is held out; `what` says what it was used for."""
    seen = {structure.sid for structure in used}
    for part in held_out:
        both = sorted(seen & set(part.systems))
        if both:
            raise InputError(
                f"the system {both[0]} is in {what} and in the held-out set {part.name}: hold out others"
            )


def _labels(
    structures: Sequence[Data], normalizers: Normalizers, energies: bool, batch: Batch
) -> dict[str, Tensor]:
    labels = {}
    batched = Batch.from_data_list(list(structures))
    if energies and all("energy" in structure for structure in structures):
        labels["energy"] = normalizers.normalize_energy(batched.energy.view(-1), batched)
    if all("forces" in structure for structure in structures):
        labels["forces"] = normalizers.normalize_forces(batched.forces)
    return {name: value.to(batch.pos.device) for name, value in labels.items()}
