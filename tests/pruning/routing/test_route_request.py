"""Routers by name: targets, resuming, the command line, and as methods of a study."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_command
from search_helpers import save_tiny, slab, write_lmdb
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import load_checkpoint
from equiformer2.cli.main import build_parser
from equiformer2.errors import InputError
from equiformer2.pruning.analysis.pareto import Study, StudySettings
from equiformer2.pruning.analysis.pareto_report import markdown, missed, summarise, write_report
from equiformer2.pruning.calibration import Calibration, Network
from equiformer2.pruning.calibration_data import read_structures
from equiformer2.pruning.routing import (
    ROUTING_METHODS,
    FTPRouter,
    RoutingSettings,
    ScoreRouter,
    StaticRouter,
    find_router,
    load_router,
)
from equiformer2.pruning.routing.route_request import RouteRequest, RouteResult, make_router
from equiformer2.pruning.routing.router_files import router_to_dict

QUICK = RoutingSettings(population=4, generations=1, tolerance=0.1, steps=4)


def rattled(sid: str, seed: int) -> Data:
    """No two atoms are equivalent, so that budgets can be met."""
    data = slab(sid)
    data.pos = data.pos + 0.1 * torch.randn(data.pos.shape, generator=torch.Generator().manual_seed(seed))
    return data


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    structures = [rattled(sid, seed) for seed, sid in enumerate("abc")]
    return {
        "dense": save_tiny(folder / "dense.pt", num_layers=3),
        "calibration": write_lmdb(folder / "calibration.lmdb", structures, labels=False),
        "held_out": write_lmdb(folder / "held_out.lmdb", [rattled("x", 7), rattled("y", 8)]),
    }


def made(files: dict[str, Path], method: str, state: Path | None = None, **changes: object) -> RouteResult:
    settings = replace(QUICK, **changes)
    target = None if method == "context_only" else "macs=0.7"
    request = RouteRequest(str(files["dense"]), (str(files["calibration"]),), method, target, settings)
    return make_router(request, state, progress=False)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("method", ROUTING_METHODS)
def test_every_method_comes_to_its_target(files, method) -> None:
    found = made(files, method)
    assert found.errors["loss"] > 0
    if method == "context_only":
        assert found.shares.macs < 1
    else:
        assert 0.7 - QUICK.tolerance <= found.shares.macs <= 0.7
    if method in ("atom", "atom_importance", "edge"):
        assert found.router.levels[0] is None
    assert "% of the MACs left" in str(found)


def test_protected_blocks_compute_everything(files) -> None:
    router = made(files, "static", protected=(1,)).router
    assert isinstance(router, ScoreRouter)
    assert router.levels[1] is None
    assert router.levels[0] is not None or router.levels[2] is not None
    with pytest.raises(InputError, match="block 3 cannot be protected: the network has blocks 0 to 2"):
        made(files, "static", protected=(3,))


@pytest.mark.parametrize("mode", ["threshold", "smooth"])
def test_budgets_become_thresholds(files, mode) -> None:
    router = made(files, "static", mode=mode, width=0.3).router
    assert isinstance(router, ScoreRouter)
    assert (router.mode, router.width) == (mode, 0.3)


def test_a_target_that_gates_miss_is_told(files, tmp_path, capsys) -> None:
    found = made(files, "static", mode="smooth", width=2.0)
    assert found.shares.macs > 0.7
    assert f"missed: {found.shares.macs:.3f} of the MACs are left in the mode smooth" in str(found)
    out = tmp_path / "router.json"
    status = run_command(
        "prune route", "--checkpoint", files["dense"], "--data", files["calibration"], "--out", out,
        "--target", "macs=0.7", "--population", 4, "--generations", 1, "--tolerance", 0.1,
        "--mode", "smooth", "--width", 2,
    )  # fmt: skip
    assert status == 3
    assert "the target is 0.7" in capsys.readouterr().out
    assert json.loads((tmp_path / "router.report.json").read_text())["missed"] == found.missed
    assert load_router(out).mode == "smooth"


class Batches(list):
    """Batches that count the steps of a training, and end it after some."""

    def __init__(self, batches: list[Batch], most: float = float("inf")) -> None:
        super().__init__(batches)
        self.steps, self.most = 0, most

    def __getitem__(self, index: int) -> Batch:
        if self.steps == self.most:
            raise KeyboardInterrupt
        self.steps += 1
        return super().__getitem__(index)


class WatchedCalibration(Calibration):
    """Counts losses; those of trained routers may be invented, so that training is or is not worth it."""

    losses = 0
    trained_loss: float | None = None

    def errors(self, index: int, model: Network, **given: Any) -> Tensor:
        self.losses += 1
        with self.measuring():
            errors = super().errors(index, model, **given)
        trained = isinstance(given.get("active"), FTPRouter) and self.trained_loss is not None
        return torch.full_like(errors, self.trained_loss) if trained else errors

    def loss_on(self, batches: Sequence[int], errors: Mapping[int, Tensor]) -> float:
        with self.measuring():
            return super().loss_on(batches, errors)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Only steps of the training count."""
        batches, self.batches = self.batches, list(self.batches)
        try:
            yield
        finally:
            self.batches = batches


