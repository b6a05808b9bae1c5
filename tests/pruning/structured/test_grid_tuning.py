"""The smallest S2 grids within a tolerance."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_command
from model_helpers import cluster, random_model, slab, small_config, water
from torch_geometric.data import Data

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.model.grid_resolution import GridResolution
from equiformer2.pruning.structured.grid_tuning import GridRow, present_grids, tune_grid, with_grids

ROOT = Path(__file__).parents[3]
DATA = str(ROOT / "tests/fixtures/datasets_oc20/s2ef_val_20_packed.lmdb")


def one_block(grid: Any = 10, **options: Any) -> EquiformerV2:
    return random_model(small_config(num_layers=1, grid_resolution=grid, **options))


def structures() -> list[Data]:
    found = [cluster(), water()]
    for structure in found:
        structure.fixed = torch.arange(structure.natoms) == 0
    return found


def test_the_same_weights_on_the_same_grids() -> None:
    model = one_block()
    same = with_grids(model, GridResolution((10, 10), (10, 10)))
    with torch.no_grad():
        for name, value in model(slab()).items():
            assert torch.equal(same(slab())[name], value)
    assert present_grids(one_block(None)) == GridResolution((6, 3), (6, 7))
    other = with_grids(model, GridResolution((6, 5), (8, 9)))
    assert other.config.grid_resolution == GridResolution((6, 5), (8, 9))
    assert len(other.blocks[0].ffn.grid.to_grid) == 72


def test_answers_stay_within_the_tolerance() -> None:
    model = one_block()
    seen: list[GridRow] = []
    choice = tune_grid(model, structures(), 1e-3, progress=seen.append)
    first, last = choice.rows[0], choice.rows[-1]
    assert (first.drift, first.macs) == (0, 1)
    assert first.resolution == GridResolution((10, 10), (10, 10))
    assert last.resolution == choice.resolution
    assert last.drift < 1e-3
    assert last.macs < 0.95
    assert {row.resolution for row in seen} == {row.resolution for row in choice.rows}
    # The next smaller one in any direction was tried, and drifted too far.
    (attn, ffn) = choice.resolution.attn, choice.resolution.ffn
    assert attn[1] < 10
    fewer = GridResolution((10, attn[1] - 1), (10, 10))
    assert next(row for row in choice.rows if row.resolution == fewer).drift >= 1e-3
    assert ffn[0] <= 10

    batch = [structure.clone() for structure in structures()]
    small = with_grids(model, choice.resolution)
    with torch.no_grad():
        for structure in batch:
            before, after = model(structure)["forces"][1:], small(structure)["forces"][1:]
            assert float((after - before).norm(dim=1).sum() / before.norm(dim=1).sum()) < 3e-3


def test_a_tolerance_that_nothing_meets_leaves_the_grids() -> None:
    choice = tune_grid(one_block(8), structures(), 1e-12)
    assert choice.resolution == GridResolution((8, 8), (8, 8))
    assert choice.rows[-1].drift == 0
    assert len(choice.rows) > 3


def test_rotations() -> None:
    coarse = one_block(None)
    choice = tune_grid(coarse, structures(), 0.01, measure="rotation")
    assert choice.rows[0].rotation > 0.01 > choice.rows[-1].rotation
    assert choice.rows[-1].drift > 0
    with pytest.raises(InputError, match=r"the rotation error is .* instead of 1e-12"):
        tune_grid(coarse, structures(), 1e-12, measure="rotation")


def test_grids_that_nothing_uses_stay() -> None:
    model = one_block(8, use_gate_act=True, use_grid_mlp=False)
    assert tune_grid(model, structures(), 0.5).resolution == GridResolution((8, 8), (8, 8))


@pytest.mark.parametrize("tol", [0.0, float("nan")])
def test_wrong_input(tol: float) -> None:
    with pytest.raises(InputError, match="give a positive deviation"):
        tune_grid(one_block(), structures(), tol)
    with pytest.raises(InputError, match="no structures"):
        tune_grid(one_block(), [], 0.1)


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, averaged = one_block(10), random_model(small_config(num_layers=1, grid_resolution=10), seed=1)
    save_checkpoint(
        tmp_path / "model.pt",
        model=model,
        raw_state=model.state_dict(),
        averaged_state=averaged.state_dict(),
        normalizers=Normalizers(energy=Normalizer(-0.7, 2.0), forces=Normalizer(0.0, 2.5)),
        energy_kind="adsorption",
        provenance={"origin": "random weights"},
    )
    out = tmp_path / "tuned.pt"
    files = ["--checkpoint", str(tmp_path / "model.pt"), "--data", DATA, "--out", str(out)]
    assert run_command("prune grid", *files, "--structures", "1", "--tol", "0.05") == 0
    record = json.loads((tmp_path / "tuned.json").read_text())
    chosen = GridResolution.read(record["resolution"])
    assert record["rows"][-1]["drift"] < 0.05
    assert "10 x 10" in capsys.readouterr().out
    for kind, before in (("raw", model), ("averaged", averaged)):
        loaded = load_checkpoint(out, kind)
        assert loaded.config.grid_resolution == chosen
        for name, value in before.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], value)
