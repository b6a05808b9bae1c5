"""A tiny trained-looking network and tiny slabs, for tests of what searches and trains around plans."""

from collections.abc import Sequence
from pathlib import Path

import torch
from ase.build import add_adsorbate, fcc111
from ase.constraints import FixAtoms
from torch_geometric.data import Data

from datasets_oc20 import LmdbWriter
from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint
from equiformer2.inference.atoms import atoms_to_data

TINY = {
    "num_layers": 2,
    "sphere_channels": 8,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 4,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 8,
    "lmax": 2,
    "mmax": 2,
    "grid_resolution": 6,
    "edge_channels": 8,
    "num_distance_basis": 8,
    "max_neighbors": 6,
    "max_radius": 4.0,
    "alpha_drop": 0.0,
    "drop_path_rate": 0.0,
}
NORMALIZERS = Normalizers(energy=Normalizer(-0.7, 2.0), forces=Normalizer(0.0, 2.5))


def tiny_model(seed: int = 0, **options: object) -> EquiformerV2:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EquiformerV2(ModelConfig(**{**TINY, **options})).eval()


def slab(sid: str, element: str = "Cu", height: float = 1.3, fixed: bool = True) -> Data:
    """O on a 1x1x3 fcc(111) slab; the two lower layers are held."""
    atoms = fcc111(element, (1, 1, 3), vacuum=6.0, periodic=True)
    add_adsorbate(atoms, "O", height, "fcc")
    layers = atoms.get_tags()
    if fixed:
        atoms.set_constraint(FixAtoms(mask=layers >= 2))
    atoms.set_tags([{0: 2, 1: 1, 2: 0, 3: 0}[layer] for layer in layers])
    data = atoms_to_data(atoms)
    data.sid = sid
    return data


def slabs() -> list[Data]:
    """Three systems, four structures."""
    return [slab("a"), slab("a", height=1.6), slab("b", "Pt"), slab("c", "Ni")]


def save_tiny(path: Path, seed: int = 0, **options: object) -> Path:
    """A native checkpoint of `tiny_model` with raw and (other) averaged weights."""
    model = tiny_model(seed, **options)
    save_checkpoint(
        path,
        model=model,
        raw_state=tiny_model(seed + 100, **options).state_dict(),
        averaged_state=model.state_dict(),
        normalizers=NORMALIZERS,
        energy_kind="adsorption",
        provenance={},
    )
    return path


def write_lmdb(path: Path, structures: Sequence[Data], labels: bool = True) -> Path:
    """An LMDB of `structures`, with invented labels."""
    with LmdbWriter(path, "adsorption" if labels else None) as writer:
        for number, data in enumerate(structures):
            data = data.clone()
            if labels:
                data.energy = torch.tensor([0.1 * number - 0.5])
                data.forces = torch.sin(data.pos + number)
            data.fid = number
            writer.write(data)
    return path
