"""Networks, committees and ASE calculators in one form, for lists of structures and batched relaxations."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, CalculatorSetupError
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.inference.atoms import atoms_to_data, partial_constraints
from equiformer2.inference.batched import (
    RelaxationSettings,
    Relaxed,
    free_forces,
    relax_batched,
)
from equiformer2.inference.calculator import EquiformerV2Calculator
from equiformer2.inference.committee import Committee, Model, open_model
from equiformer2.inference.extras import plain
from equiformer2.inference.predictor import Predictor, Router
from equiformer2.model.branches import bf16_branches

logger = logging.getLogger(__name__)

CPU_STRUCTURES = 32
CPU_ATOMS = 4000
"""Limits of an automatic batch on a CPU, where larger ones are no faster: `batched.STRUCTURES_AT_A_TIME`
structures per thread are computed at a time, and the others wait."""
CUDA_STRUCTURES = 512
CUDA_SHARE = 0.6
"""Share of the free memory of a GPU that an automatic batch may take: the neighbours of atoms differ."""


class BatchLimits(NamedTuple):
    """Size of batches: most structures, and most atoms (None for any number)."""

    structures: int
    atoms: int | None


class Engine(ABC):
    """A model in the form that lists of structures and batched relaxations take; made by `open_engine`.

    Attributes:
        device: where the model computes.
        energy_kind: `"adsorption"` or `"total"`; None for a calculator that does not say.
        has_forces: True if the model gives forces.
        side_by_side: True if it may be called in several threads at once.
        energies_matter: False while only geometries are wanted: then nothing is said about energies that
            mean something else than the model's kind.
    """

    device: torch.device
    energy_kind: str | None
    has_forces: bool
    side_by_side: bool
    energies_matter: bool = True

    @abstractmethod
    def predict(self, batch: Batch, *, free_only: bool = False) -> dict[str, Tensor]:
        """Compute `energy` `[B]` eV, and `forces` `[N, 3]` eV/Å and what else the model gives.

        Args:
            batch: structures of `data`.
            free_only: forces on held atoms are not read, and may be given as zero.

        Raises:
            InputError: one of the structures has no energy; `error.structure` is its index.
        """

    @abstractmethod
    def limits(self, structure: Data) -> BatchLimits:
        """Size of an automatic batch of structures like this one."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values that tell this model from every other one."""

    @abstractmethod
    def data(self, atoms: Atoms, name: str) -> Data:
        """Convert a structure for `predict`; `name` is its `sid`.

        Raises:
            InputError: as `equiformer2.inference.atoms.atoms_to_data`.
        """

    def start(self, atoms: Atoms, name: str) -> Data:
        """Convert a structure for `relax`.

        Raises:
            InputError: as `data`, and a constraint that does more than hold atoms.
        """
        kinds = sorted({type(one).__name__ for one in partial_constraints(atoms)})
        if kinds:
            raise InputError(
                f"it has the constraint {', '.join(kinds)}, and relaxations in batches keep only atoms that "
                "are held in every direction: use FixAtoms, or relax it by itself with `relax`"
            )
        return self.data(atoms, name)

    def relax(
        self,
        structures: Iterable[tuple[int, Data]],
        settings: RelaxationSettings | None = None,
        *,
        batch_size: int | str = "auto",
        max_atoms: int | None = None,
    ) -> Iterator[Relaxed]:
        """Relax structures of `start`, numbered; see `relax_batched`.

        Args:
            structures: (number, structure); read as places become free.
            settings: of the relaxation.
            batch_size: most structures per batch; `"auto"` chooses it, and `max_atoms` where it is not
                given, by the first structure (`limits`).
            max_atoms: most atoms per batch; a larger structure is relaxed alone.

        Raises:
            InputError: see `relax_batched`; a `batch_size` that is neither.
        """
        if not self.has_forces:
            raise InputError(
                "this model gives no forces, so it cannot relax a structure: use a calculator with forces, "
                "or a checkpoint trained with them (model.forces)"
            )
        waiting = iter(structures)
        first = next(waiting, None)
        if first is None:
            return
        limits = self.chosen_limits(first[1], batch_size, max_atoms)

        def all_of_them() -> Iterator[tuple[int, Data]]:
            yield first
            yield from waiting

        def predict(batch: Batch) -> dict[str, Tensor]:
            return self.predict(batch, free_only=True)

        yield from relax_batched(
            predict,
            all_of_them(),
            settings,
            batch_size=limits.structures,
            max_atoms=limits.atoms,
            device=self.device,
            side_by_side=self.side_by_side,
        )

    def chosen_limits(
        self, structure: Data, batch_size: int | str = "auto", max_atoms: int | None = None
    ) -> BatchLimits:
        """Limits as asked for; `"auto"` stands for those of `limits(structure)`."""
        if batch_size == "auto":
            automatic = self.limits(structure)
            return BatchLimits(automatic.structures, automatic.atoms if max_atoms is None else max_atoms)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}: give a number of 1 or more, or 'auto'")
        return BatchLimits(batch_size, max_atoms)


