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
    return _Shipped("configs", ".yaml", "configuration").find(name)


def find_checkpoint(name: str | os.PathLike[str]) -> Path:
    """Return the path of a checkpoint from a path, or a bare name such as `oc20_small`.

    Raises:
        InputError: there is neither a file nor a shipped model of this bare name.
    """
    return _Shipped("models", ".pt", "checkpoint").find(name)


class _Shipped:
    """Files of one kind that come with the package.

    Args:
        kind: name of their folder.
        suffix: ending of their names.
        noun: what messages call one.
    """

    def __init__(self, kind: str, suffix: str, noun: str) -> None:
        folder = _HERE / kind
        self.folder = folder if folder.is_dir() else _HERE.parents[1] / kind
        self.suffix, self.noun = suffix, noun

    def find(self, name: str | os.PathLike[str]) -> Path:
        """Return a path as it is, and the file of a bare name."""
        path = Path(name)
        if path.suffix or path.is_absolute() or path.is_file() or str(path).startswith("."):
            return path
        files = sorted(self.folder.rglob(f"*{self.suffix}"))
        names = [file.relative_to(self.folder).with_suffix("").as_posix() for file in files]
        if path.as_posix() in names:
            return (self.folder / path).with_suffix(self.suffix)
        if path.exists() or len(path.parts) > 1:
            return path  # for its reader to refuse
        raise InputError(
            f"there is no {self.noun} {path}: neither a file, nor a shipped {self.noun}, which are "
            f"{', '.join(names)}"
        )
