"""Blocks that update some of the atoms only: what they compute and what they leave alone."""

import dataclasses

import pytest
import torch
from model_helpers import batch_of, cluster, lone_atom, loss_of, random_model, slab, small_config, water
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torch_geometric.data import Batch

from equiformer2 import EquiformerV2
from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.kernels import chunks
from equiformer2.kernels.backend import TORCH
from equiformer2.model.edge_context import EdgeGraph
from equiformer2.model.routing import BlockState, Decision


def structures(dtype: torch.dtype = torch.float64) -> Batch:
    """Mixed systems, one of which has no edges."""
    return batch_of(water(dtype), slab(dtype), lone_atom(dtype), cluster(dtype))


def model_of(**changes: object) -> EquiformerV2:
    return random_model(small_config(**({"num_layers": 3} | changes)), torch.float64)


def some(batch: Batch, every: int = 2) -> Tensor:
    return torch.arange(len(batch.pos)) % every == 0


class Given:
    """A router of given decisions that keeps what the blocks saw."""

    def __init__(self, *decisions: Decision, observes: bool = False) -> None:
        self.decisions, self.observes_attention = decisions, observes
        self.states: list[BlockState] = []

    def start(self, *_: object) -> "Given":
        return self

    def decide(self, state: BlockState) -> Decision:
        self.states.append(state)
        return self.decisions[state.block]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"use_gate_act": True}, {"use_m_share_rad": True}], ids=str)
def test_a_skipped_atom_is_the_dense_network_with_a_zero_gate(changes: dict[str, object]) -> None:
    """Every atom computed, its branches multiplied by 0 or 1: the same features as really skipping."""
    model, batch = model_of(**changes), structures()
    masks = [some(batch), None, ~some(batch, 3)]
    dense = Given(*(Decision(None if m is None else m.double(), everywhere=True) for m in masks))
    expected = model(batch, active=dense)
    close(model(batch, active=masks), expected)
    with torch.no_grad():
        close(model(batch, active=masks), expected)
    assert (expected["energy"] - model(batch)["energy"]).abs().max() > 1e-6


def test_all_atoms_active_changes_no_bit() -> None:
    model, batch = model_of(), structures(torch.float64)
    whole = torch.ones(len(batch.pos), dtype=torch.bool)
    for active in ([None] * 3, [whole] * 3, [whole.double()] * 3):
        out = model(batch, active=active)
        for name, value in model(batch).items():
            assert torch.equal(out[name], value)


def test_a_skipped_atom_keeps_its_features_and_stays_a_source() -> None:
    model, batch = model_of(), batch_of(cluster(torch.float64))
    mask = torch.ones(7, dtype=torch.bool)
    mask[3] = False
    router = Given(Decision(mask), Decision(mask), Decision())
    out = model(batch, active=router)
    first, second, third = (state.x for state in router.states)
    assert torch.equal(first[3], second[3])
    assert torch.equal(second[3], third[3])
    assert (second[:3] - third[:3]).abs().max() > 1e-3
    # The others see it: with another element there, their features differ.
    batch.atomic_numbers[3] = 30
    assert (model(batch, active=router)["energy"] - out["energy"]).abs() > 1e-6


def test_the_skipped_edges_are_not_computed() -> None:
    """The operation counter sees the kept edges and atoms and no others."""
    model, batch = model_of(num_layers=1), batch_of(cluster(torch.float64), slab(torch.float64))
    batch.pos.requires_grad_()  # plain expressions, every product of which is counted
    graph = model.build_graph(batch)

    def flops(active: Tensor | None) -> int:
        with FlopCounterMode(display=False) as counter:
            model(batch, graph=graph, active=[active])
        return counter.get_total_flops()

    def row(mask: Tensor) -> list[int]:
        return [int(mask[graph.edge_index[1]].sum()), int(mask.sum()), 1]

    # Linear in edges and atoms; the tables of the elements are multiplied once. Three masks give the costs,
    # the whole batch and the empty mask check them.
    masks = [some(batch, n) for n in (2, 3, 4)]
    rows = torch.tensor([row(mask) for mask in masks], dtype=torch.float64)
    costs = torch.linalg.solve(rows, torch.tensor([flops(mask) for mask in masks], dtype=torch.float64))
    whole = torch.tensor(row(some(batch, 1)), dtype=torch.float64)
    assert flops(None) == pytest.approx((whole * costs).sum().item(), rel=1e-9)
    assert (costs > 0).all()
    assert flops(torch.zeros(len(batch.pos), dtype=torch.bool)) < costs[2]


def test_gates_scale_the_branches_smoothly() -> None:
    model, batch = model_of(num_layers=1), batch_of(cluster(torch.float64))
    gate = torch.ones(7, dtype=torch.float64)
    energies = []
    for value in (0.0, 1e-7, 0.5, 1.0):
        gate[2] = value
        energies.append(model(batch, active=[gate.clone()])["energy"].item())
    assert energies[1] == pytest.approx(energies[0], abs=1e-5)
    assert abs(energies[2] - energies[0]) > 1e-6
    assert energies[3] == model(batch)["energy"].item()