@pytest.fixture
def calibration(files: dict[str, Path]) -> WatchedCalibration:
    checkpoint = load_checkpoint(files["dense"])
    structures = read_structures(files["calibration"])
    return WatchedCalibration(checkpoint.model.eval(), checkpoint.normalizers, structures)


def find_ftp(files: dict[str, Path], calibration: Calibration, state: Path | None = None, steps: int = 4):
    model = load_checkpoint(files["dense"]).model.eval()
    settings = replace(QUICK, steps=steps)
    return find_router("ftp", model, calibration, 0.7, settings, state_path=state, progress=False)


@pytest.mark.slow
def test_what_was_killed_goes_on_to_the_same_router(files, calibration, tmp_path) -> None:
    whole, _ = find_ftp(files, calibration, steps=13)
    state, batches = tmp_path / "state.pt", list(calibration.batches)
    calibration.batches = Batches(batches, most=11)
    with pytest.raises(KeyboardInterrupt):
        find_ftp(files, calibration, state, steps=13)
    calibration.batches = Batches(batches)
    again, _ = find_ftp(files, calibration, state, steps=13)
    assert calibration.batches.steps == 3  # from the tenth on
    assert router_to_dict(again) == router_to_dict(whole)
    calibration.losses = 0
    find_ftp(files, calibration, state, steps=13)
    assert calibration.losses == 0
    with pytest.raises(InputError, match="the state of another router: settings was"):
        find_ftp(files, calibration, state, steps=14)
    state.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is no state of a router"):
        find_ftp(files, calibration, state, steps=13)


@pytest.mark.slow
def test_training_changes_the_router(files, calibration) -> None:
    calibration.trained_loss = 0.0
    (few, _), (many, record) = (find_ftp(files, calibration, steps=steps) for steps in (1, 5))
    assert isinstance(few, FTPRouter)
    assert few.settings()["weights"] != many.settings()["weights"]
    assert record["kept"] == "trained"


@pytest.mark.slow
def test_a_training_that_makes_it_worse_is_not_kept(files, calibration, caplog) -> None:
    calibration.trained_loss = 1e9
    router, record = find_ftp(files, calibration)
    assert record["kept"] == "static"
    model = load_checkpoint(files["dense"]).model.eval()
    static, _ = find_router("static", model, calibration, 0.7, QUICK, progress=False)
    assert router_to_dict(router) == router_to_dict(static)
    assert "the static one is kept" in caplog.text


@pytest.mark.parametrize(
    ("method", "target", "message"),
    [
        ("static", "parameters=0.5", "not understood"),
        ("static", "macs=2", "not understood"),
        ("static", None, "needs a target"),
        ("context_only", "macs=0.7", "has no budget"),
        ("best", "macs=0.7", "not known"),
    ],
)
def test_output_request_that_say_nothing(files, method, target, message) -> None:
    request = RouteRequest(str(files["dense"]), (str(files["calibration"]),), method, target, QUICK)
    with pytest.raises(InputError, match=message):
        make_router(request, progress=False)


