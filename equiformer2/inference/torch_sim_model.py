"""Adapter for torch-sim (`torch-sim-atomistic`), which runs molecular dynamics and relaxations in batches.

Written from torch-sim's published interface (`torch_sim.models.interface.ModelInterface`, 0.6) and not
tested with it: it needs Python 3.12. Its `validate_model_outputs(model, device, dtype)` is the test to run.
"""

import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.inference.committee import Committee, Model, open_model
from equiformer2.inference.predictor import Predictor

PACKAGE = "torch-sim-atomistic"
OLDEST = (0, 6)
"""Oldest version of torch-sim that is taken: earlier ones move atoms that are held."""


def torch_sim_model(
    model: Predictor | Committee | Model, *, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> Any:
    """Make a `torch_sim.models.interface.ModelInterface` of a network.

    Args:
        model: a `Predictor`, a `Committee` or a checkpoint. A `Predictor` keeps its device.
        device: of a checkpoint.
        dtype: of the energies, forces and stresses that it gives.

    Returns:
        The model, for `torch_sim.optimize`, `torch_sim.integrate` and the like.

    Raises:
        InputError: torch-sim is missing or too old, or a checkpoint that cannot be used.
    """
    check_torch_sim()
    interface: Any = importlib.import_module("torch_sim.models.interface").ModelInterface
    predictor = model if isinstance(model, Committee) else open_model(model, device)

    class EquiformerV2Model(interface):  # type: ignore[misc]
        """EquiformerV2 in torch-sim's interface."""

        def __init__(self) -> None:
            super().__init__()
            self.predictor = predictor
            self._device, self._dtype = predictor.device, dtype
            self._compute_forces, self._compute_stress = predictor.has_forces, predictor.has_stress
            self._memory_scales_with = "n_atoms"  # the number of neighbours is limited

        def forward(self, state: Any, **kwargs: Any) -> dict[str, Tensor]:
            """Energy `[B]` eV, forces `[N, 3]` eV/Å and stress `[B, 3, 3]` eV/Å^3 of a `SimState`."""
            return predict_state(predictor, state, dtype)

    return EquiformerV2Model()


def check_torch_sim() -> None:
    """Raise `InputError` unless a torch-sim is installed that keeps held atoms where they are."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError as error:
        raise InputError(
            f"torch-sim is not installed: pip install '{PACKAGE}>=0.6', which needs Python 3.12"
        ) from error
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        raise InputError(
            f"torch-sim {found} is too old, since it moves atoms that are held: install 0.6 or newer, which "
            "needs Python 3.12"
        )


def predict_state(predictor: Predictor | Committee, state: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Predict the systems of a `torch_sim.SimState`, which is not changed.

    Args:
        predictor: of a network or a committee.
        state: with `positions` `[N, 3]` Å, `row_vector_cell` `[B, 3, 3]` Å, `pbc` `[3]`, `atomic_numbers`
            `[N]` and `system_idx` `[N]`, ascending.
        dtype: of the result.

    Returns:
        `energy` `[B]` eV, `forces` `[N, 3]` eV/Å and `stress` `[B, 3, 3]` eV/Å^3 as far as the network has
        them, on the device of the state.

    Raises:
        InputError: as `Predictor.predict`.
    """
    cell, systems = state.row_vector_cell, state.system_idx.long()
    natoms = torch.bincount(systems, minlength=len(cell))
    batch = Batch(
        batch=systems,
        ptr=torch.cat([natoms.new_zeros(1), natoms.cumsum(0)]),
        pos=state.positions.detach().double(),
        atomic_numbers=state.atomic_numbers.long(),
        cell=cell.detach().double(),
        pbc=torch.as_tensor(state.pbc, device=cell.device).bool().expand(len(cell), 3),
        natoms=natoms,
    )
    out = predictor.predict(batch)
    names = [name for name in ("energy", "forces", "stress") if name in out]
    return {name: out[name].detach().to(state.positions.device, dtype) for name in names}
