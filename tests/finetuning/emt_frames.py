"""Frames labelled by ASE's EMT potential: adsorbates on slabs, rattled; total energies."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from torch_geometric.data import Data

from datasets_oc20 import LmdbWriter
from datasets_oc20.constraints import held_atoms
from equiformer2.inference import atoms_to_data

SYSTEMS = tuple((metal, adsorbate) for metal in ("Cu", "Pt", "Ni") for adsorbate in ("O", "H"))


def labelled(atoms: Atoms) -> Data:
    """The data object of a structure with EMT's energy (eV) and forces (eV/Å)."""
    atoms.calc = EMT()
    data = atoms_to_data(atoms, notify=False)
    data.energy = np.array([atoms.get_potential_energy()])
    data.forces = atoms.get_forces(apply_constraint=False).astype(np.float32)
    return data


def emt_frames(
    systems: Sequence[tuple[str, str]] = SYSTEMS, frames: int = 4, size: tuple[int, int, int] = (1, 1, 3)
) -> list[Data]:
    """Rattled frames of (metal, adsorbate) systems, each with its own `sid`."""
    random = np.random.default_rng(0)
    found = []
    for metal, adsorbate in systems:
        slab = fcc111(metal, size, vacuum=5.0)
        slab.set_constraint(FixAtoms(mask=slab.get_tags() == size[2]))
        add_adsorbate(slab, adsorbate, 1.2, "fcc")
        for number in range(frames):
            atoms = slab.copy()
            free = ~held_atoms(atoms)
            atoms.positions[free] += random.normal(0, 0.08, (int(free.sum()), 3))
            data = labelled(atoms)
            data.sid, data.fid = f"{metal}-{adsorbate}", number
            found.append(data)
    return found


def write_frames(path: Path, frames: Sequence[Data], energy_kind: str | None = "total") -> Path:
    """Write them to an LMDB file."""
    with LmdbWriter(path, energy_kind) as writer:
        for frame in frames:
            writer.write(frame)
    return path
