"""Records, raw frames and rows that are wrong: what is kept, and what is refused in one sentence."""

import json
import logging
import pickle
import random
import shutil
import struct
import sys
import zlib
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import ase.io
import lmdb
import numpy as np
import orjson
import pytest
import torch
from ase import Atoms
from ase.build import fcc111
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian, FixScaled

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb, structure_record
from datasets_oc20.extxyz import read_frames
from datasets_oc20.inspection import inspect_dataset
from datasets_oc20.preprocess import PreprocessOptions, preprocess
from datasets_oc20.reference_fit import fit_references
from datasets_oc20.targets import TargetSample, fit_linear_references, fit_normalizers
from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.inference.atoms import atoms_to_data
from equiformer2.training.losses import energy_l1
from equiformer2.training.metrics import S2EFMetrics

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "datasets_oc20"))
from oc20_files import dumps_pyg1, frame_text, s2ef_fields, structure, write_lmdb  # noqa: E402

# ---- comment lines of extended XYZ, as ASE reads them (B1)

LATTICE = 'Lattice="8.0 0.0 0.5 1.0 8.0 0.0 0.0 0.25 20.0"'
PROPERTIES = "Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3"
ROWS = "Cu 0 0 0 F 0 0 0 0\nO 0 0 2 T 2 0.5 0 0\n"
PLAIN = f"{LATTICE} {PROPERTIES} energy=-20.0"
HEADERS = [
    PLAIN,
    f"{PLAIN} pbe/energy=-3.0",
    f"pbe/energy=-3.0 {PLAIN}",
    f"{PLAIN} dft:energy=-3.0",
    f"dft:energy=-3.0 {PLAIN}",
    f'{PLAIN} note="one with energy=-3 in it"',
    f'note="one with energy=-3 in it" {PLAIN}',
    f"note='energy=-3' {PLAIN}",
    f"note={{energy=-3 and more}} {PLAIN}",
    f"note=[energy=-3] {PLAIN}",
    f"{PLAIN} ref.energy=-3",
    f"{PLAIN} my-energy=-3 x+energy=-4",
    f"{PLAIN} free_energy=-3.0 energy_per_atom=-1.5",
    f"{PLAIN} Energy=-3.0",
    f"{PLAIN} ENERGY=-3.0 REF_energy=-4.0",
    f"{PLAIN} method=pbe=energy=-3",
    f"{PLAIN} pbc='T T F'",
    f'{PLAIN} pbc="F F F"',
    f"{PLAIN} pbc={{1 1 0}}",
    f"{PLAIN} pbc=T",
    f'{PLAIN} pbc="true True FALSE"',
    f'{PLAIN} note="an escaped \\" quote energy=-3"',
    f'{PLAIN} stress="1 2 3 4 5 6 7 8 9" virial="1 0 0 0 1 0 0 0 1"',
    f"{PLAIN} converged flag other_flag",
    f"{LATTICE}   {PROPERTIES}\tenergy=-2e1",
    f"{LATTICE.replace(' ', ',')} {PROPERTIES} energy=-20",
    f"{LATTICE} {PROPERTIES} energy = -20.0",
    f"{LATTICE} {PROPERTIES} energy='-20.5'",
    f'{LATTICE} {PROPERTIES} energy="-20.25" config_type=slab',
    f"{LATTICE} {PROPERTIES} energy=-523456.789012345",
    f'{PLAIN} info=_JSON {{"energy":-3}}',
    f"{PLAIN} uid=17 tag_energy=-3 [energy]=-3",
    f"{LATTICE.lower().replace('lattice', 'lattice')} {PLAIN}",
]


def frame(header: str, rows: str = ROWS) -> str:
    return f"{rows.count(chr(10))}\n{header}\n{rows}"


