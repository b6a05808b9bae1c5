"""Invariants of every router: symmetries, batches, ties, extensivity, smoothness."""

import numpy as np
import pytest
import torch
from ase import Atoms
from routers import LOCAL_MODES, SCORED, local, routers
from routing_helpers import as_data, exact_model, masks, molecule_data, slab_atoms
from torch_geometric.data import Batch, Data

from equiformer2.pruning.routing import ActiveRegion, BaseRouter, CountingRouter
from equiformer2.symmetry import SYMMETRIES, assert_symmetries

ROUTERS = routers()
every = pytest.mark.parametrize("name", ROUTERS)
LOCAL = [name for name in ROUTERS if name.rsplit(" ", 1)[-1] in LOCAL_MODES] + [
    "context only",
    "remove tag 0",
]


def structures() -> list[Data]:
    """An ideal slab, full of equivalent atoms, and a distorted one."""
    return [as_data(slab_atoms(0.0, "O")), as_data(slab_atoms(0.1))]


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return exact_model()


@pytest.mark.one_in(4)
@every
def test_symmetries(name: str, model) -> None:  # type: ignore[no-untyped-def]
    router = ROUTERS[name]
    # A super-node does not double with the cell, and hexagonal cells can be reduced in more than one way.
    lost = ("supercell", "lattice vectors") if name.startswith("supernode") else ()
    kept = [symmetry for symmetry in SYMMETRIES if symmetry not in lost]
    with torch.no_grad():
        assert_symmetries(
            lambda batch: router(model, batch), structures(), dict.fromkeys(kept, 1e-9), trials=1
        )


@every
def test_something_is_skipped_and_something_is_not(name: str, model) -> None:  # type: ignore[no-untyped-def]
    recorder, batch = CountingRouter(ROUTERS[name]), Batch.from_data_list(structures())
    with torch.no_grad():
        out, dense = recorder(model, batch), model(batch)
    achieved = recorder.computed_shares(model.config)
    assert 0.02 < achieved.edge_sparsity < 0.98
    assert achieved.macs < 0.99
    assert (out["energy"] - dense["energy"]).abs().max() > 1e-6
    assert (out["forces"] - dense["forces"]).abs().max() > 1e-6


def orbits(atoms: Atoms) -> list[list[int]]:
    """O on top of one of four atoms per layer: those of a layer are equivalent at equal distance from it."""
    lateral = atoms.copy()
    lateral.positions[:, 2] = 0
    distance = lateral.get_all_distances(mic=True)[-1]
    found: dict[tuple[float, float], list[int]] = {}
    for atom, key in enumerate(zip(atoms.positions[:, 2].round(6), distance.round(6), strict=True)):
        found.setdefault(key, []).append(atom)
    assert len(found) < len(atoms)
    return list(found.values())


@pytest.mark.parametrize("name", [n for n in ROUTERS if n.split()[0] not in ("remove", "supernode", "edge")])
def test_equivalent_atoms_stay_together(name: str, model) -> None:  # type: ignore[no-untyped-def]
    atoms = slab_atoms(0.0, "O")
    equivalent = orbits(atoms)
    # Noise below the tolerance does not part them.
    for noise in (0.0, 1e-7):
        atoms.positions += noise * np.random.default_rng(1).standard_normal(atoms.positions.shape)
        for mask in masks(model, ROUTERS[name], as_data(atoms)):
            for members in equivalent:
                assert torch.allclose(mask[members].double(), mask[members[0]].double(), atol=1e-4)


@pytest.mark.parametrize("name", LOCAL)
def test_a_far_fragment_changes_nothing(name: str, model) -> None:  # type: ignore[no-untyped-def]
    router, first = ROUTERS[name], molecule_data()
    second = molecule_data()
    second.pos = second.pos.flip(0)
    both = Data(
        pos=torch.cat((first.pos, second.pos + 60.0)),
        **{key: torch.cat((first[key], second[key])) for key in ("atomic_numbers", "tags", "fixed")},
        cell=first.cell,
        pbc=first.pbc,
        natoms=18,
    )
    with torch.no_grad():
        apart = router(model, Batch.from_data_list([first, second]))
        together = router(model, Batch.from_data_list([both]))
    torch.testing.assert_close(together["energy"], apart["energy"].sum(0, keepdim=True), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together["forces"], apart["forces"], rtol=1e-9, atol=1e-9)


