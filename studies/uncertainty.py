"""Coverage of the 90 % interval of a committee, and rank correlation of its spread with its error.

    python -m studies.study_data
    python -m studies.study_training --part seeds       # three trainings of about 40 minutes on one core
    equiformer2 prune plan --checkpoint study_teacher --data runs/data/study/train.lmdb \\
        --target macs=0.7 --out runs/pruned.json
    equiformer2 prune apply --checkpoint study_teacher --plan runs/pruned.json --out runs/pruned.pt
    python -m studies.uncertainty --seeds runs/study_training/seeds-seed_?/checkpoints/last.pt \\
        --twins models/study_teacher.pt runs/pruned.pt

Two committees are compared on data with labels: checkpoints that were trained from other seeds (`--seeds`),
and the twins of one network (`--twins`: the full one, its pruned copies, and the full one in bfloat16, which
is added here). Predictions of every member are kept in `--runs`, so that a stopped command goes on.

- error: |mean of the members - label|; spread: standard deviation over the members (n - 1). Of forces both
  are root mean squares over the components of a frame's free atoms; coverage counts components.
- 90 % interval: mean ± t · spread · sqrt(1 + 1/n), with Student's t for n members. It holds 90 % of the
  labels if a label is to the members as a further member would be.
- factor: by which the interval has to be stretched to hold 90 % of the labels, found on half of the systems;
  `after stretching` is the coverage on the other half.
- rank correlation: Spearman's, over frames, with its 90 % interval by drawing systems anew.
- shared: part of the members' mean squared error that all have in common (that of their mean), which no
  spread can show.

The spread of a committee fails where the interval holds less than 80 % of the labels, where the rank
correlation is below 0.3 or may be 0, or where more than 90 % of the squared error are shared.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr, t

from datasets_oc20 import DataError, OC20Lmdb
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, whole_file, write_bytes, write_json
from equiformer2.inference import Predictor
from equiformer2.script import header, run_script
from equiformer2.shipped import find_checkpoint
from equiformer2.training.breakdown import ADSORBATE
from equiformer2.training.evaluation import check_targets, predicted_batches
from equiformer2.training.figures import save_figure
from studies.study_errors import INDEX, LARGE, cell, groupings, look_up, open_source, systems_of, table

SCHEMA = "uncertainty/1"
LEVEL = 0.9
#: Below these an interval is too narrow, and a spread does not rank.
LOWEST_COVERAGE, LOWEST_RANK = 0.8, 0.3
#: Above this nearly all of the error is common to all members.
MOST_SHARED = 0.9
_DRAWS = 200
_TWIN = "bf16"
Row = dict[str, Any]
Member = tuple[Path, str]
"""Checkpoint and precision."""


@dataclass
class Labelled:
    """Predictions of one member for the frames of one data set, beside the labels.

    Attributes:
        sid: system of each of n frames.
        energies: `[n, 2]` eV, label and prediction.
        free: `[n]` number of free atoms.
        forces: `[free.sum(), 2, 3]` eV/Å of free atoms, label and prediction.
        adsorbate_atoms: `[n]`.
    """

    sid: np.ndarray
    energies: np.ndarray
    free: np.ndarray
    forces: np.ndarray
    adsorbate_atoms: np.ndarray

    @classmethod
    def compute(cls, predictor: Predictor, dataset: OC20Lmdb, batch_size: int, name: str) -> "Labelled":
        """Predict every frame of a data set.

        Raises:
            InputError: no forces, a frame without targets or without a free atom.
        """
        if not predictor.has_forces:
            raise InputError("the checkpoint predicts no forces: this study compares forces")
        check_targets(dataset[0], True, name)
        sid: list[str] = []
        energies, free, forces, sizes = [], [], [], []
        for batch, out in predicted_batches(predictor.predict_batches, dataset, batch_size, None, 0, True):
            mask = ~batch.fixed.bool()
            counts = [int(part.sum()) for part in mask.split(batch.natoms.tolist())]
            if min(counts) == 0:
                raise InputError(f"{name}: a frame of {batch.sid[counts.index(0)]} has no free atom to judge")
            sid += [str(one) for one in batch.sid]
            energies.append(np.stack([batch.energy.view(-1).double(), out["energy"].view(-1).double()], 1))
            forces.append(np.stack([batch.forces[mask].double(), out["forces"][mask].double()], 1))
            free += counts
            tags = (batch.tags == ADSORBATE).split(batch.natoms.tolist())
            sizes += [int(part.sum()) for part in tags]
        joined = np.concatenate(energies), np.array(free), np.concatenate(forces)
        return cls(np.array(sid), *joined, np.array(sizes))

    @classmethod
    def stored(cls, member: Member, source: Path, runs: Path, batch_size: int) -> "Labelled":
        """Predict, or read what an earlier run has predicted."""
        checkpoint, precision = member
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        stamp = sum(file.stat().st_mtime_ns + file.stat().st_size for file in files) % 10**9
        kept = runs / f"{sha256(checkpoint)[:16]}_{precision}_{source.parent.name}-{source.stem}_{stamp}.npz"
        if not kept.exists():
            predictor = Predictor(checkpoint, precision=precision)
            with open_source(source, predictor) as dataset:
                found = cls.compute(predictor, dataset, batch_size, str(source))
            with whole_file(kept) as file:
                np.savez(file, **vars(found))
        with np.load(kept) as arrays:
            return cls(**arrays)


@dataclass
class Spread:
    """Errors and spreads of a committee, by frame.

    Attributes:
        members: their number.
        energy: `[n, 3]` eV: error of the mean (signed), spread, root mean square error of a member.
        force: `[F, 3]` the same by component, eV/Å.
        frame: `[F]` frame of each component.
    """

    members: int
    energy: np.ndarray
    force: np.ndarray
    frame: np.ndarray

    @classmethod
    def of(cls, members: Sequence[Labelled]) -> "Spread":
        """Compare members with each other and with the labels.

        Raises:
            InputError: fewer than two members, or other frames.
        """
        if len(members) < 2:
            raise InputError("a committee has at least two members: give more checkpoints")
        first = members[0]
        if any(not np.array_equal(one.sid, first.sid) for one in members):
            raise InputError("the members were given other frames: remove what --runs holds of them")

        def compared(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
            of_members = np.sqrt(((values - labels) ** 2).mean(axis=0))
            return np.stack([values.mean(axis=0) - labels, values.std(axis=0, ddof=1), of_members], axis=1)

        energy = compared(first.energies[:, 0], np.stack([one.energies[:, 1] for one in members]))
        parts = np.stack([one.forces[:, 1].reshape(-1) for one in members])
        frame = np.repeat(np.arange(len(first.sid)), 3 * first.free)
        return cls(len(members), energy, compared(first.forces[:, 0].reshape(-1), parts), frame)

    @property
    def width(self) -> float:
        """Half of the 90 % interval in spreads."""
        return float(t.ppf((1 + LEVEL) / 2, self.members - 1) * np.sqrt(1 + 1 / self.members))

    def summary(self, chosen: np.ndarray, sid: np.ndarray) -> dict[str, Row]:
        """Numbers of the frames of a mask `[n]`, for `energy` (eV) and `forces` (eV/Å)."""
        frames = np.flatnonzero(chosen)
        components = chosen[self.frame]
        place = np.cumsum(chosen) - 1
        frame = place[self.frame[components]]
        squares = self.force[components] ** 2
        by_frame = np.stack(
            [np.bincount(frame, column, len(frames)) / np.bincount(frame) for column in squares.T], axis=1
        )
        return {
            "energy": self._row(self.energy[frames], np.abs(self.energy[frames]), sid[frames], frames),
            "forces": self._row(self.force[components], np.sqrt(by_frame), sid[frames], frame),
        }

    def _row(self, parts: np.ndarray, frames: np.ndarray, sid: np.ndarray, owner: np.ndarray) -> Row:
        """Numbers of one quantity.

        Args:
            parts: `[p, 3]` what coverage counts, as `energy`.
            frames: `[n, 3]` the same by frame, errors without sign.
            sid: `[n]` systems of the frames.
            owner: `[p]` frame of each part; read where parts are components.
        """
        owner = np.arange(len(frames)) if len(parts) == len(frames) else owner
        inside = np.abs(parts[:, 0]) <= self.width * parts[:, 1]
        random = np.random.default_rng(0)
        systems = np.unique(sid)
        half = np.isin(sid, random.permutation(systems)[: max(1, len(systems) // 2)])[owner]
        ratio = np.abs(parts[:, 0]) / np.maximum(self.width * parts[:, 1], 1e-12)
        factor = float(np.quantile(ratio[half], LEVEL))
        stretched = float((ratio[~half] <= factor).mean()) if (~half).any() else None
        whole = _rank(frames[:, 0], frames[:, 1])
        draws = []
        members = [np.flatnonzero(sid == one) for one in systems]
        for _ in range(_DRAWS):
            drawn = np.concatenate([members[one] for one in random.integers(len(systems), size=len(systems))])
            draws.append(_rank(frames[drawn, 0], frames[drawn, 1]))
        known = [one for one in draws if one is not None]
        interval = [float(one) for one in np.quantile(known, [0.05, 0.95])] if known else None
        mean_square = float((parts[:, 2] ** 2).mean())
        return {
            "frames": len(frames),
            "systems": len(systems),
            "mean_error": float(frames[:, 0].mean()),
            "mean_spread": float(frames[:, 1].mean()),
            "coverage": float(inside.mean()),
            "factor": factor,
            "coverage_after_stretching": stretched,
            "rank_correlation": whole,
            "rank_correlation_90": interval,
            "shared": float((parts[:, 0] ** 2).mean()) / mean_square if mean_square > 0 else None,
        }


def _rank(error: np.ndarray, spread: np.ndarray) -> float | None:
    """Spearman's rank correlation; None where a column is constant."""
    if len(error) < 3 or not np.ptp(error) or not np.ptp(spread):
        return None
    return float(spearmanr(error, spread).statistic)


