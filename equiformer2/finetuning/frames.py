"""Frames to fine-tune on: what they hold, what is wrong with them, and parts of them as files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from torch_geometric.data import Data
from tqdm import tqdm

from datasets_oc20 import LmdbWriter, OC20Lmdb
from datasets_oc20.division import group_names
from datasets_oc20.frame_selection import spread_frames
from datasets_oc20.own_data.frame_facts import is_alone
from datasets_oc20.own_data.opening import open_dataset
from datasets_oc20.schema import REQUIRED
from datasets_oc20.target_sums import NUM_ELEMENTS
from datasets_oc20.targets import TargetSample
from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError

# Energies of DFT totals are several eV per atom, adsorption energies below 10 eV and 0.5 eV per atom
# (datasets_oc20.targets); both in one set leave a gap of this factor between neighbours in size.
_LARGE_PER_ATOM, _SMALL_PER_ATOM, _LARGE, _SMALL, _GAP = 1.0, 0.5, 15.0, 10.0, 3.0
_LARGEST_ADSORPTION, _BETWEEN = 10.0, 0.5


@dataclass(frozen=True)
class Frames:
    """Frames of a dataset and what they hold.

    Attributes:
        dataset: to read them from.
        energy_kind: `adsorption` or `total`.
        kind_from: reason for the kind, for people.
        systems: `[n]` name of every frame's system.
        frame_numbers: `[n]` number of every frame in its relaxation.
        composition: `[n, 100]` atoms per element (column = atomic number).
        energy: `[n]` eV.
        forces_rms: `[n]` root mean square of the force components of free atoms, eV/Å, NaN without such.
        has_forces: True where the frames have forces.
        isolated: `[n]` bool: frames that are one atom without neighbours.
    """

    dataset: OC20Lmdb
    energy_kind: str
    kind_from: str
    systems: list[str]
    frame_numbers: np.ndarray
    composition: np.ndarray
    energy: np.ndarray
    forces_rms: np.ndarray
    has_forces: bool
    isolated: np.ndarray

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.energy)

    @property
    def natoms(self) -> np.ndarray:
        """Atoms of every frame, `[n]`."""
        return self.composition.sum(axis=1)

    def elements(self, rows: np.ndarray | None = None) -> list[int]:
        """Atomic numbers in the frames `rows`, all unless given, sorted."""
        composition = self.composition if rows is None else self.composition[rows]
        return np.flatnonzero(composition.any(axis=0)).tolist()

    def targets(self, rows: np.ndarray) -> TargetSample:
        """Return the targets of the frames `rows`, for fits of references and normalizers."""
        squares = self.forces_rms[rows] ** 2
        rms = float(np.sqrt(np.nanmean(squares))) if np.isfinite(squares).any() else None
        return TargetSample(self.composition[rows].astype(float), self.energy[rows], rms)

    def describe(self) -> str:
        """Describe the frames in one sentence."""
        atoms = self.natoms
        sizes = f"{atoms.min()} to {atoms.max()}" if atoms.min() < atoms.max() else f"{atoms.min()}"
        symbols = " ".join(chemical_symbols[number] for number in self.elements())
        forces = "energies and forces" if self.has_forces else "energies without forces"
        rows = "frame" if len(self) == 1 else "frames"
        number = len(set(self.systems))
        return (
            f"{len(self)} {rows} of {number} system{'s' * (number > 1)}, {sizes} atoms ({symbols}), "
            f"{forces}, {self.energy_kind} energies ({self.kind_from})"
        )


def open_frames(paths: Sequence[str | Path], energy_kind: str | None = None) -> OC20Lmdb:
    """Open files of frames: the one place where this package opens data.

    Args:
        paths: LMDB files, any files that ASE reads, or folders of them.
        energy_kind: for files that do not declare it.

    Raises:
        datasets_oc20.DataError: a file is missing, or none of its frames can be used.
    """
    return open_dataset([str(path) for path in paths], energy_kind)


def read_frames(dataset: OC20Lmdb, largest_element: int, energy_kind: str | None = None) -> Frames:
    """Read all frames once and check that they can be learned together.

    Args:
        dataset: of `open_frames`.
        largest_element: largest atomic number that the network has an embedding for.
        energy_kind: for data that do not declare it.

    Raises:
        InputError: an element beyond the network's range, frames without energy, forces in some of the frames
            only, energies of two kinds, or of a kind that is neither declared nor certain.
        datasets_oc20.DataError: a frame that cannot be read, or a label that is not finite.
    """
    sids, numbers, fids = [], [], []
    energy, rms = np.zeros(len(dataset)), np.full(len(dataset), np.nan)
    isolated = np.zeros(len(dataset), dtype=bool)
    composition = np.zeros((len(dataset), NUM_ELEMENTS), dtype=np.int32)
    has_forces: bool | None = None
    for row in tqdm(range(len(dataset)), desc="reading frames", unit="frames", disable=None, leave=False):
        data = dataset[row]
        _check_frame(data, dataset.describe(row), largest_element)
        if has_forces is None:
            has_forces = "forces" in data
        elif has_forces != ("forces" in data):
            raise InputError(
                f"{dataset.describe(row)} has {'no ' if has_forces else ''}forces and the frames before it "
                f"have {'them' if has_forces else 'none'}: keep frames with and without forces in separate "
                "files, and fine-tune on those with forces"
            )
        number = data.atomic_numbers.numpy()
        numbers.append(number)
        sids.append(str(data.sid))
        fids.append(int(data.fid))
        composition[row] = np.bincount(number, minlength=NUM_ELEMENTS)
        energy[row] = float(data.energy)
        if has_forces and not bool(data.fixed.all()):
            rms[row] = float(data.forces[~data.fixed].double().square().mean().sqrt())
        isolated[row] = len(number) == 1 and is_alone(data.cell[0].numpy(), data.pbc[0].numpy())
    kind, origin = _energy_kind(dataset, energy_kind, energy, composition, isolated)
    _check_one_kind(dataset, kind, energy, composition, isolated)
    return Frames(
        dataset,
        kind,
        origin,
        group_names(sids, numbers),
        np.array(fids),
        composition,
        energy,
        rms,
        bool(has_forces),
        isolated,
    )


def _check_frame(data: Data, where: str, largest_element: int) -> None:
    if "energy" not in data:
        raise InputError(f"{where} has no energy to learn: remove the frame, or calculate its energy")
    largest = int(data.atomic_numbers.max())
    if largest > largest_element or largest >= NUM_ELEMENTS:
        limit = min(largest_element, NUM_ELEMENTS - 1)
        raise InputError(
            f"{where} holds {chemical_symbols[largest]} (Z = {largest}), and the checkpoint knows elements "
            f"up to Z = {limit}: remove the frame, or use a checkpoint with this element"
        )


def _energy_kind(
    dataset: OC20Lmdb, given: str | None, energy: np.ndarray, composition: np.ndarray, isolated: np.ndarray
) -> tuple[str, str]:
    """Return the kind of the energies and the reason for it."""
    if given is not None and dataset.energy_kind in (None, given):
        return given, "as given"
    if dataset.energy_kind is not None:
        return dataset.energy_kind, "as the data declare"
    size = np.abs(energy[~isolated])
    per_atom = size / composition[~isolated].sum(axis=1)
    if len(size) and size.mean() > _LARGEST_ADSORPTION and per_atom.mean() > _BETWEEN:
        return "total", f"not declared; {per_atom.mean():.3g} eV per atom are no adsorption energies"
    raise InputError(
        f"{dataset.path} does not say whether its energies are adsorption or total energies, and their size "
        "fits both: give --energy-kind"
    )


def _check_one_kind(
    dataset: OC20Lmdb, kind: str, energy: np.ndarray, composition: np.ndarray, isolated: np.ndarray
) -> None:
    """Raise `InputError` where some energies can only be totals and others only adsorption energies."""
    rows = np.flatnonzero(~isolated)
    size = np.abs(energy[rows])
    per_atom = size / composition[rows].sum(axis=1)
    large = (per_atom > _LARGE_PER_ATOM) & (size > _LARGE)
    small = (per_atom < _SMALL_PER_ATOM) & (size < _SMALL)
    if not large.any() or not small.any() or not (large | small).all():
        if kind == "adsorption" and large.any() and not large.all():
            row = int(rows[np.flatnonzero(large)[0]])
            raise InputError(
                f"{dataset.describe(row)} has an energy of {energy[row]:.6g} eV, which is no adsorption "
                "energy "
                "as those of other frames are: keep total and adsorption energies in separate files"
            )
        return
    if per_atom[large].min() > _GAP * per_atom[small].max():
        odd = large if large.sum() <= small.sum() else small
        row, other = int(rows[np.flatnonzero(odd)[0]]), int(rows[np.flatnonzero(~odd)[0]])
        raise InputError(
            f"{dataset.describe(row)} has an energy of {energy[row]:.6g} eV and {dataset.describe(other)} "
            f"{energy[other]:.6g} eV, so total and adsorption energies are mixed ({int(odd.sum())} of "
            f"{len(rows)} frames are of the rarer kind): keep them in separate files"
        )


def write_part(frames: Frames, rows: np.ndarray, path: AnyPath, forces: bool) -> Path:
    """Write some of the frames to a file that the trainer reads, with their fields for training alone.

    Args:
        frames: all of them.
        rows: indices.
        path: the LMDB file.
        forces: keep their forces.
    """
    keys = {*REQUIRED, "energy", *(["forces"] if forces else [])}
    metadata: dict[str, Any] = {"source": frames.dataset.path}
    if frames.dataset.labels:
        metadata["labels"] = "; ".join(frames.dataset.labels)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with LmdbWriter(path, frames.energy_kind, metadata) as writer:
        for row in rows.tolist():
            data = frames.dataset[row]
            kept = {name: data[name] for name in keys if name in data}
            kept |= {"sid": frames.systems[row], "fid": int(data.fid)}
            writer.write(Data(**kept, natoms=int(data.natoms)))
    return path


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the rows, evenly spread."""
    return rows[spread_frames(len(rows), most)]
