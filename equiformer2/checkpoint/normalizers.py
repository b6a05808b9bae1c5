"""Conversion between normalised units and eV by mean, standard deviation and per-element energies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.model.config import ModelConfig
from equiformer2.values import Items, Number, mapping, shown

_F64 = torch.float64
_MAX_ELEMENTS = 256


@dataclass(frozen=True)
class Normalizer:
    """Linear map `normalised = (value - mean) / std`, in the type of the value, at least float32.

    Attributes:
        mean: in the unit of the value (eV, or eV/Å for forces).
        std: likewise.

    Raises:
        InputError: if one is not a number, not finite or beyond float32, or `std` is not positive.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        for name, rule in (("mean", Number()), ("std", Number(least=1e-30))):
            try:
                object.__setattr__(self, name, rule.read(getattr(self, name), name))
            except InputError as error:
                raise InputError(
                    f"a normalizer needs a finite mean and a finite std above 0; {error}"
                ) from error

    def normalize(self, value: Tensor) -> Tensor:
        """Convert physical to normalised units, any shape; half precision becomes float32."""
        return (_at_least_float32(value) - self.mean) / self.std

    def denormalize(self, value: Tensor) -> Tensor:
        """Convert normalised to physical units, any shape; half precision becomes float32."""
        return _at_least_float32(value) * self.std + self.mean


