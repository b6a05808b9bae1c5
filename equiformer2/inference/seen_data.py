"""Data that a checkpoint was trained on, described to be stored with it, and datasets compared with them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20 import DataError
from equiformer2.checkpoint.checkpoint import SeenData
from equiformer2.checkpoint.surroundings import Surroundings, SurroundingsFit, quantiles_of
from equiformer2.checkpoint.training_data import Structures, count_contents
from equiformer2.errors import InputError
from equiformer2.inference.familiarity import NOTHING_TOLD, listed, substrate_name, training_data_named
from equiformer2.inference.predictor import Predictor

logger = logging.getLogger(__name__)

_STRUCTURES_AT_A_TIME = 8
#: Lists of the training data, and the word before a name from them.
_LISTED = {"elements": "", "pairs": "neighbours ", "adsorbates": "adsorbate ", "substrates": "substrate of "}
#: Targets, which only some structures may have, have no place in a batch.
_FIELDS = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "tags", "fixed", "sid", "fid")


def judge_dataset(predictor: Predictor, structures: Structures, most: int = 200) -> dict[str, Any]:
    """Compare structures of a dataset with the training data of a checkpoint.

    Args:
        predictor: of the checkpoint.
        structures: a list or dataset.
        most: number of structures to look at, evenly spaced.

    Returns:
        Plain values for a record: `compared` (of `KINDS`), `structures_looked_at`, `structures_named`,
        for `unseen_elements`, `unseen_pairs`, `unseen_adsorbates` and `unseen_substrates` the number of
        structures by name,
        `structures_with_unfamiliar_surroundings`, and `sentences`.
    """
    if not predictor.familiarity.known:
        most = 0
    counts = {name: Counter[str]() for name in _LISTED}
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
    return {**record, "sentences": _dataset_sentences(record, predictor.familiarity.counted_in_part)}


def _dataset_sentences(record: Mapping[str, Any], counted_in_part: bool) -> list[str]:
    """Say in plain words what `judge_dataset` found."""
    if not record["compared"]:
        return [f"{NOTHING_TOLD} these structures are like that"]
    of = f"of {record['structures_looked_at']} structures looked at"
    said = []
    data = training_data_named(counted_in_part)
    for name, text in _LISTED.items():
        word = substrate_name if name == "substrates" else str
        shown = [f"{word(item)} (in {count})" for item, count in record[f"unseen_{name}"].items()]
        if shown:
            said.append(f"{of}, {data} hold no {text}{listed(shown, f', no {text}')}")
    far = record["structures_with_unfamiliar_surroundings"]
    if far:
        said.append(
            f"{of}, {far} have atoms whose surroundings are farther from the checkpoint's training data than "
            "99 % of held-out structures go"
        )
    return said


def fit_surroundings(
    predictor: Predictor,
    training: Structures,
    held_out: Structures,
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
    training: Structures,
    held_out: Structures,
    most: int = 1000,
    description: Mapping[str, Any] | None = None,
) -> SeenData:
    """Describe the data that a checkpoint was trained on, to be stored with it.

    Args:
        predictor: of the checkpoint.
        training: all of the training data; its contents are counted in up to 50,000 structures.
        held_out: see `fit_surroundings`.
        most: see `fit_surroundings`.
        description: see `fit_surroundings`.

    Raises:
        InputError: as `fit_surroundings`.
    """
    surroundings = fit_surroundings(predictor, training, held_out, most, description)
    return SeenData({"frames": len(training), **count_contents(training)}, surroundings)


def evenly_spaced_batches(structures: Structures, most: int, what: str) -> Iterator[Batch]:
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
