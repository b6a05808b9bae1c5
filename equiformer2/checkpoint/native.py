"""Native checkpoint format: one file of plain values and tensors with everything needed to predict in eV.

Layout, a dictionary in `torch.save`'s format that loads with `weights_only=True`:

    format           "equiformer2.checkpoint"
    format_version   1, 2 with surroundings, 3 with stored weights, or 4 with products
    model_config     ModelConfig.to_dict()
    weights          {"raw": {name: tensor}, "averaged": {name: tensor}}, one of them at least
    normalizers      Normalizers.to_dict()
    energy_kind      "adsorption" or "total"
    units            {"energy": "eV", "forces": "eV/Å", "length": "Å"}
    provenance       plain values
    surroundings     Surroundings.to_dict(); only where they are known
    stored           {"raw": {name: StoredWeight.to_dict()}, …}: weights in fewer bytes than float32, which
                     are not among `weights`; only where there are any
    products         {"raw": ["blocks.0.ga", …], …}: branches that multiply in bfloat16 where the device has
                     instructions for it; only where there are any, with stored weights
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from equiformer2.checkpoint.compact import CompactState, read_stored
from equiformer2.checkpoint.contents import Contents, WeightsKind, check_energy_kind
from equiformer2.checkpoint.normalizers import Normalizers
from equiformer2.checkpoint.surroundings import Surroundings
from equiformer2.checkpoint.tensor_files import plain, write_tensors
from equiformer2.checkpoint.weights import config_from_values
from equiformer2.errors import InputError
from equiformer2.values import mapping, shown, shown_name

FORMAT = "equiformer2.checkpoint"
FORMAT_VERSION = 4
#: Parts beside `_KEYS` that a file of a version may have.
_MORE: dict[int, set[str]] = {1: set(), 2: {"surroundings"}, 3: {"surroundings", "stored"}}
_MORE[4] = {*_MORE[3], "products"}
UNITS = {"energy": "eV", "forces": "eV/Å", "length": "Å"}
_KEYS = {
    "format",
    "format_version",
    "model_config",
    "weights",
    "normalizers",
    "energy_kind",
    "units",
    "provenance",
}
_SURROUNDINGS, _STORED, _PRODUCTS = "surroundings", "stored", "products"


def write_native(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write one native file atomically.

    Args:
        path: the file.
        contents: content of the file.

    Raises:
        InputError: if the kind of energy is not known.
        OSError: if the file cannot be written.
    """
    write_tensors(path, native_content(str(path), contents))


