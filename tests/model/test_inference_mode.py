"""The network without gradients: in parts, with folded weights, in lower precision."""

import copy
import pickle

import pytest
import torch
from model_helpers import batch_of, cluster, lone_atom, random_model, slab, small_config
from torch_geometric.data import Batch

from equiformer2.kernels import chunks


def slab_batch(dtype: torch.dtype) -> Batch:
    """With atoms that have no edges in the middle and at the end."""
    return batch_of(slab(dtype), lone_atom(dtype), cluster(dtype), lone_atom(dtype))


VARIANTS = [
    {},
    {"use_gate_act": True},
    {"share_atom_edge_embedding": True},
    {"use_m_share_rad": True},
    {"use_swiglu_s2_act": True, "smooth_cutoff": True},
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("edges_per_part", [1, 40])
def test_parts_of_the_edges_give_the_same_answers(changes: dict[str, object], edges_per_part: int) -> None:
    model, batch = random_model(small_config(**changes), torch.float64), slab_batch(torch.float64)
    whole = model(batch)
    sizes: list[int] = []
    model.blocks[0].ga.proj.register_forward_pre_hook(lambda m, inputs: sizes.append(len(inputs[0])))
    model.bytes_per_edge = chunks.CPU_CHUNK_BYTES // edges_per_part
    with torch.no_grad():
        parts = model(batch)
    assert len(sizes) > 1
    assert sum(sizes) == len(batch.pos)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"use_sep_s2_act": False}, {"use_grid_mlp": False}])
def test_folded_weights_change_rounding_at_most(options: dict[str, bool]) -> None:
    model = random_model(small_config(**options)).double()
    batch = slab_batch(torch.float64)
    with torch.no_grad():
        before = model(batch)
        model.fold_weights()
        after = model(batch)
        assert not model.blocks[0].ffn.use_grid_mlp or model.blocks[0].ffn.folded() is not None
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-12, atol=1e-12)


def test_folded_weights_follow_the_weights() -> None:
    batch = slab_batch(torch.float32)
    other = random_model(seed=1)
    with torch.no_grad():
        expected = other(batch)["forces"]
        loaded, folded = random_model(), copy.deepcopy(other)
        for model in (loaded, folded):
            model.fold_weights()
            model(batch)
        loaded.load_state_dict(other.state_dict())
        assert torch.equal(loaded(batch)["forces"], folded(batch)["forces"])

        trained = random_model()
        trained.fold_weights()
        trained(batch)
        trained.train()
        for mine, theirs in zip(trained.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
        assert torch.equal(trained.eval()(batch)["forces"], expected)

        double = copy.deepcopy(loaded)
        double.fold_weights()
        double(batch)
        assert double.double()(slab_batch(torch.float64))["forces"].dtype == torch.float64


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_folded_weights_are_packed_for_onednn_where_operators_run_one_by_one() -> None:
    model, batch = random_model(), slab_batch(torch.float32)
    convolution = model.force_block.so2_conv_2
    with torch.no_grad():
        expected = model(batch)
        model.fold_weights()
        assert all(term.is_mkldnn for term in convolution.weights().folded)
        assert model.force_block.so2_conv_1.rad_func.weights().output.is_mkldnn
        # Neither copies nor another precision can read them.
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            answer = other(batch)
            assert all(torch.equal(answer[name], expected[name]) for name in expected)
        with torch.autocast("cpu", torch.bfloat16):
            folded, plain = model(batch), copy.deepcopy(model)(batch)
        assert all(torch.equal(folded[name], plain[name]) for name in expected)
        model.backend = "compile"
        model.fold_weights()
        assert not any(term.is_mkldnn for term in convolution.weights().folded)
        assert not model.force_block.so2_conv_1.rad_func.weights().output.is_mkldnn


def test_folding_in_bfloat16() -> None:
    model, batch = random_model(), slab_batch(torch.float32)
    with torch.no_grad():
        expected = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            before = model(batch)
            model.fold_weights(torch.bfloat16)
            after = model(batch)
    for name in before:
        deviations = [(answer[name] - expected[name]).norm() for answer in (before, after)]
        assert 0 < deviations[1] < 2 * deviations[0]
