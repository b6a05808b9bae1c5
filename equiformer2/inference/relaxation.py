"""Relaxation of one structure with ASE's optimisers."""

import errno
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import Trajectory
from ase.optimize import BFGS, FIRE, LBFGS
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint.training_data import validation_errors
from equiformer2.errors import InputError
from equiformer2.inference.atoms import check_atoms, fixed_mask
from equiformer2.inference.calculator import EquiformerV2Calculator
from equiformer2.inference.committee import Model, largest_spread, spread_sentence
from equiformer2.inference.extras import plain
from equiformer2.inference.named_calculators import calculator_errors

logger = logging.getLogger(__name__)

DRAFT_TRAJECTORY = "draft.traj"
WRITER = {"writer": "equiformer2"}
"""Description in the header of our trajectories, by which an unfinished run is known."""
OPTIMIZERS = {"LBFGS": LBFGS, "FIRE": FIRE, "BFGS": BFGS}


@dataclass(frozen=True)
class RelaxationResult:
    """Outcome of `relax`.

    Attributes:
        atoms: last structure, with the calculator's energy and forces attached. Its constraints are kept, so
            `atoms.get_potential_energy()` adds the energy of a restraint (`Hookean`, …), once; with
            `apply_constraint=False` it is `energy`.
        converged: whether the largest force on a free atom is below `fmax`.
        steps: optimiser steps taken.
        energies: `[steps + 1]` eV, from the start structure to the last; None where it was not evaluated.
            They are the calculator's, without the energy of restraints.
        max_forces: `[steps + 1]` eV/Å, largest force on a free atom, restraints included.
        fmax: threshold, eV/Å.
        optimizer: name of the optimiser.
        seconds: wall time.
        energy_std: standard deviation of a committee's energies of the last structure, eV; None without one.
        force_spreads: `[steps + 1]` eV/Å, the largest standard deviation of the force on a free atom over the
            members of a committee; empty without one.
        stopped: sentence about why the relaxation was ended early; None if it was not.
    """

    atoms: Atoms
    converged: bool
    steps: int
    energies: list[float | None]
    max_forces: list[float]
    fmax: float
    optimizer: str
    seconds: float
    energy_std: float | None = None
    force_spreads: list[float] = field(default_factory=list)
    stopped: str | None = None

    @property
    def energy(self) -> float:
        """Energy of the last structure, eV; its kind is the calculator's."""
        energy = self.energies[-1]
        assert energy is not None  # the first and the last one are always evaluated
        return energy

    @property
    def evaluations(self) -> int:
        """Calls of the model: one for the start, and one per step."""
        return self.steps + 1

    @property
    def restraint_energy(self) -> float:
        """Energy of restraints (`Hookean`, `ExternalForce`, …) at the last structure, eV; not in `energy`."""
        return restraint_energy(self.atoms)

    @property
    def max_force(self) -> float:
        """Largest force on a free atom of the last structure, eV/Å."""
        return self.max_forces[-1]

    def outcome(self) -> str:
        """Tell whether it converged, in one line."""
        outcome = "converged" if self.converged else "NOT converged"
        if self.stopped is not None:
            outcome = f"STOPPED, {self.stopped}:"
        return (
            f"{outcome} after {self.steps} {self.optimizer} steps, "
            f"largest force {self.max_force:.4f} eV/Å (threshold {self.fmax:g})"
        )

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a JSON record."""
        spread = {}
        if self.force_spreads:
            spread = {
                "energy_std_eV": self.energy_std,
                "max_force_std_eV_A": self.force_spreads[-1],
                "max_force_std_by_step_eV_A": self.force_spreads,
            }
        return {
            "formula": self.atoms.get_chemical_formula(),
            "energy_eV": self.energy,
            "initial_energy_eV": self.energies[0],
            "restraint_energy_eV": self.restraint_energy,
            "max_force_eV_A": self.max_force,
            "converged": self.converged,
            "steps": self.steps,
            "model_evaluations": self.evaluations,
            "optimizer": self.optimizer,
            "fmax_eV_A": self.fmax,
            "seconds": round(self.seconds, 3),
            "stopped": self.stopped,
            **spread,
        }


def relax(
    atoms: Atoms,
    calculator: BaseCalculator | Model | Sequence[Model],
    *,
    optimizer: str = "LBFGS",
    fmax: float = 0.05,
    steps: int = 300,
    trajectory: str | Path | None = None,
    progress: bool = False,
    label: str = "relaxing",
    forces_on_fixed: bool = False,
    energy_every: int | None = None,
    stop_at_spread: float | None = None,
) -> RelaxationResult:
    """Move the free atoms of a copy of `atoms` until no force exceeds `fmax`.

    A relaxation that has taken all its steps first is no error: the result says `converged=False`, and a
    warning is logged.

    Args:
        atoms: start structure; its constraints hold, it is not changed.
        calculator: any ASE calculator with forces, or the checkpoint of an `EquiformerV2Calculator`: the path
            of its file, the name of a shipped model such as `"oc20_small"`, a loaded one, or a list of these,
            a committee, whose spread is then in the result and in every frame's `info` (`energy_std_eV`,
            `max_force_std_eV_A`).
        optimizer: "LBFGS", "FIRE" or "BFGS".
        fmax: convergence threshold for the largest force on a free atom, eV/Å.
        steps: most optimiser steps; 0 evaluates the start structure only.
        trajectory: `.traj` file, one frame per step (its folder is made). It is complete after every frame:
            a run that is killed leaves the frames it has done.
        progress: show step, energy and largest force on stderr.
        label: what the progress display calls this relaxation.
        forces_on_fixed: have an `EquiformerV2Calculator` compute forces on atoms held by `FixAtoms`, which no
            relaxation reads. Without it they are zero in the result and in `trajectory`.
        energy_every: evaluate the energy of every n-th frame, and of the first and the last. An
            `EquiformerV2Calculator` then computes less for the others; their frames hold no energy. None is
            every frame; where energies take a pass of their own (`Predictor.energies_apart`), the first and
            the last.
        stop_at_spread: end once the standard deviation of a free atom's force over the members of a committee
            exceeds this, eV/Å; needs a committee.

    Raises:
        InputError: wrong settings, a calculator without forces, a structure without meaning, a non-finite
            energy or force on the way (the frames before it stay in `trajectory`), or whatever another
            calculator than an `EquiformerV2Calculator` raises.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer {optimizer!r} is not known: use one of {', '.join(OPTIMIZERS)}")
    if not (math.isfinite(fmax) and fmax > 0):
        raise InputError(f"fmax is {fmax}: give a positive force in eV/Å")
    if steps < 0:
        raise InputError(f"steps is {steps}: give 0 or more")
    if energy_every is not None and energy_every < 1:
        raise InputError(f"energy_every is {energy_every}: give 1 or more")
    if stop_at_spread is not None and not (math.isfinite(stop_at_spread) and stop_at_spread > 0):
        raise InputError(f"stop_at_spread is {stop_at_spread}: give a positive force in eV/Å")
    if trajectory is not None and Path(trajectory).suffix != ".traj":
        raise InputError(f"the trajectory {trajectory} must be an ASE .traj file")
    if not isinstance(calculator, BaseCalculator):
        calculator = EquiformerV2Calculator(calculator)
    if "forces" not in calculator.implemented_properties:
        raise InputError(
            "this model predicts no forces, so it cannot relax a structure: "
            "use a checkpoint trained with forces (model.forces)"
        )
    check_atoms(atoms)
    apart = False
    if isinstance(calculator, EquiformerV2Calculator):
        _warn_of_error(calculator, fmax)
        apart = calculator.predictor.energies_apart
    energy_every = energy_every or (steps + 1 if apart else 1)
    atoms = atoms.copy()
    atoms.calc = calculator
    energies: list[float | None] = []
    max_forces: list[float] = []
    start = time.monotonic()
    with ExitStack() as stack:
        if isinstance(calculator, EquiformerV2Calculator):
            stack.enter_context(
                calculator.reading(forces_on_fixed=forces_on_fixed, energy_every=energy_every)
            )
        else:
            stack.enter_context(calculator_errors(calculator, label))
        # Wrong input ends here, before anything is written.
        _finite_energy(atoms, step=0)
        _finite_max_force(atoms, step=0)
        if stop_at_spread is not None and "forces_std" not in getattr(calculator, "results", {}):
            raise InputError("stop_at_spread needs a committee: give a list of checkpoints")
        free, spreads, stopped = ~fixed_mask(atoms), [], None
        writer = None
        if trajectory is not None:
            Path(trajectory).parent.mkdir(parents=True, exist_ok=True)
            writer = stack.enter_context(_TrajectoryFile(trajectory))
        show = stack.enter_context(_ProgressLine(label)) if progress else None
        dynamics = stack.enter_context(OPTIMIZERS[optimizer](atoms, logfile=None))
        dynamics.log = lambda gradient: None  # ASE's asks for the energy of every step, to write it nowhere
        converged = False
        for converged in dynamics.irun(fmax=fmax, steps=steps):
            max_force = _finite_max_force(atoms, step=len(energies))
            energy = None
            if len(energies) % energy_every == 0 or converged or len(energies) == steps:
                energy = _finite_energy(atoms, step=len(energies))
            energies.append(energy)
            max_forces.append(max_force)
            notes = _spread(calculator, free)
            spreads += [notes["max_force_std_eV_A"]] if notes else []
            if writer is not None:
                writer.write(atoms, notes)
            if show is not None:
                show.update(len(energies) - 1, steps, energy, max_force)
            if stop_at_spread is not None and not converged and spreads[-1] > stop_at_spread:
                stopped = spread_sentence(spreads[-1], stop_at_spread)
                break
        energies[-1] = _finite_energy(atoms, step=len(energies) - 1)
        energy_std = getattr(calculator, "results", {}).get("energy_std")
        forces = atoms.get_forces(apply_constraint=False)
    atoms.calc = SinglePointCalculator(atoms, energy=energies[-1], forces=forces)
    result = RelaxationResult(
        atoms=atoms,
        converged=bool(converged),
        steps=len(energies) - 1,
        energies=energies,
        max_forces=max_forces,
        fmax=fmax,
        optimizer=optimizer,
        seconds=time.monotonic() - start,
        energy_std=energy_std,
        force_spreads=spreads,
        stopped=stopped,
    )
    if not result.converged:
        logger.warning(f"{label}: {result.outcome()}; the energy is not that of a relaxed structure")
    return result


