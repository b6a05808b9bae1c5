"""A tiny run on genuine OC20 records, shared by the training tests."""

from pathlib import Path

import pytest
from tiny_run import LMDB, TINY_RUN


@pytest.fixture(scope="session")
def lmdb_path() -> Path:
    return LMDB


@pytest.fixture(scope="session")
def tiny_arguments() -> list[str]:
    return list(TINY_RUN)