def verdict(name: str, quantity: str, row: Row) -> str:
    """Say when the spread of a committee may not be trusted."""
    said = []
    if row["coverage"] < LOWEST_COVERAGE:
        said.append(
            f"the 90 % interval holds {row['coverage']:.0%} of the labels: it is too narrow, by a factor of "
            f"{row['factor']:.1f}"
        )
    rank, interval = row["rank_correlation"], row["rank_correlation_90"]
    if rank is None or rank < LOWEST_RANK or interval is None or interval[0] <= 0:
        shown = "no rank correlation" if rank is None else f"a rank correlation of {rank:.2f}"
        said.append(f"the spread does not tell large errors from small ones ({shown})")
    if row["shared"] is not None and row["shared"] > MOST_SHARED:
        said.append(f"{row['shared']:.0%} of the squared error is common to all members")
    failing = "; ".join(said)
    return f"{name}, {quantity}: " + (f"fails: {failing}." if said else "holds by these measures.")


def measure(members: Sequence[Labelled], groups: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Numbers of one committee on one data set: `all`, `groups`, and `bins` for the figure."""
    spread, sid = Spread.of(members), members[0].sid
    everything = np.ones(len(sid), dtype=bool)
    order = np.array_split(np.argsort(spread.energy[:, 1], kind="stable"), min(10, len(sid)))
    return {
        "members": spread.members,
        "all": spread.summary(everything, sid),
        "groups": {
            title: {name: spread.summary(chosen, sid) for name, chosen in rows.items()}
            for title, rows in groups.items()
        },
        "bins": [
            [float(np.sqrt((spread.energy[part, column] ** 2).mean())) for column in (1, 0)] for part in order
        ],
    }


_HEAD = ("coverage", "factor", "after stretching", "rank correlation", "its 90 % interval", "shared")


def _cells(row: Row) -> list[str]:
    interval = row["rank_correlation_90"]
    return [
        f"{row['coverage']:.0%}",
        f"{row['factor']:.1f}",
        "–" if row["coverage_after_stretching"] is None else f"{row['coverage_after_stretching']:.0%}",
        cell(row["rank_correlation"], 2),
        "–" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
        "–" if row["shared"] is None else f"{row['shared']:.0%}",
    ]


def markdown(record: Mapping[str, Any], picture: str) -> str:
    """Page of the results."""
    lines = [
        "# Uncertainty of committees",
        "",
        f"Made by `{record['command']}`, whose help defines every number.",
        "",
        f"![error and spread]({picture})",
        "",
    ]
    for source, committees in record["data"].items():
        lines += [f"## {source}", ""]
        for quantity, unit in (("energy", "eV"), ("forces", "eV/Å")):
            rows = []
            for name, result in committees.items():
                row = result["all"][quantity]
                numbers = [f"{row['mean_error']:.3f}", f"{row['mean_spread']:.3f}"]
                rows.append([name, str(result["members"]), str(row["frames"]), *numbers, *_cells(row)])
            head = [quantity, "members", "frames", f"error ({unit})", f"spread ({unit})", *_HEAD]
            lines += table(head, rows)
        lines += ["When they fail:", ""]
        lines += [
            f"- {verdict(name, quantity, result['all'][quantity])}"
            for name, result in committees.items()
            for quantity in ("energy", "forces")
        ]
        rows = [
            [name, group, str(row["energy"]["frames"]), *_cells(row["energy"])]
            for name, result in committees.items()
            for groups in result["groups"].values()
            for group, row in groups.items()
        ]
        if rows:
            lines += ["", "Energies of groups of frames:", ""]
            lines += table(["committee", "frames with", "frames", *_HEAD], rows)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Draw the error of energies over the spread, in ten parts of equal numbers of frames."""
    figure = Figure(figsize=(5.2 * len(data), 4.4), layout="constrained")
    axes = figure.subplots(1, len(data), squeeze=False)[0]
    for axis, (source, committees) in zip(axes, data.items(), strict=True):
        for name, result in committees.items():
            axis.plot(*np.maximum(np.array(result["bins"]).T, 1e-6), "o-", markersize=4, label=name)
        low = max(1e-6, min(min(point) for one in committees.values() for point in one["bins"]))
        high = max(max(point) for one in committees.values() for point in one["bins"])
        axis.plot([low, high], [low, high], color="0.4", linestyle=":", label="error = spread")
        axis.set(xscale="log", yscale="log", title=source, xlabel="spread (eV)", ylabel="error (eV)")
        axis.legend(fontsize="small")
    save_figure(figure, path)


def committees_of(seeds: Sequence[str], twins: Sequence[str]) -> dict[str, list[Member]]:
    """Members of the committees.

    Raises:
        InputError: no committee, or one of fewer than two members.
    """
    found: dict[str, list[Member]] = {}
    if seeds:
        found["seeds"] = [(find_checkpoint(one), "float32") for one in seeds]
    if twins:
        files = [find_checkpoint(one) for one in twins]
        found["twins"] = [*((one, "float32") for one in files), (files[0], _TWIN)]
    if not found or min(len(set(members)) for members in found.values()) < 2:
        raise InputError("give --seeds with two or more checkpoints of other seeds, or --twins, or both")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", default=[], help="checkpoints of other seeds")
    parser.add_argument(
        "--twins", nargs="+", default=[], help="the full network, and its pruned copies; bfloat16 is added"
    )
    parser.add_argument(
        "--data", nargs="+", type=Path, default=[LARGE / "test"], help="raw folders or LMDB files with labels"
    )
    parser.add_argument(
        "--index",
        nargs="+",
        type=Path,
        default=list(INDEX),
        help="folders that list the systems of LMDB files",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="structures per batch")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/uncertainty"), help="predictions, kept to go on"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/uncertainty"), help="written as .json, .md, .png"
    )
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size is {arguments.batch_size}: give 1 or more")
    committees = committees_of(arguments.seeds, arguments.twins)
    for path in arguments.data:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder.")
    for suffix in (".json", ".md", ".png"):
        check_target(arguments.results.with_suffix(suffix), inputs=arguments.data)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    data: dict[str, dict[str, Any]] = {}
    for source in arguments.data:
        for name, members in committees.items():
            found = [Labelled.stored(one, source, arguments.runs, arguments.batch_size) for one in members]
            groups = _groups(found[0], source, arguments.index)
            data.setdefault(source.as_posix(), {})[name] = result = measure(found, groups)
            for quantity, row in result["all"].items():
                print(f"{source}: {verdict(name, quantity, row)}")
    used = {
        name: [{"checkpoint": str(path), "sha256": sha256(path), "precision": kind} for path, kind in members]
        for name, members in committees.items()
    }
    record = {**header(SCHEMA), "level": LEVEL, "committees": used, "data": data}
    write_json(arguments.results.with_suffix(".json"), record, make_folder=True)
    picture = arguments.results.with_suffix(".png")
    draw(data, picture)
    page = markdown(read_json(arguments.results.with_suffix(".json")), picture.name)
    write_bytes(arguments.results.with_suffix(".md"), page.encode())
    print(f"{arguments.results.with_suffix('.md')} is written")


def _groups(frames: Labelled, source: Path, index: Sequence[Path]) -> dict[str, dict[str, np.ndarray]]:
    """Divisions of the frames, where an index lists their systems."""
    known = systems_of(source, [folder for folder in index if (folder / "index.jsonl").is_file()])
    if not set(frames.sid) <= set(known):
        return {}
    return groupings(look_up(list(frames.sid), known, source), frames.adsorbate_atoms, None)


if __name__ == "__main__":
    run_script(main)
