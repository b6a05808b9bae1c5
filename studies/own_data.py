"""Fine-tuning on own data, from two checkpoints, with and without replay, beside training from scratch.

    python -m studies.study_data                 # original data of models/study_teacher.pt, for replay
    python -m studies.own_data                   # everything: hours on one core; each run can be stopped
    python -m studies.own_data --cases ch3_cu    # one case
    python -m studies.own_data --collect         # only write the page of the runs that there are

Every run is one call of `equiformer2 finetune` in a folder of its own, with its defaults but for the time,
and with the batch size and learning rate that it takes where time is not short. It is continued where it was
stopped; runs on the published page are not computed again. Networks from random weights and learning curves
belong to the plain runs, beside which are runs with replay and, for some sets, with another learning rate or
batch size. OMP_NUM_THREADS=1 for runs side by side.
"""

import argparse
import itertools
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read
from ase.optimize import BFGS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator
from tqdm import tqdm

from datasets_oc20 import LmdbWriter, OC20Lmdb, write_lmdb
from datasets_oc20.preprocess import preprocess
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.finetuning.folder import FineTuneSettings
from equiformer2.finetuning.run import fine_tune
from equiformer2.script import run_script
from equiformer2.shipped import find_checkpoint
from equiformer2.training.figures import save_figure
from studies.results import Results, Row, write_page

OWN = Path("data/own_data")
OC20 = Path("data/oc20_trajs")
STUDY_DATA = Path("runs/data/study/train_1_8.lmdb")
CHECKPOINTS = ("study_teacher", "oc20_small")
KEYS = {
    "energy_mae_eV": "energy (eV)",
    "energy_mae_eV_per_atom": "energy per atom (eV)",
    "force_mae_eV_A": "forces (eV/Å)",
}
#: Errors that the figure shows.
DRAWN = ("energy_mae_eV", "force_mae_eV_A")
_METALS = ("Cu", "Ni", "Pd", "Pt")
_ADSORBATES = ("H", "C", "N", "O")
_SITES = ("ontop", "bridge", "fcc", "hcp")
#: Ways to fine-tune: options in which they differ from the defaults.
PLAIN, REPLAY, FASTER, SMALLER, BOTH = "plain", "replay", "rate 1e-3", "batch 2", "batch 2, rate 1e-3"
OPTIONS: dict[str, dict[str, Any]] = {
    FASTER: {"learning_rate": 1e-3},
    SMALLER: {"batch_size": 2},
    BOTH: {"batch_size": 2, "learning_rate": 1e-3},
}
#: Steps of a relaxation that are kept, so that frames differ.
_KEPT_STEPS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Case:
    """One set of own data.

    Attributes:
        title: words for the page.
        write: writes its files into a folder.
        files: file to learn from and file to judge by; without the second `finetune` divides the first.
        minutes: time for a training, with its share of everything else; with replay, which doubles the
            frames, twice as much.
        seeds: number of trainings of a kind.
        curve: whether parts of the data are tried, too, in plain runs.
        options: ways of `OPTIONS` that are tried, too, from `study_teacher`.
        batch_size: structures per step of the other ways; their learning rate is 5e-4.
        resets: whether the energies are of another kind than the checkpoints'.
        is_original: whether these are original data of `oc20_small`, which are not replayed.
    """

    title: str
    write: Callable[[Path], object]
    files: tuple[str, ...]
    minutes: float
    seeds: int = 1
    curve: bool = False
    resets: bool = True
    is_original: bool = False
    options: tuple[str, ...] = ()
    batch_size: int = 2

    def about(self, way: str) -> dict[str, Any]:
        """Settings of a run by the way to fine-tune."""
        curve = self.curve and way == PLAIN
        # Two kinds of network; a curve takes as long again as its last point; replay doubles the frames.
        times = {PLAIN: 4 if curve else 2, REPLAY: 2}.get(way, 1)
        minutes = self.minutes * self.seeds * times
        return {"minutes": minutes, "seeds": self.seeds, "curve": curve, **OPTIONS.get(way, {})}

    def ways(self, checkpoint: str) -> list[str]:
        """List the ways to fine-tune a checkpoint."""
        replays = not (self.is_original and checkpoint == "oc20_small")
        options = self.options if checkpoint == "study_teacher" else ()
        return [PLAIN, *([REPLAY] if replays else []), *options]


