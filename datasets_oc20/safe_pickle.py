"""Unpickler of third-party pickles that builds inert descriptions and calls nothing else.

OC20 LMDB values are pickles of torch_geometric objects. A pickle is a program; this one may name only the
classes below, and each of them is replaced by a stand-in that records its arguments. No torch,
numpy or torch_geometric code runs while the pickle is read, so a record written by any version of them
opens, and a hostile one can at most be refused. Tensors are built afterwards, only for the fields that are
asked for, from bytes whose bounds have been checked.

Before that the opcodes are followed without running them (`_check_program`): some programs would cost hours
or all memory through ordinary operations, like hashing the key of a dictionary.
"""

import codecs
import io
import math
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_BYTES = 1 << 30
MAX_VALUES = 5_000_000
"""Maximum number of values in a pickle, each counted as often as it is repeated."""
MAX_DEPTH = 64
MAX_OPCODES = 500_000
"""Maximum number of steps of a program; a record of OC20 has some 400, whatever its size."""
MAX_DIMENSIONS = 8
_MAX_KEY = 1000
"""Maximum number of characters of a key."""
# Kinds of values on the stack of a program: can be a key, was named (a class or a function), all others.
_KEY, _NAMED, _OTHER = range(3)
_PLAIN = (
    pickletools.pyunicode, pickletools.pystring, pickletools.pybytes, pickletools.pybytes_or_str,
    pickletools.pyint, pickletools.pyinteger_or_bool, pickletools.pybool, pickletools.pynone,
)  # fmt: skip
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
# Opcodes that hash values, and which of those above the mark: every one, or every second.
_KEYS = {"SETITEM": 2, "SETITEMS": 2, "DICT": 2, "ADDITEMS": 1, "FROZENSET": 1}


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[bool, int, int | None]:
    """Effect on the stack: takes all to the last mark, values taken below it, kind of the value put."""
    before, after, name = opcode.stack_before, opcode.stack_after, opcode.name
    to_mark = pickletools.markobject in before
    taken = before.index(pickletools.markobject) if to_mark else len(before)
    if not after or name == "DUP" or name == "MARK" or name in _PUTS | _GETS:
        return to_mark, taken, None
    named = name in ("GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
    return to_mark, taken, _NAMED if named else _KEY if after[0] in _PLAIN else _OTHER


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}
_EXPANDED = 1 << 20


class RefusedPickleError(ValueError):
    """The pickle names something outside the allow-list, or is not a pickle; the message names it."""


class _Finished:
    """Base of values that a pickle cannot change after they were built."""

    def __setstate__(self, state: Any) -> None:
        raise RefusedPickleError("it changes something that is finished")


