"""DFT-D3 dispersion added to any model, with energies and forces of `s-dftd3` (Grimme et al. 2010 and 2011).

The package `dftd3` (LGPL-3.0-or-later, imported where it is installed: the extra `d3`) computes it, two-body
and three-body terms, for one structure at a time on a CPU.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, Calculator, all_changes
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.inference.engines import BatchLimits, Engine, Engineable, calculator_identity, open_engine
from equiformer2.inference.named_calculators import resolve_energy_kind

_HEAVIEST = 94  # plutonium; beyond what it has parameters for, the package ends the process
DAMPINGS = ("d3bj", "d3zero")
"""Damping of Becke and Johnson, and damping to zero."""


@dataclass(frozen=True)
class Dispersion:
    """D3 dispersion with the parameters of a functional.

    Attributes:
        functional: name that `s-dftd3` knows, in small letters: rpbe, pbe, ….
        damping: one of `DAMPINGS`.

    Raises:
        InputError: the package is not installed, or has no such parameters.
    """

    functional: str
    damping: str = "d3bj"
    _calculator: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            from dftd3.ase import DFTD3
        except ImportError as error:
            raise InputError(
                f"D3 dispersion needs the package dftd3 ({error}): install it (pip install dftd3)"
            ) from error
        if self.damping not in DAMPINGS:
            raise InputError(f"the damping {self.damping!r} is unknown: give one of {', '.join(DAMPINGS)}")
        object.__setattr__(self, "_calculator", DFTD3(method=self.functional, damping=self.damping))
        try:
            self.energy(Atoms("He"))
        except InputError as error:
            raise InputError(
                f"D3 has no parameters of the functional {self.functional!r} with the damping {self.damping}"
                ": give that of the labels, such as rpbe or pbe/d3zero"
            ) from error

    @classmethod
    def read(cls, text: str) -> "Dispersion":
        """Read `functional` or `functional/damping`."""
        functional, _, damping = text.strip().lower().partition("/")
        return cls(functional, damping or "d3bj")

    def energy(self, atoms: Atoms) -> float:
        """D3 energy of a structure, eV.

        Raises:
            InputError: an element without parameters.
        """
        return self.energy_and_forces(atoms)[0]

    def energy_and_forces(self, atoms: Atoms) -> tuple[float, np.ndarray]:
        """D3 energy, eV, and forces `[N, 3]`, eV/Å.

        Raises:
            InputError: as `energy`.
        """
        unknown = sorted({atom.symbol for atom in atoms if not 1 <= atom.number <= _HEAVIEST})
        if unknown:
            raise InputError(f"D3 has no parameters of {', '.join(unknown)}: leave --d3 out")
        bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        self._calculator.reset()
        try:
            self._calculator.calculate(bare, ["energy", "forces"], all_changes)
        except Exception as error:  # somebody else's code, with exceptions of its own and of ASE
            raise InputError(
                f"D3 of {atoms.get_chemical_formula()} cannot be computed ({type(error).__name__}: {error})"
            ) from error
        results = self._calculator.results
        return float(results["energy"]), np.array(results["forces"], dtype=float)

    def summary(self) -> dict[str, str]:
        """Plain values for a JSON record."""
        return {"functional": self.functional, "damping": self.damping}


class DispersionCalculator(Calculator):
    """Any ASE calculator with D3 dispersion added.

    The energy of a network of adsorption energies has the slab and the gases subtracted, and D3 of the whole
    structure has not: what this calculator gives then is good for relaxations, and is an adsorption energy
    only after D3 of the clean slab and of the gases is subtracted (`adsorption.dispersion_terms`).

    Args:
        base: calculator with forces.
        dispersion: what is added.
        energy_kind: of a base that does not say.
    """

    # An instance attribute by ASE's typing, read from the class by some of its tools.
    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012

    def __init__(self, base: BaseCalculator, dispersion: Dispersion, energy_kind: str | None = None) -> None:
        super().__init__()
        self.base, self.dispersion = base, dispersion
        self.energy_kind = resolve_energy_kind(base, energy_kind)
        self.parameters.update(d3=dispersion.summary(), base=calculator_identity(base))

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """List the changes since the last calculation, those that the base alone knows of among them."""
        changes: list[str] = super().check_state(atoms, tol)
        of_base = getattr(self.base, "check_state", None)
        return changes if changes or of_base is None else list(of_base(atoms, tol))

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Compute energy and forces of both."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        structure = self.atoms.copy()
        structure.calc = self.base
        energy, forces = self.dispersion.energy_and_forces(structure)
        forces = forces + structure.get_forces(apply_constraint=False)
        energy += float(structure.get_potential_energy(apply_constraint=False))
        own = getattr(self.base, "results", {})
        spread = {name: own[name] for name in ("energy_std", "forces_std") if name in own}
        self.results = {"energy": energy, "free_energy": energy, "forces": forces, **spread}

    def as_engine(self) -> Engine:
        """Make the engine of it, in which a network keeps its batches."""
        return DispersionEngine(open_engine(self.base), self.dispersion, self.energy_kind)


class DispersionEngine(Engine):
    """Engine of any model with D3 dispersion added, structure by structure.

    Args:
        base: engine of the model.
        dispersion: what is added.
        energy_kind: of a model that does not say.
    """

    def __init__(self, base: Engine, dispersion: Dispersion, energy_kind: str | None = None) -> None:
        self.base, self.dispersion = base, dispersion
        self.device, self.has_forces = base.device, base.has_forces
        self.energy_kind = base.energy_kind or energy_kind
        # One calculator of D3 for all structures.
        self.side_by_side = False

    def predict(self, batch: Batch, *, free_only: bool = False) -> dict[str, Tensor]:
        """Predict with the model, and add D3; see `Engine.predict`."""
        out = dict(self.base.predict(batch, free_only=free_only))
        energies, forces = [], []
        for number, one in enumerate(batch.to_data_list()):
            atoms = Atoms(
                one.atomic_numbers.cpu().numpy(),
                one.pos.detach().cpu().double().numpy(),
                cell=one.cell.reshape(3, 3).cpu().double().numpy(),
                pbc=one.pbc.reshape(3).cpu().numpy(),
            )
            try:
                energy, force = self.dispersion.energy_and_forces(atoms)
            except InputError as error:
                raise InputError(str(error), number) from error
            energies.append(energy)
            forces.append(torch.from_numpy(force))
        out["energy"] = out["energy"].double() + torch.tensor(energies).double().to(out["energy"].device)
        if "forces" in out:
            out["forces"] = out["forces"] + torch.cat(forces).to(out["forces"])
        out.pop("stress", None)
        return out

    @property
    def energies_matter(self) -> bool:  # type: ignore[override]
        """As of the model."""
        return self.base.energies_matter

    @energies_matter.setter
    def energies_matter(self, value: bool) -> None:
        self.base.energies_matter = value

    def limits(self, structure: Data) -> BatchLimits:
        """Size of an automatic batch: that of the model."""
        return self.base.limits(structure)

    def identity(self) -> dict[str, Any]:
        """Identity of the model, and the parameters of D3."""
        return {**self.base.identity(), "d3": self.dispersion.summary()}

    def data(self, atoms: Atoms, name: str) -> Data:
        """Convert a structure; see `Engine.data`."""
        return self.base.data(atoms, name)


def with_dispersion(model: Engineable, dispersion: Dispersion | None) -> Engineable:
    """Add D3 to a model; None gives the model back."""
    return model if dispersion is None else DispersionEngine(open_engine(model), dispersion)


def base_calculator(calculator: BaseCalculator) -> BaseCalculator:
    """Find the calculator below D3; one without D3 is given back."""
    return calculator.base if isinstance(calculator, DispersionCalculator) else calculator


def dispersion_of(calculator: BaseCalculator) -> Dispersion | None:
    """D3 of a calculator; None for one without."""
    return calculator.dispersion if isinstance(calculator, DispersionCalculator) else None


def recorded_dispersion(record: Any) -> Dispersion | None:
    """Make D3 from what a record says of it (`functional`, `damping`); None for a record without.

    Raises:
        InputError: as `Dispersion`.
    """
    if not isinstance(record, dict):
        return None
    return Dispersion(str(record.get("functional")), str(record.get("damping")))
