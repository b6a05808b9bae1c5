"""Configurations and models that come with the package, found by bare name.

In a checkout `configs` and `models` of this folder are links to the folders of the same names at its root; a
wheel holds the files themselves. Where a checkout has no links (Windows, some archive programs) the folders
at the root are read.
"""

import os
from pathlib import Path

from equiformer2.errors import InputError

_HERE = Path(__file__).parent


def find_config(name: str | os.PathLike[str]) -> Path:
    """Return the path of a configuration from a path, or a bare name such as `oc20_small`.

    Raises:
        InputError: there is neither a file nor a shipped configuration of this bare name.
    """
    return _find(name, "configs", ".yaml", "configuration")


def find_checkpoint(name: str | os.PathLike[str]) -> Path:
    """Return the path of a checkpoint from a path, or a bare name such as `oc20_small`.

    Raises:
        InputError: there is neither a file nor a shipped model of this bare name.
    """
    return _find(name, "models", ".pt", "checkpoint")


def shipped_names(kind: str) -> list[str]:
    """Return the bare names of what is shipped.

    Args:
        kind: `"configs"` or `"models"`.
    """
    suffix = {"configs": ".yaml", "models": ".pt"}[kind]
    folder = _folder(kind)
    files = sorted(folder.rglob(f"*{suffix}"))
    return [path.relative_to(folder).with_suffix("").as_posix() for path in files]


def _folder(kind: str) -> Path:
    folder = _HERE / kind
    return folder if folder.is_dir() else _HERE.parents[1] / kind


def _find(name: str | os.PathLike[str], kind: str, suffix: str, noun: str) -> Path:
    path = Path(name)
    if path.suffix or path.is_absolute() or path.is_file() or str(path).startswith("."):
        return path
    names = shipped_names(kind)
    if path.as_posix() in names:
        return (_folder(kind) / path).with_suffix(suffix)
    if path.exists() or len(path.parts) > 1:
        return path  # for its reader to refuse
    raise InputError(
        f"there is no {noun} {path}: neither a file, nor a shipped {noun}, which are {', '.join(names)}"
    )
