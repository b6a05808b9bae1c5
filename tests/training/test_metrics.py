"""The S2EF metrics equal fairchem's evaluator on the same predictions."""

import json
from pathlib import Path

import pytest
import torch
from torch_geometric.data import Batch, Data

from equiformer2.training.metrics import ENERGY_METRICS, FORCE_METRICS, S2EFMetrics

FIXTURE = Path(__file__).parents[1] / "fixtures" / "training" / "evaluator_expected.json"


def load_batches() -> tuple[list[tuple[dict[str, torch.Tensor], Data]], dict[str, float]]:
    content = json.loads(FIXTURE.read_text())
    batches = []
    for record in content["batches"]:
        forces = torch.tensor(record["forces"])
        batch = Data(
            pos=torch.zeros_like(forces),
            natoms=torch.tensor(record["natoms"]),
            fixed=torch.tensor(record["fixed"]),
            energy=torch.tensor(record["energy"]),
            forces=forces,
        )
        prediction = {
            "energy": torch.tensor(record["predicted_energy"]),
            "forces": torch.tensor(record["predicted_forces"]),
        }
        batches.append((prediction, batch))
    return batches, content["expected"]


def test_equal_to_the_reference_evaluator() -> None:
    batches, expected = load_batches()
    metrics = S2EFMetrics()
    for prediction, batch in batches:
        metrics.update(prediction, batch)
    values = metrics.compute()
    assert set(values) == set(ENERGY_METRICS + FORCE_METRICS) == set(expected)
    for name, value in expected.items():
        assert float(values[name]) == pytest.approx(value, abs=1e-6), name


def test_energy_only() -> None:
    batches, expected = load_batches()
    metrics = S2EFMetrics(forces=False)
    for prediction, batch in batches:
        metrics.update({"energy": prediction["energy"]}, batch)
    values = metrics.compute()
    assert set(values) == set(ENERGY_METRICS)
    assert float(values["energy_mae"]) == pytest.approx(expected["energy_mae"], abs=1e-6)


def test_fixed_atoms_do_not_count() -> None:
    batches, expected = load_batches()
    metrics = S2EFMetrics()
    for prediction, batch in batches:
        forces = prediction["forces"].clone()
        forces[batch.fixed] += 100.0
        metrics.update({"energy": prediction["energy"], "forces": forces}, batch)
    assert float(metrics.compute()["forces_mae"]) == pytest.approx(expected["forces_mae"], abs=1e-6)


def test_structure_without_free_atoms_is_judged_by_its_energy() -> None:
    structures = [
        Data(
            pos=torch.zeros(2, 3),
            natoms=2,
            fixed=torch.tensor([fixed, fixed]),
            energy=torch.zeros(1),
            forces=torch.zeros(2, 3),
        )
        for fixed in (True, False)
    ]
    batch = Batch.from_data_list(structures)
    metrics = S2EFMetrics()
    metrics.update({"energy": torch.zeros(2), "forces": torch.ones(4, 3)}, batch)
    values = metrics.compute()
    assert float(values["energy_forces_within_threshold"]) == 0.5
    assert float(values["forces_mae"]) == 1.0
