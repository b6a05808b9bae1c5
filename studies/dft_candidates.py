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

*Equal success*: the mean teacher calls of the last two for as many relaxations as find it as often. All
energies are those after at most `--steps` steps; calls for the clean slab, which all need, are not counted.

`stops`: the network alone relaxes all of 40 placements of every system, and the rule of the search is
replayed on them in their order: how much it would have saved, and how often a minimum more than 0.1 eV lower
was missed, in all and among the systems that were stopped.

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
NETWORK = ("network, single point", "network, relaxed")
ALONE = ("teacher only", "lowest starts")
METHODS = (*NETWORK, *ALONE)
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
    """Place the adsorbates of systems of a raw folder anew on their slabs.

    Systems whose adsorbate cannot be placed are named, and others taken for them.
    """
    found: list[Case] = []
    index = read_index(data)
    for system in choose(index, max(count, len(index)), seed):
        if len(found) == count:
            break
        (start,) = read_starts(data, [system])
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
    number = len(own)
    curves: dict[str, list[tuple[float, float]]] = {
        "teacher only": [
            (by_chance(truth, list(energies.values()), number, k), k * mean_calls)
            for k in range(1, number + 1)
        ],
        "lowest starts": [
            (
                found_by(truth, [energies[end.id] for end in cheapest[:k] if end.id in energies]),
                number + sum(end.model_evaluations - 1 for end in cheapest[:k]),
            )
            for k in range(1, number + 1)
        ],
    }
    row: Row = {"sid": case.sid, "placements": number, "minima": len(chosen), "methods": {}}
    row |= {"converged": sum(end.converged for end in own.values()), "curves": curves}
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
            **{method: curve[min(k, number) - 1] for method, curve in curves.items()},
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


def equal_success(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean calls with which the teacher alone finds it as often as a network's k candidates, by way."""
    most = max(row["placements"] for row in rows)

    def calls(way: str, success: float) -> float:
        for number in range(most):
            points = [row["curves"][way][min(number, row["placements"] - 1)] for row in rows]
            if np.mean([float(found) for found, _ in points]) >= success - 1e-9:
                break
        return float(np.mean([spent for _, spent in points]))

    return {
        method: {
            str(k): {way: calls(way, found[str(k)]["success"]) for way in ALONE} for k in range(1, MOST + 1)
        }
        for method, found in averages(rows).items()
        if method in NETWORK
    }


def stop_numbers(rows: Sequence[Row]) -> Row:
    """Shares over all systems, and misses among those that were stopped early."""
    stopped = [row for row in rows if row["relaxed"] < row["placements"]]
    return {
        "relaxed_share": float(np.mean([row["relaxed"] / row["placements"] for row in rows])),
        "missed_share": float(np.mean([row["missed"] for row in rows])),
        "stopped": len(stopped),
        "missed_of_stopped": sum(row["missed"] for row in stopped),
        "largest_miss_eV": max(row["missed_by_eV"] for row in rows),
    }


def page(record: Mapping[str, Any]) -> str:
    """Page of the results."""
    lines = ["# Candidates for DFT", "", "Made by `python -m studies.dft_candidates`.", ""]
    for name, result in record["checkpoints"].items():
        lines += [f"## {name}", ""]
        if "candidates" in result:
            lines += _candidate_lines(result["candidates"])
        if "stops" in result:
            stops = result["stops"]
            lines += [
                f"Early stops (`{stops['command']}`): {len(stops['systems'])} systems of "
                f"{stops['settings']['placements']} placements each. {stops['relaxed_share']:.0%} of the "
                f"placements were relaxed; {stops['stopped']} systems were stopped early, and in "
                f"{stops['missed_of_stopped']} of them ({stops['missed_share']:.1%} of all) a minimum more "
                f"than {LOWER:g} eV lower was missed. The rule promises {ENOUGH:.0%}; the largest miss was "
                f"{cell(stops['largest_miss_eV'], 2)} eV. Truth: the network's own minima.",
                "",
            ]
    return "\n".join(lines)


def _candidate_lines(result: Mapping[str, Any]) -> list[str]:
    rows, settings = result["systems"], result["settings"]
    converged = sum(row["converged"] for row in rows) / sum(row["placements"] for row in rows)
    lines = [
        f"{len(rows)} systems of unseen bulks, {settings['placements']} placements each "
        f"(`{result['command']}`). The truth is SevenNet-0's lowest placement after at most "
        f"{settings['steps']} steps ({converged:.0%} of its relaxations have converged); found is what lies "
        f"at most {LOWER:g} eV above it. Calls are means over the systems.",
        "",
    ]
    each = range(1, MOST + 1)
    head = ["method", *(f"found, k = {k}" for k in each), *(f"teacher calls, k = {k}" for k in each)]
    found = result["averages"]
    lines += table(
        head,
        [
            [
                method,
                *(f"{found[method][str(k)]['success']:.0%}" for k in each),
                *(f"{found[method][str(k)]['teacher_calls']:.1f}" for k in each),
            ]
            for method in METHODS
        ],
    )
    lines += ["Teacher calls for equal success:", ""]
    lines += table(
        ["as often as", *(f"k = {k}: {way}" for k in each for way in ("itself", *ALONE))],
        [
            [
                method,
                *(
                    f"{calls:.1f}"
                    for k in each
                    for calls in (
                        found[method][str(k)]["teacher_calls"],
                        *(result["equal_success"][method][str(k)][way] for way in ALONE),
                    )
                ),
            ]
            for method in NETWORK
        ],
    )
    return lines


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
    about = header("dft_candidates/1")
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
        # Each part with what it is of: the other one may be of another call.
        result[options.part] = {
            "command": about["command"],
            "sha256": sha256(path),
            "settings": {"placements": number, "seed": options.seed, **dataclasses.asdict(settings)},
            "systems": kept,
            **(
                {"averages": averages(kept), "equal_success": equal_success(kept)}
                if teacher is not None
                else stop_numbers(kept)
            ),
        }
    record = {**about, "checkpoints": record["checkpoints"]}
    write_json(file, record, make_folder=True)
    write_bytes(options.results.with_suffix(".md"), page(read_json(file)).encode())
    print(page(read_json(file)))


if __name__ == "__main__":
    run_script(main)
