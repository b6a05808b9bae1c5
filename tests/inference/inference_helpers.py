"""An analytical stand-in for a trained network, and small slabs for it."""

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

SYSTEMS = [("Cu", 0), ("Ag", 1), ("Pt", 2), ("Ni", 3)]
"""Arguments of `slab`."""
SMALL = {
    "num_layers": 1,
    "sphere_channels": 16,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 8,
    "ffn_hidden_channels": 16,
    "lmax": 2,
    "mmax": 1,
    "grid_resolution": 8,
    "edge_channels": 16,
    "num_distance_basis": 32,
    "max_radius": 6.0,
}
"""Sizes of a small network."""


def slab(metal: str, seed: int, adsorbate: str = "O") -> Atoms:
    atoms = fcc111(metal, (2, 2, 2), vacuum=7.0, periodic=True)
    add_adsorbate(atoms, adsorbate, 1.4, "fcc")
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 2))
    atoms.positions += np.random.default_rng(seed).normal(0, 0.05, atoms.positions.shape)
    atoms.calc = EMT()
    return atoms


class KindedEMT(EMT):
    """Effective medium theory that states a kind of energy, as a trained model does."""

    def __init__(self, energy_kind: str | None) -> None:
        super().__init__()
        self.energy_kind = energy_kind
        self.calls = 0

    def calculate(self, *args: object, **kwargs: object) -> None:
        self.calls += 1
        super().calculate(*args, **kwargs)
