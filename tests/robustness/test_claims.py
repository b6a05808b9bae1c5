"""Structure files and archives that claim what they do not hold, or hold what must not be run."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import read, write
from command_line import run_script_file

from datasets_oc20.archives import unpack
from datasets_oc20.errors import DataError
from datasets_oc20.structure_files import MAX_UNPACKED, read_structure

ROOT = Path(__file__).parents[2]
MANY = "10000000000"
XYZ = "Properties=species:S:1:pos:R:3\nH 0 0 0\n"
POSCAR = "x\n1.0\n3 0 0\n0 3 0\n0 0 3\nCu\n{}\nDirect\n0 0 0\n"
GRO = "x\n{}\n    1X      H    1   0.000   0.000   0.000\n 1 1 1\n"
DUMP = "ITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n{}\nITEM: BOX BOUNDS pp pp pp\n0 1\n0 1\n0 1\n"
ARRAY = '{"1": {"numbers": {"%s": [[1000000000], "int64", [1]]}, "positions": [[0, 0, 0]]}, "ids": [1]}'
RUNS = "cos\nsystem\n(S'touch {}'\ntR."

STRUCTURES: list[tuple[str, str, str]] = [
    ("a.xyz", f"{MANY}\n{XYZ}", f"{MANY} atoms"),
    ("a.extxyz", f"{'9' * 400}\n{XYZ}", "atoms, too many"),
    ("second.xyz", f"1\n{XYZ}{MANY}\n{XYZ}", "fewer atoms than it says"),
    ("plain.xyz", f"{MANY}\n\nH 0 0 0\n", f"{MANY} atoms"),
    ("negative.xyz", f"-5\n{XYZ}", "no structure could be read"),
    ("empty.xyz", "", "no structure could be read"),
    ("POSCAR", POSCAR.format(MANY), f"{MANY} atoms"),
    ("many.vasp", POSCAR.format("500000000 1"), "500000001 atoms"),
    ("XDATCAR", POSCAR.format("1000000000"), "1000000000 atoms"),
    ("a.gro", GRO.format(MANY), f"{MANY} atoms"),
    ("cut.gro", GRO.format(2), "2 atoms and holds 1"),
    ("a.gen", f"{MANY} C\n H\n 1 1 0 0 0\n", f"{MANY} atoms"),
    ("a.lammpstrj", DUMP.format(MANY) + "ITEM: ATOMS id type x y z\n1 1 0 0 0\n", "a.lammpstrj"),
    ("a.mol", "x\ny\nz\n999999999  0  0\n", "no atoms"),
    ("array.json", ARRAY % "__ndarray__", "claims the shape [1000000000]"),
    ("escaped.json", ARRAY % "\\u005f_ndarray__", "claims the shape [1000000000]"),
    ("deep.json", "[" * 200_000, "nested"),
    ("other.json", "{}", "no structure could be read"),
    ("a.py", "import os; os.system('touch {}')", "no structure could be read"),
    ("a.pickle", RUNS, "no structure could be read"),
    ("a.traj", RUNS, "no structure could be read"),
    ("a.bundle", RUNS, "no structure could be read"),
    ("a.gpw", RUNS, "restart file"),
    ("a.db", RUNS, "database"),
]


@pytest.mark.parametrize(("name", "content", "expected"), STRUCTURES, ids=[name for name, *_ in STRUCTURES])
def test_structure_files_that_are_not_believed(
    name: str, content: str, expected: str, tmp_path: Path
) -> None:
    mark = tmp_path / "was_run"
    (tmp_path / name).write_text(content.replace("{}", str(mark)) if "touch" in content else content)
    with pytest.raises(DataError) as refused:
        read_structure(tmp_path / name)
    assert name in str(refused.value)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "packer",
    [
        pytest.param(gzip, id="gz", marks=pytest.mark.slow),
        pytest.param(bz2, id="bz2", marks=pytest.mark.slow),
        pytest.param(lzma, id="xz"),
    ],
)
def test_a_compressed_bomb(packer: object, tmp_path: Path) -> None:
    ending = {gzip: "gz", bz2: "bz2", lzma: "xz"}[packer]  # type: ignore[index]
    path = tmp_path / f"a.xyz.{ending}"
    part = packer.compress(b"\n" * (32 << 20))  # type: ignore[attr-defined]
    path.write_bytes(part * (MAX_UNPACKED // (32 << 20) + 1))
    with pytest.raises(DataError, match=rf"a\.xyz\.{ending}.*unpacks to more than"):
        read_structure(path)


def _slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8.0, periodic=True)
    atoms.set_constraint(FixAtoms([0, 1]))
    atoms.info["numbers"] = np.arange(3)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.ones((len(atoms), 3)))
    return atoms


@pytest.mark.parametrize(
    "name",
    [
        *("a.xyz", "a.extxyz", "a.traj", "a.json", "a.cif", "POSCAR", "a.vasp", "XDATCAR", "a.gen", "a.gro"),
        *("a.xsf", "a.cube", "a.xyz.gz", "a.xyz.bz2", "a.xyz.xz", "a.traj.gz", "a@1.xyz"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_sound_files_are_read_as_by_ase(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    frames = [_slab(), _slab()] if name.startswith(("a.xyz", "a.extxyz", "a.traj", "a@")) else _slab()
    write(tmp_path / "a.extxyz" if "@" in name else path, frames)
    if "@" in name:
        (tmp_path / "a.extxyz").rename(path)
    found = read_structure(path)
    expected = read(path, index=-1, do_not_split_by_at_sign=True)
    assert isinstance(expected, Atoms)
    assert found == expected
    assert len(found.constraints) == len(expected.constraints)
    assert sorted(found.info) == sorted(expected.info)
    assert (found.calc is None) == (expected.calc is None)


@pytest.mark.parametrize("name", ["a.traj", "a.json", "a.xyz", "a.cif", "POSCAR"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_in_a_sentence(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, _slab())
    sound, random = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(sound)
        for place in random.integers(len(content), size=random.integers(1, 5)):
            content[place] = random.integers(256)
        (tmp_path / name).write_bytes(content[: random.integers(1, 2 * len(content))])
        with contextlib.suppress(DataError):
            read_structure(tmp_path / name)


SLABS = ["Pt111", "ttf.xyz", "no_c.xyz", "ttt.xyz"]


@pytest.mark.parametrize("slab", SLABS)
@pytest.mark.parametrize("height", ["1e9", "inf", "-5", "nan", "0", "1e300", "101", "0.01"])
def test_heights(
    slab: str,
    height: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    atoms = fcc111("Pt", (2, 2, 3), vacuum=8.0)
    atoms.pbc = [True, True, slab == "ttt.xyz"]
    if slab == "no_c.xyz":
        atoms.cell[2] = 0.0
    if slab != "Pt111":
        write(slab, atoms)
    arguments = (
        "--checkpoint",
        "no.pt",
        "--slab",
        slab,
        "--adsorbate",
        "CO",
        "--out",
        "out",
        "--height",
        height,
    )
    assert run_script_file("adsorption_energy", *arguments) == 2
    assert "height" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("out").exists()


@pytest.mark.parametrize("script", ["relax", "adsorption_energy"])
@pytest.mark.parametrize("kind", ["pipe", "claim"])
def test_scripts_with_odd_structure_files(
    script: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.xyz"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(f"{MANY}\n{XYZ}")
    option = "--structure" if script == "relax" else "--system"
    arguments = ("--checkpoint", ROOT / "models/oc20_small.pt", option, path, "--out", tmp_path / "out")
    assert run_script_file(script, *arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert "odd.xyz" in printed[-1]
    assert "Traceback" not in "".join(printed)


END = bytes(1024)
TEXT = b"abc".ljust(512, b"\0")


def _member(name: str = "a.txt", size: int = 3, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member.tobuf(tarfile.GNU_FORMAT)


def _note(body: bytes) -> bytes:
    return _member("note", len(body), tarfile.XHDTYPE) + body.ljust(-(-len(body) // 512) * 512, b"\0")


SOUND = _member() + TEXT + END
LONG = _member("././@LongLink", 2, tarfile.GNUTYPE_LONGNAME) + b"a\0".ljust(512, b"\0")
ARCHIVES: list[tuple[str, bytes, str]] = [
    ("claim", _member(size=10**13) + TEXT, "free"),
    ("claims", _member("b", 0) + _member("c", 10**12) + END, "free|truncated"),
    ("noted", _note(b"25 size=99999999999999999\n") + SOUND, "free"),
    ("negative", _note(b"11 size=-5\n") + SOUND, "below 0"),
    ("long name", _member("././@LongLink", 10**12, tarfile.GNUTYPE_LONGNAME), "claims 1000000000000"),
    ("long names", LONG * 5000 + SOUND, "damaged"),
    ("large note", _member("note", 10**11, tarfile.XHDTYPE) + TEXT, "claims 100000000000"),
    (
        "bomb",
        gzip.compress(_member("x", 100 << 20, tarfile.GNUTYPE_LONGNAME) + bytes(100 << 20), 1),
        "claims",
    ),
    ("tail", gzip.compress(SOUND + bytes(100 << 20), 1), "follow its last file"),
    ("pipe", _member(size=0, kind=tarfile.FIFOTYPE) + END, "link or a device"),
    ("device", _member(size=0, kind=tarfile.BLKTYPE) + END, "link or a device"),
    ("link", _member(size=0, kind=tarfile.SYMTYPE, link="/etc/passwd") + END, "link or a device"),
    ("hard link", _member(size=0, kind=tarfile.LNKTYPE, link="/etc/passwd") + END, "link or a device"),
    ("above", _member("../x") + TEXT + END, "outside"),
    ("absolute", _member("/x") + TEXT + END, "outside"),
    ("file and folder", _member("a") + TEXT + _member("a/b") + TEXT + END, "also a file"),
    ("twice", _member() + TEXT + SOUND, "twice"),
    ("cut bz2", bz2.compress(SOUND)[:-10], "damaged"),
    ("broken bz2", b"BZh9" + bytes(100), "damaged"),
    ("cut xz", lzma.compress(SOUND)[:-10], "damaged"),
    ("no tar", gzip.compress(b"x" * 1000), "damaged"),
    ("nothing", b"", "damaged"),
]


@pytest.mark.parametrize(("name", "content", "expected"), ARCHIVES, ids=[name for name, *_ in ARCHIVES])
def test_archives_that_are_not_believed(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=expected):
        unpack(tmp_path / "x.tar", tmp_path / "to", show_progress=False)
    assert not list(tmp_path.rglob("*.txt"))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_sound_archives(pack: object, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(pack(SOUND))  # type: ignore[operator]
    assert unpack(tmp_path / "x.tar", tmp_path / "to", show_progress=False).files == 1
    assert (tmp_path / "to" / "a.txt").read_bytes() == b"abc"


def test_more_members_than_an_archive_has(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(3):
            tar.addfile(tarfile.TarInfo(f"{number}.txt"))
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="more than 2 members"):
        unpack(tmp_path / "x.tar", tmp_path / "to", show_progress=False, max_members=2)


def test_the_name_of_a_file_that_the_caller_writes(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(_member("x.tar.json") + TEXT + END)
    with pytest.raises(DataError, match="is taken"):
        unpack(tmp_path / "x.tar", tmp_path, show_progress=False, reserved=[tmp_path / "x.tar.json"])