def relax_with_draft(
    atoms: Atoms,
    calculator: BaseCalculator | Model | Sequence[Model],
    draft: BaseCalculator | Model | None,
    folder: AnyPath,
    *,
    stop_at_spread: float | None = None,
    energy_every: int | None = None,
    **settings: Any,
) -> tuple[RelaxationResult, RelaxationResult | None]:
    """Relax with a cheap model first, and finish with the full one, whose minimum is the answer.

    Args:
        atoms: start structure; it is not changed.
        calculator: the full model, as for `relax`.
        draft: the cheap one, likewise; None for none. If it fails, it is left out, with a warning.
        folder: for `relaxation.traj` of the full model and `draft.traj`.
        stop_at_spread, energy_every: of `relax`, for the full model.
        settings: further arguments of `relax`, for both.

    Returns:
        Relaxation of the full model, and that of the draft; None without one.

    Raises:
        InputError: as `relax`, about the full model.
    """
    start, drafted = atoms, None
    if draft is not None:
        try:
            drafted = relax(
                atoms, draft, trajectory=Path(folder) / DRAFT_TRAJECTORY, label="draft", **settings
            )
            start = drafted.atoms
        except InputError as error:
            logger.warning(f"the draft failed ({error}): the full model starts from the given structure")
    result = relax(
        start,
        calculator,
        trajectory=Path(folder) / "relaxation.traj",
        stop_at_spread=stop_at_spread,
        energy_every=energy_every,
        **settings,
    )
    return result, drafted