def ch3_cu(folder: Path) -> None:
    """Divide the relaxation of CH3 on Cu(111) into its first 14 and last 8 frames."""
    frames = read(OWN / "ch3_cu111.extxyz", index=":")
    write_lmdb(folder / "first.lmdb", frames[:14], energy_kind="total")
    write_lmdb(folder / "last.lmdb", frames[14:], energy_kind="total")


def hfo2(folder: Path) -> None:
    """Divide HfO2 into cells of 12 and 60 atoms and cells of 96."""
    frames = read(OWN / "hfo2.extxyz", index=":")
    small, large = ([f for f in frames if (len(f) == 96) == is_large] for is_large in (False, True))
    write_lmdb(folder / "small.lmdb", small, energy_kind="total")
    write_lmdb(folder / "large.lmdb", large, energy_kind="total")


def oxides(folder: Path) -> None:
    """Take the oxides with more than five atoms, as the tutorial does."""
    frames = [atoms for atoms in read(OWN / "oxides.db", index=":") if len(atoms) > 5]
    write_lmdb(folder / "oxides.lmdb", frames, energy_kind="total")


def emt(folder: Path) -> None:
    """Relax atoms on (111) slabs of four metals with EMT, some steps of every relaxation."""
    write_lmdb(folder / "emt.lmdb", emt_frames(), energy_kind="total")


def oc20_later(folder: Path) -> None:
    """Divide every bundled OC20 relaxation into its first 70 % and the rest."""
    dataset = OC20Lmdb(oc20(folder / "all.lmdb"))
    rows: dict[str, list[int]] = {}
    for row in range(len(dataset)):
        rows.setdefault(str(dataset[row].sid), []).append(row)
    files = {name: folder / f"{name}.lmdb" for name in ("first", "later")}
    for name, path in files.items():
        with LmdbWriter(path, dataset.energy_kind) as writer:
            for own in rows.values():
                most = round(0.7 * len(own))
                for row in own[:most] if name == "first" else own[most:]:
                    writer.write(dataset[row])
    (folder / "all.lmdb").unlink()


def oc20_other(folder: Path) -> None:
    """Take the bundled OC20 relaxations, to be divided by system."""
    oc20(folder / "oc20.lmdb")


def oc20(path: Path) -> Path:
    """Write the bundled OC20 relaxations to an LMDB file."""
    preprocess(OC20, path)
    return path


CASES = {
    "ch3_cu": Case(
        "CH3 on Cu(111), first frames → last (the easy case)",
        ch3_cu,
        ("first.lmdb", "last.lmdb"),
        minutes=7,
        seeds=3,
        curve=True,
        options=(FASTER,),
    ),
    "emt": Case(
        "EMT: atoms on Cu, Ni, Pd and Pt, other systems",
        emt,
        ("emt.lmdb",),
        minutes=8,
        seeds=3,
        curve=True,
        batch_size=4,
    ),
    "hfo2": Case("HfO2, 12 and 60 atoms → 96", hfo2, ("small.lmdb", "large.lmdb"), minutes=5),
    "oxides": Case(
        "oxides of the public tutorial, other compositions",
        oxides,
        ("oxides.lmdb",),
        minutes=10,
        options=(FASTER, SMALLER, BOTH),
        batch_size=4,
    ),
    "oc20_later": Case(
        "bundled OC20 relaxations, later frames",
        oc20_later,
        ("first.lmdb", "later.lmdb"),
        minutes=10,
        resets=False,
        is_original=True,
        batch_size=8,
    ),
    "oc20_other": Case(
        "bundled OC20 relaxations, other systems",
        oc20_other,
        ("oc20.lmdb",),
        minutes=10,
        resets=False,
        is_original=True,
        options=(FASTER, SMALLER, BOTH),
        batch_size=8,
    ),
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--checkpoints", nargs="+", choices=list(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument(
        "--ways", nargs="+", choices=[PLAIN, REPLAY, *OPTIONS], default=[PLAIN, REPLAY, *OPTIONS]
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/own_data"), help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/own_data"), help="page, without ending"
    )
    parser.add_argument("--collect", action="store_true", help="train nothing: write the results there are")
    arguments = parser.parse_args(words)
    results = Results(arguments.runs, about, arguments.results)
    if not arguments.collect:
        runs = [
            (case, name, way)
            for case in arguments.cases
            for name in arguments.checkpoints
            for way in CASES[case].ways(name)
            if way in arguments.ways
        ]
        for case, name, way in tqdm(runs, desc="runs", unit="run"):
            if results.get(run_name(case, name, way)) is None:
                run(arguments.runs, case, name, way, results)
    report(results, arguments.results)


