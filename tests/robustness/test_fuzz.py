"""Damaged and hostile input for every reader of foreign files: a sound value, or one sentence, and soon.

Each target below changes something valid at random (bytes, or values inside with right sums around them)
and reads it. Anything but a sound value, a `DataError` or an `InputError` of one line fails, and so does an
example of more than 2 s; hypothesis then shows the smallest input that it finds. What is found goes as a case
into the file that holds the table of its kind.

The targets share FUZZ_SECONDS (5 s), each round with examples of its own, the same in every run:

    FUZZ_SECONDS=600 pytest tests/robustness/test_fuzz.py
"""

import json
import lzma
import math
import os
import pickle
import pickletools
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import ase.db
import lmdb
import numpy as np
import orjson
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch_geometric.data import Data

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb, structure_record
from datasets_oc20.extxyz import read_frames
from datasets_oc20.legacy_formats import LegacyRecord, read_length
from datasets_oc20.lmdb_file import LmdbFile
from datasets_oc20.schema import FIELDS
from datasets_oc20.structure_record import PackedRecord
from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.checkpoint.adapter_files import Adapter, Base, read_adapter, write_adapter
from equiformer2.checkpoint.expert_files import ExpertContents, TaskInfo, read_experts, write_experts
from equiformer2.checkpoint.samples import Samples
from equiformer2.errors import InputError
from equiformer2.experts import ExpertNetwork, ExpertSettings
from equiformer2.experts.prune import PruneSettings, foreign_structures, prune_experts
from equiformer2.experts.retrieve import ExpertStore
from equiformer2.inference.atoms import atoms_to_data
from equiformer2.model.parametrizations import LowRank
from equiformer2.pruning import PruningPlan
from equiformer2.pruning.precision.compact import compact_network, write_compact
from equiformer2.pruning.precision.plan import PrecisionPlan
from equiformer2.training.configuration import parse

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "datasets_oc20"))
from oc20_files import dumps_pyg1, frame_text, is2re_fields, s2ef_fields, structure  # noqa: E402

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))
TARGETS = 12
SLOW = 2.0
"""Most seconds of the processor for one example."""
ROUND = 50
"""Examples with one seed; time is looked at in between, too."""
MODEL: dict[str, Any] = {
    "num_layers": 1, "sphere_channels": 4, "attn_hidden_channels": 4, "num_heads": 2,
    "attn_alpha_channels": 2, "attn_value_channels": 2, "ffn_hidden_channels": 4, "edge_channels": 4,
    "lmax": 1, "mmax": 1, "grid_resolution": 6, "num_distance_basis": 8, "max_num_elements": 32,
    "max_radius": 4.0,
}  # fmt: skip
Draw = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")


def refused(read: Callable[..., Any], *arguments: Any) -> str | None:
    """The message with which `read` refuses its arguments, None where it takes them."""
    try:
        read(*arguments)
    except (DataError, InputError) as error:
        return str(error)
    return None


def fuzz(inputs: st.SearchStrategy[Any], read: Callable[[Any], None]) -> None:
    """Give `read` inputs for this target's share of the time; it may raise nothing but the two errors."""
    end = time.monotonic() + SECONDS / TARGETS
    state = {"failed": False, "read": 0}

    def one(value: Any) -> None:
        # Once something has failed, hypothesis makes it smaller, and each step must be judged.
        if time.monotonic() > end and not state["failed"] and state["read"]:
            return
        state["read"] += 1
        before = time.process_time()
        try:
            told = refused(read, value)
            assert told is None or ("\n" not in told and 10 < len(told) < 2000), f"no sentence: {told}"
            assert time.process_time() - before < SLOW, "took too long"
        except BaseException:
            state["failed"] = True
            raise

    number = 0
    while number == 0 or time.monotonic() < end:
        run = given(inputs)(one)
        run = settings(
            max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )(run)
        seed(number)(run)()
        number += 1


# ---- changes

