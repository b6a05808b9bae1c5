"""Our side of the benchmark as the driver runs it: a process that answers requests."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.network_sizes import SIZES
from benchmarks.worker_session import BenchmarkError, RefusedError, Session
from equiformer2 import EquiformerV2
from equiformer2.checkpoint.reference import config_from_reference


def test_worker_builds_runs_and_reports_errors(tmp_path: Path) -> None:
    model = EquiformerV2(config_from_reference(SIZES["toy"]))
    torch.save(dict(model.named_parameters()), tmp_path / "toy.pt")
    with Session("ours", sys.executable, threads=1, allocator="no-mmap") as session:
        about = session.ask("describe")
        assert about["threads"] == 1
        assert about["allocator"]["MALLOC_MMAP_MAX_"] == "0"
        built = session.ask(
            "build", config=SIZES["toy"], parameters=str(tmp_path / "toy.pt"), create=False, batch="B4"
        )
        assert built["parameters"] == sum(p.numel() for p in model.parameters())
        session.ask("answers", path=str(tmp_path / "answers.pt"), draws=1, gradients=True)
        # Two steps change the parameters, so the energy of the second forward differs.
        before = session.ask("run", operation="forward")["value"]
        assert session.ask("run", operation="training_step")["seconds"] > 0
        assert session.ask("run", operation="forward")["value"] != before
        memory = session.ask("memory")
        assert memory["peak"] >= built["peak"] >= memory["before_model"]
        with pytest.raises(BenchmarkError, match="asked to build: FileNotFoundError"):
            session.ask("build", config=SIZES["toy"], parameters="missing.pt", create=False, batch="B1")
    answers = torch.load(tmp_path / "answers.pt", weights_only=True)
    assert answers["edge_index"].shape == (2, 6000)
    assert set(answers["draws"][0]["gradients"]) == {name for name, _ in model.named_parameters()}


def test_worker_relaxes_counts_and_breaks_down(tmp_path: Path) -> None:
    with Session("ours", sys.executable, threads=1, allocator="default", memory_limit=8 * 2**30) as session:
        session.ask("build", config=SIZES["toy"], parameters=None, create=False, batch="B1")
        variant = {"precision": "float32", "backend": "auto"}
        begun = session.ask("begin_relaxation", path=str(tmp_path / "first.pt"), draws=1, **variant)
        assert begun["atoms"] == 73
        first = session.ask("run", operation="relaxation_step", **variant)["value"]
        assert session.ask("run", operation="relaxation_step", **variant)["value"] != first
        assert session.ask("count")["edges"] == 1460
        assert session.ask("gemm_rate", precision="float32", repeats=1)["rate"] > 0
        assert session.ask("bandwidth", repeats=1)["rate"] > 0
        session.ask("answers", path=str(tmp_path / "answers.pt"), draws=1, gradients=False)
    # The calculator and the plain network give the same answers.
    kept = [
        torch.load(tmp_path / f"{name}.pt", weights_only=True)["draws"][0] for name in ("first", "answers")
    ]
    torch.testing.assert_close(kept[0]["forces"].float(), kept[1]["forces"], rtol=1e-3, atol=1e-6)


def test_memory_beyond_the_limit_is_refused_and_the_worker_lives() -> None:
    with Session("ours", sys.executable, threads=1, allocator="default", memory_limit=2**31) as session:
        build = {"config": SIZES["toy"], "parameters": None, "create": False}
        # A layer of 10 GB.
        wide = SIZES["toy"] | {"ffn_hidden_channels": 50_000}
        with pytest.raises(RefusedError, match="asked to build"):
            session.ask("build", batch="atoms-16", **(build | {"config": wide}))
        assert session.ask("build", batch="atoms-16", **build)["atoms"] == 16
