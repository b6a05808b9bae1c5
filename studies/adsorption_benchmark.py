"""Adsorption energies of any calculator against DFT: errors after one offset per element, and rankings.

    python -m studies.adsorption_benchmark --checkpoints study_teacher oc20_small

The data (data/xu_kitchin) are PBE energies of C, H, N and O on (111) surfaces, referred to gas atoms. Models
have other references (OC20's are molecules), which differ by a constant per element: it is fitted on copper,
and errors are of the other metals. Rankings need no references: rank correlation over the four sites of each
metal and element, and over the metals at each metal's best site. Structures are those of DFT, not relaxed.

Signs: the adsorption energy here is negative for bound adsorbates, as OC20's, Xu and Kitchin's and
CatBench's. A binding energy is its negative.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from scipy.stats import spearmanr

from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_bytes, write_json
from equiformer2.inference import Engine, open_engine, predict
from equiformer2.inference.named_calculators import calculator_by_name
from equiformer2.script import header, run_script
from equiformer2.shipped import find_checkpoint
from studies.study_errors import cell, table

DATA = Path("data/xu_kitchin/adsorption.json")
FITTED_ON = "Cu"
Row = dict[str, Any]


def read_structures(path: Path = DATA) -> list[tuple[Row, Atoms]]:
    """Read the rows of the data (`metal`, `adsorbate`, `site`, `energy_eV`) with their structures."""
    found = []
    for row in json.loads(path.read_text(encoding="utf-8"))["structures"]:
        atoms = Atoms(row["symbols"], row["positions_A"], cell=row["cell_A"], pbc=True)
        atoms.set_tags([1] * (len(atoms) - 1) + [2])
        found.append(({key: row[key] for key in ("metal", "adsorbate", "site", "energy_eV")}, atoms))
    return found


def model_energies(structures: Sequence[Atoms], model: Engine, kind: str) -> np.ndarray:
    """Compute adsorption energies, eV, up to a constant per element.

    Args:
        structures: slab with one adsorbate atom, the last one.
        model: of adsorption energies; of total energies the energy of the slab alone is subtracted.
        kind: `"adsorption"` or `"total"`.
    """
    energies = np.array([one.get_potential_energy() for one in predict(structures, model)])
    if kind == "total":
        slabs = [atoms[:-1] for atoms in structures]
        energies -= [one.get_potential_energy() for one in predict(slabs, model)]
    return energies


def judge(rows: Sequence[Row], energies: np.ndarray) -> dict[str, Any]:
    """Compare with DFT.

    Args:
        rows: of the data.
        energies: of the model, eV, up to a constant per element.

    Returns:
        `offset_eV` by element; `mae_eV` over all metals but copper, by element and in all, beside
        `trivial_mae_eV` of the mean of copper's energies; `sites` and `metals`: mean rank correlations.

    Raises:
        InputError: there is no copper, or nothing else.
    """
    if {row["metal"] == FITTED_ON for row in rows} != {True, False}:
        raise InputError(
            f"offsets are fitted on {FITTED_ON} and errors are of other metals: give a model that knows both"
        )
    metal, element, dft = (
        np.array([row[key] for row in rows]) for key in ("metal", "adsorbate", "energy_eV")
    )
    sites: list[float] = []
    found: dict[str, Any] = {"offset_eV": {}, "mae_eV": {}, "trivial_mae_eV": {}}
    errors, trivial, metals = [], [], []
    for name in np.unique(element):
        fit, test = ((element == name) & ((metal == FITTED_ON) == on_copper) for on_copper in (True, False))
        offset = float((dft[fit] - energies[fit]).mean())
        error = np.abs(energies[test] + offset - dft[test])
        simple = np.abs(dft[fit].mean() - dft[test])
        errors.append(error)
        trivial.append(simple)
        found["offset_eV"][str(name)] = offset
        found["mae_eV"][str(name)] = float(error.mean())
        found["trivial_mae_eV"][str(name)] = float(simple.mean())
        best = []
        for one in np.unique(metal):
            here = (element == name) & (metal == one)
            sites.append(float(spearmanr(dft[here], energies[here]).statistic))
            best.append((dft[here].min(), energies[here].min()))
        metals.append(float(spearmanr(*np.array(best).T).statistic))
    found["mae_eV"]["all"] = float(np.concatenate(errors).mean())
    found["trivial_mae_eV"]["all"] = float(np.concatenate(trivial).mean())
    return {**found, "sites": float(np.nanmean(sites)), "metals": float(np.nanmean(metals))}


def page(record: Mapping[str, Any]) -> str:
    """Page of the results."""
    lines = [
        "# Atoms on metals, against PBE",
        "",
        f"Made by `{record['command']}`. Single points of 112 structures of Xu and Kitchin (2014); one",
        f"offset per element is fitted on {FITTED_ON}. *Trivial* is the mean of copper's energies for every",
        "metal. Rank correlations: over the four sites of a metal, and over the metals at each one's best",
        "site.",
        "",
    ]
    names = ["all", *next(iter(record["models"].values()))["offset_eV"]]
    head = ["model", *(f"MAE {name} (eV)" for name in names), "rank of sites", "rank of metals"]
    rows = [
        [
            model,
            *(cell(result["mae_eV"][name], 3) for name in names),
            cell(result["sites"], 2),
            cell(result["metals"], 2),
        ]
        for model, result in record["models"].items()
    ]
    left = [
        f"{model}: {', '.join(one['left_out'])}" for model, one in record["models"].items() if one["left_out"]
    ]
    if left:
        lines += [f"Left out, because the model refuses them: {'; '.join(left)}.", ""]
    # Beside each set of metals that a model was judged on.
    trivial = {tuple(one["left_out"]): one["trivial_mae_eV"] for one in record["models"].values()}
    for left_out, errors in sorted(trivial.items()):
        title = "trivial" + (f", without {', '.join(left_out)}" if left_out else "")
        rows.append([title, *(cell(errors[name], 3) for name in names), "–", "–"])
    return "\n".join([*lines, *table(head, rows)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", nargs="*", default=[], help="networks")
    parser.add_argument("--calculators", nargs="*", default=[], help="ASE calculators, or module:factory")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results/adsorption_benchmark"),
        help="written as .json, .md",
    )
    options = parser.parse_args(argv)
    if not options.checkpoints and not options.calculators:
        parser.error("give --checkpoints or --calculators")
    check_target(options.results.with_suffix(".json"), inputs=[options.data])
    rows, structures = zip(*read_structures(options.data), strict=True)
    models: dict[str, Any] = {}
    given: list[tuple[str, Any]] = [(Path(name).stem, find_checkpoint(name)) for name in options.checkpoints]
    given += [(name, calculator_by_name(name)) for name in options.calculators]
    for name, model in given:
        engine = open_engine(model)
        kind = engine.energy_kind or "total"  # of ASE's calculators
        kept, energies, left_out = [], [], []
        for metal in dict.fromkeys(row["metal"] for row in rows):
            places = [place for place, row in enumerate(rows) if row["metal"] == metal]
            try:
                energies.append(model_energies([structures[place] for place in places], engine, kind))
            except InputError as error:
                print(f"{name}: {metal} left out ({error})")
                left_out.append(metal)
                continue
            kept += [rows[place] for place in places]
        models[name] = {
            "energy_kind": kind,
            "left_out": left_out,
            **judge(kept, np.concatenate(energies) if energies else np.empty(0)),
        }
    record = {**header("adsorption-benchmark/1"), "models": models}
    write_json(options.results.with_suffix(".json"), record, make_folder=True)
    text = page(read_json(options.results.with_suffix(".json")))
    write_bytes(options.results.with_suffix(".md"), text.encode())
    print(text)


if __name__ == "__main__":
    run_script(main)
