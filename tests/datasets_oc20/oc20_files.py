"""Makers of LMDB files as OC20 wrote them, and of raw files."""

import pickle
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from torch_geometric.data import Data

FIXTURES = Path(__file__).parents[1] / "fixtures" / "datasets_oc20"
VAL_20 = FIXTURES / "s2ef_val_20.lmdb"


class Pyg1Data:
    """Pickles as PyG 1's `Data` did: the class by name, and the fields as its `__dict__`."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)


def dumps_pyg1(fields: dict[str, Any]) -> bytes:
    """A PyG 1 pickle of `fields`."""
    stream = pickle.dumps(Pyg1Data(fields), protocol=2)
    ours, theirs = f"c{__name__}\nPyg1Data\n".encode(), b"ctorch_geometric.data.data\nData\n"
    assert ours in stream
    return stream.replace(ours, theirs)


def s2ef_fields(natoms: int = 5, seed: int = 0) -> dict[str, Any]:
    """An S2EF record under OC20's names."""
    random = torch.Generator().manual_seed(seed)
    return {
        "pos": torch.rand(natoms, 3, generator=random) * 5,
        "atomic_numbers": torch.randint(1, 80, (natoms,), generator=random).float(),
        "cell": torch.eye(3)[None] * 8.0,
        "natoms": natoms,
        "tags": torch.randint(0, 3, (natoms,), generator=random),
        "fixed": torch.randint(0, 2, (natoms,), generator=random).float(),
        "y": -1.25 + seed,
        "force": torch.randn(natoms, 3, generator=random),
        "sid": torch.LongTensor([1234]),
        "fid": torch.LongTensor([seed]),
        "edge_index": torch.zeros(2, 7, dtype=torch.long),
        "cell_offsets": torch.zeros(7, 3),
    }


def is2re_fields(natoms: int = 5, seed: int = 0) -> dict[str, Any]:
    """An IS2RE record under OC20's names."""
    fields = s2ef_fields(natoms, seed)
    del fields["y"], fields["fid"]
    return {
        **fields, "sid": 77, "y_init": 3.5, "y_relaxed": -0.75, "pos_relaxed": fields["pos"] + 0.1
    }  # fmt: skip


def write_lmdb(path: Path, values: list[bytes], length: bytes | None = None) -> Path:
    """An LMDB with keys 0 … n-1 and, when given, `length`."""
    environment = lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for key, value in enumerate(values):
            transaction.put(str(key).encode(), value)
        if length is not None:
            transaction.put(b"length", length)
    environment.close()
    return path


def structure(natoms: int = 4, energy: float = 0.5, seed: int = 0, **changes: Any) -> Data:
    """A structure of the data object."""
    random = np.random.default_rng(seed)
    fields = {
        "pos": torch.from_numpy(random.uniform(0, 6, (natoms, 3))),
        "atomic_numbers": torch.from_numpy(random.integers(1, 80, natoms)),
        "cell": torch.eye(3, dtype=torch.float64)[None] * 7,
        "pbc": torch.ones(1, 3, dtype=torch.bool),
        "tags": torch.from_numpy(random.integers(0, 3, natoms)),
        "fixed": torch.from_numpy(random.integers(0, 2, natoms).astype(bool)),
        "energy": torch.tensor([energy], dtype=torch.float64),
        "forces": torch.from_numpy(random.normal(size=(natoms, 3)).astype("f4")),
        "natoms": natoms,
        "sid": f"system{seed}",
        "fid": seed,
    }
    return Data(**{**fields, **changes})


def assert_same(one: Data, other: Data) -> None:
    """All fields equal, in value, shape and dtype."""
    assert set(one.keys()) == set(other.keys())
    for name in one.keys():  # noqa: SIM118 (iterating a Data yields pairs)
        if isinstance(one[name], torch.Tensor):
            assert one[name].dtype == other[name].dtype, name
            assert torch.equal(one[name], other[name]), name
        else:
            assert one[name] == other[name], name


def frame_text(natoms: int = 4, energy: float = -20.0, force: float = 0.1, seed: int = 0) -> str:
    """One frame of a raw file; atom 0 is fixed, the last is the adsorbate."""
    random = np.random.default_rng(seed)
    rows = [
        f'{natoms}\nLattice="8.0 0.0 0.0 1.0 8.0 0.0 0.0 0.0 20.0" '
        "Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3 "
        f'energy={energy} free_energy={energy} pbc="T T T"'
    ]
    for atom in range(natoms):
        x, y, z = random.uniform(0, 8, 3)
        last = atom == natoms - 1
        rows.append(
            f"{'O' if last else 'Cu'} {x:.6f} {y:.6f} {z:.6f} {'F' if atom == 0 else 'T'} "
            f"{2 if last else int(atom > 0)} {99.0 if atom == 0 else force} 0.0 0.0"
        )
    return "\n".join(rows) + "\n"