INTERESTING = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1]
ODD = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([*INTERESTING, -1, -(2**63), 10**30, 10**4000]),
        st.integers(-10, 200),
        st.floats(),
        st.sampled_from(
            ["", "1", "true", "nan", "1e999", "a" * 5000, "\ud800", "\0", "ä\n", "../x", ".", "@"]
        ),
        st.text(max_size=8),
        st.sampled_from(
            [[[[[[]]]]], [[1, 2], [3]], [[0.5] * 3] * 3, {"__ndarray__": [[1], "int64", [2**70]]}]
        ),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_bytes(draw: Draw, content: bytes, spare: int = 0) -> bytes:
    """`content` with a few bytes set, removed, doubled, inserted or cut off; the first `spare` stay."""
    value = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if len(value) <= spare:
            break
        place = draw(st.integers(spare, len(value) - 1))
        how = draw(st.sampled_from(["set", "set", "number", "cut", "double", "insert", "end"]))
        size = draw(st.integers(1, 16))
        if how == "set":
            value[place] = draw(st.integers(0, 255))
        elif how == "number":
            width = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from(INTERESTING)) % 256**width
            value[place : place + width] = number.to_bytes(width, "little")
        elif how == "cut":
            del value[place : place + size]
        elif how == "double":
            value[place:place] = value[place : place + size]
        elif how == "insert":
            value[place:place] = draw(st.binary(min_size=1, max_size=8))
        else:
            del value[place:]
    return bytes(value)


def changed_text(text: str) -> st.SearchStrategy[bytes]:
    """`text` with changes as of `changed_bytes`, mostly still ASCII."""
    content = text.encode()
    ascii_only = changed_bytes(content).map(lambda value: bytes(byte & 127 for byte in value))
    return st.one_of(ascii_only, ascii_only, ascii_only, changed_bytes(content))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values inside nested dictionaries and lists."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple) and len(tree) < 40:
        items = enumerate(tree)
    else:
        items = ()
    found = [path]
    for key, value in items:
        found += places(value, (*path, key))
    return found


