"""Readers of third-party files, JSON, YAML and compressed bytes, which may be damaged, hostile or endless.

Every function here returns soon, uses a bounded amount of memory, and raises `DataError` with one sentence
for any fault. Missing and unreadable files stay the `OSError` of opening them.
"""

import bz2
import errno
import io
import json
import lzma
import math
import os
import re
import stat
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml

from datasets_oc20.errors import DataError

AnyPath = str | os.PathLike[str]

MAX_TEXT = 64 << 20
"""Maximum bytes of a JSON document."""
MAX_CONFIG = 1 << 20
"""Maximum bytes of a YAML document, which is written by hand."""
MAX_DEPTH = 64
"""Maximum nesting of lists and mappings in a document."""
MAX_YAML_NODES = 200_000
"""Maximum number of values in a YAML document, each counted as often as aliases repeat it."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_CHUNK = 1 << 20
_XZ_MEMORY = 256 << 20  # `xz -9` needs 65 MiB to unpack
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_EXPONENTIALS = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_LARGE_EXPONENT = re.compile(r"[eE]\+?0*[1-9]\d{2}")


def regular_file(path: AnyPath) -> Path:
    """Return `path` if it is a file that can be read to an end; nothing is opened, so nothing can block.

    Raises:
        DataError: it is a folder, a named pipe, a socket or a device, its symbolic links lead in a circle, or
            it holds a NUL character.
        OSError: it is missing, or a folder on the way is not readable.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL character, or one that the file system cannot name
        raise DataError(f"{str(path)!r}: is not a possible file name; name another file.") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(
                f"{path}: its symbolic links lead in a circle; name the file that is meant."
            ) from error
        raise
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no file")
        raise DataError(f"{path}: is {kind}, not a file; name a file.")
    return path


def open_regular(path: AnyPath) -> IO[bytes]:
    """Open a regular file for reading.

    Raises:
        DataError: as `regular_file`.
        OSError: it is missing or unreadable.
    """
    path = regular_file(path)
    # A pipe that took the place of the file since then would block an ordinary open.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise DataError(f"{path}: is not a file; name a file.")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bounded(path: AnyPath, limit: int = MAX_TEXT) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        DataError: as `regular_file`, or the file is larger.
        OSError: it is missing or unreadable.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{path}: is larger than the {limit} bytes that such a file can have.")
    return content


def read_text(path: AnyPath, limit: int = MAX_TEXT) -> str:
    """Read the UTF-8 text of a regular file of at most `limit` bytes, without a byte order mark.

    Raises:
        DataError: as `read_bounded`, or the file is not text.
        OSError: it is missing or unreadable.
    """
    return _decode_text(read_bounded(path, limit), str(path))


