"""Systems per hour: the same starts for all, the same ends of batches and ASE, and the table."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.benchmark_structures import load_atoms, load_starts, save_starts
from benchmarks.measure_relaxations import main, parse_arguments, summarise
from equiformer2.errors import InputError


def test_starts_are_displaced_and_the_same_again(tmp_path: Path) -> None:
    starts = load_starts(str(save_starts(tmp_path / "a.pt", 5, 0)))
    again = load_starts(str(save_starts(tmp_path / "b.pt", 3, 0)))
    slab = load_atoms()
    held = slab.constraints[0].index
    assert np.array_equal(starts[0].positions[held], slab.positions[held])
    moved = np.linalg.norm(starts[0].positions - slab.positions, axis=1)
    assert moved.max() > 0.1
    for one, other in zip(starts, again, strict=False):
        assert np.array_equal(one.positions, other.positions)
    assert not np.array_equal(starts[0].positions, starts[4].positions)  # the same slab, displaced otherwise


def test_both_ways_end_alike(tmp_path: Path) -> None:
    arguments = ["--size", "toy", "--systems", "2", "--steps", "2", "--repeats", "1", "--threads", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "relaxations_toy.json").read_text())
    assert list(record["methods"]) == ["batched", "ase"]
    for row in record["methods"].values():
        assert row["model_evaluations"] == 2 * 3
        assert row["converged"] == 0
        assert row["largest_energy_difference_eV"] < 1e-3
        assert row["systems_per_hour"] > 0
    page = (tmp_path / "relaxations_toy.md").read_text()
    assert "one by one through ASE" in page
    assert "toy, random parameters" in page


def test_rates_are_medians_of_the_rounds() -> None:
    row = {"evaluations": 3, "converged": 1, "energies_eV": [1.0]}
    found = summarise(
        {
            "batched": {**row, "seconds": [1.0, 3.0, 2.0]},
            "ase": {**row, "seconds": [4.0], "energies_eV": [1.5]},
        },
        1,
    )
    assert found["batched"]["systems_per_hour"] == pytest.approx(1800)
    assert found["batched"]["slowest_round"] == pytest.approx(1200)
    assert found["ase"]["largest_energy_difference_eV"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "toy", "--systems", "0"], "--systems is 0"),
        (["--size", "toy", "--reference-python", "/nowhere/python"], "not found"),
        (["--checkpoint", "oc20_small", "--reference-python", "/nowhere/python"], "cannot load"),
    ],
)
def test_wrong_options_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_arguments(words)
