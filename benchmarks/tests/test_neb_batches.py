"""Counts of evaluations of the three bands."""

from pathlib import Path

import pytest

from benchmarks.neb_batches import main, measure
from equiformer2 import Predictor
from equiformer2.files import read_json
from tests.training.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("network") / "tiny.pt")


def test_a_batch_takes_one_evaluation_of_every_image_and_step(checkpoint: Path) -> None:
    bands = measure(Predictor(checkpoint), images=3, steps=2, size=(2, 2, 3))
    counts = {name: one["evaluations"] for name, one in bands.items()}
    assert counts["one batch"] == counts["a calculator per image"] == 3 * 3 + 2
    assert counts["one calculator"] > counts["one batch"]


def test_the_record_has_the_bands(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--images", "1", "--steps", "1", "--size", "2", "2", "3", "--json", str(tmp_path / "neb.json")]
    main(["--checkpoint", str(checkpoint), *words])
    assert read_json(tmp_path / "neb.json")["atoms"] == 13
