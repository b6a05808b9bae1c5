"""Teacher calls that a network saves in finding the lowest adsorption energy, and the promise of early stops.

    PYTHONPATH=$PWD python -m studies.dft_candidates --checkpoints study_teacher --part candidates
    python -m studies.dft_candidates --checkpoints study_teacher --part stops

SevenNet-0 stands for DFT. `candidates` (needs the package `sevenn`): for every system, placements of its
adsorbate on its clean slab are relaxed by the teacher, once and for all methods, and by each network. The
truth is the teacher's lowest placement without an anomaly. A method has found it if the lowest teacher energy
among what it passes on is at most 0.1 eV above. Methods, each with k = 1 to 5:

- network, single point: the k lowest minima of the network, one teacher call each.
- network, relaxed: the same, each relaxed by the teacher from the network's end.
- teacher only: k placements in random order, relaxed by the teacher (mean over all choices).
- lowest starts: one teacher call for every start, and the k lowest relaxed by the teacher.

`stops`: the network alone relaxes all of 40 placements of every system, and the rule of the search is
replayed on them in their order: how much it would have saved, and how often a minimum more than 0.1 eV lower
was missed.

Every relaxation is kept in `--runs`: a stopped command goes on where it was.
"""

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from tqdm import tqdm

from equiformer2.adsorption.anomalies import find_anomalies
from equiformer2.adsorption.basins import ENOUGH, LOWER, estimate_coverage, find_basins
from equiformer2.adsorption.placements import placements
from equiformer2.adsorption.symmetry import surface_symmetry
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_bytes, write_json
from equiformer2.inference import Engine, Relaxation, RelaxationStore, open_engine
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.script import header, run_script
from equiformer2.shipped import find_checkpoint
from studies.make_teacher_data import sevennet
from studies.study_data import read_index
from studies.study_errors import LARGE, cell, table
from studies.teacher_relaxations import choose, read_starts

logger = logging.getLogger(__name__)

MOST = 5
METHODS = ("network, single point", "network, relaxed", "teacher only", "lowest starts")
Row = dict[str, Any]


@dataclasses.dataclass
class Case:
    """One system: its clean slab and the placements of its adsorbate.

    Attributes:
        sid: of the system.
        slab: clean, with held atoms and tags.
        placed: name and structure of every placement.
    """

    sid: str
    slab: Atoms
    placed: list[tuple[str, Atoms]]

    def intact(self, ends: Mapping[str, Relaxation], clean: Atoms) -> dict[str, Relaxation]:
        """Leave out relaxations without an energy or with an anomaly."""
        starts = dict(self.placed)
        return {
            name: end
            for name, end in ends.items()
            if end.energy_eV is not None
            and end.status != "failed"
            and not find_anomalies(starts[name], end.atoms, starts[name].get_tags(), clean)
        }


def cases(data: Path, count: int, number: int, seed: int) -> list[Case]:
    """Place the adsorbates of systems of a raw folder anew on their slabs; those that cannot be are named."""
    found = []
    for start in read_starts(data, choose(read_index(data), count, seed)):
        atoms = start.atoms(start.frame.pos)
        atoms.set_constraint(FixAtoms(mask=np.asarray(start.frame.fixed, dtype=bool)))
        slab = atoms[atoms.get_tags() != 2]
        try:
            starts = placements(slab, start.system.adsorbate, "heuristic", number, seed)
        except InputError as error:
            logger.warning(f"{start.system.sid}: left out ({error})")
            continue
        found.append(Case(start.system.sid, slab, [(one.id, one.atoms) for one in starts]))
    return found


def relaxed(
    starts: Sequence[tuple[str, Atoms]], engine: Engine, settings: RelaxationSettings, folder: Path
) -> dict[str, Relaxation]:
    """Relax into a folder, in which a stopped run goes on."""
    identity = {"model": engine.identity(), **dataclasses.asdict(settings)}
    with RelaxationStore(folder, identity) as store:
        return {end.id: end for end in store.relax(starts, engine, settings)}


def found_by(truth: float, energies: Sequence[float]) -> bool:
    """Tell whether one of the energies is the truth's, eV."""
    return bool(energies) and min(energies) <= truth + LOWER


def by_chance(truth: float, energies: Sequence[float], number: int, k: int) -> float:
    """Probability that k of `number` relaxations in random order hold one that has found the truth.

    Args:
        truth: eV.
        energies: of the relaxations without an anomaly; the others of `number` find nothing.
        number: of relaxations.
        k: chosen ones.
    """
    good = sum(energy <= truth + LOWER for energy in energies)
    return 1.0 - comb(number - good, k) / comb(number, k) if k <= number else float(good > 0)