@pytest.mark.parametrize("header", HEADERS)
def test_headers_as_ase_reads_them(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.extxyz"
    path.write_text(frame(header))
    try:
        atoms = ase.io.read(path)
        expected = atoms.get_potential_energy()
    except Exception:  # whatever ASE raises for a line that it cannot read
        with pytest.raises(DataError, match=r"a\.extxyz, frame 0"):
            list(read_frames(path))
        return
    (found,) = read_frames(path)
    assert found.energy == expected
    assert np.array_equal(found.cell, atoms.cell[:])
    assert np.array_equal(found.pbc, atoms.pbc)


BAD_FRAMES = [
    ("energy twice", f"{PLAIN} energy=-3.0", ROWS, "the key energy is there twice"),
    ("cell twice", f'{PLAIN} Lattice="9 0 0 0 9 0 0 0 9"', ROWS, "the key Lattice is there twice"),
    ("pbc twice", f'{PLAIN} pbc="T T T" pbc="F F F"', ROWS, "the key pbc is there twice"),
    ("energy of words", f"{LATTICE} {PROPERTIES} energy=low", ROWS, "energy holds something"),
    ("energy of truth", f"{LATTICE} {PROPERTIES} energy=T", ROWS, "energy holds something"),
    ("energy of numbers", f'{LATTICE} {PROPERTIES} energy="1 2"', ROWS, "energy holds 2 numbers"),
    ("only another energy", f"{LATTICE} {PROPERTIES} pbe/energy=-3", ROWS, "the frame has no energy"),
    ("tag 1.5", PLAIN.replace("tags:I", "tags:R"), ROWS.replace("T 2 ", "T 1.5 "), "atom 1 has tag 1.5"),
    ("tag nan", PLAIN.replace("tags:I", "tags:R"), ROWS.replace("T 2 ", "T nan "), "atom 1 has tag nan"),
    ("tag 0.999", PLAIN, ROWS.replace("F 0 ", "F 0.999 "), "atom 0 has tag 0.999"),
    ("deep JSON", f"{PLAIN} x=_JSON\\ " + "[" * 100_000, ROWS, None),
    ("many columns", PLAIN.replace("forces:R:3", f"forces:R:{'9' * 30}"), ROWS, "not readable"),
]


@pytest.mark.parametrize(
    ("name", "header", "rows", "message"), BAD_FRAMES, ids=[case[0] for case in BAD_FRAMES]
)
def test_frames_that_are_wrong(
    tmp_path: Path, name: str, header: str, rows: str, message: str | None
) -> None:
    (tmp_path / "a.extxyz").write_text(frame(header, rows))
    if message is None:  # as ASE does, if it ends
        with pytest.raises(DataError) if _refuses(tmp_path / "a.extxyz") else nullcontext():
            list(read_frames(tmp_path / "a.extxyz"))
        return
    with pytest.raises(DataError, match=rf"a\.extxyz, frame 0: .*{message}"):
        list(read_frames(tmp_path / "a.extxyz"))


def _refuses(path: Path) -> bool:
    try:
        ase.io.read(path)
    except Exception:  # ASE raises many types for the same kind of bad file
        return True
    return False


@pytest.mark.parametrize("count", ["10000000000", "9" * 5000, "²", "-4", "4.0", "1_0"])
def test_impossible_numbers_of_atoms(tmp_path: Path, count: str) -> None:
    (tmp_path / "a.extxyz").write_text(f"{count}\n{PLAIN}\n{ROWS}")
    with pytest.raises(DataError, match=r"frame 0: (.* is not a number of atoms|the file ends inside)"):
        list(read_frames(tmp_path / "a.extxyz"))


def test_the_same_key_twice_with_one_value_is_no_contradiction(tmp_path: Path) -> None:
    (tmp_path / "a.extxyz").write_text(frame(f"{PLAIN} energy=-20"))
    assert [one.energy for one in read_frames(tmp_path / "a.extxyz")] == [-20.0]


# ---- one schema for all formats (B4)

BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("fixed nan", {"fixed": [1.0, float("nan"), 0.0, 0.0]}, r"fixed holds NaN .*\(atom 1\)"),
    ("fixed 0.5", {"fixed": torch.tensor([0.0, 0.0, 0.5, 1.0])}, r"fixed holds 0\.5 \(atom 2\)"),
    ("fixed 2", {"fixed": torch.tensor([0, 0, 2, 1])}, "atom|fixed is 2"),
    ("pbc 0.5", {"pbc": [[1.0, 1.0, 0.5]]}, r"pbc holds 0\.5"),
    ("tags 1.5", {"tags": np.array([0, 0, 1.5, 2])}, r"tags holds 1\.5 \(atom 2\)"),
    ("tags 3", {"tags": np.array([0, 0, 3, 2])}, "atom 2 has tag 3"),
    ("tags -1", {"tags": np.array([0, 0, -1, 2])}, "atom 2 has tag -1"),
    ("tags 258", {"tags": np.array([258, 0, 0, 2])}, "atom 0 has tag 258"),
    ("tags of truth", {"tags": np.array([True, False, True, True])}, "tags holds true and false"),
    ("Z 6.5", {"atomic_numbers": torch.tensor([6.5, 1, 1, 1])}, r"atomic_numbers holds 6\.5 \(atom 0\)"),
    ("Z 0", {"atomic_numbers": [0, 1, 1, 1]}, "atom 0 has atomic number 0"),
    ("Z 119", {"atomic_numbers": [1, 119, 1, 1]}, "atom 1 has atomic number 119"),
    ("Z 2^63", {"atomic_numbers": np.array([1, 2**63, 1, 1], dtype="u8")}, "atom 1 has atomic number"),
    ("complex pos", {"pos": np.ones((4, 3), dtype=complex)}, "pos holds complex128, not numbers"),
    ("complex energy", {"energy": 1 + 2j}, "energy holds complex128"),
    ("text energy", {"energy": "-3.0"}, "energy holds <U4"),
    ("object forces", {"forces": np.array([[None] * 3] * 4)}, "forces holds object"),
    ("ragged pos", {"pos": [[0, 0, 0], [0, 0], [1, 1, 1], [2, 2, 2]]}, "pos holds values of unequal length"),
    ("transposed pos", {"pos": np.arange(12.0).reshape(3, 4)}, r"pos has shape \[3, 4\], expected \[4, 3\]"),
    ("transposed forces", {"forces": torch.zeros(3, 4)}, r"forces has shape \[3, 4\]"),
    ("far pos", {"pos": np.full((4, 3), 1e12)}, r"pos is 1e\+12 Å \(atom 0\), which is too far out"),
    ("huge cell", {"cell": 1e9 * np.eye(3)}, r"cell is 1e\+09 Å"),
    ("infinite cell", {"cell": np.full((3, 3), np.inf)}, "cell holds NaN or infinite"),
    ("large energy", {"energy": 1e12}, r"energy is 1e\+12 eV, which no structure has"),
    ("large force", {"forces": torch.full((4, 3), 1e30)}, "the force on atom 0 is"),
    ("nan y_relaxed", {"y_relaxed": float("nan")}, "y_relaxed holds NaN"),
    ("far pos_relaxed", {"pos_relaxed": np.full((4, 3), -1e8)}, "pos_relaxed is -1e"),
    ("nan stress", {"stress": np.full((3, 3), np.nan)}, "stress holds NaN"),
    ("sparse pos", {"pos": torch.eye(4)[:, :3].to_sparse()}, "pos holds Tensor, not an array"),
    ("meta pos", {"pos": torch.zeros(4, 3, device="meta")}, "pos holds Tensor, not an array"),
    ("bf16 pos", {"pos": torch.zeros(4, 3, dtype=torch.bfloat16)}, "pos holds Tensor, not an array"),
    ("dict pos", {"pos": {"x": 1}}, "pos holds object"),
    ("natoms -5", {"natoms": -5}, "natoms is -5, but the record has 4 atoms"),
    ("natoms 3", {"natoms": torch.tensor([3])}, "natoms is 3, but the record has 4"),
    ("fid text", {"fid": "first"}, "fid is 'first', not a frame number"),
    ("fid none", {"fid": None}, "fid is None"),
    ("fid 1e30", {"fid": 1e30}, r"fid is 1e\+30"),
    ("fid 10^30", {"fid": 10**30}, "fid is 10000"),
    ("fid 0.5", {"fid": 0.5}, "fid is 0.5"),
    ("fid digits", {"fid": "9" * 5000}, "fid is '999"),
    ("fid list", {"fid": [1, 2]}, "fid is a list"),
    ("sid list", {"sid": ["a"]}, "sid is a list; it must be text"),
    ("sid dict", {"sid": {"a": 1}}, "sid is a dict"),
    ("sid bytes", {"sid": b"a"}, "sid is a bytes"),
    ("sid long", {"sid": "a" * 10**6}, "sid has 1000000 characters"),
    ("sid huge", {"sid": 10**5000}, "sid is a number of more than 64 bits"),
    ("sid surrogate", {"sid": "a\ud800"}, "sid is not text in Unicode"),
]


