"""Gradient accumulation as one large batch: the terms of a whole optimizer step are counted ahead."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from torch_geometric.data import Batch


@dataclass(frozen=True)
class Terms:
    """How many energies, free atoms and stresses the losses of one micro-batch are divided by.

    With accumulation that is the mean over the micro-batches of the optimizer step: Lightning divides each
    micro-batch's loss by their number, so that in the sum every term has the same weight.
    """

    energies: float
    free_atoms: float
    stresses: float = 0.0

    @classmethod
    def of(cls, batch: Batch) -> "Terms | None":
        """What `with_terms` has found; None for a batch of another loader, which has its own mean."""
        found: Terms | None = batch.get("terms_of_step")
        return found


def with_terms(batches: Iterable[Batch], first: int, together: int, last: int) -> Iterator[Batch]:
    """The batches, each with the `Terms` of its optimizer step.

    One step is read ahead.

    Args:
        batches: on the CPU, from number `first` of the epoch on.
        first: number in the epoch.
        together: micro-batches of an optimizer step; counted from the beginning of the epoch.
        last: number of batches in the epoch, after which an optimizer step is taken in any case.
    """
    source = iter(batches)
    step = list(islice(source, _length(first, together, last)))
    while step:
        first += len(step)
        length = _length(first, together, last)
        energies = sum(int(b.has_energy.sum()) if "has_energy" in b else b.num_graphs for b in step)
        free_atoms = sum(int((~b.fixed.bool()).sum()) for b in step)
        stresses = sum(int(b.pbc.all(dim=1).sum()) for b in step if "stress" in b)
        terms = Terms(energies / together, free_atoms / together, stresses / together)
        following: list[Batch] = []
        for batch in step:
            batch.terms_of_step = terms
            yield batch
            following += islice(source, min(1, length - len(following)))
        step = following + list(islice(source, length - len(following)))


def _length(first: int, together: int, last: int) -> int:
    return max(0, min(together - first % together, last - first))
