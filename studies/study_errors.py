"""Errors of checkpoints on the larger teacher set: of all frames, by element, adsorbate, bulk and trajectory.

    python -m studies.study_errors --checkpoints models/study_teacher.pt oc20_small
    python -m studies.study_errors --checkpoints models/study_teacher.pt \
        --trained-on runs/data/study/train.lmdb \
        --data data/teacher_large/test runs/data/study/val.lmdb runs/data/study/older.lmdb

Data are raw folders with an `index.jsonl`, or LMDB files made of them (the systems are then looked up in
`--index`). Every checkpoint and data set that is finished is kept in `--runs`, so that a stopped command goes
on where it was.

The numbers, all of adsorption energies and of free atoms:

- force MAE: the mean over frames of the mean |error| of the force components of a frame's free atoms. Its
  ratio is to the same mean for zero forces. `over components` are both with every component counting once, so
  that large slabs weigh more.
- cosine: of the vector of all force components of a frame's free atoms with that of the labels, averaged over
  frames. `by atom` is OC20's cosine: of each free atom's force, averaged over atoms.
- energy MAE: the mean over frames of the |error|; its ratio is to the mean |deviation| of the same frames'
  energies from their mean. In a breakdown the mean is that of the row's frames.
- by element: forces over components of the free atoms of that element; energies of the frames that hold it,
  their ratio to the deviation from the mean of all frames.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from datasets_oc20 import DataError, OC20Lmdb
from datasets_oc20.preprocess import PreprocessOptions, preprocess
from datasets_oc20.targets import check_energies_match_kind, sample_targets
from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_bytes, write_json
from equiformer2.inference import Predictor
from equiformer2.inference.familiarity import KINDS, Judgement
from equiformer2.script import header, run_script
from equiformer2.shipped import find_checkpoint
from equiformer2.training.breakdown import ADSORBATE, Breakdown
from equiformer2.training.evaluation import check_targets, open_dataset, predicted_batches
from equiformer2.training.figures import save_figure
from studies.study_data import System, read_index

LARGE = Path("data/teacher_large")
INDEX = (LARGE / "train", LARGE / "test", Path("data/teacher"))
SCHEMA = "study_errors/1"
#: Rises when the stored numbers change their meaning.
_VERSION = 2
#: Columns of the tables: key of a row, title, digits.
COLUMNS = (
    ("force_mae_eV_A", "force MAE (eV/Å)", 4),
    ("force_ratio", "of zero forces", 3),
    ("force_cosine", "cosine", 3),
    ("energy_mae_eV", "energy MAE (eV)", 3),
    ("energy_ratio", "of the mean", 3),
)
OTHER_MEANS = (
    ("force_mae_over_components_eV_A", "force MAE over components (eV/Å)", 4),
    ("force_ratio_over_components", "of zero forces", 3),
    ("force_cosine_by_atom", "cosine by atom", 3),
)
IN_BREAKDOWNS = ("force_ratio", "force_cosine", "energy_ratio")

Row = dict[str, Any]


@dataclass
class Frames:
    """Errors of one checkpoint on every frame of one data set.

    Attributes:
        sid: system of each frame.
        numbers: `[n, 7]`: target and predicted energy (eV), free atoms, mean |error| and mean |label| of the
            force components of free atoms (eV/Å), cosine of the frame, mean cosine of its free atoms.
        adsorbate_atoms: `[n]` atoms of the adsorbate.
        elements: by element `frames`, `free_atoms`, `force_mae_eV_A`, `force_ratio`, `energy_mae_eV`,
            `energy_ratio`.
        named: for each frame the first thing that the checkpoint's training data do not hold, of
            `familiarity.KINDS`, else "nothing"; empty for a checkpoint that tells nothing of them.
    """

    sid: list[str]
    numbers: np.ndarray
    adsorbate_atoms: np.ndarray
    elements: dict[str, Row]
    named: list[str]

    @classmethod
    def compute(cls, predictor: Predictor, dataset: OC20Lmdb, batch_size: int, name: str) -> "Frames":
        """Predict every frame of a data set.

        Args:
            predictor: with forces, of the data's kind of energy.
            dataset: frames with targets.
            batch_size: maximum number of frames per batch.
            name: of the data in messages.

        Raises:
            InputError: no forces, a frame without targets or without a free atom, energies that cannot be
                adsorption energies.
        """
        if not predictor.has_forces:
            raise InputError("the checkpoint predicts no forces: this study compares forces")
        check_targets(dataset[0], True, name)
        check_energies_match_kind(sample_targets(dataset, 200), str(dataset.energy_kind), name)
        mean = float(np.mean([float(dataset[index].energy) for index in range(len(dataset))]))
        found, trivial = Breakdown(), Breakdown()
        sids: list[str] = []
        named: list[str] = []
        numbers, sizes = [], []
        for batch, out in predicted_batches(predictor.predict_batches, dataset, batch_size, None, 0, True):
            found.update(out, batch)
            zero = torch.zeros_like(out["forces"])
            trivial.update({"energy": torch.full_like(out["energy"], mean), "forces": zero}, batch)
            start = 0
            for at, count in enumerate(batch.natoms.tolist()):
                part = slice(start, start + count)
                start += count
                free = ~batch.fixed[part].bool()
                if not free.any():
                    raise InputError(f"{name}: a frame of {batch.sid[at]} has no free atom to judge")
                true, predicted = (each[part][free].double() for each in (batch.forces, out["forces"]))
                whole = torch.cosine_similarity(true.flatten(), predicted.flatten(), dim=0)
                atoms = torch.cosine_similarity(true, predicted, dim=1).mean()
                energies = (batch.energy.view(-1)[at], out["energy"].view(-1)[at], free.sum())
                errors = ((predicted - true).abs().mean(), true.abs().mean(), whole, atoms)
                numbers.append([float(value) for value in (*energies, *errors)])
                sizes.append(int((batch.tags[part] == ADSORBATE).sum()))
            sids += [str(sid) for sid in batch.sid]
            if predictor.familiarity.known:
                named += [_first_named(judgement) for judgement in predictor.judge(batch)]
        return cls(sids, np.array(numbers), np.array(sizes), _element_rows(found, trivial), named)

    def summary(self, chosen: np.ndarray) -> Row:
        """Average over the frames of a mask `[n]`; a ratio to zero is None."""
        energy, predicted, free, error, zero, cosine, by_atom = self.numbers[chosen].T

        def pair(name: str, value: float, trivial: float, unit: str) -> Row:
            ratio = value / trivial if trivial > 0 else None
            return {f"{name}_{unit}": value, f"trivial_{name}_{unit}": trivial, f"{name}_ratio": ratio}

        row: Row = {
            "frames": int(chosen.sum()),
            "systems": len({sid for sid, one in zip(self.sid, chosen, strict=True) if one}),
            **pair("force_mae", float(error.mean()), float(zero.mean()), "eV_A"),
            "force_cosine": float(cosine.mean()),
            **pair(
                "energy_mae",
                float(np.abs(predicted - energy).mean()),
                float(np.abs(energy - energy.mean()).mean()),
                "eV",
            ),
        }
        weighted = [float((each * free).sum() / free.sum()) for each in (error, zero, by_atom)]
        row |= {
            "force_mae_over_components_eV_A": weighted[0],
            "trivial_force_mae_over_components_eV_A": weighted[1],
            "force_ratio_over_components": weighted[0] / weighted[1] if weighted[1] > 0 else None,
            "force_cosine_by_atom": weighted[2],
        }
        return {name.replace("mae_ratio", "ratio"): value for name, value in row.items()}


def _first_named(judgement: Judgement) -> str:
    """Name the first thing of `familiarity.KINDS` that is new about a structure, or "nothing"."""
    new = (judgement.elements, judgement.pairs, judgement.adsorbates, judgement.substrates, judgement.atoms)
    return next((kind for kind, names in zip(KINDS, new, strict=True) if names), "nothing")


def _element_rows(found: Breakdown, trivial: Breakdown) -> dict[str, Row]:
    """Errors by element beside those of zero forces and one mean energy; elements without a free atom go."""
    rows: dict[str, Row] = {}
    base = trivial.element_rows()
    for name, row in found.element_rows().items():
        if "forces_mae" not in row:
            continue
        zero, mean = base[name]["forces_mae"], base[name]["energy_mae"]
        rows[name] = {
            "frames": row["structures"],
            "free_atoms": row["free_atoms"],
            "force_mae_eV_A": row["forces_mae"],
            "force_ratio": row["forces_mae"] / zero if zero > 0 else None,
            "energy_mae_eV": row["energy_mae"],
            "energy_ratio": row["energy_mae"] / mean if mean > 0 else None,
        }
    return rows


def groupings(
    systems: Sequence[System], adsorbate_atoms: np.ndarray, seen: frozenset[str] | None
) -> dict[str, dict[str, np.ndarray]]:
    """Divide frames in several ways.

    Args:
        systems: the system of each of n frames.
        adsorbate_atoms: `[n]`.
        seen: reduced formulas of the bulks that were trained on; None where that is not known.

    Returns:
        Title of the division -> name of the group -> mask `[n]`; groups without frames are left out.
    """

    def mask(condition: Any) -> np.ndarray:
        return np.array([bool(condition(system)) for system in systems])

    divisions = {
        "bulk": {
            "pure metals": mask(lambda system: system.is_pure),
            "alloys and compounds": mask(lambda system: not system.is_pure),
        },
        "copper": {
            "bulks with copper": mask(lambda system: "Cu" in system.elements),
            "bulks without copper": mask(lambda system: "Cu" not in system.elements),
        },
        "trajectory": {
            "driven by the teacher": mask(lambda system: system.driven == "teacher"),
            "driven by a network": mask(lambda system: system.driven != "teacher"),
        },
        "atoms of the adsorbate": {
            str(size): adsorbate_atoms == size for size in np.unique(adsorbate_atoms).tolist()
        },
    }
    if seen is not None:
        divisions["training"] = {
            "bulk formula seen": mask(lambda system: system.bulk in seen),
            "bulk formula unseen": mask(lambda system: system.bulk not in seen),
        }
    return {
        title: {name: chosen for name, chosen in groups.items() if chosen.any()}
        for title, groups in divisions.items()
    }


def systems_of(source: AnyPath, index: Sequence[AnyPath]) -> dict[str, System]:
    """Systems that frames of `source` may belong to, by `sid`.

    Args:
        source: raw folder, which has its own index, or LMDB.
        index: folders whose indexes list the systems of LMDB files.
    """
    folders = [source] if Path(source).is_dir() and (Path(source) / "index.jsonl").is_file() else index
    return {system.sid: system for folder in folders for system in read_index(folder)}


def look_up(sids: Sequence[str], known: Mapping[str, System], source: AnyPath) -> list[System]:
    """Find the system of every frame.

    Raises:
        InputError: a system is not listed.
    """
    missing = next((sid for sid in sids if sid not in known), None)
    if missing is not None:
        raise InputError(f"{source}: no index lists its system {missing}: name the folder with it in --index")
    return [known[sid] for sid in sids]


def seen_systems(sources: Sequence[AnyPath], index: Sequence[AnyPath]) -> frozenset[System] | None:
    """Systems in LMDB files or folders of training data; None without any."""
    if not sources:
        return None
    seen: set[System] = set()
    for source in sources:
        known = systems_of(source, index)
        if (Path(source) / "index.jsonl").is_file():
            seen |= set(known.values())
            continue
        dataset = OC20Lmdb(source, None)
        sids = list(dict.fromkeys(str(dataset[at].sid) for at in range(len(dataset))))
        seen |= set(look_up(sids, known, source))
    return frozenset(seen)


@contextmanager
def open_source(source: Path, predictor: Predictor) -> Iterator[OC20Lmdb]:
    """Open a raw folder or an LMDB as a data set with the predictor's kind of energy."""
    with tempfile.TemporaryDirectory() as scratch:
        path = source
        if (source / "system.txt").is_file():
            path = Path(scratch) / f"{source.name}.lmdb"
            everything = PreprocessOptions(max_energy=None, max_force=None)
            preprocess(source, path, everything, num_workers=1)
        yield open_dataset(path, predictor, None)


