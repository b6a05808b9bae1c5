"""The lists of elements and adsorbates that a checkpoint was trained on, as files of any origin tell them."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule

from equiformer2.checkpoint import load_checkpoint
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.checkpoint.training_data import (
    DENSE_ANSWERS,
    KEY,
    TrainingData,
    count_contents,
    with_labels_of_all,
)
from equiformer2.errors import InputError
from equiformer2.inference import atoms_to_data
from equiformer2.shipped import find_checkpoint

FIRST = {"elements": {"Cu": 5, "O": 5}, "earlier": []}
SECOND = {"elements": {"H": 2, "O": 3}, "earlier": [{"elements": {"Cu": 5, "O": 5}}]}


def test_elements_of_all_stages_count() -> None:
    assert TrainingData({"training_data": FIRST}).elements == {"O": 5, "Cu": 5}
    seen = TrainingData({"training_data": SECOND})
    assert seen.elements == {"H": 2, "O": 8, "Cu": 5}
    unseen = seen.unseen(90)
    assert unseen is not None
    assert torch.nonzero(~unseen).flatten().tolist() == [1, 8, 29]
    assert seen.unseen(20) is not None  # a network with a smaller table


def test_each_training_adds_one_stage() -> None:
    before = TrainingData({"training_data": SECOND}).before()
    assert before == [{"elements": {"Cu": 5, "O": 5}}, {"elements": {"H": 2, "O": 3}}]


@pytest.mark.parametrize(
    "stage",
    [
        None,
        "Cu",
        {"energy_mean_eV": -1.0},
        {"elements": {"Cu": 5}},
        {"elements": {"Cu": 5}, "earlier": None},
        {"elements": {"Cu": 5}, "earlier": [{}]},
        {"elements": {"Cu": 5}, "earlier": ["x"]},
        {"elements": ["Cu"], "earlier": []},
        {"elements": {"copper": 5}, "earlier": []},
        {"elements": {"Cu": "5"}, "earlier": []},
        {"elements": {"Cu": True}, "earlier": []},
        {"elements": {"Cu": -1}, "earlier": []},
    ],
)
def test_what_is_not_known_marks_nothing(stage: Any) -> None:
    for provenance in ({}, {"training_data": stage}):
        seen = TrainingData(provenance)
        assert (seen.elements, seen.unseen(90), seen.before()) == (None, None, None)


def test_a_training_without_elements_marks_nothing() -> None:
    assert TrainingData({"training_data": {"elements": {}, "earlier": []}}).unseen(90) is None


def test_pairs_and_adsorbates_of_all_stages_count() -> None:
    first = {**FIRST, "pairs": {"Cu-Cu": 5, "Cu-O": 1}, "adsorbates": {"*O": 5}}
    second = {**SECOND, "pairs": {"O-H": 2}, "adsorbates": {"*HO": 2}, "earlier": [first]}
    seen = TrainingData({"training_data": second})
    assert seen.pairs == {"Cu-Cu": 5, "Cu-O": 1, "O-H": 2}
    assert seen.adsorbates == {"*O": 5, "*HO": 2}
    # An earlier version did not list pairs: then they are not known, whatever the last stage lists.
    older = TrainingData({"training_data": {**second, "earlier": [FIRST]}})
    assert (older.pairs, older.adsorbates) == (None, None)
    assert older.elements == {"H": 2, "O": 8, "Cu": 5}


def test_what_structures_hold_is_counted() -> None:
    slab = fcc111("Pt", (2, 2, 3), vacuum=8.0, periodic=True)
    add_adsorbate(slab, molecule("CO"), 1.9, "ontop", mol_index=1)
    slab.set_tags([0] * 12 + [2, 2])
    bulk = Atoms("CsCl", [[0, 0, 0], [2.06, 2.06, 2.06]], cell=[4.12] * 3, pbc=True)
    structures = [atoms_to_data(slab), atoms_to_data(slab), atoms_to_data(bulk)]
    for name, structure in zip("aab", structures, strict=True):
        structure.sid = name
    assert count_contents(structures) == {
        "systems": 2,
        "frames_looked_at": 3,
        "elements": {"C": 2, "O": 2, "Cl": 1, "Cs": 1, "Pt": 2},
        "pairs": {"Cs-Cl": 1, "Cs-Cs": 1, "O-C": 2, "Pt-C": 2, "Pt-Pt": 2},
        "adsorbates": {"*CO": 2},
        "substrates": {"Cs-Cl": 1, "Pt": 2},
    }
    assert count_contents(structures, most=2)["elements"] == {"C": 1, "O": 1, "Cl": 1, "Cs": 1, "Pt": 1}


def test_lists_of_some_frames_are_told_from_those_of_all() -> None:
    for frames, looked_at, in_part in ((5, 5, False), (9, 5, True), (None, None, False)):
        sizes = {"frames": frames, "frames_looked_at": looked_at}
        stage = {**FIRST, "earlier": [], **{name: size for name, size in sizes.items() if size is not None}}
        assert TrainingData({"training_data": stage}).counted_in_part is in_part


def test_lists_beside_a_checkpoint_count_for_that_file_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("equiformer2").propagate = True
    path = tmp_path / "old.pt"
    shutil.copy(find_checkpoint("oc20_small"), path)
    lists = path.with_suffix(".training_data.json")
    told = {"training_data": {**FIRST, "earlier": []}}
    lists.write_text(json.dumps({"checkpoint_sha256": sha256(path), **told}), encoding="utf-8")
    assert TrainingData(load_checkpoint(path).provenance).elements == FIRST["elements"]
    lists.write_text(json.dumps({"checkpoint_sha256": "0" * 64, **told}), encoding="utf-8")
    assert TrainingData(load_checkpoint(path).provenance).elements is None
    assert "is about another file" in caplog.text
    lists.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"old\.training_data\.json is broken"):
        load_checkpoint(path)


def test_a_committee_states_the_labels_of_all_members() -> None:
    def stage(*labels: str) -> dict[str, Any]:
        return {"elements": {"O": 1}, "labels": list(labels)}

    first = {KEY: {**stage("OC20's DFT"), "earlier": [stage("SevenNet-0, not DFT")]}, "step": 1}
    other = {KEY: {**stage("PBE"), "earlier": []}}
    pruned = {KEY: {**stage(DENSE_ANSWERS), "earlier": []}}
    together = with_labels_of_all([first, other, first])
    assert together["step"] == 1
    told = [stage["labels"] for stage in TrainingData(together).stages or ()]
    assert told == [["SevenNet-0, not DFT"], ["OC20's DFT", "PBE"]]
    assert with_labels_of_all([first, pruned]) == first
    assert with_labels_of_all([{}, {}]) == {}
    (only,) = TrainingData(with_labels_of_all([{}, other])).stages or ()
    assert only["labels"] == ["PBE"]
