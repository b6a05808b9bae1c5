"""Translation of the public configurations' keys and tensor names to those of this network.

"The reference" is EquiformerV2 of OCP and of fairchem-core 1.x (checked against 1.10.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equiformer2.checkpoint.constants import is_derived_constant, shorten, verify_constants
from equiformer2.checkpoint.tensor_files import plain
from equiformer2.checkpoint.weights import build_model, config_from_values
from equiformer2.errors import InputError
from equiformer2.model.config import AVG_DEGREE, AVG_NUM_NODES, ModelConfig
from equiformer2.model.equiformer import EquiformerV2
from equiformer2.values import mapping, shown, shown_name

# Keys that mean the same here, with the reference's defaults: old configurations leave keys out.
_SHARED: dict[str, Any] = {
    "max_neighbors": 500,
    "max_radius": 5.0,
    "max_num_elements": 90,
    "num_layers": 12,
    "sphere_channels": 128,
    "attn_hidden_channels": 128,
    "num_heads": 8,
    "attn_alpha_channels": 32,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 512,
    "norm_type": "rms_norm_sh",
    "grid_resolution": None,
    "edge_channels": 128,
    "use_atom_edge_embedding": True,
    "share_atom_edge_embedding": False,
    "use_m_share_rad": False,
    "use_attn_renorm": True,
    "use_gate_act": False,
    "use_grid_mlp": False,
    "use_sep_s2_act": True,
    "alpha_drop": 0.1,
    "drop_path_rate": 0.05,
    "proj_drop": 0.0,
    "weight_init": "normal",
    "enforce_max_neighbors_strictly": True,
    "regress_forces": True,
}
_DEGREES = {"lmax_list": [6], "mmax_list": [2]}
_STATISTICS = {"avg_num_nodes": AVG_NUM_NODES, "avg_degree": AVG_DEGREE}
# The network exists for one value only.
_REQUIRED = {"use_pbc": True, "use_s2_act_attn": False, "distance_function": "gaussian"}
# Without effect on the reference's output: it reads and drops them (`num_distance_basis` is 600 whatever it
# says, both activations are SiLU), they concern memory only, or the graph is always built here.
_WITHOUT_EFFECT = {
    "use_pbc_single",
    "otf_graph",
    "num_sphere_samples",
    "num_distance_basis",
    "attn_activation",
    "ffn_activation",
    "activation_checkpoint",
}
# Features of EquiformerV3 beyond it, by the names of its code and of `ModelConfig`.
_V3_SWITCHES = ("smooth_cutoff", "use_swiglu_s2_act", "use_envelope", "use_rad_l_parametrization")
_V3_VALUES = {"norm_type": "merge_", "attn_activation": "swiglu", "ffn_activation": "swiglu"}
# Switches for per-element energies as parameters; they become `Normalizers.linear_references`.
_LINEAR_REFERENCES = {"use_energy_lin_ref", "load_energy_lin_ref"}
_NUM_GAUSSIANS = 600

_MODEL_NAMES = {"equiformer_v2", "equiformer_v2_backbone"}
_HEADS = {
    "equiformer_v2_energy_head": "energy",
    "equiformerV2_scalar_head": "energy",
    "equiformer_v2_force_head": "forces",
    "equiformerV2_vector_head": "forces",
}
_HYDRA_KEYS = {"name", "backbone", "heads", "otf_graph", "pass_through_head_outputs", "freeze_backbone"}
_PREFIX = re.compile(r"(?:module\.)*(?:backbone\.|output_heads\.[^.]+\.(?=energy_block\.|force_block\.))?")


def model_from_reference(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> EquiformerV2:
    """Build the network of a public configuration with its public weights, in evaluation mode.

    Args:
        config: the `model` block of an OCP or fairchem v1 configuration (`model_attributes` of a v0 file);
            flat or hydra (`backbone` and `heads`). Keys left out take the reference's defaults.
        state_dict: parameters by their public names, with or without the derived buffers and with any of the
            public prefixes. Derived buffers are compared with the constants of this network.

    Raises:
        InputError: if a configuration key is unknown or asks for a feature that this network does not have;
            if a tensor is missing, unknown or of another shape; or if a derived buffer has another value.
    """
    model_config = config_from_reference(config)
    state = ReferenceState.from_state_dict(model_config, state_dict, "the state_dict")
    if state.energy_lin_ref is not None and bool(state.energy_lin_ref.any()):
        raise InputError(
            "the state_dict holds per-element energies (energy_lin_ref), which belong to the normalizers: "
            "load the checkpoint file with load_checkpoint"
        )
    return build_model(model_config, state.parameters, "the state_dict")


def config_from_reference(config: Mapping[str, Any], source: str = "the model config") -> ModelConfig:
    """Translate a public `model` block, flat or hydra, to a `ModelConfig`; see `model_from_reference`.

    Args:
        config: the block.
        source: name of the block, for errors.

    Raises:
        InputError: listing the keys that are unknown or have a value this network does not have.
    """
    forces: bool | None = None
    config = mapping(plain(config), source)
    if "backbone" in config or "heads" in config:
        config, forces = _flatten_hydra(config, source)
    attributes = {key: value for key, value in config.items() if key not in ("name", "model")}
    for key in ("name", "model"):
        name = config.get(key, "equiformer_v2")
        if not isinstance(name, str) or name not in _MODEL_NAMES:
            raise InputError(f"{source} is for a model called {shown(name)}; only EquiformerV2 can be loaded")
    for key, value in attributes.items():
        if (key in _V3_SWITCHES and value) or (key in _V3_VALUES and _V3_VALUES[key] in str(value)):
            raise InputError(
                f"{source} has {key}={shown(value)}, which is EquiformerV3's: only weights of "
                "EquiformerV2 can be imported"
            )
    known = {*_SHARED, *_DEGREES, *_STATISTICS, *_REQUIRED, *_WITHOUT_EFFECT, *_LINEAR_REFERENCES}
    unknown = sorted(set(attributes) - known)
    if unknown:
        raise InputError(f"{source} has keys that EquiformerV2 does not know: {shorten(unknown)}")
    for key, required in _REQUIRED.items():
        if attributes.get(key, required) != required:
            raise InputError(f"{source} has {key}={shown(attributes[key])}; only {required!r} is supported")

    values = {key: attributes.get(key, default) for key, default in _SHARED.items()}
    for key, default in _DEGREES.items():
        degrees = attributes.get(key) or default
        if not isinstance(degrees, list | tuple) or len(degrees) != 1:
            raise InputError(
                f"{source} has {key}={shown(degrees)}; one resolution, such as [4], is supported"
            )
        values[key.removesuffix("_list")] = degrees[0]
    # The reference writes `avg_num_nodes or default`.
    values |= {key: attributes.get(key) or default for key, default in _STATISTICS.items()}
    values["num_distance_basis"] = _NUM_GAUSSIANS
    if forces is not None:
        values["regress_forces"] = forces
    return config_from_values(values, source)


def _flatten_hydra(config: Mapping[str, Any], source: str) -> tuple[Mapping[str, Any], bool]:
    """Return the attributes of the backbone, and True if there is a force head."""
    unknown = sorted(set(config) - _HYDRA_KEYS - {"finetune_config"})
    if unknown:
        raise InputError(f"{source} has hydra keys that are not supported: {shorten(unknown)}")
    backbone, heads = config.get("backbone"), config.get("heads")
    if not isinstance(backbone, Mapping) or not isinstance(heads, Mapping):
        raise InputError(f"{source} must state both its backbone and its heads")
    kinds = []
    for name, head in heads.items():
        head = mapping(head, f"{source}: the head {shown(name)}")
        kind = _HEADS.get(str(head.get("module")))
        if kind is None:
            raise InputError(
                f"{source} has a head {shown(name)} of type {shown(head.get('module'))}, which is not "
                "supported"
            )
        expected = {"module": head["module"], "output_name": kind} | (
            {"reduce": "sum"} if kind == "energy" else {}
        )
        wrong = sorted(key for key, value in head.items() if key not in expected or expected[key] != value)
        if wrong:
            raise InputError(
                f"{source} has a head {shown(name)} with options that are not supported: {shorten(wrong)}"
            )
        kinds.append(kind)
    if sorted(kinds) not in (["energy"], ["energy", "forces"]):
        raise InputError(
            f"{source} must have one energy head and at most one force head, not {sorted(heads)[:5]}"
        )
    return backbone, "forces" in kinds


class ReferenceState(NamedTuple):
    """Public state dictionary, sorted and under this network's names.

    Attributes:
        parameters: tensors by name.
        energy_lin_ref: per-element energies in units of the energy's standard deviation,
            `[max_num_elements]`, or None.
    """

    parameters: dict[str, Tensor]
    energy_lin_ref: Tensor | None

    @classmethod
    def from_state_dict(
        cls, config: ModelConfig, state_dict: Mapping[str, Tensor], source: str
    ) -> ReferenceState:
        """Strip the prefixes, verify and drop the derived constants.

        Args:
            config: configuration of the network.
            state_dict: tensors by public name.
            source: name of the file, for errors.

        Raises:
            InputError: if two keys name one tensor, a value is not a tensor, or a constant differs.
        """
        parameters: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"{source}: {shown_name(key)} is not a tensor")
            name = strip_prefix(str(key))
            target = constants if is_derived_constant(name) else parameters
            if name in target:
                raise InputError(f"{source}: two keys name the tensor {name}, one of them {key}")
            target[name] = tensor
        verify_constants(config, constants, source)
        return cls(parameters, parameters.pop("energy_lin_ref", None))


def strip_prefix(key: str) -> str:
    """Strip the prefix and the head of a public name: `module.backbone.blocks.0…` becomes `blocks.0…`."""
    return _PREFIX.sub("", key, count=1)
