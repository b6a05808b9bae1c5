"""The study of the time of searches: its page, and what is not repeated."""

from pathlib import Path

import pytest
import torch

from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from studies import search_time

DATA = "data/oc20_trajs/random1000100.extxyz.xz"


def test_data_that_are_missing_are_named(tmp_path: Path) -> None:
    words = ["--data", str(tmp_path / "none.lmdb"), "--results", str(tmp_path / "page")]
    with pytest.raises(InputError, match=r"none\.lmdb is missing"):
        search_time.main(words)


def test_a_search_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def search(checkpoint: Path, data: Path, structures: int) -> dict[str, float]:
        calls.append((checkpoint.name, data.name, structures))
        return {"passes": 465.4, "candidates": 72, "macs": 0.693}

    def write(size: str, path: Path) -> int:
        return 31_058_690

    monkeypatch.setattr(search_time, "SEARCHES", {"plan": search})
    monkeypatch.setattr(search_time, "write_random", write)
    words = ["--data", DATA, "--structures", "2", "--out", str(tmp_path), "--searches", "plan"]
    for _ in range(2):
        search_time.main([*words, "--results", str(tmp_path / "page")])
    assert calls == [("31M.pt", "random1000100.extxyz.xz", 2)]
    page = (tmp_path / "page.md").read_text()
    assert "| plan | 31M (31,058,690 parameters) | 2 (" in page
    assert f"| 72 | 465 | 0.0 | {torch.get_num_threads()} | 69.3% |" in page
    with pytest.raises(InputError, match="other settings"):
        search_time.main([*words, "--structures", "1", "--results", str(tmp_path / "page")])


@pytest.mark.slow
def test_the_checkpoint_has_random_weights(tmp_path: Path) -> None:
    path = tmp_path / "31M.pt"
    assert search_time.write_random("31M", path) == 31_058_690
    assert load_checkpoint(path).provenance["weights"] == "random"
