"""Area under the ROC curve with which distances of embeddings tell foreign structures from familiar ones.

    python -m studies.familiarity              # minutes on one core; writes docs/results/familiarity.*

Each checkpoint embeds structures of its training set (on which the reference is fitted), of `val` (bulks kept
back, on which the limit is calibrated), of `test` (other bulks kept back: the familiar ones, as far as all
their elements are in the training set) and of the parts that differ on purpose: `shift_elements` (Se or Te in
the bulk) and `shift_adsorbates` (an N-N bond). The score of a structure is the distance of its farthest atom.
Embeddings are kept in `--runs`, so that a stopped command goes on where it was.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import add_adsorbate, fcc111, molecule
from ase.constraints import FixAtoms
from matplotlib.figure import Figure
from scipy.spatial import cKDTree
from scipy.stats import rankdata
from torch import Tensor

from datasets_oc20 import OC20Lmdb
from datasets_oc20.preprocess import PreprocessOptions, preprocess
from equiformer2.checkpoint.surroundings import Surroundings, SurroundingsFit, quantiles_of
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.files import read_json, whole_file, write_bytes, write_json
from equiformer2.inference import Predictor
from equiformer2.inference.seen_data import evenly_spaced_batches
from equiformer2.script import header, run_script
from equiformer2.shipped import find_checkpoint
from equiformer2.training.figures import save_figure
from studies.study_data import LABELS

LARGE = Path("data/teacher_large")
STUDY = Path("runs/data/study")
#: Training data by checkpoint. That of oc20_small is in part OC20's own (data/oc20_trajs), which is left out.
TRAINED_ON = {"study_teacher": "train", "oc20_small": "older"}
NOTES = {
    "oc20_small": "Its training data hold Se and Te (and OC20 frames), which this reference leaves out: what "
    "is measured is the distance to the reference, not to what the network has seen."
}
SHIFTED = ("shift_elements", "shift_adsorbates")
Features = dict[str, np.ndarray]
Distances = Callable[[Features], np.ndarray]


def data_file(part: str, runs: Path) -> Path:
    """LMDB file of a part; those of the shifted parts are written first."""
    if part not in SHIFTED:
        return STUDY / f"{part}.lmdb"
    path = runs / f"{part}.lmdb"
    if not path.exists():
        preprocess(LARGE / part, path, PreprocessOptions(labels=LABELS))
    return path


def embedded(predictor: Predictor, checkpoint: Path, part: str, runs: Path, most: int) -> Features:
    """Embed evenly spaced structures of a part, or read what an earlier run has embedded.

    Returns:
        `features` `[N, C]`, `numbers` `[N]` and `structure` `[N]`, the structure of each atom.
    """
    kept = runs / f"{sha256(checkpoint)[:16]}_{part}_{most}.npz"
    if not kept.exists():
        features, numbers, structure, count = [], [], [], 0
        dataset = OC20Lmdb(data_file(part, runs), "adsorption")
        for batch in evenly_spaced_batches(dataset, most, f"{checkpoint.stem}, {part}"):
            features.append(predictor.embed(batch).numpy())
            numbers.append(batch.atomic_numbers.numpy())
            structure.append(count + batch.batch.numpy())
            count += batch.num_graphs
        with whole_file(kept) as file:
            np.savez(
                file,
                features=np.concatenate(features),
                numbers=np.concatenate(numbers),
                structure=np.concatenate(structure),
            )
    with np.load(kept) as arrays:
        return dict(arrays)


def farthest(distances: np.ndarray, atoms: Features, of: np.ndarray | None = None) -> np.ndarray:
    """Largest distance in each structure, over the atoms marked in `of`; -inf where there is none."""
    found = np.full(atoms["structure"].max() + 1, -np.inf)
    use = slice(None) if of is None else of
    np.maximum.at(found, atoms["structure"][use], distances[use])
    return found


def area(foreign: np.ndarray, familiar: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a foreign structure scores above a familiar one."""
    ranks = rankdata(np.concatenate([foreign, familiar]))[: len(foreign)].sum()
    return float((ranks - len(foreign) * (len(foreign) + 1) / 2) / (len(foreign) * len(familiar)))


