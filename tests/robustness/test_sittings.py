"""Runs in several sittings: too little data, a split that leaves nothing, other settings, a full disk."""

import logging
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb
from datasets_oc20.preprocess import PreprocessOptions, preprocess
from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator
from equiformer2.training.configuration import parse
from equiformer2.training.folder import MetricsFile, RunFolder, read_rows
from equiformer2.training.run import train
from tests.disk import full_disk
from tests.robustness.test_training import LMDB, SMALL, start

ROOT = Path(__file__).parents[2]
RAW = ROOT / "data" / "oc20_trajs"
SYSTEM = "random1447590"  # 47 frames of 17 atoms


# ---- data

LEAVES_NOTHING: list[tuple[str, dict[str, Any], list[str]]] = [
    ("every system excluded", {"exclude": [SYSTEM]}, ["oc20_trajs", "every system is excluded"]),
    ("no such system", {"systems": ["random1"]}, ["oc20_trajs", "no file for system random1"]),
    (
        "every frame at rest",
        {"options": PreprocessOptions(min_force=100.0)},
        ["out.lmdb", "of 47 that were read", "47 nearly at rest", "loosen the filters"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "told"), [case[1:] for case in LEAVES_NOTHING], ids=[case[0] for case in LEAVES_NOTHING]
)
def test_a_split_that_leaves_nothing_writes_nothing(
    choice: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    choice = {"systems": [SYSTEM], "num_workers": 1, **choice}
    with pytest.raises(DataError) as error:
        preprocess(RAW, tmp_path / "out.lmdb", **choice)
    assert all(part in str(error.value) for part in told), str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_one_structure_trains_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "one.lmdb"
    with LmdbWriter(path, "adsorption") as writer:
        writer.write(OC20Lmdb(LMDB)[0])
    own = [f"--data.train={path}", f"--data.val={path}", f"--runs_dir={tmp_path}", "--name=one"]
    train(parse([*SMALL, *own]))
    told = [entry for entry in caplog.records if "nothing can be learned of them" in entry.getMessage()]
    assert len(told) == 1


# ---- elements

# The fixture's first frame holds N, Na and Bi.
SEEN: list[tuple[str, Any, list[str]]] = [
    ("all", {"elements": {"N": 1, "Na": 1, "Bi": 2}, "earlier": []}, []),
    ("all but one", {"elements": {"N": 1, "Na": 1}, "earlier": []}, ["Bi"]),
    ("the adsorbate alone", {"elements": {"N": 3}, "earlier": []}, ["Na", "Bi"]),
    ("an earlier training", {"elements": {"Bi": 1}, "earlier": [{"elements": {"N": 1, "Na": 2}}]}, []),
    ("an earlier training that says nothing", {"elements": {"N": 1}, "earlier": None}, []),
    ("no list", {"energy_mean_eV": 1.0}, []),
]


@pytest.mark.parametrize(("seen", "unseen"), [case[1:] for case in SEEN], ids=[case[0] for case in SEEN])
def test_elements_unseen_in_training_are_named_once(
    seen: Any, unseen: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calculator = EquiformerV2Calculator(start(tmp_path / "model.pt", training_data=seen))
    record = OC20Lmdb(LMDB)[0]
    atoms = Atoms(
        record.atomic_numbers.numpy(), record.pos.numpy(), cell=record.cell[0].numpy(), pbc=True,
        tags=record.tags.numpy(),
    )  # fmt: skip
    for _ in range(2):
        calculator.calculate(atoms, ["energy", "forces"])
        calculator.predictor.predict(record)
    told = [entry.getMessage() for entry in caplog.records if "training data hold" in entry.getMessage()]
    assert len(told) == bool(unseen)
    assert calculator.predictor.unseen_elements == unseen
    for symbol in unseen:
        assert f"no {symbol}" in told[0]


# ---- another configuration


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = [f"--runs_dir={tmp_path_factory.mktemp('runs')}", "--name=run", "--trainer.max_steps=1"]
    return train(parse([*SMALL, *own, "--trainer.max_epochs=-1", "--task.ema_decay=0.9"]))


OTHER = [
    ("layers", ["--model.num_layers=2"], ["model.num_layers was 1 and is now 2", "own config.yaml"]),
    ("radius", ["--model.max_radius=4"], ["model.max_radius was 3.5 and is now 4", "own config.yaml"]),
    ("forces", ["--model.forces=none"], ["model.forces was 'direct' and is now 'none'"]),
    ("seed", ["--seed=7"], ["seed 0", "7", "own config.yaml"]),
    ("no average", ["--task.ema_decay=0"], ["average of its weights", "task.ema_decay"]),
    ("kind of energy", ["--data.energy_kind=total"], ["other normalizers", "same data"]),
    (
        "normalizers",
        ["--data.normalizers={energy_mean: 2, energy_std: 1, forces_std: 1}"],
        ["other normalizers", "same data"],
    ),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("other", "told"), [case[1:] for case in OTHER], ids=[case[0] for case in OTHER])
def test_a_state_of_another_configuration_is_one_sentence_and_stays(
    other: list[str], told: list[str], run: Path
) -> None:
    before = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    own = [f"--runs_dir={run.parent}", "--name=run", "--ckpt_path=auto", "--trainer.max_steps=2"]
    with pytest.raises(InputError) as error:
        train(parse([*SMALL, *own, "--trainer.max_epochs=-1", "--task.ema_decay=0.9", *other]))
    assert all(part in str(error.value) for part in told), str(error.value)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before


# ---- a full disk


def test_metrics_on_a_full_disk_name_their_file_and_keep_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.log_metrics({"train/loss": 1.5}, step=0)
    with full_disk(path.stat().st_size + 3), pytest.raises(OSError, match=r"metrics\.csv"):
        metrics.log_metrics({"train/loss": 1.25}, step=1)
    assert [row["train/loss"] for row in read_rows(path)] == ["1.5"]


def test_a_log_on_a_full_disk_is_one_sentence_and_no_reason_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("equiformer2")
    with RunFolder(tmp_path / "run", None).open():
        log.info("first")
        with full_disk((tmp_path / "run" / "log.txt").stat().st_size):
            for number in range(3):
                log.info(f"lost {number}")
    told = [line for line in capsys.readouterr().err.splitlines() if "log.txt" in line]
    assert len(told) == 1
    assert "cannot be written any more" in told[0]
    assert "first" in (tmp_path / "run" / "log.txt").read_text()
