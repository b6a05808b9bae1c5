"""The benchmark's structures."""

import pytest
import torch
import yaml

from benchmarks.benchmark_structures import (
    BATCHES,
    ROOT,
    load_atoms,
    load_batch,
    nearest_supercell,
    supercell,
    supercell_atoms,
)
from benchmarks.network_sizes import SIZES
from equiformer2 import ModelConfig
from equiformer2.checkpoint.reference import config_from_reference
from equiformer2.graph import radius_graph


@pytest.mark.parametrize("size", ["31M", "83M", "153M"])
def test_sizes_are_the_papers_presets(size: str) -> None:
    assert config_from_reference(SIZES[size]) == ModelConfig.preset(size)


def test_small_is_the_shipped_small_network() -> None:
    written = yaml.safe_load((ROOT / "configs" / "oc20_small.yaml").read_text())["model"]
    # The reference always uses 600 Gaussians.
    wanted = ModelConfig(**(written | {"num_distance_basis": 600}))
    assert config_from_reference(SIZES["small"]) == wanted


@pytest.mark.parametrize("wanted", [20, 75, 300, 2500, 10000])
def test_supercells_come_close_to_the_wanted_number(wanted: int) -> None:
    assert supercell_atoms(wanted) == pytest.approx(wanted, rel=0.25)
    first, second = nearest_supercell(wanted)
    assert second <= 2 * first + 1


def test_supercell_is_the_same_crystal() -> None:
    """Every image of an atom has the surroundings of the original."""
    piece, large = supercell(16), supercell(96)
    assert len(large["numbers"]) == 96
    density = [len(s["numbers"]) / torch.linalg.det(s["cell"]).item() for s in (piece, large)]
    assert density[0] == pytest.approx(density[1])
    distances = []
    for structure in (piece, large):
        graph = radius_graph(
            structure["positions"],
            structure["cell"].view(1, 3, 3),
            structure["pbc"].bool().view(1, 3),
            torch.tensor([len(structure["numbers"])]),
            max_radius=6.0,
            max_neighbors=20,
            strict=True,
        )
        distances.append(graph.distances.view(-1, 20))
    torch.testing.assert_close(distances[1], distances[0].repeat(6, 1))
    # The slab's shortest bond: cut out and repeated without collisions at the seams.
    assert distances[0].min() > 2.2


def test_a_number_of_atoms_without_supercell_is_refused() -> None:
    with pytest.raises(ValueError, match="the nearest has 16"):
        supercell(20)


def test_batches_hold_what_their_names_say() -> None:
    assert [len(BATCHES[name]) for name in ("B1", "B4", "B16", "B64")] == [1, 4, 16, 64]
    assert len(load_batch("B4").pos) == 300
    assert len(load_batch("atoms-32").pos) == 32
    real = load_batch("OC20")
    assert real.num_graphs == 4
    assert real.atomic_numbers.max() < 90


def test_relaxed_structure_holds_its_lower_layers() -> None:
    atoms = load_atoms()
    held = atoms.constraints[0].get_indices()
    assert len(atoms) == 73
    assert 0 < len(held) < 73
    assert atoms.positions[held, 2].max() < atoms.positions[:, 2].mean()
