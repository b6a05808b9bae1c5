"""Precision and backend of inference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor
from equiformer2.inference.predictor import matmul_precision


def forces(atoms: Atoms, checkpoint: Path, **options: str) -> np.ndarray:
    atoms.calc = EquiformerV2Calculator(checkpoint, **options)
    return atoms.get_forces(apply_constraint=False)


def test_bfloat16_is_near_float32_but_not_equal(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    exact = forces(oxygen_on_copper, checkpoint)
    rounded = forces(oxygen_on_copper, checkpoint, precision="bf16")
    assert rounded.dtype == exact.dtype
    assert 0 < np.linalg.norm(rounded - exact) <= 0.1 * np.linalg.norm(exact)


def test_results_tell_their_precision(checkpoint: Path) -> None:
    assert EquiformerV2Calculator(checkpoint, precision="bf16").parameters["precision"] == "bf16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bfloat"}, "float32, tf32, bf16"),
        ({"precision": "tf32"}, "'tf32' needs a CUDA device, not cpu"),
        ({"backend": "cuda"}, "'cuda' cannot be used: known are auto, torch, cpp, compile, triton"),
    ],
)
def test_refusals(options: dict[str, str], message: str, checkpoint: Path) -> None:
    with pytest.raises(InputError, match=message):
        Predictor(checkpoint, **options)


def test_triton_without_a_gpu_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="'triton' cannot be used"):
        Predictor(checkpoint, backend="triton")


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_global_settings_are_put_back(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision(precision, torch.device("cpu")):
        inside = torch.get_float32_matmul_precision()
    assert inside == {"float32": "highest", "tf32": "high"}[precision]
    assert torch.get_float32_matmul_precision() == before
