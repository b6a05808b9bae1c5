"""What the parity figures are drawn from: an even sample, for which no batch makes the host wait."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from test_no_waiting import never_waiting, some_batch, telling
from torch_geometric.data import Batch

from equiformer2.training.callbacks import ParityFigures


def validated(batches: list[Batch], folder: Path, limit: int, forces: bool = True) -> dict[str, np.ndarray]:
    """The points of the figures, by their unit, after an epoch; predictions are 1 above targets."""
    figures = ParityFigures(limit)
    trainer: Any = SimpleNamespace(sanity_checking=False, is_global_zero=True, num_val_batches=[len(batches)])
    module: Any = None
    assert figures.is_empty
    waits: list[str] = []
    figures.on_validation_epoch_start(trainer, module)
    for number, batch in enumerate(batches):
        outputs = {"energy": batch.energy.view(-1) + 1}
        if forces:
            outputs["forces"] = batch.forces + 1
        with never_waiting():
            figures.on_validation_batch_end(trainer, module, outputs, batch, number)
    with telling(waits.append):
        figures.on_validation_epoch_end(trainer, module)
    assert [name for name in waits if name != "numpy"] == ["cpu"]
    assert not figures.is_empty
    units = {"energy": "eV", "forces": "eV/Å"}
    drawn = {units[name]: pairs for name, pairs in figures.pairs.items() if len(pairs)}
    assert len(figures.draw(folder)) == len(drawn)
    return drawn


def test_everything_that_fits_is_kept(lmdb_path: Path, tmp_path: Path) -> None:
    batches = [some_batch(lmdb_path, 0, 7), some_batch(lmdb_path, 13)]
    drawn = validated(batches, tmp_path, limit=10_000)
    energies = torch.cat([batch.energy for batch in batches]).numpy()
    free = torch.cat([batch.forces[~batch.fixed].reshape(-1) for batch in batches]).numpy()
    assert 0 < len(free) < sum(batch.forces.numel() for batch in batches)
    np.testing.assert_allclose(drawn["eV"], np.stack((energies, energies + 1), axis=1))
    np.testing.assert_allclose(drawn["eV/Å"], np.stack((free, free + 1), axis=1))


def test_more_than_that_is_sampled_evenly(lmdb_path: Path, tmp_path: Path) -> None:
    batches = [some_batch(lmdb_path, 0, 7, 13), some_batch(lmdb_path, 2, 4, 6)]
    for batch in batches:
        batch.fixed = torch.arange(len(batch.pos)) % 3 == 0
        batch.forces = torch.arange(batch.forces.numel()).float().reshape(-1, 3)
    drawn = validated(batches, tmp_path, limit=40)
    assert len(drawn["eV"]) == 6
    assert len(drawn["eV/Å"]) == 40
    for batch, targets in zip(batches, np.split(drawn["eV/Å"][:, 0], 2), strict=True):
        free = batch.forces[~batch.fixed].reshape(-1).numpy()
        assert np.isin(targets, free).all()
        places = np.searchsorted(free, targets)
        assert places[0] == 0
        np.testing.assert_allclose(np.diff(places), len(free) / 20, atol=1)
    assert len(validated(batches, tmp_path, limit=2)["eV"]) == 2


def test_without_forces_or_free_atoms_there_is_one_figure(lmdb_path: Path, tmp_path: Path) -> None:
    batch = some_batch(lmdb_path, 0)
    assert set(validated([batch], tmp_path, limit=10, forces=False)) == {"eV"}
    batch.fixed[:] = True
    assert set(validated([batch], tmp_path, limit=10)) == {"eV"}
