"""`--router` of the scripts: what is computed is what the router in the file chooses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.constraints import FixAtoms
from ase.io import read, write
from command_line import run_script_file
from search_helpers import save_tiny, slab, write_lmdb

from datasets_oc20 import OC20Lmdb
from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor, relax
from equiformer2.pruning.routing import (
    ActiveRegion,
    EdgePruner,
    FrozenPlan,
    FTPRouter,
    StaticRouter,
    load_router,
    save_router,
)
from equiformer2.pruning.routing.router_files import (
    batched_relaxation_router,
    evaluation_router,
    relaxation_router,
)
from equiformer2.training.evaluation import evaluate

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    write(folder / "slab.traj", oxygen_on_copper())
    return {
        "model": save_tiny(folder / "model.pt", num_layers=3),
        "data": write_lmdb(folder / "data.lmdb", [slab("a"), slab("b", "Pt")]),
        "structure": folder / "slab.traj",
        "static": save_router(folder / "static.json", StaticRouter(0.5)),
        "smooth": save_router(folder / "smooth.json", FTPRouter(0.4, mode="smooth")),
        "context": save_router(folder / "context.json", ActiveRegion("context_only")),
        "plan": save_router(folder / "plan.json", FrozenPlan(StaticRouter(0.5), 3, 0.2)),
    }


def oxygen_on_copper() -> Atoms:
    atoms = fcc111("Cu", (1, 2, 3), vacuum=6.0, periodic=True)
    add_adsorbate(atoms, "O", 1.3, "fcc")
    layers = atoms.get_tags()
    atoms.set_constraint(FixAtoms(mask=layers >= 2))
    atoms.set_tags([{0: 2, 1: 1, 2: 0, 3: 0}[layer] for layer in layers])
    atoms.positions += np.random.default_rng(0).normal(0, 0.05, atoms.positions.shape)
    return atoms


@pytest.mark.slow
def test_relax(files, tmp_path) -> None:
    out = tmp_path / "out"
    options = ("--checkpoint", files["model"], "--structure", files["structure"], "--steps", 4)
    routed = (*options, "--router", files["static"], "--replan-every", 2, "--out", out)
    assert run_script_file("relax", *routed) == 3  # not converged
    plan = FrozenPlan(StaticRouter(0.5), replan_every=2)
    expected = relax(read(files["structure"]), EquiformerV2Calculator(files["model"], router=plan), steps=4)
    dense = relax(read(files["structure"]), EquiformerV2Calculator(files["model"]), steps=4)
    record = json.loads((out / "relaxation.json").read_text())
    assert record["energy_eV"] == pytest.approx(expected.energy, abs=1e-6)
    assert np.abs(dense.atoms.positions - expected.atoms.positions).max() > 1e-6
    assert expected.energies[1:-1] == [None] * 3
    whole = Predictor(files["model"])
    for frame, energy in zip(read(out / "relaxation.traj", "::4"), expected.energies[::4], strict=True):
        found = float(whole.predict(frame)["energy"])
        assert [energy, frame.get_potential_energy()] == pytest.approx([found] * 2, abs=1e-5)
    assert plan.plans == 3  # steps 0, 2, 4
    assert record["model"]["router"] == str(files["static"])
    assert record["model"]["replan_every"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--router", "static", "--backend", "compile"), "the backend 'compile' updates all atoms"),
        (("--router", "smooth", "--replan-every", 2), "does not jump along a relaxation"),
        (("--router", "static", "--replan-every", 0), "replan_every = 0: must be at least 1"),
        (("--replan-every", 2), "is for a router: give --router, too"),
        (("--router", "model"), "model.pt: "),
    ],
)
def test_what_cannot_be_relaxed_is_one_sentence(files, tmp_path, capsys, arguments, message) -> None:
    options = ("--checkpoint", files["model"], "--structure", files["structure"], "--out", tmp_path / "out")
    given = [files.get(value, value) for value in arguments]
    assert run_script_file("relax", *options, *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate(files, tmp_path, capsys) -> None:
    out = tmp_path / "report.json"

    def metrics(router: str | None) -> dict[str, Any]:
        options = () if router is None else ("--router", files[router])
        arguments = ("--checkpoint", files["model"], "--data", files["data"], "--out", out)
        options = ("--overwrite", *options)
        assert run_script_file("evaluate", *arguments, *options) == 0
        return dict(json.loads(out.read_text())["average"]["metrics"])

    dense, routed = metrics(None), metrics("plan")
    assert "finished before" not in capsys.readouterr().out
    predictor = Predictor(files["model"], router=StaticRouter(0.5))
    expected = evaluate(predictor, OC20Lmdb(files["data"]))
    assert routed == pytest.approx(expected.metrics, rel=1e-5, abs=1e-7)
    assert routed["forces_mae"] != pytest.approx(dense["forces_mae"], rel=1e-4)
    assert metrics("plan") == routed
    assert "finished before" in capsys.readouterr().out
    arguments = ("--checkpoint", files["model"], "--data", files["data"], "--router", files["static"])
    assert run_script_file("evaluate", *arguments, "--backend", "compile") == 2
    assert "the backend 'compile' updates all atoms" in capsys.readouterr().err


def test_relax_is2re(files, tmp_path, capsys) -> None:
    arguments = (
        "--checkpoint", files["model"], "--data", files["data"], "--out", tmp_path / "out", "--overwrite",
        "--steps", 2,
    )  # fmt: skip
    assert run_script_file("relax_is2re", *arguments, "--router", files["context"]) == 0
    frames = read(tmp_path / "out" / "data" / "trajectories" / "a.traj", ":")
    routed = Predictor(files["model"], router=ActiveRegion("context_only")).predict(frames[0])
    whole = Predictor(files["model"])
    assert frames[0].get_forces(apply_constraint=False)[-1] == pytest.approx(routed["forces"][-1].numpy())
    for frame in frames[::2]:
        found = float(whole.predict(frame)["energy"])
        assert frame.get_potential_energy() == pytest.approx(found, abs=1e-5)
    assert abs(float(routed["energy"]) - frames[0].get_potential_energy()) > 1e-4
    assert "energy" not in frames[1].calc.results
    rows = [json.loads(line) for line in (tmp_path / "out/data/relaxed.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["sid"] == "a")
    assert [row["initial_energy"], row["energy"]] == [frame.get_potential_energy() for frame in frames[::2]]
    assert run_script_file("relax_is2re", *arguments) == 2
    assert "holds relaxations with router" in capsys.readouterr().err
    assert run_script_file("relax_is2re", *arguments, "--router", files["static"]) == 2
    assert "batches keep no plan" in capsys.readouterr().err


def test_the_plan_of_a_file_and_of_the_command_line(files) -> None:
    stored = relaxation_router(str(files["plan"]))
    assert isinstance(stored, FrozenPlan)
    assert (stored.replan_every, stored.max_move) == (3, 0.2)
    again = relaxation_router(str(files["plan"]), 5)
    assert isinstance(again, FrozenPlan)
    assert (again.replan_every, again.max_move) == (5, 0.2)
    default = relaxation_router(str(files["static"]))
    assert isinstance(default, FrozenPlan)
    assert default.replan_every == 10
    for name in ("smooth", "context"):
        for use in (relaxation_router, batched_relaxation_router, evaluation_router):
            assert type(use(str(files[name]))) is type(load_router(files[name]))
    assert isinstance(evaluation_router(str(files["plan"])), StaticRouter)
    with pytest.raises(InputError, match="batches keep no plan"):
        batched_relaxation_router(str(files["plan"]))
    assert relaxation_router(None) is batched_relaxation_router(None) is evaluation_router(None) is None
    assert EdgePruner(0.1, mode="threshold").abrupt
    assert not EdgePruner(0.1, mode="smooth").abrupt