def _warn_of_error(calculator: EquiformerV2Calculator, fmax: float) -> None:
    """Log that the network knows forces less well than `fmax`, where its checkpoint says so."""
    error = validation_errors(calculator.predictor.checkpoint.provenance).get("forces_mae_eV_A", 0.0)
    if error > fmax:
        logger.warning(
            f"the checkpoint's force error on its validation data is {error:.2f} eV/Å per component, above "
            f"fmax {fmax:g}: smaller forces than that, and where they vanish, are not known from it"
        )


def _spread(calculator: BaseCalculator, free: np.ndarray) -> dict[str, float]:
    """Spread of a committee at the present structure; empty for another calculator.

    Args:
        calculator: with the results of the present structure.
        free: `[N]` bool.
    """
    results = getattr(calculator, "results", {})
    if "forces_std" not in results:
        return {}
    notes = {"max_force_std_eV_A": largest_spread(results["forces_std"], free)}
    if "energy_std" in results:
        notes["energy_std_eV"] = results["energy_std"]
    return notes


def restraint_energy(atoms: Atoms) -> float:
    """Sum of the energies that constraints add to the calculator's, eV (`Hookean`, `ExternalForce`, …)."""
    return float(
        sum(
            constraint.adjust_potential_energy(atoms)
            for constraint in atoms.constraints
            if hasattr(constraint, "adjust_potential_energy")
        )
    )


