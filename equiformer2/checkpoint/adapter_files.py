"""Adapter files: low-rank changes of one network for other data, without the network.

Layout, a dictionary in `torch.save`'s format that loads with `weights_only=True`:

    format           "equiformer2.adapter"
    format_version   1
    base             {"fingerprint", "sha256", "file", "weights"} of the network that the adapter belongs to
    settings         plain values: how the adapter was chosen
    maps             {weight name: {"shape": [...], "rank": r, "scale": s}}
    kept             uint8 bitmap of the factors of all maps, in order: 1 for an entry that is not pruned
    values           float32, those entries
    replaced         {parameter name: tensor} of small parameters that are stored whole, such as last layers
    normalizers      Normalizers.to_dict()
    energy_kind      "adsorption" or "total"
    units            as in checkpoints
    provenance       plain values

Of a map the left factor `[..., out, rank]` comes first, then the right one `[..., rank, in]`.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiformer2.checkpoint.contents import EnergyKind, check_energy_kind
from equiformer2.checkpoint.normalizers import Normalizers
from equiformer2.checkpoint.tensor_files import plain, read_tensors, write_tensors
from equiformer2.errors import InputError
from equiformer2.model.parametrizations import LowRank
from equiformer2.values import Items, Number, OneOf, Whole, mapping, shown, shown_name

FORMAT = "equiformer2.adapter"
FORMAT_VERSION = 1
UNITS = {"energy": "eV", "forces": "eV/Å", "length": "Å"}
_KEYS = {
    *("format", "format_version", "base", "settings", "maps", "kept", "values", "replaced"),
    *("normalizers", "energy_kind", "units", "provenance"),
}
_LARGEST = 2**31
_STATED = "states no valid format_version"


@dataclass(frozen=True)
class Base:
    """Network that an adapter belongs to.

    Attributes:
        fingerprint: of its weights and options (`fingerprints.fingerprint_of_weights`).
        sha256: of its file.
        file: name of the file.
        weights: kind of weights in it, `raw` or `averaged`.
    """

    fingerprint: str
    sha256: str
    file: str
    weights: str


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of a network, with what its answers mean.

    Attributes:
        source: name of its file, for errors.
        base: the network.
        settings: plain values: how it was chosen (`equiformer2.adapters.AdapterSettings`).
        maps: low-rank maps by the names of the weights.
        replaced: whole parameters by name.
        normalizers: of the data that it was trained on.
        energy_kind: of these data.
        provenance: plain values: origin of the adapter.
    """

    source: str
    base: Base
    settings: dict[str, Any]
    maps: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]
    normalizers: Normalizers
    energy_kind: EnergyKind
    provenance: dict[str, Any]

    @property
    def rank(self) -> int:
        """Largest rank of the maps; narrow weights have less."""
        return max((each.rank for each in self.maps.values()), default=0)

    @property
    def kept_share(self) -> float:
        """Share of the entries of all factors that is not pruned."""
        size = sum(each.size for each in self.maps.values())
        return sum(each.kept for each in self.maps.values()) / size if size else 1.0

    @property
    def trainable_parameters(self) -> int:
        """Count the numbers that the training may change."""
        whole = sum(tensor.numel() for tensor in self.replaced.values())
        return sum(each.kept for each in self.maps.values()) + whole

    def describe(self) -> dict[str, Any]:
        """Describe the adapter in plain values, for records."""
        return {
            "base_sha256": self.base.sha256,
            "base_fingerprint": self.base.fingerprint,
            "base_file": self.base.file,
            "base_weights": self.base.weights,
            "rank": self.rank,
            "kept_share": self.kept_share,
            "trainable_parameters": self.trainable_parameters,
            "maps": len(self.maps),
            "replaced": sorted(self.replaced),
            "settings": self.settings,
            "energy_kind": self.energy_kind,
        }


def write_adapter(path: str | os.PathLike[str], adapter: Adapter) -> None:
    """Write an adapter file atomically.

    Raises:
        OSError: the file cannot be written.
    """
    factors = [factor for each in adapter.maps.values() for factor in _factors(each)]
    kept = torch.cat([mask.flatten() for _, mask in factors]) if factors else torch.zeros(0, dtype=torch.bool)
    values = torch.cat([entry[mask] for entry, mask in factors]) if factors else torch.zeros(0)
    written = {
        "written_with": {"equiformer2": version("equiformer2"), "torch": str(torch.__version__)},
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_tensors(
        path,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base": asdict(adapter.base),
            "settings": plain(adapter.settings),
            "maps": {
                name: {"shape": list(each.shape), "rank": each.rank, "scale": float(each.scale)}
                for name, each in adapter.maps.items()
            },
            "kept": torch.from_numpy(np.packbits(kept.numpy())),
            "values": values.float(),
            "replaced": {
                name: tensor.detach().to("cpu", copy=True).contiguous()
                for name, tensor in adapter.replaced.items()
            },
            "normalizers": adapter.normalizers.to_dict(),
            "energy_kind": check_energy_kind(adapter.energy_kind, str(path)),
            "units": UNITS,
            "provenance": plain(adapter.provenance) | written,
        },
    )