Engineable: TypeAlias = Engine | BaseCalculator | Committee | Model | Sequence[Model]
"""Models that `open_engine` takes."""


def open_engine(model: Engineable) -> Engine:
    """Make an engine of a network, a committee or any ASE calculator.

    Args:
        model: a `Predictor`, a `Committee`, a checkpoint (path, name of a shipped model, loaded) or a list of
            these, a committee; or an ASE calculator. An `EquiformerV2Calculator` is taken for its network.
            Where a router leaves energies to the whole network (`Predictor.energies_apart`), the calculator
            is taken, which knows how, and may keep a plan of one structure. An engine is given back.

    Raises:
        InputError: something else, or a checkpoint that cannot be used.
    """
    if isinstance(model, Engine):
        return model
    if isinstance(model, Predictor) and model.energies_apart:
        model = EquiformerV2Calculator(model)
    if isinstance(model, EquiformerV2Calculator) and not model.predictor.energies_apart:
        return NetworkEngine(model.predictor)
    if isinstance(model, BaseCalculator):
        # A calculator that adds to a network knows how to keep its batches.
        return model.as_engine() if hasattr(model, "as_engine") else CalculatorEngine(model)
    if isinstance(model, Committee):
        return NetworkEngine(model)
    return NetworkEngine(open_model(model))


class NetworkEngine(Engine):
    """Engine of a network or a committee.

    Args:
        predictor: shared, not copied.
    """

    def __init__(self, predictor: Predictor | Committee) -> None:
        self.predictor = predictor
        self.device, self.side_by_side = predictor.device, True
        self.energy_kind, self.has_forces = predictor.energy_kind, predictor.has_forces
        self._free_forces = free_forces(predictor)

    def predict(self, batch: Batch, *, free_only: bool = False) -> dict[str, Tensor]:
        """Predict with the network; see `Engine.predict` and `Predictor.predict`."""
        return self._free_forces(batch) if free_only else self.predictor.predict(batch)

    def data(self, atoms: Atoms, name: str) -> Data:
        """Convert a structure; see `Engine.data`."""
        data = atoms_to_data(atoms, max_num_elements=self.predictor.checkpoint.config.max_num_elements)
        data.sid = name
        del data.fid  # errors name the structure by its name alone
        if self.energies_matter:
            self.predictor.warn_of(atoms)
        return data

    def limits(self, structure: Data) -> BatchLimits:
        """Size of an automatic batch.

        On a CPU a constant, `CPU_STRUCTURES` and `CPU_ATOMS`. On a GPU the structure is predicted once,
        alone, and as many atoms as take `CUDA_SHARE` of the free memory, at the memory per atom of that pass,
        are a batch. Where that was too much, `relax_batched` halves the batch.
        """
        if self.device.type != "cuda":
            return BatchLimits(CPU_STRUCTURES, CPU_ATOMS)
        natoms = len(structure.pos)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        try:
            self.predict(Batch.from_data_list([structure]))
        except torch.OutOfMemoryError:
            return BatchLimits(1, None)
        except InputError:  # it is told of when it is its turn
            return BatchLimits(CPU_STRUCTURES, CPU_ATOMS)
        taken = max(1, torch.cuda.max_memory_allocated(self.device) - before)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return BatchLimits(CUDA_STRUCTURES, max(natoms, int(CUDA_SHARE * free * natoms / taken)))

    def identity(self) -> dict[str, Any]:
        """SHA-256 of the weights of every network, and the settings that change their answers."""
        members = self.predictor.members if isinstance(self.predictor, Committee) else [self.predictor]
        sums, router = [], self.predictor.router
        for member in members:
            digest = hashlib.sha256()
            if member.adapter is not None:  # it brings normalizers of its own
                digest.update(repr(member.checkpoint.normalizers.to_dict()).encode())
            # Other networks of the same weights; that of all others is as it was in files that exist.
            if "grids_tuned" in member.provenance:
                digest.update(repr(member.checkpoint.config.grid_resolution).encode())
            if branches := bf16_branches(member.model):
                digest.update(repr(branches).encode())
            for name, tensor in sorted(member.checkpoint.model.state_dict().items()):
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
            sums.append(digest.hexdigest())
        return {
            "weights_sha256": sums if len(sums) > 1 else sums[0],
            "energy_kind": self.energy_kind,
            "precision": self.predictor.precision,
            **({} if router is None else {"router_sha256": _sum_of_router(router)}),
        }


