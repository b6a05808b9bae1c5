"""The S2EF training loss: energy L1 plus force L2, on normalised targets; on request, stress L1.

EquiformerV2 paper, appendix D; the averages are those of the reference trainer (`mae` and `l2mae` of
fairchem-core 1.10): energies over every structure of the global batch, forces over every free atom of the
global batch, whichever process holds it.

Targets are normalised in float64 (`Normalizers.normalize_energy`) and rounded here to the type of the
prediction, at least float32: errors and their sums are float32, and float64 for float64 predictions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch import distributed as dist
from torch_geometric.data import Batch


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """`total / count` over all processes, scaled for DDP's averaging of gradients.

    `total` and `count` are this process's sum of errors and number of terms (scalars). Processes hold
    different numbers of atoms, so the mean of their means would weigh atoms unequally. Each returns
    `total * world_size / global count`: averaged over processes (which is what DDP does with the
    gradients), that is the mean over all terms. No terms at all give 0. Nothing waits for the device.

    `count` is that of `accumulation.Terms` where gradients are accumulated.
    """
    world_size = 1
    if dist.is_available() and dist.is_initialized():
        world_size = dist.get_world_size()
        dist.all_reduce(count)
    return total * world_size / count.clamp(min=1e-6)


def energy_l1(
    prediction: Tensor, target: Tensor, known: Tensor | None = None, terms: float | None = None
) -> Tensor:
    """Mean absolute error over the structures of the global batch; both [B], normalised units.

    `known` [B] bool: structures whose energy is to be learned; all of them without it. `terms`: what to
    divide by instead of their number.
    """
    error = _difference(prediction, target).abs()
    if known is not None:
        error = error.masked_fill(~known, 0.0)
    if known is None or terms is not None:
        count = torch.full_like(error[0], error.numel() if terms is None else terms)
    else:
        count = known.sum().to(error.dtype)
    return global_mean(error.sum(), count)


def force_l2(prediction: Tensor, target: Tensor, free: Tensor, terms: float | None = None) -> Tensor:
    """Mean Euclidean norm of the force error over the free atoms of the global batch (`l2mae`).

    `prediction`, `target` [N, 3] in normalised units, `free` [N] bool: atoms that the relaxation may move.
    Forces on fixed atoms are not part of OC20's task. `terms`: what to divide by instead of their number.
    """
    # Masked, not indexed: an index would make the host wait for the device. A norm of 0 has gradient 0.
    error = _difference(prediction, target).masked_fill(~free[:, None], 0.0)
    count = free.sum().to(error.dtype) if terms is None else torch.full_like(error[0, 0], terms)
    return global_mean(torch.linalg.vector_norm(error, dim=-1).sum(), count)


def stress_l1(prediction: Tensor, target: Tensor, periodic: Tensor, terms: float | None = None) -> Tensor:
    """Mean absolute error of the nine components over the structures of the global batch that have a stress.

    `prediction`, `target` [B, 3, 3] in normalised units, `periodic` [B] bool: structures periodic in all
    directions; the others are left out, whatever their values. `terms`: what to divide by instead of their
    number.
    """
    error = _difference(prediction, target).masked_fill(~periodic[:, None, None], 0.0)
    count = periodic.sum().to(error.dtype) if terms is None else torch.full_like(error[0, 0, 0], terms)
    return global_mean(error.abs().mean((1, 2)).sum(), count)


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    # The boundary between the data's float64 and the network's type.
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.to(dtype) - target.to(dtype)


@dataclass(frozen=True)
class Terms:
    """Numbers of energies, free atoms and stresses that divide the losses of one micro-batch.

    With accumulation that is the mean over the micro-batches of the optimizer step: Lightning divides each
    micro-batch's loss by their number, so that in the sum every term has the same weight.
    """

    energies: float
    free_atoms: float
    stresses: float = 0.0

    @classmethod
    def from_batch(cls, batch: Batch) -> "Terms | None":
        """Read the counts that `with_terms` has attached; None for a batch of another loader."""
        terms: Terms | None = batch.get("terms_of_step")
        return terms


def with_terms(batches: Iterable[Batch], first: int, together: int, last: int) -> Iterator[Batch]:
    """The batches, each with the `Terms` of its optimizer step.

    One step is read ahead.

    Args:
        batches: on the CPU, from number `first` of the epoch on.
        first: number in the epoch.
        together: micro-batches of an optimizer step; counted from the beginning of the epoch.
        last: number of batches in the epoch, after which an optimizer step is taken in any case.
    """

    def length(first: int) -> int:
        return max(0, min(together - first % together, last - first))

    source = iter(batches)
    step = list(islice(source, length(first)))
    while step:
        first += len(step)
        next_length = length(first)
        energies = sum(int(b.has_energy.sum()) if "has_energy" in b else b.num_graphs for b in step)
        free_atoms = sum(int((~b.fixed.bool()).sum()) for b in step)
        stresses = sum(int(b.pbc.all(dim=1).sum()) for b in step if "stress" in b)
        terms = Terms(energies / together, free_atoms / together, stresses / together)
        following: list[Batch] = []
        for batch in step:
            batch.terms_of_step = terms
            yield batch
            following += islice(source, min(1, next_length - len(following)))
        step = following + list(islice(source, next_length - len(following)))