# No edge enters or leaves: only gates change.
UNCUT = exact_model(max_radius=30.0, max_neighbors=40)
SMOOTH = {
    name: local(make(), UNCUT, [Batch.from_data_list([molecule_data()])], "smooth")
    for name, make in SCORED.items()
}


def changes_of_slope(router: BaseRouter, model, step: float, around: float) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Largest change of the slope of the energy within `step`, and where along a path."""
    path = around + step * torch.arange(-10, 11, dtype=torch.float64)
    direction = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    images = []
    for t in path:
        images.append(molecule_data())
        images[-1].pos = images[-1].pos + t * direction
    with torch.no_grad():
        energies = router(model, Batch.from_data_list(images))["energy"]
    changes = energies.diff(n=2).abs() / step
    return float(changes.max()), float(path[changes.argmax() + 1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SCORED)
def test_smooth_mode_has_no_jumps_and_no_kinks(name: str) -> None:
    """Closer and closer to the sharpest bend of the energy, the slope changes less and less."""
    step, around, found = 0.02, 0.0, []
    for _ in range(6):
        change, around = changes_of_slope(SMOOTH[name], UNCUT, step, around)
        found.append(change)
        step /= 4
    # A quarter each time; a kink would not change, a jump would grow.
    assert found[-1] < 0.3 * found[-2]
    assert found[-1] < 0.1 * max(found)


@pytest.mark.parametrize("name", [name for name in SCORED if name not in ("edge pruner", "static")])
def test_gates_open_and_shut_on_the_way(name: str) -> None:
    direction = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gates = []
    for t in np.linspace(-0.6, 0.6, 13):
        data = molecule_data()
        data.pos = data.pos + t * direction
        gates.append(torch.stack(masks(UNCUT, SMOOTH[name], data)))
    shut = torch.stack(gates) == 0
    assert (shut.any(0) & ~shut.all(0)).any()


@every
def test_free_atoms_and_adsorbate_are_read_out(name: str, model) -> None:  # type: ignore[no-untyped-def]
    data = as_data(slab_atoms(0.1))
    # Tags and held atoms are two things: a free atom with tag 0, a held one with tag 1.
    data.fixed[0], data.fixed[9] = False, True
    with torch.no_grad():
        out = ROUTERS[name](model, Batch.from_data_list([data]))
    assert len(out["forces"]) == len(data.pos)
    wanted = ~data.fixed | (data.tags > 0)
    assert (out["forces"][wanted].norm(dim=1) > 0).all()
    router = ROUTERS[name]
    if isinstance(router, ActiveRegion):
        if router.mode == "context_only":
            for mask in masks(model, router, data):
                assert torch.equal(mask, wanted)
        else:
            _, kept = router.reduce(Batch.from_data_list([data]))
            assert torch.equal(kept, wanted.nonzero().squeeze(1))
            assert not out["forces"][~wanted].any()


@every
def test_equivalent_atoms_feel_equal_forces(name: str, model) -> None:  # type: ignore[no-untyped-def]
    """Also of routers that choose edges or put one node for many: forces of an orbit are turned, no more."""
    atoms = slab_atoms(0.0, "O")
    with torch.no_grad():
        forces = ROUTERS[name](model, Batch.from_data_list([as_data(atoms)]))["forces"].norm(dim=1)
    sizes = []
    for orbit in orbits(atoms):
        assert forces[orbit].max() - forces[orbit].min() < 1e-9
        sizes.append(len(orbit))
    assert max(sizes) > 1


@every
@pytest.mark.parametrize("held", [False, True], ids=["one atom", "all held"])
def test_structures_with_little_in_them(name: str, held: bool, model) -> None:  # type: ignore[no-untyped-def]
    atoms = slab_atoms(0.1) if held else Atoms("O", cell=[20.0, 20.0, 20.0], pbc=True)
    data = as_data(atoms)
    data.fixed = torch.full_like(data.fixed, held)
    with torch.no_grad():
        out = ROUTERS[name](model, Batch.from_data_list([data]))
    assert torch.isfinite(out["energy"]).all()
    assert torch.isfinite(out["forces"]).all()
