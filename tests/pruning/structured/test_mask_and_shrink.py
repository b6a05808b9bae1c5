"""A masked network and a smaller one give the same, for every cut."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_helpers import batch_of, cluster, lone_atom, loss_of, random_model, slab
from plans import GRID_PLANS, KEEP, MANY, PLANS, config_of
from torch import Tensor

from equiformer2 import EquiformerV2
from equiformer2.errors import InputError
from equiformer2.pruning import BlockPlan, PruningPlan, masked
from equiformer2.pruning.structured.apply import shrink
from equiformer2.pruning.structured.index_maps import kept_state
from equiformer2.symmetry import SYMMETRIES, assert_symmetries

VARIANTS: dict[str, dict[str, Any]] = {
    "gate activation": {"use_gate_act": True, "use_grid_mlp": False},
    "plain S2 activation": {"use_sep_s2_act": False, "use_grid_mlp": False},
    "S2 activation without grid MLP": {"use_grid_mlp": False, "norm_type": "layer_norm"},
    "grid MLP without scalar MLP": {"use_sep_s2_act": False, "share_atom_edge_embedding": True},
    "shared radial weights": {"use_m_share_rad": True, "norm_type": "rms_norm_sh"},
    "smallest grid": {"grid_resolution": None, "use_atom_edge_embedding": False},
}


def relative(out: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert out.keys() == expected.keys()
    return max(float((out[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in expected)


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, EquiformerV2]:
    return {dtype: random_model(config_of(), dtype) for dtype in (torch.float32, torch.float64)}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [*PLANS, *GRID_PLANS, "many"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@torch.no_grad()
def test_masked_is_shrunk(
    name: str, dtype: torch.dtype, tolerance: float, models: dict[torch.dtype, EquiformerV2]
) -> None:
    plan = (PLANS | GRID_PLANS | {"many": MANY})[name]
    model, batch = models[dtype], batch_of(cluster(dtype), lone_atom(dtype))
    before = model(batch)
    with masked(model, plan):
        expected = model(batch)
    small = shrink(model, plan)
    assert relative(small(batch), expected) < tolerance
    assert relative(expected, before) > 1e-3
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    after = model(batch)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants_of_the_network(variant: str) -> None:
    config = config_of(**VARIANTS[variant])
    model, batch = random_model(config, torch.float64), batch_of(cluster(torch.float64))
    alone = dataclasses.replace(MANY, sphere_channels=None)
    for plan in (PLANS["mmax 0"], PLANS["lmax 2"], alone, MANY):
        with masked(model, plan):
            expected = model(batch)
        assert relative(shrink(model, plan)(batch), expected) < 1e-10


@torch.no_grad()
def test_parts_for_denoising_are_left_out() -> None:
    model, batch = random_model(config_of(dens=True), torch.float64), batch_of(cluster(torch.float64))
    with masked(model, MANY):
        expected = model(batch)
    small = shrink(model, MANY)
    assert relative(small(batch), expected) < 1e-10
    assert not small.config.dens
    assert small.dens is None
    assert model.config.dens
    assert model.dens is not None


@pytest.mark.parametrize("name", ["many", "lmax 1", "inside the grid MLP", "mmax 1"])
def test_gradients_through_the_mask(name: str) -> None:
    """Gradients of the kept weights are those of the smaller network; those of removed weights are zero."""
    plan = (PLANS | GRID_PLANS | {"many": MANY})[name]
    model = random_model(config_of(), torch.float64)
    batch = batch_of(cluster(torch.float64))
    parameters = dict(model.named_parameters())
    state = kept_state(parameters, model.config, plan)
    trained = {key: parameter for key, parameter in parameters.items() if parameter.requires_grad}
    out = torch.func.functional_call(shrink(model, plan), state, (batch,))
    expected = torch.autograd.grad(loss_of(out), list(trained.values()), allow_unused=True)
    with masked(model, plan):
        loss_of(model(batch)).backward()
    scale = max(float(grad.abs().max()) for grad in expected if grad is not None)
    for (key, parameter), grad in zip(trained.items(), expected, strict=True):
        assert parameter.grad is not None, key
        grad = torch.zeros_like(parameter) if grad is None else grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-9 * scale, msg=key)


def test_what_is_trained_inside_stays() -> None:
    plan = KEEP.with_block(0, heads=(0, 2), feed_forward=False)
    model, batch = random_model(config_of(), torch.float64), batch_of(cluster(torch.float64))
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with masked(model, plan):
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(batch)).backward()
            optimizer.step()
        assert not model.blocks[0].ga.alpha_dot[1].any()
        with torch.no_grad():
            inside = model(batch)
    alpha, old = model.blocks[0].ga.alpha_dot, before.blocks[0].ga.alpha_dot
    assert torch.equal(alpha[1], old[1])
    assert not torch.isclose(alpha[0], old[0]).any()
    with torch.no_grad():
        assert relative(shrink(model, plan)(batch), inside) < 1e-10


@torch.no_grad()
def test_a_failure_inside_undoes_the_mask() -> None:
    model, batch = random_model(config_of()), batch_of(cluster())
    before = model(batch)
    with pytest.raises(RuntimeError), masked(model, MANY):
        raise RuntimeError
    assert all(torch.equal(value, before[key]) for key, value in model(batch).items())


@torch.no_grad()
def test_folded_weights_do_not_hide_the_mask() -> None:
    model, batch = random_model(config_of()), batch_of(cluster())
    expected = shrink(model, PLANS["heads"])(batch)
    model.fold_weights()
    before = model(batch)
    with masked(model, PLANS["heads"]):
        assert relative(model(batch), expected) < 1e-5
    assert relative(model(batch), before) < 1e-5


def test_sphere_channels_are_masked_once() -> None:
    model = random_model(config_of())
    with masked(model, MANY), pytest.raises(InputError, match="use shrink"), masked(model, PLANS["sphere"]):
        pass
    with masked(model, MANY), masked(model, PLANS["heads"]):
        pass


@pytest.mark.parametrize("first", ["heads", "mmax 1", "sphere"])
def test_a_further_cut_is_masked_within_the_first(first: str) -> None:
    model, outer = random_model(config_of()), PLANS[first]
    before = copy.deepcopy(model.state_dict())
    for other in ("no attention", "attention hidden channels", "lmax 1", "output heads"):
        cut = PLANS[other]
        blocks = tuple(
            b if not b.attention else dataclasses.replace(a, **b.to_dict())
            for a, b in zip(outer.blocks, cut.blocks, strict=True)
        )
        plan = dataclasses.replace(
            outer, blocks=blocks, force_head=cut.force_head, energy_head=cut.energy_head
        )
        with masked(model, plan):
            expected = {name: value.clone() for name, value in model.state_dict().items()}
        with masked(model, outer):
            around = {name: value.clone() for name, value in model.state_dict().items()}
            with masked(model, plan, within=outer):
                assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
            assert all(torch.equal(value, around[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="other sphere channels"), masked(model, PLANS["sphere"], KEEP):
        pass


def test_a_missing_branch_is_no_part_of_the_network() -> None:
    small = shrink(random_model(config_of()), PLANS["empty block"])
    assert not list(small.blocks[1].parameters())
    assert small.blocks[1].ga is None
    assert small.blocks[1].ffn is None


def test_plans_after_one_another() -> None:
    model, batch = random_model(config_of(), torch.float64), batch_of(cluster(torch.float64))
    first = dataclasses.replace(MANY, blocks=KEEP.with_block(0, heads=(0, 2), mmax=1).blocks)
    second = PruningPlan(
        (
            BlockPlan(heads=(1,), value_channels=((0, 2),), lmax=2, ffn_hidden_channels=(1, 2)),
            BlockPlan(mmax=1, attn_hidden_channels=(3,)),
        ),
        sphere_channels=(1, 2),
        force_head=BlockPlan(heads=(1,), attn_hidden_channels=(0, 2), lmax=1),
        energy_head=BlockPlan(ffn_hidden_channels=(2,)),
    )
    both = first.compose(second)
    with torch.no_grad():
        in_two_steps = shrink(shrink(model, first), second)
        at_once = shrink(model, both)
        assert in_two_steps.config == at_once.config
        assert relative(at_once(batch), in_two_steps(batch)) < 1e-10
    assert both.blocks[0].heads == (2,)
    assert both.sphere_channels == (2, 3)
    assert both.force_head.attn_hidden_channels == (1, 4)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in (*PLANS, *GRID_PLANS)), "many"]
)
def test_a_pruned_network_keeps_the_symmetries(name: str) -> None:
    config = config_of(enforce_max_neighbors_strictly=False, grid_resolution=30)
    plan = {**PLANS, **GRID_PLANS, "many": MANY}[name]
    small = shrink(random_model(config, torch.float64), plan)
    # A rotation changes the network itself by what its grids alias.
    tolerance = dict.fromkeys(SYMMETRIES, 1e-9) | {"rotation": 1e-4, "supercell": 1e-8}
    with torch.no_grad():
        assert_symmetries(small, [cluster(torch.float64), slab(torch.float64)], tolerance, trials=1)


@torch.no_grad()
def test_a_pruned_network_in_parts(chunk_bytes: Callable[[int], None]) -> None:
    small = shrink(random_model(config_of(), torch.float64), MANY)
    batch = batch_of(slab(torch.float64), lone_atom(torch.float64))
    whole = small(batch)
    chunk_bytes(100_000)
    assert relative(small(batch), whole) < 1e-10


def test_mode_backend_and_frozen_weights_go_along() -> None:
    model = random_model(config_of(), torch.float64).train()
    model.backend, model.activation_checkpointing = "torch", True
    model.sphere_embedding.requires_grad_(False)
    small = shrink(model, MANY)
    assert small.training
    assert (small.backend, small.activation_checkpointing) == ("torch", True)
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert "sphere_embedding.weight" in frozen
    assert frozen <= {name for name, p in model.named_parameters() if not p.requires_grad}
    assert small.sphere_embedding.weight.dtype == torch.float64