class Normalizers:
    """The energy's and the forces' normalizers, and the per-element energies of a total-energy model.

    Args:
        energy: normalizer of the energy per structure, eV.
        forces: normalizer of the force components, eV/Å. A mean other than zero would break equivariance.
        linear_references: `[Z_max + 1]` energies in eV, indexed by atomic number (OC20's table has 100
            entries), or None. A structure's energy is the network's, denormalised, plus the sum of its
            atoms' references. Held in float64: the sums of a total-energy model exceed float32's digits.

    Raises:
        InputError: if `linear_references` is not a finite vector, or the forces' mean is not zero.
    """

    def __init__(
        self,
        energy: Normalizer,
        forces: Normalizer,
        linear_references: Tensor | None = None,
    ) -> None:
        if forces.mean != 0.0:
            raise InputError(f"the forces' normalizer must have mean 0, not {forces.mean}")
        if linear_references is not None:
            linear_references = self._check_references(linear_references)
        self.energy = energy
        self.forces = forces
        self.linear_references = linear_references

    def denormalize(self, out: Mapping[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Convert the network's output to eV, eV/Å and eV/Å^3.

        Energies are computed in float64: a total energy of 5e5 eV has steps of 31 meV in float32.

        Args:
            out: `energy` `[B]`, `forces` `[N, 3]`, `stress` `[B, 3, 3]`, or some of them; normalised units.
            batch: the structures; `atomic_numbers` and `batch` are read when there are linear references.

        Returns:
            The same keys: `energy` `[B]` float64 eV, `forces` `[N, 3]` eV/Å and `stress` `[B, 3, 3]` eV/Å^3,
            float32 or better.
        """
        physical = {}
        if "energy" in out:
            physical["energy"] = self._shift(self.energy.denormalize(out["energy"].double()), batch, +1.0)
        if "forces" in out:
            physical["forces"] = self.forces.denormalize(out["forces"])
        if "stress" in out:
            physical["stress"] = _at_least_float32(out["stress"]) * self.energy.std
        return physical

    def normalize_energy(self, energy: Tensor, batch: Any) -> Tensor:
        """Convert energies `[B]` in eV to the network's units, `[B]` float64.

        References and mean are subtracted in float64. The result has few digits before the point and may be
        rounded to the type of the network's output (`training.losses` does).

        Args:
            energy: `[B]` eV.
            batch: the structures; see `denormalize`.
        """
        return self.energy.normalize(self._shift(energy.double(), batch, -1.0))

    def normalize_forces(self, forces: Tensor) -> Tensor:
        """Convert forces `[N, 3]` in eV/Å to the network's units, `[N, 3]`."""
        return self.forces.normalize(forces)

    def normalize_stress(self, stress: Tensor) -> Tensor:
        """Convert stress `[B, 3, 3]` in eV/Å^3 to the network's units, `[B, 3, 3]`."""
        return _at_least_float32(stress) / self.energy.std

    def for_gradient(self) -> Normalizers:
        """Return a copy with the energy's std for the forces, which then are the gradient of the energy."""
        return Normalizers(self.energy, Normalizer(0.0, self.energy.std), self.linear_references)

    def check_model(self, config: ModelConfig, source: str) -> None:
        """Check that gradient forces are those of the energy.

        Args:
            config: configuration of the network.
            source: name of the file, for the error.

        Raises:
            InputError: if the std of gradient forces is not that of the energy.
        """
        if config.forces == "gradient" and self.forces.std != self.energy.std:
            raise InputError(
                f"{source}: the forces of this model are the gradient of its energy, so their std must be "
                f"that of the energy, {self.energy.std:g}, not {self.forces.std:g}"
            )

    def reference_energy(self, batch: Any, num_structures: int) -> Tensor:
        """Sum the linear references per structure, `[B]` float64 eV; zeros without references.

        Args:
            batch: the structures; `atomic_numbers` `[N]` and, unless there is one structure, `batch` `[N]`.
            num_structures: B.

        Raises:
            InputError: if an element is beyond the table.
        """
        atomic_numbers: Tensor = batch.atomic_numbers
        total = torch.zeros(num_structures, dtype=torch.float64, device=atomic_numbers.device)
        if self.linear_references is None or atomic_numbers.numel() == 0:
            return total
        largest = int(atomic_numbers.max())
        last = len(self.linear_references) - 1
        if largest > last:
            raise InputError(f"atomic number {largest} has no linear reference: the table ends at {last}")
        index = getattr(batch, "batch", None)
        if index is None:
            index = torch.zeros_like(atomic_numbers)
        references = self.linear_references.to(atomic_numbers.device)
        return total.index_add(0, index, references[atomic_numbers])

    @staticmethod
    def _check_references(values: Any) -> Tensor:
        """Return a table of energies, eV, as float64 on the CPU, from a tensor, an array or a list."""
        if isinstance(values, list | tuple):
            values = torch.tensor(
                Items(Number(), _MAX_ELEMENTS).read(values, "linear_references"), dtype=_F64
            )
        elif isinstance(values, np.ndarray) and values.dtype.kind == "f":
            values = torch.from_numpy(values.astype(np.float64))
        if not isinstance(values, Tensor) or values.dtype not in (_F64, torch.float32):
            kind = str(values.dtype) if isinstance(values, Tensor | np.ndarray) else shown(values)
            raise InputError(
                "linear_references must be one finite energy per atomic number, in float32 or float64, not "
                f"{kind.removeprefix('torch.')}"
            )
        values = values.detach().to("cpu", _F64)
        finite = values.dim() == 1 and bool(torch.isfinite(values).all())
        if not finite or not 2 <= len(values) <= _MAX_ELEMENTS:
            raise InputError(
                f"linear_references must be one finite energy per atomic number (2 to {_MAX_ELEMENTS} of "
                f"them, from the unused 0 on), not a tensor of shape {tuple(values.shape)}"
                f"{'' if finite or values.dim() != 1 else ' with numbers that are not finite'}"
            )
        return values

    def _shift(self, energy: Tensor, batch: Any, sign: float) -> Tensor:
        """Add `sign` times the linear references to energies `[B]` in eV."""
        if self.linear_references is None:
            return energy
        return energy + sign * self.reference_energy(batch, energy.numel()).view_as(energy)

    def to_dict(self) -> dict[str, Any]:
        """Return plain floats and at most one tensor, for a checkpoint."""
        return {
            "energy": {"mean": self.energy.mean, "std": self.energy.std},
            "forces": {"mean": self.forces.mean, "std": self.forces.std},
            "linear_references": self.linear_references,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalizers:
        """Build the normalizers from the result of `to_dict`.

        Args:
            values: `energy`, `forces` and `linear_references`.

        Raises:
            InputError: if a key is missing or unknown, or a value is not a number.
        """
        expected = {"energy", "forces", "linear_references"}
        if set(mapping(values, "normalizers")) != expected:
            raise InputError(f"normalizers must hold {sorted(expected)}, not {shown(sorted(values))}")
        normalizers = {}
        for name in ("energy", "forces"):
            numbers = mapping(values[name], f"normalizers.{name}")
            if set(numbers) != {"mean", "std"}:
                raise InputError(
                    f"normalizers.{name}: each normalizer must hold the numbers 'mean' and 'std', "
                    f"not {shown(sorted(numbers))}"
                )
            try:
                normalizers[name] = Normalizer(numbers["mean"], numbers["std"])
            except InputError as error:
                raise InputError(
                    f"normalizers.{name} must hold the numbers 'mean' and 'std': {error}"
                ) from error
        return cls(normalizers["energy"], normalizers["forces"], values["linear_references"])

    def __repr__(self) -> str:
        references = "None" if self.linear_references is None else f"[{len(self.linear_references)}]"
        return f"Normalizers(energy={self.energy}, forces={self.forces}, linear_references={references})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Normalizers):
            return NotImplemented
        mine, theirs = self.linear_references, other.linear_references
        same = (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            same = torch.equal(mine, theirs)
        return same and self.energy == other.energy and self.forces == other.forces

    __hash__ = None  # type: ignore[assignment]


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
