"""The public 31M checkpoint (eq2_31M_ec4_allmd.pt): its 4,455 keys, shapes, configuration and constants.

The fixtures were recovered from a truncated copy: the names, shapes, shared storages and training config
of the whole file, and 131 of its derived constants.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import FIXTURES
from torch import Tensor

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import load_checkpoint
from equiformer2.checkpoint.constants import ReferenceConstants, is_derived_constant
from equiformer2.checkpoint.reference import config_from_reference, strip_prefix
from equiformer2.errors import InputError
from equiformer2.model.so3 import S2Grid
from equiformer2.model.so3.grid import m_major_order

LAYOUT = json.loads(gzip.decompress((FIXTURES / "eqv2_31M_layout.json.gz").read_bytes()))
RECOVERED = {
    key: torch.from_numpy(array) for key, array in np.load(FIXTURES / "eqv2_31M_constants.npz").items()
}
CONFIG = config_from_reference({**LAYOUT["config"]["model_attributes"], "name": LAYOUT["config"]["model"]})


@pytest.fixture(scope="module")
def public() -> dict[str, Any]:
    """A file of the public layout: random parameters, true constants; the recovered ones where there are."""
    constants = ReferenceConstants(CONFIG)
    generator = torch.Generator().manual_seed(0)
    storages: dict[int, Tensor] = {}
    state = {}
    for key, (shape, kind, storage) in LAYOUT["keys"].items():
        name = strip_prefix(key)
        if storage not in storages:
            if key in RECOVERED:
                storages[storage] = RECOVERED[key]
            elif is_derived_constant(name):
                expected = constants[name]
                assert expected is not None
                storages[storage] = expected.to({"float": torch.float32, "long": torch.int64}[kind])
            else:
                storages[storage] = torch.randn(shape, generator=generator)
        state[key] = storages[storage]
        assert list(state[key].shape) == shape
    normalizers = {
        "target": {"mean": torch.tensor(-0.7554450631141663), "std": torch.tensor(2.887317180633545)},
        "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(2.887317180633545)},
    }
    return {
        "state_dict": state,
        "config": LAYOUT["config"],
        "normalizers": normalizers,
        "val_metrics": None,
        "amp": None,
    }


def test_its_configuration_is_the_31M_preset() -> None:
    assert ModelConfig.preset("31M") == CONFIG


def test_every_key_is_a_parameter_or_a_derived_constant() -> None:
    names = {strip_prefix(key): shape for key, (shape, _, _) in LAYOUT["keys"].items()}
    assert len(names) == len(LAYOUT["keys"]) == 4455
    constants = {name for name in names if is_derived_constant(name)}
    model = EquiformerV2(CONFIG)
    parameters = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: names[name] for name in names if name not in constants} == parameters
    assert (len(parameters), len(constants)) == (370, 4085)
    expected = ReferenceConstants(CONFIG)
    for name in constants:
        constant = expected[name]
        assert constant is not None, name
        assert list(constant.shape) == names[name], name


def test_its_recovered_constants_equal_ours() -> None:
    expected = ReferenceConstants(CONFIG)
    assert len(RECOVERED) == 131
    for key, recovered in RECOVERED.items():
        constant = expected[strip_prefix(key)]
        assert constant is not None, key
        if recovered.dtype == torch.int64:
            assert torch.equal(recovered, constant), key
        else:
            torch.testing.assert_close(recovered.double(), constant.double(), rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("mmax", [2, 4])
def test_its_grids_are_those_that_the_network_computes_with(mmax: int) -> None:
    order = m_major_order(4, mmax)
    ours = S2Grid(4, mmax, 18, order)
    kept = sorted(order)
    columns = [kept.index(index) for index in order]
    for which, matrix in (("to_grid_mat", ours.to_grid), ("from_grid_mat", ours.from_grid.t())):
        recovered = RECOVERED[f"module.module.SO3_grid.4.{mmax}.{which}"].flatten(0, 1)[:, columns]
        torch.testing.assert_close(matrix, recovered, rtol=1e-6, atol=1e-6)


def test_a_file_of_its_layout_loads(public: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "eq2_31M_ec4_allmd.pt"
    torch.save(public, path)
    try:
        checkpoint = load_checkpoint(path)
    finally:
        path.unlink()  # 125 MB
    assert (checkpoint.source_format, checkpoint.weights) == ("ocp-v0", "averaged")
    assert checkpoint.energy_kind == "adsorption"
    assert checkpoint.normalizers.forces.std == pytest.approx(2.887317180633545)
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, public["state_dict"][f"module.module.{name}"]), name


def test_a_file_with_one_wrong_grid_does_not(public: dict[str, Any], tmp_path: Path) -> None:
    key = "module.module.blocks.7.ffn.SO3_grid.4.4.from_grid_mat"
    grid = public["state_dict"][key].clone()
    grid[3, 4, 5] += 1e-4
    path = tmp_path / "edited.pt"
    torch.save(public | {"state_dict": public["state_dict"] | {key: grid}}, path)
    try:
        with pytest.raises(
            InputError, match=r"1 derived constants differ .*blocks\.7\.ffn\.SO3_grid\.4\.4\.from"
        ):
            load_checkpoint(path)
    finally:
        path.unlink()
