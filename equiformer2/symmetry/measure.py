"""Measure how far a model's answers change when a structure is only written down differently."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.symmetry import transformations
from equiformer2.symmetry.transformations import Transformation, essential

Predict = Callable[[Batch], Mapping[str, Tensor]]
"""A batch to `energy [B]` and, if the model has them, `forces [N, 3]`; in any units."""

_BATCH = "batch composition"
_TRANSFORMATIONS: dict[str, Transformation] = {
    "repeated call": transformations.repeat_call,
    "rotation": transformations.rotate,
    "translation": transformations.translate,
    "permutation": transformations.permute,
    "periodic images": transformations.choose_images,
    "lattice vectors": transformations.choose_lattice_vectors,
    "supercell": transformations.repeat_cell,
}
SYMMETRIES = (*_TRANSFORMATIONS, _BATCH)


@dataclasses.dataclass(frozen=True)
class SymmetryError:
    """Deviations under one symmetry. Zero for a model that has it, but for rounding.

    Attributes:
        energy_max, energy_rms: deviation per atom over the root mean square energy per atom of the
            structures.
        forces_max, forces_rms: deviation of the components over the root mean square force component of the
            structures; None without forces.
    """

    energy_max: float
    energy_rms: float
    forces_max: float | None
    forces_rms: float | None

    @property
    def largest(self) -> float:
        """The larger of the two root mean squares."""
        return max(self.energy_rms, self.forces_rms or 0.0)

    @classmethod
    def from_deviations(
        cls, deviations: list[tuple[Tensor, Tensor | None]], energy_scale: float, forces_scale: float
    ) -> "SymmetryError":
        """Summarize deviations of the energy per atom `[1]` and of the forces, in units of the scales."""
        energies = torch.cat([energy for energy, _ in deviations]) / energy_scale
        largest, rms = energies.abs().max().item(), _rms([energies])
        parts = [forces.flatten() for _, forces in deviations if forces is not None]
        if not parts:
            return cls(largest, rms, None, None)
        forces = torch.cat(parts) / forces_scale
        return cls(largest, rms, forces.abs().max().item(), _rms([forces]))


@dataclasses.dataclass(frozen=True)
class SymmetryReport:
    """`SymmetryError` of each symmetry that the structures have; prints as a table."""

    errors: dict[str, SymmetryError]

    def __str__(self) -> str:
        lines = [f"{'relative error of':20}  energy max  energy rms  forces max  forces rms"]
        for name, error in self.errors.items():
            values = (error.energy_max, error.energy_rms, error.forces_max, error.forces_rms)
            cells = ("–" if value is None else f"{value:.1e}" for value in values)
            lines.append(f"{name:20}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)


def check_symmetries(
    predict: Predict,
    data: Data | Batch | Sequence[Data],
    *,
    symmetries: Iterable[str] = SYMMETRIES,
    trials: int = 2,
    seed: int = 0,
    energy_per_structure: float | None = None,
) -> SymmetryReport:
    """Measure how far a model's answers change under the symmetries of physics.

    The numbers depend on the precision of `pos` and of the model: hand over both in float64 to see more than
    rounding. A model that keeps exactly the k nearest neighbours has no rotational symmetry where neighbours
    tie at that cut (docs/graph.md). Equivalent sites of a crystal do, and in a small cell the images of one
    atom on both sides of another always do, however the atoms are displaced.

    Args:
        predict: the model, for instance `model` itself or `Predictor(…).predict`.
        data: one or more structures.
        symmetries: names from `SYMMETRIES`. Those that need a periodic axis are left out of the report when
            no structure has one.
        trials: random transformations of each kind and structure.
        seed: of these transformations.
        energy_per_structure: the part of an energy that every structure has once, whatever its size, such as
            the mean of a normalizer, in the model's unit. It is subtracted before energies are compared,
            since two cells have it once and not twice. None: the attribute `energy_per_structure` of what
            `predict` is a method of (`Predictor` has it), else 0.

    Returns:
        The errors by symmetry.

    Raises:
        InputError: a name is not in `SYMMETRIES`.
    """
    if energy_per_structure is None:
        owner = getattr(predict, "__self__", None)
        energy_per_structure = float(getattr(owner, "energy_per_structure", 0.0))
    model = _Model(predict, energy_per_structure)
    if isinstance(data, Batch):
        data = data.to_data_list()
    structures = [essential(structure) for structure in ([data] if isinstance(data, Data) else data)]
    before = [model.predict([structure])[0] for structure in structures]
    per_atom = [energy / len(s.pos) for (energy, _), s in zip(before, structures, strict=True)]
    # Where everything is zero, or there is nothing, errors are absolute.
    energy_scale = _rms(per_atom) or 1.0
    forces_scale = _rms([forces for _, forces in before if forces is not None]) or 1.0
    errors = {}
    for name in symmetries:
        if name not in SYMMETRIES:
            raise InputError(f"unknown symmetry '{name}'; known are {', '.join(SYMMETRIES)}")
        generator = torch.Generator().manual_seed(seed)
        deviations = []
        for structure, expected in zip(structures, before, strict=True):
            for _ in range(trials):
                answer: _Answer | None
                if name == _BATCH:
                    answer = model.in_company(structure, structures, generator)
                else:
                    answer = model.transformed(structure, _TRANSFORMATIONS[name], generator)
                if answer is not None:
                    energy = (answer[0] - expected[0]).reshape(1) / len(structure.pos)
                    forces = None
                    if expected[1] is not None and answer[1] is not None:
                        forces = answer[1] - expected[1]
                    deviations.append((energy, forces))
        if deviations:
            errors[name] = SymmetryError.from_deviations(deviations, energy_scale, forces_scale)
    return SymmetryReport(errors)


def assert_symmetries(
    predict: Predict,
    data: Data | Batch | Sequence[Data],
    tolerance: float | Mapping[str, float],
    *,
    trials: int = 2,
    seed: int = 0,
    energy_per_structure: float | None = None,
) -> SymmetryReport:
    """Raise `AssertionError` with the whole table if an rms error exceeds the tolerance.

    Args:
        tolerance: one number for all of `SYMMETRIES`, or one for each symmetry that shall be checked.
        predict, data, trials, seed, energy_per_structure: as for `check_symmetries`.

    Returns:
        The report of `check_symmetries`.

    Raises:
        AssertionError: the root mean square error of a symmetry exceeds its tolerance or is not a number.
        InputError: a name is not in `SYMMETRIES`.
    """
    limits = tolerance if isinstance(tolerance, Mapping) else dict.fromkeys(SYMMETRIES, tolerance)
    report = check_symmetries(
        predict,
        data,
        symmetries=limits,
        trials=trials,
        seed=seed,
        energy_per_structure=energy_per_structure,
    )
    # `not <=` so that NaN fails.
    broken = [name for name, error in report.errors.items() if not error.largest <= limits[name]]
    if broken:
        raise AssertionError(f"broken beyond the tolerance: {', '.join(broken)}\n{report}")
    return report


_Answer = tuple[Tensor, Tensor | None]


class _Model:
    """A model's answers in float64, energies without their constant.

    Args:
        predict: the model.
        energy_per_structure: part of an energy that every structure has once.
    """

    def __init__(self, predict: Predict, energy_per_structure: float) -> None:
        self._predict, self._constant = predict, energy_per_structure

    def predict(self, structures: list[Data]) -> list[_Answer]:
        """Compute energy and forces of every structure of one batch."""
        out = self._predict(Batch.from_data_list(structures))
        energies = out["energy"].detach().double().cpu().reshape(-1) - self._constant
        forces: Sequence[Tensor | None] = [None] * len(structures)
        if "forces" in out:
            forces = out["forces"].detach().double().cpu().split([len(s.pos) for s in structures])
        return list(zip(energies, forces, strict=True))

    def transformed(
        self, structure: Data, transformation: Transformation, generator: torch.Generator
    ) -> _Answer | None:
        """Answer for the transformed structure, transformed back; None where there is no such symmetry."""
        changed = transformation(structure, generator)
        if changed is None:
            return None
        energy, forces = self.predict([changed.data])[0]
        return energy / changed.copies, None if forces is None else changed.restore_forces(forces)

    def in_company(self, structure: Data, others: list[Data], generator: torch.Generator) -> _Answer:
        """Answer for the structure between two others, one of them in another orientation."""
        first, last = (others[int(torch.randint(len(others), (), generator=generator))] for _ in range(2))
        batch = [transformations.rotate(first, generator).data, structure, last]
        energy, forces = self.predict(batch)[1]
        return energy, None if forces is None else forces.unsqueeze(0)


def _rms(tensors: list[Tensor]) -> float:
    """Root mean square of all entries, 0 without entries."""
    if not tensors:
        return 0.0
    return torch.cat([tensor.flatten() for tensor in tensors]).square().mean().sqrt().item()
