"""Structures of which only the forces are learned, beside those with energies."""

from pathlib import Path

import pytest
import torch
from oc20_files import structure

from datasets_oc20 import DataError, LmdbWriter, OC20DataModule


def write(path: Path, energies: list[float], first_fid: int = 0, forces: bool = True) -> str:
    with LmdbWriter(path, "adsorption") as writer:
        for number, energy in enumerate(energies):
            data = structure(energy=energy, seed=number, fid=first_fid + number)
            if not forces:
                del data.forces
            writer.write(data)
    return str(path)


def test_both_sets_are_served_and_told_apart(tmp_path: Path) -> None:
    train = write(tmp_path / "train.lmdb", [1.0, 2.0, 3.0])
    extra = write(tmp_path / "extra.lmdb", [-900.0, -901.0], first_fid=10)
    module = OC20DataModule(train, train, forces_only=extra, batch_size=2)
    module.setup()
    seen = {}
    for batch in module.train_dataloader():
        seen |= dict(zip(batch.fid.tolist(), batch.has_energy.tolist(), strict=True))
    assert seen == {0: True, 1: True, 2: True, 10: False, 11: False}
    # Energies with another zero would move the mean.
    assert module.normalizers["energy"][0] == pytest.approx(2.0)
    assert all("has_energy" not in batch for batch in module.val_dataloader())


def test_atoms_are_counted_for_the_limits(tmp_path: Path) -> None:
    train, extra = write(tmp_path / "a.lmdb", [1.0, 2.0]), write(tmp_path / "b.lmdb", [3.0, 4.0, 5.0])
    module = OC20DataModule(train, train, forces_only=extra, batch_size=9, max_atoms=8)
    module.setup()
    sizes = [len(batch.pos) for batch in module.train_dataloader()]
    assert sum(sizes) == 20
    assert max(sizes) <= 8


def test_a_set_without_forces_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.lmdb", [1.0, 2.0])
    extra = write(tmp_path / "extra.lmdb", [1.0], forces=False)
    with pytest.raises(DataError, match=r"extra\.lmdb, key 0: no forces"):
        OC20DataModule(train, train, forces_only=extra).setup()


def test_batches_without_the_option_have_no_mark(tmp_path: Path) -> None:
    train = write(tmp_path / "train.lmdb", [1.0, 2.0])
    module = OC20DataModule(train, train)
    module.setup()
    assert all("has_energy" not in batch for batch in module.train_dataloader())
    assert torch.cat([batch.energy for batch in module.train_dataloader()]).sort().values.tolist() == [1, 2]
