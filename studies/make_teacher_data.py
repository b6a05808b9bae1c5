"""Adsorbate slabs labelled by a universal potential: data like data/teacher_large, for whoever wants more.

    pip install sevenn fairchem-data-oc       # beside the project; they bring their own requirements
    python -m studies.make_teacher_data --out runs/data/more --systems 100
    python -m studies.make_teacher_data --out runs/data/mine --systems 100 --bulks mine.db FeNi.cif
    python -m studies.make_teacher_data --out runs/data/driven --systems 100 --checkpoint oc20_small
    equiformer2 data preprocess --data runs/data/more --out more.lmdb

Written is OC20's raw release format: `<system>.extxyz.xz` with total energies (eV) and forces (eV/Å),
`system.txt` with the reference energies and `index.jsonl` with the origin of every system.

- Bulks: prototypes whose lattice constants the potential relaxes (studies/prototypes.py), or the structures
  of files that ASE reads.
- Slabs, adsorbates and their sites: `fairchem-data-oc` (MIT), as OC20 was made: planes up to Miller index 2,
  random sites, adsorbates of OC20. Atoms below the surface (tag 0) are held.
- Frames: of a FIRE relaxation driven by the potential, or with `--checkpoint` by a network, whose frames are
  labelled afterwards: those are the structures that it meets when it relaxes by itself. Then a few more with
  the free atoms displaced at random.
- Labels: SevenNet-0 (`sevenn`, MIT; Y. Park et al., J. Chem. Theory Comput. 2024, 10.1021/acs.jctc.4c00190).
  They are not DFT. The reference energy is that of the clean slab after a short relaxation and of gas atoms,
  from H2, H2O, CO and N2 with the same potential.

A stopped command goes on where it was: finished systems stay, and a system depends only on the seed and its
number. `fairchem-data-oc` imports a module of fairchem-core for downloads that are not needed here; without
fairchem-core an empty module stands in for it.
"""

import argparse
import hashlib
import json
import lzma
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms
from ase.data import chemical_symbols
from ase.formula import Formula
from ase.optimize import FIRE
from tqdm import tqdm

from datasets_oc20.frame_selection import spread_frames
from datasets_oc20.structure_files import read_structure
from equiformer2.adsorption.open_catalyst import open_catalyst
from equiformer2.adsorption.references import gas_reference
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_bytes, write_json
from equiformer2.inference.calculator import EquiformerV2Calculator
from equiformer2.script import header, run_script
from equiformer2.shipped import find_checkpoint
from studies.prototypes import Bulk, Prototypes, UnsuitableError

SCHEMA = "teacher_data/1"
#: File in the folder with what has been tried.
STATE = "made.json"
SEVENN = "pip install sevenn==0.13.0"
#: Bulks in a row without a system after which the command gives up.
_MOST_FAILURES = 50
_MOST_SLABS = 8
#: Frames that a system must have to be kept.
_LEAST_FRAMES = 4


