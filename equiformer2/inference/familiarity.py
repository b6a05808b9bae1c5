"""Name what of a structure the training data of a checkpoint do not hold.

Five things are looked at: elements, pairs of neighbouring elements, adsorbates and substrates (the elements
of all other atoms), which the checkpoint lists (`checkpoint.training_data`), and the surroundings of every
atom as the network sees them, whose distance to those of the training set is known where the checkpoint
holds them (`checkpoint.surroundings`). What a file does not tell is not known, and nothing is concluded
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import Checkpoint
from equiformer2.checkpoint.surroundings import Surroundings
from equiformer2.checkpoint.training_data import (
    NO_ADSORBATE,
    NO_SUBSTRATE,
    TrainingData,
    adsorbate_formula,
    neighbour_pairs,
    substrate_elements,
)

KINDS = ("element", "pair", "adsorbate", "substrate", "surroundings")
NOTHING_TOLD = "the checkpoint does not tell what it was trained on, so it is not known whether"
_MOST_NAMED = 8


@dataclass(frozen=True)
class Judgement:
    """Parts of one structure that the training data do not hold.

    Attributes:
        known: what could be compared, of `KINDS`.
        elements: symbols that no training has seen.
        pairs: pairs of seen elements that were neighbours in no training structure, as `Pt-C`.
        adsorbates: formula of the adsorbate if no training has seen it, as `*CO`.
        substrates: elements of the other atoms if no training has seen just these, as `Pt` or `Pt-Cu`; left
            out where an unseen element or pair of them says more.
        atoms: indices of atoms whose surroundings are farther than 99 % of held-out structures go.
        distance: of the farthest atom to the training set; None if not known.
        limit: distance that 99 % of held-out structures do not exceed; None if not known.
        percentile: share of the held-out structures that are nearer, in percent; None if not known.
        counted_in_part: whether the lists were made from some of the training data only.
    """

    known: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    adsorbates: tuple[str, ...] = ()
    substrates: tuple[str, ...] = ()
    atoms: tuple[int, ...] = ()
    distance: float | None = None
    limit: float | None = None
    percentile: float | None = None
    counted_in_part: bool = False

    @property
    def familiar(self) -> bool:
        """True if nothing that could be compared is new; `known` says what that was."""
        return not (self.elements or self.pairs or self.adsorbates or self.substrates or self.atoms)

    def sentences(self) -> list[str]:
        """Say in plain words what is new, most serious first, or that nothing is known."""
        if not self.known:
            return [f"{NOTHING_TOLD} this structure is like that"]
        data = training_data_named(self.counted_in_part)
        said = []
        for names, text in (
            (self.elements, ""),
            (self.pairs, "neighbours "),
            (self.adsorbates, "adsorbate "),
            (tuple(map(substrate_name, self.substrates)), "substrate of "),
        ):
            if names:
                said.append(f"{data} hold no {text}{listed(names, f' and no {text}')}")
        if self.atoms and self.distance is not None and self.limit is not None:
            plural = "s" if len(self.atoms) > 1 else ""
            times = self.distance / max(self.limit, 1e-9)
            said.append(
                f"the surroundings of atom{plural} {listed(self.atoms)} are unlike those of the "
                f"checkpoint's training data: up to {times:.1f} times as far from them as 99 % of "
                "held-out structures go"
            )
        return said

    def record(self) -> dict[str, Any]:
        """Plain values for a result card."""
        return {
            "compared": list(self.known),
            "unseen_elements": list(self.elements),
            "unseen_pairs": list(self.pairs),
            "unseen_adsorbates": list(self.adsorbates),
            "unseen_substrates": list(self.substrates),
            "unfamiliar_atoms": list(self.atoms),
            "embedding_distance": self.distance,
            "embedding_distance_limit": self.limit,
            "embedding_distance_percentile": self.percentile,
            "sentences": self.sentences(),
        }


class Familiarity:
    """Comparison of structures with the training data of a checkpoint.

    Args:
        checkpoint: what it lists and holds is compared with.
        embed: gives the features `[N, C]` of degree 0 of a batch.

    Attributes:
        surroundings: of the training atoms; None where the checkpoint does not hold them.
        counted_in_part: whether the lists were made from some of the training data only.
    """

    def __init__(self, checkpoint: Checkpoint, embed: Callable[[Batch], Tensor]) -> None:
        seen = TrainingData(checkpoint.provenance)
        self._elements, self._pairs = seen.elements, seen.pairs
        self._adsorbates, self._substrates = seen.adsorbates, seen.substrates
        self.counted_in_part = seen.counted_in_part
        self.surroundings: Surroundings | None = checkpoint.surroundings
        self._embed = embed

    @property
    def known(self) -> tuple[str, ...]:
        """Things that can be compared, of `KINDS`: those that the checkpoint tells."""
        told = self._elements or None, self._pairs, self._adsorbates, self._substrates, self.surroundings
        return tuple(kind for kind, value in zip(KINDS, told, strict=True) if value is not None)

    def judge(self, batch: Batch) -> list[Judgement]:
        """Compare every structure of a batch; `Predictor.judge` takes `ase.Atoms` and lists, too.

        Raises:
            InputError: what the graph refuses.
        """
        structures = _separated(batch)
        judgements = [self._listed_parts(structure) for structure in structures]
        if self.surroundings is None:
            return judgements
        numbers = batch.atomic_numbers.cpu()
        distances = self.surroundings.distances(self._embed(batch), numbers)
        parts = distances.split([len(structure.atomic_numbers) for structure in structures])
        limit = self.surroundings.limit
        return [
            replace(
                judgement,
                atoms=tuple(torch.nonzero(part > limit).flatten().tolist()),
                distance=float(part.max()),
                limit=limit,
                percentile=self.surroundings.percentile(float(part.max())),
            )
            for judgement, part in zip(judgements, parts, strict=True)
        ]

    def _listed_parts(self, structure: Data) -> Judgement:
        numbers = structure.atomic_numbers.cpu().numpy()
        symbols = [chemical_symbols[number] for number in np.unique(numbers).tolist()]
        elements = [symbol for symbol in symbols if self._elements and symbol not in self._elements]
        pairs: list[str] = []
        if self._pairs is not None:
            new = sorted(neighbour_pairs(structure) - set(self._pairs))
            pairs = [pair for pair in new if not set(pair.split("-")) & set(elements)]
        adsorbates: list[str] = []
        if self._adsorbates is not None and "tags" in structure:
            formula = adsorbate_formula(numbers, structure.tags.cpu().numpy())
            adsorbates = [formula] if formula not in (NO_ADSORBATE, *self._adsorbates) else []
        return Judgement(
            self.known,
            tuple(elements),
            tuple(pairs),
            tuple(adsorbates),
            self._unseen_substrate(structure, [*elements, *pairs]),
            counted_in_part=self.counted_in_part,
        )

    def _unseen_substrate(self, structure: Data, named: Sequence[str]) -> tuple[str, ...]:
        """The substrate if it is unseen, unless elements or pairs of it are named already."""
        if self._substrates is None or "tags" not in structure:
            return ()
        name = substrate_elements(structure.atomic_numbers.cpu().numpy(), structure.tags.cpu().numpy())
        elements = set(name.split("-"))
        if any(set(item.split("-")) <= elements for item in named):
            return ()
        return (name,) if name not in (NO_SUBSTRATE, *self._substrates) else ()


def _separated(batch: Batch) -> list[Data]:
    """Split a batch, whatever made it, into structures with what their lists are compared by."""
    natoms = batch.natoms.reshape(-1).tolist()
    names = ("pos", "atomic_numbers", "tags") if "tags" in batch else ("pos", "atomic_numbers")
    atoms = zip(*(batch[name].split(natoms) for name in names), strict=True)
    return [
        Data(
            **dict(zip(names, values, strict=True)),
            cell=batch.cell[index : index + 1],
            pbc=batch.pbc[index : index + 1],
            natoms=natoms[index],
        )
        for index, values in enumerate(atoms)
    ]


def combined(judgements: Sequence[Judgement]) -> Judgement:
    """Put judgements of several states of one structure together, such as both ends of a relaxation."""
    farthest = max(judgements, key=lambda judgement: judgement.distance or 0.0)

    def union(name: str) -> tuple[Any, ...]:
        found = dict.fromkeys(item for judgement in judgements for item in getattr(judgement, name))
        return tuple(sorted(found) if name == "atoms" else found)

    return replace(
        farthest,
        elements=union("elements"),
        pairs=union("pairs"),
        adsorbates=union("adsorbates"),
        substrates=union("substrates"),
        atoms=union("atoms"),
    )


def substrate_name(elements: str) -> str:
    """Word the elements of a substrate: `Pt alone`, `Pt and Cu`."""
    names = elements.split("-")
    return f"{names[0]} alone" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def training_data_named(counted_in_part: bool) -> str:
    """Name the training data in a sentence, with what their lists were made from."""
    return f"the checkpoint's training data{', as far as they were counted,' if counted_in_part else ''}"


def listed(items: Sequence[object], between: str = ", ") -> str:
    """Join the first items, and count the others."""
    first = between.join(str(item) for item in items[:_MOST_NAMED])
    more = len(items) - _MOST_NAMED
    return f"{first} and {more} more" if more > 0 else first