def with_value(tree: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A copy of `tree` with another value at `path`; what is changed to `...` is left out."""
    if not path:
        return change(tree)
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = with_value(copy[path[0]], path[1:], change)
    if copy[path[0]] is ...:
        del copy[path[0]]
    return copy


def _with_key(name: str, value: Any) -> Any:
    return {**value, name: 1} if isinstance(value, dict) else value


@st.composite
def changed_values(draw: Draw, tree: Any, odd: st.SearchStrategy[Any] = ODD) -> Any:
    """`tree` with one to three values replaced, left out, repeated, or under another key."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree)[1:] or [()]))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "key"]))
        if how == "remove" and path:
            tree = with_value(tree, path, lambda _: ...)
        elif how == "wrap":
            tree = with_value(tree, path, lambda value: [value] * draw(st.integers(0, 3)))
        elif how == "key" and path:
            name = draw(st.text(max_size=5))
            tree = with_value(tree, path[:-1], partial(_with_key, name))
        else:
            new = draw(odd)
            tree = with_value(tree, path, lambda _, new=new: new)
    return tree


def assert_sound(data: Data) -> None:
    """Every field has its type and shape and nothing but what may be."""
    natoms = data.natoms
    assert type(natoms) is int
    assert natoms > 0
    assert isinstance(data.sid, str)
    assert type(data.fid) is int
    for name, field in FIELDS.items():
        if name not in data:
            assert not field.required, name
            continue
        array = data[name].numpy()
        assert array.dtype == field.dtype, name
        assert array.shape == tuple(natoms if size == "N" else size for size in field.shape), name
        assert np.isfinite(array.astype(np.float64)).all(), name
        assert ((array >= field.lowest) & (array <= field.largest)).all(), name


# ---- targets


def test_packed_records() -> None:
    value = structure_record.pack(structure())
    (length,) = struct.unpack_from("<I", value, 8)
    header, body = orjson.loads(value[12 : 12 + length]), value[12 + length :]

    def packed(text: bytes, body: bytes) -> bytes:
        content = struct.pack("<I", len(text)) + text + body
        return b"EOC1" + struct.pack("<I", zlib.crc32(content)) + content

    def with_sum(content: bytes) -> bytes:
        return content[:4] + struct.pack("<I", zlib.crc32(content[8:])) + content[8:]

    def read(content: bytes) -> None:
        try:
            data = PackedRecord(content, "x.lmdb, key 0").to_data()
        except DataError:
            record = PackedRecord(content, "x.lmdb, key 0")
            assert record.fields <= FIELDS.keys()
            assert record.natoms > 0
            raise
        assert_sound(data)
        assert PackedRecord(content, "").natoms == data.natoms
        again = PackedRecord(structure_record.pack(data), "").to_data()
        assert again.to_dict().keys() == data.to_dict().keys()

    fuzz(
        st.one_of(
            changed_bytes(value),
            changed_bytes(value, 8).map(with_sum),
            changed_bytes(body).map(lambda body: packed(orjson.dumps(header), body)),
            changed_values(header).map(lambda header: packed(json.dumps(header).encode(), body)),
        ),
        read,
    )


@st.composite
def changed_programs(draw: Draw, content: bytes) -> bytes:
    """A pickle with opcodes moved, repeated, removed and put in."""
    starts = [place for _, _, place in pickletools.genops(content)]
    parts = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    small = [
        b"0",
        b"2",
        b"(",
        b"N",
        b"}",
        b"]",
        b")",
        b"t",
        b"\x85",
        b"\x86",
        b"s",
        b"u",
        b"b",
        b"R",
        b"\x81",
        b"h\x01",
        b"h\x05",
        b"q\x00",
        b"a",
        b"e",
        b"d",
        b"l",
        b"o",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"K\x01",
        b"X\x01\x00\x00\x00a",
        b"\x93",
        b"\x94",
        b".",
    ]
    for _ in range(draw(st.integers(1, 5))):
        place, other = draw(st.integers(1, len(parts))), draw(st.integers(1, len(parts) - 1))
        how = draw(st.sampled_from(["insert", "copy", "remove", "swap"]))
        if how == "insert":
            parts.insert(place, draw(st.sampled_from(small)))
        elif how == "copy":
            parts[place:place] = parts[other : other + draw(st.integers(1, 4))]
        elif how == "remove" and len(parts) > 3:
            del parts[other]
        elif place < len(parts):
            parts[place], parts[other] = parts[other], parts[place]
    return b"".join(parts)


def test_oc20_pickles() -> None:
    arrays = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in s2ef_fields(3).items()
    }
    valid = [
        dumps_pyg1(s2ef_fields(3)),
        dumps_pyg1(is2re_fields(3)),
        pickle.dumps(Data(**s2ef_fields(3)), protocol=4),
        pickle.dumps(Data(**arrays), protocol=5),
        pickle.dumps(4, protocol=2),
    ]
    odd_tensors = ODD | st.sampled_from(
        [
            torch.zeros(0),
            torch.tensor(math.nan),
            torch.ones(3, 3) * 1j,
            torch.ones(3, dtype=torch.bool),
            np.array("x"),
            torch.zeros(0, 3),
            torch.ones(1).expand(9),
            np.float64(3),
            torch.ones(3, 3, dtype=torch.bfloat16),
        ]
    )

    def read(content: bytes) -> None:
        def natoms(content: bytes, where: str) -> int:
            return LegacyRecord(content, where).natoms()

        for use in (natoms, read_length):
            sentence = refused(use, content, "x.lmdb, key 0")
            assert sentence is None or "x.lmdb, key 0" in sentence
        fields = LegacyRecord(content, "x.lmdb, key 0").fields()
        assert_sound(structure_record.make_data(fields, "x.lmdb, key 0"))

    fuzz(
        st.one_of(
            st.sampled_from(valid).flatmap(changed_bytes),
            st.sampled_from(valid).flatmap(changed_programs),
            changed_values(s2ef_fields(3), odd_tensors).filter(lambda f: isinstance(f, dict)).map(dumps_pyg1),
            changed_values(arrays, odd_tensors).filter(lambda f: isinstance(f, dict)).map(dumps_pyg1),
        ),
        read,
    )


