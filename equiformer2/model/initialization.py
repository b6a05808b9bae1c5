"""Initial weights (paper section B; names of the schemes as in the reference implementation)."""

import math

from torch import nn

from equiformer2.model.activation import SwiGLUS2Activation
from equiformer2.model.attention import SO2EquivariantGraphAttention
from equiformer2.model.feed_forward import SwiGLUFeedForwardNetwork
from equiformer2.model.radial import RadialFunction
from equiformer2.model.so3_linear import SO3Linear


def initialize_weights(model: nn.Module, weight_init: str) -> None:
    """Zero biases, unit norms, linear weights `normal` (std 1/sqrt(inputs)) or `uniform` (as they were made).

    Radial functions are always uniform in ±1/sqrt(inputs). Behind a SwiGLU-S2, whose scalars are sums of two,
    weights of degree 0 are divided by sqrt(2) (EquiformerV3's code).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | SO3Linear):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if weight_init == "normal":
                nn.init.normal_(module.weight, 0, module.in_features**-0.5)
    for module in model.modules():
        if isinstance(module, RadialFunction):
            for layer in module.net:
                if isinstance(layer, nn.Linear):
                    bound = layer.in_features**-0.5
                    nn.init.uniform_(layer.weight, -bound, bound)
        elif isinstance(module, SwiGLUFeedForwardNetwork):
            module.so3_linear_2.weight.data[0] /= math.sqrt(2)
        elif isinstance(getattr(module, "activation", None), SwiGLUS2Activation):
            assert isinstance(module, SO2EquivariantGraphAttention)
            module.so2_conv_2.fc_m0.weight.data[:, : module.hidden_channels] /= math.sqrt(2)