@pytest.mark.parametrize("use", ["make_data", "pack"])
@pytest.mark.parametrize(("name", "change", "message"), BAD_FIELDS, ids=[case[0] for case in BAD_FIELDS])
def test_fields_that_are_wrong(name: str, change: dict[str, Any], message: str, use: str) -> None:
    fields = structure().to_dict() | change
    with pytest.raises(DataError, match=rf"here: .*({message})"):
        getattr(structure_record, use)(fields, "here")


def bomb(depth: int = 40) -> list[Any]:
    """2^depth values in memory of `depth`."""
    inner: list[Any] = [1, 2]
    for _ in range(depth):
        inner = [inner, inner]
    return inner


PICKLED: list[tuple[str, dict[str, Any], str]] = [
    ("sid bomb", {"sid": bomb()}, "repeats its parts"),
    ("pos bomb", {"pos": bomb()}, "repeats its parts"),
    ("fid bomb", {"fid": bomb()}, "repeats its parts"),
    ("fixed nan", {"fixed": torch.tensor([0, 1, float("nan"), 0, 0])}, "fixed holds NaN"),
    ("tags 1.5", {"tags": torch.tensor([0, 1, 1.5, 0, 0])}, "tags holds 1.5"),
    ("natoms -5", {"natoms": -5}, "natoms is -5"),
    ("fid text", {"fid": "frameX"}, "fid is 'frameX'"),
]


