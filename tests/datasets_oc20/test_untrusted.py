"""Files, JSON, YAML and compressed bytes of others: one sentence for whatever is wrong, soon."""

import gzip
import lzma
import os
import socket
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from datasets_oc20 import untrusted
from datasets_oc20.errors import DataError


def _loop(path: Path) -> None:
    path.symlink_to(path.name + "2")
    path.with_name(path.name + "2").symlink_to(path.name)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (os.mkfifo, "named pipe"),
        (Path.mkdir, "folder"),
        (_socket, "socket"),
        (_loop, "circle"),
        (lambda path: path.symlink_to("/dev/zero"), "device"),
        (lambda path: path.symlink_to("/dev/null"), "device"),
    ],
)
@pytest.mark.parametrize(
    "read", [untrusted.regular_file, untrusted.open_regular, untrusted.read_bounded, untrusted.read_yaml]
)
def test_not_a_file(
    make: Callable[[Path], None], expected: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "odd"
    make(path)
    with pytest.raises(DataError, match=f"odd.*{expected}"):
        read(path)


@pytest.mark.parametrize("name", ["a\0b", "\udcff\ud800"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(DataError, match="file name"):
        untrusted.regular_file(name)


def test_missing_files_stay_an_os_error(tmp_path: Path) -> None:
    for read in (untrusted.regular_file, untrusted.read_text, untrusted.read_json):
        with pytest.raises(FileNotFoundError, match="absent"):
            read(tmp_path / "absent")


def test_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"12345")
    assert untrusted.read_bounded(path, 5) == b"12345"
    with pytest.raises(DataError, match=r"large.*4 bytes"):
        untrusted.read_bounded(path, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"[" * 1_000_000, "deep"),
        (b'{"a":' * 70, "deep"),
        (b'{"a": 1, "a": 2}', "'a' is a duplicate"),
        (b'[{"x": {"b": 1, "c": 0, "b": 2}}]', "'b' is a duplicate"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "too large"),
        (b'["\\ud800"]', "surrogate"),
        (b"9" * 5000, "limit"),
        (b"\xff\xfe", "UTF-8"),
        (b"", "not readable as JSON"),
        (b"{'a': 1}", "not readable as JSON"),
        (b'["' + b'\\"[' * 100_000, "not readable as JSON"),
        (b" " * 1001 + b"1", "larger"),
    ],
)
def test_json_refused(text: bytes, expected: str) -> None:
    limit = 1000 if text.startswith(b" ") else untrusted.MAX_TEXT
    with pytest.raises(DataError, match=rf"^x.json: .*{expected}"):
        untrusted.load_json(text, "x.json", limit)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'\xef\xbb\xbf{"a": [1, 2.5, null, true, "\xc3\x85"]}', {"a": [1, 2.5, None, True, "Å"]}),
        (b'"' + b"[" * 5000 + b'"', "[" * 5000),
        (b'["1e999", 1e300, "\\u00c5"]', ["1e999", 1e300, "Å"]),
        (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
    ],
)
def test_json_read(text: bytes, value: object) -> None:
    assert untrusted.load_json(text, "x.json") == value


def test_json_with_infinite_numbers_where_a_program_writes_them() -> None:
    assert untrusted.load_json("[Infinity, 1e999]", "x", nonfinite=True) == [float("inf")] * 2


def _bomb(open_: str, close: str) -> str:
    lines = [f"a0: &a0 {open_}x{close}"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "'a' is a duplicate.*line 1"),
        ("optim:\n  lr: 1\n  lr: 2", "'lr' is a duplicate.*line 2"),
        ("{1: 2, 0x1: 3}", "1 is a duplicate"),
        ('{a: 1, "a": 2}', "'a' is a duplicate"),
        ("- &x {k: 1}\n- {<<: *x, q: 1, q: 2}", "'q' is a duplicate"),
        (_bomb("[", "]"), "more than"),
        ("a0: &a0 {x: 1}\n" + "\n".join(
            f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)
        ), "more than"),
        ("&a [*a]", "circle"),
        ("a: &a {b: *a}", "circle"),
        ("[" * 100_000, "deep"),
        ("".join(" " * i + "a:\n" for i in range(100)), "deep"),
        ("- " * 100 + "a", "deep"),
        ("a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 99)), "deep"),
        ("? [1]\n: 2", "unhashable"),
        ("!!python/object/apply:os.system [ls]", "os.system"),
        ("a: 2020-13-45", "month"),
        ("a: " + "9" * 5000, "limit"),
        ("a\0b", "unacceptable"),
        ("!!bool x", "not readable"),
        ("!!timestamp x", "not readable"),
        ("a: 1\n---\nb: 2", "single document"),
        ("*x", "undefined"),
        ("a: [1", "not readable"),
        ("x" * 2_000_000, "larger"),
    ],
)  # fmt: skip
def test_yaml_refused(text: str, expected: str) -> None:
    with pytest.raises(DataError, match=rf"^x.yaml: .*{expected}"):
        untrusted.load_yaml(text, "x.yaml")


def test_yaml_read() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\nd: {<<: *a}\n"
    a = {"x": 1, "y": 2}
    assert untrusted.load_yaml(text, "x.yaml") == {"a": a, "b": {"x": 3, "y": 2}, "c": [a, a], "d": a}
    # A mapping that was merged into another one before it was built itself overrides what it merges.
    nested = "z: [&o {k: 1}, {<<: &p {<<: *o, k: 2}}]\n"
    assert untrusted.load_yaml(nested, "x.yaml") == {"z": [{"k": 1}, {"k": 2}]}
    assert untrusted.load_yaml("", "x.yaml") is None


def test_inflate() -> None:
    packed = zlib.compress(b"x" * 1000)
    assert untrusted.inflate(packed, 1000, "row 3") == b"x" * 1000
    for content, limit, expected in (
        (packed, 999, "more than 999"),
        (zlib.compress(b"\0" * 10_000_000), 1000, "more than 1000"),
        (packed[:-2], 1000, "truncated"),
        (b"", 1000, "truncated"),
        (b"nonsense", 1000, "damaged"),
    ):
        with pytest.raises(DataError, match=f"^row 3: .*{expected}"):
            untrusted.inflate(content, limit, "row 3")


@pytest.mark.parametrize("packer", [lzma.compress, gzip.compress])
def test_compressed_streams(packer: Callable[[bytes], bytes], tmp_path: Path) -> None:
    suffix = ".xz" if packer is lzma.compress else ".gz"
    text = b"some line\n" * 20_000

    def read(content: bytes, limit: int = len(text)) -> bytes:
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        with untrusted.open_compressed(path, limit) as file:
            return b"".join(file)

    assert read(packer(text)) == text
    assert read(packer(text[:500]) + packer(text[500:])) == text
    assert read(packer(text) + b"\0" * 8) == text
    assert read(packer(b"")) == b""
    for content, expected in (
        (packer(text + b"1"), "more than"),
        (packer(b"\0" * 20_000_000), "more than"),
        (packer(text)[:-9], "truncated"),
        (packer(text)[:30] + b"\0\1\2" + packer(text)[33:], "damaged"),
        (b"", "truncated"),
        (text, "damaged"),
    ):
        with pytest.raises(DataError, match=rf"x{suffix}: .*{expected}"):
            read(content)


def test_plain_files_are_bounded_too(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"12345")
    assert untrusted.open_compressed(path, 5).read() == b"12345"
    with pytest.raises(DataError, match="4 bytes"):
        untrusted.open_compressed(path, 4)
