"""Adapters at their start: answers, frozen weights, scores, shares."""

import pytest
import torch
from model_helpers import batch_of, cluster, loss_of, water
from tiny_adapters import network

from equiformer2.adapters import AdapterSettings, adaptable_weights, attach_adapter, prune_adapter
from equiformer2.adapters.settings import METHODS
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.model.parametrizations import LowRank


def losses(model: EquiformerV2) -> list:
    return [lambda each=each: loss_of(model(batch_of(each))) for each in (water(), cluster())]


def attached(**settings: object) -> tuple[EquiformerV2, dict[str, LowRank], AdapterSettings]:
    model, chosen = network(), AdapterSettings(**({"rank": 2} | settings))
    return model, attach_adapter(model, chosen, 0), chosen


def test_an_adapter_begins_with_the_answers_of_its_network() -> None:
    batch = batch_of(water(), cluster())
    with torch.no_grad():
        expected = network()(batch)
        model, maps, settings = attached()
        prune_adapter(maps, settings, losses(model), 0)
        for name, value in model(batch).items():
            assert torch.equal(value, expected[name])


def test_maps_and_last_layers_alone_are_trained() -> None:
    model, maps, _ = attached()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {
        f"{name.removesuffix('.weight')}.parametrizations.weight.0.{side}"
        for name in maps
        for side in ("left", "right")
    }
    assert trained - factors == {
        "energy_block.so3_linear_2.weight",
        "energy_block.so3_linear_2.bias",
        "force_block.proj.weight",
        "force_block.proj.bias",
    }
    assert factors <= trained


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_share_is_kept_of_both_factors(method: str, scope: str) -> None:
    model, maps, settings = attached(method=method, scope=scope, keep=0.3)
    prune_adapter(maps, settings, losses(model), 0)
    size = sum(each.size for each in maps.values())
    assert sum(each.kept for each in maps.values()) == round(0.3 * size)
    left = sum(int(each.left_kept.sum()) for each in maps.values())
    right = sum(int(each.right_kept.sum()) for each in maps.values())
    assert min(left, right) > 0.05 * size  # neither factor is left out
    assert all(not each.left.any() for each in maps.values())
    assert all(not each.right[~each.right_kept].any() for each in maps.values())
    if scope == "layer":
        assert all(abs(each.kept - 0.3 * each.size) <= 1 for each in maps.values())


def test_right_factors_have_scores_although_left_ones_are_zero() -> None:
    """At the start their gradient is exactly zero."""
    model, maps, settings = attached(method="snip", keep=0.3)
    sum(loss() for loss in losses(model)).backward()
    assert all(each.right.grad is None or not each.right.grad.any() for each in maps.values())
    prune_adapter(maps, settings, losses(model), 0)
    assert sum(int(each.right_kept.sum()) > 0 for each in maps.values()) > 10


def test_snip_keeps_the_entries_of_elements_that_are_there() -> None:
    model, maps, settings = attached(method="snip", keep=0.3)
    prune_adapter(maps, settings, losses(model), 0)
    kept = maps["sphere_embedding.weight"].left_kept
    present = {1, 6, 7, 8, 29, 78}
    assert kept.any()
    assert {int(row) for row in kept.any(dim=1).nonzero()} <= present


def test_scores_repeat_and_follow_the_seed() -> None:
    def masks(seed: int) -> torch.Tensor:
        model, maps, settings = attached(method="snip", keep=0.3)
        prune_adapter(maps, settings, losses(model), seed)
        return torch.cat([each.left_kept.flatten() for each in maps.values()])

    assert torch.equal(masks(0), masks(0))
    assert not torch.equal(masks(0), masks(1))


def test_large_sparse_has_as_many_entries_at_more_rank() -> None:
    counts = []
    for factor in (1, 2):
        model, maps, settings = attached(rank=1, keep=0.8, large_sparse=factor, method="random")
        prune_adapter(maps, settings, losses(model), 0)
        counts.append((max(each.rank for each in maps.values()), sum(each.kept for each in maps.values())))
    assert [rank for rank, _ in counts] == [1, 2]
    assert counts[0][1] == counts[1][1]


def test_masked_entries_stay_zero_in_training() -> None:
    model, maps, settings = attached(keep=0.3)
    prune_adapter(maps, settings, losses(model), 0)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1, fused=True
    )
    for _ in range(3):
        optimizer.zero_grad()
        sum(loss() for loss in losses(model)).backward()
        optimizer.step()
    moved = 0
    for each in maps.values():
        assert not each.left[~each.left_kept].any()
        assert not each.right[~each.right_kept].any()
        moved += int(each.left.count_nonzero())
    assert moved > 50
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_patterns_choose_weights() -> None:
    _, maps, _ = attached(weights=("blocks.*.ffn.*", "force_block.so2_conv_?.*"))
    assert {name.partition(".")[0] for name in maps} == {"blocks", "force_block"}
    assert not any(".ga." in name for name in maps)
    with pytest.raises(InputError, match="matches no weight"):
        attached(weights=("blocks.*.fnn.*",))


def test_every_kind_of_linear_map_can_be_adapted() -> None:
    names = set(adaptable_weights(network()))
    for part in ("so2_m_conv.0.fc", "fc_m0", "rad_func.net.6", "so3_linear_1", "proj", "grid_mlp.0"):
        assert any(f".{part}.weight" in name for name in names), part
    assert "sphere_embedding.weight" in names
    config = ModelConfig.preset("31M")
    shapes = {
        name: tuple(w.shape) for name, w in adaptable_weights(EquiformerV2(config, device="meta")).items()
    }
    assert shapes["blocks.0.ga.proj.weight"] == (5, 128, 128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "adapter.rank"),
        ({"keep": 0.0}, "adapter.keep"),
        ({"keep": 1.5}, "adapter.keep"),
        ({"keep": float("nan")}, "adapter.keep"),
        ({"method": "best"}, "adapter.method"),
        ({"scope": "block"}, "adapter.scope"),
        ({"large_sparse": 0}, "adapter.large_sparse"),
        ({"weights": ()}, "adapter.weights"),
        ({"scale": 0.0}, "adapter.scale"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdapterSettings(**settings)


def test_too_small_a_share_and_scores_that_are_no_numbers() -> None:
    model, maps, settings = attached(keep=1e-6)
    with pytest.raises(InputError, match="keeps none"):
        prune_adapter(maps, settings, losses(model), 0)
    model, maps, settings = attached(keep=0.5)
    with pytest.raises(InputError, match="not finite"):
        prune_adapter(maps, settings, [lambda: loss_of(model(batch_of(water()))) * float("nan")], 0)


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_a_loss_that_depends_on_no_entry_ranks_none(method: str) -> None:
    model, maps, settings = attached(keep=0.5, method=method, weights=("force_block.*",))
    with pytest.raises(InputError, match=rf"{method}\) are all zero"):
        prune_adapter(maps, settings, [lambda: model(batch_of(water()))["energy"].sum()], 0)


def test_forces_that_are_the_gradient_of_the_energy_count_in_the_scores() -> None:
    model = network(forces="gradient")
    settings = AdapterSettings(rank=2, keep=0.3)
    maps = attach_adapter(model, settings, 0)
    by_forces = [lambda: model(batch_of(cluster()))["forces"].square().sum()]
    prune_adapter(maps, settings, by_forces, 0)
    assert sum(each.kept for each in maps.values()) == round(0.3 * sum(e.size for e in maps.values()))
    assert any(bool(each.right_kept.any()) for each in maps.values())
