"""fairchem-core's EquiformerV2 for the worker. Runs in the reference's own environment."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.geometry import wrap_positions
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from torch_geometric.data import Batch, Data

NAME = "fairchem-core"
#: Structures per batch of its relaxations unless another number is asked for.
BATCH_SIZE = 8


def build(config: dict[str, Any], parameters: dict[str, torch.Tensor] | None) -> EquiformerV2:
    """The network of one of `sizes.SIZES`, with its own random initialisation unless parameters are given."""
    logging.disable(logging.WARNING)
    model = EquiformerV2(**config)
    if parameters is not None:
        load_parameters(model, parameters)
    return model


def load_parameters(model: EquiformerV2, parameters: dict[str, torch.Tensor]) -> None:
    """Load parameters by name; the buffers, which are constants, stay.

    Raises:
        ValueError: a parameter is missing, or there is none of that name.
    """
    missing, unexpected = model.load_state_dict(parameters, strict=False)
    absent = set(missing) - {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if unexpected or absent:
        raise ValueError(f"parameters do not fit: unexpected {unexpected}, absent {sorted(absent)}")


def select_backend(model: EquiformerV2, backend: str) -> None:
    """There is one way to run it."""


def set_inference_mode(model: EquiformerV2, as_shipped: bool, precision: str = "float32") -> None:
    """Its forward re-enables gradients inside `no_grad`, unless `direct_forces` says that it needs none."""
    model.direct_forces = 0 if as_shipped else 1


def edges(model: EquiformerV2, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`edge_index [2, E]` (source, target) and `vectors [E, 3]` (Å) of the graph that the forward uses."""
    graph = model.generate_graph(batch, enforce_max_neighbors_strictly=model.enforce_max_neighbors_strictly)
    return graph.edge_index, graph.edge_distance_vec


class ReferenceCalculator(Calculator):
    """The least that ASE needs around the network, which builds its own graph.

    fairchem's OCPCalculator starts a trainer from a checkpoint file and cannot take a network in memory;
    what it does on top of this in every step is left out, in the reference's favour.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 - an instance attribute by ASE's typing

    def __init__(self, model: EquiformerV2, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Energy and forces in the network's units."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        assert self.atoms is not None
        positions = wrap_positions(self.atoms.positions, self.atoms.cell, self.atoms.pbc, eps=0)
        data = Data(
            pos=torch.as_tensor(positions, dtype=torch.float32),
            cell=torch.as_tensor(self.atoms.cell.array, dtype=torch.float32).view(1, 3, 3),
            pbc=torch.as_tensor(self.atoms.pbc).view(1, 3),
            atomic_numbers=torch.as_tensor(self.atoms.numbers, dtype=torch.long),
            natoms=len(self.atoms),
        )
        self.model.eval()
        set_inference_mode(self.model, as_shipped=False)
        with torch.no_grad():
            out = self.model(Batch.from_data_list([data]).to(self.device))
        self.results = {
            "energy": float(out["energy"].item()),
            "forces": out["forces"].detach().double().cpu().numpy(),
        }


def calculator(model: EquiformerV2, precision: str, backend: str, device: str) -> Calculator:
    """An ASE calculator around the network."""
    return ReferenceCalculator(model, device)


class _Trainer:
    """The least of a trainer that fairchem's loop needs: it starts from a checkpoint file otherwise."""

    def __init__(self, model: EquiformerV2, device: str) -> None:
        self.model, self.device, self.calls = model, torch.device(device), 0

    def predict(self, batch: Batch, per_image: bool = False, disable_tqdm: bool = True) -> dict[str, Any]:
        """Energies and forces in the network's units; counts structures."""
        self.calls += len(batch.natoms)
        with torch.no_grad():
            out = self.model(batch)
        return {"energy": out["energy"].detach(), "forces": out["forces"].detach()}


def relaxer(model: EquiformerV2, device: str) -> Callable[..., dict[str, Any]]:
    """Function that relaxes structures, see `Worker.relax_systems`."""
    from fairchem.core.common.relaxation.ml_relaxation import ml_relax
    from fairchem.core.common.relaxation.optimizable import OptimizableBatch

    from benchmarks.worker import relax_one_by_one

    # Newer versions of ASE ask for methods that its own optimisers call; fairchem's does not.
    OptimizableBatch.__abstractmethods__ = frozenset()
    model.eval()
    set_inference_mode(model, as_shipped=False)
    trainer = _Trainer(model, device)

    def relax(
        atoms: list[Atoms], method: str, settings: dict[str, Any], batch_size: int | None
    ) -> dict[str, Any]:
        if method == "ase":
            return relax_one_by_one(atoms, ReferenceCalculator(model, device), settings)
        size = batch_size or BATCH_SIZE
        chosen = {"maxstep": settings["max_step"], "memory": settings["memory"]}
        chosen |= {"damping": settings["damping"], "alpha": settings["alpha"]}
        energies: list[float] = []
        converged, before = 0, trainer.calls
        for first in range(0, len(atoms), size):
            data = [_to_data(one, str(number)) for number, one in enumerate(atoms[first : first + size])]
            batch = ml_relax(
                Batch.from_data_list(data),
                trainer,
                steps=settings["steps"],
                fmax=settings["fmax"],
                relax_opt=dict(chosen),
                save_full_traj=False,
            )
            energies += [float(energy) for energy in batch.energy.reshape(-1)]
            forces = torch.where(batch.fixed.bool()[:, None], 0.0, batch.forces).norm(dim=1)
            largest = forces.new_zeros(len(data)).scatter_reduce_(
                0,
                torch.repeat_interleave(torch.arange(len(data), device=forces.device), batch.natoms),
                forces,
                "amax",
            )
            converged += int((largest < settings["fmax"]).sum())
        # Structures that have converged are computed on with their batch.
        return {"evaluations": trainer.calls - before, "converged": converged, "energies_eV": energies}

    return relax


def _to_data(atoms: Atoms, name: str) -> Data:
    """A structure for fairchem's loop."""
    fixed = torch.zeros(len(atoms), dtype=torch.long)
    for constraint in atoms.constraints:
        fixed[torch.as_tensor(constraint.index)] = 1
    return Data(
        pos=torch.as_tensor(atoms.positions, dtype=torch.float32),
        cell=torch.as_tensor(atoms.cell.array, dtype=torch.float32).view(1, 3, 3),
        pbc=torch.as_tensor(atoms.pbc).view(1, 3),
        atomic_numbers=torch.as_tensor(atoms.numbers, dtype=torch.long),
        natoms=len(atoms),
        tags=torch.as_tensor(atoms.get_tags(), dtype=torch.long),
        fixed=fixed,
        sid=name,
    )
