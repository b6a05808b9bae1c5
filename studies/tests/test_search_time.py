"""The study of the time of searches: its page, and what is not repeated."""

from pathlib import Path

import pytest

from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.pruning.calibration_data import read_structures
from equiformer2.pruning.fingerprints import fingerprint_of_structures
from studies import search_time
from studies.results import write_page

DATA = "data/oc20_trajs/random1000100.extxyz.xz"


def test_data_that_are_missing_are_named(tmp_path: Path) -> None:
    words = ["--data", str(tmp_path / "none.lmdb"), "--results", str(tmp_path / "page")]
    with pytest.raises(InputError, match=r"none\.lmdb is missing"):
        search_time.main(words)


def test_a_search_that_the_page_holds_is_not_repeated(tmp_path: Path) -> None:
    chosen = read_structures([DATA], 2)
    about = {
        **{"search": "plan", "size": "31M", "structures": 2, "keep": 0.7},
        "fingerprint": fingerprint_of_structures(chosen),
        "atoms": sum(len(data.pos) for data in chosen) / 2,
    }
    found = {"passes": 465.4, "candidates": 72, "macs": 0.693, "seconds": 90.0, "parameters": 31_058_690}
    row = {"run": "plan-31M", "about": about, **found, "threads": 2}
    write_page(tmp_path / "page", [{**row, "machine": {"processor": "EPYC", "cores": 2}}], "")
    words = ["--data", DATA, "--out", str(tmp_path), "--searches", "plan"]
    words += ["--results", str(tmp_path / "page")]
    search_time.main([*words, "--structures", "2"])
    page = (tmp_path / "page.md").read_text()
    assert f"| plan | 31M (31,058,690 parameters) | 2 ({about['atoms']:.0f}) |" in page
    assert "| 72 | 465 | 1.5 | 2 | 69.3% |" in page
    assert not (tmp_path / "31M.pt").exists()
    with pytest.raises(InputError, match="other settings"):
        search_time.main([*words, "--structures", "1"])


@pytest.mark.slow
def test_the_checkpoint_has_random_weights(tmp_path: Path) -> None:
    path = tmp_path / "31M.pt"
    assert search_time.write_random("31M", path) == 31_058_690
    assert load_checkpoint(path).provenance["weights"] == "random"