class PickledObject:
    """Stand-in for the classes of torch_geometric.

    Attributes:
        state: attributes by name, as the pickle stored them.
    """

    def __init__(self, *args: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise RefusedPickleError("an object of it has a state that is not a dictionary")
        self.state = state


@dataclass
class PickledStorage(_Finished):
    """The bytes of a pickled torch storage: a stream of `torch.save` that is read on demand.

    Attributes:
        content: the stream.
    """

    content: bytes

    def tensor(self) -> torch.Tensor:
        """Read the storage as a flat tensor, with `weights_only=True`; damage is a `RefusedPickleError`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch warns that TypedStorage is old
                storage = torch.load(io.BytesIO(self.content), map_location="cpu", weights_only=True)
                return torch.tensor([], dtype=storage.dtype).set_(storage)
        except pickle.UnpicklingError as error:
            match = re.search(r"GLOBAL ([\w.]+)", str(error))
            name = match.group(1) if match else "something that is not tensor data"
            raise RefusedPickleError(f"it would run {name}") from error
        except Exception as error:
            # Like a damaged pickle, a damaged torch file may fail anywhere with any exception type.
            raise RefusedPickleError("the bytes of a tensor are damaged") from error


@dataclass
class PickledTensor(_Finished):
    """A pickled tensor that is built on demand.

    Attributes:
        storage: a `PickledStorage`, unless the pickle is damaged.
        offset: first element in the storage.
        size: shape.
        stride: steps in elements.
    """

    storage: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def rebuild(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> "PickledTensor":
        """Stand in for `torch._utils._rebuild_tensor` and its second version."""
        return PickledTensor(storage, offset, tuple(size), tuple(stride))

    def tensor(self) -> torch.Tensor:
        """Build a contiguous copy; raise `RefusedPickleError` if the tensor does not fit its storage."""
        if not isinstance(self.storage, PickledStorage):
            raise RefusedPickleError("a tensor has no storage")
        flat = self.storage.tensor()
        numbers = (self.offset, *self.size, *self.stride)
        fits = len(self.size) == len(self.stride) <= MAX_DIMENSIONS
        if not fits or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise RefusedPickleError("a tensor has an impossible shape")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if math.prod(self.size) > max(flat.numel(), _EXPANDED):
            raise RefusedPickleError("a tensor repeats its storage too often")
        if 0 not in self.size and last >= flat.numel():
            raise RefusedPickleError("a tensor is larger than its storage")
        try:
            return torch.as_strided(flat, self.size, self.stride, self.offset).clone()
        except RuntimeError as error:  # numbers of an empty tensor that overflow when multiplied
            raise RefusedPickleError("a tensor has an impossible shape") from error


class _PickledDtype:
    """A numpy dtype of plain numbers or booleans, with the byte order that the state adds."""

    def __init__(self, code: Any, *flags: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biuf][1248]|\?", code):
            raise RefusedPickleError(f"a numpy array holds {code!r}, not numbers")
        self.dtype = np.dtype(code)

    @staticmethod
    def scalar(dtype: Any, content: Any) -> Any:
        """Stand in for `numpy.core.multiarray.scalar`: one number."""
        if not isinstance(dtype, _PickledDtype) or not isinstance(content, bytes):
            raise RefusedPickleError("a numpy number is damaged")
        return np.frombuffer(content, dtype=dtype.dtype, count=1)[0]

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order in ("<", ">", "|", "="):
            self.dtype = self.dtype.newbyteorder(order)


class PickledArray:
    """A pickled numpy array that is built on demand.

    Attributes:
        state: version, shape, dtype, order and bytes, as numpy pickles them.
    """

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @staticmethod
    def from_buffer(content: Any, dtype: Any, shape: Any, order: Any, *unused: Any) -> "PickledArray":
        """Stand in for `_frombuffer`, which pickles of protocol 5 call."""
        array = PickledArray()
        array.__setstate__((None, shape, dtype, order == "F", content))
        return array

    def array(self) -> np.ndarray:
        """Build the array; raise `RefusedPickleError` if its bytes do not match its shape."""
        try:
            _, shape, dtype, fortran, content = self.state
            flat = np.frombuffer(content, dtype=dtype.dtype)
            return flat.reshape(shape, order="F" if fortran else "C").copy()
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RefusedPickleError("a numpy array is damaged") from error


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    """Stand in for `_codecs.encode`, which pickles of protocol 2 call for bytes written as latin-1 text."""
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise RefusedPickleError("it encodes something that is not text")
    return codecs.encode(text, encoding)


def _mapping(*args: Any) -> dict[Any, Any]:
    """Stand in for an OrderedDict, whose items come after it since Python 3, by an empty dictionary."""
    if any(args):
        raise RefusedPickleError("it makes a dictionary of a list")
    return {}


class _AnArrayClass(_Finished):
    """Stand-in for `numpy.ndarray`, which may only be the argument of `_reconstruct`."""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _mapping,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): lambda *args: tuple(*args),
    ("torch._utils", "_rebuild_tensor"): PickledTensor.rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): PickledTensor.rebuild,
    ("torch.storage", "_load_from_bytes"): PickledStorage,
    ("numpy", "ndarray"): _AnArrayClass,
    ("numpy", "dtype"): _PickledDtype,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = PickledArray
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _PickledDtype.scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = PickledArray.from_buffer
for _module, _names in {
    "torch_geometric.data.data": ("Data", "DataTensorAttr", "DataEdgeAttr"),
    "torch_geometric.data": ("Data",),
    "torch_geometric.data.storage": ("GlobalStorage", "BaseStorage", "NodeStorage", "EdgeStorage"),
    "torch_geometric.data.feature_store": ("TensorAttr",),
    "torch_geometric.data.graph_store": ("EdgeAttr",),
}.items():
    for _name in _names:
        _ALLOWED[_module, _name] = PickledObject


class _AllowListUnpickler(pickle.Unpickler):
    """Unpickler that finds the classes of `_ALLOWED` only."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        allowed: Callable[..., Any] | None = _ALLOWED.get((module, name))
        if allowed is None:
            raise RefusedPickleError(f"it would run {module}.{name}")
        return allowed

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickleError("it refers to something outside the record")


def _check_program(content: bytes) -> None:
    """Follow the opcodes of a pickle without running them, and refuse what is costly or changes this module.

    Keys of dictionaries and members of sets are plain values: short text, numbers of 31 bits, None. A tuple
    that holds one tuple twice, and that twice, and so on, takes twice as long to hash with each of them. The
    memo, an array that is as long as its largest index, has no larger one than there are opcodes. Classes and
    functions that were named get no state, which would be stored for the records that follow.

    Raises:
        RefusedPickleError: as above, or a value is asked for that is not there.
        ValueError: `content` is no program.
    """

    def is_key(argument: Any) -> bool:
        if isinstance(argument, str | bytes):
            return len(argument) <= _MAX_KEY
        return argument is None or -(2**31) <= argument < 2**31

    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    program: Iterator[tuple[pickletools.OpcodeInfo, Any, Any]] = pickletools.genops(content)
    for count, (opcode, argument, _) in enumerate(program):
        if count >= MAX_OPCODES:
            raise RefusedPickleError(f"it has more than {MAX_OPCODES} steps")
        name = opcode.name
        to_mark, taken, pushed = _EFFECTS[name]
        items: list[int] = []
        operands: list[int] = []
        if to_mark:
            place = marks.pop()
            items = stack[place:]
            del stack[place:]
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
            continue
        if taken:
            base = len(stack) - taken
            if base < (marks[-1] if marks else 0):
                raise RefusedPickleError("it takes more than there is")
            operands = stack[base:]
            del stack[base:]
        if pushed is not None:
            stack.append(pushed if pushed != _KEY or is_key(argument) else _OTHER)
        if name in _PUTS:
            index = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if index > count:
                raise RefusedPickleError("it numbers its parts in an impossible way")
            stack.extend(operands)
            memo[index] = stack[-1]
        elif name in _GETS:
            stack.append(memo[int(argument or 0)])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "DUP":
            stack.extend(operands * 2)
        elif name in _KEYS:
            keys = operands[1:2] if name == "SETITEM" else items[:: _KEYS[name]]
            if any(key != _KEY for key in keys):
                raise RefusedPickleError("a key of a dictionary is neither short text nor a small number")
        elif name == "BUILD" and operands[0] == _NAMED:
            raise RefusedPickleError("it changes a class or a function")


def _check_extent(part: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Refuse values that are nested too deep, or too large with their repeated parts written out.

    The objects of torch_geometric and arrays count once: nothing writes them out, and a record of PyG 2 holds
    itself (`_store._parent`).

    Args:
        part: a value in the unpickled record.
        depth: its nesting.
        known: values and nesting of the parts that were seen, by id.

    Returns:
        Number of values in `part`, each counted as often as it is repeated, and levels of nesting.
    """
    once = isinstance(part, PickledObject | PickledArray)
    if once:
        children: Any = (part.state,)
    elif isinstance(part, PickledTensor):
        children = (part.storage, part.size, part.stride)
    elif isinstance(part, dict):
        children = (*part.keys(), *part.values())
    elif isinstance(part, list | tuple | set | frozenset):
        children = part
    else:
        return 0, 0
    if id(part) not in known:
        if depth >= MAX_DEPTH:
            raise RefusedPickleError("it is nested too deep")
        values, nesting = len(children), 0
        if once:
            known[id(part)] = 0, 0
        for child in children:
            inside, levels = _check_extent(child, depth + 1, known)
            values, nesting = values + inside, max(nesting, levels)
        if values > MAX_VALUES:
            raise RefusedPickleError("it repeats its parts too often")
        known.setdefault(id(part), (values, nesting + 1))
    values, nesting = known[id(part)]
    if depth + nesting > MAX_DEPTH:
        raise RefusedPickleError("it is nested too deep")
    return values, nesting


def load_inert(content: bytes) -> Any:
    """Unpickle to plain Python values and the stand-ins of this module.

    Args:
        content: the pickle.

    Raises:
        RefusedPickleError: `content` is not a pickle, or names anything outside the allow-list.
    """
    if len(content) > MAX_BYTES:
        raise RefusedPickleError(f"it has more than {MAX_BYTES >> 20} MiB")
    try:
        _check_program(content)
        value = _AllowListUnpickler(io.BytesIO(content)).load()
        _check_extent(value, 0, {})
        return value
    except RefusedPickleError:
        raise
    except Exception as error:
        # A damaged pickle may fail in any opcode with any exception type; none of them is a bug of ours.
        raise RefusedPickleError("it is not a readable pickle") from error
