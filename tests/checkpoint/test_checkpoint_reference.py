"""Public configurations and tensor names: every key is used, or verified, or an error."""

from typing import Any

import pytest
import torch
from checkpoint_helpers import load_file
from torch import Tensor

from equiformer2 import ModelConfig
from equiformer2.checkpoint import model_from_reference
from equiformer2.checkpoint.constants import coefficient_mapping, is_derived_constant
from equiformer2.checkpoint.reference import config_from_reference, strip_prefix
from equiformer2.errors import InputError


@pytest.fixture
def public() -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = load_file("ckpt_v1_flat_best.pt")
    return file["config"]["model"], dict(file["state_dict"])


def test_parameters_alone_or_with_constants_give_the_same_model(
    public: tuple[dict[str, Any], dict[str, Tensor]],
) -> None:
    config, state = public
    parameters = {key: value for key, value in state.items() if not is_derived_constant(key)}
    assert (len(parameters), len(state)) == (130, 1137)
    whole = model_from_reference(config, state)
    alone = model_from_reference(config, parameters)
    prefixed = model_from_reference(config, {f"module.module.{key}": value for key, value in state.items()})
    assert list(alone.state_dict()) == list(parameters)
    for name, tensor in parameters.items():
        for model in (whole, alone, prefixed):
            assert torch.equal(model.state_dict()[name], tensor)