def test_route_on_the_command_line(files, tmp_path, capsys) -> None:
    out = tmp_path / "router.json"
    status = run_command(
        "prune route", "--checkpoint", files["dense"], "--data", files["calibration"], "--out", out,
        "--method", "ftp", "--target", "macs=0.7", "--population", 4, "--generations", 1,
        "--tolerance", 0.1, "--router-steps", 2,
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0
    assert "% of the MACs left" in printed.out
    assert "100%" in printed.err  # the progress bars
    report = json.loads((tmp_path / "router.report.json").read_text())
    assert report["achieved"]["macs"] == pytest.approx(0.7, abs=0.1)
    assert report["errors"]["force_mae"] > 0
    assert report["request"]["settings"]["protected"] == []
    kept = {"trained": FTPRouter, "static": StaticRouter}[report["found"]["kept"]]
    assert type(load_router(out)) is kept
    assert (tmp_path / "router.state.pt").exists()


def test_the_default_is_the_static_router_with_every_block_searched() -> None:
    options = ("prune", "route", "--checkpoint", "a.pt", "--data", "a.lmdb", "--out", "router.json")
    given = build_parser().parse_args(options)
    assert (given.method, given.protect) == ("static", [])
    assert RoutingSettings().protected == ()


@pytest.mark.parametrize("option", [("--mode", "smooth"), ("--keep-free",), ("--protect", "0")], ids=str)
def test_options_that_context_only_would_ignore(files, tmp_path, capsys, option) -> None:
    status = run_command(
        "prune route", "--checkpoint", files["dense"], "--data", files["calibration"],
        "--out", tmp_path / "router.json", "--method", "context_only", *option,
    )  # fmt: skip
    assert status == 2
    message = capsys.readouterr().err
    assert option[0] in message
    assert "context_only" in message


def make_study(files: dict[str, Path], out: Path, methods: tuple[str, ...], keep: float = 0.7) -> Study:
    settings = StudySettings(methods, (keep,), (0, 1), structures=3, tries=1, repeats=1, routing=QUICK)
    return Study(files["dense"], files["calibration"], {"dft": files["held_out"]}, settings, out)


@pytest.mark.slow
def test_routers_in_a_study(files, tmp_path) -> None:
    make_study(files, tmp_path, ("uniform",)).run(progress=False)
    # A study of plans may be extended by routers.
    study = make_study(files, tmp_path, ("uniform", "route_random", "route_context_only"))
    results = study.run(progress=False)
    assert [(r["method"], r["seed"]) for r in results] == [
        ("dense", 0), ("route_context_only", 0), ("uniform", 0), ("uniform", 1),
        ("route_random", 0), ("route_random", 1),
    ]  # fmt: skip
    for result in (r for r in results if r["method"].startswith("route")):
        assert result["macs_on"]["dft"] == result["achieved"]["dft"]["macs"] < 1
        assert result["cut"]["dft"]["to_dense"]["force_mae"] > 0
        assert result["cut"]["dft"]["to_labels"]["force_mae"] > 0
        assert result["latency"]["ratio"] > 0
    assert results[4]["router"]["settings"]["seed"] == 0
    assert results[5]["router"]["settings"]["seed"] == 1
    rows = summarise(results)
    random = next(row for row in rows if row["method"] == "route_random")
    assert random["macs_on"]["dft"] == pytest.approx(sum(r["macs_on"]["dft"] for r in results[4:]) / 2)
    assert f"| route_random | as cut | {random['macs_on']['dft']:.1%} | 100.0% |" in markdown(rows)
    write_report(results, tmp_path)
    other = replace(study.settings, routing=replace(QUICK, steps=9))
    with pytest.raises(InputError, match="other routing"):
        Study(files["dense"], files["calibration"], {"dft": files["held_out"]}, other, tmp_path)


def test_a_budget_out_of_reach_is_told(files, tmp_path) -> None:
    results = make_study(files, tmp_path, ("route_static",), keep=0.05).run(progress=False)
    assert "missed" in results[1]
    assert "route_static at 5%, seed 0: no schedule came within" in missed(results)
    assert [row["method"] for row in summarise(results)] == ["dense"]
    write_report(results, tmp_path)
    assert "## Not reached" in (tmp_path / "pareto.md").read_text()
