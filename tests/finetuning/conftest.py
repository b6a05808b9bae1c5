"""EMT frames and tiny checkpoints, made once."""

from pathlib import Path

import pytest
from emt_frames import SYSTEMS, emt_frames, write_frames
from tiny_networks import write_checkpoint
from torch_geometric.data import Data

from datasets_oc20 import OC20Lmdb
from datasets_oc20.targets import fit_linear_references


@pytest.fixture(scope="session")
def frames() -> list[Data]:
    return emt_frames()


@pytest.fixture(scope="session")
def emt(frames: list[Data], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames of 6 systems, total energies."""
    return write_frames(tmp_path_factory.mktemp("emt") / "emt.lmdb", frames)


@pytest.fixture(scope="session")
def copper(frames: list[Data], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frames of copper alone, two systems."""
    chosen = [frame for frame in frames if frame.sid.startswith(SYSTEMS[0][0])]
    return write_frames(tmp_path_factory.mktemp("copper") / "copper.lmdb", chosen)


@pytest.fixture(scope="session")
def adsorption_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "adsorption.pt", "adsorption")


@pytest.fixture(scope="session")
def total_checkpoint(emt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its references are 0.1 eV per atom from those of the frames."""
    references = fit_linear_references(OC20Lmdb(emt)) + 0.1
    return write_checkpoint(tmp_path_factory.mktemp("model") / "total.pt", "total", references)