def test_the_callers_dictionaries_are_left_alone(public: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    config, state = public
    keys, values = list(state), dict(config)
    model_from_reference(config, state)
    assert list(state) == keys
    assert config == values


def test_missing_and_unknown_tensors_are_listed(public: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    config, state = public
    state["blocks.0.ga.extra"] = state.pop("blocks.1.ffn.so3_linear_2.weight")
    with pytest.raises(InputError) as caught:
        model_from_reference(config, state)
    assert "1 missing: blocks.1.ffn.so3_linear_2.weight" in str(caught.value)
    assert "1 unknown: blocks.0.ga.extra" in str(caught.value)


def test_two_names_for_one_tensor_are_refused(public: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    config, state = public
    state["module.norm.affine_weight"] = state["norm.affine_weight"]
    with pytest.raises(InputError, match=r"two keys name the tensor norm\.affine_weight"):
        model_from_reference(config, state)


@pytest.mark.parametrize(
    "name",
    [
        "distance_expansion.offset",
        "SO3_rotation.0.mapping.to_m",
        "mappingReduced.m_size",
        "blocks.1.ga.so2_conv_2.mappingReduced.m_complex",
        "energy_block.SO3_grid.3.2.to_grid_mat",
        "SO3_grid.1.3.from_grid_mat",
        "blocks.0.ffn.SO3_grid.2.0.mapping.l_harmonic",
        "force_block.proj.expand_index",
        "blocks.1.norm_2.balance_degree_weight",
    ],
)
def test_a_wrong_constant_is_named(public: tuple[dict[str, Any], dict[str, Tensor]], name: str) -> None:
    config, state = public
    state[name] = state[name].clone(memory_format=torch.contiguous_format)
    state[name].view(-1)[-1] += 1 if state[name].dtype == torch.int64 else 2e-5
    with pytest.raises(InputError, match="1 derived constants differ") as caught:
        model_from_reference(config, state)
    assert name in str(caught.value)


def test_constants_of_another_configuration_are_listed(
    public: tuple[dict[str, Any], dict[str, Tensor]],
) -> None:
    config, state = public
    with pytest.raises(InputError, match="derived constants differ"):
        model_from_reference(config | {"grid_resolution": 16}, state)
    with pytest.raises(InputError, match=r"1 derived constants differ .*: distance_expansion\.offset"):
        model_from_reference(config | {"max_radius": 6.0}, state)


@pytest.mark.parametrize("name", ["SO3_grid.4.0.to_grid_mat", "SO3_grid.0.4.mapping.l_harmonic"])
def test_a_constant_beyond_lmax_is_refused(
    public: tuple[dict[str, Any], dict[str, Tensor]], name: str
) -> None:
    config, state = public
    state[name] = torch.zeros(1)
    with pytest.raises(InputError, match="derived constants differ"):
        model_from_reference(config, state)


def test_not_a_number_is_not_equal(public: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    config, state = public
    state["SO3_grid.3.3.to_grid_mat"] = torch.full_like(state["SO3_grid.3.3.to_grid_mat"], float("nan"))
    with pytest.raises(InputError, match="derived constants differ"):
        model_from_reference(config, state)


def test_per_element_energies_belong_to_the_file(public: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    config, state = public
    state["energy_lin_ref"] = torch.zeros(90)
    model_from_reference(config, state)
    state["energy_lin_ref"] = torch.ones(90)
    with pytest.raises(InputError, match="load the checkpoint file with load_checkpoint"):
        model_from_reference(config, state)


def test_prefixes() -> None:
    for key in (
        "energy_block.proj.weight",
        "module.module.energy_block.proj.weight",
        "output_heads.energy.energy_block.proj.weight",
        "module.output_heads.my_head.energy_block.proj.weight",
        "module.backbone.energy_block.proj.weight",
    ):
        assert strip_prefix(key) == "energy_block.proj.weight"
    assert strip_prefix("output_heads.stress.block.weight") == "output_heads.stress.block.weight"


def test_left_out_keys_take_the_references_defaults() -> None:
    config = config_from_reference({"name": "equiformer_v2"})
    assert config == ModelConfig(
        num_layers=12,
        sphere_channels=128,
        attn_hidden_channels=128,
        num_heads=8,
        attn_alpha_channels=32,
        attn_value_channels=16,
        ffn_hidden_channels=512,
        norm_type="rms_norm_sh",
        lmax=6,
        mmax=2,
        grid_resolution=None,
        max_neighbors=500,
        max_radius=5.0,
        use_grid_mlp=False,
        drop_path_rate=0.05,
        weight_init="normal",
    )


def test_keys_without_effect_have_none() -> None:
    ignored = {
        "num_distance_basis": 512,
        "num_sphere_samples": 128,
        "attn_activation": "scaled_silu",
        "ffn_activation": "silu",
        "otf_graph": False,
        "use_pbc_single": True,
        "activation_checkpoint": True,
        "avg_num_nodes": None,
    }
    assert config_from_reference(ignored) == config_from_reference({})
    assert config_from_reference({"avg_num_nodes": 50.0, "avg_degree": 12.5}).avg_degree == 12.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layer": 3, "zzz": 1}, "keys that EquiformerV2 does not know: num_layer, zzz"),
        ({"use_s2_act_attn": True}, "use_s2_act_attn=True; only False is supported"),
        ({"distance_function": "sigmoid"}, "distance_function='sigmoid'"),
        ({"use_pbc": False}, "use_pbc=False"),
        ({"lmax_list": [6, 4]}, r"lmax_list=\[6, 4\]; one resolution"),
        ({"lmax_list": 6}, "lmax_list=6; one resolution"),
        ({"norm_type": "batch_norm"}, "norm_type"),
        ({"num_layers": "twelve"}, "model configuration is not valid"),
        ({"mmax_list": [9]}, "mmax"),
        ({"backbone": {}, "heads": None}, "both its backbone and its heads"),
        ({"backbone": {}, "heads": {}, "spare": 1}, "hydra keys that are not supported: spare"),
    ],
)
def test_configurations_outside_this_network_are_refused(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_from_reference(values)


def test_coefficient_mapping_by_hand() -> None:
    mapping = coefficient_mapping(2, 1)
    assert mapping["l_harmonic"].tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert mapping["m_complex"].tolist() == [0, -1, 0, 1, -1, 0, 1]
    assert mapping["m_size"].tolist() == [3, 2]
    assert mapping["to_m"].argmax(1).tolist() == [0, 2, 5, 3, 6, 1, 4]