@st.composite
def changed_frames(draw: Draw, texts: list[str]) -> bytes:
    """Frames with other words in the header, other characters and other lines."""
    lines = draw(st.sampled_from(texts)).splitlines()
    words = [
        'pbc="T F"',
        "pbc=[1,0,1]",
        "energy=nan",
        "energy=1e400",
        "energy=[1]",
        "pbe/energy=-3",
        "{a b}",
        "x=_JSON [",
        'Lattice="1 0 0"',
        'Lattice="nan 0 0 0 8 0 0 0 20"',
        "'",
        '"',
        "[",
        "}",
        "\\",
        "=",
        "==",
        "a=b=c",
        "Properties=species:S:1",
        "Properties=a:b:c:d",
        "tags:I:1:",
        "energy=T",
        "_JSON {}",
        "\u2028",
        "\0",
        "Lattice=1e308",
        "[[1,2],[3]]",
        '"\\"',
        "٣=٣",
        "pbc=2",
        "energy=0x10",
        "energy=1_000",
    ]
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.integers(0, min(3, len(lines) - 1)))
        parts = lines[row].split(" ")
        place = draw(st.integers(0, len(parts) - 1))
        how = draw(st.sampled_from(["word", "number", "text", "remove", "line", "join"]))
        if how == "word":
            parts.insert(place, draw(st.sampled_from(words)))
        elif how == "number":
            parts[place] = draw(
                st.one_of(st.floats().map(str), st.integers(-5, 10**9).map(str), st.just("1d3"))
            )
        elif how == "text":
            parts[place] = draw(st.text(max_size=12))
        elif how == "remove":
            del parts[place]
        lines[row] = ("" if how == "join" else " ").join(parts)
        if how == "line":
            lines.insert(draw(st.integers(0, len(lines))), lines[row])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def test_raw_frames(tmp_path: Path) -> None:
    bundled = lzma.decompress((ROOT / "data/oc20_trajs/random1000100.extxyz.xz").read_bytes()).decode()
    lines = bundled.splitlines()
    one = "\n".join(lines[: int(lines[0]) + 2]) + "\n"
    texts = [one, frame_text(), frame_text(2) + frame_text(3)]
    path = tmp_path / "x.extxyz"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        for frame in read_frames(path):
            natoms = len(frame.pos)
            assert frame.pos.shape == frame.forces.shape == (natoms, 3)
            assert frame.atomic_numbers.shape == frame.tags.shape == frame.fixed.shape == (natoms,)
            assert isinstance(frame.energy, float)
            assert_sound(
                structure_record.make_data(vars(frame) | {"sid": "x", "fid": frame.index}, str(path))
            )

    fuzz(
        st.one_of(changed_frames(texts), st.sampled_from(texts).flatmap(changed_text)),
        read,
    )