@dataclass(frozen=True)
class Settings:
    """Everything that a system depends on, besides its bulk and its number.

    Attributes:
        driven: `teacher`, or the hash of the checkpoint that drives the trajectories.
        steps: FIRE steps of a trajectory.
        frames: maximum number of its frames that are kept, evenly spread.
        rattled: number of frames with displaced atoms.
        displacement: smallest and largest standard deviation of a displacement, Å.
        clean_steps: FIRE steps of the clean slab.
        max_miller, max_slab_atoms, max_adsorbate_atoms: limits.
        adsorbates: number of adsorbates per slab.
        max_energy: largest |adsorption energy|, eV.
        max_force: largest force on a free atom, eV/Å.
        seed: random seed.
        bulks: files of bulks; empty for prototypes.
    """

    driven: str
    steps: int
    frames: int
    rattled: int
    displacement: tuple[float, float] = (0.04, 0.14)
    clean_steps: int = 20
    max_miller: int = 2
    max_slab_atoms: int = 60
    max_adsorbate_atoms: int = 9
    adsorbates: int = 4
    max_energy: float = 10.0
    max_force: float = 30.0
    seed: int = 0
    bulks: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """Begin of the ids of the systems; folders made with different settings share none."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        return f"made{digest.hexdigest()[:6]}"

    @property
    def by_teacher(self) -> bool:
        """True if the potential that labels also drives."""
        return self.driven == "teacher"


#: Of a trajectory that the teacher, or a network, drives.
BY_TEACHER: dict[str, Any] = {"steps": 28, "frames": 8, "rattled": 3}
BY_NETWORK: dict[str, Any] = {"steps": 20, "frames": 6, "rattled": 2}


@dataclass(frozen=True)
class Start:
    """A slab with its adsorbates.

    Attributes:
        bulk: the crystal that the slab was cut from.
        miller: indices of its plane.
        slab: the clean slab; atoms of tag 0 are held.
        adsorbed: name of the adsorbate and the slab with it, tag 2.
    """

    bulk: Bulk
    miller: tuple[int, ...]
    slab: Atoms
    adsorbed: list[tuple[str, Atoms]]


Source = Callable[[int], Start]
"""Number of a slab -> the slab and its adsorbates; raises `UnsuitableError` for a number that gives none."""


@dataclass
class Frame:
    """Positions `[N, 3]` (Å), total energy (eV) and forces `[N, 3]` (eV/Å) of the teacher."""

    positions: np.ndarray
    energy: float
    forces: np.ndarray


def hold(atoms: Atoms) -> Atoms:
    """Copy a slab, hold its atoms of tag 0, and make it periodic."""
    held = atoms.copy()
    held.set_constraint(FixAtoms(mask=held.get_tags() == 0))
    held.pbc = True
    return held


def label(atoms: Atoms, teacher: Calculator) -> Frame:
    """Compute energy and forces of the positions as they are, forces of held atoms included."""
    atoms.calc = teacher
    forces = atoms.get_forces(apply_constraint=False)
    return Frame(atoms.get_positions(), float(atoms.get_potential_energy()), forces.copy())


def relax_clean(slab: Atoms, teacher: Calculator, steps: int) -> float:
    """Energy of the clean slab after `steps` FIRE steps, eV."""
    atoms = hold(slab)
    atoms.calc = teacher
    FIRE(atoms, logfile=None).run(fmax=1e-3, steps=steps)
    return float(atoms.get_potential_energy())


def trajectory(
    atoms: Atoms,
    teacher: Calculator,
    driver: Calculator | None,
    settings: Settings,
    rng: np.random.Generator,
) -> list[Frame]:
    """Make the labelled frames of one system: those of its relaxation, then the rattled ones.

    Args:
        atoms: slab with adsorbate.
        teacher: potential that labels.
        driver: potential that drives; None for the teacher.
        settings: numbers of steps and frames.
        rng: source of the displacements.

    Raises:
        UnsuitableError: the driver ends with forces that are not finite.
    """
    moving = hold(atoms)
    moving.calc = driver or teacher
    frames: list[Frame] = []

    def keep() -> None:
        forces = moving.get_forces(apply_constraint=False)
        if not np.isfinite(forces).all():
            raise UnsuitableError("the trajectory reaches forces that are not finite")
        frames.append(Frame(moving.get_positions(), float(moving.get_potential_energy()), forces.copy()))

    optimizer = FIRE(moving, logfile=None)
    optimizer.attach(keep)
    try:
        optimizer.run(fmax=0.02, steps=settings.steps)
    except InputError as error:  # the network refuses where its driving led
        raise UnsuitableError(f"the trajectory fails: {error}") from error
    chosen = [frames[index] for index in spread_frames(len(frames), settings.frames)]
    if driver is not None:
        for number, frame in enumerate(chosen):
            moving.set_positions(frame.positions, apply_constraint=False)
            chosen[number] = label(moving, teacher)
    free = moving.get_tags() != 0
    relaxed = list(chosen)
    for _ in range(settings.rattled):
        positions = relaxed[int(rng.integers(len(relaxed)))].positions.copy()
        size = rng.uniform(*settings.displacement)
        positions[free] += rng.normal(0.0, size, (int(free.sum()), 3))
        moving.set_positions(positions, apply_constraint=False)
        chosen.append(label(moving, teacher))
    return chosen


def usable(frames: Sequence[Frame], free: np.ndarray, reference: float, settings: Settings) -> list[Frame]:
    """Frames within the limits of energy and force.

    Args:
        frames: of one system.
        free: `[N]` atoms whose forces count.
        reference: energy that is subtracted, eV.
        settings: the limits.
    """
    return [
        frame
        for frame in frames
        if abs(frame.energy - reference) <= settings.max_energy
        and np.linalg.norm(frame.forces[free], axis=1).max() <= settings.max_force
    ]


def raw_text(atoms: Atoms, frames: Sequence[Frame]) -> str:
    """Write frames as extended XYZ with the columns of OC20's releases; forces with four decimals."""
    cell = " ".join(f"{value:.8f}" for value in atoms.cell.array.flatten())
    tags = atoms.get_tags()
    lines = []
    for frame in frames:
        lines += [
            str(len(atoms)),
            f'Lattice="{cell}" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3 '
            f'energy={frame.energy:.6f} free_energy={frame.energy:.6f} pbc="T T T"',
        ]
        for symbol, position, tag, force in zip(
            atoms.symbols, frame.positions, tags, frame.forces, strict=True
        ):
            place = " ".join(f"{value:.6f}" for value in position)
            pull = " ".join(f"{value:.4f}" for value in force)
            lines.append(f"{symbol} {place} {'FT'[int(tag != 0)]} {tag} {pull}")
    return "\n".join(lines) + "\n"


