"""One structure as a batch, without the collation of several."""

from pathlib import Path

import torch
from ase import Atoms
from torch_geometric.data import Batch

from equiformer2.inference import Predictor, atoms_to_data
from equiformer2.inference.predictor import batch_of_one
from equiformer2.model.output_request import OutputRequest


def test_it_is_what_collation_makes(oxygen_on_copper: Atoms) -> None:
    oxygen_on_copper.info["sid"] = "random1"
    data = atoms_to_data(oxygen_on_copper)
    data.y_relaxed, data.y = -1.5, torch.tensor(2.0)
    batch, expected = batch_of_one(data), Batch.from_data_list([data])
    assert set(batch.keys()) == set(expected.keys())
    assert batch.num_graphs == expected.num_graphs == 1
    for key in expected.keys():  # noqa: SIM118
        if isinstance(expected[key], torch.Tensor):
            assert batch[key].dtype == expected[key].dtype, key
            assert torch.equal(batch[key], expected[key]), key
        else:
            assert batch[key] == expected[key], key


def test_moving_leaves_the_callers_batch(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    predictor = Predictor(checkpoint)
    seen = []

    def network(batch: Batch, request: OutputRequest) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return {}

    predictor.device = torch.device("meta")
    predictor.router = lambda model, batch, request: network(batch, request)
    batch = batch_of_one(atoms_to_data(oxygen_on_copper))
    predictor._run(batch, OutputRequest(), predictor.router)
    assert seen[0].pos.device.type == seen[0].batch.device.type == "meta"
    assert batch.pos.device.type == batch.batch.device.type == "cpu"
