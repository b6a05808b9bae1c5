"""Features, attention weights and times that hooks take from a forward pass."""

from collections.abc import Callable

import pytest
import torch
from model_helpers import batch_of, cluster, far_apart, random_model, slab, small_config, water

from equiformer2.kernels.backend import TORCH
from equiformer2.pruning.analysis.observe import observe, time_parts


def test_the_answers_do_not_change() -> None:
    model = random_model().train()
    batch = batch_of(slab(), water(), far_apart())
    observed = observe(model, batch)
    assert model.training
    with torch.no_grad():
        plain = model.eval()(batch)
    for name, value in plain.items():
        assert torch.equal(observed.out[name], value)
    assert not model._forward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_features_follow_the_blocks(chunk_bytes: Callable[[int], None]) -> None:
    chunk_bytes(1)  # every atom is a part of its own
    model, batch = random_model(), batch_of(slab(), cluster())
    seen = observe(model, batch)
    atoms, edges = len(batch.pos), len(seen.graph.distances)
    assert [x.shape for x in seen.features] == [(atoms, 9, 8)] * 3
    assert [x.shape for x in seen.attention] == [(edges, 2)] * 2
    with torch.no_grad():
        last = model.blocks[1]
        change = last.ffn(last.norm_2(seen.between[1]), TORCH)
        torch.testing.assert_close(seen.features[2], seen.between[1] + change)
        energy = model.energy_block(model.norm(seen.features[2]), TORCH)
    structure = torch.repeat_interleave(torch.arange(2), batch.natoms)
    total = energy.new_zeros(2).index_add(0, structure, energy) / model.config.avg_num_nodes
    torch.testing.assert_close(total, seen.out["energy"])


def test_attention_weights_of_one_atom_sum_to_one() -> None:
    seen = observe(random_model(), batch_of(slab(), water()))
    target = seen.graph.edge_index[1]
    for alpha in seen.attention:
        total = alpha.new_zeros(int(target.max()) + 1, alpha.shape[1]).index_add(0, target, alpha)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_times_add_up() -> None:
    model = random_model(small_config(num_layers=1))
    seconds = time_parts(model, batch_of(water()), repeats=1)
    assert set(seconds) == {
        *("graph", "edges", "blocks.0.attention", "blocks.0.feed_forward"),
        *("energy_head", "force_head", "other", "total"),
    }
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