class DataFolder:
    """Raw release that grows by one system at a time; what is in it can be read at any moment.

    Args:
        folder: made if it is missing.
        settings: those of its systems.

    Attributes:
        index: lines of `index.jsonl` by system.
        groups: number of a slab -> why it gave no system, or its systems.
        crystals: relaxed prototypes (`Prototypes.state`).
        gas: reference energies of gas atoms, eV.

    Raises:
        InputError: the folder was made with other settings, or holds other data.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self._settings = json.loads(json.dumps(asdict(settings)))
        self.index: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, Any] = {}
        self.rejected: dict[str, str] = {}
        self.crystals: dict[str, Any] = {}
        self.gas: dict[str, float] = {}
        self._references: dict[str, float] = {}
        if (folder / STATE).exists():
            self._resume()
        elif folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} holds other files: give a new folder to --out")
        self.save()

    def _resume(self) -> None:
        state = read_json(self.folder / STATE)
        told = state.get("settings")
        if told != self._settings:
            known = told if isinstance(told, dict) else {}
            differing = [name for name, value in self._settings.items() if known.get(name) != value]
            raise InputError(
                f"{self.folder} was made with another {differing[0] if differing else 'setting'}: "
                "use the same settings to go on, or another folder"
            )
        self.groups, self.rejected = state["groups"], state["rejected"]
        self.crystals, self.gas = state["crystals"], state["gas_eV"]
        self._references = state["references_eV"]
        path = self.folder / "index.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            entry = json.loads(line)
            self.index[entry["sid"]] = entry

    def save(self) -> None:
        """Write what has been tried."""
        record = {
            **header(SCHEMA),
            "settings": self._settings,
            "gas_eV": self.gas,
            "references_eV": self._references,
            "groups": self.groups,
            "rejected": self.rejected,
            "crystals": self.crystals,
        }
        write_json(self.folder / STATE, record, make_folder=True)

    def add(self, entry: dict[str, Any], reference: float, atoms: Atoms, frames: Sequence[Frame]) -> None:
        """Add a system.

        The reference comes first and the index last: whenever this is interrupted, every file of frames has
        its reference and every line of the index its frames.
        """
        sid = entry["sid"]
        self._references[sid] = round(reference, 6)
        lines = [f"{name},{energy:.6f}\n" for name, energy in self._references.items()]
        self.save()
        write_bytes(self.folder / "system.txt", "".join(lines).encode())
        packed = lzma.compress(raw_text(atoms, frames).encode(), preset=9)
        write_bytes(self.folder / f"{sid}.extxyz.xz", packed)
        self.index[sid] = entry
        text = "".join(json.dumps(one) + "\n" for one in self.index.values())
        write_bytes(self.folder / "index.jsonl", text.encode())


def make(
    data: DataFolder,
    source: Source,
    teacher: Calculator,
    driver: Calculator | None,
    settings: Settings,
    systems: int,
    crystals: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Add systems to a folder until it holds `systems`, with a progress bar.

    Args:
        data: the folder.
        source: of slabs with adsorbates, by number.
        teacher: potential that labels; total energies.
        driver: potential that drives the trajectories; None for the teacher.
        settings: of the systems.
        systems: number of systems wanted.
        crystals: state of the prototypes, to be kept.

    Raises:
        InputError: many slabs in a row gave no system.
    """
    if not data.gas:
        atoms = Atoms("HOCN", positions=np.diag([0.0, 1.0, 2.0, 3.0])[:, :3])
        found = gas_reference(atoms, teacher, None, "molecules", {"fmax": 0.01, "steps": 200})
        data.gas = {symbol: float(energy) for symbol, energy in found.per_atom.items()}
        data.save()
    number = failures = 0
    with tqdm(total=systems, initial=len(data.index), desc=str(data.folder), unit="system") as progress:
        while len(data.index) < systems:
            if failures == _MOST_FAILURES:
                raise InputError(
                    f"the last {failures} slabs gave no system, of the last one because: "
                    f"{data.groups[str(number - 1)]}; give other --bulks or wider limits"
                )
            if str(number) not in data.groups:
                try:
                    made = _make_group(
                        data, source(number), number, teacher, driver, settings, systems, progress
                    )
                    if len(data.index) >= systems and made is None:
                        break
                    data.groups[str(number)] = made or "no adsorbate gave a usable trajectory"
                except UnsuitableError as error:
                    data.groups[str(number)] = str(error)
                data.crystals = crystals()
                data.save()
            failures = failures + 1 if isinstance(data.groups[str(number)], str) else 0
            number += 1
    data.crystals = crystals()
    data.save()