def _factors(each: LowRank) -> list[tuple[Tensor, Tensor]]:
    """Both factors of a map on the CPU, each with its mask."""
    return [
        (factor.detach().cpu(), mask.cpu())
        for factor, mask in ((each.left, each.left_kept), (each.right, each.right_kept))
    ]


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter file; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is damaged, no adapter, or of a newer version.
    """
    source, file = str(path), read_tensors(Path(path))
    if file.get("format") != FORMAT:
        what = (
            "a checkpoint of a whole network"
            if {"weights", "state_dict"} & set(file)
            else f"no adapter: it holds {', '.join(sorted(map(shown_name, file))[:8]) or 'nothing'}"
        )
        raise InputError(f"{source} is {what}; give an adapter file, as finetune --adapter writes it")
    stated = file.get("format_version")
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        raise InputError(f"{source} {_STATED}: {shown(stated)}")
    if stated > FORMAT_VERSION:
        raise InputError(
            f"{source} is of adapter format version {shown(stated)}, newer than the {FORMAT_VERSION} that "
            f"equiformer2 {version('equiformer2')} reads: update equiformer2"
        )
    if set(file) != _KEYS:
        missing, unknown = sorted(_KEYS - set(file)), [shown_name(key) for key in file if key not in _KEYS]
        raise InputError(
            f"{source} is not a valid adapter: missing parts {missing}, unknown parts {unknown[:5]}"
        )
    if plain(file["units"]) != UNITS:
        raise InputError(f"{source} is in units {shown(file['units'])}; only {UNITS} are read")
    try:
        normalizers = Normalizers.from_dict(mapping(file["normalizers"], "normalizers"))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    settings, provenance = (
        dict(mapping(plain(file[part]), f"{source}: {part}")) for part in ("settings", "provenance")
    )
    return Adapter(
        source=source,
        base=_read_base(file["base"], source),
        settings=settings,
        maps=_read_maps(file, source),
        replaced=_read_replaced(file["replaced"], source),
        normalizers=normalizers,
        energy_kind=check_energy_kind(file["energy_kind"], source),
        provenance=provenance,
    )


def _read_base(values: Any, source: str) -> Base:
    values = mapping(values, f"{source}: base")
    if set(values) != {"fingerprint", "sha256", "file", "weights"}:
        raise InputError(f"{source}: base must hold fingerprint, sha256, file and weights")
    for name, value in values.items():
        if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
            raise InputError(f"{source}: base.{name} is {shown(value)}; it must be a printable text")
    OneOf("raw", "averaged").read(values["weights"], f"{source}: base.weights")
    return Base(**values)


def _read_maps(file: Mapping[str, Any], source: str) -> dict[str, LowRank]:
    """Check the maps, and unpack their factors."""
    kept, values = file["kept"], file["values"]
    if not (isinstance(kept, Tensor) and kept.dtype == torch.uint8 and kept.dim() == 1):
        raise InputError(f"{source}: kept must be one row of bytes")
    if not (isinstance(values, Tensor) and values.dtype == torch.float32 and values.dim() == 1):
        raise InputError(f"{source}: values must be one row of float32 numbers")
    shapes: dict[str, tuple[list[int], list[int], float]] = {}
    for name, each in mapping(file["maps"], f"{source}: maps").items():
        where = f"{source}: the map of {shown_name(name)}"
        if not isinstance(name, str) or set(mapping(each, where)) != {"shape", "rank", "scale"}:
            raise InputError(f"{where} must hold shape, rank and scale")
        shape = Items(Whole(1, _LARGEST), 3).read(each["shape"], f"{where}: shape")
        if len(shape) < 2:
            raise InputError(f"{where} has the shape {shape}; it must be [out, in] or [degrees, out, in]")
        rank = Whole(1, min(shape[-2:])).read(each["rank"], f"{where}: rank")
        scale = Number().read(each["scale"], f"{where}: scale")
        shapes[name] = [*shape[:-1], rank], [*shape[:-2], rank, shape[-1]], scale
    size = sum(math.prod(left) + math.prod(right) for left, right, _ in shapes.values())
    if len(kept) != math.ceil(size / 8):
        raise InputError(
            f"{source}: the bitmap has {len(kept)} bytes, and its maps need {math.ceil(size / 8)}"
        )
    mask = torch.from_numpy(np.unpackbits(kept.numpy(), count=size).astype(bool))
    if int(mask.sum()) != len(values):
        raise InputError(f"{source}: the bitmap keeps {int(mask.sum())} entries, and {len(values)} are there")
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{source}: some of its numbers are not finite")
    every = torch.zeros(size)
    every[mask] = values.detach()
    maps, at = {}, 0
    for name, (left, right, scale) in shapes.items():
        parts = []
        for shape in (left, right):
            end = at + math.prod(shape)
            parts.append((every[at:end].view(shape).clone(), mask[at:end].view(shape).clone()))
            at = end
        maps[name] = LowRank(parts[0][0], parts[1][0], scale, parts[0][1], parts[1][1])
    return maps


def _read_replaced(values: Any, source: str) -> dict[str, Tensor]:
    found = {}
    for name, value in mapping(values, f"{source}: replaced").items():
        good = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
        if not isinstance(name, str) or not good or not bool(torch.isfinite(value).all()):
            raise InputError(
                f"{source}: the replaced parameter {shown_name(name)} must be a tensor of finite float32 or "
                "float64 numbers"
            )
        found[name] = value.detach()
    return found