@pytest.mark.parametrize(("name", "change", "message"), PICKLED, ids=[case[0] for case in PICKLED])
def test_pickled_records_that_are_wrong(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1(s2ef_fields() | change)])
    with pytest.raises(DataError, match=rf"a\.lmdb, key 0: .*{message}"):
        OC20Lmdb(path)[0]


def repacked(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A record with a right checksum and this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<I", len(text) if length is None else length) + text + body
    return b"EOC1" + struct.pack("<I", zlib.crc32(content)) + content


def parts(value: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<I", value, 8)
    return orjson.loads(value[12 : 12 + length]), value[12 + length :]


def _array(header: dict[str, Any], name: str, **change: Any) -> dict[str, Any]:
    arrays = [
        [name, change.get("dtype", entry[1]), change.get("shape", entry[2])] if entry[0] == name else entry
        for entry in header["arrays"]
    ]
    return header | {"arrays": arrays}


HEADER_CHANGES: list[tuple[str, Any]] = [
    ("huge shape", lambda h: _array(h, "pos", shape=[10**18, 3])),
    ("overflow", lambda h: _array(h, "pos", shape=[2**62, 2**62, 16])),
    ("wraps to the right size", lambda h: _array(h, "pos", shape=[2**64 + 4, 3])),
    ("negative", lambda h: _array(h, "pos", shape=[-4, -3])),
    ("fraction", lambda h: _array(h, "pos", shape=[4.0, 3])),
    ("true", lambda h: _array(h, "energy", shape=[True])),
    ("many axes", lambda h: _array(h, "pos", shape=[1] * 70 + [4, 3])),
    ("text shape", lambda h: _array(h, "pos", shape="43")),
    ("no shape", lambda h: _array(h, "pos", shape=None)),
    ("object", lambda h: _array(h, "pos", dtype="|O")),
    ("complex", lambda h: _array(h, "pos", dtype="<c8")),
    ("big endian", lambda h: _array(h, "pos", dtype=">f8")),
    ("void", lambda h: _array(h, "pos", dtype="|V1000000000")),
    ("list type", lambda h: _array(h, "pos", dtype=[["a", "<f8"]])),
    ("repeated", lambda h: h | {"arrays": h["arrays"] + h["arrays"]}),
    ("unknown", lambda h: h | {"arrays": [*h["arrays"], ["mass", "<f8", [0]]]}),
    ("arrays null", lambda h: h | {"arrays": None}),
    ("arrays dict", lambda h: h | {"arrays": {"pos": 1}}),
    ("short entry", lambda h: h | {"arrays": [["pos"]]}),
    ("number entry", lambda h: h | {"arrays": [1, 2]}),
    ("no arrays", lambda h: h | {"arrays": []}),
    ("no sid", lambda h: {k: v for k, v in h.items() if k != "sid"}),
    ("fid null", lambda h: h | {"fid": None}),
    ("fid text", lambda h: h | {"fid": "x"}),
    ("fid 1e30", lambda h: h | {"fid": 1e30}),
    ("fid list", lambda h: h | {"fid": [[[]]]}),
    ("sid list", lambda h: h | {"sid": [1]}),
    ("sid deep", lambda h: json.dumps(h | {"sid": 0}).replace('"sid": 0', '"sid": ' + "[" * 9000).encode()),
    ("a list", lambda h: [h]),
    ("null", lambda h: b"null"),
    ("empty", lambda h: b""),
    ("not text", lambda h: b"\xff\xfe"),
]


@pytest.mark.parametrize(
    "change", [case[1] for case in HEADER_CHANGES], ids=[case[0] for case in HEADER_CHANGES]
)
def test_headers_that_are_damaged(change: Any) -> None:
    header, body = parts(structure_record.pack(structure()))
    value = repacked(change(header), body)
    with pytest.raises(DataError, match="here: "):
        structure_record.PackedRecord(value, "here").to_data()


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 - 1])
def test_lengths_of_headers_that_lie(length: int) -> None:
    header, body = parts(structure_record.pack(structure()))
    with pytest.raises(DataError, match="here: "):
        structure_record.PackedRecord(repacked(header, body, length), "here")


