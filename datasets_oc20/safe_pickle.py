"""Reading foreign pickles as data: an unpickler that builds inert descriptions and calls nothing else.

OC20 LMDB values are pickles of torch_geometric objects. A pickle is a program; this one may name only the
classes below, and each of them is replaced by a stand-in that records what it was given. No torch,
numpy or torch_geometric code runs while the pickle is read, so a record written by any version of them
opens, and a hostile one can at most be refused. Tensors are built afterwards, only for the fields that are
asked for, from bytes whose bounds have been checked.
"""

import codecs
import collections
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_BYTES = 1 << 30
MAX_VALUES = 5_000_000
"""Most values of a pickle, those that it repeats counted as often as they are."""
MAX_DEPTH = 64
# A tuple of what was there already, made again and again: hashing such a key takes twice as long each time.
_DOUBLING = re.compile(rb"(?:h.|j.{4}|g\d+\n|2)[\x85-\x87t]", re.DOTALL)
_MAX_DOUBLINGS = 24
_EXPANDED = 1 << 20


class RefusedPickleError(ValueError):
    """The pickle names something outside the allow-list, or is not a pickle; the message says which."""


class PickledObject:
    """Stands in for the classes of torch_geometric; `state` is what the pickle stored for it."""

    def __init__(self, *args: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise RefusedPickleError("an object of it has a state that is not a dictionary")
        self.state = state


@dataclass
class PickledStorage:
    """The bytes of a pickled torch storage: a stream written by `torch.save`, not read yet."""

    content: bytes

    def tensor(self) -> torch.Tensor:
        """The storage as a flat tensor, read with `weights_only=True`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch warns that TypedStorage is old
                storage = torch.load(io.BytesIO(self.content), map_location="cpu", weights_only=True)
                return torch.tensor([], dtype=storage.dtype).set_(storage)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            name = found.group(1) if found else "something that is not tensor data"
            raise RefusedPickleError(f"it would run {name}") from error
        except Exception as error:
            # Like a damaged pickle, a damaged torch file may fail anywhere with any exception type.
            raise RefusedPickleError("the bytes of a tensor are damaged") from error


@dataclass
class PickledTensor:
    """A pickled tensor; `tensor()` builds it."""

    storage: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        """A contiguous copy of the tensor; raises `RefusedPickleError` when it does not fit its storage."""
        if not isinstance(self.storage, PickledStorage):
            raise RefusedPickleError("a tensor has no storage")
        flat = self.storage.tensor()
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise RefusedPickleError("a tensor has an impossible shape")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if math.prod(self.size) > max(flat.numel(), _EXPANDED):
            raise RefusedPickleError("a tensor repeats its storage too often")
        if 0 not in self.size and last >= flat.numel():
            raise RefusedPickleError("a tensor is larger than its storage")
        return torch.as_strided(flat, self.size, self.stride, self.offset).clone()


class _PickledDtype:
    """A numpy dtype of plain numbers or booleans, with the byte order that the state adds."""

    def __init__(self, code: Any, *flags: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biuf][1248]|\?", code):
            raise RefusedPickleError(f"a numpy array holds {code!r}, not numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order in ("<", ">", "|", "="):
            self.dtype = self.dtype.newbyteorder(order)


class PickledArray:
    """A pickled numpy array; `array()` builds it."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array; raises `RefusedPickleError` when its bytes do not match its shape."""
        try:
            _, shape, dtype, fortran, content = self.state
            flat = np.frombuffer(content, dtype=dtype.dtype)
            return flat.reshape(shape, order="F" if fortran else "C").copy()
        except (TypeError, ValueError, AttributeError) as error:
            raise RefusedPickleError("a numpy array is damaged") from error


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> PickledTensor:
    return PickledTensor(storage, offset, tuple(size), tuple(stride))


def _array_from_buffer(content: Any, dtype: Any, shape: Any, order: Any, *unused: Any) -> PickledArray:
    """What pickles of protocol 5 call for arrays."""
    array = PickledArray()
    array.__setstate__((None, shape, dtype, order == "F", content))
    return array


def _numpy_scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, _PickledDtype) or not isinstance(content, bytes):
        raise RefusedPickleError("a numpy number is damaged")
    return np.frombuffer(content, dtype=dtype.dtype, count=1)[0]


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    """What `_codecs.encode` is for in pickles of protocol 2: bytes written as latin-1 text."""
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise RefusedPickleError("it encodes something that is not text")
    return codecs.encode(text, encoding)


def _size(*args: Any) -> tuple[Any, ...]:
    return tuple(*args)


class _AnArrayClass:
    """What `numpy.ndarray` may be: the argument of `_reconstruct`."""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): PickledStorage,
    ("numpy", "ndarray"): _AnArrayClass,
    ("numpy", "dtype"): _PickledDtype,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = PickledArray
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _numpy_scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _array_from_buffer
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
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] | None = _ALLOWED.get((module, name))
        if found is None:
            raise RefusedPickleError(f"it would run {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickleError("it refers to something outside the record")


def _check_extent(value: Any) -> None:
    """Refuse what is nested too deep, or would be too large if its repeated parts were written out."""
    left = MAX_VALUES
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        found, depth = waiting.pop()
        if isinstance(found, PickledObject | PickledArray):
            children: Any = (found.state,)
        elif isinstance(found, PickledTensor):
            children = (found.storage, found.size, found.stride)
        elif isinstance(found, dict):
            children = (*found.keys(), *found.values())
        elif isinstance(found, list | tuple | set | frozenset):
            children = found
        else:
            continue
        left -= len(children)
        if depth >= MAX_DEPTH or left < 0:
            raise RefusedPickleError(
                "it is nested too deep" if depth >= MAX_DEPTH else "it repeats its parts too often"
            )
        waiting.extend((child, depth + 1) for child in children)


def load_inert(content: bytes) -> Any:
    """Unpickle `content` to plain Python values and the stand-ins of this module.

    Raises:
        RefusedPickleError: `content` is not a pickle, or names anything outside the allow-list.
    """
    if len(content) > MAX_BYTES:
        raise RefusedPickleError(f"it has more than {MAX_BYTES >> 20} MiB")
    if len(_DOUBLING.findall(content)) > _MAX_DOUBLINGS:
        raise RefusedPickleError("it repeats its parts too often")
    try:
        value = _AllowListUnpickler(io.BytesIO(content)).load()
        _check_extent(value)
        return value
    except RefusedPickleError:
        raise
    except Exception as error:
        # A damaged pickle may fail in any opcode with any exception type; none of them is a bug of ours.
        raise RefusedPickleError("it is not a readable pickle") from error