def _make_group(
    data: DataFolder,
    start: Start,
    number: int,
    teacher: Calculator,
    driver: Calculator | None,
    settings: Settings,
    systems: int,
    progress: "tqdm[Any]",
) -> list[str] | None:
    """Add the systems of one slab; return their names, None where there were enough before its end."""
    clean: float | None = None
    for position, (adsorbate, atoms) in enumerate(start.adsorbed):
        sid = f"{settings.prefix}s{number}a{position}"
        if sid in data.index or sid in data.rejected:
            continue
        if len(data.index) >= systems:
            return None
        if clean is None:
            clean = relax_clean(start.slab, teacher, settings.clean_steps)
        tags = atoms.get_tags()
        reference = clean + sum(data.gas[symbol] for symbol in atoms.symbols[tags == 2])
        rng = np.random.default_rng([settings.seed, number, position])
        try:
            frames = usable(trajectory(atoms, teacher, driver, settings, rng), tags != 0, reference, settings)
            if len(frames) < _LEAST_FRAMES:
                raise UnsuitableError(f"{len(frames)} frames within the limits of energy and force")
        except UnsuitableError as error:
            data.rejected[sid] = str(error)
            continue
        energies = [round(frame.energy - reference, 4) for frame in frames]
        entry = {
            "sid": sid,
            "bulk": start.bulk.formula,
            "mpid": start.bulk.origin,
            "miller": [int(index) for index in start.miller],
            "ads": adsorbate,
            "natoms": len(atoms),
            "frames": len(frames),
            "driven": "teacher" if settings.by_teacher else "network",
            "e0": energies[0],
            "emin": min(energies),
        }
        data.add(entry, reference, atoms, frames)
        progress.update()
    group = f"{settings.prefix}s{number}a"
    return [sid for sid in data.index if sid.startswith(group)]


