import shutil
from pathlib import Path

import pytest
from oc20_files import VAL_20


@pytest.fixture
def val_20(tmp_path: Path) -> Path:
    """A copy of the genuine OC20 file, since counting atoms leaves an index beside it."""
    return Path(shutil.copy(VAL_20, tmp_path / "val_20.lmdb"))