def test_fuzzed_headers_are_read_or_refused() -> None:
    """Every byte of the header and its length, with a right checksum: a record or one sentence."""
    value, rng = structure_record.pack(structure()), random.Random(0)
    _, body = parts(value)
    size = len(value) - len(body)
    for _ in range(3000):
        changed = bytearray(value[8:])
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(size - 8)] = rng.choice([rng.randrange(256), *b'0123456789-[]{},"eE.'])
        with suppress(DataError):
            structure_record.PackedRecord(
                b"EOC1" + struct.pack("<I", zlib.crc32(bytes(changed))) + bytes(changed), "here"
            ).to_data()


@pytest.mark.parametrize("counts", [[-5, 4], [0, 4], [2**31 - 1, 4], [4]])
def test_stored_numbers_of_atoms_that_lie(tmp_path: Path, counts: list[int]) -> None:
    path = tmp_path / "a.lmdb"
    with LmdbWriter(path, "total") as writer:
        writer.write(structure())
        writer.write(structure(seed=1))
    with (
        lmdb.open(str(path), subdir=False, lock=False) as environment,
        environment.begin(write=True) as change,
    ):
        change.put(b"natoms", np.array(counts, dtype="<i4").tobytes())
    with pytest.raises(DataError, match="key natoms"):
        _ = OC20Lmdb(path).natoms


def test_an_index_with_impossible_numbers_is_counted_anew(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1(s2ef_fields(n)) for n in (3, 5)])
    assert OC20Lmdb(path).natoms.tolist() == [3, 5]
    index = tmp_path / "a.lmdb.natoms.npz"
    identity = np.load(index)["identity"]
    for bad in ([-5, 3], [0, 5], [3.5, 5.5]):
        np.savez(index, natoms=bad, identity=identity)
        assert OC20Lmdb(path).natoms.tolist() == [3, 5]


# ---- float64 (B2)


