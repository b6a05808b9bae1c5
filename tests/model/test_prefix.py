"""Passes that begin at a later block have the bits of whole passes."""

import pytest
import torch
from model_helpers import batch_of, cluster, lone_atom, random_model, slab, small_config, water
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2 import EquiformerV2
from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.model.routing import BlockState, Decision, Prefix
from equiformer2.pruning.structured.apply import masked
from equiformer2.pruning.structured.block_plan import BlockPlan
from equiformer2.pruning.structured.plan import PruningPlan

LAYERS = 3


@pytest.fixture(scope="module")
def model() -> EquiformerV2:
    return random_model(small_config(num_layers=LAYERS))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Mixed systems, one of which has no edges."""
    single = torch.float32
    return batch_of(water(single), slab(single), lone_atom(single), cluster(single))


def prefixes(model: EquiformerV2, batch: Batch, **arguments: object) -> list[Prefix]:
    kept: list[Prefix] = []
    model(batch, keep=kept.append, **arguments)
    return kept


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@torch.no_grad()
def test_a_pass_goes_on_with_the_bits_of_a_whole_one(model, batch, backend: str, monkeypatch) -> None:
    monkeypatch.setattr(model, "backend", backend)
    whole, kept = model(batch), prefixes(model, batch)
    assert [prefix.block for prefix in kept] == list(range(LAYERS + 1))
    for prefix in kept:
        same_bits(model(batch, start=prefix), whole)
        later = prefixes(model, batch, start=prefix)
        assert [known.block for known in later] == list(range(prefix.block, LAYERS + 1))
        assert all(torch.equal(a.x, b.x) for a, b in zip(later, kept[prefix.block :], strict=True))


CUTS = {
    1: {"heads": (1,), "attn_hidden_channels": (0, 2, 5)},
    2: {"attention": False, "ffn_hidden_channels": (0, 3, 9)},
}


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@torch.no_grad()
def test_a_masked_network_goes_on_at_the_first_block_that_is_cut(model, batch, backend, monkeypatch) -> None:
    """The features before it are those of the network without the cut."""
    monkeypatch.setattr(model, "backend", backend)
    kept, keep_all = prefixes(model, batch), PruningPlan.keep_all(model.config)
    for first, changes in CUTS.items():
        with masked(model, keep_all.with_block(first, **changes)):
            whole = model(batch)
            for prefix in kept[: first + 1]:
                same_bits(model(batch, start=prefix), whole)
            assert not torch.equal(model(batch, start=kept[first + 1])["energy"], whole["energy"])


@torch.no_grad()
def test_cuts_of_the_heads_run_the_heads_alone(model, batch, monkeypatch) -> None:
    kept = prefixes(model, batch)
    head = PruningPlan(
        PruningPlan.keep_all(model.config).blocks,
        force_head=BlockPlan(heads=(1,)),
        energy_head=BlockPlan(ffn_hidden_channels=(1, 4)),
    )
    with masked(model, head):
        whole = model(batch)
        for block in model.blocks:
            monkeypatch.setattr(block, "forward", None)  # a call would fail
        same_bits(model(batch, start=kept[-1]), whole)


class Scores:
    """A router that skips the atoms with the smallest scalar features, or the edges of least attention."""

    def __init__(self, observes: bool) -> None:
        self.observes_attention = observes
        self.asked: list[int] = []

    def start(self, batch: Batch, graph: RadiusGraph, num_blocks: int) -> "Scores":
        return self

    def decide(self, state: BlockState) -> Decision:
        self.asked.append(state.block)
        if self.observes_attention and state.block > 0:
            assert state.attention is not None
            return Decision(edges=state.attention.mean(1) > 0.1)
        scores = state.x[:, 0].mean(1)
        return Decision(scores > scores.median())


@pytest.mark.parametrize("observes", [False, True], ids=["atoms", "edges"])
@torch.no_grad()
def test_a_router_decides_for_the_blocks_that_are_run(model, batch, observes: bool) -> None:
    whole, kept = model(batch, active=Scores(observes)), prefixes(model, batch, active=Scores(observes))
    for prefix in kept:
        router = Scores(observes)
        same_bits(model(batch, active=router, start=prefix), whole)
        assert router.asked == list(range(prefix.block, LAYERS))
        assert len(prefix.decisions) == prefix.block
    with pytest.raises(InputError, match="reads attention weights of blocks that are not run again"):
        model(batch, active=Scores(True), start=prefixes(model, batch)[1])


def test_gradients_flow_through_the_blocks_that_are_run(model, batch) -> None:
    kept = prefixes(model, batch)
    weight = model.blocks[2].ffn.so3_linear_2.weight
    expected, found = (
        torch.autograd.grad(model(batch, start=start)["forces"].square().sum(), weight)[0]
        for start in (None, kept[2])
    )
    assert torch.equal(found, expected)


def test_what_does_not_fit_is_refused(model, batch) -> None:
    prefix = prefixes(model, batch)[1]
    with pytest.raises(InputError, match="and is continued on 3"):
        model(batch_of(water(torch.float32)), start=prefix)
    with pytest.raises(InputError, match="goes on at block 3, and the network has 2"):
        random_model()(batch, start=prefixes(model, batch)[3])
    conservative = random_model(small_config(forces="gradient"))
    with pytest.raises(InputError, match="gradient forces need the whole network"):
        conservative(batch, keep=print)
    compiled = random_model()
    compiled.backend = "compile"
    with pytest.raises(InputError, match="runs whole passes alone"):
        compiled(batch, keep=print)
