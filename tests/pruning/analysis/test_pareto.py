"""Studies of methods times budgets times seeds, and the command line of pruning."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run_command
from search_helpers import save_tiny, slab, slabs, tiny_model, write_lmdb

from datasets_oc20 import OC20Lmdb
from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.pruning.analysis.pareto import HeldOut, Recovery, Study, StudySettings
from equiformer2.pruning.analysis.pareto_report import markdown, summarise, write_report
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.cost.targets import MacTarget
from equiformer2.pruning.structured import plan_request
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_request import PlanRequest, make_plan


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "dense": save_tiny(folder / "dense.pt"),
        "calibration": write_lmdb(folder / "calibration.lmdb", slabs(), labels=False),
        "dft": write_lmdb(
            folder / "dft.lmdb", [slab("x", "Pd"), slab("x", "Pd", height=1.5), slab("y", "Ag")]
        ),
        "bare": write_lmdb(folder / "bare.lmdb", [slab("z", "Au")], labels=False),
    }


def make_study(files, out: Path, **changes: object) -> Study:
    settings = {
        "methods": ("random", "magnitude"),
        "keep": (0.7,),
        "seeds": (0, 1),
        "structures": 3,
        "tries": 1,
    }
    recovery, kind = changes.pop("recovery", None), changes.pop("kind", Study)
    held_out = changes.pop("held_out", {"dft": files["dft"], "bare": files["bare"]})
    settings |= {"repeats": 2} | changes
    return kind(files["dense"], files["calibration"], held_out, StudySettings(**settings), out, recovery)


@pytest.fixture(scope="module")
def study(files, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Folder and results of a study of two methods and two seeds."""
    folder = tmp_path_factory.mktemp("study")
    return folder, make_study(files, folder).run(progress=False)


@pytest.mark.slow
def test_results_are_what_they_say(files, study) -> None:
    _, results = study
    assert [(r["method"], r["seed"]) for r in results] == [
        ("dense", 0), ("random", 0), ("random", 1), ("magnitude", 0), ("magnitude", 1),
    ]  # fmt: skip
    dense = results[0]
    assert dense["macs"] == dense["parameters"] == 1.0
    assert dense["cut"]["dft"]["to_dense"]["force_mae"] == pytest.approx(0.0, abs=1e-9)
    predictor = Predictor(files["dense"])
    by_system: dict[str, list[float]] = {}
    for data in OC20Lmdb(files["dft"]):
        error = (predictor.predict(data)["forces"] - data.forces)[~data.fixed].abs().mean()
        by_system.setdefault(data.sid, []).append(float(error))
    expected = np.mean([np.mean(errors) for errors in by_system.values()])
    assert dense["cut"]["dft"]["to_labels"]["force_mae"] == pytest.approx(expected, rel=1e-4)
    assert dense["cut"]["bare"]["to_labels"] is None
    for result in results[1:]:
        assert 0.6 < result["macs"] <= 0.7
        assert result["cut"]["dft"]["to_dense"]["force_mae"] > 0
        assert PruningPlan.from_dict(result["plan"])
    assert results[1]["plan"] != results[2]["plan"]


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(files, study, tmp_path) -> None:
    folder, first = study
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    results = tmp_path / "results"
    (results / "random_0.7_1.json").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    again = make_study(files, tmp_path, methods=("random", "magnitude", "uniform")).run(progress=False)
    written = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    assert written.items() >= kept.items()
    assert written.keys() - kept.keys() == {
        f"{n}.json" for n in ("random_0.7_1", "uniform_0.7_0", "uniform_0.7_1")
    }
    assert again[2]["plan"] == first[2]["plan"]
    with pytest.raises(InputError, match="other options"):
        make_study(files, tmp_path, structures=2)
    with pytest.raises(InputError, match="other held_out"):
        make_study(files, tmp_path, held_out={"dft": files["dft"]})


