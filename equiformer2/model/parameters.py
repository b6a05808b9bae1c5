"""Parameters of a network, counted from its shapes."""

from equiformer2.model.block_config import ResolvedBlock
from equiformer2.model.config import Activation, ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """How many numbers the network's parameters hold, those that no output depends on included."""
    channels = config.sphere_channels
    total = config.max_num_elements * channels + _norm(config)
    if config.share_atom_edge_embedding:
        total += _embeddings(config)
    total += _radial(config, (config.lmax + 1) * channels)
    for index in range(config.num_layers):
        block = config.block(index)
        if block.attention:
            total += _norm(config) + _attention(config, block, channels, config.attn_activation)
        if block.feed_forward:
            feed_forward = _swiglu_feed_forward if config.use_swiglu_s2_act else _feed_forward
            total += _norm(config) + feed_forward(config, block, channels)
    total += _feed_forward(config, config.energy_block, 1)
    if config.regress_forces:
        total += _attention(config, config.force_block, 1, config.force_activation)
    return total


def num_gates(block: ResolvedBlock, activation: Activation) -> int:
    """Scalars that the activation of messages takes per channel."""
    return {"gate": block.lmax, "s2": 0, "separable_s2": 1, "swiglu_s2": 3}[activation]


def _attention(config: ModelConfig, block: ResolvedBlock, outputs: int, activation: Activation) -> int:
    inputs, hidden = 2 * config.sphere_channels, block.attn_hidden_channels
    alpha = block.num_heads * config.attn_alpha_channels
    values = block.num_heads * block.attn_value_channels
    coefficients = 2 * hidden if activation == "swiglu_s2" else hidden
    degrees = [block.lmax + 1 - m for m in range(block.mmax + 1)]
    radial = (degrees[0] if config.use_m_share_rad else sum(degrees)) * inputs
    return (
        alpha
        + (2 * config.attn_alpha_channels if config.use_attn_renorm else 0)
        + _radial(config, radial)
        + _convolution(degrees, inputs, coefficients, alpha + num_gates(block, activation) * hidden)
        + _convolution(degrees, hidden, values, 0)
        + _linear(degrees[0], values, outputs)
    )


def _convolution(degrees: list[int], inputs: int, outputs: int, extra: int) -> int:
    first = degrees[0] * outputs + extra
    higher = sum(2 * n * n for n in degrees[1:]) * inputs * outputs
    return (degrees[0] * inputs + 1) * first + higher


def _radial(config: ModelConfig, outputs: int) -> int:
    """With its own element embeddings and two layer norms."""
    depth = config.edge_channels
    inputs = config.num_distance_basis + (2 * depth if config.use_atom_edge_embedding else 0)
    own = _embeddings(config) if config.block_atom_edge_embedding else 0
    return own + (inputs + 1) * depth + (depth + 1) * depth + 4 * depth + (depth + 1) * outputs


def _embeddings(config: ModelConfig) -> int:
    return 2 * config.max_num_elements * config.edge_channels


def _norm(config: ModelConfig) -> int:
    # Scalars have a weight and a bias, the other degrees a weight, in all of the norms.
    return (config.lmax + 2) * config.sphere_channels


def _feed_forward(config: ModelConfig, block: ResolvedBlock, outputs: int) -> int:
    channels, hidden = config.sphere_channels, block.ffn_hidden_channels
    if config.use_grid_mlp:
        inner, one, two = block.ffn_input_channels, block.ffn_grid_channels_1, block.ffn_grid_channels_2
        middle = inner * one + one * two + two * hidden
        gates = hidden if config.use_sep_s2_act else 0
    else:
        inner, middle = hidden, 0
        gates = config.lmax * hidden if config.use_gate_act else int(config.use_sep_s2_act) * hidden
    first, last = _linear(config.lmax + 1, channels, inner), _linear(config.lmax + 1, hidden, outputs)
    return first + middle + (channels + 1) * gates + last


def _swiglu_feed_forward(config: ModelConfig, block: ResolvedBlock, outputs: int) -> int:
    channels, hidden, degrees = config.sphere_channels, block.ffn_hidden_channels, config.lmax + 1
    first, last = _linear(degrees, channels, hidden), _linear(degrees, hidden, outputs)
    return first + 3 * hidden * hidden + (channels + 1) * 3 * hidden + last


def _linear(degrees: int, inputs: int, outputs: int) -> int:
    return degrees * inputs * outputs + outputs
