"""Fingerprints by which stored results are told apart, of structures and of whole searches."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch_geometric.data import Data

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.values import shown


def fingerprint_of_structures(structures: Sequence[Data]) -> str:
    """Hash structures: positions, elements, cells, tags, held atoms, and their sequence.

    Args:
        structures: the structures.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for structure in structures:
        digest.update(str(structure.sid).encode())
        for name in ("pos", "atomic_numbers", "cell", "pbc", "fixed", "tags"):
            digest.update(structure[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def as_stored(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a JSON file gives back of a fingerprint: tuples become lists."""
    values: dict[str, Any] = json.loads(json.dumps(fingerprint))
    return values


def check_same_work(
    path: AnyPath, stored: Mapping[str, Any], present: Mapping[str, Any], work: str = "search"
) -> None:
    """Refuse the state of other work than the present one.

    Args:
        path: file of the state, for the error.
        stored: fingerprint in the file.
        present: fingerprint of the present work, as `as_stored` gives it.
        work: noun for the work.

    Raises:
        InputError: the fingerprints differ; the first difference is named.
    """
    for key in sorted({*present, *stored}):
        if present.get(key) != stored.get(key):
            raise InputError(
                f"{path} is the state of another {work}: {key} was {shown(stored.get(key))} and is "
                f"{shown(present.get(key))} now; give another file or remove it"
            )