def test_checkpoints(tmp_path: Path) -> None:
    valid, path = tmp_path / "valid.pt", tmp_path / "x.pt"
    network = EquiformerV2(ModelConfig(**MODEL))
    save_checkpoint(
        valid,
        model=network,
        raw_state=network.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(Normalizer(0.5, 2.0), Normalizer(0.0, 1.5), torch.zeros(33)),
        energy_kind="total",
        provenance={"seed": 1},
    )
    content = torch.load(valid, weights_only=True)
    old = torch.load(ROOT / "tests/fixtures/checkpoint/ckpt_v1_flat_best.pt", weights_only=True)
    with zipfile.ZipFile(valid) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (program,) = (name for name in parts if name.endswith("data.pkl"))
    tensors = st.sampled_from(
        [
            torch.zeros(0),
            torch.tensor(math.nan),
            torch.ones(3) * 1j,
            torch.ones(2, 2).bool(),
            torch.ones(1).expand(9),
            torch.ones(3).to_sparse(),
            torch.empty(3, device="meta"),
            torch.ones(33).long(),
        ]
    )
    # The structure of the weights stays, so that values of the settings are reached as often as names.
    trees = st.one_of(
        *(
            changed_values(tree[key], ODD | tensors).map(lambda v, tree=tree, key=key: {**tree, key: v})
            for tree, key in (
                (content, "model_config"),
                (content, "normalizers"),
                (content, "weights"),
                (old, "config"),
            )
        ),
        changed_values({name: None for name in content}).map(
            lambda top: (
                {k: content[k] if v is None and k in content else v for k, v in top.items()}
                if isinstance(top, dict)
                else top
            )
        ),
    )

    def write(kind_and_value: tuple[str, Any]) -> None:
        kind, value = kind_and_value
        if kind == "file":
            path.write_bytes(value)
        elif kind == "program":
            with zipfile.ZipFile(path, "w") as archive:
                for name, part in parts.items():
                    archive.writestr(name, value if name == program else part)
        else:
            torch.save(value, path)

    def read(kind_and_value: tuple[str, Any]) -> None:
        write(kind_and_value)
        found = load_checkpoint(path)
        assert isinstance(found.config, ModelConfig)
        assert all(torch.isfinite(value).all() for value in found.model.state_dict().values())
        assert math.isfinite(found.normalizers.energy.mean)
        assert found.normalizers.energy.std > 0
        assert found.energy_kind in ("adsorption", "total")
        json.dumps(found.provenance, allow_nan=False).encode()

    fuzz(
        st.one_of(
            st.tuples(st.just("file"), changed_bytes(valid.read_bytes())),
            st.tuples(st.just("program"), changed_bytes(parts[program])),
            st.tuples(st.just("program"), changed_programs(parts[program])),
            st.tuples(st.just("tree"), trees),
        ),
        read,
    )


def test_adapters(tmp_path: Path) -> None:
    valid, path = tmp_path / "valid.pt", tmp_path / "x.pt"
    kept = torch.arange(6).view(2, 3) % 2 == 0
    maps = {
        "a.weight": LowRank(torch.rand(2, 4, 2), torch.rand(2, 2, 3), 2.0),
        "b.weight": LowRank(torch.rand(2, 3) * kept, torch.rand(3, 5), 1.0, kept),
    }
    write_adapter(
        valid,
        Adapter(
            "valid.pt", Base("0" * 16, "0" * 64, "base.pt", "raw"), {"rank": 2}, maps,
            {"c.bias": torch.ones(3)}, Normalizers(Normalizer(0.5, 2.0), Normalizer(0.0, 1.5)), "total", {},
        ),
    )  # fmt: skip
    content = torch.load(valid, weights_only=True)
    tensors = st.sampled_from(
        [torch.zeros(0), torch.tensor(math.nan), torch.ones(9), torch.ones(3).bool(), torch.ones(2).half()]
    )

    def read(value: Any) -> None:
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            torch.save(value, path)
        found = read_adapter(path)
        assert 0 <= found.kept_share <= 1
        assert all(torch.isfinite(each.left).all() for each in found.maps.values())
        json.dumps(found.settings, allow_nan=False).encode()

    keys = ("base", "settings", "maps", "kept", "values", "replaced", "normalizers", "energy_kind", "units")
    trees = (
        changed_values(content[key], ODD | tensors).map(lambda v, key=key: {**content, key: v})
        for key in keys
    )
    fuzz(st.one_of(changed_bytes(valid.read_bytes()), *trees), read)