def load_json(
    content: bytes | str, where: str, limit: int = MAX_TEXT, depth: int = MAX_DEPTH, nonfinite: bool = False
) -> Any:
    """Parse a JSON document.

    Args:
        content: the document; bytes are UTF-8.
        where: file and key, for the error message.
        limit: maximum number of bytes or characters.
        depth: maximum nesting of lists and objects.
        nonfinite: accept NaN, Infinity and numbers beyond float64, which some programs write.

    Raises:
        DataError: not JSON, too long, too deep, a key twice in one object, a number that is not finite, or
            text that is not Unicode.
    """
    text = _decode_text(content, where, limit)
    # The nesting of brackets outside strings is checked first; of text that is no JSON, too.
    if text.count("[") + text.count("{") > depth:
        level = 0
        for bracket in re.findall(r"[\[\]{}]", _STRINGS.sub("", text)):
            level += 1 if bracket in "[{" else -1
            if level > depth:
                raise DataError(f"{where}: the JSON is nested more than {depth} deep.")
    if not nonfinite and _LARGE_EXPONENT.search(text):
        for number in _EXPONENTIALS.findall(_STRINGS.sub("", text)):
            if math.isinf(float(number)):
                raise DataError(f"{where}: the JSON holds a number that is too large.")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            _raise_duplicate([key for key, _ in pairs], where)
        return values

    def refuse(name: str) -> float:
        raise DataError(f"{where}: the JSON holds {name}, which is not a number.")

    try:
        value = json.loads(
            text, object_pairs_hook=no_duplicates, parse_constant=None if nonfinite else refuse
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not readable as JSON ({_summary(error)}).") from error
    return value


def read_json(path: AnyPath, limit: int = MAX_TEXT, depth: int = MAX_DEPTH) -> Any:
    """Parse a JSON file; arguments as `load_json`.

    Raises:
        DataError: as `read_bounded` and `load_json`.
        OSError: it is missing or unreadable.
    """
    return load_json(read_bounded(path, limit), str(path), limit, depth)


def load_yaml(content: bytes | str, where: str, limit: int = MAX_CONFIG, depth: int = MAX_DEPTH) -> Any:
    """Parse a YAML document of plain values.

    Args:
        content: the document; bytes are UTF-8.
        where: the file, for the error message.
        limit: maximum number of bytes or characters.
        depth: maximum nesting of lists and mappings, those that aliases repeat included.

    Raises:
        DataError: not YAML, too long, too deep, a key twice in one mapping, aliases that repeat more than
            MAX_YAML_NODES values or lead in a circle, or a tag that names an object.
    """
    text = _decode_text(content, where, limit)
    try:
        _StrictLoader.check_size(text, where, depth)
        loader = _StrictLoader(text)
        loader.where = where
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except DataError:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # Impossible dates, numbers of 5,000 digits and odd tags raise whatever their constructors raise.
        raise DataError(f"{where}: not readable as YAML ({_summary(error)}).") from error


def read_yaml(path: AnyPath) -> Any:
    """Parse a YAML file with the limits of a configuration.

    Raises:
        DataError: as `read_bounded` and `load_yaml`.
        OSError: it is missing or unreadable.
    """
    return load_yaml(read_bounded(path, MAX_CONFIG), str(path))


def inflate(content: bytes, limit: int, where: str) -> bytes:
    """Decompress zlib bytes.

    Args:
        content: the compressed bytes.
        limit: maximum number of decompressed bytes.
        where: file and key, for the error message.

    Raises:
        DataError: not a whole zlib stream, or one of more bytes.
    """
    stream = zlib.decompressobj()
    try:
        value = stream.decompress(content, limit + 1)
    except zlib.error as error:
        raise DataError(f"{where}: the compressed bytes are damaged ({error}).") from error
    if len(value) > limit:
        raise DataError(f"{where}: unpacks to more than {limit} bytes, which is not believable.")
    if not stream.eof:
        raise DataError(f"{where}: the compressed bytes are truncated.")
    return value


class _Decompressed(io.RawIOBase):
    """The content of one or more compressed streams, one after the other, of at most `limit` bytes."""

    def __init__(self, file: IO[bytes], where: str, limit: int, start: Callable[[], Any]) -> None:
        self._file, self._where, self._left, self._start = file, where, limit, start
        self._limit = limit
        self._stream = start()
        self._input = b""
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._piece(len(buffer))
        except (lzma.LZMAError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk; bz2 calls damaged bytes an OSError without a number
            raise DataError(
                f"{self._where}: the file is truncated or damaged ({error}); download it again."
            ) from error
        self._left -= len(piece)
        if self._left < 0:
            raise DataError(
                f"{self._where}: unpacks to more than {self._limit} bytes, which is not believable."
            )
        buffer[: len(piece)] = piece
        return len(piece)

    def _piece(self, size: int) -> bytes:
        """Return some bytes; none only at the end."""
        while True:
            if self._stream.eof:
                self._input = self._stream.unused_data or self._file.read(_CHUNK)
                self._input = self._input.lstrip(b"\0") if self._begun else self._input  # padding
                if not self._input:
                    return b""
                self._stream, self._begun = self._start(), False
            needs_input = getattr(self._stream, "needs_input", True)  # zlib always takes its tail again
            if not self._input and needs_input:
                self._input = self._file.read(_CHUNK)
                if not self._input:
                    raise DataError(f"{self._where}: the file is truncated; download it again.")
            self._begun = True
            piece: bytes = self._stream.decompress(self._input, size)
            self._input = getattr(self._stream, "unconsumed_tail", b"")
            if piece:
                return piece

    def close(self) -> None:
        self._file.close()
        super().close()


def open_compressed(path: AnyPath, limit: int) -> io.BufferedReader:
    """Open an `.xz`, `.gz`, `.bz2` or plain file (by its name) for reading its binary content.

    Args:
        path: the file.
        limit: maximum bytes of the content; reading beyond raises.

    Raises:
        DataError: as `regular_file`; when read, where the file is damaged, truncated or unpacks to more.
        OSError: it is missing or unreadable.
    """
    file = open_regular(path)
    suffix = Path(path).suffix
    if suffix == ".xz":
        start: Callable[[], Any] = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, _XZ_MEMORY)
    elif suffix == ".gz":
        start = partial(zlib.decompressobj, wbits=31)
    elif suffix == ".bz2":
        start = bz2.BZ2Decompressor
    else:
        if os.fstat(file.fileno()).st_size > limit:
            file.close()
            raise DataError(f"{path}: is larger than the {limit} bytes that such a file can have.")
        return io.BufferedReader(file)  # type: ignore[arg-type]
    return io.BufferedReader(_Decompressed(file, str(path), limit, start), buffer_size=_CHUNK)


class _StrictLoader(yaml.SafeLoader):
    """YAML loader of plain values that refuses repeated keys, of which YAML would silently drop the first."""

    where = ""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in node.value
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"
        ]
        if len(set(keys)) < len(keys):
            _raise_duplicate(keys, self.where, node.start_mark.line + 1)
        return node

    @staticmethod
    def check_size(text: str, where: str, depth: int) -> None:
        """Raise `DataError` if a document is too deep or repeats too much, before anything is built of it."""
        parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        sizes: dict[str, tuple[int, int]] = {}  # by anchor: values, nesting
        open_nodes: list[list[Any]] = [[None, 0, 0]]  # anchor, values so far, nesting of the deepest child
        open_anchors: list[str] = []
        for event in yaml.parse(text, Loader=parser):
            if isinstance(event, yaml.AliasEvent):
                if event.anchor in open_anchors:
                    raise DataError(f"{where}: the alias *{event.anchor} leads in a circle.")
                values, nesting = sizes.get(event.anchor, (1, 0))
            elif isinstance(event, yaml.ScalarEvent):
                values, nesting = 1, 0
                if event.anchor:
                    sizes[event.anchor] = values, nesting
            elif isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append([event.anchor, 1, 0])
                open_anchors.append(event.anchor)
                if len(open_nodes) - 1 > depth:
                    raise DataError(f"{where}: the YAML is nested more than {depth} deep.")
                continue
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, values, nesting = open_nodes.pop()
                open_anchors.pop()
                nesting += 1
                if anchor:
                    sizes[anchor] = values, nesting
            else:
                continue
            parent = open_nodes[-1]
            parent[1] += values
            parent[2] = max(parent[2], nesting)
            if parent[1] > MAX_YAML_NODES:
                raise DataError(
                    f"{where}: the YAML holds more than {MAX_YAML_NODES} values with those its aliases "
                    "repeat."
                )
            if len(open_nodes) - 1 + parent[2] > depth:
                raise DataError(f"{where}: the YAML is nested more than {depth} deep.")


def _decode_text(content: bytes | str, where: str, limit: int | None = None) -> str:
    """Return a document as text; raise `DataError` if it is too long or not UTF-8."""
    if limit is not None and len(content) > limit:
        raise DataError(f"{where}: is larger than the {limit} bytes that such a document can have.")
    if isinstance(content, str):
        return content
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not text in UTF-8 (byte {error.start}).") from error


def _raise_duplicate(keys: list[Any], where: str, line: int | None = None) -> None:
    """Raise `DataError` for the first key that is repeated; `line` is where its YAML mapping begins."""
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            place = "" if line is None else f" (in the mapping that begins at line {line})"
            raise DataError(f"{where}: the key {key!r} is a duplicate{place}; keep one of the two.")
        seen.add(key)


def _summary(error: BaseException) -> str:
    """Return the text of a parser's error in one line of at most 200 characters."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return " ".join(str(error).split())[:200]