def candidates_of(case: Case, network: Mapping[str, Relaxation], clean: Atoms) -> list[Relaxation]:
    """The lowest placement of every minimum of the network, lowest first."""
    ends = list(case.intact(network, clean).values())
    energies = [float(end.energy_eV or 0.0) for end in ends]
    groups = find_basins([end.atoms for end in ends], energies, surface_symmetry(case.slab, clean))
    lowest: dict[int, int] = {}
    for place, group in enumerate(groups):
        if group not in lowest or energies[place] < energies[lowest[group]]:
            lowest[group] = place
    return [ends[place] for place in sorted(lowest.values(), key=energies.__getitem__)]


def judge_case(
    case: Case, teacher: Engine, network: Engine, settings: RelaxationSettings, runs: Path, name: str
) -> Row | None:
    """Success and teacher calls of every method on one system; None where the teacher has no truth."""
    folder = runs / "teacher" / case.sid
    own = relaxed([("clean", case.slab), *case.placed], teacher, settings, folder)
    clean = own.pop("clean").atoms
    valid = case.intact(own, clean)
    if not valid:
        logger.warning(f"{case.sid}: left out, every relaxation of the teacher has an anomaly")
        return None
    truth = min(float(end.energy_eV or 0.0) for end in valid.values())
    long = dataclasses.replace(settings, steps=2 * settings.steps)
    ends = relaxed([("clean", case.slab), *case.placed], network, long, runs / name / case.sid)
    chosen = candidates_of(case, ends, ends.pop("clean").atoms)[:MOST]
    again = relaxed(
        [(end.id, end.atoms) for end in chosen], teacher, settings, runs / f"{name}-teacher" / case.sid
    )
    again_energies = {key: float(end.energy_eV or 0.0) for key, end in case.intact(again, clean).items()}
    energies = {key: float(end.energy_eV or 0.0) for key, end in valid.items()}
    cheapest = [end for end in own.values() if end.start_energy_eV is not None]
    cheapest.sort(key=lambda end: float(end.start_energy_eV or 0.0))
    mean_calls = float(np.mean([end.model_evaluations for end in own.values()]))
    row: Row = {"sid": case.sid, "placements": len(own), "minima": len(chosen), "methods": {}}
    for k in range(1, MOST + 1):
        first = chosen[:k]
        row["methods"][str(k)] = {
            "network, single point": (
                found_by(truth, [again[end.id].start_energy_eV or np.inf for end in first]),
                len(first),
            ),
            "network, relaxed": (
                found_by(truth, [again_energies[end.id] for end in first if end.id in again_energies]),
                sum(again[end.id].model_evaluations for end in first),
            ),
            "teacher only": (by_chance(truth, list(energies.values()), len(own), k), k * mean_calls),
            "lowest starts": (
                found_by(truth, [energies[end.id] for end in cheapest[:k] if end.id in energies]),
                len(own) + sum(end.model_evaluations - 1 for end in cheapest[:k]),
            ),
        }
    return row


def replay(case: Case, ends: Mapping[str, Relaxation], clean: Atoms, every: int = 8) -> Row | None:
    """Replay the rule of the search on finished relaxations, in the order of the placements."""
    intact = case.intact(ends, clean)
    names = [name for name, _ in case.placed]
    ended = [name for name in names if name in intact and intact[name].converged]
    if not ended:
        return None
    energies = {name: float(intact[name].energy_eV or 0.0) for name in ended}
    symmetry = surface_symmetry(case.slab, clean)
    used = len(names)
    for stop in range(every, len(names), every):
        now = [name for name in names[:stop] if name in energies]
        groups = find_basins([intact[name].atoms for name in now], [energies[name] for name in now], symmetry)
        if estimate_coverage(groups, [energies[name] for name in now], len(names) - stop).enough:
            used = stop
            break
    seen = [energies[name] for name in names[:used] if name in energies]
    return {
        "sid": case.sid,
        "placements": len(names),
        "relaxed": used,
        "missed": not seen or min(energies.values()) < min(seen) - LOWER,
        "missed_by_eV": (min(seen) if seen else 0.0) - min(energies.values()),
    }


