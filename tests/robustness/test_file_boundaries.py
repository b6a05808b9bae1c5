"""Files that are read, files that are written, and how a command ends: a table of inputs and what is said."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import run_script_file

from datasets_oc20 import LmdbWriter, OC20Lmdb
from datasets_oc20.archives import unpack
from datasets_oc20.atomic import _HOST, whole_file
from datasets_oc20.convert import convert
from datasets_oc20.errors import DataError
from datasets_oc20.lmdb_file import open_lmdb
from datasets_oc20.npz_file import read_npz
from datasets_oc20.safe_pickle import RefusedPickleError, load_inert
from datasets_oc20.structure_files import read_structure
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json
from equiformer2.pruning.recovery.distillation import label
from equiformer2.pruning.routing.router_files import load_router
from equiformer2.pruning.structured.grid_tuning import write_with_grids
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_request import apply_plan

ROOT = Path(__file__).parents[2]
VAL_20 = ROOT / "tests/fixtures/datasets_oc20/s2ef_val_20.lmdb"

READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("lmdb", open_lmdb),
    ("dataset", OC20Lmdb),
    ("json", read_json),
    ("npz", lambda path: read_npz(path, ("a",))),
    ("tar", lambda path: unpack(path, path.with_name("to"), show_progress=False)),
    ("plan", PruningPlan.load),
    ("router", load_router),
    ("structure", read_structure),
]
ODD_FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("pipe", os.mkfifo, "pipe"),
    ("loop", lambda path: path.symlink_to(path), "circle"),
    ("device", lambda path: path.symlink_to("/dev/zero"), "device"),
]


@pytest.mark.parametrize(("kind", "read"), READERS, ids=[name for name, _ in READERS])
@pytest.mark.parametrize(("name", "make", "expected"), ODD_FILES, ids=[name for name, *_ in ODD_FILES])
def test_what_is_no_file(
    kind: str,
    read: Callable[[Path], object],
    name: str,
    make: Callable[[Path], object],
    expected: str,
    tmp_path: Path,
) -> None:
    make(tmp_path / "odd")
    with pytest.raises((DataError, InputError), match=f"odd.*{expected}"):
        read(tmp_path / "odd")


@pytest.mark.parametrize("read", [read for _, read in READERS], ids=[name for name, _ in READERS])
def test_nul_in_a_name(read: Callable[[Path], object]) -> None:
    with pytest.raises((DataError, InputError), match="file name"):
        read(Path("a\0b"))


@pytest.mark.parametrize("read", [read_json, PruningPlan.load, load_router])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000, '{"a": 1, "a": 2}', "[1e999]", "\xff"])
def test_json_that_is_not_believed(read: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=r"x\.json"):
        read(tmp_path / "x.json")


def _npz(shape: str, data: bytes = b"", encrypted: bool = False) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + data)
    content = bytearray(buffer.getvalue())
    if encrypted:
        content[6] |= 1
        content[content.index(b"PK\1\2") + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_npz("(10**13,)".replace("10**13", "10000000000000"), b"\0" * 8), "claims the shape"),
        (_npz("(4294967296, 4294967296, 2)"), "claims the shape"),
        (_npz("(2,)", b"\0" * 8), "claims the shape"),
        (_npz("(1,)", b"\0" * 8, encrypted=True), "encrypted"),
        (_npz("(1,)", b"\0" * 8)[:-30], "whole .npz"),
        (b"", "whole .npz"),
        (b"PK\3\4nonsense", "whole .npz"),
    ],
)
def test_npz(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.npz.*{expected}"):
        read_npz(tmp_path / "x.npz", ("a",))


def test_a_sound_npz_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros((3, 4)), b=np.array(["Å"]), c=np.empty((0, 3)))
    assert [array.shape for array in read_npz(tmp_path / "x.npz", ("a", "b", "c"))] == [(3, 4), (1,), (0, 3)]


def _nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def _repeated(levels: int, opcode: bytes) -> bytes:
    """Pickle of a list or tuple that holds the one before it twice, `levels` times."""
    value: object = ("x",)
    for _ in range(levels):
        value = (value, value) if opcode == b"t" else [value, value]
    return pickle.dumps(value, protocol=2)


def _doubled(between: bytes) -> bytes:
    """A key that takes 2^60 steps to hash, with opcodes that change nothing between those that make it."""
    steps = b"".join(
        b"h%c" % i + between + b"h%c" % i + between + b"\x86q%c0" % (i + 1) for i in range(1, 60)
    )
    return b"\x80\x02}U\x01x\x85q\x010" + steps + b"h\x3cNs."


def _program(text: str) -> bytes:
    return b"\x80\x02" + text.encode("latin-1") + b"."


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_nested(100), "deep"),
        (_nested(100_000), "deep"),
        (_repeated(40, b"l"), "too often"),
        (_repeated(40, b"t"), "too often"),
        (b"\x80\x02}" + _repeated(60, b"t")[2:-1] + b"Ns.", "a key of a dictionary"),
        (b"\x80\x02" + b"N0" * 2_000_000 + b"N.", "more than 500000 steps"),
        (_doubled(b""), "a key of a dictionary"),
        (_doubled(b"N0"), "a key of a dictionary"),
        (_doubled(b"(0"), "a key of a dictionary"),
        (_program("\x8f((I1\nI2\nt\x90"), "a key of a dictionary"),
        (_program("(\x85\x91"), "more than there is"),
        (_program("ccollections\nOrderedDict\n]](NNea\x85R"), "a dictionary of a list"),
        (_program("}\x8b" + "\0\0\1\0" + "\1" * 65536 + "Ns"), "a key of a dictionary"),
        (_program("Nr\xff\xff\xff\x7f"), "numbers its parts"),
        (_program("Np999999999\n"), "numbers its parts"),
        (_program("ctorch.storage\n_load_from_bytes\nN}U\6tensorK\5s\x86b"), "changes a class"),
        (_program("c_codecs\nencode\nN}U\x0c__defaults__)s\x86b"), "changes a class"),
        (_program("ctorch._utils\n_rebuild_tensor\n(NK\0))tR}U\6tensorK\5sb"), "changes something"),
    ],
)
def test_pickles_that_grow(content: bytes, expected: str) -> None:
    with pytest.raises(RefusedPickleError, match=expected):
        load_inert(content)


TARGETS: list[tuple[str, Callable[[Path], object]]] = [
    ("itself", lambda path: None),
    ("symbolic link", lambda path: path.with_name("out").symlink_to(path)),
    ("hard link", lambda path: path.with_name("out").hardlink_to(path)),
]


@pytest.mark.parametrize(("name", "make"), TARGETS, ids=[name for name, _ in TARGETS])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_result_replaces_an_input(
    name: str, make: Callable[[Path], object], overwrite: bool, tmp_path: Path
) -> None:
    given = tmp_path / "given.pt"
    given.write_text("x")
    make(given)
    target = given if name == "itself" else tmp_path / "out"
    with pytest.raises(InputError, match="read as input"):
        check_target(tmp_path / "." / target.name, inputs=[given], overwrite=overwrite)
    with pytest.raises(InputError, match=r"exists already.*--overwrite"):
        check_target(target, overwrite=False)


def test_a_file_in_a_folder_of_data_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "a.lmdb").write_text("x")
    with pytest.raises(InputError, match="read as input"):
        check_target(tmp_path / "a.lmdb", inputs=[tmp_path])
    check_target(tmp_path / "b.lmdb", inputs=[tmp_path], overwrite=False)


RAW = (
    "--data",
    ROOT / "data/oc20_trajs",
    "--systems",
    "random1000100",
    "--frames",
    "2",
    "--num-workers",
    "1",
)


MODEL = ("--checkpoint", "{}/there.pt")


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("preprocess_oc20", (*RAW, "--out", "{}/x.json"), "name of the report"),
        ("preprocess_oc20", (*RAW, "--out", "{}/there.lmdb"), "there.lmdb exists already"),
        ("preprocess_oc20", (*RAW, "--out", "{}/new", "--shards", "2", "--overwrite"), "--overwrite has no"),
        ("preprocess_oc20", (*RAW, "--out", "{}/there.x"), "there.json exists already"),
        ("preprocess_oc20", (*RAW, "--out", "{}/n.lmdb", "--later-out", "{}/n.json"), "name of the report"),
        ("convert_lmdb", ("--data", "{}/there.lmdb", "--out", "{}/there.lmdb", "--to", "ase"), "input"),
        ("convert_lmdb", ("--data", VAL_20, "--out", "{}/link.lmdb", "--to", "ase", "--overwrite"), "input"),
        ("fit_references", ("--data", "{}/there.lmdb", "--out", "{}/there.npz"), "exists already"),
        ("fit_references", ("--data", "{}/there.lmdb", "--out", "{}/new/../there.npz"), "exists already"),
        (
            "predict",
            ("--checkpoint", "{}/there.pt", "--data", "{}/there.lmdb", "--out", "{}/there.npz"),
            "exists already",
        ),
        ("import_checkpoint", ("--checkpoint", "{}/there.pt", "--out", "{}/there.npz"), "exists already"),
        (
            "import_checkpoint",
            ("--checkpoint", "{}/there.pt", "--out", "{}/there.pt", "--overwrite"),
            "input",
        ),
        (
            "prune",
            ("apply", "--checkpoint", "{}/there.pt", "--plan", "{}/there.json", "--out", "{}/there.pt"),
            "input",
        ),
        (
            "prune",
            ("grid", "--checkpoint", "{}/there.pt", "--data", "{}", "--out", "{}/there.npz"),
            "input",
        ),
        (
            "prune",
            (
                "plan",
                "--target",
                "m=1",
                "--checkpoint",
                "{}/there.pt",
                "--data",
                "{}",
                "--out",
                "{}/there.json",
            ),
            "exists already",
        ),
        (
            "prune",
            ("route", "--checkpoint", "{}/there.pt", "--data", "{}", "--out", "{}/there.json"),
            "exists already",
        ),
        ("inspect_data", ("--data", "{}/there.lmdb", "--out", "{}/old"), "inspection.json exists already"),
        (
            "prune",
            (
                "distill",
                "--student",
                "{}/there.pt",
                "--teacher",
                "{}/there.pt",
                "--data",
                "{}/train.lmdb",
                "--val",
                "{}/there.lmdb",
                "--out",
                "{}",
            ),
            "train.lmdb is read as input",
        ),
        (
            "prune",
            (
                "pareto",
                "--checkpoint",
                "{}/there.pt",
                "--calibration",
                "{}",
                "--held-out",
                "a={}",
                "--out",
                "{}/old",
            ),
            "pareto.json exists already",
        ),
        (
            "prune",
            ("report", "--checkpoint", "{}/there.pt", "--data", "{}", "--out", "{}/old"),
            "--overwrite",
        ),
        (
            "evaluate",
            (*MODEL, "--data", "{}/there.lmdb", "--out", "{}/there.json"),
            "there.json exists already",
        ),
        ("evaluate", (*MODEL, "--data", "{}/there.lmdb", "--out", "{}/there.pt", "--overwrite"), "input"),
        ("evaluate", (*MODEL, "--data", "{}/there.lmdb", "--overwrite"), "no meaning without --out"),
        (
            "evaluate",
            (
                *MODEL,
                "--data",
                VAL_20,
                "--adsorbates",
                "{}/there.json",
                "--out",
                "{}/there.json",
                "--overwrite",
            ),
            "input",
        ),
        ("relax_is2re", (*MODEL, "--data", "{}/there.lmdb", "--out", "{}/old"), "is2re.json exists already"),
        ("convert_lmdb", ("--data", "{}/shards", "--out", "{}/converted", "--to", "ase"), "exists already"),
        ("convert_lmdb", ("--data", "{}/shards", "--out", "{}/linked", "--to", "oc20"), "input"),
        ("inspect_data", ("--data", "{}/odd", "--out", "{}/new"), "named pipe"),
        ("inspect_data", ("--data", "{}/loop.lmdb", "--out", "{}/new"), "circle"),
    ],
)
def test_scripts_refuse_with_one_sentence(
    script: str,
    arguments: tuple[object, ...],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    for name in ("shards", "converted", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "shards" / "a.lmdb").write_bytes(VAL_20.read_bytes())
    (tmp_path / "linked" / "a.lmdb").symlink_to(tmp_path / "shards" / "a.lmdb")
    old = [f"old/{name}.json" for name in ("inspection", "pareto", "is2re", "report")]
    for name in ("there.pt", "there.npz", "there.json", "converted/a.aselmdb", "train.lmdb", *old):
        (tmp_path / name).write_text("keep")
    (tmp_path / "there.lmdb").write_bytes(VAL_20.read_bytes())
    (tmp_path / "link.lmdb").symlink_to(VAL_20)
    (tmp_path / "loop.lmdb").symlink_to("loop.lmdb")
    os.mkfifo(tmp_path / "odd")
    before = VAL_20.read_bytes()
    status = run_script_file(script, *(str(item).replace("{}", str(tmp_path)) for item in arguments))
    printed = capsys.readouterr().err.strip().splitlines()
    assert status == 2, printed
    assert expected in printed[-1]
    assert all((tmp_path / name).read_text() == "keep" for name in ("there.pt", "there.npz", "there.json"))
    assert VAL_20.read_bytes() == before


def test_a_finished_result_is_replaced_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "x.lmdb"
    assert run_script_file("preprocess_oc20", *RAW, "--out", out) == 0
    assert run_script_file("preprocess_oc20", *RAW, "--out", out) == 2
    assert run_script_file("preprocess_oc20", *RAW, "--out", out, "--overwrite") == 0
    assert json.loads((tmp_path / "x.json").read_text())["written"] == 2


def test_a_converted_folder_goes_on_and_is_replaced_when_asked(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("a.lmdb", "b.lmdb"):
        (source / name).write_bytes(VAL_20.read_bytes())
    call = (
        "--data",
        source,
        "--out",
        out,
        "--to",
        "ase",
        "--energy-kind",
        "adsorption",
        "--num-workers",
        "1",
    )
    assert run_script_file("convert_lmdb", *call) == 0
    (out / "a.aselmdb").unlink()
    assert run_script_file("convert_lmdb", *call) == 0
    assert run_script_file("convert_lmdb", *call) == 2
    before = (out / "a.aselmdb").stat().st_ino
    assert run_script_file("convert_lmdb", *call, "--overwrite") == 0
    assert (out / "a.aselmdb").stat().st_ino != before
    for target in (source / "a.lmdb", out / "link.lmdb"):
        if target.parent == out:
            target.symlink_to(source / "a.lmdb")
        with pytest.raises(DataError, match="is the source"):
            convert(source / "a.lmdb", target, "oc20", "adsorption", overwrite=True)


@pytest.mark.parametrize(("writer", "name"), [("apply", "plan"), ("grid", "grids"), ("label", "answers")])
def test_functions_do_not_write_over_what_they_read(writer: str, name: str, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_bytes(b"keep")
    link = tmp_path / name
    link.symlink_to(given)
    calls: dict[str, Callable[[], object]] = {
        "apply": lambda: apply_plan(given, PruningPlan(()), link),
        "grid": lambda: write_with_grids(given, None, None, link),  # type: ignore[arg-type]
        "label": lambda: label(None, [given], link),  # type: ignore[arg-type]
    }
    with pytest.raises(InputError, match="read as input"):
        calls[writer]()
    assert given.read_bytes() == b"keep"


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    finished = subprocess.Popen(["true"])
    finished.wait()
    for name in ("x.lmdb", "x.json"):
        (tmp_path / f".{name}.{_HOST}-{finished.pid}.tmp").write_text("x")
    ours = tmp_path / f".x.json.{_HOST}-{os.getppid()}.tmp"
    ours.write_text("x")
    with whole_file(tmp_path / "x.json"):
        pass
    with pytest.raises(DataError, match="no record"), LmdbWriter(tmp_path / "x.lmdb", None):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ours.name, "x.json"])


def _python(
    code: str, *arguments: str, input_: bytes = b"", **environment: str
) -> "subprocess.CompletedProcess[bytes]":
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=variables,
        input=input_,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_a_terminal_in_ascii() -> None:
    done = _python(
        "from equiformer2.script import run_script; run_script(lambda: print('0.1 eV/\\u00c5'))",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONIOENCODING="ascii",
        PYTHONCOERCECLOCALE="0",
    )
    assert (done.returncode, done.stdout) == (0, rb"0.1 eV/\xc5" + b"\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing_unfinished(number: int, status: int, tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom datasets_oc20.atomic import whole_file\n"
        "from equiformer2.script import run_script\n"
        # Under nohup, whose children would ignore it.
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        f"def main():\n    with whole_file({str(tmp_path / 'x')!r}):\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "run_script(main)"
    )
    assert _python(code).returncode == status
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "shown"), [([], False), (["--debug"], True)], ids=["one line", "traceback"]
)
def test_a_bug_has_status_1(arguments: list[str], shown: bool) -> None:
    code = "from equiformer2.script import run_script; run_script(lambda: {}['absent'])"
    process = _python(code, *arguments)
    printed = process.stderr.decode()
    assert process.returncode == 1
    assert "this is a bug (KeyError" in printed
    assert "--debug" in printed or shown
    assert ("Traceback" in printed) is shown


def test_programs_are_run_with_an_encoding() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("equiformer2", "datasets_oc20", "scripts", "benchmarks", "studies")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if "text=True" in line or "universal_newlines" in line
    ]
    assert not wrong
