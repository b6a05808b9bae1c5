"""Reading what others wrote: files, JSON, YAML and compressed bytes that may be damaged, hostile or endless.

Every function here ends soon, uses a bounded amount of memory, and raises `DataError` with one sentence for
whatever is wrong. Missing and unreadable files stay the `OSError` that opening them gives.
"""

import errno
import io
import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml

from datasets_oc20.errors import DataError

AnyPath = str | os.PathLike[str]

MAX_TEXT = 64 << 20
"""Most bytes of a JSON document."""
MAX_CONFIG = 1 << 20
"""Most bytes of a YAML document, which people write by hand."""
MAX_DEPTH = 64
"""Most nested lists and mappings of a document."""
MAX_YAML_NODES = 200_000
"""Most values of a YAML document, each counted as often as aliases repeat it."""

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
_LARGE_EXPONENT = re.compile(r"[eE]\+?0*[1-9]\d{2}")


def regular_file(path: AnyPath) -> Path:
    """`path`, if it is a file that can be read to an end; nothing is opened, so nothing can block.

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
    """A regular file, opened to be read.

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
    """The content of a regular file of at most `limit` bytes.

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
    """The UTF-8 text of a regular file of at most `limit` bytes, without a byte order mark.

    Raises:
        DataError: as `read_bounded`, or the file is not text.
        OSError: it is missing or unreadable.
    """
    return _decoded(read_bounded(path, limit), str(path))


def load_json(
    content: bytes | str, where: str, limit: int = MAX_TEXT, depth: int = MAX_DEPTH, nonfinite: bool = False
) -> Any:
    """The value of a JSON document.

    Args:
        content: the document; bytes are UTF-8.
        where: file and key, for the error message.
        limit: most bytes or characters of the document.
        depth: most nested lists and objects.
        nonfinite: take NaN, Infinity and numbers beyond float64, which some programs write, as such.

    Raises:
        DataError: not JSON, too long, too deep, a key twice in one object, a number that is not finite, or
            text that is not Unicode.
    """
    text = _bounded_text(content, where, limit)
    if text.count("[") + text.count("{") > depth and _nesting(text) > depth:
        raise DataError(f"{where}: the JSON is nested more than {depth} deep.")
    if not nonfinite and _LARGE_EXPONENT.search(text) and _overflows(_STRINGS.sub("", text)):
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
        raise DataError(f"{where}: not readable as JSON ({_first_line(error)}).") from error
    return value


def read_json(path: AnyPath, limit: int = MAX_TEXT, depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: as `read_bounded` and `load_json`.
        OSError: it is missing or unreadable.
    """
    return load_json(read_bounded(path, limit), str(path), limit, depth)


def load_yaml(content: bytes | str, where: str, limit: int = MAX_CONFIG, depth: int = MAX_DEPTH) -> Any:
    """The value of a YAML document made of plain values.

    Args:
        content: the document; bytes are UTF-8.
        where: the file, for the error message.
        limit: most bytes or characters of the document.
        depth: most nested lists and mappings, those that aliases repeat included.

    Raises:
        DataError: not YAML, too long, too deep, a key twice in one mapping, aliases that repeat more than
            MAX_YAML_NODES values or lead in a circle, or a tag that names an object.
    """
    text = _bounded_text(content, where, limit)
    try:
        _check_yaml_size(text, where, depth)
        loader = _UniqueKeys(text)
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
        raise DataError(f"{where}: not readable as YAML ({_first_line(error)}).") from error


def read_yaml(path: AnyPath, limit: int = MAX_CONFIG, depth: int = MAX_DEPTH) -> Any:
    """The value of a YAML file.

    Raises:
        DataError: as `read_bounded` and `load_yaml`.
        OSError: it is missing or unreadable.
    """
    return load_yaml(read_bounded(path, limit), str(path), limit, depth)


def inflate(content: bytes, limit: int, where: str) -> bytes:
    """Decompress zlib `content` to at most `limit` bytes.

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


class _Unpacked(io.RawIOBase):
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
        except (lzma.LZMAError, zlib.error) as error:
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
        """Some bytes, none only at the end."""
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
    """The content of an `.xz`, `.gz` or plain file (by its name), to be read in binary.

    Args:
        path: the file.
        limit: most bytes of the content; reading beyond raises.

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
    else:
        if os.fstat(file.fileno()).st_size > limit:
            file.close()
            raise DataError(f"{path}: is larger than the {limit} bytes that such a file can have.")
        return io.BufferedReader(file)  # type: ignore[arg-type]
    return io.BufferedReader(_Unpacked(file, str(path), limit, start), buffer_size=_CHUNK)


class _UniqueKeys(yaml.SafeLoader):
    """Plain values only, and no key twice in one mapping, where YAML would drop the first without a word."""

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


def _check_yaml_size(text: str, where: str, depth: int) -> None:
    """Refuse a document that is too deep or repeats too much before anything is built of it."""
    sizes: dict[str, tuple[int, int]] = {}  # of every anchor: values, nesting
    open_nodes: list[list[Any]] = [[None, 0, 0]]  # anchor, values so far, nesting of the deepest child
    open_anchors: list[str] = []
    for event in _events(text):
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
                f"{where}: the YAML holds more than {MAX_YAML_NODES} values with those its aliases repeat."
            )
        if len(open_nodes) - 1 + parent[2] > depth:
            raise DataError(f"{where}: the YAML is nested more than {depth} deep.")


def _events(text: str) -> Iterator[yaml.Event]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return iter(yaml.parse(text, Loader=loader))


def _bounded_text(content: bytes | str, where: str, limit: int) -> str:
    if len(content) > limit:
        raise DataError(f"{where}: is larger than the {limit} bytes that such a document can have.")
    return content if isinstance(content, str) else _decoded(content, where)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not text in UTF-8 (byte {error.start}).") from error


def _nesting(text: str) -> int:
    """The deepest nesting of brackets outside strings; also of text that is no JSON."""
    level = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRINGS.sub("", text)):
        level += 1 if bracket in "[{" else -1
        deepest = max(deepest, level)
    return deepest


def _overflows(text: str) -> bool:
    numbers = re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text)
    return any(float(number) in (float("inf"), float("-inf")) for number in numbers)


def _raise_duplicate(keys: list[Any], where: str, line: int | None = None) -> None:
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            place = "" if line is None else f" (in the mapping that begins at line {line})"
            raise DataError(f"{where}: the key {key!r} is a duplicate{place}; keep one of the two.")
        seen.add(key)


def _first_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    return " ".join(str(error).split())[:200]
