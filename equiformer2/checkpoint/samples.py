"""A few structures of a data set, kept beside weights: what is measured on them needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch_geometric.data import Data

from equiformer2.errors import InputError

MOST_SAMPLES = 256
MOST_ATOMS = 100_000
_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Samples:
    """Structures without labels, atoms one after another.

    Attributes:
        natoms: `[n]` int32.
        numbers: `[N]` int16, atomic numbers.
        pos: `[N, 3]` float32, Å.
        cell: `[n, 3, 3]` float32, Å; rows are lattice vectors.
        pbc: `[n, 3]` bool.
        fixed: `[N]` bool.
        tags: `[N]` uint8.
    """

    natoms: Tensor
    numbers: Tensor
    pos: Tensor
    cell: Tensor
    pbc: Tensor
    fixed: Tensor
    tags: Tensor

    @classmethod
    def from_structures(cls, structures: Sequence[Data]) -> Samples:
        """Take over structures (docs/architecture.md, the data object).

        Raises:
            InputError: there are none, too many, or too many atoms.
        """
        if not structures:
            raise InputError("samples of a data set need at least one structure")

        def joined(name: str, dtype: torch.dtype) -> Tensor:
            return torch.cat([structure[name].detach().cpu().to(dtype) for structure in structures])

        natoms = torch.tensor([int(structure.natoms) for structure in structures], dtype=torch.int32)
        samples = cls(
            natoms,
            joined("atomic_numbers", torch.int16),
            joined("pos", torch.float32),
            joined("cell", torch.float32).view(-1, 3, 3),
            joined("pbc", torch.bool).view(-1, 3),
            joined("fixed", torch.bool),
            joined("tags", torch.uint8),
        )
        return cls.from_tensors(samples.tensors(), "samples")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], where: str) -> Samples:
        """Check what `tensors` gives, as a file holds it.

        Args:
            tensors: by the names of the attributes.
            where: names file and part, for errors.

        Raises:
            InputError: a tensor is missing, unknown, of another form, or holds impossible numbers.
        """
        names = [field.name for field in fields(cls)]
        if sorted(tensors) != sorted(names):
            raise InputError(f"{where} must hold {', '.join(names)} and nothing else")
        natoms = tensors["natoms"]
        if natoms.dim() != 1 or natoms.dtype not in _INTEGERS or not 1 <= len(natoms) <= MOST_SAMPLES:
            raise InputError(f"{where}: natoms must be whole numbers of 1 to {MOST_SAMPLES} structures")
        count, total = len(natoms), int(natoms.long().sum())
        if int(natoms.min()) < 1 or not 1 <= total <= MOST_ATOMS:
            raise InputError(f"{where}: natoms must be 1 or more, and at most {MOST_ATOMS} together")
        shapes = {"numbers": (total,), "pos": (total, 3), "cell": (count, 3, 3), "pbc": (count, 3)}
        shapes |= {"fixed": (total,), "tags": (total,)}
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise InputError(f"{where}: {name} must be of the shape {shape}")
        for name in ("pos", "cell"):
            value = tensors[name]
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise InputError(f"{where}: {name} must be finite numbers")
        for name in ("pbc", "fixed"):
            if tensors[name].dtype != torch.bool:
                raise InputError(f"{where}: {name} must be true or false")
        for name, most in (("numbers", 1000), ("tags", 2)):
            value = tensors[name]
            if value.dtype not in _INTEGERS or not 0 <= int(value.min()) <= int(value.max()) <= most:
                raise InputError(f"{where}: {name} must be whole numbers from 0 to {most}")
        return cls(**tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def structures(self) -> list[Data]:
        """Make one data object per structure, without labels; `sid` counts them."""
        sizes = self.natoms.tolist()
        atoms = {
            "pos": self.pos.double(),
            "atomic_numbers": self.numbers.long(),
            "fixed": self.fixed,
            "tags": self.tags.long(),
        }
        parts = {name: value.split(sizes) for name, value in atoms.items()}
        return [
            Data(
                **{name: values[row] for name, values in parts.items()},
                cell=self.cell[row : row + 1].double(),
                pbc=self.pbc[row : row + 1],
                natoms=size,
                sid=f"sample {row}",
                fid=0,
            )
            for row, size in enumerate(sizes)
        ]