def about(run: str) -> dict[str, Any] | None:
    """Settings of a run by its name."""
    for case, checkpoint in itertools.product(CASES, CHECKPOINTS):
        setting = CASES[case]
        for way in setting.ways(checkpoint):
            if run_name(case, checkpoint, way) == run:
                return {
                    **{"case": case, "checkpoint": checkpoint, "replay": way == REPLAY},
                    **setting.about(way),
                    "checkpoint_sha256": sha256(find_checkpoint(checkpoint)),
                }
    return None


def run(runs: Path, case: str, checkpoint: str, way: str, results: Results) -> None:
    """Fine-tune one checkpoint on one set, and keep the tables."""
    folder = runs / run_name(case, checkpoint, way)
    setting, data = CASES[case], runs / "data" / case
    about = setting.about(way)
    if not data.exists():
        unfinished = data.with_name(f".{case}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        setting.write(unfinished)
        unfinished.rename(data)
    train, *judged = (data / name for name in setting.files)
    original = [] if setting.is_original and checkpoint == "oc20_small" else [original_data(runs, checkpoint)]
    found = fine_tune(
        FineTuneSettings(
            data=(str(train),),
            val=tuple(map(str, judged)),
            checkpoint=checkpoint,
            out=folder,
            reset_head=setting.resets,
            replay=tuple(original) if way == REPLAY else (),
            old=() if way == REPLAY else tuple(original),
            scratch=way == PLAIN,
            seeds=setting.seeds,
            curve=about["curve"],
            max_minutes=about["minutes"],
            **({"batch_size": setting.batch_size, "learning_rate": 5e-4} | OPTIONS.get(way, {})),
        )
    )
    kept = ("table", "curve", "schedule", "seconds")
    results.keep(folder.name, {name: found[name] for name in kept if name in found})


def original_data(runs: Path, checkpoint: str) -> str:
    """File of frames that a checkpoint was trained on.

    Raises:
        InputError: it has not been made.
    """
    if checkpoint == "study_teacher":
        if not STUDY_DATA.exists():
            raise InputError(f"{STUDY_DATA} is missing: run `python -m studies.study_data` first")
        return str(STUDY_DATA)
    path = runs / "data" / "original.lmdb"
    return str(path if path.exists() else oc20(path))


def run_name(case: str, checkpoint: str, way: str) -> str:
    """Name of the folder of a run."""
    return f"{case}-{checkpoint}" + ("" if way == PLAIN else f"-{way.replace(' ', '_')}")


def way_of(row: Row) -> str:
    """Return the way to fine-tune of a row."""
    about = row["about"]
    return next(
        way
        for way in CASES[about["case"]].ways(about["checkpoint"])
        if run_name(about["case"], about["checkpoint"], way) == row["run"]
    )


def emt_frames(metals: Sequence[str] = _METALS, adsorbates: Sequence[str] = _ADSORBATES) -> list[Atoms]:
    """Frames of EMT relaxations, with constraints, tags and the name of their system."""
    frames = []
    for seed, (metal, adsorbate, site) in enumerate(
        (metal, adsorbate, site) for metal in metals for adsorbate in adsorbates for site in _SITES
    ):
        slab = fcc111(metal, (3, 3, 3), vacuum=8.0, periodic=True)
        add_adsorbate(slab, adsorbate, 1.5, site)
        # Layers count from the surface; the adsorbate has tag 0 in ASE and 2 in OC20.
        layer = slab.get_tags()
        slab.set_tags(np.where(layer == 0, 2, np.where(layer == 1, 1, 0)))
        slab.set_constraint(FixAtoms(mask=layer == 3))
        slab.rattle(0.05, seed=seed)
        slab.info["sid"] = f"{metal}_{adsorbate}_{site}"
        slab.calc = EMT()
        optimizer = BFGS(slab, logfile=None)
        for step, _ in enumerate(optimizer.irun(fmax=0.02, steps=_KEPT_STEPS[-1])):
            if step in _KEPT_STEPS:
                frame = slab.copy()
                frame.calc = EMT()
                frame.get_forces()
                frames.append(frame)
    return frames


def report(results: Results, page: Path) -> None:
    """Write page, numbers and figure of all finished runs.

    Args:
        results: of the runs.
        page: path without ending.

    Raises:
        InputError: there is none.
    """
    rows, figure = results.all(), page.with_suffix(".png")
    has_curve = any("curve" in row for row in rows)
    if has_curve:
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, figure)
    write_page(page, rows, markdown(rows, figure.name if has_curve else None))


