"""Our side of the benchmark as the driver runs it: a process that answers requests."""

import sys
from pathlib import Path

import pytest
import torch

from bench.session import BenchmarkError, Session
from bench.sizes import SIZES
from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint.reference import config_from_reference


@pytest.mark.parametrize("size", ["31M", "83M"])
def test_sizes_are_the_papers_presets(size: str) -> None:
    assert config_from_reference(SIZES[size]) == ModelConfig.preset(size)


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
