"""Leaderboard files: keys, order, free atoms; and what the validator finds."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run_script_file
from tiny_checkpoint import write_tiny_checkpoint
from torch_geometric.data import Batch

from datasets_oc20 import LmdbWriter, OC20Lmdb
from equiformer2.errors import InputError
from equiformer2.training.prediction import predict_dataset, write_predictions
from equiformer2.training.submission import SPLITS, make_submission, read_arrays, write_submission
from equiformer2.training.submission_checks import problems_beside_data, submission_problems

OPTIONS = ("--id", "--ood-ads", "--ood-cat", "--ood-both")


def write_test_sets(root: Path, lmdb_path: Path) -> dict[str, Path]:
    """Three frames without targets for each split."""
    frames = OC20Lmdb(lmdb_path)
    paths = {}
    for number, split in enumerate(SPLITS):
        paths[split] = root / f"test_{split}.lmdb"
        with LmdbWriter(paths[split], None) as writer:
            for index in range(3 * number, 3 * number + 3):
                record = frames[index]
                del record.energy, record.forces
                writer.write(record)
    return paths


def guess(batches: Iterable[Batch], count: int) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
    """Recognisable predictions: the energy from the frame, forces from the positions."""
    for batch in batches:
        yield batch, {"energy": -batch.fid.double() / 10, "forces": batch.pos * 0.01}


@pytest.fixture
def data_sets(tmp_path: Path, lmdb_path: Path) -> dict[str, Path]:
    return write_test_sets(tmp_path, lmdb_path)


@pytest.fixture
def predictions(data_sets: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    files = {split: tmp_path / f"{split}.npz" for split in SPLITS}
    for split, path in files.items():
        write_predictions(path, predict_dataset(guess, OC20Lmdb(data_sets[split]), batch_size=2))
    return files


@pytest.mark.parametrize("atoms", ["free", "all"])
def test_s2ef(predictions: dict[str, Path], data_sets: dict[str, Path], tmp_path: Path, atoms: str) -> None:
    write_submission(tmp_path / "out.npz", make_submission("s2ef", predictions, atoms))
    assert submission_problems(tmp_path / "out.npz", "s2ef") == []
    assert problems_beside_data(tmp_path / "out.npz", data_sets) == []
    found = read_arrays(tmp_path / "out.npz")
    fields = ("ids", "energy", "forces", "chunk_idx")
    assert set(found) == {f"{split}_{field}" for split in SPLITS for field in fields}
    for split in SPLITS:
        records = OC20Lmdb(data_sets[split])
        # As the leaderboard takes the forces apart.
        parts = np.split(found[f"{split}_forces"], found[f"{split}_chunk_idx"])
        assert len(parts) == len(records)
        for index, part in enumerate(parts):
            record = records[index]
            chosen = ~record.fixed if atoms == "free" else torch.ones_like(record.fixed)
            np.testing.assert_allclose(part, 0.01 * record.pos[chosen].numpy(), rtol=1e-6)
            assert found[f"{split}_ids"][index] == f"{record.sid}_{record.fid}"
            assert found[f"{split}_energy"][index] == pytest.approx(-int(record.fid) / 10)
        assert found[f"{split}_forces"].dtype == found[f"{split}_energy"].dtype == np.float32
        assert found[f"{split}_ids"].dtype.kind == "U"


def test_scripts_from_predictions_to_a_file(
    data_sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model.pt")
    s2ef, is2re = ["--task", "s2ef"], ["--task", "is2re"]
    for option, (split, data) in zip(OPTIONS, data_sets.items(), strict=True):
        out = tmp_path / f"{split}.npz"
        assert run_script_file("predict", "--checkpoint", checkpoint, "--data", data, "--out", out) == 0
        s2ef += [option, out]
        # One structure per system, as IS2RE's test sets have.
        first = OC20Lmdb(data)[0]
        start = tmp_path / f"is2re_{split}.lmdb"
        with LmdbWriter(start, "adsorption") as writer:
            writer.write(first)
        relaxing = (
            "--checkpoint",
            checkpoint,
            "--data",
            start,
            "--out",
            tmp_path / f"relaxed_{split}",
            "--steps",
            1,
        )
        assert run_script_file("relax_is2re", *relaxing) == 0
        is2re += [option, tmp_path / f"relaxed_{split}" / start.stem]
    more = ("--data-root", tmp_path)
    assert run_script_file("make_submission", *s2ef, "--out", tmp_path / "s2ef_out.npz", *more) == 0
    assert run_script_file("make_submission", *is2re, "--out", tmp_path / "is2re_out.npz") == 0
    found = read_arrays(tmp_path / "is2re_out.npz")
    assert set(found) == {f"{split}_{field}" for split in SPLITS for field in ("ids", "energy")}
    with np.load(tmp_path / "relaxed_ood_cat" / "is2re_ood_cat" / "relaxed.npz") as relaxed:
        assert found["ood_cat_ids"].tolist() == relaxed["sid"].tolist()
        np.testing.assert_allclose(found["ood_cat_energy"], relaxed["energy"], rtol=1e-6)
    # The energies of structures that were not relaxed are no IS2RE predictions.
    wrong = ["--task", "is2re", *s2ef[2:], "--out", tmp_path / "wrong.npz"]
    assert run_script_file("make_submission", *wrong) == 2
    assert "structures that were not relaxed" in capsys.readouterr().err
    assert run_script_file("make_submission", *s2ef[:-2], "--out", tmp_path / "wrong.npz") == 2
    assert "no predictions for ood_both" in capsys.readouterr().err
    assert not (tmp_path / "wrong.npz").exists()
    assert run_script_file("make_submission", "--validate", tmp_path / "s2ef_out.npz") == 0
    assert "nothing wrong" in capsys.readouterr().out
    assert run_script_file("make_submission", "--validate", tmp_path / "id.npz") == 2
    assert "key id_ids is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ood_cat_energy", None, "key ood_cat_energy is missing"),
        ("challenge_ids", np.arange(3), "key challenge_ids is not a key of s2ef"),
        ("id_ids", np.array(["a", "b", "a"]), "key id_ids has 1 ids more than once, such as a"),
        ("id_ids", np.array([1.0, 2.0, 3.0]), "key id_ids is float64: save ids as text"),
        ("id_ids", np.array("a"), r"key id_ids has the shape \[\], not \[n\]"),
        ("id_energy", np.zeros(0), "key id_energy has 0 energies for 3 ids"),
        ("id_energy", np.zeros((3, 1)), r"key id_energy has the shape \[3, 1\], not \[n\]"),
        ("id_energy", np.zeros(4), "key id_energy has 4 energies for 3 ids"),
        ("id_energy", np.array([1, 2, 3]), "key id_energy is int64, not floating-point"),
        ("id_energy", np.array([0.0, np.nan, 1.0]), "key id_energy has 1 values that are not finite.* row 1"),
        ("id_energy", np.full(3, -400.0), "key id_energy has a mean size of 400 eV, as of total energies"),
        ("id_forces", np.zeros((9, 2)), r"key id_forces has the shape \[9, 2\], not \[m, 3\]"),
        ("id_forces", np.zeros((0, 3)), "key id_chunk_idx ends at .*, but id_forces has 0 rows"),
        ("id_forces", np.zeros((1, 3)), "key id_chunk_idx ends at .*, but id_forces has 1 rows"),
        ("id_chunk_idx", np.array([9, 2]), "key id_chunk_idx does not rise"),
        ("id_chunk_idx", np.array([2, 4, 6]), "key id_chunk_idx has as many entries as there are ids"),
        ("id_chunk_idx", np.array([2]), "key id_chunk_idx has 1 entries for 3 ids, not 2"),
        ("id_chunk_idx", np.array([1.0, 2.0]), "key id_chunk_idx is float64, not whole numbers"),
    ],
)
def test_the_validator_names_the_key(
    predictions: dict[str, Path], tmp_path: Path, key: str, value: np.ndarray | None, message: str
) -> None:
    arrays = make_submission("s2ef", predictions)
    arrays.pop(key, None)
    if value is not None:
        arrays[key] = value
    write_submission(tmp_path / "out.npz", arrays)
    (problem, *others) = submission_problems(tmp_path / "out.npz")
    assert re.search(message, problem), problem
    assert not others


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fid", np.zeros(2, dtype=int), "sid, fid, natoms and energy are not of the same structures"),
        ("fid", np.zeros(3), "key fid is float64, not whole numbers"),
        ("natoms", np.array([1, 2, -1]), "natoms, fixed and forces are not of the same atoms"),
        ("energy", np.zeros(4), "sid, fid, natoms and energy are not of the same structures"),
        ("forces", np.zeros(9), "natoms, fixed and forces are not of the same atoms"),
    ],
)
def test_predictions_that_do_not_fit_together(
    predictions: dict[str, Path], key: str, value: np.ndarray, message: str
) -> None:
    write_submission(predictions["id"], read_arrays(predictions["id"]) | {key: value})
    with pytest.raises(InputError, match=message):
        make_submission("s2ef", predictions)


def test_every_problem_is_told(predictions: dict[str, Path], tmp_path: Path) -> None:
    arrays = make_submission("s2ef", predictions)
    del arrays["id_ids"]
    arrays["ood_both_forces"][3] = np.inf
    write_submission(tmp_path / "out.npz", arrays)
    problems = submission_problems(tmp_path / "out.npz")
    assert len(problems) == 2
    assert "id_ids" in problems[0]
    assert "ood_both_forces" in problems[1]


def test_files_that_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "objects.npz", id_ids=np.array(["a", 1], dtype=object))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "whole.npz", id_energy=np.zeros(100))
    (tmp_path / "truncated.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    for name, message in (
        ("objects.npz", "key id_ids holds Python objects"),
        ("array.npy", "holds a single array"),
        ("text.npz", "is not a .npz file"),
        ("truncated.npz", "is not a .npz file, or not a whole one"),
        ("absent.npz", "No such file"),
    ):
        assert run_script_file("make_submission", "--validate", tmp_path / name) == 2
        assert message in capsys.readouterr().err


def test_ids_and_atoms_beside_the_data(
    predictions: dict[str, Path], data_sets: dict[str, Path], tmp_path: Path
) -> None:
    arrays = make_submission("s2ef", predictions)
    arrays["ood_ads_ids"][0] = "other_1"
    write_submission(tmp_path / "out.npz", arrays)
    problems = problems_beside_data(tmp_path / "out.npz", data_sets)
    assert [problem[: len("key ood_ads_ids lacks 1")] for problem in problems] == [
        "key ood_ads_ids lacks 1",
        "key ood_ads_ids has 1 i",
    ]
    arrays = make_submission("s2ef", predictions)
    arrays["id_chunk_idx"][0] += 1
    write_submission(tmp_path / "out.npz", arrays)
    (problem,) = problems_beside_data(tmp_path / "out.npz", data_sets)
    assert "key id_chunk_idx gives structure" in problem
