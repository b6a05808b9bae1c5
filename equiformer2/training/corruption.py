"""Denoising of non-equilibrium structures as an auxiliary task (DeNS; arXiv 2403.09549, section 3.2).

Some atoms of some structures of a batch are displaced. The network, told the forces that act on these atoms
in the original structure, predicts the displacements, and everywhere else what it always predicts: the
energy of the original structure and the forces on the atoms left in place.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.model.denoising import EncodedForces


@dataclass(frozen=True)
class DensSettings:
    """Denoising of non-equilibrium structures; the defaults are the authors' for OC20 S2EF-2M (12 epochs).

    Args:
        probability: that a structure is corrupted.
        noise_std: standard deviation of the displacement along each axis, Å.
        corrupted_fraction: share of the free atoms of a corrupted structure that are displaced.
        coefficient: weight of the mean norm of the error of the noise, in units of `noise_std`.
        original_targets: learn from corrupted structures their original energy and the forces on the atoms
            left in place, too, as the authors do; otherwise only the noise.
    """

    probability: float = 0.5
    noise_std: float = 0.1
    corrupted_fraction: float = 0.5
    coefficient: float = 10.0
    original_targets: bool = True

    def __post_init__(self) -> None:
        for name in ("probability", "corrupted_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"task.dens.{name} is {getattr(self, name)}; it must be above 0 and at most 1 "
                    "(leave task.dens out to train without denoising)"
                )
        for name in ("noise_std", "coefficient"):
            if not getattr(self, name) > 0:
                raise InputError(f"task.dens.{name} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True)
class Corrupted:
    """A batch with displaced atoms, and what is learned from it.

    What is not learned counts as predicted without error, so that every mean of the loss runs over the same
    structures and free atoms as without denoising, as in the authors' implementation.

    Attributes:
        batch: the structures with their new positions; cells and targets are those of the original.
        target: `[N, 3]` float32 displacements in units of the noise, zero where nothing was displaced.
        encoded: forces in the original and which atoms are displaced.
        structures: bool `[B]`: with displaced atoms.
        nowhere: whether no structure was chosen, so that nothing has to be encoded.
        settings: see there.
    """

    batch: Batch
    target: Tensor
    encoded: EncodedForces
    structures: Tensor
    nowhere: bool
    settings: DensSettings

    def predict(self, model: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """Outputs for the corrupted structures, with `noise [N, 3]` in units of the noise."""
        if self.nowhere:
            return {**model(self.batch), "noise": torch.zeros_like(self.target)}
        return model(self.batch, dens=self.encoded)

    def energy(self, out: dict[str, Tensor], target: Tensor) -> Tensor:
        """Predicted energies `[B]`, or `target` where they are not learned."""
        energy = out["energy"]
        if self.settings.original_targets:
            return energy
        return torch.where(self.structures, target.to(energy.dtype), energy)

    def forces(self, out: dict[str, Tensor], target: Tensor) -> Tensor:
        """Predicted forces `[N, 3]`, or `target` where they are not learned."""
        without = self.encoded.atoms if self.settings.original_targets else self.structures[self.batch.batch]
        return torch.where(without[:, None], target, out["forces"])

    def noise(self, out: dict[str, Tensor]) -> Tensor:
        """Predicted displacements `[N, 3]` of displaced atoms, zero for the others."""
        return torch.where(self.encoded.atoms[:, None], out["noise"], 0.0)


def corrupt(batch: Batch, settings: DensSettings, seed: int) -> Corrupted:
    """Displace free atoms of some structures of a batch.

    Fixed atoms stay, as in the authors' configurations for OC20: their forces are no targets, and the bulk
    below a surface has its place. Cells stay: of the noise only positions, periodic images with them, know.

    Args:
        batch: as for training; it is not changed.
        settings: how.
        seed: decides everything, whatever the device.
    """
    # Drawn on the host, where the same numbers come out for every device and nothing has to wait for it.
    generator = torch.Generator().manual_seed(seed)
    device, pos = batch.pos.device, batch.pos
    chosen = torch.rand(batch.num_graphs, generator=generator) < settings.probability
    drawn = torch.rand(len(pos), generator=generator) < settings.corrupted_fraction
    noise = torch.randn(pos.shape, generator=generator).to(device, non_blocking=True)
    in_chosen = chosen.to(device, non_blocking=True)[batch.batch]
    atoms = in_chosen & drawn.to(device, non_blocking=True) & ~batch.fixed.bool()
    noise = torch.where(atoms[:, None], noise, 0.0)
    corrupted = copy.copy(batch)
    corrupted.pos = pos + settings.noise_std * noise.to(pos.dtype)
    displaced = torch.zeros(batch.num_graphs, device=device).index_add(0, batch.batch, atoms.float())
    return Corrupted(
        batch=corrupted,
        target=noise,
        encoded=EncodedForces(batch.forces, atoms),
        structures=displaced > 0,
        nowhere=not bool(chosen.any()),
        settings=settings,
    )
