"""Every training writes down the elements, adsorbates and labels of its data."""

import logging
from collections import Counter
from pathlib import Path

import pytest
from tiny_run import LMDB, TINY_RUN

from datasets_oc20 import LmdbWriter, OC20Lmdb
from equiformer2.checkpoint import load_checkpoint
from equiformer2.checkpoint.training_data import TrainingData
from equiformer2.inference import EquiformerV2Calculator, Predictor
from equiformer2.pruning import PruningPlan
from equiformer2.pruning.structured.plan_request import apply_plan
from equiformer2.training.configuration import parse
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.run import train
from equiformer2.training.start import choose_normalizers, describe_training_data
from tests.training.tiny_checkpoint import write_tiny_checkpoint


def with_carbon(path: Path) -> Path:
    """Three frames of the fixture with carbon for an adsorbate, and a statement about their labels."""
    records = OC20Lmdb(LMDB)
    with LmdbWriter(path, "adsorption", {"labels": "of a potential, not DFT"}) as writer:
        for index in range(3):
            record = records[index]
            record.atomic_numbers[record.tags == 2] = 6
            record.sid = f"system {index % 2}"
            writer.write(record)
    return path


def test_the_stage_is_what_the_frames_hold(tmp_path: Path) -> None:
    data = ResumableDataModule(train=str(LMDB), val=str(LMDB), energy_kind="adsorption")
    data.setup()
    normalizers = choose_normalizers(data, None, None, False, "direct")
    stage = describe_training_data(data, None, normalizers)
    records = [OC20Lmdb(LMDB)[index] for index in range(20)]
    frames = Counter(number for record in records for number in set(record.atomic_numbers.tolist()))
    assert sorted(stage["elements"].values()) == sorted(frames.values())
    assert (stage["frames"], stage["frames_looked_at"], stage["labels"]) == (20, 20, [])
    assert stage["systems"] == len({record.sid for record in records})
    assert sum(stage["adsorbates"].values()) == 20
    assert stage["earlier"] == []

    more = ResumableDataModule(
        train=str(LMDB), val=str(LMDB), energy_kind="adsorption", forces_only=str(with_carbon(tmp_path / "c"))
    )
    more.setup()
    stage = describe_training_data(more, None, normalizers)
    assert (stage["frames"], stage["labels"]) == (23, ["of a potential, not DFT"])
    assert stage["elements"]["C"] >= 3


def test_a_start_that_says_nothing_leaves_its_elements_unknown(tmp_path: Path) -> None:
    data = ResumableDataModule(train=str(LMDB), val=str(LMDB), energy_kind="adsorption")
    data.setup()
    start = load_checkpoint(write_tiny_checkpoint(tmp_path / "start.pt"))
    stage = describe_training_data(data, start, start.normalizers)
    assert stage["earlier"] is None
    assert TrainingData({"training_data": stage}).unseen(90) is None


@pytest.mark.slow
def test_the_list_outlives_tuning_and_pruning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = [*TINY_RUN, f"--runs_dir={tmp_path}", "--trainer.max_steps=2"]
    first = train(parse([*arguments, "--name=first"])) / "checkpoints" / "last.pt"
    seen = TrainingData(load_checkpoint(first).provenance).elements
    assert seen
    carbon = with_carbon(tmp_path / "carbon.lmdb")
    own = ["--name=second", f"--init_from={first}", f"--data.train={carbon}", f"--data.val={carbon}"]
    second = train(parse([*arguments, *own])) / "checkpoints" / "last.pt"
    tuned = TrainingData(load_checkpoint(second).provenance)
    assert tuned.stages is not None
    assert tuned.elements is not None
    assert [stage["frames"] for stage in tuned.stages] == [20, 3]
    assert set(tuned.elements) == set(seen) | {"C"}

    small = tmp_path / "small.pt"
    config = load_checkpoint(second).config
    apply_plan(second, PruningPlan.keep_all(config).with_block(0, heads=(1,)), small)
    assert TrainingData(load_checkpoint(small).provenance).elements == tuned.elements

    logging.getLogger("equiformer2").propagate = True
    record = OC20Lmdb(LMDB)[0]
    record.atomic_numbers[0] = 52
    calculator = EquiformerV2Calculator(small)
    for _ in range(2):
        calculator.predictor.predict(record)
    Predictor(small).predict(OC20Lmdb(LMDB)[0])
    said = [entry.getMessage() for entry in caplog.records if "training data hold no" in entry.getMessage()]
    assert len(said) == 1
    assert "no Te:" in said[0]
    assert calculator.predictor.unseen_elements == ["Te"]
