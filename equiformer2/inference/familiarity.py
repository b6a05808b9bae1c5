"""Name what of a structure the training data of a checkpoint do not hold.

Four things are looked at: elements, adsorbates and pairs of neighbouring elements, which the checkpoint lists
(`checkpoint.training_data`), and the surroundings of every atom as the network sees them, whose distance to
those of the training set is known where the checkpoint holds them (`checkpoint.surroundings`). What a file
does not tell is not known, and nothing is concluded from it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20 import DataError
from equiformer2.checkpoint import Checkpoint
from equiformer2.checkpoint.checkpoint import SeenData, read_contents, with_seen_data
from equiformer2.checkpoint.native import write_native
from equiformer2.checkpoint.surroundings import Surroundings, SurroundingsFit, quantiles_of
from equiformer2.checkpoint.training_data import (
    NO_ADSORBATE,
    TrainingData,
    adsorbate_formula,
    count_contents,
    neighbour_pairs,
)
from equiformer2.errors import InputError

if TYPE_CHECKING:
    from equiformer2.inference.predictor import Predictor

logger = logging.getLogger(__name__)

KINDS = ("element", "pair", "adsorbate", "surroundings")
NOTHING_TOLD = "the checkpoint does not tell what it was trained on, so it is not known whether"
_MOST_NAMED = 8
_STRUCTURES_AT_A_TIME = 8
#: Targets, which only some structures may have, have no place in a batch.
_FIELDS = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "tags", "fixed", "sid", "fid")


@dataclass(frozen=True)
class Judgement:
    """Parts of one structure that the training data do not hold.

    Attributes:
        known: what could be compared, of `KINDS`.
        elements: symbols that no training has seen.
        pairs: pairs of seen elements that were neighbours in no training structure, as `Pt-C`.
        adsorbates: formula of the adsorbate if no training has seen it, as `*CO`.
        atoms: indices of atoms whose surroundings are farther than 99 % of held-out structures go.
        distance: of the farthest atom to the training set; None if not known.
        limit: distance that 99 % of held-out structures do not exceed; None if not known.
        percentile: share of the held-out structures that are nearer, in percent; None if not known.
    """

    known: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    adsorbates: tuple[str, ...] = ()
    atoms: tuple[int, ...] = ()
    distance: float | None = None
    limit: float | None = None
    percentile: float | None = None

    @property
    def familiar(self) -> bool:
        """True if nothing that could be compared is new; `known` says what that was."""
        return not (self.elements or self.pairs or self.adsorbates or self.atoms)

    def sentences(self) -> list[str]:
        """Say in plain words what is new, most serious first, or that nothing is known."""
        if not self.known:
            return [f"{NOTHING_TOLD} this structure is like that"]
        said = []
        for names, text in (
            (self.elements, ""),
            (self.pairs, "neighbours "),
            (self.adsorbates, "adsorbate "),
        ):
            if names:
                said.append(f"the checkpoint's training data hold no {text}{_listed(names, ' and no ')}")
        if self.atoms and self.distance is not None and self.limit is not None:
            plural = "s" if len(self.atoms) > 1 else ""
            times = self.distance / max(self.limit, 1e-9)
            said.append(
                f"the surroundings of atom{plural} {_listed(self.atoms)} are unlike those of the "
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
    """

    def __init__(self, checkpoint: Checkpoint, embed: Callable[[Batch], Tensor]) -> None:
        seen = TrainingData(checkpoint.provenance)
        self._elements, self._pairs, self._adsorbates = seen.elements, seen.pairs, seen.adsorbates
        self.surroundings: Surroundings | None = checkpoint.surroundings
        self._embed = embed

    @property
    def known(self) -> tuple[str, ...]:
        """Things that can be compared, of `KINDS`: those that the checkpoint tells."""
        told = self._elements or None, self._pairs, self._adsorbates, self.surroundings
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
        return Judgement(self.known, tuple(elements), tuple(pairs), tuple(adsorbates))


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

    return replace(farthest, **{name: union(name) for name in ("elements", "pairs", "adsorbates", "atoms")})


def judge_dataset(predictor: Predictor, structures: Sequence[Data], most: int = 200) -> dict[str, Any]:
    """Compare structures of a dataset with the training data of a checkpoint.

    Args:
        predictor: of the checkpoint.
        structures: a list or dataset.
        most: number of structures to look at, evenly spaced.

    Returns:
        Plain values for a record: `compared` (of `KINDS`), `structures_looked_at`, `structures_named`,
        for `unseen_elements`, `unseen_pairs` and `unseen_adsorbates` the number of structures by name,
        `structures_with_unfamiliar_surroundings`, and `sentences`.
    """
    if not predictor.familiarity.known:
        most = 0
    counts = {name: Counter[str]() for name in ("elements", "pairs", "adsorbates")}
    looked_at, named, far = 0, 0, 0
    for batch in evenly_spaced_batches(structures, most, "comparing with the training data"):
        for judgement in predictor.judge(batch):
            looked_at += 1
            named += not judgement.familiar
            far += bool(judgement.atoms)
            for name, counter in counts.items():
                counter.update(getattr(judgement, name))
    record = {
        "compared": list(predictor.familiarity.known),
        "structures_looked_at": looked_at,
        "structures_named": named,
        **{f"unseen_{name}": dict(counter.most_common()) for name, counter in counts.items()},
        "structures_with_unfamiliar_surroundings": far,
    }
    return {**record, "sentences": _dataset_sentences(record)}


