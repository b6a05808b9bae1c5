"""The measured networks (paper, Tables 1, 2 and 7), as configurations of the reference implementation."""

from typing import Any

_OC20 = {
    "use_pbc": True,
    "regress_forces": True,
    "otf_graph": True,
    "max_neighbors": 20,
    "max_radius": 12.0,
    "max_num_elements": 90,
    "sphere_channels": 128,
    "attn_hidden_channels": 64,
    "num_heads": 8,
    "attn_alpha_channels": 64,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 128,
    "norm_type": "layer_norm_sh",
    "mmax_list": [2],
    "grid_resolution": 18,
    "num_sphere_samples": 128,
    "edge_channels": 128,
    "use_atom_edge_embedding": True,
    "distance_function": "gaussian",
    "num_distance_basis": 512,
    "attn_activation": "silu",
    "use_s2_act_attn": False,
    "ffn_activation": "silu",
    "use_gate_act": False,
    "use_grid_mlp": True,
    "alpha_drop": 0.1,
    "drop_path_rate": 0.1,
    "proj_drop": 0.0,
    "weight_init": "uniform",
}

SIZES: dict[str, dict[str, Any]] = {
    "31M": {**_OC20, "num_layers": 8, "lmax_list": [4]},
    "83M": {**_OC20, "num_layers": 12, "lmax_list": [6], "drop_path_rate": 0.05},
    # No published network: everything the others have, small enough to try the harness in seconds.
    "toy": {
        **_OC20,
        "num_layers": 2,
        "lmax_list": [2],
        "sphere_channels": 16,
        "attn_hidden_channels": 8,
        "num_heads": 2,
        "attn_alpha_channels": 8,
        "attn_value_channels": 8,
        "ffn_hidden_channels": 16,
        "edge_channels": 16,
    },
}
