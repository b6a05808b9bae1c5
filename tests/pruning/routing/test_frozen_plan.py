"""One plan for a stretch of a relaxation, routers in the calculator, routers in files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from ase.optimize import FIRE
from routers import routers
from routing_helpers import Watched, as_data, exact_model, molecule_data, slab_atoms
from torch_geometric.data import Batch

from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor, relax
from equiformer2.pruning.routing import (
    ActiveRegion,
    AtomPruner,
    BaseRouter,
    DistanceRouter,
    EdgePruner,
    FrozenPlan,
    StaticRouter,
    load_router,
    save_router,
)
from equiformer2.pruning.routing.batch_geometry import FAR, BatchGeometry
from equiformer2.pruning.routing.router_files import router_to_dict


def batch_of(shift: float = 0.0, rattle: float = 0.1, adsorbate: str = "OH") -> Batch:
    data = as_data(slab_atoms(rattle, adsorbate))
    data.pos = (
        data.pos + shift * torch.randn(data.pos.shape, generator=torch.Generator().manual_seed(1)).double()
    )
    return Batch.from_data_list([data])


def chosen(model, plan: FrozenPlan, batch: Batch) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    watched = Watched(plan)
    with torch.no_grad():
        model(batch, active=watched)
    return [d.atoms for d in watched.decisions if d.atoms is not None]


def test_the_plan_holds_and_is_made_anew() -> None:
    model, plan = exact_model(), FrozenPlan(AtomPruner(0.5), replan_every=3)
    first = chosen(model, plan, batch_of())
    fresh = chosen(model, FrozenPlan(AtomPruner(0.5)), batch_of(0.15))
    assert any((a != b).any() for a, b in zip(first, fresh, strict=True))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, chosen(model, plan, batch_of(0.15)), strict=True))
    assert plan.plans == 1
    assert all(torch.equal(a, b) for a, b in zip(fresh, chosen(model, plan, batch_of(0.15)), strict=True))
    assert plan.plans == 2


def test_another_structure_gets_its_own_plan() -> None:
    model, plan = exact_model(), FrozenPlan(StaticRouter(0.5), replan_every=100, max_move=0.5)
    chosen(model, plan, batch_of())
    wrapped = batch_of()
    wrapped.pos[3] += wrapped.cell[0, 0] - 2 * wrapped.cell[0, 1]
    chosen(model, plan, wrapped)
    assert plan.plans == 1
    for number, other in enumerate((batch_of(adsorbate="CO"), batch_of(), batch_of(1.0)), start=2):
        chosen(model, plan, other)
        assert plan.plans == number
    retagged = batch_of(1.0)
    retagged.tags[0] = 1
    chosen(model, plan, retagged)
    assert plan.plans == 5
    plan.reset()
    chosen(model, plan, retagged)
    assert plan.plans == 6


def test_hysteresis_keeps_the_choice_of_the_last_plan() -> None:
    model = exact_model()
    changes = []
    for hysteresis in (0.0, 0.5):
        plan = FrozenPlan(AtomPruner(0.5, similar=0.0, hysteresis=hysteresis), replan_every=1)
        last, count = None, 0
        for shift in np.linspace(0, 0.2, 8):
            masks = torch.stack(chosen(model, plan, batch_of(float(shift))))
            count += 0 if last is None else int((masks != last).sum())
            last = masks
        changes.append(count)
    assert changes[0] > changes[1]


def test_energies_along_a_frozen_path_have_no_jumps() -> None:
    """A plan per step would jump where an atom passes the threshold."""
    model = exact_model(max_radius=30.0, max_neighbors=40)
    batch = Batch.from_data_list([molecule_data()])
    direction = torch.randn(9, 3, generator=torch.Generator().manual_seed(2)).double()
    scores = 1 - BatchGeometry.from_batch(batch, model.build_graph(batch)).to_adsorbate / FAR
    router = DistanceRouter(float(scores[scores < 1].median()), mode="threshold")

    def largest_step(router: BaseRouter) -> float:
        energies = []
        for t in np.linspace(-0.02, 0.02, 41):
            moved = batch.clone()
            moved.pos = batch.pos + t * direction
            with torch.no_grad():
                energies.append(float(router(model, moved)["energy"]))
        return float(np.abs(np.diff(energies)).max())

    assert largest_step(FrozenPlan(router, replan_every=1000)) < 0.1 * largest_step(router)


def test_edges_keep_their_identity_when_others_come_and_go() -> None:
    model = exact_model()
    plan = FrozenPlan(EdgePruner(0.4), replan_every=10)
    watched = Watched(plan)
    seen = {}
    for shift in (0.0, 0.2):
        batch = batch_of(shift)
        graph = model.build_graph(batch)
        with torch.no_grad():
            model(batch, graph=graph, active=watched)
        keys = torch.cat((graph.edge_index, graph.cell_offsets.T)).T.tolist()
        for key, kept in zip(map(tuple, keys), watched.decisions[1].edges.tolist(), strict=True):
            # Unknown edges are computed.
            assert kept == (seen.get(key, True) if shift else kept)
            if not shift:
                seen[key] = kept
    assert plan.plans == 1
    assert not all(seen.values())


@pytest.fixture
def checkpoint(tmp_path: Path):  # type: ignore[no-untyped-def]
    model = exact_model(torch.float32)
    path = tmp_path / "model.pt"
    one = Normalizer(0.0, 1.0)
    save_checkpoint(path, model=model, raw_state=model.state_dict(), averaged_state=None,
                    normalizers=Normalizers(energy=one, forces=one), energy_kind="adsorption",
                    provenance={})  # fmt: skip
    return load_checkpoint(path)


def test_the_calculator_runs_with_a_router(checkpoint) -> None:  # type: ignore[no-untyped-def]
    atoms = slab_atoms(0.1)
    dense = EquiformerV2Calculator(checkpoint)
    plan = FrozenPlan(StaticRouter(0.5), replan_every=4)
    routed = EquiformerV2Calculator(checkpoint, router=plan)
    assert np.abs(routed.get_forces(atoms) - dense.get_forces(atoms)).max() > 1e-6
    data = as_data(atoms, torch.float32)
    expected = Predictor(checkpoint, router=StaticRouter(0.5)).predict(data)
    np.testing.assert_allclose(routed.get_forces(atoms), expected["forces"].numpy(), atol=1e-4)
    # An energy is that of all atoms, in whatever order it and the forces are asked for.
    forces, energy = routed.get_forces(atoms), routed.get_potential_energy(atoms)
    assert energy == pytest.approx(dense.get_potential_energy(atoms), abs=1e-5)
    assert abs(energy - float(expected["energy"])) > 1e-5
    assert np.array_equal(routed.get_forces(atoms), forces)
    routed.reset()
    assert routed.get_potential_energy(atoms) == energy
    assert set(routed.results) == {"energy", "free_energy"}
    assert np.array_equal(routed.get_forces(atoms), forces)
    assert set(routed.results) == {"energy", "free_energy", "forces"}
    atoms.calc = routed
    FIRE(atoms, logfile=None, maxstep=0.02).run(fmax=1e-9, steps=6)
    assert plan.plans == 2
    # Tags and held atoms decide: results of other ones are not kept.
    before = atoms.get_forces().copy()
    atoms.set_tags(np.where(atoms.get_tags() == 1, 0, atoms.get_tags()))
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 0))
    assert np.abs(atoms.get_forces(apply_constraint=False) - before).max() > 1e-7


@pytest.mark.parametrize("mode", ["remove_tag0", "supernode"])
def test_networks_that_know_no_whole_structures_give_no_energies_of_them(checkpoint, mode: str) -> None:  # type: ignore[no-untyped-def]
    predictor = Predictor(checkpoint, router=ActiveRegion(mode))
    assert not predictor.energies_apart
    atoms = slab_atoms(0.1)
    expected = predictor.predict(as_data(atoms, torch.float32))
    found = EquiformerV2Calculator(predictor).get_potential_energy(atoms)
    assert found == pytest.approx(float(expected["energy"]), abs=1e-5)
    assert abs(found - float(Predictor(checkpoint).predict(atoms)["energy"])) > 1e-3
    relaxed = relax(atoms, EquiformerV2Calculator(predictor), steps=2)
    assert relaxed.energies[0] == found
    assert None not in relaxed.energies
    assert Predictor(checkpoint, router=ActiveRegion("context_only")).energies_apart


def test_a_plan_made_without_edges_computes_those_that_come() -> None:
    """Two atoms come within the cutoff after the plan."""
    model = exact_model()
    plan = FrozenPlan(EdgePruner(0.4), replan_every=10)
    for distance in (6.1, 5.9):
        atoms = Atoms("Cu2", [[0, 0, 0], [0, 0, distance]], cell=[30.0] * 3, pbc=True)
        batch = Batch.from_data_list([as_data(atoms)])
        with torch.no_grad():
            found = model(batch, active=plan)
    torch.testing.assert_close(found, model(batch))
    assert plan.plans == 1


def test_backends_are_refused_before_the_first_step(checkpoint) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="updates all atoms in every block"):
        Predictor(checkpoint, backend="compile", router=StaticRouter(0.5))


def test_files_hold_every_router(tmp_path: Path) -> None:
    model, batch = exact_model(), batch_of()
    for router in routers().values():
        found = load_router(save_router(tmp_path / "router.json", router))
        with torch.no_grad():
            assert torch.equal(found(model, batch)["forces"], router(model, batch)["forces"])
        assert router_to_dict(found) == router_to_dict(router)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    for content in ("{", "[]", json.dumps({"kind": "os", "settings": {}}),
                    json.dumps({"kind": "StaticRouter", "settings": {"levels": 0.1, "speed": 2}}),
                    json.dumps({"kind": "StaticRouter", "settings": {"levels": None}}),
                    json.dumps({"kind": "FTPRouter", "settings": {"levels": 0.1, "weights": {"x": "abc"}}}),
                    json.dumps({"kind": "StaticRouter", "settings": [1]})):  # fmt: skip
        path.write_text(content)
        with pytest.raises(InputError, match=r"router\.json: "):
            load_router(path)


def test_refusals() -> None:
    with pytest.raises(InputError, match="replan_every = 0"):
        FrozenPlan(StaticRouter(0.5), replan_every=0)
    with pytest.raises(InputError, match=r"max_move .* = 0"):
        FrozenPlan(StaticRouter(0.5), max_move=0)
