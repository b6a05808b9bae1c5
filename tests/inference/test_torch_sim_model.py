"""The adapter for torch-sim, as far as it can be tried without it: refusals, and the state's conversion."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from inference_helpers import SYSTEMS, slab

from equiformer2.errors import InputError
from equiformer2.inference import Predictor, torch_sim_model
from equiformer2.inference.torch_sim_model import check_torch_sim, predict_state


def install(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """Let this version of torch-sim seem to be installed."""
    monkeypatch.setattr(torch_sim_model, "version", lambda name: found)


@pytest.mark.parametrize("found", ["0.3.0", "0.5.2", "0.5.9.dev3+g1234"])
def test_older_versions_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, found)
    with pytest.raises(InputError, match=f"torch-sim {found.partition('+')[0]}.* is too old, since it moves"):
        torch_sim_model.torch_sim_model("oc20_small")


@pytest.mark.parametrize("found", ["0.6.0", "0.10.1", "1.0", "0.6.1.dev0"])
def test_newer_versions_are_taken(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, found)
    check_torch_sim()


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sim_model, "PACKAGE", "no-such-package-as-this")
    with pytest.raises(InputError, match="torch-sim is not installed: pip install"):
        check_torch_sim()


def test_a_state_has_the_answers_of_its_structures(checkpoint: Path) -> None:
    predictor = Predictor(checkpoint)
    made = [slab(*system) for system in SYSTEMS[:2]]
    made[1] = made[1][2:]
    cells = torch.stack([torch.as_tensor(atoms.cell.array) for atoms in made])
    state = SimpleNamespace(
        positions=torch.cat([torch.as_tensor(atoms.positions) for atoms in made]),
        row_vector_cell=cells,
        pbc=torch.tensor([True, True, True]),
        atomic_numbers=torch.cat([torch.as_tensor(atoms.numbers) for atoms in made]),
        system_idx=torch.tensor([0] * len(made[0]) + [1] * len(made[1])),
    )
    out = predict_state(predictor, state, torch.float64)
    expected = predictor.predict(made)
    assert out["energy"].dtype == out["forces"].dtype == torch.float64
    torch.testing.assert_close(out["energy"], expected["energy"], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(out["forces"], expected["forces"].double(), atol=1e-5, rtol=0.0)
