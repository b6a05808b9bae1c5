"""Errors on the teacher set: the averages as they are defined, the groups, and what is kept."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from datasets_oc20 import OC20Lmdb
from datasets_oc20.extxyz import read_frames
from datasets_oc20.preprocess import preprocess
from datasets_oc20.raw_release import read_references
from equiformer2.checkpoint.checkpoint import read_contents
from equiformer2.checkpoint.native import write_native
from equiformer2.checkpoint.training_data import KEY, count_contents
from equiformer2.inference import Predictor
from studies.study_data import System, read_index
from studies.study_errors import Frames, groupings, main, markdown, seen_systems
from studies.tests.teacher_folders import copy_systems
from tests.pruning.search_helpers import save_tiny

#: A pure metal whose trajectory a network drove, and Al2Cu, driven by the teacher.
PURE, COPPER = "tn1000101", "tm300016"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_systems(tmp_path_factory.mktemp("data") / "test", [PURE, COPPER])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny.pt")


@pytest.fixture(scope="module")
def frames(folder: Path, checkpoint: Path) -> Frames:
    lmdb = folder.with_suffix(".lmdb")
    preprocess(folder, lmdb, num_workers=1)
    return Frames.compute(Predictor(checkpoint), OC20Lmdb(lmdb), batch_size=3, name="data")


def test_averages_are_those_of_the_definitions(folder: Path, checkpoint: Path, frames: Frames) -> None:
    """Every frame by itself, through the predictor."""
    predictor, references = Predictor(checkpoint), read_references(folder)
    errors, zeros, cosines, energies, predicted, counts = [], [], [], [], [], []
    for sid in dict.fromkeys(frames.sid):
        for frame in read_frames(folder / f"{sid}.extxyz.xz"):
            atoms = Atoms(frame.atomic_numbers, frame.pos, cell=frame.cell, pbc=frame.pbc, tags=frame.tags)
            out = predictor.predict(atoms)
            free = ~frame.fixed
            true, found = frame.forces[free].flatten(), out["forces"].numpy()[free].flatten()
            errors.append(np.abs(true - found).mean())
            zeros.append(np.abs(true).mean())
            cosines.append(true @ found / np.linalg.norm(true) / np.linalg.norm(found))
            energies.append(frame.energy - references[sid])
            predicted.append(float(out["energy"]))
            counts.append(int(free.sum()))
    row = frames.summary(np.ones(len(frames.sid), dtype=bool))
    assert row["frames"] == len(energies) == 19
    assert row["systems"] == 2
    assert row["force_mae_eV_A"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert row["force_ratio"] == pytest.approx(np.mean(errors) / np.mean(zeros), rel=1e-4)
    assert row["force_cosine"] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert row["energy_mae_eV"] == pytest.approx(np.abs(np.subtract(energies, predicted)).mean(), rel=1e-4)
    assert row["trivial_energy_mae_eV"] == pytest.approx(np.abs(energies - np.mean(energies)).mean())
    over_components = np.average(errors, weights=counts)
    assert row["force_mae_over_components_eV_A"] == pytest.approx(over_components, rel=1e-4)
    assert abs(over_components - np.mean(errors)) > 1e-3


def test_element_errors_are_over_the_atoms_of_the_element(frames: Frames) -> None:
    assert list(frames.elements) == ["H", "C", "O", "Al", "Cu", "Ru"]
    assert frames.elements["Cu"]["frames"] == 11
    assert sum(row["free_atoms"] for row in frames.elements.values()) == frames.numbers[:, 2].sum()
    weighted = sum(row["free_atoms"] * row["force_mae_eV_A"] for row in frames.elements.values())
    row = frames.summary(np.ones(len(frames.sid), dtype=bool))
    total = frames.numbers[:, 2].sum()
    assert weighted / total == pytest.approx(row["force_mae_over_components_eV_A"], rel=1e-4)


def test_one_frame_has_no_ratio_of_energies(frames: Frames) -> None:
    chosen = np.zeros(len(frames.sid), dtype=bool)
    chosen[0] = True
    assert frames.summary(chosen)["energy_ratio"] is None


def test_frames_are_divided_by_what_the_checkpoint_names_as_new(
    folder: Path, checkpoint: Path, frames: Frames, tmp_path: Path
) -> None:
    assert frames.named == []  # the checkpoint tells nothing of its training data
    contents = read_contents(checkpoint)
    data = OC20Lmdb(folder.with_suffix(".lmdb"))
    first = [data[index] for index in range(len(data)) if str(data[index].sid) == frames.sid[0]]
    stage = {**count_contents(first), "earlier": []}
    informed = dataclasses.replace(contents, provenance={**contents.provenance, KEY: stage})
    write_native(tmp_path / "informed.pt", informed)
    named = Frames.compute(Predictor(tmp_path / "informed.pt"), data, batch_size=3, name="data").named
    assert dict(zip(frames.sid, named, strict=True)) == {frames.sid[0]: "nothing", frames.sid[-1]: "element"}
    record = run(folder, tmp_path / "informed.pt", tmp_path)
    page = (tmp_path / "errors.md").read_text(encoding="utf-8")
    assert f"| informed | element | {named.count('element')} | 1 |" in page
    assert page == markdown(record, "errors.png")


def test_groups_divide_the_frames() -> None:
    systems = [
        System("a", "Pt", "*CO", 1, "pure", "teacher"),
        System("b", "AlCu2", "*O", 1, "mp-1", "network"),
        System("b", "AlCu2", "*O", 1, "mp-1", "network"),
    ]
    groups = groupings(systems, np.array([2, 1, 1]), seen=frozenset({"Pt"}))
    found = {name: chosen.tolist() for rows in groups.values() for name, chosen in rows.items()}
    assert found == {
        "pure metals": [True, False, False],
        "alloys and compounds": [False, True, True],
        "bulks with copper": [False, True, True],
        "bulks without copper": [True, False, False],
        "driven by the teacher": [True, False, False],
        "driven by a network": [False, True, True],
        "1": [False, True, True],
        "2": [True, False, False],
        "bulk formula seen": [True, False, False],
        "bulk formula unseen": [False, True, True],
    }
    assert "training" not in groupings(systems, np.array([2, 1, 1]), seen=None)


def test_systems_of_training_data_in_folders_and_files(folder: Path, frames: Frames) -> None:
    known = set(read_index(folder))
    assert seen_systems([folder], []) == known
    assert seen_systems([folder.with_suffix(".lmdb")], [folder]) == known
    assert seen_systems([], []) is None


def run(folder: Path, checkpoint: Path, out: Path, *more: str) -> dict[str, object]:
    main(
        [
            *("--checkpoints", str(checkpoint), "--data", str(folder)),
            *("--runs", str(out / "runs"), "--results", str(out / "errors"), *more),
        ]
    )
    return dict(json.loads((out / "errors.json").read_text(encoding="utf-8")))


def test_command_writes_the_page_and_keeps_what_is_finished(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    record = run(folder, checkpoint, tmp_path, "--trained-on", str(folder))
    page = (tmp_path / "errors.md").read_text(encoding="utf-8")
    assert page == markdown(record, "errors.png")
    assert "| bulk formula seen | 19 | 2 |" in page
    assert "**2 of the systems are in the training data.**" in page
    assert (tmp_path / "errors.png").stat().st_size > 10_000
    (stored,) = (tmp_path / "runs").iterdir()
    content = json.loads(stored.read_text(encoding="utf-8"))
    content["numbers"] = [[value * 2 for value in row] for row in content["numbers"]]
    stored.write_text(json.dumps(content), encoding="utf-8")
    again = run(folder, checkpoint, tmp_path)
    # Another network of the same name is evaluated anew.
    third = run(folder, save_tiny(tmp_path / "tiny.pt", seed=3), tmp_path)
    errors = [
        one["data"][folder.as_posix()]["tiny"]["all"]["force_mae_eV_A"] for one in (record, again, third)
    ]
    assert errors[1] == pytest.approx(2 * errors[0])
    assert errors[2] != pytest.approx(errors[0])
    assert errors[2] != pytest.approx(errors[1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--checkpoints", "CHECKPOINT", "--data", "LMDB", "--index", "OTHER"], "no index lists its system"),
        (["--checkpoints", "CHECKPOINT", "elsewhere/tiny.pt"], "have one file name"),
        (["--checkpoints", "CHECKPOINT", "--data", "missing"], "no such file or folder"),
        (["--checkpoints", "CHECKPOINT", "--batch-size", "0"], "give 1 or more"),
        (["--checkpoints", "CHECKPOINT", "--data", "FAR"], "far.*energies"),
        (["--checkpoints", "no_such_model"], "neither a file, nor a shipped"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    arguments: list[str], told: str, folder: Path, checkpoint: Path, frames: Frames, tmp_path: Path
) -> None:
    other = copy_systems(tmp_path / "other", [COPPER])
    far = copy_systems(tmp_path / "far", [COPPER])
    (far / "system.txt").write_text(f"{COPPER},100000.0\n", encoding="utf-8")
    words = {"FAR": far, "CHECKPOINT": checkpoint, "LMDB": folder.with_suffix(".lmdb"), "OTHER": other}
    given = [str(words.get(word, word)) for word in arguments]
    with pytest.raises(ValueError, match=told):
        main([*given, "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "out")])
