"""The benchmark's input: OC20-like slabs, supercells of one of them, and frames of real OC20 relaxations."""

import io
import itertools
import lzma
import math
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch, Data

# Which of the four slabs (70 to 79 atoms, 20 neighbours each) each batch holds.
BATCHES = {"B1": (0,), "B4": (0, 1, 2, 3), "B16": (0, 1, 2, 3) * 4, "B64": (0, 1, 2, 3) * 16}
ROOT = Path(__file__).parents[1]
# Held out by the shipped checkpoint's training (configs/oc20_small.yaml).
OC20_SYSTEMS = ("random1000100", "random1000120", "random1000151", "random1000193")


def load_batch(name: str) -> Batch:
    """A data object that both implementations take, with made-up but fixed targets.

    Args:
        name: one of `BATCHES`; `OC20` for four frames of real relaxations; or `atoms-144` for the supercell
            with that many atoms.
    """
    if name == "OC20":
        return Batch.from_data_list([_from_atoms(atoms, index) for index, atoms in enumerate(oc20_frames())])
    if name.startswith("atoms-"):
        return Batch.from_data_list([_to_data(supercell(int(name.removeprefix("atoms-"))), 0)])
    stored = _stored()
    return Batch.from_data_list([_to_data(stored[index], index) for index in BATCHES[name]])


def load_atoms() -> Any:
    """The first slab as `ase.Atoms`, its lower layers held, for relaxations."""
    return _to_atoms(_stored()[0])


def _to_atoms(slab: dict[str, torch.Tensor]) -> Any:
    from ase import Atoms
    from ase.constraints import FixAtoms

    return Atoms(
        numbers=slab["numbers"].numpy(),
        positions=slab["positions"].numpy(),
        cell=slab["cell"].numpy(),
        pbc=slab["pbc"].bool().numpy(),
        tags=slab["tags"].numpy(),
        constraint=FixAtoms(mask=slab["fixed"].bool().numpy()),
    )


def save_starts(path: Path, count: int, seed: int) -> Path:
    """Save starts of relaxations: the four slabs in turn, adsorbate and free atoms displaced at random.

    Args:
        path: file to write; `load_starts` reads it in either environment.
        count: number of starts.
        seed: of the displacements.
    """
    generator = torch.Generator().manual_seed(seed)
    stored, starts = _stored(), []
    for number in range(count):
        slab = dict(stored[number % len(stored)])
        shape = slab["positions"].shape
        rattle = 0.03 * torch.randn(shape, generator=generator, dtype=slab["positions"].dtype)
        push = 0.3 * torch.randn(3, generator=generator, dtype=slab["positions"].dtype)
        moves = torch.where((slab["tags"] == 2)[:, None], push + rattle, rattle)
        slab["positions"] = slab["positions"] + torch.where(slab["fixed"].bool()[:, None], 0.0, moves)
        starts.append(slab)
    torch.save(starts, path)
    return path


def load_starts(path: str) -> list[Any]:
    """The starts of `save_starts` as `ase.Atoms`, their lower layers held."""
    return [_to_atoms(slab) for slab in torch.load(path, weights_only=True)]


def oc20_frames() -> list[Any]:
    """The first frame of four relaxations of OC20 (data/README.md) as `ase.Atoms`."""
    from ase.io import read

    frames = []
    for name in OC20_SYSTEMS:
        with lzma.open(ROOT / "data" / "oc20_trajs" / f"{name}.extxyz.xz", "rt") as file:
            # ASE's reader goes through a whole file, even for one frame.
            first = file.readline()
            lines = [first, *itertools.islice(file, 1 + int(first))]
        frames.append(read(io.StringIO("".join(lines)), format="extxyz"))
    return frames


def nearest_supercell(atoms: int) -> tuple[int, int]:
    """Repeats along both lattice vectors of the 16-atom piece, for about `atoms` atoms and no thin strips."""
    cells = max(1, round(atoms / 16))
    short = max(1, math.isqrt(cells))
    return short, max(1, round(cells / short))


def supercell_atoms(atoms: int) -> int:
    """The number of atoms of the supercell nearest to `atoms`."""
    first, second = nearest_supercell(atoms)
    return 16 * first * second


def supercell(atoms: int) -> dict[str, torch.Tensor]:
    """The first slab without its adsorbate, cut to a quarter (2 x 2 sites, 16 atoms) and repeated in the
    plane.

    The slab is an ordered alloy whose pattern repeats every two sites, so the quarter is a cell of it.

    Raises:
        ValueError: no supercell has that many atoms.
    """
    first, second = nearest_supercell(atoms)
    if 16 * first * second != atoms:
        raise ValueError(f"no supercell has {atoms} atoms; the nearest has {16 * first * second}")
    slab = _stored()[0]
    cell = slab["cell"].clone()
    fractional = slab["positions"] @ torch.linalg.inv(cell)
    kept = (slab["tags"] != 2).nonzero().squeeze(1)
    # Half a site of margin: atoms near the edge of the cell belong to the site that they sit on.
    site = ((fractional[kept, :2] + 0.125) % 1.0) < 0.5
    kept = kept[site.all(1)]
    positions = slab["positions"][kept]
    cell[:2] /= 2
    shifts = [i * cell[0] + j * cell[1] for i in range(first) for j in range(second)]
    repeats = len(shifts)
    cell[0] *= first
    cell[1] *= second
    return {
        "positions": torch.cat([positions + shift for shift in shifts]),
        "cell": cell,
        "pbc": slab["pbc"],
        "numbers": slab["numbers"][kept].repeat(repeats),
        "tags": slab["tags"][kept].repeat(repeats),
        "fixed": slab["fixed"][kept].repeat(repeats),
    }


def _stored() -> list[dict[str, torch.Tensor]]:
    return torch.load(Path(__file__).with_name("structures.pt"), weights_only=True)


def _from_atoms(atoms: Any, index: int) -> Data:
    structure = {
        "numbers": torch.as_tensor(atoms.numbers),
        "positions": torch.as_tensor(atoms.positions),
        "cell": torch.as_tensor(atoms.cell.array),
        "pbc": torch.as_tensor(atoms.pbc),
        "tags": torch.as_tensor(atoms.get_tags()),
        "fixed": torch.zeros(len(atoms), dtype=torch.bool),
    }
    return _to_data(structure, index)


def _to_data(structure: dict[str, torch.Tensor], index: int) -> Data:
    natoms = len(structure["numbers"])
    return Data(
        pos=structure["positions"].float(),
        cell=structure["cell"].float().view(1, 3, 3),
        pbc=structure["pbc"].bool().view(1, 3),
        atomic_numbers=structure["numbers"].long(),
        tags=structure["tags"].long(),
        fixed=structure["fixed"].bool(),
        natoms=natoms,
        energy=torch.tensor([0.3 * (index + 1)]),
        forces=torch.linspace(-1, 1, 3 * natoms).view(natoms, 3),
    )
