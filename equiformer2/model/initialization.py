"""Initial weights (paper section B; names of the schemes as in the reference implementation)."""

from torch import nn

from equiformer2.model.radial import RadialFunction
from equiformer2.model.so3_linear import SO3Linear


def initialize_weights(model: nn.Module, weight_init: str) -> None:
    """Zero biases, unit norms, linear weights `normal` (std 1/sqrt(inputs)) or `uniform` (as they were made).

    Radial functions are always uniform in ±1/sqrt(inputs).
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
