"""Counted operations against torch's own counter, parameters against the network, targets."""

import dataclasses
from typing import Any

import pytest
import torch
from model_helpers import batch_of, cluster, random_model, slab
from plans import GRID_PLANS, KEEP, MANY, PLANS, config_of
from torch.utils.flop_counter import FlopCounterMode

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.errors import InputError
from equiformer2.model.so3 import EdgeFrames
from equiformer2.pruning import MacTarget, ParameterTarget, PruningPlan, count_macs
from equiformer2.pruning.structured.apply import shrink

BATCH = batch_of(cluster(torch.float64), slab(torch.float64))
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "gate activation": {"use_gate_act": True, "use_grid_mlp": False},
    "gate activation, grid MLP": {"use_gate_act": True},
    "plain S2 activation": {"use_sep_s2_act": False, "use_grid_mlp": False},
    "S2 activation without grid MLP": {"use_grid_mlp": False, "use_attn_renorm": False},
    "grid MLP without scalar MLP": {"use_sep_s2_act": False},
    "shared radial weights": {"use_m_share_rad": True, "share_atom_edge_embedding": True},
    "smallest grid": {"grid_resolution": None, "use_atom_edge_embedding": False},
    "energy alone": {"forces": "none", "mmax": 0},
}


def plan_for(config: ModelConfig) -> PruningPlan:
    """Cuts in many places that any variant has."""
    plan = dataclasses.replace(MANY, force_head=KEEP.force_head) if not config.regress_forces else MANY
    if config.mmax == 0:
        blocks = tuple(dataclasses.replace(block, mmax=None) for block in plan.blocks)
        return dataclasses.replace(plan, blocks=blocks)
    return plan


def counted_by_torch(model: EquiformerV2) -> tuple[int, int]:
    """Products of one forward pass in plain expressions; edges."""
    model.backend = "torch"
    graph = model.build_graph(BATCH)
    frames = EdgeFrames.from_vectors(graph.vectors, graph.distances, model.config.lmax, model.config.mmax)
    # Frames that need gradients are what asks for plain expressions.
    frames.entries.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(BATCH, graph=graph, frames=frames)
    return counter.get_total_flops() // 2, graph.edge_index.shape[1]


def zeros_in_rectangles(config: ModelConfig) -> int:
    """Per edge: products with the zeros of rotation matrices, which plain expressions do too."""

    def zeros(lmax: int, mmax: int) -> int:
        rows = [2 * min(l, mmax) + 1 for l in range(lmax + 1)]
        return sum(rows) * (lmax + 1) ** 2 - sum(n * (2 * l + 1) for l, n in enumerate(rows))

    channels = config.sphere_channels
    total = zeros(config.lmax, 0) * channels
    blocks = [config.block(index) for index in range(config.num_layers)]
    for block in (block for block in blocks if block.attention):
        values = block.num_heads * block.attn_value_channels
        total += zeros(block.lmax, block.mmax) * (2 * channels + values)
    if config.regress_forces:
        head = config.force_block
        values = head.num_heads * head.attn_value_channels
        total += zeros(head.lmax, head.mmax) * 2 * channels + zeros(1, min(1, head.mmax)) * values
    return total


@pytest.mark.one_in(3)
@pytest.mark.parametrize("variant", VARIANTS)
def test_operations_are_those_that_torch_executes(variant: str) -> None:
    # This norm has no matrix products of its own.
    config = config_of(norm_type="layer_norm", **VARIANTS[variant])
    model = random_model(config, torch.float64)
    for network in (model, shrink(model, plan_for(config))):
        executed, edges = counted_by_torch(network)
        counted = count_macs(network, len(BATCH.pos), edges).total
        assert counted == executed - edges * zeros_in_rectangles(network.config)
    assert count_macs(config, len(BATCH.pos), edges, plan_for(config)).total == counted


@pytest.mark.one_in(3)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_network(variant: str) -> None:
    config = config_of(**VARIANTS[variant])
    check_parameters(config, [PruningPlan.keep_all(config), plan_for(config)])


@pytest.mark.slow
def test_parameters_of_every_kind_of_plan() -> None:
    check_parameters(config_of(), [*PLANS.values(), *GRID_PLANS.values()])


def check_parameters(config: ModelConfig, plans: list[PruningPlan]) -> None:
    for plan in plans:
        pruned = plan.applied_to(config)
        expected = sum(parameter.numel() for parameter in EquiformerV2(pruned, "meta").parameters())
        assert count_macs(config, 1, 0, plan).parameters == expected


def test_swiglu_networks_are_counted() -> None:
    """They cannot be pruned, but their operations and parameters are known."""
    config = config_of(norm_type="layer_norm", use_swiglu_s2_act=True, smooth_cutoff=True)
    model = random_model(config, torch.float64)
    executed, edges = counted_by_torch(model)
    count = count_macs(config, len(BATCH.pos), edges)
    assert count.total == executed - edges * zeros_in_rectangles(config)
    assert count.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_complex_products() -> None:
    """The paper's formula has four real products for every order m > 0, and is the same elsewhere."""
    config = config_of()
    executed, paper = (count_macs(config, 10, 100, complex_products=n) for n in (3, 4))
    for part in executed.parts:
        assert (executed.parts[part] < paper.parts[part]) == (
            part in ("convolution_1", "convolution_2", "force_head")
        )
    inputs, hidden = 2 * config.sphere_channels, config.attn_hidden_channels
    # Orders 1 and 2 of degree 3 have 3 and 2 degrees.
    difference = paper.blocks[0]["convolution_1"] - executed.blocks[0]["convolution_1"]
    assert difference == 100 * (3 * 3 + 2 * 2) * inputs * hidden
    with pytest.raises(InputError, match="must be 3"):
        count_macs(config, 10, 100, complex_products=2)


def test_a_dropped_branch_costs_nothing() -> None:
    config = config_of()
    count = count_macs(config, 10, 100, PLANS["empty block"])
    dense = count_macs(config, 10, 100)
    assert count.blocks[1] == {}
    assert dense.total - count.total == sum(dense.blocks[1].values())


def test_counted_targets() -> None:
    config = config_of()
    plan = PLANS["no attention"]
    macs = MacTarget(config, 0.7, atoms=10, edges=200)
    assert macs.fraction_of(KEEP) == 1
    assert not macs.reached(KEEP)
    assert (
        macs.fraction_of(plan) == count_macs(config, 10, 200, plan).total / count_macs(config, 10, 200).total
    )
    assert macs.reached(plan) == (macs.fraction_of(plan) <= 0.7)
    parameters = ParameterTarget(config, 0.95)
    assert parameters.fraction_of(plan) < 0.95
    assert parameters.reached(plan)
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="must be a fraction"):
            ParameterTarget(config, wrong)
    with pytest.raises(InputError, match="cannot have 0 atoms"):
        MacTarget(config, 0.5, atoms=0, edges=0)
