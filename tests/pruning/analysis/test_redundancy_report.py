"""The redundancy report from the command line, on a small network and genuine OC20 frames."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_command
from model_helpers import random_model, small_config

from equiformer2 import ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint
from equiformer2.pruning.analysis.redundancy_report import units_holding

ROOT = Path(__file__).parents[3]
DATA = str(ROOT / "tests/fixtures/datasets_oc20/s2ef_val_20_packed.lmdb")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    blocks = [{"num_heads": 1, "attn_hidden_channels": 4}, {"attention": False, "ffn_hidden_channels": 5}]
    model = random_model()
    pruned = random_model(ModelConfig.from_dict(small_config().to_dict() | {"blocks": blocks}))
    for name, network in (("model.pt", model), ("pruned.pt", pruned)):
        save_checkpoint(
            path.with_name(name),
            model=network,
            raw_state=network.state_dict(),
            averaged_state=None,
            normalizers=Normalizers(energy=Normalizer(-0.7, 2.0), forces=Normalizer(0.0, 2.5)),
            energy_kind="adsorption",
            provenance={},
        )
    return str(path)


def run(checkpoint: str, out: Path, *more: str, status: int = 0) -> dict[str, Any]:
    files = ["--checkpoint", checkpoint, "--data", DATA, "--out", str(out)]
    sizes = ["--structures", "3", "--batch-size", "2", "--repeats", "1"]
    assert run_command("prune report", *files, *sizes, *more) == status
    return {} if status else json.loads((out / "report.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.pictures
def test_from_checkpoint_to_tables(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(checkpoint, tmp_path / "report")
    assert found["source"]["structures"] == 3
    assert found["source"]["timed_batch"]["structures"] == 2
    assert found["source"]["atoms"] == 3 * 33
    assert [(row["block"], row["tag"]) for row in found["blocks"]] == [
        (block, tag) for block in (0, 1) for tag in ("0", "1", "2", "all")
    ]
    assert len(found["blocks"][0]["entropy"]) == 2
    assert [len(values) for values in found["importance"]["michel"]["attn_hidden"]] == [6, 6]
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["blocks.1.attention"]["macs"] > parts["energy_head"]["macs"] > 0
    assert all(part["seconds"] > 0 for part in found["parts"])
    assert len(found["lossless"]) == 5
    assert all(saving["force_deviation"] < 1e-5 for saving in found["lossless"])

    units = rows(tmp_path / "report" / "units.csv")
    assert len(units) == 2 * (2 + 2 * 3 + 6 + 10 + 2)  # heads, values, attention, feed-forward, branches
    head = next(row for row in units if (row["unit"], row["block"], row["index"]) == ("heads", "1", "0"))
    assert float(head["michel"]) == found["importance"]["michel"]["heads"][1][0]
    blocks = rows(tmp_path / "report" / "blocks.csv")
    assert float(blocks[7]["cosine_l2"]) == found["blocks"][7]["cosine_by_degree"][2]
    assert len(rows(tmp_path / "report" / "lossless.csv")) == 5
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    for text in ("entropy", "attn hidden", "blocks.1.feed_forward", "force head: edges into fixed atoms"):
        assert text in printed


@pytest.mark.slow
def test_a_network_whose_blocks_lack_branches(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned = checkpoint.replace("model.pt", "pruned.pt")
    run(pruned, tmp_path / "report", "--objective", "labels", status=2)
    assert "labelled with adsorption energies" in capsys.readouterr().err
    labels = ["--objective", "labels", "--energy-kind", "adsorption"]
    found = run(pruned, tmp_path / "report", *labels)
    assert [len(values) for values in found["importance"]["taylor"]["heads"]] == [1, 0]
    assert [len(values) for values in found["importance"]["taylor"]["ffn_hidden"]] == [10, 5]
    second = next(row for row in found["blocks"] if (row["block"], row["tag"]) == (1, "all"))
    assert second["entropy"] == []
    assert second["cosine_attention"] == pytest.approx(1)


def test_an_earlier_report_is_kept(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text("{}")
    run(checkpoint, tmp_path, status=2)
    assert "already holds a result" in capsys.readouterr().err


def test_units_that_hold_most_of_the_importance() -> None:
    assert units_holding(torch.tensor([0.0, 9.0, 1.0])) == 1
    assert units_holding(torch.tensor([1.0, 1.0, 1.0, 1.0])) == 4
    assert units_holding(torch.tensor([1.0, 1.0, 1.0, 1.0]), share=0.5) == 2
    assert units_holding(torch.zeros(3)) == units_holding(torch.zeros(0)) == 0