def native_content(source: str, contents: Contents) -> dict[str, Any]:
    """Return the dictionary that a native file holds.

    Args:
        source: name of the file, for errors.
        contents: content of the file.

    Raises:
        InputError: if the kind of energy is not known.
    """

    def detached(tensor: Tensor) -> Tensor:
        # A clone, because a view would drag its whole storage into the file.
        return tensor.detach().to("cpu", copy=True).contiguous()

    states = {
        kind: (state if isinstance(state, CompactState) else CompactState(state, {})).map(detached)
        for kind, state in contents.weights.items()
    }
    stored = {
        kind: {name: value.to_dict() for name, value in state.stored.items()}
        for kind, state in states.items()
        if state.stored
    }
    products = {kind: list(state.products) for kind, state in states.items() if state.products}
    written = {
        "written_with": {"equiformer2": version("equiformer2"), "torch": str(torch.__version__)},
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    surroundings = contents.surroundings
    return {
        "format": FORMAT,
        # Older versions of the package read what holds nothing new.
        "format_version": 4 if products else 3 if stored else 1 if surroundings is None else 2,
        "model_config": plain(contents.config.to_dict()),
        "weights": {kind: state.plain for kind, state in states.items()},
        "normalizers": contents.normalizers.to_dict(),
        "energy_kind": check_energy_kind(contents.energy_kind, source),
        "units": UNITS,
        "provenance": plain(contents.provenance) | written,
        **({} if surroundings is None else {_SURROUNDINGS: surroundings.to_dict()}),
        **({_STORED: stored} if stored else {}),
        **({_PRODUCTS: products} if products else {}),
    }


def is_native(file: Mapping[str, Any]) -> bool:
    """Tell whether a loaded file declares the native format, of any version."""
    return file.get("format") == FORMAT


def read_native(file: Mapping[str, Any], source: str) -> Contents:
    """Interpret a loaded native file.

    Args:
        file: as `read_tensors` returns it.
        source: name of the file, for errors.

    Raises:
        InputError: if the file is of a newer version, or a part is missing, unknown or malformed.
    """
    file_version = file.get("format_version")
    if not isinstance(file_version, int) or isinstance(file_version, bool) or file_version < 1:
        raise InputError(f"{source} states no valid format_version: {shown(file_version)}")
    if file_version > FORMAT_VERSION:
        raise InputError(
            f"{source} is of checkpoint format version {shown(file_version)}, newer than the "
            f"{FORMAT_VERSION} that equiformer2 {version('equiformer2')} reads: update equiformer2"
        )
    needed = _KEYS | ({_SURROUNDINGS} if file_version == 2 else set())
    known = _KEYS | _MORE[file_version]
    if not needed <= set(file) <= known:
        missing, unknown = sorted(needed - set(file)), [shown_name(key) for key in file if key not in known]
        raise InputError(
            f"{source} is not a valid checkpoint: missing parts {missing}, unknown parts {unknown[:5]}"
        )
    for part in ("model_config", "weights", "normalizers"):
        mapping(file[part], f"{source}: {part}")
    # Values that are only recorded become plain, with text for keys.
    units, provenance = (mapping(plain(file[part]), f"{source}: {part}") for part in ("units", "provenance"))
    if units != UNITS:
        raise InputError(f"{source} is in units {shown(units)}; only {UNITS} are read")
    try:
        normalizers = Normalizers.from_dict(file["normalizers"])
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    config = config_from_values(file["model_config"], source)
    normalizers.check_model(config, source)
    surroundings = None
    if _SURROUNDINGS in file:
        surroundings = Surroundings.from_dict(file[_SURROUNDINGS], config.sphere_channels, source)
    return Contents(
        source=source,
        source_format="equiformer2",
        config=config,
        weights=_read_weights(file["weights"], file.get(_STORED, {}), file.get(_PRODUCTS, {}), source),
        normalizers=normalizers,
        energy_kind=check_energy_kind(file["energy_kind"], source),
        provenance=dict(provenance),
        surroundings=surroundings,
    )


def _read_weights(
    weights: Mapping[str, Any], stored: Any, products: Any, source: str
) -> dict[WeightsKind, Mapping[str, Tensor]]:
    """Check the weights of a native file, by kind and name."""
    states: dict[WeightsKind, Mapping[str, Tensor]] = {}
    for kind, state in weights.items():
        if kind not in ("raw", "averaged"):
            raise InputError(f"{source} holds weights of an unknown kind: {shown(kind)}")
        for name, value in mapping(state, f"{source}: the {kind} weights").items():
            if not isinstance(value, Tensor):
                raise InputError(
                    f"{source}: the {kind} weights are not a dictionary of tensors: {shown_name(name)} is a "
                    f"{type(value).__name__}"
                )
        states[kind] = state  # type: ignore[index]
    stored = mapping(stored, f"{source}: stored")
    for kind in mapping(products, f"{source}: products"):
        if kind not in stored:
            raise InputError(f"{source} has products of weights that it does not store: {shown(kind)}")
    for kind, values in stored.items():
        if kind not in states:
            raise InputError(f"{source} stores weights of a kind that it does not hold: {shown(kind)}")
        name = f"{source}: the stored {kind} weights"
        states[kind] = read_stored(values, states[kind], name, products.get(kind, ()))  # type: ignore[index]
    if not states:
        raise InputError(f"{source} holds no weights")
    return states
