"""A small exact network and tagged structures for the tests of routers."""

from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from ase.constraints import FixAtoms
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.graph import RadiusGraph
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.routing import BaseRouter

# The gate activation needs no grid and whole shells no choice: only rounding breaks symmetries.
EXACT: dict[str, Any] = {
    "num_layers": 4,
    "sphere_channels": 8,
    "attn_hidden_channels": 6,
    "num_heads": 2,
    "attn_alpha_channels": 4,
    "attn_value_channels": 3,
    "ffn_hidden_channels": 8,
    "edge_channels": 7,
    "lmax": 2,
    "mmax": 1,
    "grid_resolution": None,
    "use_gate_act": True,
    "use_grid_mlp": False,
    "max_radius": 6.0,
    "max_neighbors": 12,
    "enforce_max_neighbors_strictly": False,
    "alpha_drop": 0.0,
    "drop_path_rate": 0.0,
    "num_distance_basis": 16,
}


def exact_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> EquiformerV2:
    """Random weights, none of them trivial, attention weights well apart; evaluation mode."""
    model = EquiformerV2(ModelConfig(**(EXACT | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(0.3 * noise)
            elif "alpha_dot" in name:
                parameter.copy_(noise)
            else:
                is_embedding = "embedding.weight" in name
                parameter.copy_(noise if is_embedding else noise / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def as_data(atoms: Atoms, dtype: torch.dtype = torch.float64) -> Data:
    """OC20's tags as ASE's tags; held atoms by `FixAtoms`."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        fixed[constraint.index] = True
    return Data(
        pos=torch.tensor(atoms.get_positions(), dtype=dtype),
        atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.int64),
        cell=torch.tensor(atoms.cell[:], dtype=dtype).view(1, 3, 3),
        pbc=torch.tensor(atoms.pbc).view(1, 3),
        natoms=len(atoms),
        tags=torch.tensor(atoms.get_tags(), dtype=torch.int64),
        fixed=torch.tensor(fixed),
    )


def slab_atoms(
    rattle: float = 0.0, adsorbate: str | None = "OH", size: tuple[int, int, int] = (2, 2, 3)
) -> Atoms:
    """Cu(111), the two lower layers held."""
    atoms = fcc111("Cu", size, vacuum=5.0, periodic=True)
    below = atoms.get_tags() > 1
    atoms.set_tags(np.where(below, 0, 1))
    if adsorbate is not None:
        what = molecule(adsorbate) if len(adsorbate) > 1 else Atoms(adsorbate)
        what.set_tags(2)
        add_adsorbate(atoms, what, 1.9, "ontop")
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 0))
    if rattle:
        atoms.positions += rattle * np.random.default_rng(0).standard_normal(atoms.positions.shape)
    return atoms


def molecule_data(dtype: torch.dtype = torch.float64) -> Data:
    """Nine atoms at random places; tags and held atoms as if it were a slab."""
    points = 1.7 * torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    atoms = Atoms("CuCuPtOCHNCuPt", positions=points.numpy(), tags=[0, 0, 1, 2, 2, 1, 0, 1, 0])
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 0))
    return as_data(atoms, dtype)


class Watched(BaseRouter):
    """A router that keeps the decisions of another one."""

    def __init__(self, router: BaseRouter) -> None:
        self.router = router
        self.decisions: list[Decision] = []

    def start(self, batch: Batch, graph: RadiusGraph, num_blocks: int) -> Any:
        self.routing = self.router.start(batch, graph, num_blocks)
        self.observes_attention = self.routing.observes_attention
        self.decisions = []
        return self

    def decide(self, state: BlockState) -> Decision:
        self.decisions.append(self.routing.decide(state))
        return self.decisions[-1]

    def settings(self) -> dict[str, Any]:
        return {}


def decisions(model: EquiformerV2, router: BaseRouter, *structures: Data) -> list[Decision]:
    """Of all blocks."""
    watched = Watched(router)
    with torch.no_grad():
        model(Batch.from_data_list(list(structures)), active=watched)
    return watched.decisions


def masks(model: EquiformerV2, router: BaseRouter, *structures: Data) -> list[Tensor]:
    """`[N]` of the blocks that skip atoms."""
    return [d.atoms for d in decisions(model, router, *structures) if d.atoms is not None]