def sevennet() -> Any:
    """SevenNet-0 of 11 July 2024, whose weights are inside the `sevenn` package.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from sevenn.calculator import SevenNetCalculator
    except ModuleNotFoundError as error:
        raise InputError(f"the teacher needs the package sevenn ({error}): run {SEVENN}") from error
    return SevenNetCalculator("7net-0")


def _import_placement() -> tuple[Any, Any, Any, Any]:
    """Import the classes of `fairchem-data-oc`; raises `InputError` where it is not installed."""
    core = open_catalyst()
    return core.Bulk, core.Slab, core.Adsorbate, core.AdsorbateSlabConfig


def oc20_slabs(draw: Callable[[np.random.Generator], Bulk], settings: Settings) -> Source:
    """Source of slabs of `fairchem-data-oc` with adsorbates of OC20 at random sites.

    Args:
        draw: draws a bulk.
        settings: limits and seed.

    Raises:
        InputError: the package is not installed.
    """
    placement_bulk, slab_class, adsorbate_class, config_class = _import_placement()
    known = []
    number = 0
    while True:
        try:
            known.append(adsorbate_class(adsorbate_id_from_db=number))
        except KeyError:
            break
        number += 1
    known = [one for one in known if len(one.atoms) <= settings.max_adsorbate_atoms]
    if not known:
        raise InputError(f"no adsorbate of OC20 has at most {settings.max_adsorbate_atoms} atoms")

    def cut(bulk: Bulk) -> Any:
        whole = placement_bulk(bulk_atoms=bulk.atoms)
        for _ in range(_MOST_SLABS):
            try:
                slab = slab_class.from_bulk_get_random_slab(whole, max_miller=settings.max_miller)
            except Exception as error:  # pymatgen fails in many ways on unusual cells
                raise UnsuitableError(f"{bulk.formula}: no slab can be cut ({error!r})"[:200]) from error
            if len(slab.atoms) <= settings.max_slab_atoms:
                return slab
        raise UnsuitableError(f"{bulk.formula}: slabs have more than {settings.max_slab_atoms} atoms")

    def source(number: int) -> Start:
        rng = np.random.default_rng([settings.seed, number])
        bulk = draw(rng)
        # The package draws from numpy's global generator.
        np.random.seed(int(rng.integers(2**32)))
        slab = cut(bulk)
        adsorbed = []
        for index in rng.permutation(len(known))[: settings.adsorbates]:
            found = config_class(slab, known[index], num_sites=5, mode="random_site_heuristic_placement")
            if found.atoms_list:
                adsorbed.append((str(known[index].smiles), found.atoms_list[0]))
        return Start(bulk, tuple(slab.millers), slab.atoms, adsorbed)

    return source


def read_bulks(files: Sequence[Path]) -> list[Bulk]:
    """Read the bulks of files: every row of an ASE database, the last structure of any other file.

    Raises:
        InputError: a file is missing or cannot be read, or a structure is not periodic.
    """
    bulks = []
    for path in files:
        for name, atoms in _structures(path):
            if not atoms.pbc.all() or abs(atoms.get_volume()) < 1:
                raise InputError(
                    f"{path}: {name} is not periodic in three directions: a bulk crystal is needed"
                )
            plain = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=True)
            bulks.append(Bulk(plain, name))
    return bulks


def check_elements(bulks: Sequence[Bulk], known: Collection[int]) -> None:
    """Raise `InputError` for a bulk with an element whose atomic number is not `known` to the teacher."""
    for bulk in bulks:
        unknown = [number for number in bulk.atoms.numbers if number not in known]
        if unknown:
            raise InputError(
                f"the bulk {bulk.origin} holds {chemical_symbols[unknown[0]]}, which the teacher does not "
                "know: leave it out of --bulks"
            )


def _structures(path: Path) -> Iterator[tuple[str, Atoms]]:
    if path.suffix != ".db":
        yield path.stem, read_structure(path)
        return
    import ase.db

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        for row in ase.db.connect(path).select():
            yield str(row.get("mpid", f"{path.stem}-{row.id}")), row.toatoms()
    except Exception as error:  # sqlite and ASE fail in their own ways
        raise InputError(f"{path} is no ASE database ({error})") from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on with")
    parser.add_argument("--systems", type=int, required=True, help="number of systems that it shall hold")
    parser.add_argument(
        "--bulks",
        nargs="+",
        type=Path,
        default=[],
        help="ASE databases and structure files to draw bulks from, in place of the prototypes",
    )
    parser.add_argument("--checkpoint", help="network that drives the trajectories, in place of the teacher")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.systems < 1:
        raise InputError(f"--systems is {arguments.systems}: give 1 or more")
    if arguments.seed < 0:
        raise InputError(f"--seed is {arguments.seed}: give 0 or more")
    check_target(arguments.out, is_folder=True)
    checkpoint = None if arguments.checkpoint is None else find_checkpoint(arguments.checkpoint)
    driver = None if checkpoint is None else EquiformerV2Calculator(checkpoint)
    driven = "teacher" if checkpoint is None else str(header(SCHEMA, checkpoint)["checkpoint_sha256"])
    settings = Settings(
        driven=driven,
        **(BY_TEACHER if checkpoint is None else BY_NETWORK),
        seed=arguments.seed,
        bulks=tuple(path.as_posix() for path in arguments.bulks),
    )
    bulks = read_bulks(arguments.bulks)
    teacher = sevennet()
    check_elements(bulks, teacher.type_map)
    _import_placement()
    data = DataFolder(arguments.out, settings)
    prototypes = Prototypes(teacher, data.crystals)

    def draw(rng: np.random.Generator) -> Bulk:
        return bulks[int(rng.integers(len(bulks)))] if bulks else prototypes.draw(rng)

    source = oc20_slabs(draw, settings)
    make(data, source, teacher, driver, settings, arguments.systems, prototypes.state)
    frames = sum(entry["frames"] for entry in data.index.values())
    reduced = {str(Formula(entry["bulk"]).reduce()[0]) for entry in data.index.values()}
    print(f"{arguments.out}: {len(data.index)} systems, {frames} frames, {len(reduced)} bulk formulas")


if __name__ == "__main__":
    run_script(main)
