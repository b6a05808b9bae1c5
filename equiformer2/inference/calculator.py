"""ASE calculator."""

from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from equiformer2.checkpoint import Checkpoint
from equiformer2.errors import InputError
from equiformer2.inference.atoms import atoms_to_data
from equiformer2.inference.predictor import Predictor


class EquiformerV2Calculator(Calculator):
    """ASE calculator of a trained EquiformerV2.

    What `energy` means depends on the checkpoint and is told by `energy_kind`:

    * `"adsorption"`: OC20's referenced energy of slab + adsorbate, E(slab + adsorbate) - E(clean slab)
      - E(gas references). It *is* the adsorption energy; nothing must be subtracted from it.
    * `"total"`: the DFT total energy of the cell.

    Results: `energy` and `free_energy` (the same number, eV), `forces` (eV/Å, `[N, 3]`, only if the network
    predicts them). The forces are a direct output, not the gradient of the energy: good for
    relaxations, not for energy-conserving dynamics.

    Results are kept until positions, numbers, cell or pbc change. Tags and constraints do not enter the
    network; those of the atoms are left as they are (see `equiformer2.inference.atoms.oc20_tags`).

    Args:
        checkpoint: a path (native, OCP or fairchem v1 file) or a loaded `Checkpoint`.
        device: `"cpu"`, `"cuda"`, ….
        weights: `"raw"`, `"averaged"` or `None` (averaged where the file has them).
        energy_kind: only needed for a foreign file that does not say; must not contradict the checkpoint.
        precision, backend: see `Predictor`.

    Raises:
        InputError: not a usable checkpoint; at calculation, a structure without a meaningful energy
            (see `equiformer2.inference.atoms.atoms_to_data`).
    """

    # Instance attributes by ASE's typing, read from the class by some of its tools.
    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        checkpoint: Checkpoint | str | Path,
        device: str | torch.device = "cpu",
        weights: str | None = None,
        energy_kind: str | None = None,
        precision: str = "float32",
        backend: str = "torch",
    ) -> None:
        super().__init__()
        self.predictor = Predictor(checkpoint, device, weights, energy_kind, precision, backend)
        if not self.predictor.has_forces:
            self.implemented_properties = ["energy", "free_energy"]
        self._notified_tags = False
        # What ASE stores beside results in trajectories and databases.
        self.parameters.update(
            energy_kind=self.energy_kind, weights=self.predictor.checkpoint.weights, precision=precision
        )

    @property
    def energy_kind(self) -> str:
        """`"adsorption"` or `"total"`; see the class."""
        return self.predictor.energy_kind

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill `results` for `atoms` (one pass gives energy and forces); called by ASE."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        if self.atoms is None:
            raise InputError("the calculator has no atoms: pass atoms or attach it with atoms.calc")
        config = self.predictor.checkpoint.config
        data = atoms_to_data(
            self.atoms, max_num_elements=config.max_num_elements, notify=not self._notified_tags
        )
        self._notified_tags = True
        out = self.predictor.predict(data)
        energy = float(out["energy"][0])
        results: dict[str, Any] = {"energy": energy, "free_energy": energy}
        if "forces" in out:
            results["forces"] = out["forces"].double().numpy()
        self.results = results
