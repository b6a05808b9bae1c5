"""The table of what inference leaves out: nothing changes, and the counted savings are those of the cuts."""

from collections.abc import Callable

import pytest
import torch
from model_helpers import batch_of, random_model, slab, small_config, water
from torch_geometric.data import Batch

from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.pruning.analysis.lossless import measure_savings, with_whole_heads
from equiformer2.pruning.cost.operations import count_macs

NORMALIZERS = Normalizers(energy=Normalizer(-0.7, 2.0), forces=Normalizer(0.0, 2.5))


def held_slab() -> Batch:
    """CO on a slab whose lower two layers are fixed, and free water."""
    first, second = slab(), water()
    first.fixed, second.fixed = torch.arange(14) < 8, torch.zeros(3, dtype=torch.bool)
    return batch_of(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_gate_act": True, "use_grid_mlp": False, "mmax": 2},
        {"use_grid_mlp": False, "lmax": 3, "mmax": 3, "use_m_share_rad": True},
        {"use_sep_s2_act": False, "mmax": 0},
        {"lmax": 1},
    ],
    ids=["default", "gates", "S2", "plain S2", "lmax 1"],
)
def test_heads_give_what_the_paper_writes(options: dict[str, object]) -> None:
    model, batch = random_model(small_config(**options), torch.float64), held_slab()
    batch.pos, batch.cell = batch.pos.double(), batch.cell.double()
    with torch.no_grad():
        lean = model(batch)
        whole = with_whole_heads(model)(batch)
    for name, value in lean.items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-12)


def test_whole_heads_compute_everything() -> None:
    model, batch = random_model(), held_slab()
    shapes = []
    assert model.force_block is not None
    for last in (model.energy_block.so3_linear_2, model.force_block.proj):
        last.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    with torch.no_grad():
        model(batch)
        assert not shapes
        with_whole_heads(model)(batch)
    assert shapes == [(17, 9, 1), (17, 9, 1)]


@pytest.mark.slow
def test_savings(chunk_bytes: Callable[[int], None]) -> None:
    chunk_bytes(10_000)
    model, batch = random_model(small_config(max_radius=3.0)), held_slab()
    found = measure_savings(model, batch, NORMALIZERS, repeats=1)
    energy, force, fixed, alone, together = found
    graph = model.build_graph(batch)
    executed = count_macs(model, 17, len(graph.distances)).total
    for saving in (energy, force, fixed):
        assert saving.energy_deviation is not None
        assert saving.energy_deviation <= 1e-6
    for saving in found:
        assert saving.force_deviation is not None
        assert saving.force_deviation <= 1e-5
        assert 0 < saving.macs < saving.macs_without_cut
        assert saving.latency.seconds > 0
    assert energy.macs == force.macs == fixed.macs_without_cut == executed
    assert alone.macs == together.macs < alone.macs_without_cut == fixed.macs
    assert alone.energy_deviation is None
    onto_free = (~batch.fixed[graph.edge_index[1]]).double().mean()
    assert fixed.edges == {"force head": pytest.approx(float(onto_free))}
    assert alone.edges is not None
    assert list(alone.edges) == ["block 0", "block 1", "force head"]
    assert alone.edges["force head"] < alone.edges["block 1"] <= alone.edges["block 0"] <= 1


def test_all_atoms_fixed_or_no_force_head() -> None:
    batch = held_slab()
    batch.fixed[:] = True
    assert [saving.force_deviation for saving in measure_savings(random_model(), batch, NORMALIZERS, 1)][
        2:
    ] == [*(0.0, 0.0, 0.0)]
    model = random_model(small_config(forces="none"))
    (only,) = measure_savings(model, batch, NORMALIZERS, repeats=1)
    assert only.force_deviation is None
