"""Starts that fit the data: heads kept or reset, references fitted, given or of isolated atoms."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from emt_frames import write_frames
from tiny_networks import write_checkpoint
from torch_geometric.data import Data

from equiformer2.errors import InputError
from equiformer2.finetuning.folder import FineTuneSettings
from equiformer2.finetuning.frames import Frames, open_frames, read_frames
from equiformer2.finetuning.parts import divide_data
from equiformer2.finetuning.start import isolated_references, prepare_start, read_isolated_atoms
from equiformer2.inference import Predictor


@pytest.fixture(scope="module")
def found(emt: Path) -> Frames:
    return read_frames(open_frames([emt]), 89)


def start_of(path: Path, frames: Frames, reset: bool = False, isolated: dict[int, float] | None = None):  # type: ignore[no-untyped-def]
    return prepare_start(Predictor(path), frames, np.arange(len(frames)), isolated or {}, reset, 0)


def shifted(frames: Frames, per_atom: float) -> Frames:
    return replace(frames, energy=frames.energy + per_atom * frames.natoms)


@pytest.mark.parametrize(
    ("kind", "forces", "change", "reason"),
    [
        ("adsorption", "direct", lambda f: f, "predicts adsorption energies and the data hold total"),
        ("total", "direct", lambda f: replace(f, has_forces=False), "energies without forces"),
        ("total", "none", lambda f: f, "predicts energies alone"),
        (
            "total",
            "direct",
            lambda f: shifted(f, -1000.0),
            r"by \d[\d.]+ eV per atom on average, .* another functional, code or pseudopotential",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_reset_on_request(
    found: Frames,
    tmp_path: Path,
    kind: str,
    forces: str,
    change,
    reason: str,  # type: ignore[no-untyped-def]
) -> None:
    path = write_checkpoint(tmp_path / "a.pt", kind, forces=forces)
    frames = change(found)
    with pytest.raises(InputError, match=f"{reason}.*--reset-head"):
        start_of(path, frames)
    start = start_of(path, frames, reset=True)
    assert not start.keeps_zero
    assert start.checkpoint.energy_kind == "total"
    assert start.checkpoint.config.forces == ("direct" if frames.has_forces else "none")


def test_a_reset_network_answers_energies_of_the_data_and_the_same_forces(
    found: Frames, tmp_path: Path
) -> None:
    # The random forces of two blocks are small enough to be kept as they are.
    path = write_checkpoint(tmp_path / "a.pt", "adsorption", num_layers=2)
    start = start_of(path, found, reset=True)
    data = found.dataset[0]
    before, after = Predictor(path).predict(data), Predictor(start.checkpoint).predict(data)
    assert torch.allclose(before["forces"], after["forces"], atol=1e-5)
    references = start.own.reference_energy(data, 1) + start.own.energy.mean
    assert abs(float(after["energy"] - references)) < 3 * start.own.energy.std


@pytest.mark.parametrize(("true", "expected"), [(0.25, 0.25), (1.0, 1.0), (3.0, 1.0), (-1.0, 0.01)])
def test_a_kept_force_head_is_scaled_down_to_the_forces_of_the_data(
    frames: list[Data], adsorption_checkpoint: Path, tmp_path: Path, true: float, expected: float
) -> None:
    predictor = Predictor(adsorption_checkpoint)
    answers = [predictor.predict(frame)["forces"] for frame in frames]
    labelled = [frame.clone() for frame in frames]
    for frame, forces in zip(labelled, answers, strict=True):
        frame.forces = true * forces
        frame.forces[frame.fixed] = 50.0  # held atoms do not count
    path = write_frames(tmp_path / "scaled.lmdb", labelled)
    start = start_of(adsorption_checkpoint, read_frames(open_frames([path]), 89), reset=True)
    kept = Predictor(start.checkpoint).predict(frames[0])["forces"]
    assert answers[0].abs().max() > 0.01
    assert torch.allclose(kept, expected * answers[0], rtol=1e-3, atol=1e-6)
    assert any(f"{expected:.3g} times its forces" in text for text in start.sentences) == (expected < 1.0)


def test_a_kept_head_is_corrected_by_constants(found: Frames, total_checkpoint: Path) -> None:
    start = start_of(total_checkpoint, found)
    assert start.keeps_zero
    before, after = Predictor(total_checkpoint), Predictor(start.checkpoint)
    errors = []
    for predictor in (before, after):
        answers = [predictor.predict(found.dataset[row]) for row in range(len(found))]
        errors.append(np.abs([float(a["energy"]) for a in answers] - found.energy).mean())
    assert errors[1] < errors[0]
    forces = [predictor.predict(found.dataset[3])["forces"] for predictor in (before, after)]
    assert torch.allclose(*forces, atol=1e-5)


def test_references_of_isolated_atoms_are_taken_and_completed(found: Frames) -> None:
    sample = found.targets(np.arange(len(found)))
    table, fitted = isolated_references({29: -1.0, 78: -2.0, 28: -3.0}, sample)
    assert (table[29], table[78], table[28]) == (-1.0, -2.0, -3.0)
    assert fitted == [1, 8]
    every = {number: -1.0 for number in found.elements()}
    assert isolated_references(every, sample)[1] == []


def test_references_of_isolated_atoms_are_in_the_start(found: Frames, adsorption_checkpoint: Path) -> None:
    every = {number: -float(number) for number in found.elements()}
    start = start_of(adsorption_checkpoint, found, reset=True, isolated=every)
    assert start.checkpoint.normalizers.linear_references[29] == -29.0
    adsorption = replace(found, energy_kind="adsorption")
    with pytest.raises(InputError, match="isolated atoms are references of total energies"):
        start_of(adsorption_checkpoint, adsorption, isolated=every)


def test_a_kept_head_keeps_the_references_that_it_has_learned_with(
    found: Frames, total_checkpoint: Path
) -> None:
    """Energies of isolated atoms are eV per atom away from those that it was trained less."""
    every = {number: -float(number) for number in found.elements()}
    start, without = start_of(total_checkpoint, found, isolated=every), start_of(total_checkpoint, found)
    assert start.checkpoint.normalizers.linear_references is not None
    assert start.checkpoint.normalizers == without.checkpoint.normalizers
    assert start.own.linear_references[29] == -29.0
    assert any("isolated atoms: for the network from scratch" in text for text in start.sentences)


def atom(number: int, energy: float, count: int = 1) -> Data:
    return Data(
        pos=torch.arange(3 * count).reshape(count, 3).double() * 2,
        atomic_numbers=torch.full((count,), number),
        cell=torch.eye(3)[None].double() * 12,
        pbc=torch.ones(1, 3, dtype=torch.bool),
        tags=torch.zeros(count, dtype=torch.long),
        fixed=torch.zeros(count, dtype=torch.bool),
        energy=torch.tensor([energy], dtype=torch.float64),
        sid="atom",
        fid=0,
    )


def test_files_of_isolated_atoms_are_read_and_checked(tmp_path: Path) -> None:
    good = open_frames([write_frames(tmp_path / "a.lmdb", [atom(8, -1.5), atom(29, -0.2)])])
    assert read_isolated_atoms(good) == {8: -1.5, 29: -0.2}
    with pytest.raises(InputError, match="holds 2 atoms"):
        read_isolated_atoms(open_frames([write_frames(tmp_path / "b.lmdb", [atom(8, -1.0, 2)])]))
    with pytest.raises(InputError, match=r"isolated atom O has -1\.0"):
        read_isolated_atoms(open_frames([write_frames(tmp_path / "c.lmdb", [atom(8, -2.0), atom(8, -1.0)])]))


def test_isolated_atoms_among_the_frames_are_taken_apart(frames: list[Data], tmp_path: Path) -> None:
    lone = [atom(8, -1.5), atom(8, -430.0)]
    for each in lone:
        each.forces = torch.zeros(1, 3)
    data = str(write_frames(tmp_path / "a.lmdb", [*frames[:8], lone[0]]))
    twice = str(write_frames(tmp_path / "b.lmdb", [*frames[:8], *lone]))
    settings = FineTuneSettings(data=(data,), val=(data,), checkpoint="oc20_small", out=tmp_path)
    parts = divide_data(settings, 89, "total")
    assert parts.isolated == {8: -1.5}
    assert [len(rows) for rows in (parts.all, parts.judged[1], parts.watched[1])] == [8, 8, 8]
    assert any("without 1 isolated atoms" in text for text in parts.sentences)
    with pytest.raises(InputError, match=r"b\.lmdb, key 9: the isolated atom O has -430\.0.* -1\.5"):
        divide_data(replace(settings, data=(twice,)), 89, "total")


def test_points_of_the_curve_replay_as_much_per_new_frame(emt: Path, copper: Path, tmp_path: Path) -> None:
    settings = FineTuneSettings(
        data=(str(emt),), checkpoint="oc20_small", out=tmp_path, replay=(str(copper),), curve=True,
        replay_weights=(0.25,),
    )  # fmt: skip
    parts = divide_data(settings, 89, "total")
    ((_, by_share),) = parts.replay
    assert set(by_share) == set(parts.train)
    assert len(parts.train) > 2
    for share, rows in by_share.items():
        assert len(rows) == max(1, round(0.25 * len(parts.train[share])))
        assert parts.count(share) == len(parts.train[share]) + len(rows)


def test_old_data_that_are_replayed_are_told(emt: Path, copper: Path, tmp_path: Path) -> None:
    settings = FineTuneSettings(
        data=(str(copper),), checkpoint="oc20_small", out=tmp_path, replay=(str(emt),), old=(str(emt),)
    )
    assert any("in --old are replayed, too" in text for text in divide_data(settings, 89, "total").sentences)
    apart = divide_data(replace(settings, old=()), 89, "total")
    assert not any("in --old" in text for text in apart.sentences)


def test_isolated_atoms_among_the_frames_are_seen(frames: list[Data], tmp_path: Path) -> None:
    path = write_frames(tmp_path / "a.lmdb", [frames[0].clone(), *[f for f in frames[1:4]]])
    assert not read_frames(open_frames([path]), 89).isolated.any()
    lone = atom(8, -1.5)
    lone.forces = torch.zeros(1, 3)
    path = write_frames(tmp_path / "b.lmdb", [frames[0], lone])
    assert read_frames(open_frames([path]), 89).isolated.tolist() == [False, True]
