"""Faults of own data are named in one sentence with file and frame."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from emt_frames import write_frames
from torch_geometric.data import Data

from datasets_oc20 import DataError, OC20Lmdb
from datasets_oc20.own_data.frame_facts import is_alone
from equiformer2.errors import InputError
from equiformer2.finetuning.frames import open_frames, read_frames, write_part


def with_energy(data: Data, energy: float) -> Data:
    changed = data.clone()
    changed.energy = np.array([energy])
    return changed


def without(data: Data, *names: str) -> Data:
    changed = data.clone()
    for name in names:
        del changed[name]
    return changed


def heavy(data: Data) -> Data:
    changed = data.clone()
    changed.atomic_numbers[0] = 92
    return changed


WRONG: list[tuple[str, Callable[[list[Data]], list[Data]], str]] = [
    ("forces missing in one", lambda f: [f[0], without(f[1], "forces")], "key 1 has no forces"),
    ("forces in one alone", lambda f: [without(f[0], "forces"), f[1]], "key 1 has forces"),
    ("no energy", lambda f: [f[0], without(f[1], "energy")], "key 1 has no energy"),
    ("beyond the network", lambda f: [f[0], heavy(f[1])], "key 1 holds U \\(Z = 92\\)"),
    (
        "two kinds",
        lambda f: [with_energy(x, -40.0) for x in f[:4]] + [with_energy(f[4], -0.5)],
        "key 4 has an energy of -0.5 eV .* total and adsorption energies are mixed",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_frames_that_cannot_be_learned_are_named(
    frames: list[Data], tmp_path: Path, change: Callable[[list[Data]], list[Data]], message: str
) -> None:
    path = write_frames(tmp_path / "own.lmdb", change(frames))
    with pytest.raises(InputError, match=f"own.lmdb, {message}"):
        read_frames(open_frames([path]), 89)


def test_a_total_energy_among_adsorption_energies_is_named(frames: list[Data], tmp_path: Path) -> None:
    labelled = [with_energy(frames[0], -0.5), with_energy(frames[1], -50.0), with_energy(frames[2], 0.3)]
    path = write_frames(tmp_path / "own.lmdb", labelled, "adsorption")
    with pytest.raises(InputError, match="key 1 has an energy of -50 eV"):
        read_frames(open_frames([path]), 89)


@pytest.mark.parametrize("field", ["energy", "forces"])
def test_labels_that_are_not_finite_are_named(frames: list[Data], tmp_path: Path, field: str) -> None:
    changed = frames[1].clone()
    changed[field] = torch.full_like(torch.as_tensor(changed[field]), float("nan"))
    with pytest.raises(DataError, match=f"{field} holds NaN"):
        write_frames(tmp_path / "own.lmdb", [frames[0], changed])


def test_the_kind_is_found_where_only_one_is_possible(frames: list[Data], tmp_path: Path) -> None:
    path = write_frames(tmp_path / "own.lmdb", [with_energy(frame, -40.0) for frame in frames[:3]], None)
    found = read_frames(open_frames([path]), 89)
    assert (found.energy_kind, found.has_forces, len(found)) == ("total", True, 3)
    small = write_frames(tmp_path / "small.lmdb", frames[:3], None)
    with pytest.raises(InputError, match="give --energy-kind"):
        read_frames(open_frames([small]), 89)
    assert read_frames(open_frames([small], "total"), 89, "total").kind_from == "as given"


@pytest.mark.parametrize(
    ("cell", "pbc", "alone"),
    [(2.6, True, False), (12.0, True, True), (2.6, False, True)],
    ids=["bulk", "box", "no images"],
)
def test_isolated_atoms_are_told_from_bulk_cells(cell: float, pbc: bool, alone: bool) -> None:
    assert is_alone(np.eye(3) * cell, np.full(3, pbc)) == alone


def test_a_part_keeps_labels_and_drops_what_is_not_trained(frames: list[Data], tmp_path: Path) -> None:
    more = frames[0].clone()
    more.stress = torch.zeros(1, 3, 3)
    found = read_frames(open_frames([write_frames(tmp_path / "own.lmdb", [more, more, more])]), 89)
    part = OC20Lmdb(write_part(found, np.array([2]), tmp_path / "parts" / "part.lmdb", True))
    assert len(part) == 1
    assert "stress" not in part[0]
    assert torch.equal(part[0].forces, torch.as_tensor(more.forces))
    assert part.energy_kind == "total"
