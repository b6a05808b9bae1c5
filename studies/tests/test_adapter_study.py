"""The study of adapters: its runs, one of them at tiny size, and its page."""

import argparse
from pathlib import Path

import pytest

from datasets_oc20 import OC20Lmdb
from equiformer2.errors import InputError
from equiformer2.files import read_json
from studies.adapters import PARTS, SETTINGS, data_folder, main, planned, prepare


def test_the_plan_has_every_run_once() -> None:
    runs = planned(list(PARTS), list(SETTINGS))
    assert len(runs) == len(set(runs))
    counts = {part: sum(run[0] == part for run in runs) for part in PARTS}
    assert counts == {"dft": 5 * 3 + 2, "elements": 8 * 3 + 2, "adsorbates": 2}
    assert [seed for _, _, seed in runs] == sorted(seed for _, _, seed in runs)
    assert planned(["dft"], ["scratch"]) == [("dft", "scratch", 0)]


def test_learned_and_judged_frames_are_of_other_systems(tmp_path: Path) -> None:
    prepare(tmp_path, "dft", 6)
    parts = [OC20Lmdb(tmp_path / f"dft.{kind}.lmdb") for kind in ("train", "test")]
    assert [len(part) for part in parts] == [6, 6]
    names = [{part[row].sid for row in range(6)} for part in parts]
    assert not names[0] & names[1]


@pytest.mark.slow
def test_runs_in_processes_of_their_own_and_a_page(tmp_path: Path) -> None:
    runs, page = tmp_path / "runs", tmp_path / "page"
    words = ["--parts", "adsorbates", "--settings", "full", "removed_80", "--steps", "1", "--frames", "2"]
    words += ["--runs", str(runs), "--results", str(page)]
    with pytest.raises(InputError, match="no finished run"):
        main([*words, "--collect"])
    main(words)
    files = [runs / f"adsorbates-{name}-0.result.json" for name in ("full", "removed_80")]
    full, adapter = map(read_json, files)
    assert adapter["trainable_parameters"] < 0.1 * full["trainable_parameters"]
    assert adapter["bytes"] < 0.1 * full["bytes"]
    for record in (full, adapter):
        assert record["step_seconds"] > 0
        assert record["peak_bytes"] >= record["peak_bytes_before_training"] > 0
        for where in ("target", "source"):
            assert all(value > 0 for value in record["errors"][where].values())
        assert record["rotation_error_before"] > 0
    text = page.with_suffix(".md").read_text()
    assert "| adapter, 80 % removed | 1 |" in text
    before = files[0].stat().st_mtime_ns
    main([*words, "--collect"])
    main(words)
    assert files[0].stat().st_mtime_ns == before
    # In another clone only the page is there.
    files[0].unlink()
    main([*words, "--collect"])
    assert "| full fine-tuning | 1 |" in page.with_suffix(".md").read_text()
    with pytest.raises(InputError, match="with other settings"):
        main([*words, "--steps", "2"])


def test_other_numbers_of_frames_are_other_data(tmp_path: Path) -> None:
    folders = [data_folder(argparse.Namespace(runs=tmp_path, frames=frames)) for frames in (50, 200)]
    assert folders[0] != folders[1]
