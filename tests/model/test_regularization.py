"""Dropout in its three forms, and what evaluation makes of it."""

import pytest
import torch
from model_helpers import batch_of, cluster, random_model, slab, small_config, water

from equiformer2.model.regularization import EquivariantDropout, GraphDropPath


def test_drop_path_drops_whole_structures_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = GraphDropPath(0.3).train()
    structure = torch.arange(4000).repeat_interleave(2)
    x = torch.ones(8000, 4, 3)
    out = drop(x, structure, 4000)
    per_structure = out.view(4000, -1)
    assert torch.equal(per_structure.amin(1), per_structure.amax(1))
    kept = per_structure[:, 0] != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert out.mean().item() == pytest.approx(1.0, abs=0.04)


def test_equivariant_dropout_drops_whole_irreps_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = EquivariantDropout(0.25).train()(torch.ones(2000, 9, 4))
    assert torch.equal(out.amin(1), out.amax(1))
    dropped = out[:, 0] == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert dropped.any(1).float().mean().item() == pytest.approx(1 - 0.75**4, abs=0.04)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("rate", ["alpha_drop", "drop_path_rate", "proj_drop"])
def test_each_rate_acts_in_training_alone(rate: str) -> None:
    model, batch = random_model(small_config(**{rate: 0.5})), batch_of(slab(), water())
    without = random_model(small_config())
    with torch.no_grad():
        assert torch.equal(model(batch)["forces"], without(batch)["forces"])
        model.train()
        torch.manual_seed(0)
        first = model(batch)["forces"]
        again = model(batch)["forces"]
        torch.manual_seed(0)
        repeated = model(batch)["forces"]
    assert not torch.equal(first, again)
    assert torch.equal(first, repeated)


def test_dropout_of_attention_spares_the_force_head() -> None:
    model = random_model(small_config(alpha_drop=0.5))
    assert [block.ga.alpha_dropout.p for block in model.blocks] == [0.5, 0.5]
    assert model.force_block is not None
    assert model.force_block.alpha_dropout.p == 0.0


def test_dropout_keeps_equivariance() -> None:
    """The same masks on a rotated structure give rotated forces."""
    config = small_config(alpha_drop=0.3, proj_drop=0.3, use_gate_act=True, use_grid_mlp=False)
    model, data = random_model(config, torch.float64).train(), cluster(torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    rotation = rotation * torch.linalg.det(rotation)
    turned = data.clone()
    turned.pos, turned.cell = data.pos @ rotation.t(), data.cell @ rotation.t()
    with torch.no_grad():
        torch.manual_seed(0)
        out = model(data)
        torch.manual_seed(0)
        out_turned = model(turned)
    torch.testing.assert_close(out_turned["energy"], out["energy"], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(out_turned["forces"], out["forces"] @ rotation.t(), rtol=1e-8, atol=1e-10)
