"""Hyper-parameters, sizes, initial weights and the weight-decay rule."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import SMALL, small_config

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.errors import InputError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "model"


def number_of_parameters(config: ModelConfig) -> int:
    return sum(p.numel() for p in EquiformerV2(config, "meta").parameters())


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (ModelConfig.preset("31M"), 31.06),
        (ModelConfig.preset("153M"), 153.6),
        (ModelConfig.preset("83M"), 83.16),
        # The other sizes of paper Table 8.
        (dataclasses.replace(ModelConfig.preset("83M"), lmax=4), 44.83),
        pytest.param(dataclasses.replace(ModelConfig.preset("83M"), lmax=8), 134.28, marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(ModelConfig.preset("83M"), mmax=3), 95.11, marks=pytest.mark.slow),
    ],
)
def test_models_of_the_paper_have_its_sizes(config: ModelConfig, millions: float) -> None:
    assert number_of_parameters(config) / 1e6 == pytest.approx(millions, abs=0.01)


def test_dictionary_and_back() -> None:
    config = small_config(norm_type="rms_norm_sh", grid_resolution=None)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.from_dict({}) == ModelConfig()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("num_layer", "'num_layer'; did you mean 'num_layers'"),
        ("use_gridmlp", "did you mean 'use_grid_mlp'"),
        ("zzz", "'zzz'$"),
    ],
)
def test_unknown_keys_are_named(key: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict({**SMALL, key: 1})


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="'32M'; known are 31M, 83M, 153M"):
        ModelConfig.preset("32M")


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_heads": 0},
        {"sphere_channels": -4},
        {"lmax": 0},
        {"mmax": -1},
        {"mmax": 3},
        {"grid_resolution": 4},
        {"grid_resolution": 9},
        {"max_radius": 0.0},
        {"max_radius": math.nan},
        {"max_neighbors": 0},
        {"num_distance_basis": 1},
        {"alpha_drop": 1.0},
        {"drop_path_rate": -0.1},
        {"proj_drop": 2.0},
        {"norm_type": "batch_norm"},
        {"weight_init": "zeros"},
        {"avg_num_nodes": 0.0},
        {"avg_degree": -1.0},
        {"share_atom_edge_embedding": True, "use_atom_edge_embedding": False},
    ],
    ids=str,
)
def test_impossible_values_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"model\.{next(iter(change))}"):
        small_config(**change)


DECAY_VARIANTS: dict[str, dict[str, Any]] = {
    "separable_layer_norm": {},
    "rms_norm_gate_shared": {
        "norm_type": "rms_norm_sh",
        "share_atom_edge_embedding": True,
        "use_m_share_rad": True,
        "use_gate_act": True,
        "use_grid_mlp": False,
    },
    "layer_norm_plain": {
        "norm_type": "layer_norm",
        "use_atom_edge_embedding": False,
        "use_attn_renorm": False,
        "use_grid_mlp": False,
        "use_sep_s2_act": False,
    },
}


@pytest.mark.parametrize("variant", DECAY_VARIANTS)
def test_parameters_without_weight_decay_are_the_references(variant: str) -> None:
    """`no_weight_decay()` of fairchem-core 1.10.0 for the same hyper-parameters."""
    expected = json.loads((FIXTURES / "no_weight_decay.json").read_text())[variant]
    model = EquiformerV2(small_config(num_layers=1, **DECAY_VARIANTS[variant]))
    assert model.no_weight_decay() == set(expected)
    assert model.no_weight_decay() < {name for name, _ in model.named_parameters()}


WIDE = {
    "sphere_channels": 32,
    "attn_hidden_channels": 32,
    "edge_channels": 32,
    "attn_alpha_channels": 32,
    "ffn_hidden_channels": 32,
}


@pytest.mark.parametrize("weight_init", ["uniform", "normal"])
def test_initial_weights(weight_init: str) -> None:
    """Spread of the weights times the root of the number of inputs, as in fairchem-core 1.10.0."""
    torch.manual_seed(0)
    model = EquiformerV2(small_config(weight_init=weight_init, **WIDE))
    uniform = 3**-0.5  # of a uniform distribution in [-1, 1]
    for name, parameter in model.named_parameters():
        tolerance = 0.05 + 3 * parameter.numel() ** -0.5
        scaled = parameter.detach() * parameter.shape[-1] ** 0.5
        if "norm" in name or ".net.1." in name or ".net.4." in name:
            assert torch.equal(parameter, torch.full_like(parameter, 1.0 if "weight" in name else 0.0)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif name == "sphere_embedding.weight":
            assert parameter.std().item() == pytest.approx(1.0, rel=0.1)
        elif "embedding.weight" in name:
            assert 0.0009 < parameter.abs().max().item() <= 0.001, name
        elif name.endswith("alpha_dot") or "rad_func" in name or weight_init == "uniform":
            # Two products are added in the complex maps of order m > 0.
            bound = 2**-0.5 if "so2_m_conv" in name else 1.0
            assert scaled.abs().max().item() <= bound * (1 + 1e-6), name
            assert scaled.std().item() == pytest.approx(bound * uniform, rel=tolerance), name
        else:
            assert scaled.std().item() == pytest.approx(1.0, rel=tolerance), name
            assert parameter.numel() < 100 or scaled.abs().max().item() > 1.5, name
