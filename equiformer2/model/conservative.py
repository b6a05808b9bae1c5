"""Forces and stress as derivatives of the energy (`ModelConfig.forces: gradient`).

The energy depends on positions and cell through the edge vectors r alone, so one derivative g_e = dE/dr_e per
edge gives both: r_e = x_j - x_i + shift @ cell is linear in positions and cell, and under a strain (1 + s) it
becomes r_e (1 + s). Hence

    F_k = sum of g over the edges into k - sum of g over the edges out of k
    stress = 1/V dE/ds = 1/V sum over edges of the symmetric part of r_e g_e^T

which is what displacing every position and the cell would give, and the forces of a structure sum to zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.kernels.aggregate import at_least_float32
from equiformer2.kernels.rows import sum_rows
from equiformer2.model.config import ModelConfig


def check_config(config: ModelConfig, purpose: str) -> None:
    """Raise `InputError` for a network with gradient forces, which `purpose` (a noun) does not take."""
    if config.forces == "gradient":
        raise InputError(
            f"{purpose} needs a network with direct forces or none: "
            "this one's are the gradient of its energy (model.forces)"
        )


def outside_inference_mode(batch: Batch | Data, graph: RadiusGraph | None) -> tuple[Data, RadiusGraph | None]:
    """Copy the inputs of the network in `batch`, and `graph`, without tensors from inference mode.

    Autograd does not take those, and Lightning validates in that mode.
    """

    def usable(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    names = ("pos", "atomic_numbers", "cell", "pbc", "natoms")
    batch = Data(**{name: usable(batch[name]) for name in names})
    if graph is not None:
        graph = RadiusGraph(**{name: usable(value) for name, value in vars(graph).items()})
    return batch, graph


def with_derivatives(
    energies: Callable[[RadiusGraph], Tensor],
    graph: RadiusGraph,
    structure: Tensor,
    dtype: torch.dtype,
    lattice: tuple[Tensor, Tensor] | None,
    differentiable: bool,
) -> dict[str, Tensor]:
    """Run a network for its energies, and differentiate them.

    Args:
        energies: from edges, whose vectors require gradients, to energies `[B]`.
        graph: the edges; no tensor of it is from inference mode.
        structure: `[N]` index of the structure of each atom.
        dtype: of the network.
        lattice: cell `[B, 3, 3]` Å and pbc `[B, 3]` for the stress, None for no stress.
        differentiable: let the outputs be differentiated: by parameters, and by positions and cell if the
            graph was made of tensors that require it.

    Returns:
        `energy [B]`, `forces [N, 3]` in units of the energy per Å and, with `lattice`, `stress [B, 3, 3]` in
        units of the energy per Å^3: symmetric, positive where the structure would shrink (ASE's sign). It is
        NaN for structures that are not periodic in all three directions, which have no volume.
    """
    with torch.enable_grad():
        vectors = graph.in_precision(dtype).vectors
        if not vectors.requires_grad:
            vectors = vectors.detach().requires_grad_()
        distances = torch.linalg.vector_norm(vectors, dim=1)
        energy = energies(dataclasses.replace(graph, vectors=vectors, distances=distances))
        (slope,) = torch.autograd.grad(energy.sum(), vectors, create_graph=differentiable)
        slope = at_least_float32(slope)
        source, target = graph.edge_index
        num_atoms = len(structure)
        out = {
            "energy": energy,
            "forces": sum_rows(slope, target, num_atoms) - sum_rows(slope, source, num_atoms),
        }
        if lattice is not None:
            cell, pbc = lattice
            products = vectors.to(slope.dtype).unsqueeze(2) * slope.unsqueeze(1)
            virial = sum_rows(products, structure[target], len(cell))
            volume = torch.linalg.det(cell.to(virial.dtype)).abs()
            periodic = pbc.all(dim=1)
            # A cell without volume must not put a NaN into the gradients of the others.
            volume = torch.where(periodic, volume, 1.0)[:, None, None]
            stress = 0.5 * (virial + virial.transpose(1, 2)) / volume
            out["stress"] = torch.where(periodic[:, None, None], stress, torch.nan)
    return out if differentiable else {name: value.detach() for name, value in out.items()}
