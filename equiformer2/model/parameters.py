"""Count the parameters of a network from its shapes."""

import os

from equiformer2.errors import InputError
from equiformer2.model.block_config import ResolvedBlock
from equiformer2.model.config import Activation, ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Count the numbers in a network's parameters, those included that no output depends on.

    Args:
        config: hyper-parameters; no network is built.
    """
    return _Counter(config).network()


def check_memory(parameters: int, remedy: str) -> None:
    """Refuse a network that the memory of this machine cannot hold, before any of it is asked for.

    Args:
        parameters: number of them, in float32.
        remedy: words for what to change.

    Raises:
        InputError: it would not fit.
    """
    needed = 4 * parameters
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise InputError(
            f"a network of this configuration has {parameters:,} parameters, which take "
            f"{needed / 2**30:,.0f} GiB, and this machine has {available / 2**30:,.0f} GiB of memory: "
            f"{remedy}"
        )


def num_gates(block: ResolvedBlock, activation: Activation) -> int:
    """Count the scalars that the activation of messages takes per channel.

    Args:
        block: degrees and orders of the messages.
        activation: nonlinearity of the messages.
    """
    return {"gate": block.lmax, "s2": 0, "separable_s2": 1, "swiglu_s2": 3}[activation]


class _Counter:
    """Numbers in the parameters of each part of a network.

    Args:
        config: hyper-parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        # Scalars have a weight and a bias, the other degrees a weight, in all kinds of norms.
        self.norm = (config.lmax + 2) * config.sphere_channels
        self.embeddings = 2 * config.max_num_elements * config.edge_channels

    def network(self) -> int:
        """All parts together."""
        config, channels = self.config, self.config.sphere_channels
        total = config.max_num_elements * channels + self.norm
        if config.share_atom_edge_embedding:
            total += self.embeddings
        total += self.radial((config.lmax + 1) * channels)
        for index in range(config.num_layers):
            block = config.block(index)
            if block.attention:
                total += self.norm + self.attention(block, channels, config.attn_activation)
            if block.feed_forward:
                total += self.norm + self.feed_forward(block, channels, config.use_swiglu_s2_act)
        total += self.feed_forward(config.energy_block, 1, False)
        if config.regress_forces:
            total += self.attention(config.force_block, 1, config.force_activation)
        return total

    def attention(self, block: ResolvedBlock, outputs: int, activation: Activation) -> int:
        """Attention with `outputs` output channels."""
        config = self.config
        inputs, hidden = 2 * config.sphere_channels, block.attn_hidden_channels
        alpha = block.num_heads * config.attn_alpha_channels
        values = block.num_heads * block.attn_value_channels
        coefficients = 2 * hidden if activation == "swiglu_s2" else hidden
        degrees = [block.lmax + 1 - m for m in range(block.mmax + 1)]

        def convolution(inputs: int, outputs: int, extra: int) -> int:
            first = degrees[0] * outputs + extra
            higher = sum(2 * n * n for n in degrees[1:]) * inputs * outputs
            return (degrees[0] * inputs + 1) * first + higher

        radial = (degrees[0] if config.use_m_share_rad else sum(degrees)) * inputs
        return (
            alpha
            + (2 * config.attn_alpha_channels if config.use_attn_renorm else 0)
            + self.radial(radial)
            + convolution(inputs, coefficients, alpha + num_gates(block, activation) * hidden)
            + convolution(hidden, values, 0)
            + self.linear(degrees[0], values, outputs)
        )

    def radial(self, outputs: int) -> int:
        """Radial function, with its own element embeddings and two layer norms."""
        config, depth = self.config, self.config.edge_channels
        inputs = config.num_distance_basis + (2 * depth if config.use_atom_edge_embedding else 0)
        own = self.embeddings if config.block_atom_edge_embedding else 0
        return own + (inputs + 1) * depth + (depth + 1) * depth + 4 * depth + (depth + 1) * outputs

    def feed_forward(self, block: ResolvedBlock, outputs: int, swiglu: bool) -> int:
        """Feed-forward network with `outputs` output channels."""
        config = self.config
        channels, hidden, degrees = config.sphere_channels, block.ffn_hidden_channels, config.lmax + 1
        inner, middle = hidden, 0
        if swiglu:
            middle, gates = 3 * hidden * hidden, 3 * hidden
        elif config.use_grid_mlp:
            inner, one, two = block.ffn_input_channels, block.ffn_grid_channels_1, block.ffn_grid_channels_2
            middle = inner * one + one * two + two * hidden
            gates = hidden if config.use_sep_s2_act else 0
        else:
            gates = config.lmax * hidden if config.use_gate_act else int(config.use_sep_s2_act) * hidden
        first, last = self.linear(degrees, channels, inner), self.linear(degrees, hidden, outputs)
        return first + middle + (channels + 1) * gates + last

    @staticmethod
    def linear(degrees: int, inputs: int, outputs: int) -> int:
        """Linear map per degree, with a bias of the scalars."""
        return degrees * inputs * outputs + outputs
