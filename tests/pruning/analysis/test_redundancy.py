"""Cosines and entropies by block and tag."""

import math

import pytest
import torch
from model_helpers import batch_of, far_apart, lone_atom, random_model, slab, water
from torch_geometric.data import Data

from equiformer2.errors import InputError
from equiformer2.pruning.analysis.observe import observe
from equiformer2.pruning.analysis.redundancy import attention_entropy, block_statistics


def tagged(structure: Data, tags: list[int]) -> Data:
    structure.tags = torch.tensor(tags)
    return structure


def test_entropy_is_zero_for_one_edge_and_one_for_all() -> None:
    target = torch.tensor([0, 0, 0, 0, 2, 2, 3])
    alpha = torch.tensor([[0.25, 1.0], [0.25, 0.0], [0.25, 0.0], [0.25, 0.0], [0.5, 0.9], [0.5, 0.1], [1, 1]])
    entropy = attention_entropy(alpha, target, 4)
    torch.testing.assert_close(entropy[0], torch.tensor([1.0, 0.0]))
    binary = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    torch.testing.assert_close(entropy[2], torch.tensor([1.0, binary]))
    assert bool(entropy[[1, 3]].isnan().all())  # no edges, one edge


def test_a_block_that_does_nothing_has_cosine_one() -> None:
    model = random_model()
    with torch.no_grad():
        for layer in (model.blocks[1].ga.proj, model.blocks[1].ffn.so3_linear_2):
            layer.weight.zero_()
            layer.bias.zero_()
    structure = tagged(slab(), [0] * 8 + [1] * 4 + [2] * 2)
    rows = {(row.block, row.tag): row for row in block_statistics(model, [batch_of(structure)])}
    assert set(rows) == {(block, tag) for block in (0, 1) for tag in ("0", "1", "2", "all")}
    assert [rows[0, tag].atoms for tag in ("0", "1", "2", "all")] == [8, 4, 2, 14]
    for tag in ("0", "1", "2", "all"):
        row = rows[1, tag]
        assert row.cosine == pytest.approx(1)
        assert row.cosine_attention == pytest.approx(1)
        assert row.cosine_by_degree == pytest.approx([1, 1, 1])
        assert rows[0, tag].cosine < 0.999


def test_against_a_direct_calculation_over_batches() -> None:
    model = random_model()
    structures = [tagged(slab(), [0] * 8 + [1] * 4 + [2] * 2), tagged(water(), [2, 2, 1])]
    apart = block_statistics(model, [batch_of(structure) for structure in structures])
    together = block_statistics(model, [batch_of(*structures)])
    for one, other in zip(apart, together, strict=True):
        assert (one.block, one.tag, one.atoms) == (other.block, other.tag, other.atoms)
        assert one.cosine == pytest.approx(other.cosine, abs=1e-5)
        assert one.entropy == pytest.approx(other.entropy, abs=1e-5)
    seen = observe(model, batch_of(*structures))
    tag = torch.cat([structure.tags for structure in structures])
    adsorbate = torch.nn.functional.cosine_similarity(
        seen.features[0].flatten(1), seen.features[1].flatten(1)
    )[tag == 2].mean()
    row = next(row for row in together if (row.block, row.tag) == (0, "2"))
    assert row.cosine == pytest.approx(float(adsorbate), abs=1e-5)
    first_degree = torch.nn.functional.cosine_similarity(
        seen.features[0][:, 1:4].flatten(1), seen.features[1][:, 1:4].flatten(1)
    )[tag == 2].mean()
    assert row.cosine_by_degree[1] == pytest.approx(float(first_degree), abs=1e-5)


def test_it_does_not_depend_on_orientation() -> None:
    model = random_model(dtype=torch.float64)
    structure = tagged(slab(torch.float64), [0] * 8 + [1] * 4 + [2] * 2)
    turned = structure.clone()
    turn = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )[0]
    turn = turn * torch.linalg.det(turn)
    turned.pos, turned.cell = structure.pos @ turn.T, structure.cell @ turn.T
    before, after = (block_statistics(model, [batch_of(one)]) for one in (structure, turned))
    for one, other in zip(before, after, strict=True):
        # The grids of the network make rotations hold only approximately.
        assert one.cosine == pytest.approx(other.cosine, abs=0.02)
        assert one.entropy == pytest.approx(other.entropy, abs=0.02)


def test_atoms_without_edges() -> None:
    structures = [tagged(lone_atom(), [2]), tagged(far_apart(), [2, 1])]
    rows = block_statistics(random_model(), [batch_of(*structures)])
    for row in rows:
        assert row.entropy == [None, None]
        assert row.cosine_by_degree[1] is None  # no neighbours, no direction
        assert -1 <= row.cosine <= 1


def test_no_structures() -> None:
    with pytest.raises(InputError, match="no structures"):
        block_statistics(random_model(), [])