def fitted(atoms: Features, by_element: bool = True) -> Surroundings:
    """Fit the reference of `checkpoint.surroundings`; with one mean for all atoms unless `by_element`."""
    fit = SurroundingsFit(atoms["features"].shape[1])
    numbers = torch.from_numpy(atoms["numbers"])
    fit.add(torch.from_numpy(atoms["features"]), numbers if by_element else torch.zeros_like(numbers))
    return fit.finish("raw", {})


def distance_kinds(training: Features) -> dict[str, Distances]:
    """Distances of atoms to the training atoms that are compared; the first one is the package's."""
    own, pooled = fitted(training), fitted(training, by_element=False)

    def tensors(atoms: Features) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(atoms["features"]), torch.from_numpy(atoms["numbers"])

    whitening = own.whitening.double().numpy()
    points = training["features"] @ whitening.T
    trees = {
        int(number): cKDTree(points[training["numbers"] == number])
        for number in np.unique(training["numbers"])
    }
    everything = cKDTree(points)

    def nearest(atoms: Features) -> np.ndarray:
        found = np.empty(len(atoms["numbers"]))
        for number in np.unique(atoms["numbers"]):
            mine = atoms["numbers"] == number
            tree = trees.get(int(number), everything)
            found[mine] = tree.query(atoms["features"][mine] @ whitening.T)[0]
        return found

    return {
        "mean of the element": lambda atoms: own.distances(*tensors(atoms)).numpy(),
        "mean of all atoms": lambda atoms: pooled.distances(*tensors(atoms)).numpy(),
        "nearest training atom": nearest,
    }


def measure(parts: Mapping[str, Features], distances: Distances) -> dict[str, Any]:
    """Areas under the curve and shares over the limit of one checkpoint and kind of distance."""
    seen = np.unique(parts["train"]["numbers"])
    known = {name: np.isin(atoms["numbers"], seen) for name, atoms in parts.items()}
    whole = {
        name: ~np.isin(np.arange(atoms["structure"].max() + 1), atoms["structure"][~known[name]])
        for name, atoms in parts.items()
    }
    values = {name: distances(atoms) for name, atoms in parts.items()}
    scores = {name: farthest(values[name], parts[name]) for name in parts}
    familiar, calibration = scores["test"][whole["test"]], scores["val"][whole["val"]]
    limit = float(quantiles_of(calibration.tolist())[99])
    foreign = parts["shift_elements"]
    others = farthest(values["shift_elements"], foreign, known["shift_elements"])
    groups = {
        "Se or Te": scores["shift_elements"],
        "Se or Te, its seen atoms alone": others[np.isfinite(others)],
        "adsorbate with N-N, seen elements": scores["shift_adsorbates"][whole["shift_adsorbates"]],
        "other bulks kept back (val), seen elements": calibration,
        "test bulks with an unseen element": scores["test"][~whole["test"]],
    }
    return {
        "familiar_structures": len(familiar),
        "familiar_over_limit": float((familiar > limit).mean()),
        "limit": limit,
        "groups": {
            name: {
                "structures": len(score),
                "area": area(score, familiar),
                "over_limit": float((score > limit).mean()),
            }
            for name, score in groups.items()
            if len(score)
        },
        "scores": {"familiar": familiar.tolist(), **{name: score.tolist() for name, score in groups.items()}},
    }


def carbon_monoxide_on_platinum(
    predictor: Predictor, training: Features, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """Judge CO on Pt(111), 3 x 3 x 4 atoms, with the fitted reference."""
    limit = measured["limit"]
    slab = fcc111("Pt", (3, 3, 4), vacuum=10.0, periodic=True)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() > 2))
    slab.set_tags([int(layer == 1) for layer in slab.get_tags()])
    add_adsorbate(slab, molecule("CO"), 1.85, "ontop", mol_index=1)
    slab.set_tags([*slab.get_tags()[:36], 2, 2])
    distances = fitted(training).distances(predictor.embed(slab), torch.from_numpy(slab.numbers))
    seen = {int(number) for number in training["numbers"]}
    return {
        "unseen_elements": sorted({a.symbol for a in slab if a.number not in seen}),
        "distance": float(distances.max()),
        "limit": limit,
        "atoms_over_limit": int((distances > limit).sum()),
        "share_of_familiar_nearer": float(
            (np.array(measured["scores"]["familiar"]) < float(distances.max())).mean()
        ),
    }