class BreakingStudy(Study):
    """Pruned networks answer with numbers that are not finite."""

    def _errors(self, network):
        if network.config != self.model.config:
            torch.nn.init.constant_(network.energy_block.so3_linear_2.weight, float("nan"))
        return super()._errors(network)


@pytest.mark.slow
def test_a_network_that_breaks_down_does_not_stop_a_study(files, tmp_path) -> None:
    options = {"methods": ("uniform",), "seeds": (0,), "kind": BreakingStudy}
    results = make_study(files, tmp_path, **options).run(progress=False)
    assert "cut" in results[0]
    reason = "the network breaks down: its answers are not finite"
    assert results[1] == {"method": "uniform", "keep": 0.7, "seed": 0, "missed": reason}
    assert make_study(files, tmp_path, **options).run(progress=False) == results
    write_report(results, tmp_path)
    assert reason in (tmp_path / "pareto.md").read_text()


def test_held_out_systems_are_really_held_out(files, tmp_path) -> None:
    with pytest.raises(InputError, match="the system a is in the calibration data and in the held-out set t"):
        make_study(files, tmp_path, held_out={"t": files["calibration"]})
    recovery = Recovery((str(files["dft"]),), (str(files["bare"]),))
    with pytest.raises(InputError, match="data to distill on"):
        make_study(files, tmp_path, recovery=recovery)


@pytest.mark.slow
def test_networks_are_distilled_and_trained_from_scratch(files, tmp_path) -> None:
    quick = ("--trainer.accelerator=cpu", "--trainer.max_steps=2", "--data.batch_size=2")
    recovery = Recovery((str(files["calibration"]),), (str(files["bare"]),), quick, scratch=True)
    study = make_study(files, tmp_path, methods=("multi",), seeds=(0,), recovery=recovery)
    dense, multi, scratch = study.run(progress=False)
    assert dense["distilled"] is None
    assert scratch["plan"] == multi["plan"]
    assert scratch["cut"] is None
    errors = [
        item["dft"]["to_dense"]["force_mae"]
        for item in (multi["cut"], multi["distilled"], scratch["distilled"])
    ]
    assert len(set(errors)) == 3
    small = load_checkpoint(tmp_path / "students" / "multi_0.7_0.pt")
    assert small.config.is_pruned
    assert small.weights == "averaged"


@pytest.mark.parametrize("names", [("dft", "bare"), ("bare", "dft")])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_labels_count_whatever_they_are_beside(files, names, batch_size) -> None:
    dense = load_checkpoint(files["dense"])

    def to_labels(paths: list[Path]) -> dict[str, float | None]:
        facts = dense.model, dense.normalizers, "adsorption"
        held_out = HeldOut.read("x", paths, *facts, batch_size=batch_size)
        return held_out.errors(tiny_model(1))["to_labels"]

    alone, beside = to_labels([files["dft"]]), to_labels([files[name] for name in names])
    for name in ("force_norm", "force_mae"):
        assert beside[name] == pytest.approx(alone[name], rel=1e-5)
    # Energies are compared where all files have them; a system without labels has no part in the mean.
    assert alone["energy_per_atom"] > 0
    assert beside["energy_per_atom"] is None
    assert beside["loss"] == pytest.approx(alone["force_norm"], rel=1e-5)


