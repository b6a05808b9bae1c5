"""Files that are not checkpoints, are damaged, or would run code."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_helpers import FIXTURES

from equiformer2.checkpoint import load_checkpoint
from equiformer2.checkpoint.tensor_files import plain, read_tensors
from equiformer2.errors import InputError


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_execute_is_refused(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"state_dict": {}, "config": {"x": Malicious(marker)}, "normalizers": {}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"evil\.pt .*posix\.system"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"evil\.pt"):
        load_checkpoint(path)
    assert not marker.exists()


def test_other_python_objects_are_named(tmp_path: Path) -> None:
    torch.save({"path": tmp_path}, tmp_path / "object.pt")
    with pytest.raises(InputError, match=r"pathlib\.PosixPath"):
        load_checkpoint(tmp_path / "object.pt")


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_one_sentence(tmp_path: Path, fraction: float) -> None:
    whole = (FIXTURES / "ckpt_v1_flat_best.pt").read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(InputError, match=r"cut\.pt is (truncated, )?damaged"):
        load_checkpoint(path)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    content = bytearray((FIXTURES / "ckpt_v1_flat_best.pt").read_bytes())
    middle = len(content) // 2
    content[:middle] = bytes(middle)
    path = tmp_path / "zeros.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"zeros\.pt"):
        load_checkpoint(path)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "flipped.pt"
    torch.save({"state_dict": {"x": torch.zeros(50_000)}, "config": {}, "normalizers": {}}, path)
    content = bytearray(path.read_bytes())
    content[100_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"flipped\.pt is truncated, damaged"):
        load_checkpoint(path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"hello world\n" * 50, b"PK\x03\x04", os.urandom(200), b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(InputError, match=str(path)):
            load_checkpoint(path)
    with pytest.raises(InputError, match="is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.pt")


def test_other_dictionaries_are_described(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.5.0", "loops": {}}, path)
    with pytest.raises(InputError, match="state of a training run"):
        load_checkpoint(path)
    torch.save({"model": torch.zeros(1), "epoch": 3}, path)
    with pytest.raises(InputError, match=r"checkpoint: .*epoch, model"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds a list"):
        load_checkpoint(path)


def test_numpy_scalars_of_old_files_are_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.pt"
    torch.save({"metric": np.float64(0.25), "numel": np.int64(3)}, path)
    assert plain(read_tensors(path)) == {"metric": 0.25, "numel": 3}


def test_plain_leaves_no_objects() -> None:
    value = {1: (np.float32(0.5), {"a": None}), "t": torch.arange(3), "big": torch.zeros(100), "p": Path("x")}
    assert plain(value) == {
        "1": [0.5, {"a": None}],
        "t": [0, 1, 2],
        "big": "tensor of shape (100,)",
        "p": "x",
    }