class CalculatorEngine(Engine):
    """Engine of an ASE calculator: structures one after another, energies and forces in float64.

    What else a structure carries (magnetic moments, `info`, …) reaches the calculator. An automatic batch is
    one structure, so that a calculator that goes on from its last structure (neighbour lists, wave functions)
    meets the same one until it is relaxed.

    Args:
        calculator: gives energies, and forces for relaxations.
    """

    def __init__(self, calculator: BaseCalculator) -> None:
        self.calculator = calculator
        self.device, self.side_by_side = torch.device("cpu"), False
        self.energy_kind = getattr(calculator, "energy_kind", None)
        self.has_forces = "forces" in calculator.implemented_properties
        self.name = type(calculator).__name__
        self._calls, self._last = 0, -1
        self._templates: list[Atoms] = []  # by `template` of their data
        # Of a pass in which a later structure failed, by structure: the pass is asked for again without it.
        self._done: dict[bytes, tuple[float, Tensor | None]] = {}

    def data(self, atoms: Atoms, name: str) -> Data:
        """Convert a structure; see `Engine.data`."""
        data = atoms_to_data(atoms)
        data.sid = name
        del data.fid
        data.template = len(self._templates)
        self._templates.append(atoms.copy())
        return data

    def limits(self, structure: Data) -> BatchLimits:
        """Size of an automatic batch: one structure."""
        return BatchLimits(1, None)

    def identity(self) -> dict[str, Any]:
        """Class of the calculator and its parameters; of a network with a router also what tells these."""
        found = calculator_identity(self.calculator)
        if isinstance(self.calculator, EquiformerV2Calculator):
            found |= NetworkEngine(self.calculator.predictor).identity()
        return found

    def predict(self, batch: Batch, *, free_only: bool = False) -> dict[str, Tensor]:
        """Calculate one structure after another; see `Engine.predict`.

        Whatever the calculator raises is about the structure, unless it says at the first one that it cannot
        be run at all.
        """
        results, before = {}, self._done
        self._done = {}
        for at, structure in enumerate(batch.to_data_list()):
            key = bytes(str(int(structure.template)), "ascii") + structure.pos.numpy().tobytes()
            try:
                results[at, key] = before[key] if key in before else self._calculate(structure)
            except Exception as error:  # of any kind: a calculator is somebody else's code
                if isinstance(error, CalculatorSetupError) and self._calls == 1:
                    raise InputError(f"{self.name} cannot be run ({_text(error)})") from error
                self._done = {key: result for (_, key), result in results.items()}
                self._reset()
                reason = (
                    str(error) if isinstance(error, InputError) else f"{self.name} failed ({_text(error)})"
                )
                raise InputError(reason, at) from error
        out = {"energy": torch.tensor([energy for energy, _ in results.values()], dtype=torch.float64)}
        if self.has_forces:
            out["forces"] = torch.cat([forces for _, forces in results.values() if forces is not None])
        return out

    def _reset(self) -> None:
        if hasattr(self.calculator, "reset"):
            self.calculator.reset()

    def _calculate(self, structure: Data) -> tuple[float, Tensor | None]:
        self._calls += 1
        if not bool(torch.isfinite(structure.pos).all()):
            raise InputError("its positions are no finite numbers any more")
        if (template := int(structure.template)) != self._last:
            # ASE compares positions, not what else may make another structure (`info`).
            self._reset()
            self._last = template
        atoms = self._templates[template].copy()
        atoms.positions = structure.pos.numpy()
        atoms.calc = self.calculator
        forces = None
        if self.has_forces:
            forces = torch.as_tensor(np.array(atoms.get_forces(apply_constraint=False), dtype=np.float64))
            if forces.shape != structure.pos.shape:
                raise InputError(f"{self.name} gives forces of the shape {list(forces.shape)}")
        energy = float(atoms.get_potential_energy(apply_constraint=False))
        if not np.isfinite(energy) or (forces is not None and not bool(torch.isfinite(forces).all())):
            raise InputError(f"{self.name} gives a non-finite energy or force")
        return energy, forces


def _sum_of_router(router: Router) -> str:
    """SHA-256 of the classes and settings of a router and those inside it."""

    def described(value: Any) -> dict[str, Any]:
        settings = value.settings() if hasattr(value, "settings") else None
        return {"kind": getattr(value, "__qualname__", type(value).__qualname__), "settings": settings}

    return hashlib.sha256(json.dumps(router, default=described, sort_keys=True).encode()).hexdigest()


def calculator_identity(calculator: BaseCalculator) -> dict[str, Any]:
    """Class and parameters of an ASE calculator as plain values."""
    kind = type(calculator)
    return {
        "calculator": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": plain(dict(getattr(calculator, "parameters", None) or {})),
    }


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