def averages(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Success rate and mean teacher calls by method and k."""
    return {
        method: {
            str(k): {
                "success": float(np.mean([float(row["methods"][str(k)][method][0]) for row in rows])),
                "teacher_calls": float(np.mean([row["methods"][str(k)][method][1] for row in rows])),
            }
            for k in range(1, MOST + 1)
        }
        for method in METHODS
    }


def page(record: Mapping[str, Any]) -> str:
    """Page of the results."""
    lines = ["# Candidates for DFT", "", f"Made by `{record['command']}`.", ""]
    for name, result in record["checkpoints"].items():
        lines += [f"## {name}", ""]
        if "candidates" in result:
            rows = result["candidates"]["systems"]
            lines += [
                f"{len(rows)} systems of unseen bulks, {record['settings']['placements']} placements each.",
                "The truth is SevenNet-0's lowest placement; found is what lies at most 0.1 eV above it.",
                "",
            ]
            head = ["method", *(f"found, k = {k}" for k in range(1, MOST + 1))]
            head += [f"teacher calls, k = {k}" for k in (1, MOST)]
            found = result["candidates"]["averages"]
            lines += table(
                head,
                [
                    [
                        method,
                        *(f"{found[method][str(k)]['success']:.0%}" for k in range(1, MOST + 1)),
                        *(f"{found[method][str(k)]['teacher_calls']:.1f}" for k in (1, MOST)),
                    ]
                    for method in METHODS
                ],
            )
        if "stops" in result:
            stops = result["stops"]
            lines += [
                f"Early stops on {len(stops['systems'])} systems: {stops['relaxed_share']:.0%} of the "
                f"placements were relaxed, and in {stops['missed_share']:.1%} of the systems a minimum more "
                f"than {LOWER:g} eV lower was missed (the rule promises {ENOUGH:.0%}); the largest miss was "
                f"{cell(stops['largest_miss_eV'], 2)} eV.",
                "",
            ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", nargs="+", default=["study_teacher"])
    parser.add_argument("--part", choices=("candidates", "stops"), required=True)
    parser.add_argument("--data", type=Path, default=LARGE / "test", help="raw folder of the systems")
    parser.add_argument("--systems", type=int, default=40, help="number of systems (default: %(default)s)")
    parser.add_argument(
        "--placements", type=int, help="number of placements per system (default: 10, for stops 40)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--fmax", type=float, default=0.05, help="force threshold, eV/Å (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=40, help="maximum number of steps of the teacher (default: %(default)s)"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/dft_candidates"),
        help="folder of the work so far, which the next run continues",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/dft_candidates"), help="written as .json, .md"
    )
    options = parser.parse_args(argv)
    number = options.placements or (10 if options.part == "candidates" else 40)
    file = options.results.with_suffix(".json")
    record = read_json(file) if file.exists() else {"checkpoints": {}}
    check_target(file)
    settings = RelaxationSettings(fmax=options.fmax, steps=options.steps, frames="ends")
    systems = cases(options.data, options.systems, number, options.seed)
    teacher = open_engine(sevennet()) if options.part == "candidates" else None
    for given in options.checkpoints:
        path = Path(find_checkpoint(given))
        network = open_engine(path)
        rows = []
        for case in tqdm(systems, desc=f"{path.stem}, {options.part}", unit="system"):
            if teacher is not None:
                rows.append(judge_case(case, teacher, network, settings, options.runs, path.stem))
                continue
            long = dataclasses.replace(settings, steps=5 * options.steps)
            folder = options.runs / f"{path.stem}-stops" / case.sid
            ends = relaxed([("clean", case.slab), *case.placed], network, long, folder)
            rows.append(replay(case, ends, ends.pop("clean").atoms))
        kept = [row for row in rows if row is not None]
        if not kept:
            raise InputError("no system can be judged: give others")
        result = record["checkpoints"].setdefault(path.stem, {})
        result["sha256"] = sha256(path)
        if teacher is not None:
            result["candidates"] = {"systems": kept, "averages": averages(kept)}
        else:
            result["stops"] = {
                "systems": kept,
                "relaxed_share": float(np.mean([row["relaxed"] / row["placements"] for row in kept])),
                "missed_share": float(np.mean([row["missed"] for row in kept])),
                "largest_miss_eV": max(row["missed_by_eV"] for row in kept),
            }
    record = {
        **header("dft_candidates/1"),
        "settings": {"placements": number, "seed": options.seed, **dataclasses.asdict(settings)},
        "checkpoints": record["checkpoints"],
    }
    write_json(file, record, make_folder=True)
    write_bytes(options.results.with_suffix(".md"), page(read_json(file)).encode())
    print(page(read_json(file)))


if __name__ == "__main__":
    run_script(main)