def test_gradients_by_parameters_positions_and_gates() -> None:
    model, batch = model_of(), structures()
    batch.pos.requires_grad_()
    gate = (0.5 * some(batch)).double().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = [batch.pos, gate, *parameters]

    def gradients(everywhere: bool) -> tuple[Tensor | None, ...]:
        router = Given(Decision(), Decision(gate, everywhere=everywhere), Decision())
        return torch.autograd.grad(loss_of(model(batch, active=router)), wanted, allow_unused=True)

    skipped, dense = gradients(False), gradients(True)
    active = gate.detach() > 0
    torch.testing.assert_close(skipped[1][active], dense[1][active], rtol=1e-9, atol=1e-11)
    assert (dense[1][~active] != 0).any()
    for found, expected in zip(skipped[:1] + skipped[2:], dense[:1] + dense[2:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_without_position_gradients_too() -> None:
    """The streamed kernels have their own backward pass."""
    model, batch = model_of(), structures()
    masks = [some(batch), some(batch, 3), None]
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss_of(model(batch, active=masks)), parameters)
    model.activation_checkpointing = True
    again = torch.autograd.grad(loss_of(model(batch, active=masks)), parameters)
    batch.pos.requires_grad_()
    model.activation_checkpointing = False
    plain = torch.autograd.grad(loss_of(model(batch, active=masks)), parameters)
    for a, b, c in zip(found, again, plain, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-10)
        assert torch.equal(a, b)


@pytest.mark.parametrize("edges_per_part", [1, 40])
def test_parts_of_the_edges_give_the_same_answers(edges_per_part: int) -> None:
    model, batch = model_of(), structures()
    gates = torch.rand(len(model.build_graph(batch).distances), dtype=torch.float64)
    decisions = Decision(), Decision(some(batch), gates), Decision(~some(batch))
    whole = Given(*decisions, observes=True)
    expected = model(batch, active=whole)
    model.bytes_per_edge = chunks.CPU_CHUNK_BYTES // edges_per_part
    parts = Given(*decisions, observes=True)
    with torch.no_grad():
        close(model(batch, active=parts), expected)
    for a, b in zip(whole.states, parts.states, strict=True):
        torch.testing.assert_close(a.attention, b.attention)


def test_dropped_edges_are_those_of_a_smaller_graph() -> None:
    model, batch = model_of(num_layers=1), structures()
    graph = model.build_graph(batch)
    kept = torch.rand(len(graph.distances), generator=torch.Generator().manual_seed(0)) < 0.6
    model.force_block = None  # it reads all edges
    found = model(batch, graph=graph, active=Given(Decision(edges=kept)))
    close(model(batch, graph=graph, active=Given(Decision(edges=kept.double()))), found)
    smaller = dataclasses.replace(
        graph,
        edge_index=graph.edge_index[:, kept],
        cell_offsets=graph.cell_offsets[kept],
        vectors=graph.vectors[kept],
        distances=graph.distances[kept],
    )
    # The edge-degree embedding reads all edges, too.
    start = model.edge_degree_embedding(edges_of(model, batch, graph), TORCH)
    model.edge_degree_embedding.register_forward_hook(lambda *_: start)
    close(model(batch, graph=smaller), found)


def edges_of(model: EquiformerV2, batch: Batch, graph: RadiusGraph) -> EdgeGraph:
    seen = []
    handle = model.edge_degree_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch, graph=graph)
    handle.remove()
    return seen[0]


def test_attention_is_lagged_and_keeps_what_was_last_computed() -> None:
    model, batch = model_of(), batch_of(cluster(torch.float64))
    target = model.build_graph(batch).edge_index[1]
    mask = torch.arange(7) < 4
    router = Given(Decision(), Decision(mask), Decision(), observes=True)
    model(batch, active=router)
    first, second, third = (state.attention for state in router.states)
    assert not first.any()
    sums = second.new_zeros(7, 2).index_add(0, target, second)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    skipped = ~mask[target]
    assert torch.equal(third[skipped], second[skipped])
    assert (third[~skipped] - second[~skipped]).abs().max() > 1e-6


def test_refusals() -> None:
    model, batch = model_of(), structures()
    with pytest.raises(InputError, match="2 entries but the network 3 blocks"):
        model(batch, active=[None, None])
    with pytest.raises(InputError, match=r"active\[1\] has the shape"):
        model(batch, active=[None, some(batch)[:-1], None])
    for backend in ("compile", "triton"):
        model.backend = backend
        with pytest.raises(InputError, match="updates all atoms in every block"):
            model(batch, active=[None] * 3)
