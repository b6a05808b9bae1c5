"""The IS2RE and IS2RS metrics equal fairchem's evaluator on the same relaxations."""

import json
from pathlib import Path

import numpy as np
import pytest

from equiformer2.training.metrics import energy_metrics
from equiformer2.training.relaxation_run import (
    is2rs_metrics,
    position_errors,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "training" / "is2re_expected.json"
PERIODIC = np.array([True, True, True])


def test_equal_to_the_reference_evaluator() -> None:
    content = json.loads(FIXTURE.read_text())
    errors, target, predicted = [], [], []
    for batch in content["batches"]:
        ends = np.cumsum(batch["natoms"])[:-1]
        free = np.split(~np.array(batch["fixed"]), ends)
        positions = np.split(np.array(batch["positions"], dtype=np.float32), ends)
        targets = np.split(np.array(batch["target_positions"], dtype=np.float32), ends)
        cells = np.array(batch["cell"], dtype=np.float32)
        for mask, mine, theirs, cell in zip(free, positions, targets, cells, strict=True):
            errors.append(position_errors(mine[mask], theirs[mask], cell, PERIODIC))
        target += batch["target_energy"]
        predicted += batch["energy"]
    found = energy_metrics(np.array(target), np.array(predicted)) | is2rs_metrics(errors)
    assert set(found) == set(content["expected"])
    for name, value in content["expected"].items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert 0.0 < found["positions_average_distance_within_threshold"] < 1.0


def test_distances_are_to_the_nearest_image_along_periodic_directions() -> None:
    cell = np.diag([4.0, 5.0, 20.0])
    target = np.array([[0.1, 0.1, 0.1]])
    moved = target + cell[0] - [0.2, 0.0, 0.0]
    error = position_errors(moved, target, cell, PERIODIC)
    assert error.distance == pytest.approx(0.2)
    assert error.absolute == pytest.approx(3.8)
    slab = position_errors(moved, target, cell, np.array([False, True, True]))
    assert slab.distance == pytest.approx(3.8)
    for thin, pbc in ((cell * [[1], [1], [0]], [True, True, False]), (0 * cell, [False] * 3)):
        error = position_errors(moved, target, thin, np.array(pbc))
        assert error.distance == pytest.approx(0.2 if pbc[0] else 3.8)


def test_a_system_without_free_atoms_is_where_it_should_be() -> None:
    nothing = position_errors(np.zeros((0, 3)), np.zeros((0, 3)), np.eye(3), PERIODIC)
    one = position_errors(np.ones((1, 3)), np.zeros((1, 3)), 9 * np.eye(3), PERIODIC)
    assert is2rs_metrics([nothing, nothing]) == {}
    found = is2rs_metrics([nothing, one])
    assert found["positions_mae"] == 1.0
    assert found["positions_average_distance_within_threshold"] == 0.5