class _TrajectoryFile:
    """A `.traj` file that keeps its earlier frames where a write fails, and is named in the error.

    ASE's own writer would finish the frame that failed when it is closed: half of it would count as a frame,
    or a second error without the file's name would replace the first.

    Args:
        path: file to write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.frames: Any = Trajectory(self.path, "w")
        self.frames.set_description(WRITER)

    def __enter__(self) -> "_TrajectoryFile":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.frames.backend.fd.closed:
            self.frames.close()

    def write(self, atoms: Atoms, notes: Mapping[str, float]) -> None:
        """Append `atoms` with the calculator's results, and `notes` in its `info`.

        Raises:
            OSError: the disk is full or the file cannot be written; nothing more is written to it.
        """
        # ASE's trajectories hold plain values only.
        own, atoms.info = atoms.info, {**plain(atoms.info), **notes}
        try:
            self.frames.write(atoms)
        except OSError as error:
            with suppress(OSError):  # closing tries to write what is buffered
                self.frames.backend.fd.close()
            # NumPy's errors of short writes have a text and no number.
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), self.path) from error
        finally:
            atoms.info = own


def _finite_energy(atoms: Atoms, step: int) -> float:
    # The result is the model's energy; a restraint (`Hookean`, …) acts through the forces alone.
    energy = float(atoms.get_potential_energy(apply_constraint=False))
    if not math.isfinite(energy):
        raise InputError(
            f"the model gives a non-finite energy at step {step}: "
            "check the start structure and the checkpoint"
        )
    return energy


def _finite_max_force(atoms: Atoms, step: int) -> float:
    raw = atoms.get_forces(apply_constraint=False)
    bad = np.flatnonzero(~np.isfinite(raw).all(axis=1))
    if len(bad):
        symbol = atoms.get_chemical_symbols()[bad[0]]
        raise InputError(
            f"the model gives a non-finite force on atom {bad[0]} ({symbol}) at step {step}: "
            "check the start structure and the checkpoint"
        )
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


class _ProgressLine:
    """One line on stderr that follows the relaxation (silent when stderr is no terminal)."""

    def __init__(self, label: str) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._label = label
        self._task = self._progress.add_task(label)

    def __enter__(self) -> "_ProgressLine":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, steps: int, energy: float | None, max_force: float) -> None:
        known = "" if energy is None else f"{energy:.4f} eV, "
        self._progress.update(
            self._task,
            description=(f"{self._label}: step {step}/{steps}, {known}largest force {max_force:.4f} eV/Å"),
        )