def markdown(rows: Sequence[Row], figure: str | None) -> str:
    """Format the page."""
    lines = [
        "# Fine-tuning on own data",
        "",
        "Written by `python -m studies.own_data`, which says what the sets are. Mean absolute errors on",
        "frames that were not trained on, with the standard deviation over seeds. *Old data* are original",
        "ones of the checkpoint, before → after; energies of another kind are not compared. *Steps*: most of",
        "a training, which may end sooner, and the number that it would have without a limit of time.",
        "The learning rate is 5e-4, and a step has 2 frames of sets of up to 50, 4 of up to 2,000, and 8 of",
        "more, but where the row says otherwise.",
        *([] if figure is None else ["", f"![errors over the number of training frames]({figure})"]),
    ]
    for case, setting in CASES.items():
        chosen = [row for row in rows if row["about"]["case"] == case]
        if not chosen:
            continue
        lines += [
            "",
            f"## {setting.title}",
            "",
            "| checkpoint | way | steps | error | before | after | scratch | trivial | old data |",
            "|" + "---|" * 9,
        ]
        for row in chosen:
            for key, words in KEYS.items():
                if "per_atom" in key and not setting.resets:  # adsorption energies
                    continue
                cells = [
                    _cell(row, "new", network, key) for network in ("before", "after", "scratch", "trivial")
                ]
                old = f"{_cell(row, 'old', 'before', key)} → {_cell(row, 'old', 'after', key)}"
                schedule = row["schedule"]
                steps = f"{schedule['steps']:,} of {schedule['wanted']:,}"
                start = f"{row['about']['checkpoint']} | {way_of(row)}"
                lines.append(f"| {start} | {steps} | {words} | {' | '.join(cells)} | {old} |")
        for row in chosen:
            for sentence in row.get("curve", {}).get("sentences", []):
                lines += ["", f"{row['about']['checkpoint']}: {sentence}."]
    return "\n".join(lines) + "\n"


def _cell(row: Row, data: str, network: str, key: str) -> str:
    for item in row["table"]:
        if (item["data"], item["network"]) == (data, network) and item[key] is not None:
            spread = item.get(f"{key}_std")
            digits = 4 if "per_atom" in key else 3
            return f"{item[key]:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
    return "–"


def draw(rows: Sequence[Row], target: Path) -> None:
    """Draw the errors of the learning curves, tuned and from scratch, one column of panels per case."""
    cases = [name for name in CASES if any(row["about"]["case"] == name and "curve" in row for row in rows)]
    figure = Figure(figsize=(5 * len(cases), 7), layout="constrained")
    axes = figure.subplots(len(DRAWN), len(cases), squeeze=False)
    for column, case in enumerate(cases):
        axes[0, column].set_title(textwrap.fill(CASES[case].title, 44), fontsize="medium")
        for line, key in enumerate(DRAWN):
            axis = axes[line, column]
            frames: set[int] = set()
            shown = [row for row in rows if row["about"]["case"] == case and "curve" in row]
            for row in shown:
                frames |= _draw_curve(axis, row, key)
            trivial = next(item[key] for item in shown[0]["table"] if item["network"] == "trivial")
            axis.axhline(trivial, color="0.4", linestyle="--", label="trivial")
            axis.set(xlabel="training frames", ylabel=KEYS[key], xscale="log", yscale="log")
            axis.set_xticks(sorted(frames), [str(number) for number in sorted(frames)])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.grid(alpha=0.3)
    legends = [axis.get_legend_handles_labels() for axis in axes.flat]
    entries = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", fontsize="small", ncols=len(cases)
    )
    save_figure(figure, target)


def _draw_curve(axis: Axes, row: Row, key: str) -> set[int]:
    """Draw one error of a run, tuned and from scratch, with its spread over seeds; return the frames."""
    found: set[int] = set()
    for network, style in (("after", "-"), ("scratch", ":")):
        points: dict[int, list[float]] = {}
        for point in row["curve"]["points"]:
            if point["network"] == network and point.get(key) is not None:
                points.setdefault(point["frames"], []).append(point[key])
        frames = sorted(points)
        means, spreads = [np.mean(points[n]) for n in frames], [np.std(points[n]) for n in frames]
        words = "tuned" if network == "after" else "from random weights"
        label = f"{row['about']['checkpoint']}, {words}"
        axis.errorbar(frames, means, spreads, fmt=style, marker="o", capsize=3, label=label)
        found |= set(frames)
    return found


if __name__ == "__main__":
    run_script(main)
