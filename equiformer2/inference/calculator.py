"""ASE calculator."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms
from ase.stress import full_3x3_to_voigt_6_stress
from torch_geometric.data import Data

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Checkpoint
from equiformer2.checkpoint.adapter_files import Adapter
from equiformer2.devices import own_defaults
from equiformer2.errors import InputError
from equiformer2.inference.atoms import atoms_to_data, fixed_mask
from equiformer2.inference.committee import Committee, Model, open_model
from equiformer2.inference.predictor import Predictor, Router, answering_old_names
from equiformer2.inference.symmetric_sites import find_symmetric_sites

logger = logging.getLogger(__name__)


class EquiformerV2Calculator(Calculator):
    """ASE calculator of a trained EquiformerV2.

    What `energy` means depends on the checkpoint and is told by `energy_kind`:

    * `"adsorption"`: OC20's referenced energy of slab + adsorbate, E(slab + adsorbate) - E(clean slab)
      - E(gas references). It *is* the adsorption energy; nothing must be subtracted from it.
    * `"total"`: the DFT total energy of the cell.

    Results: `energy` and `free_energy` (the same number, eV), `forces` (eV/Å, `[N, 3]`, only if the network
    predicts them), `stress` (eV/Å^3, ASE's order and sign, only if the network has it and the structure is
    periodic in all three directions). Forces are a direct output, not the gradient of the energy, good for
    relaxations and not for energy-conserving dynamics, unless the network was trained with
    `ModelConfig.forces: gradient`.

    At sites of high symmetry, as in perfect crystals, forces and energies are less certain (docs/model.md,
    "Perfect crystals"): the first call for a composition logs a warning where that matters.

    Results are kept until positions, numbers, cell or pbc change. Tags and constraints do not enter the
    network; those of the atoms are left as they are (see `equiformer2.inference.atoms.oc20_tags`).

    With a list of checkpoints, a committee, energy and forces are the means of its members, and there are two
    more results: `energy_std` (eV) and `forces_std` (eV/Å, `[N, 3]`, by component), the standard deviations
    over the members (`inference.committee`). They are read from `calc.results`.

    Structures that hold what the training data lack are named in a warning, once each, as far as the
    checkpoint tells what these were (`inference.familiarity`).

    Args:
        checkpoint: a path (native, OCP or fairchem v1 file), the name of a shipped model such as
            `"oc20_small"`, a loaded `Checkpoint` or `Predictor`, or a list of these, which is a committee.
            Many calculators of one `Predictor` share its network; its settings are the calculators', and
            others are refused.
        device: `"cpu"`, `"cuda"`, ….
        weights: `"raw"`, `"averaged"` or `None` (averaged where the file has them).
        energy_kind: only needed for a foreign file that does not say; must not contradict the checkpoint.
        precision, backend, cuda_graphs: see `Predictor`.
        adapter: path of an adapter file of the network, or a loaded `Adapter` (see `Predictor`).
            `calc.predictor.use_adapter` exchanges it without reloading the network.
        forces_on_fixed: compute the forces on atoms that `FixAtoms` holds, too. Otherwise they are zero, as
            `atoms.get_forces()` gives them anyway; with `apply_constraint=False` the difference can be seen.
            Where a structure has constraints of another kind, which may read these forces, they are computed.
        energy_every: evaluate the energy beside the forces in every n-th call that asks for forces only. An
            energy that is asked for is always computed for the structure at hand, in a pass of its own where
            the forces came without it.
        router: skips atoms or edges (see `equiformer2.pruning.routing`). One that chooses anew at every step
            makes forces jump: give a `FrozenPlan` of it, or one in the mode `smooth`. Tags and held atoms
            then enter the results. Forces are the router's; an energy is that of the whole network, since
            routers cost it more accuracy, and is computed where it is asked for alone (without regard to
            `energy_every`), in a pass of its own. Only a router that changes the structure, whose network was
            trained so, gives energies, too.

    Raises:
        InputError: `energy_every` is not positive; not a usable checkpoint; settings that a loaded
            `Predictor` does not have; at calculation, a structure
            without a meaningful energy (see `equiformer2.inference.atoms.atoms_to_data`).
    """

    # Instance attributes by ASE's typing, read from the class by some of its tools.
    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    @answering_old_names
    def __init__(
        self,
        checkpoint: Model | Sequence[Model],
        device: str | torch.device = "cpu",
        weights: str | None = None,
        energy_kind: str | None = None,
        precision: str = "float32",
        backend: str = "auto",
        forces_on_fixed: bool = True,
        energy_every: int = 1,
        router: Router | None = None,
        cuda_graphs: bool | None = None,
        adapter: Adapter | AnyPath | None = None,
    ) -> None:
        super().__init__()
        if energy_every < 1:
            raise InputError(f"energy_every is {energy_every}: give 1 or more")
        self.forces_on_fixed, self.energy_every = forces_on_fixed, energy_every
        self._without_energy = energy_every  # calls since the last energy; the first call has one
        self._unread: np.ndarray | None = None  # atoms that the present forces leave out
        if router is not None and isinstance(checkpoint, list | tuple) and len(checkpoint) > 1:
            raise InputError("a router belongs to one network: leave it out, or give one checkpoint")
        settings = device, weights, energy_kind, precision, backend, router, cuda_graphs
        self.predictor = open_model(checkpoint, *settings, adapter=adapter)
        if isinstance(checkpoint, Predictor):
            _check_settings(checkpoint, weights, precision, backend, router, cuda_graphs)
        if not self.predictor.has_forces:
            self.implemented_properties = ["energy", "free_energy"]
        if self.predictor.has_stress:
            self.implemented_properties = [*self.implemented_properties, "stress"]
        self._answers_of = self._checkpoints()  # what the present results were computed with
        self._notified_tags = False
        self._looked_at = b""  # atomic numbers of the structure last looked at for sites of high symmetry
        # What ASE stores beside results in trajectories and databases.
        self.parameters.update(
            energy_kind=self.energy_kind,
            weights=self.predictor.checkpoint.weights,
            precision=self.predictor.precision,
        )

    @property
    def energy_kind(self) -> str:
        """`"adsorption"` or `"total"`; see the class."""
        return self.predictor.energy_kind

    def embed(self, atoms: Atoms) -> np.ndarray:
        """Features of degree 0 of every atom, `[N, C]` float32, which no rotation changes.

        They are what the heads read, and serve as descriptors of surroundings. Of a committee they are the
        first member's.

        Args:
            atoms: the structure; it is not changed, and need not carry this calculator.

        Raises:
            InputError: a structure without meaning (see `equiformer2.inference.atoms.atoms_to_data`).
        """
        predictor = self.predictor.members[0] if isinstance(self.predictor, Committee) else self.predictor
        return np.asarray(predictor.embed(atoms).numpy())

    @contextmanager
    def reading(self, *, forces_on_fixed: bool = True, energy_every: int = 1) -> Iterator[None]:
        """Context with other `forces_on_fixed` and `energy_every`, for a caller that knows what it reads."""
        before = self.forces_on_fixed, self.energy_every
        self.forces_on_fixed, self.energy_every = forces_on_fixed, energy_every
        self._without_energy = energy_every
        try:
            yield
        finally:
            self.forces_on_fixed, self.energy_every = before
            if self._unread is not None:
                self.reset()

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """List the changes since the last calculation; constraints, too, where forces were left out."""
        changes: list[str] = super().check_state(atoms, tol)
        if any(one is not other for one, other in zip(self._answers_of, self._checkpoints(), strict=True)):
            return [*changes, "adapter"]
        if self.predictor.router is not None and self.atoms is not None and not changes:
            if not np.array_equal(atoms.get_tags(), self.atoms.get_tags()):
                return ["tags"]
            if not np.array_equal(fixed_mask(atoms), fixed_mask(self.atoms)):
                return ["constraints"]
        if not changes and self._unread is not None:
            held = self._held(atoms)
            if held is None or not np.array_equal(held, self._unread):
                return ["constraints"]
        return changes

    def _checkpoints(self) -> list[Checkpoint]:
        """Checkpoints of the network or of all members; other adapters make other ones."""
        if isinstance(self.predictor, Committee):
            return [member.checkpoint for member in self.predictor.members]
        return [self.predictor.checkpoint]

    def _warn_of_symmetry(self, data: Data) -> None:
        """Log once per composition that a perfect crystal has less certain forces."""
        numbers = data.atomic_numbers.numpy().tobytes()
        if numbers != self._looked_at:
            self._looked_at = numbers
            notice = find_symmetric_sites(data, self.predictor.checkpoint.config).notice
            if notice is not None:
                logger.warning(notice)

    def _held(self, atoms: Atoms) -> np.ndarray | None:
        """`[N]` bool: atoms whose forces are not wanted, or None if all are."""
        if self.forces_on_fixed or not all(isinstance(c, FixAtoms) for c in atoms.constraints):
            return None
        held = fixed_mask(atoms)
        return held if held.any() else None

    @own_defaults()
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill `results` for `atoms` (one pass gives energy and forces); called by ASE."""
        properties = properties or ["energy"]
        super().calculate(atoms, properties, system_changes)
        if self.atoms is None:
            raise InputError("the calculator has no atoms: pass atoms or attach it with atoms.calc")
        config = self.predictor.checkpoint.config
        if "stress" in properties and not self.atoms.pbc.all():
            raise InputError(
                "the stress is defined for structures that are periodic in all three directions: "
                f"this one has pbc {self.atoms.pbc.tolist()}"
            )
        data = atoms_to_data(
            self.atoms, max_num_elements=config.max_num_elements, notify=not self._notified_tags
        )
        self._notified_tags = True
        # Else it is the structure of the call before, moved or with another property.
        if set(system_changes) - {"positions"}:
            self.predictor.warn_of(self.atoms)
            self.predictor.warn_of_unfamiliar(data)
        self._warn_of_symmetry(data)
        held = self._held(self.atoms) if self.predictor.has_forces else None
        if self.predictor.energies_apart:
            self._calculate_routed(data, properties, held, keep=not system_changes)
            return
        # Forces that are the gradient of the energy come with it.
        asked = set(properties) != {"forces"} or config.forces == "gradient"
        with_energy = asked or self._without_energy + 1 >= self.energy_every
        out = self.predictor.predict(
            data, energy=with_energy, force_atoms=None if held is None else torch.as_tensor(~held)
        )
        self._without_energy = 0 if with_energy else self._without_energy + 1
        self._unread = held
        self._answers_of = self._checkpoints()
        self.parameters["energy_kind"] = self.energy_kind  # of the adapter in use
        results: dict[str, Any] = {}
        if with_energy:
            results["energy"] = results["free_energy"] = float(out["energy"][0])
        if "forces" in out:
            results["forces"] = out["forces"].double().numpy()
        if "energy_std" in out:
            results["energy_std"] = float(out["energy_std"][0])
        if "forces_std" in out:
            results["forces_std"] = out["forces_std"].double().numpy()
        if "stress" in out and self.atoms.pbc.all():
            results["stress"] = full_3x3_to_voigt_6_stress(out["stress"][0].double().numpy())
        self.results = results

    def _calculate_routed(
        self, data: Data, properties: Sequence[str], held: np.ndarray | None, keep: bool
    ) -> None:
        """Fill `results` with forces of the router, and with an energy of the whole network where asked for.

        Args:
            data: the structure.
            properties: what is asked for.
            held: `[N]` bool: atoms whose forces are not wanted; None if all are.
            keep: the results there are of the same structure.
        """
        results = dict(self.results) if keep else {}
        if "forces" in properties:
            free = None if held is None else torch.as_tensor(~held)
            out = self.predictor.predict(data, energy=False, force_atoms=free)
            results["forces"] = out["forces"].double().numpy()
            self._unread = held
        if set(properties) - {"forces"}:
            none = torch.zeros(len(data.pos), dtype=torch.bool) if self.predictor.has_forces else None
            assert isinstance(self.predictor, Predictor)  # a committee has no router
            out = self.predictor.predict(data, force_atoms=none, routed=False)
            results["energy"] = results["free_energy"] = float(out["energy"][0])
        self._answers_of = self._checkpoints()
        self.parameters["energy_kind"] = self.energy_kind
        self.results = results


def _check_settings(
    predictor: Predictor,
    weights: str | None,
    precision: str,
    backend: str,
    router: Router | None,
    cuda_graphs: bool | None,
) -> None:
    """Refuse settings that a loaded predictor has otherwise; default values stand for its own."""
    replays = predictor.graphed is not None
    for name, wanted, default, own in (
        ("weights", weights, None, predictor.checkpoint.weights),
        ("precision", precision, "float32", predictor.precision),
        ("backend", backend, "auto", predictor.model.backend),
        ("router", router, None, predictor.router),
        ("cuda_graphs", cuda_graphs, None, replays),
    ):
        if wanted != default and wanted != own:
            raise InputError(
                f"{name} is given with a loaded Predictor, which has another: give it to the Predictor"
            )
