"""Records are data: nothing they name is called."""

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from oc20_files import Pyg1Data, dumps_pyg1, s2ef_fields, write_lmdb
from torch_geometric.data import Data

from datasets_oc20 import DataError, OC20Lmdb
from datasets_oc20.safe_pickle import _ALLOWED, RefusedPickleError, load_inert


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments) -> None:
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts


def tensor_with_storage(content: bytes) -> Call:
    """Pickles to a tensor of 5 x 3 numbers whose storage is `content`."""
    storage = Call(torch.storage._load_from_bytes, content)
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, (5, 3), (3, 1), False, None)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"(posix|nt)\.system"),
        (subprocess.check_output, r"(subprocess|commands)\.check_output"),
        (eval, r"(builtins|__builtin__)\.eval"),
        (getattr, r"(builtins|__builtin__)\.getattr"),
        (torch.load, r"torch\.serialization\.load"),
    ],
)
def test_code_at_the_top_is_refused(tmp_path: Path, function, name: str, protocol: int) -> None:
    mark = tmp_path / "executed"
    value = pickle.dumps(Call(function, f"touch {mark}"), protocol=protocol)
    dataset = OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", [value]))
    with pytest.raises(DataError, match=rf"a\.lmdb, key 0: the pickle is refused, it would run {name}"):
        dataset[0]
    with pytest.raises(DataError, match="would run"):
        _ = dataset.natoms
    assert not mark.exists()


@pytest.mark.parametrize("field", ["pos", "sid", "edge_index", "unknown"])
def test_code_in_a_field_is_refused(tmp_path: Path, field: str) -> None:
    mark = tmp_path / "executed"
    value = pickle.dumps(Data(**{**s2ef_fields(), field: Call(os.system, f"touch {mark}")}), protocol=4)
    with pytest.raises(DataError, match=r"would run (posix|nt)\.system"):
        OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", [value]))[0]
    assert not mark.exists()


def test_code_inside_a_tensor_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    evil = pickle.dumps(Call(os.system, f"touch {mark}"), protocol=2)
    torch_file = tmp_path / "evil.pt"
    torch.save(Call(os.system, f"touch {mark}"), torch_file, _use_new_zipfile_serialization=False)
    zip_file = tmp_path / "evil_zip.pt"
    torch.save(Call(os.system, f"touch {mark}"), zip_file)
    for content in (evil, torch_file.read_bytes(), zip_file.read_bytes()):
        value = dumps_pyg1({**s2ef_fields(), "pos": tensor_with_storage(content)})
        path = write_lmdb(tmp_path / "a.lmdb", [value])
        with pytest.raises(DataError, match=r"a\.lmdb, key 0: the pickle is refused"):
            OC20Lmdb(path)[0]
        path.unlink()
    # A stored edge list is never read, so what it holds can do no harm either.
    unread = {**s2ef_fields(), "edge_index": tensor_with_storage(torch_file.read_bytes())}
    OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1(unread)]))[0]
    assert not mark.exists()


def test_code_in_the_length_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    length = pickle.dumps(Call(os.system, f"touch {mark}"), protocol=2)
    path = write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1(s2ef_fields())], length)
    with pytest.raises(DataError, match=r"a\.lmdb, key length: .*would run"):
        OC20Lmdb(path)
    assert not mark.exists()


def test_the_length_must_be_a_number(tmp_path: Path) -> None:
    for number, length in enumerate((pickle.dumps("many", 4), b"many", pickle.dumps(-1, 4))):
        path = write_lmdb(tmp_path / f"{number}.lmdb", [dumps_pyg1(s2ef_fields())], length)
        with pytest.raises(DataError, match="key length: the number of records"):
            OC20Lmdb(path)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5, 4), (4, 1)),
        (-1, (5, 3), (3, 1)),
        (0, (5, 3), (1000, 1)),
        (1, (5, 3), (3, 1)),
        (0, (5,), (3, 1)),
    ],
)
def test_tensors_beyond_their_storage_are_refused(offset: int, size: tuple, stride: tuple) -> None:
    storage = torch.zeros(15).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    value = Call(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, None)
    with pytest.raises(RefusedPickleError):
        load_inert(pickle.dumps(value, 4)).tensor()


def test_the_allow_list_calls_nothing_of_torch_or_numpy() -> None:
    for target in _ALLOWED.values():
        assert target.__module__ in ("datasets_oc20.safe_pickle", "collections")


def test_unknown_classes_and_persistent_ids_are_refused() -> None:
    with pytest.raises(RefusedPickleError, match=r"would run oc20_files\.Pyg1Data"):
        load_inert(pickle.dumps(Pyg1Data({}), 4))
    with pytest.raises(RefusedPickleError, match="outside the record"):
        load_inert(b"\x80\x02X\x01\x00\x00\x00aQ.")