def _dataset_sentences(record: Mapping[str, Any]) -> list[str]:
    """Say in plain words what `judge_dataset` found."""
    if not record["compared"]:
        return [f"{NOTHING_TOLD} these structures are like that"]
    of = f"of {record['structures_looked_at']} structures looked at"
    said = []
    for name, text in (("elements", ""), ("pairs", "neighbours "), ("adsorbates", "adsorbate ")):
        found = record[f"unseen_{name}"]
        if found:
            shown = [f"{item} (in {count})" for item, count in found.items()]
            said.append(f"{of}, the checkpoint's training data hold no {text}{_listed(shown, ', no ')}")
    far = record["structures_with_unfamiliar_surroundings"]
    if far:
        said.append(
            f"{of}, {far} have atoms whose surroundings are farther from the checkpoint's training data than "
            "99 % of held-out structures go"
        )
    return said


def fit_surroundings(
    predictor: Predictor,
    training: Sequence[Data],
    held_out: Sequence[Data],
    most: int = 1000,
    description: Mapping[str, Any] | None = None,
) -> Surroundings:
    """Fit the surroundings of the training atoms of a network, calibrated on held-out structures.

    Held-out structures with an element that the training structures lack are left out: they are unfamiliar
    whatever their distance.

    Args:
        predictor: of the checkpoint.
        training: structures that the checkpoint was trained on; a list or dataset.
        held_out: structures of systems that it was not trained on, which it is trusted for.
        most: number of training structures to look at, and of held-out ones, evenly spaced.
        description: plain values to keep with it, such as the names of the data.

    Raises:
        InputError: no structure, or no held-out structure of the elements of training.
    """
    fit = SurroundingsFit(predictor.checkpoint.config.sphere_channels)
    counts = {"training_structures": 0, "held_out_structures": 0}
    for batch in evenly_spaced_batches(training, most, "surroundings of training atoms"):
        fit.add(predictor.embed(batch), batch.atomic_numbers)
        counts["training_structures"] += batch.num_graphs
    if not counts["training_structures"]:
        raise InputError("there are no training structures to take surroundings from: give the training data")
    fitted = fit.finish(predictor.checkpoint.weights, {})
    farthest = []
    for batch in evenly_spaced_batches(held_out, most, "distances of held-out structures"):
        distances = fitted.distances(predictor.embed(batch), batch.atomic_numbers)
        seen = torch.isin(batch.atomic_numbers, fitted.elements)
        for part, whole in zip(
            *(values.split(batch.natoms.tolist()) for values in (distances, seen)), strict=True
        ):
            if bool(whole.all()):
                farthest.append(float(part.max()))
    if not farthest:
        raise InputError(
            "no held-out structure has only elements of the training data, so distances cannot be "
            "calibrated: give other held-out data"
        )
    counts["held_out_structures"] = len(farthest)
    return replace(fitted, quantiles=quantiles_of(farthest), description={**(description or {}), **counts})


def see_data(
    predictor: Predictor,
    training: Sequence[Data],
    held_out: Sequence[Data],
    most: int = 1000,
    description: Mapping[str, Any] | None = None,
) -> SeenData:
    """Describe the data that a checkpoint was trained on, to be stored with it.

    Args:
        predictor: of the checkpoint.
        training: all of the training data; elements, pairs and adsorbates are counted in up to 50,000.
        held_out: see `fit_surroundings`.
        most: see `fit_surroundings`.
        description: see `fit_surroundings`.

    Raises:
        InputError: as `fit_surroundings`.
    """
    surroundings = fit_surroundings(predictor, training, held_out, most, description)
    return SeenData({"frames": len(training), **count_contents(training)}, surroundings)


def store_seen_data(path: str | Path, seen: SeenData) -> None:
    """Store with a native checkpoint what it was trained on; the file is replaced in one step.

    Args:
        path: the checkpoint whose predictor `see_data` was given.
        seen: from `see_data`.
    """
    write_native(path, with_seen_data(read_contents(path), seen))


def evenly_spaced_batches(structures: Sequence[Data], most: int, what: str) -> Iterator[Batch]:
    """Yield batches of at most `most` structures, evenly spaced; those that cannot be read are left out."""
    chosen = np.linspace(0, len(structures) - 1, min(most, len(structures))).astype(np.int64).tolist()
    waiting: list[Data] = []
    for place, index in enumerate(tqdm(chosen, what, unit="structures", disable=None, leave=False), start=1):
        try:
            structure = structures[index]
            waiting.append(Data(**{name: structure[name] for name in _FIELDS if name in structure}))
        except DataError as error:
            logger.warning(f"left out of the comparison with the training data: {error}")
        if waiting and (len(waiting) == _STRUCTURES_AT_A_TIME or place == len(chosen)):
            yield Batch.from_data_list(waiting)
            waiting = []


def _listed(items: Sequence[object], between: str = ", ") -> str:
    """Join the first items, and count the others."""
    first = between.join(str(item) for item in items[:_MOST_NAMED])
    more = len(items) - _MOST_NAMED
    return f"{first} and {more} more" if more > 0 else first