@pytest.mark.parametrize("mean", [-5.2e5, -6e6, -0.8])
def test_total_energies_keep_their_digits_to_the_loss(tmp_path: Path, mean: float) -> None:
    """References, mean and std of energies that differ by meV, and an error of zero for the right answer."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.lmdb"
    with LmdbWriter(path, "total") as writer:
        for number in range(40):
            data = structure(natoms=4, seed=number)
            data.atomic_numbers = torch.tensor([29, 29, 29, 8] if number % 2 else [29, 29, 8, 8])
            data.energy = torch.tensor([mean + (number % 2) * 1e4 + 0.05 * rng.normal()], dtype=torch.float64)
            writer.write(data)
    dataset = OC20Lmdb(path)
    structures = [dataset[index] for index in range(40)]
    composition = np.zeros((40, 100))
    for row, data in enumerate(structures):
        np.add.at(composition[row], data.atomic_numbers.numpy(), 1)
    sample = TargetSample(composition, np.array([data.energy.item() for data in structures]), 1.0)
    references = fit_linear_references(sample)
    fitted = fit_normalizers(sample, references)
    assert 0.03 < fitted["energy"][1] < 0.5 + abs(mean) * 1e-6
    if abs(mean) > 1:
        fit = fit_references(dataset, num_workers=1)
        assert fit.residual_std == pytest.approx(fitted["energy"][1], rel=0.2)
    from torch_geometric.data import Batch

    batch = Batch.from_data_list(structures)
    normalizers = Normalizers(Normalizer(*fitted["energy"]), Normalizer(0.0, 1.0), references)
    target = normalizers.normalize_energy(batch.energy, batch)
    back = normalizers.denormalize({"energy": target}, batch)["energy"]
    assert (back - batch.energy).abs().max() < 1e-8
    rounded = normalizers.denormalize({"energy": target.float()}, batch)["energy"]
    assert (rounded - batch.energy).abs().max() < 1e-5
    loss = energy_l1(target.float(), target)
    assert (loss.dtype, float(loss)) == (torch.float32, 0.0)
    metrics = S2EFMetrics(forces=False)
    metrics.update({"energy": rounded}, batch)
    assert float(metrics.compute()["energy_mae"]) < 1e-5


def test_a_spread_of_zero_is_said(caplog: pytest.LogCaptureFixture) -> None:
    sample = TargetSample(np.ones((3, 100)), np.full(3, -5.0), 0.0)
    with caplog.at_level(logging.WARNING):
        assert fit_normalizers(sample) == {"energy": (-5.0, 1.0), "forces": (0.0, 1.0)}
    assert "energies of the training data have no spread" in caplog.text
    assert "forces of the training data have no spread" in caplog.text


# ---- periodic directions (B7)


def written(path: Path, pbcs: list[tuple[bool, bool, bool]]) -> OC20Lmdb:
    with LmdbWriter(path, "adsorption") as writer:
        for number, pbc in enumerate(pbcs):
            writer.write(structure(seed=number, pbc=torch.tensor([pbc])))
    return OC20Lmdb(path)


FFF, TTT, TTF = (False,) * 3, (True,) * 3, (True, True, False)
PBC = [
    ("all periodic", [TTT, TTT], set(), set()),
    ("slabs", [TTF, TTF], set(), set()),
    ("none periodic", [FFF, FFF], {"F F F"}, {"not periodic"}),
    ("mixed", [TTT, TTF, TTT], {"different periodic directions"}, {"other pbc"}),
    ("mixed with none", [TTT, TTT, FFF], {"F F F", "different"}, {"other pbc", "not periodic"}),
]


@pytest.mark.parametrize(("name", "pbcs", "said", "problems"), PBC, ids=[case[0] for case in PBC])
def test_periodic_directions_that_look_wrong_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, pbcs: Any, said: set[str], problems: set[str]
) -> None:
    dataset = written(tmp_path / "a.lmdb", pbcs)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for index in range(len(dataset)):
                dataset[index]
    for text in said:
        assert text in caplog.text
    assert len(caplog.records) == len(said)
    if said:
        assert "key" in caplog.text
        assert "sid 'system" in caplog.text
    found = inspect_dataset(dataset)
    assert problems == {"not periodic", "other pbc"} & set(found.problems)
    assert (found.num_suspicious > 0) or not problems


def test_preprocessing_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "random1.extxyz").write_text(frame_text().replace('pbc="T T T"', 'pbc="F F F"'))
    with caplog.at_level(logging.WARNING):
        preprocess(
            tmp_path / "raw", tmp_path / "a.lmdb", PreprocessOptions(energy_kind="total"), num_workers=1
        )
    assert caplog.text.count("pbc F F F") == 1
    assert "random1.extxyz, frame 0" in caplog.text


@pytest.mark.parametrize(("pbc", "cell", "times"), [(False, 9.0, 1), (True, 9.0, 0), (False, 0.0, 0)])
def test_the_calculator_says_it_once(
    caplog: pytest.LogCaptureFixture, pbc: bool, cell: float, times: int
) -> None:
    rng = np.random.default_rng(0)
    atoms = Atoms("PdAuH" + "He" * int(cell), 5 * rng.random((3 + int(cell), 3)), cell=[cell] * 3, pbc=pbc)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            atoms_to_data(atoms)
    assert caplog.text.count("pbc F F F") == times


# ---- ASE-LMDB rows (D, F5)

aselmdb = pytest.importorskip("ase_db_backends.aselmdb")


def slab(**changes: Any) -> Atoms:
    atoms = fcc111("Cu", (1, 1, 3), vacuum=8.0)
    atoms.set_tags(changes.get("tags", [0, 1, 1]))
    atoms.set_constraint(changes.get("constraint", FixAtoms([0])))
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=np.zeros((3, 3)))
    return atoms


def ase_file(path: Path, atoms: list[Atoms], change: Any = None, **puts: bytes) -> Path:
    with aselmdb.LMDBDatabase(path, use_lock_file=False) as database:
        for one in atoms:
            database.write(one)
    with (
        lmdb.open(str(path), subdir=False, lock=False) as environment,
        environment.begin(write=True) as writing,
    ):
        if change is not None:
            row = json.loads(zlib.decompress(writing.get(b"1")))
            row = change(row)
            writing.put(b"1", zlib.compress(row if isinstance(row, bytes) else json.dumps(row).encode()))
        for key, value in puts.items():
            writing.put(key.encode(), value)
    return path


def _indices(indices: Any, name: str = "FixAtoms") -> Any:
    key = "indices" if name == "FixAtoms" else "a"
    return lambda row: row | {"constraints": [{"name": name, "kwargs": {key: indices}}]}


ROWS_OF_ASE: list[tuple[str, Any, Any]] = [
    ("true false false", _indices([True, False, False]), [True, False, False]),
    ("none", _indices([False, False, False]), [False] * 3),
    ("from the end", _indices([-1]), [False, False, True]),
    ("cartesian, all", _indices([1], "FixCartesian"), [False, True, False]),
    ("scaled, all", _indices([0, 2], "FixScaled"), [True, False, True]),
    (
        "text constraints",
        lambda row: row | {"constraints": json.dumps(row["constraints"])},
        [True, False, False],
    ),
    ("short mask", _indices([True, False]), "has a mask of 2 for 3 atoms"),
    ("atom 99", _indices([99]), "FixAtoms names atom 99 of 3"),
    ("atom -4", _indices([-4]), "FixAtoms names atom -4 of 3"),
    ("atom 10^30", _indices([10**30]), "not whole numbers"),
    ("atom 0.5", _indices([0.5]), r"FixAtoms holds 0\.5, not whole numbers"),
    ("mask of numbers", _indices([1, 0, 0]), "names atoms twice, perhaps meant as a mask"),
    ("text", _indices("all"), "indices holds"),
    ("ragged", _indices([[0], [1, 2]]), "indices holds"),
    ("null", _indices(None), "indices holds"),
    (
        "no kwargs",
        lambda row: row | {"constraints": [{"name": "FixAtoms"}]},
        "FixAtoms cannot be read",
    ),
    ("constraints 7", lambda row: row | {"constraints": 7}, "not a row"),
    ("constraint list", lambda row: row | {"constraints": [[]]}, "does not say which atoms are fixed"),
    ("a list", lambda row: [row], "not a row"),
    ("a number", lambda row: 7, "not a row"),
    ("text row", lambda row: "row", "not a row"),
    ("null row", lambda row: b"nul", "not of an ASE database"),
    ("deep", lambda row: b"[" * 100_000, "not of an ASE database"),
    ("bomb", lambda row: b" " * (1 << 20) + b"]", "not of an ASE database"),
    ("key_value_pairs", lambda row: row | {"key_value_pairs": [1]}, "not a row"),
    ("data list", lambda row: row | {"data": [1, 2]}, "not a row"),
    ("numbers 6.5", lambda row: row | {"numbers": [29, 6.5, 29]}, "atomic_numbers holds 6.5"),
    (
        "numbers cast",
        lambda row: row | {"numbers": {"__ndarray__": [[3], "int64", [29, 6.5, 29]]}},
        "holds other",
    ),
    (
        "huge array",
        lambda row: row | {"positions": {"__ndarray__": [[10**12, 3], "float64", []]}},
        "does not hold",
    ),
    ("object array", lambda row: row | {"positions": {"__ndarray__": [[1], "O", [None]]}}, "does not hold"),
    ("ragged", lambda row: row | {"positions": [[0, 0, 0], [0], [1, 1, 1]]}, "pos holds values of unequal"),
    ("sid list", lambda row: row | {"data": {"sid": [["x"]]}}, "sid is a list"),
    ("fid text", lambda row: row | {"data": {"fid": "last"}}, "fid is 'last'"),
    ("natoms", lambda row: row | {"natoms": -5}, "natoms is -5"),
]


@pytest.mark.parametrize(("name", "change", "expected"), ROWS_OF_ASE, ids=[case[0] for case in ROWS_OF_ASE])
def test_rows(tmp_path: Path, name: str, change: Any, expected: Any) -> None:
    path = ase_file(tmp_path / "x.aselmdb", [slab()], change)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=rf"x\.aselmdb, (row|key) 1: .*({expected})"):
            OC20Lmdb(path)[0]
    else:
        assert OC20Lmdb(path)[0].fixed.tolist() == expected


@pytest.mark.parametrize(
    "constraint", [FixCartesian([0]), FixScaled([0]), FixCartesian([0], mask=(True, False, True))]
)
def test_constraints_in_all_directions_hold_atoms(tmp_path: Path, constraint: Any) -> None:
    path = ase_file(tmp_path / "x.aselmdb", [slab(constraint=constraint)])
    assert OC20Lmdb(path)[0].fixed.tolist() == [bool(np.all(constraint.mask)), False, False]


@pytest.mark.parametrize(
    "deleted", [[-1], [0], [10**30], [2], [1.5], ["1"], [None], [True], {"1": 2}, "1", 7, [[1]]], ids=str
)
def test_deleted_ids_that_are_wrong(tmp_path: Path, deleted: Any) -> None:
    path = ase_file(tmp_path / "x.aselmdb", [slab()], deleted_ids=zlib.compress(json.dumps(deleted).encode()))
    with pytest.raises(DataError, match=r"x\.aselmdb: .*ids"):
        OC20Lmdb(path)


@pytest.mark.parametrize("next_id", [10**30, 10**12, 100, -3, 1.5, "2", None, True])
def test_next_ids_that_are_wrong(tmp_path: Path, next_id: Any) -> None:
    path = ase_file(tmp_path / "x.aselmdb", [slab()], nextid=zlib.compress(json.dumps(next_id).encode()))
    with pytest.raises(DataError, match=r"x\.aselmdb: "):
        OC20Lmdb(path)


def test_rows_without_a_name_have_that_of_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    dataset = OC20Lmdb(ase_file(folder / "x.aselmdb", [slab(), slab(), slab()]))
    assert [data.sid for data in dataset] == ["set-x-1", "set-x-2", "set-x-3"]


@pytest.mark.parametrize(("tags", "expected"), [([0, 0, 0], [0, 1, 1]), ([0, 0, 2], [0, 0, 2])])
def test_tags_that_are_all_0_are_none(tmp_path: Path, tags: list[int], expected: list[int]) -> None:
    assert OC20Lmdb(ase_file(tmp_path / "x.aselmdb", [slab(tags=tags)]))[0].tags.tolist() == expected


# ---- LMDB environments (E)


def test_a_folder_that_is_an_environment_is_read(tmp_path: Path) -> None:
    written(tmp_path / "a.lmdb", [TTT])
    (tmp_path / "folder").mkdir()
    shutil.move(tmp_path / "a.lmdb", tmp_path / "folder" / "data.mdb")
    assert len(OC20Lmdb(tmp_path / "folder")) == len(OC20Lmdb(tmp_path / "folder" / "data.mdb")) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder holds no \*\.lmdb, \*\.aselmdb or data\.mdb"):
        OC20Lmdb(tmp_path / "empty")


@pytest.mark.parametrize(
    "metadata",
    [
        {"format_version": float("inf"), "provenance": {"seed": 10**30}},
        {"format_version": 1, "loss": float("nan"), "count": -(2**65)},
        {"format_version": []},
    ],
    ids=str,
)
def test_ase_metadata_that_is_wrong(tmp_path: Path, metadata: Any) -> None:
    path = ase_file(tmp_path / "x.aselmdb", [slab()], metadata=zlib.compress(json.dumps(metadata).encode()))
    with pytest.raises(DataError, match=r"x\.aselmdb, key metadata: not readable"):
        OC20Lmdb(path)


def test_a_copy_of_a_dataset_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = pickle.loads(pickle.dumps(written(tmp_path / "a.lmdb", [FFF])))
    with caplog.at_level(logging.WARNING):
        assert copy[0].pbc.tolist() == [[False] * 3]
    assert not caplog.records
