import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from oc20_files import VAL_20

from datasets_oc20 import disk_space


@pytest.fixture
def val_20(tmp_path: Path) -> Path:
    """A copy of the genuine OC20 file, since counting atoms leaves an index beside it."""
    return Path(shutil.copy(VAL_20, tmp_path / "val_20.lmdb"))


Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free space of every disk."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: Usage(size, 0, size))

    return set_free