def markdown(record: Mapping[str, Any], picture: str) -> str:
    """Page of the results."""
    lines = [
        "# Distance of embeddings to the training set",
        "",
        f"Made by `{record['command']}`. A structure's score is the largest distance of an atom; areas",
        "are under the ROC curve against structures of bulks kept back, with elements of the training",
        "set alone (0.5: not told apart, 1: always). *Over the limit*: farther than 99 % of those on which",
        "the limit was calibrated (`val`: other bulks kept back, seen elements), which the calculator names.",
        "The distance to the mean of the element is the one in use. That to the mean of all atoms rises with",
        "nitrogen, which is rare, so its area for N-N is not about new adsorbates.",
        "",
        f"![distances]({picture})",
    ]
    for name, result in record["checkpoints"].items():
        used = result["kinds"]["mean of the element"]
        lines += [
            "",
            f"## {name}",
            "",
            f"Reference from {result['training_structures']} structures of `{result['trained_on']}.lmdb`.",
            "",
            "| structures | number | area | over the limit | area, mean of all atoms | area, nearest atom |",
            "|---|---|---|---|---|---|",
            f"| familiar: test bulks of seen elements | {used['familiar_structures']} | | "
            f"{used['familiar_over_limit']:.0%} | | |",
        ]
        for group, row in used["groups"].items():
            others = [
                result["kinds"][kind]["groups"][group]["area"]
                for kind in ("mean of all atoms", "nearest training atom")
            ]
            lines.append(
                f"| {group} | {row['structures']} | {row['area']:.3f} | {row['over_limit']:.0%} | "
                f"{others[0]:.3f} | {others[1]:.3f} |"
            )
        if result["note"]:
            lines += ["", result["note"]]
        slab = result["co_on_pt"]
        unseen = ", ".join(slab["unseen_elements"]) or "none"
        lines += [
            "",
            f"CO on Pt(111): unseen elements: {unseen}; distance {slab['distance']:.1f}, limit "
            f"{slab['limit']:.1f}, {slab['atoms_over_limit']} of 38 atoms over it; "
            f"{slab['share_of_familiar_nearer']:.0%} of the familiar structures are nearer.",
        ]
    return "\n".join(lines) + "\n"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw the distribution of the scores of each group."""
    checkpoints = record["checkpoints"]
    figure = Figure(figsize=(5.5 * len(checkpoints), 4.6), layout="constrained")
    for axis, (name, result) in zip(
        figure.subplots(1, len(checkpoints), squeeze=False)[0], checkpoints.items(), strict=True
    ):
        used = result["kinds"]["mean of the element"]
        for group, scores in used["scores"].items():
            if scores:
                ordered = np.sort(scores)
                axis.plot(ordered, np.linspace(0.0, 1.0, len(ordered)), label=group)
        axis.axvline(used["limit"], color="black", linestyle="--", label="limit")
        axis.set_xscale("log")
        axis.set(title=name, xlabel="distance of the farthest atom", ylabel="share of structures")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--structures", type=int, default=300, help="structures per part (default: 300)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/familiarity"), help="embeddings, kept to go on"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/familiarity"), help="written as .json, .md, .png"
    )
    arguments = parser.parse_args(argv)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    checkpoints: dict[str, Any] = {}
    for name, trained_on in TRAINED_ON.items():
        path = Path(find_checkpoint(name))
        predictor = Predictor(path)
        names = {"train": trained_on, **{part: part for part in ("val", "test", *SHIFTED)}}
        parts = {
            part: embedded(predictor, path, file, arguments.runs, arguments.structures)
            for part, file in names.items()
        }
        kinds = {
            kind: measure(parts, distances) for kind, distances in distance_kinds(parts["train"]).items()
        }
        checkpoints[name] = {
            "sha256": sha256(path),
            "trained_on": trained_on,
            "note": NOTES.get(name, ""),
            "training_structures": int(parts["train"]["structure"].max()) + 1,
            "kinds": kinds,
            "co_on_pt": carbon_monoxide_on_platinum(predictor, parts["train"], kinds["mean of the element"]),
        }
    record = {**header("familiarity/1"), "checkpoints": checkpoints}
    write_json(arguments.results.with_suffix(".json"), record, make_folder=True)
    record = read_json(arguments.results.with_suffix(".json"))
    draw(record, arguments.results.with_suffix(".png"))
    page = markdown(record, arguments.results.with_suffix(".png").name)
    write_bytes(arguments.results.with_suffix(".md"), page.encode())
    print(page)


if __name__ == "__main__":
    run_script(main)
