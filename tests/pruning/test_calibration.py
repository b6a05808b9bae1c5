"""The discrepancy to the dense network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from search_helpers import NORMALIZERS, slab, slabs, tiny_model
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.calibration_data import labelled_energies, mixed_systems, read_structures

LMDB = Path(__file__).parents[1] / "fixtures" / "datasets_oc20" / "s2ef_val_20_packed.lmdb"
COLUMNS = "species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3"
FRAME = f"""2
Lattice="5 0 0 0 5 0 0 0 9" Properties={COLUMNS} energy=-3.5 pbc="T T T"
Cu 0 0 0 F 0 0.1 0.2 0.3
O 0 0 {{z}} T 2 -0.1 0.0 0.5
"""


def test_the_dense_network_differs_from_itself_by_nothing() -> None:
    model = tiny_model()
    assert Calibration(model, NORMALIZERS, slabs()).loss(model) == 0.0


def test_loss_is_the_definition() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    structures = slabs()
    found = Calibration(model, NORMALIZERS, structures, batch_size=3, force_weight=0.7).discrepancy(other)
    losses: dict[str, list[float]] = {}
    with torch.no_grad():
        for data in structures:
            batch = Batch.from_data_list([data])
            a, b = (NORMALIZERS.denormalize(network(batch), batch) for network in (other, model))
            free = ~data.fixed
            force = (a["forces"] - b["forces"])[free].norm(dim=1).mean()
            loss = float((a["energy"] - b["energy"]).abs() / data.natoms + 0.7 * force)
            losses.setdefault(data.sid, []).append(loss)
    assert found.systems == ("a", "b", "c")
    np.testing.assert_allclose(found.by_system, [np.mean(v) for v in losses.values()], rtol=1e-5)
    assert found.loss == pytest.approx(np.mean([np.mean(v) for v in losses.values()]), rel=1e-5)


def test_batches_do_not_matter_and_labels_are_not_read() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    structures = slabs()
    labelled = [data.clone() for data in structures]
    for data in labelled:
        data.energy, data.forces = torch.tensor([float("nan")]), torch.full_like(data.pos, float("nan"))
    one = Calibration(model, NORMALIZERS, structures, batch_size=1).loss(other)
    all_at_once = Calibration(model, NORMALIZERS, labelled, batch_size=8)
    assert all_at_once.loss(other) == pytest.approx(one, rel=1e-5)
    assert "forces" not in all_at_once.batches[0]


def test_the_loss_on_some_batches_is_that_of_their_structures() -> None:
    model, other, structures = tiny_model(), tiny_model(seed=1), slabs()
    found = Calibration(model, NORMALIZERS, structures, batch_size=1)
    errors = {index: found.errors(index, other) for index in range(4)}
    assert found.loss_on(range(4), errors) == pytest.approx(found.loss(other))
    for some in ([0, 1], [1, 3], [2]):
        alone = Calibration(model, NORMALIZERS, [structures[index] for index in some], batch_size=1)
        assert found.loss_on(some, errors) == pytest.approx(alone.loss(other))
    part = {0: errors[0], 2: errors[2]}
    losses = [found.loss_on(range(4), known) for known in ({}, {0: errors[0]}, part, errors)]
    assert losses == sorted(losses)
    assert losses[0] == 0.0 < losses[1] < losses[-1]
    assert found.loss_on([0, 2], errors | {2: torch.full((1, 3), float("inf"))}) == float("inf")


def test_forces_of_held_atoms_do_not_count() -> None:
    calibration = Calibration(tiny_model(), NORMALIZERS, slabs())
    answers = [dict(out) for out in calibration.dense]
    for out, batch in zip(answers, calibration.batches, strict=True):
        out["forces"] = out["forces"] + batch.fixed[:, None] * 5.0
    assert calibration.compare(answers).loss == 0.0


def test_a_system_without_free_atoms_has_an_energy_only() -> None:
    held = slab("held")
    held.fixed[:] = True
    model, other = tiny_model(), tiny_model(seed=1)
    found = Calibration(model, NORMALIZERS, [slab("a"), held]).discrepancy(other)
    assert np.isnan(found.forces[1])
    assert not np.isnan(found.forces[0])
    assert found.by_system[1] == pytest.approx(found.energy[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", [("energy", "forces"), ("energy",), ("forces",)], ids="+".join)
def test_a_network_that_answers_no_number_is_infinitely_wrong(broken: tuple[str, ...], value: float) -> None:
    calibration = Calibration(tiny_model(), NORMALIZERS, slabs())
    answers = [dict(out) for out in calibration.dense]
    for name in broken:
        answers[0][name] = answers[0][name].clone()
        answers[0][name][-1] = value  # the last atom of a slab is free
    found = calibration.compare(answers)
    assert found.loss == float("inf")
    assert np.isinf(found.forces).any() == ("forces" in broken)
    assert np.isinf(found.energy).any() == ("energy" in broken)
    assert calibration.loss(lambda batch, graph: answers[0]) == float("inf")


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_of_the_forces_that_weighs_nothing(weight: float) -> None:
    with pytest.raises(InputError, match="the force weight is"):
        Calibration(tiny_model(), NORMALIZERS, slabs(), force_weight=weight)


def test_a_training_network_is_compared_in_evaluation_mode() -> None:
    model = tiny_model(alpha_drop=0.5)
    calibration = Calibration(model, NORMALIZERS, slabs())
    model.train()
    assert calibration.loss(model) == 0.0
    assert model.training


def test_no_structures_is_an_error() -> None:
    with pytest.raises(InputError, match="no structures"):
        Calibration(tiny_model(), NORMALIZERS, [])


def test_structures_are_spread_over_systems(tmp_path: Path) -> None:
    for name, count in (("one", 5), ("two", 2), ("three", 1)):
        text = "".join(FRAME.format(z=1.5 + 0.1 * i) for i in range(count))
        (tmp_path / f"{name}.extxyz").write_text(text)
    chosen = read_structures(tmp_path, limit=5, seed=3)
    assert sorted(data.sid for data in chosen) == ["one", "one", "three", "two", "two"]
    again = read_structures(tmp_path, limit=5, seed=3)
    assert [(d.sid, d.fid) for d in again] == [(d.sid, d.fid) for d in chosen]
    assert "energy" not in chosen[0]
    assert chosen[0].fixed.tolist() == [True, False]
    torch.testing.assert_close(chosen[0].forces[1], torch.tensor([-0.1, 0.0, 0.5]))
    assert not labelled_energies(tmp_path, "total")


def test_lmdb_files_are_read() -> None:
    structures = read_structures(LMDB, limit=3)
    assert [data.sid for data in structures] == ["1981709"] * 3
    assert len({int(data.fid) for data in structures}) == 3


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_hold_something(batch_size: int) -> None:
    with pytest.raises(InputError, match=f"batch size is {batch_size}: give at least 1"):
        Calibration(tiny_model(), NORMALIZERS, slabs(), batch_size=batch_size)


def test_the_first_structures_are_of_different_systems() -> None:
    stored = [slab(sid, height=1.3 + 0.1 * frame) for sid in "abcd" for frame in range(3)]
    mixed = mixed_systems(stored, seed=1)
    assert {id(data) for data in mixed} == {id(data) for data in stored}
    for turn in range(3):
        assert {data.sid for data in mixed[4 * turn : 4 * turn + 4]} == set("abcd")
    assert [id(data) for data in mixed_systems(stored, seed=1)] == [id(data) for data in mixed]
    assert [id(data) for data in mixed_systems(stored, seed=2)] != [id(data) for data in mixed]
