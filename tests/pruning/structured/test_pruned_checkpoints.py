"""A pruned network is an ordinary network: configuration, native file, calculator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from model_helpers import batch_of, cluster, random_model
from plans import MANY, PLANS, config_of

from equiformer2 import EquiformerV2Calculator, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.model.block_config import BlockConfig
from equiformer2.pruning import masked
from equiformer2.pruning.structured.apply import shrink

NORMALIZERS = Normalizers(Normalizer(-0.7, 2.0), Normalizer(0.0, 1.5))


def save(path: Path, model: Any) -> Path:
    save_checkpoint(
        path,
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=NORMALIZERS,
        energy_kind="adsorption",
        provenance={},
    )
    return path


def test_through_a_file_and_the_calculator(tmp_path: Path) -> None:
    model, data = random_model(config_of()), cluster()
    atoms = Atoms(data.atomic_numbers.numpy(), data.pos.numpy().astype(float), cell=20 * np.eye(3), pbc=True)
    small = shrink(model, MANY)
    path = save(tmp_path / "small.pt", small)
    assert load_checkpoint(path).config == small.config
    atoms.calc = EquiformerV2Calculator(path)
    found = atoms.get_potential_energy(), atoms.get_forces()
    with masked(model, MANY), torch.no_grad():
        out = model(batch_of(cluster()))
    # The free cluster in a large cell has the same neighbours.
    np.testing.assert_allclose(found[0], float(out["energy"]) * 2.0 - 0.7, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], out["forces"].numpy() * 1.5, rtol=1e-4, atol=1e-5)


def test_a_pruned_network_can_be_pruned_after_a_file(tmp_path: Path) -> None:
    model, batch = random_model(config_of()), batch_of(cluster())
    first, second = PLANS["heads"], PLANS["lmax 1"]
    loaded = load_checkpoint(save(tmp_path / "small.pt", shrink(model, first))).model
    with torch.no_grad():
        found = shrink(loaded, second)(batch)
        expected = shrink(model, first.compose(second))(batch)
    torch.testing.assert_close(found["forces"], expected["forces"])


def test_configurations_of_equal_blocks_are_written_as_before() -> None:
    values = config_of().to_dict()
    assert not {"blocks", "force_head", "energy_head"} & set(values)
    assert ModelConfig.from_dict(values) == config_of()


def test_configuration_and_back() -> None:
    config = MANY.applied_to(config_of())
    values = config.to_dict()
    values["blocks"] = list(values["blocks"])
    assert ModelConfig.from_dict(values) == config
    assert hash(config) == hash(ModelConfig.from_dict(values))
    assert config.is_pruned
    assert not config_of().is_pruned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (BlockConfig(),)}, r"model\.blocks has 1 blocks: must be as many as num_layers"),
        ({"blocks": 3}, r"model\.blocks = 3: must be a list"),
        (
            {"blocks": [{}, {"num_head": 2}]},
            r"model\.blocks\[1\]: unknown key 'num_head'; did you mean 'num_heads'",
        ),
        ({"blocks": [{}, {"num_heads": 0}]}, r"model\.blocks\[1\]\.num_heads = 0"),
        ({"blocks": [{"lmax": 4}, {}]}, r"model\.blocks\[0\]\.lmax = 4: must be at most"),
        ({"blocks": [{"lmax": 0}, {}]}, r"model\.blocks\[0\]\.lmax = 0"),
        ({"blocks": [{"attention": None}, {}]}, r"model\.blocks\[0\]\.attention = None"),
        ({"force_head": {"attention": False}}, r"model\.force_head .*no branch to drop"),
        ({"force_head": 1}, r"model\.force_head must be a dictionary"),
        (
            {"energy_head": {"ffn_input_channels": 2}, "use_grid_mlp": False},
            r"model\.energy_head\.ffn_input_channels needs model\.use_grid_mlp",
        ),
    ],
    ids=str,
)
def test_impossible_blocks_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(**changes)


def test_a_file_of_the_whole_network_does_not_fit_the_pruned_one(tmp_path: Path) -> None:
    model = random_model(config_of())
    small = shrink(model, MANY)
    with pytest.raises(InputError, match="another shape"):
        save_checkpoint(
            tmp_path / "x.pt",
            model=small,
            raw_state=model.state_dict(),
            averaged_state=None,
            normalizers=NORMALIZERS,
            energy_kind="adsorption",
            provenance={},
        )