def test_expert_files(tmp_path: Path) -> None:
    valid, path = tmp_path / "valid.safetensors", tmp_path / "x.safetensors"
    mixture, names = ExpertSettings(num_experts=3, channels=2, hidden_channels=3), ("a", "b")
    experts = ExpertNetwork(EquiformerV2(ModelConfig(**MODEL)), mixture, names)
    structure, units = atoms_to_data(bulk("Cu")), Normalizers(Normalizer(0.5, 2.0), Normalizer(0.0, 1.5))
    samples, shares = Samples.from_structures([structure]), torch.ones(32).double() / 32
    tasks = {name: TaskInfo(name, "total", units, shares, {}, samples) for name in names}
    weights, plain = {"raw": experts.weights()}, mixture.to_dict()
    whole = ExpertContents("x", experts.config, plain, tasks, weights, {}, (0, 1, 2))  # type: ignore[arg-type]
    write_experts(valid, prune_experts(whole, "a", PruneSettings(0.5))[0])
    with safe_open(valid, "pt") as file:
        content = json.loads(file.metadata()["content"])
    tensors = load_file(valid)
    odd = st.sampled_from([torch.zeros(0), torch.tensor(math.nan), torch.ones(9), torch.ones(3).bool()])

    def read(value: Any) -> None:
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            text, held = value
            metadata = {"format": "equiformer2.experts", "content": json.dumps(text, default=str)}
            path.write_bytes(save(held, metadata))
        store = ExpertStore(path)
        store.network(store.find(structure))
        foreign_structures(read_experts(path), "a", [structure])

    fuzz(
        st.one_of(
            changed_bytes(valid.read_bytes()),
            changed_values(content).map(lambda text: (text, tensors)),
            changed_values(content["provenance"]["expert_pruning"]).map(
                lambda text: ({**content, "provenance": {"expert_pruning": text}}, tensors)
            ),
            st.tuples(st.sampled_from(sorted(tensors)), odd).map(
                lambda item: (content, {**tensors, item[0]: item[1]})
            ),
        ),
        read,
    )


def test_configurations(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "oc20_small.yaml").read_text(encoding="utf-8")
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    tree = yaml.safe_load(text)
    tree["trainer"] |= {"max_steps": 5, "limit_val_batches": 1, "callbacks": [{"class_path": "Timer"}]}
    tree["data"] |= {"normalizers": {"energy_mean": 0, "energy_std": 1, "forces_std": 1}}
    path = tmp_path / "x.yaml"

    def dumped(tree: Any) -> bytes:
        return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")

    def read(content: bytes) -> None:
        path.write_bytes(content)
        found = parse([f"--config={path}"])
        assert isinstance(found.model, ModelConfig)
        assert math.isfinite(found.optim.lr)
        assert yaml.safe_load(found.text)["name"] == found.run.name

    fuzz(st.one_of(changed_values(tree).map(dumped), changed_text(text)), read)


def test_ase_rows(tmp_path: Path) -> None:
    valid, path = tmp_path / "valid.aselmdb", tmp_path / "x.aselmdb"
    atoms = Atoms("CuCuO", [[0, 0, 0], [2, 0, 0], [1, 1, 2]], cell=[5, 5, 9], pbc=True, tags=[0, 1, 2])
    atoms.set_constraint([FixAtoms([0]), FixCartesian([1], [True, True, True])])
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=np.zeros((3, 3)), stress=np.zeros(6))
    with ase.db.connect(valid, type="aselmdb") as database:
        database.write(atoms, data={"sid": "a", "fid": 3, "y_init": 0.5})
    with closing(LmdbFile(valid)) as file:
        row = orjson.loads(zlib.decompress(file.get(b"1") or b""))
    ids: dict[str, Any] = {"1": row, "nextid": 2, "deleted_ids": []}

    def text(value: Any) -> bytes:
        return json.dumps(value).encode("utf-8", "surrogatepass")

    def rows(values: Any) -> dict[str, bytes]:
        return {key: zlib.compress(text(value)) for key, value in values.items()}

    def read(values: dict[str, bytes]) -> None:
        path.unlink(missing_ok=True)
        opened = lmdb.open(str(path), subdir=False, lock=False, sync=False, map_size=1 << 24)
        with opened as environment, environment.begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key.encode() or b"x", value)
        dataset = OC20Lmdb(path)
        for index in range(min(len(dataset), 3)):
            assert_sound(dataset[index])
        assert len(dataset.natoms) == len(dataset)

    fuzz(
        st.one_of(
            changed_values(row).map(lambda row: rows({**ids, "1": row})),
            changed_values({"nextid": 2, "deleted_ids": [1], "metadata": {"format_version": 1}})
            .filter(lambda top: isinstance(top, dict) and all(key.isascii() for key in top))
            .map(
                lambda top: rows({"1": row, **{key: value for key, value in top.items() if "\0" not in key}})
            ),
            changed_bytes(text(row)).map(lambda content: {**rows(ids), "1": zlib.compress(content)}),
            changed_bytes(zlib.compress(text(row))).map(lambda content: {**rows(ids), "1": content}),
        ),
        read,
    )