@pytest.mark.pictures
def test_tables_and_figure(study, tmp_path) -> None:
    _, results = study
    write_report(results, tmp_path)
    rows = summarise(results)
    row = next(row for row in rows if row["method"] == "random")
    values = [r["cut"]["dft"]["to_dense"]["force_mae"] for r in results if r["method"] == "random"]
    spread = row["errors"]["dft"]["to_dense"]["force_mae"]
    assert spread == {"mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values, ddof=1))}
    text = markdown(rows)
    assert "dft: errors against labels" in text
    assert "bare: errors against the dense network" in text
    assert "bare: errors against labels" not in text
    assert json.loads((tmp_path / "pareto.json").read_text())["rows"] == json.loads(json.dumps(rows))
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_latency_is_measured_in_turns() -> None:
    calls: list[str] = []
    compare_latency(lambda: calls.append("small"), lambda: calls.append("dense"), repeats=4, warmup=1)
    assert calls[:2] == ["small", "dense"]
    # In neighbouring pairs another one begins.
    assert calls[2:] == ["dense", "small", "small", "dense"] * 2


@pytest.fixture
def operations(monkeypatch) -> type[MacTarget]:
    """Operations in place of time, which is noise for a tiny network."""

    class Operations(MacTarget):
        quantity = "latency"
        slower = 1.0

        def __init__(self, model, batch, fraction, path) -> None:
            super().__init__(model.config, fraction, 8, 48)

        def measured(self, plan) -> float:
            return self.slower * self.fraction_of(plan)

    monkeypatch.setattr(plan_request, "LatencyTarget", Operations)
    return Operations


def test_a_network_slower_than_the_sum_of_its_parts_misses_the_target(
    files, operations, tmp_path, capsys
) -> None:
    words = ["prune plan", "--checkpoint", files["dense"], "--data", files["calibration"], "--overwrite"]
    words += ["--target", "latency=0.9", "--tries", 1, "--structures", 2, "--out", tmp_path / "plan.json"]
    assert run_command(*words) == 0
    assert "missed" not in capsys.readouterr().out
    operations.slower = 1.2
    assert run_command(*words) == 3
    assert "missed: the pruned network takes 10" in capsys.readouterr().out
    assert PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets", [["macs=0.8"], ["parameters=0.9"], ["latency=0.9"], ["macs=0.9", "latency=0.8"]]
)
def test_every_kind_of_target(files, targets, operations) -> None:
    data = (str(files["calibration"]),)
    request = PlanRequest(str(files["dense"]), data, tuple(targets), tries=1, structures=2)
    made = make_plan(request, progress=False)
    found = {"macs": made.macs, "parameters": made.parameters, "latency": made.latency}
    for target in targets:
        quantity, share = target.split("=")
        assert found[quantity] <= float(share)
    assert (made.latency is None) == (not any(target.startswith("latency") for target in targets))
    assert made.errors["loss"] > 0


@pytest.mark.parametrize(
    "targets", [["macs"], ["macs=2"], ["flops=0.5"], ["macs=x"], ["macs=0.5", "macs=0.6"]]
)
def test_targets_that_say_nothing(files, targets) -> None:
    with pytest.raises(InputError, match="not understood"):
        make_plan(
            PlanRequest(str(files["dense"]), (str(files["calibration"]),), tuple(targets)), progress=False
        )


def test_plan_and_apply_on_the_command_line(files, tmp_path, capsys) -> None:
    plan, small = tmp_path / "plan.json", tmp_path / "small.pt"
    status = run_command(
        "prune plan", "--checkpoint", files["dense"], "--data", files["calibration"], "--target", "macs=0.8",
        "--tries", 1, "--structures", 2, "--out", plan,
    )  # fmt: skip
    assert status == 0
    assert "of the MACs" in capsys.readouterr().out
    apply = ("prune apply", "--plan", plan)
    assert run_command(*apply, "--checkpoint", files["dense"], "--out", small) == 0
    loaded = load_checkpoint(small)
    assert loaded.available_weights == ("raw", "averaged")
    assert loaded.config == PruningPlan.load(plan).applied_to(tiny_model().config)
    assert run_command(*apply, "--checkpoint", small, "--out", tmp_path / "again.pt") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: pruning plan")


@pytest.mark.slow
def test_studies_on_the_command_line(files, tmp_path, capsys) -> None:
    status = run_command(
        "prune pareto", "--checkpoint", files["dense"], "--calibration", files["calibration"], "--held-out",
        f"dft={files['dft']}", "--methods", "uniform", "--keep", 0.7, "--seeds", 0, "--structures", 2,
        "--repeats", 1, "--out", tmp_path / "study",
    )  # fmt: skip
    assert status == 0
    assert "| uniform | as cut |" in capsys.readouterr().out
    assert (tmp_path / "study" / "pareto.png").exists()
