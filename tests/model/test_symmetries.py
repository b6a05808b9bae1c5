"""Symmetries of the network on random and real structures, in float32 and float64."""

from pathlib import Path

import pytest
import torch
from ase import Atoms
from ase.io import read
from model_helpers import as_data, batch_of, random_model, slab, small_config, water
from torch_geometric.data import Data

from equiformer2.symmetry import SYMMETRIES, assert_symmetries, check_symmetries

DATA = Path(__file__).parents[2] / "data" / "oc20_trajs"

# Keeping the whole shell at the cut: which of two neighbours at equal distance a strict cut keeps depends on
# the orientation, and the images of one atom tie in every small cell (docs/graph.md).
WHOLE_SHELLS = {"max_neighbors": 20, "enforce_max_neighbors_strictly": False}
# The gate activation needs no grid: only rounding is left.
EXACT = small_config(lmax=3, mmax=2, use_gate_act=True, use_grid_mlp=False, **WHOLE_SHELLS)
# Aliasing of the sphere grids is the only error of the default architecture.
FINE_GRID = small_config(grid_resolution=40, **WHOLE_SHELLS)
ROUNDING = {torch.float32: 3e-5, torch.float64: 1e-11}


def random_structures(dtype: torch.dtype) -> list[Data]:
    """A crowded skewed cell, one that is periodic along two axes, and a molecule."""
    generator = torch.Generator().manual_seed(5)
    structures = []
    for pbc in ([True, True, True], [True, True, False]):
        cell = 5.0 * torch.eye(3, dtype=torch.float64)
        cell = cell + torch.rand(3, 3, generator=generator, dtype=torch.float64)
        fractional = torch.rand(6, 3, generator=generator, dtype=torch.float64)
        numbers = torch.randint(1, 80, (6,), generator=generator).tolist()
        atoms = Atoms(numbers, scaled_positions=fractional.numpy(), cell=cell.numpy(), pbc=pbc)
        structures.append(as_data(atoms, dtype))
    return [*structures, water(dtype)]


def real_structures(dtype: torch.dtype) -> list[Data]:
    """Relaxed DFT structures of OC20."""
    structures = []
    for name in ("random1447590", "random1000120"):
        atoms = read(DATA / f"{name}.extxyz.xz", index=-1, format="extxyz")
        assert isinstance(atoms, Atoms)
        structures.append(as_data(atoms, dtype))
    return structures


SOURCES = {"random": random_structures, "real": real_structures}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@dtypes
@pytest.mark.parametrize("source", SOURCES)
def test_all_symmetries_without_a_grid(source: str, dtype: torch.dtype) -> None:
    model = random_model(EXACT, dtype)
    with torch.no_grad():
        report = assert_symmetries(model, SOURCES[source](dtype), ROUNDING[dtype], trials=1)
    assert set(report.errors) == set(SYMMETRIES)
    assert report.errors["repeated call"].forces_max == 0.0


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        ("random", torch.float64),
        pytest.param("real", torch.float64, marks=pytest.mark.slow),
        pytest.param("random", torch.float32, marks=pytest.mark.slow),
        pytest.param("real", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_all_symmetries_with_the_separable_s2_activation(source: str, dtype: torch.dtype) -> None:
    model = random_model(FINE_GRID, dtype)
    tolerance = dict.fromkeys(SYMMETRIES, ROUNDING[dtype]) | {"rotation": max(1e-6, ROUNDING[dtype])}
    with torch.no_grad():
        assert_symmetries(model, SOURCES[source](dtype), tolerance, trials=1)


def test_a_finer_grid_is_closer_to_equivariance() -> None:
    errors = []
    for resolution in (8, 14, 20):
        config = small_config(lmax=3, mmax=2, grid_resolution=resolution, **WHOLE_SHELLS)
        model = random_model(config, torch.float64)
        data = batch_of(slab(torch.float64))
        with torch.no_grad():
            report = check_symmetries(model, data, symmetries=["rotation"], trials=1)
        errors.append(report.errors["rotation"].forces_rms or 0.0)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_mirror_images_differ() -> None:
    """Equivariant under rotations, not under reflections, as the reference: SO(3), not O(3)."""
    model, data = random_model(EXACT, torch.float64), slab(torch.float64)
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0])).double()
    mirrored = data.clone()
    mirrored.pos, mirrored.cell = data.pos @ mirror, data.cell @ mirror
    with torch.no_grad():
        difference = model(mirrored)["forces"] - model(data)["forces"] @ mirror
    assert difference.abs().max() > 1e-3
