"""A small network with random weights, saved as users would have it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.constraints import FixAtoms
from inference_helpers import SMALL

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint
from equiformer2.inference import atoms as atoms_module


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notices that are said once per process are said in every test."""
    monkeypatch.setattr(atoms_module, "_told", set())


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint(energy_kind, averaged=False, **model options)` -> path of a native file."""

    def make(energy_kind: str = "adsorption", averaged: bool = False, **options: object) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = EquiformerV2(ModelConfig(**{**SMALL, **options}))
        raw = model.state_dict()
        path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
        save_checkpoint(
            path,
            model=model,
            raw_state=raw,
            averaged_state={key: value * 1.5 if value.is_floating_point() else value
                            for key, value in raw.items()} if averaged else None,
            normalizers=Normalizers(energy=Normalizer(-0.7, 2.0), forces=Normalizer(0.0, 2.5)),
            energy_kind=energy_kind,
            provenance={"origin": "random weights"},
        )  # fmt: skip
        return path

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("adsorption")


@pytest.fixture
def oxygen_on_copper() -> Atoms:
    """O in the fcc hollow of a 2x2x3 Cu(111) slab with OC20 tags; the lower two layers are fixed."""
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8.0, periodic=True)
    add_adsorbate(atoms, "O", 1.3, "fcc")
    layers = atoms.get_tags()
    atoms.set_constraint(FixAtoms(mask=layers >= 2))
    atoms.set_tags([{0: 2, 1: 1, 2: 0, 3: 0}[layer] for layer in layers])
    return atoms