def test_pruning_plans() -> None:
    config = ModelConfig(**MODEL | {"num_layers": 2})
    plan = PruningPlan.keep_all(config).with_block(0, heads=(0,), mmax=0).with_block(1, attention=False)
    tree = plan.to_dict() | {"sphere_channels": [0, 2], "force_head": {"heads": [1]}}
    plan = PruningPlan.from_dict(tree)

    def read(text: str) -> None:
        found = PruningPlan.from_json(text, "plan.json")
        assert PruningPlan.from_json(found.to_json()) == found
        hash(found)
        assert isinstance(found.applied_to(config), ModelConfig)
        assert found.checked(config).checked(config) == found.checked(config)

    fuzz(
        st.one_of(
            changed_values(tree).map(json.dumps),
            changed_text(plan.to_json()).map(lambda content: content.decode("latin-1")),
        ),
        read,
    )


def test_precision_plans() -> None:
    config = ModelConfig(**MODEL)
    plan = PrecisionPlan.uniform(config, "int4", PruningPlan.keep_all(config).with_block(0, heads=(0,)))
    tree = plan.to_dict()

    def read(text: str) -> None:
        found = PrecisionPlan.from_json(text, "plan.json")
        assert PrecisionPlan.from_json(found.to_json()) == found
        hash(found)
        assert found.checked(config).checked(config) == found.checked(config)

    fuzz(
        st.one_of(
            changed_values(tree).map(json.dumps),
            changed_text(plan.to_json()).map(lambda content: content.decode("latin-1")),
        ),
        read,
    )


def test_compact_checkpoints(tmp_path: Path) -> None:
    network = EquiformerV2(ModelConfig(**MODEL))
    one = Normalizer(0.0, 1.0)
    dense, valid, path = (tmp_path / f"{name}.pt" for name in ("dense", "valid", "x"))
    save_checkpoint(
        dense,
        model=network,
        raw_state=network.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(one, one),
        energy_kind="total",
        provenance={},
    )
    plan = PrecisionPlan.uniform(network.config, "int4")
    write_compact(valid, load_checkpoint(dense), compact_network(network, plan), plan)
    content = torch.load(valid, weights_only=True)
    tensors = st.sampled_from([torch.zeros(0), torch.tensor(math.nan), torch.ones(9, 4).to(torch.uint8)])

    def read(stored: Any) -> None:
        torch.save({**content, "stored": stored}, path)
        found = load_checkpoint(path)
        assert all(torch.isfinite(value).all() for value in found.model.state_dict().values())

    fuzz(changed_values(content["stored"], ODD | tensors), read)


def test_lmdb_pages(tmp_path: Path) -> None:
    valid, path = tmp_path / "valid.lmdb", tmp_path / "x.lmdb"
    with LmdbWriter(valid, "adsorption", {}) as writer:
        for index in range(40):
            writer.write(structure(4 if index else 200, seed=index))
    content = valid.read_bytes()
    keys = [*(str(index).encode() for index in range(40)), b"length", b"metadata"]

    @st.composite
    def damaged(draw: Draw) -> bytes:
        value = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            # Headers and the pointers after them, where a change does the most, half of the time.
            page = draw(st.integers(0, len(value) // 4096 - 1)) * 4096
            place = page + draw(st.integers(0, 63) | st.integers(0, 4087))
            width = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from(INTERESTING) | st.integers(0, 2**64 - 1)) % 256**width
            value[place : place + width] = number.to_bytes(width, "little")
        return bytes(value[: draw(st.sampled_from([len(value)] * 5 + [len(value) // 2, 4096]))])

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with closing(LmdbFile(path)) as file:
            for key in keys:
                told = refused(file.get, key)
                assert told is None or "x.lmdb" in told
        dataset = OC20Lmdb(path)
        assert len(dataset.natoms) == len(dataset)
        for index in range(min(len(dataset), 40)):
            assert_sound(dataset[index])

    fuzz(damaged(), read)
