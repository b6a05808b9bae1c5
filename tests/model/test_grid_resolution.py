"""Grids of their own for attention and feed-forward networks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import batch_of, random_model, slab, small_config, water

from equiformer2 import ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.model.grid_resolution import GridResolution
from equiformer2.training.configuration import parse

BOTH = {"attn": (6, 7), "ffn": [8, 9]}


def test_equal_grids_are_one_number() -> None:
    batch = batch_of(slab(), water())
    one = random_model(small_config(grid_resolution=8))
    two = random_model(small_config(grid_resolution={"attn": (8, 8), "ffn": (8, 8)}))
    with torch.no_grad():
        for name, value in one(batch).items():
            assert torch.equal(two(batch)[name], value)


def test_each_grid_goes_where_it_belongs() -> None:
    model = random_model(small_config(grid_resolution=BOTH))
    assert len(model.blocks[1].ga.activation.s2_act.grid.to_grid) == 6 * 7
    assert len(model.blocks[1].ffn.grid.to_grid) == 8 * 9
    assert model.force_block is not None
    assert len(model.force_block.activation.s2_act.grid.to_grid) == 6 * 7


def test_it_survives_plain_values_and_files(tmp_path: Path) -> None:
    config = small_config(grid_resolution=BOTH)
    assert config.grid_resolution == GridResolution(attn=(6, 7), ffn=(8, 9))
    assert hash(config) == hash(ModelConfig.from_dict(config.to_dict()))
    model = random_model(config)
    save_checkpoint(
        tmp_path / "model.pt",
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(energy=Normalizer(0.0, 1.0), forces=Normalizer(0.0, 1.0)),
        energy_kind="adsorption",
        provenance={},
    )
    assert load_checkpoint(tmp_path / "model.pt").config == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [("18", 18), ("null", None), ('{"attn": [14, 11], "ffn": [18, 19]}', GridResolution((14, 11), (18, 19)))],
)
def test_command_line(text: str, expected: Any) -> None:
    run = parse(["--model.grid_resolution", text, "--data.train", "x", "--data.val", "y"])
    assert run.model.grid_resolution == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attn": (6, 7)}, "keys attn and ffn"),
        ({"attention": (6, 7), "ffn": (8, 9)}, "keys attn and ffn"),
        ({"attn": (6, 7, 8), "ffn": (8, 9)}, "grid_resolution.attn .*whole number"),
        ({"attn": 8, "ffn": (8, 9)}, "grid_resolution.attn .*whole number"),
        ({"attn": (6.5, 7), "ffn": (8, 9)}, "grid_resolution.attn .*whole number"),
        ({"attn": (6, 2), "ffn": (8, 9)}, "at least 6 latitudes and at least 3 longitudes"),
        ({"attn": (7, 7), "ffn": (8, 9)}, "grid_resolution.attn .*even"),
        ({"attn": (6, 7), "ffn": (6, 4)}, "grid_resolution.ffn .*at least 5 longitudes"),
    ],
)
def test_wrong_grids_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_config(grid_resolution=wrong)
