"""Recognition of layer numbers that ASE's slab builders keep as tags."""

import numpy as np
from ase import Atoms


def surface_height(atoms: Atoms) -> np.ndarray:
    """`[N]` height in Å along the normal of the first two lattice vectors (z where there are none)."""
    normal = np.cross(atoms.cell[0], atoms.cell[1])
    length = np.linalg.norm(normal)
    if length < 1e-9:
        return atoms.positions[:, 2].copy()
    normal = normal / length
    return np.asarray(atoms.positions @ (normal if normal @ atoms.cell[2] >= 0 else -normal))


def are_ase_layers(atoms: Atoms, tags: np.ndarray, fixed: np.ndarray) -> bool:
    """Tell whether tags look like ASE's layer numbers: 1 on top, 2 below, …, and 0 for free atoms above.

    Args:
        atoms: the structure.
        tags: `[N]`.
        fixed: `[N]` bool, atoms that are held.
    """
    layers = np.unique(tags[tags > 0])
    if len(layers) < 2 or tags.min() < 0 or not np.array_equal(layers, np.arange(1, len(layers) + 1)):
        return False
    untagged = tags == 0
    if fixed[untagged].any():
        return False
    height = surface_height(atoms)
    means = np.array([height[tags == layer].mean() for layer in layers])
    on_top = not untagged.any() or height[untagged].mean() > means[0]
    return bool((np.diff(means) < 0).all() and on_top)
