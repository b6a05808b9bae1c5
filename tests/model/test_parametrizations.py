"""Low-rank maps: symmetry, masks, and taking them off again."""

import copy
import pickle

import pytest
import torch
from model_helpers import batch_of, cluster, loss_of, random_model, slab, small_config, water
from torch import nn
from torch.nn.utils import parametrize

from equiformer2.adapters import AdapterSettings, attach_adapter
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.folding import plain_state, read
from equiformer2.model.parametrizations import LowRank, attach, detach, low_rank_maps
from equiformer2.symmetry import check_symmetries

F64 = torch.float64
SMALLEST = {"num_layers": 1, "grid_resolution": 6, "num_distance_basis": 8, "max_neighbors": 6}


def adapted(**changes: object) -> EquiformerV2:
    """A network whose weights all have random maps, half of their entries pruned at random."""
    model = random_model(small_config(**(SMALLEST | changes)), F64)
    generator = torch.Generator().manual_seed(1)
    for each in attach_adapter(model, AdapterSettings(rank=3, keep=1.0), 0).values():
        masks = [torch.rand(f.shape, generator=generator) < 0.5 for f in (each.left, each.right)]
        with torch.no_grad():
            each.left.copy_(0.3 * torch.randn(each.left.shape, generator=generator))
        each.prune(*masks)
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"mmax": 2, "use_m_share_rad": True, "use_swiglu_s2_act": True}],
    ids=["grid MLP", "V3"],
)
def test_symmetries_are_those_of_the_network(changes: dict[str, object]) -> None:
    """No weight is shared less than before: the errors stay those of the nonlinearity's grid, or rounding."""
    structures = [slab(F64), cluster(F64)]
    model = adapted(**changes)
    with torch.no_grad():
        after = check_symmetries(model, structures, symmetries=("rotation", "permutation"), trials=1)
        detach(model)
        before = check_symmetries(model, structures, symmetries=("rotation", "permutation"), trials=1)
    assert after.errors["permutation"].largest < 1e-10
    assert after.errors["rotation"].largest < 2 * before.errors["rotation"].largest + 1e-12


@pytest.mark.parametrize("changes", [{}, {"mmax": 2, "use_m_share_rad": True}], ids=["plain", "m = 2"])
def test_a_linear_map_is_exactly_equivariant(changes: dict[str, object]) -> None:
    """Without the grids nothing but rounding is left: attention with gates in place of S2 activations."""
    model = adapted(use_gate_act=True, use_grid_mlp=False, use_sep_s2_act=False, **changes)
    with torch.no_grad():
        report = check_symmetries(model, [cluster(F64)], symmetries=("rotation",), trials=2)
    assert report.errors["rotation"].largest < 1e-10


def test_merged_weights_answer_alike_and_taking_off_restores() -> None:
    model = adapted()
    batch = batch_of(water(F64), cluster(F64))
    plain = random_model(small_config(**SMALLEST), F64)
    with torch.no_grad():
        unmerged = model(batch)
        merged = EquiformerV2(model.config).to(F64).eval()
        merged.load_state_dict(plain_state(model, model.state_dict()))
        for name, value in merged(batch).items():
            torch.testing.assert_close(value, unmerged[name], atol=1e-12, rtol=1e-12)
        detach(model)
        assert not low_rank_maps(model)
        assert model.state_dict().keys() == plain.state_dict().keys()
        for name, value in plain(batch).items():
            assert torch.equal(value, model(batch)[name])


def test_masked_entries_get_no_gradient() -> None:
    model = adapted()
    loss_of(model(batch_of(water(F64), cluster(F64)))).backward()
    trained = 0
    for each in low_rank_maps(model).values():
        for factor, kept in ((each.left, each.left_kept), (each.right, each.right_kept)):
            assert not factor[~kept].any()
            if factor.grad is not None:
                assert not factor.grad[~kept].any()
                trained += int(factor.grad.count_nonzero())
    assert trained > 100


def test_other_parametrizations_stay() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    layer = nn.Sequential(nn.Linear(4, 3))
    before = layer[0].weight.detach().clone()
    parametrize.register_parametrization(layer[0], "weight", Doubled())
    attach(layer, {"0.weight": LowRank(torch.ones(3, 1), torch.ones(1, 4), 0.5)})
    torch.testing.assert_close(read(layer[0]), 2 * before + 0.5)
    copied = copy.deepcopy(layer)
    detach(layer)
    torch.testing.assert_close(read(layer[0]), 2 * before)
    torch.testing.assert_close(read(copied[0]), 2 * before + 0.5)


def test_a_pickled_network_answers_as_before() -> None:
    model = adapted()
    again = pickle.loads(pickle.dumps(model))
    batch = batch_of(slab(F64))
    torch.testing.assert_close(loss_of(again(batch)), loss_of(model(batch)), rtol=0, atol=0)
    twice = pickle.loads(pickle.dumps(copy.deepcopy(again)))
    detach(again)
    assert not low_rank_maps(again)
    assert len(low_rank_maps(twice)) == len(low_rank_maps(model))


@pytest.mark.parametrize("which", [0, 1], ids=["the original", "the copy"])
def test_taking_a_map_off_leaves_copies_alone(which: int) -> None:
    layer = nn.Sequential(nn.Linear(4, 3))
    before = layer[0].weight.detach().clone()
    attach(layer, {"0.weight": LowRank(torch.ones(3, 1), torch.ones(1, 4), 0.5)})
    pair = [layer, copy.deepcopy(layer)]
    detach(pair[which])
    torch.testing.assert_close(pair[which][0].weight, before)
    torch.testing.assert_close(pair[1 - which][0].weight, before + 0.5)
    detach(pair[1 - which])
    assert type(layer[0]) is type(pair[1][0]) is nn.Linear


@pytest.mark.parametrize(
    ("name", "left", "right", "message"),
    [
        ("1.weight", (3, 1), (1, 4), "no weight 1.weight"),
        ("0.nothing", (3, 1), (1, 4), "no weight 0.nothing"),
        ("0.weight", (3, 1), (1, 5), r"\(3, 5\), and the network's has \(3, 4\)"),
        ("0.weight", (3, 2), (1, 4), "make no low-rank map"),
    ],
)
def test_what_does_not_fit(name: str, left: tuple[int, ...], right: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attach(nn.Sequential(nn.Linear(4, 3)), {name: LowRank(torch.zeros(left), torch.zeros(right), 1.0)})
