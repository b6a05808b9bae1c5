"""The network. Pure torch.

Legend of shapes: N atoms, E edges, B structures, K = (L+1)^2 coefficients, R coefficients kept with
|m| <= mmax, C channels, H heads, G grid points.
"""

from equiformer2.model.config import ModelConfig
from equiformer2.model.equiformer import EquiformerV2

__all__ = ["EquiformerV2", "ModelConfig"]
