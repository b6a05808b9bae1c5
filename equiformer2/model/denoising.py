"""Parts for denoising non-equilibrium structures (DeNS; Liao, Smidt, Shuaibi & Das 2024, arXiv 2403.09549).

An auxiliary task of training: atoms are displaced by noise, and the network predicts the noise and the energy
of the original structure. Many structures lie near a corrupted one, so the forces of the original are given
as input to say which of them is meant. Without such input these parts do nothing and cost nothing.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from e3nn import o3
from torch import Tensor, nn

from equiformer2.kernels.backend import Backend
from equiformer2.model.attention import VectorHead
from equiformer2.model.config import ModelConfig
from equiformer2.model.edge_context import EdgeGraph
from equiformer2.model.folding import read
from equiformer2.model.initialization import initialize_weights
from equiformer2.model.so3 import S2Grid

Network = TypeVar("Network", bound=nn.Module)


class EncodedForces(NamedTuple):
    """Forces of the original of a corrupted structure, which say which original is meant.

    Attributes:
        forces: `[N, 3]` eV/Å, in the original structure.
        atoms: bool `[N]`: the displaced atoms; the forces of the others are not read.
    """

    forces: Tensor
    atoms: Tensor


class ForceEmbedding(nn.Module):
    """Forces as irreps features: magnitude times spherical harmonics of the direction, linear per degree.

    As in the authors' implementation, but for the bias of their map, which all atoms get: here no force adds
    exactly nothing.

    Parameters: `weight [lmax+1, C]`.
    """

    def __init__(self, channels: int, lmax: int) -> None:
        super().__init__()
        self.degrees = list(range(lmax + 1))
        # As a linear map of one input channel is initialised.
        self.weight = nn.Parameter(torch.empty(lmax + 1, channels).uniform_(-1.0, 1.0))

    def forward(self, encoded: EncodedForces) -> Tensor:
        """`[N, K, C]`; zero for atoms that are not displaced."""
        by_degree = read(self)
        forces = torch.where(encoded.atoms[:, None], encoded.forces, 0.0).to(by_degree.dtype)
        # Of a zero vector e3nn gives zeros for l > 0 and 1 for l = 0; its magnitude makes that zero, too.
        harmonics = o3.spherical_harmonics(self.degrees, forces, normalize=True, normalization="component")
        # The root of 3 makes the values of l = 1 those of the force.
        values = harmonics * (torch.linalg.vector_norm(forces, dim=1, keepdim=True) / math.sqrt(3.0))
        weight = torch.cat([by_degree[l].expand(2 * l + 1, -1) for l in self.degrees])
        return values.unsqueeze(2) * weight


class Denoising(nn.Module):
    """Force embedding and denoising head of `EquiformerV2`; the head is built like that of the forces.

    Args:
        config: hyper-parameters.
        grids: S2 grids by degree and order.
    """

    def __init__(self, config: ModelConfig, grids: Mapping[tuple[int, int], S2Grid]) -> None:
        super().__init__()
        self.force_embedding = ForceEmbedding(config.sphere_channels, config.lmax)
        head = config.force_block
        self.head = VectorHead(config, grids[head.lmax, head.mmax])
        initialize_weights(self, config.weight_init)

    def noise(self, x: Tensor, edges: EdgeGraph, backend: Backend) -> Tensor:
        """Displacements `[N, 3]` in units of the noise, from the normed features `[N, K, C]`."""
        noise: Tensor = self.head(x, edges, backend)
        return noise


def without_denoising(model: Network) -> Network:
    """The same network, with the same parameters and not a copy of them, without its parts for denoising."""
    if getattr(model, "dens", None) is None:
        return model
    plain = copy.copy(model)
    plain._modules = {**model._modules, "dens": None}
    assert isinstance(model.config, ModelConfig)
    plain.config = dataclasses.replace(model.config, dens=False)  # type: ignore[assignment]
    return plain