def frame_errors(predictor: Predictor, checkpoint: Path, source: Path, runs: Path, batch_size: int) -> Frames:
    """Compute the errors by frame, or read them where they were computed before.

    Args:
        predictor: the checkpoint's.
        checkpoint: its file.
        source: raw folder or LMDB.
        runs: folder of what is finished.
        batch_size: maximum number of structures per batch.
    """
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    settings = {
        "version": _VERSION,
        "checkpoint": sha256(checkpoint),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    stored = runs / f"{checkpoint.stem}-{source.parent.name}-{source.stem}.json"
    if stored.is_file():
        known = read_json(stored)
        if known.pop("evaluated", None) == settings:
            return Frames(
                known["sid"],
                np.array(known["numbers"]),
                np.array(known["adsorbate_atoms"]),
                known["elements"],
                known["named"],
            )
    with open_source(source, predictor) as dataset:
        frames = Frames.compute(predictor, dataset, batch_size, str(source))
    arrays = {"numbers": frames.numbers.tolist(), "adsorbate_atoms": frames.adsorbate_atoms.tolist()}
    record = {
        "evaluated": settings,
        "sid": frames.sid,
        **arrays,
        "elements": frames.elements,
        "named": frames.named,
    }
    write_json(stored, record, make_folder=True)
    return frames


def collect(frames: Frames, systems: Sequence[System], seen: frozenset[System] | None) -> Row:
    """Gather the averages of one checkpoint on one data set: `all`, `groups`, `elements` and `named`."""
    everything = np.ones(len(frames.sid), dtype=bool)
    bulks = None if seen is None else frozenset(system.bulk for system in seen)
    groups = groupings(systems, frames.adsorbate_atoms, bulks)
    return {
        "bulks": len({system.bulk for system in systems}),
        "trained_systems": None if seen is None else len(set(systems) & seen),
        "all": frames.summary(everything),
        "groups": {
            title: {name: frames.summary(chosen) for name, chosen in rows.items()}
            for title, rows in groups.items()
        },
        "elements": frames.elements,
        "named": {
            kind: frames.summary(np.array(frames.named) == kind)
            for kind in (*KINDS, "nothing")
            if kind in frames.named
        },
    }


def cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def markdown(record: Mapping[str, Any], figure: str) -> str:
    """Write the page of results.

    Args:
        record: content of the results file.
        figure: name of the picture beside the page.
    """
    lines = [
        "# Errors on the larger teacher set",
        "",
        "Written by `python -m studies.study_errors`, whose help defines every number. The labels are",
        "SevenNet-0's, not DFT ([data](../../data/README.md)). Adsorption energies; forces of free atoms;",
        "means over frames. Ratios are to zero forces and to the mean energy of the same frames.",
        "",
        f"![errors by element and by size of the adsorbate]({figure})",
        "",
    ]
    for source, results in record["data"].items():
        first = next(iter(results.values()))
        whole = first["all"]
        lines += [
            f"## {source}",
            "",
            f"{whole['frames']} frames of {whole['systems']} systems with {first['bulks']} bulk formulas. "
            f"Zero forces have a force MAE of {whole['trivial_force_mae_eV_A']:.4f} eV/Å, the frames' mean "
            f"energy an energy MAE of {whole['trivial_energy_mae_eV']:.3f} eV.",
            "",
        ]
        if first["trained_systems"]:
            lines[-2] += f" **{first['trained_systems']} of the systems are in the training data.**"
        for columns in (COLUMNS, OTHER_MEANS):
            rows = [
                [name, *(cell(result["all"][key], digits) for key, _, digits in columns)]
                for name, result in results.items()
            ]
            lines += table(["checkpoint", *(title for _, title, _ in columns)], rows)
        known = ", ".join(f"`{path}`" for path in record["trained_on"])
        seen = f" Seen are the bulk formulas of {known}." if known else ""
        lines += [f"Force ratio, cosine and energy ratio of groups of frames.{seen}", ""]
        rows = [
            [f"{title}: {name}" if name.isdigit() else name, str(row["frames"]), str(row["systems"])]
            + [
                cell(result["groups"][title][name][key], 2)
                for result in results.values()
                for key in IN_BREAKDOWNS
            ]
            for title, groups in first["groups"].items()
            for name, row in groups.items()
        ]
        lines += table(["frames with", "frames", "systems", *_heads(results, ("F", "cos", "E"))], rows)
        rows = [
            [name, kind, str(row["frames"]), str(row["systems"])]
            + [cell(row[key], 2) for key in IN_BREAKDOWNS]
            for name, result in results.items()
            for kind, row in result["named"].items()
        ]
        if rows:
            head = ["checkpoint", "new", "frames", "systems", "force ratio", "cosine", "energy ratio"]
            lines += [
                "By the first thing of a frame that the checkpoint names as missing in its training data",
                "([when not to trust](../own_data.md#when-not-to-trust)):",
                "",
                *table(head, rows),
            ]
        lines += ["By element: ratios of the force MAE of its free atoms and of the energy MAE.", ""]
        rows = [
            [name, str(row["frames"]), str(row["free_atoms"])]
            + [
                cell(result["elements"][name][key], 2)
                for result in results.values()
                for key in ("force_ratio", "energy_ratio")
            ]
            for name, row in first["elements"].items()
        ]
        lines += table(["element", "frames", "free atoms", *_heads(results, ("F", "E"))], rows)
    return "\n".join(lines).rstrip() + "\n"


def _heads(results: Mapping[str, Any], short: Sequence[str]) -> list[str]:
    """Column titles of a breakdown; the checkpoint's name only where there are several."""
    return [f"{name} {one}" if len(results) > 1 else one for name in results for one in short]


def draw(results: Mapping[str, Any], title: str, target: AnyPath) -> None:
    """Draw force errors by element as bars, and both errors by the adsorbate's size as curves.

    Args:
        results: checkpoint -> `collect`.
        title: title of the figure.
        target: PNG file to write.
    """
    names = list(results)
    elements = list(results[names[0]]["elements"])
    figure = Figure(figsize=(max(8.0, 0.32 * len(elements) + 1), 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    axis = figure.add_subplot(grid[0, :])
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        heights = [results[name]["elements"][element]["force_ratio"] or 0.0 for element in elements]
        axis.bar(np.arange(len(elements)) + (number + 0.5) * width - 0.4, heights, width, label=name)
    axis.set_xticks(range(len(elements)), elements, fontsize=8)
    axis.set(ylabel="force MAE / zero forces", xlim=(-0.6, len(elements) - 0.4))
    axis.axhline(1.0, color="0.4", linestyle=":", linewidth=1)
    axis.legend(fontsize="small")
    axis.grid(axis="y", alpha=0.3)
    labels = ("force MAE / zero forces", "cosine", "energy MAE / mean energy")
    for column, (key, label) in enumerate(zip(IN_BREAKDOWNS, labels, strict=True)):
        panel = figure.add_subplot(grid[1, column])
        for name in names:
            rows = results[name]["groups"]["atoms of the adsorbate"]
            points = [(int(size), row[key]) for size, row in rows.items() if row[key] is not None]
            panel.plot(*np.array(points, dtype=float).reshape(-1, 2).T, "o-", markersize=3, label=name)
        panel.set(xlabel="atoms of the adsorbate", ylabel=label)
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, target)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", nargs="+", required=True, help="files, or names of shipped models")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[LARGE / "test"],
        help="raw folders with index.jsonl, or LMDB files; the figure is of the first",
    )
    parser.add_argument(
        "--index",
        nargs="+",
        type=Path,
        default=list(INDEX),
        help="folders whose index.jsonl lists the systems of LMDB files",
    )
    parser.add_argument(
        "--trained-on",
        nargs="+",
        type=Path,
        default=[],
        help="LMDB files or folders of the training data: their bulks are the seen ones",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="structures per batch")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/study_errors"), help="errors by frame, kept to go on"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/study_errors"), help="written as .json, .md, .png"
    )
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size is {arguments.batch_size}: give 1 or more")
    checkpoints = {Path(name).stem: find_checkpoint(name) for name in arguments.checkpoints}
    if len(checkpoints) < len(arguments.checkpoints):
        raise InputError("two of the --checkpoints have one file name: the tables could not tell them apart")
    for path in arguments.data:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder.")
    for suffix in (".json", ".md", ".png"):
        check_target(arguments.results.with_suffix(suffix), inputs=[*arguments.data, *checkpoints.values()])
    seen = seen_systems(arguments.trained_on, arguments.index)
    data: dict[str, dict[str, Row]] = {}
    known = {source: systems_of(source, arguments.index) for source in arguments.data}
    for name, path in checkpoints.items():
        predictor = Predictor(path)
        for source in arguments.data:
            frames = frame_errors(predictor, Path(path), source, arguments.runs, arguments.batch_size)
            systems = look_up(frames.sid, known[source], source)
            result = collect(frames, systems, seen)
            data.setdefault(source.as_posix(), {})[name] = result
            shown = ", ".join(f"{title} {cell(result['all'][key], d)}" for key, title, d in COLUMNS)
            print(f"{name} on {source}: {shown}")
    sums = {name: sha256(Path(path)) for name, path in checkpoints.items()}
    trained_on = [path.as_posix() for path in arguments.trained_on]
    record = {**header(SCHEMA), "checkpoints_sha256": sums, "trained_on": trained_on, "data": data}
    write_json(arguments.results.with_suffix(".json"), record, make_folder=True)
    picture = arguments.results.with_suffix(".png")
    source = arguments.data[0].as_posix()
    draw(data[source], f"errors on {source}", picture)
    page = markdown(json.loads(json.dumps(record)), picture.name)
    write_bytes(arguments.results.with_suffix(".md"), page.encode())
    print(f"{arguments.results.with_suffix('.md')} is written")


if __name__ == "__main__":
    run_script(main)
