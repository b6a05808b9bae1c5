"""Command that compares a model with adsorption energies of DFT."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from equiformer2.cli.chosen_model import ChosenModel
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    NETWORK_ONLY,
    add_model_arguments,
    add_overwrite_argument,
    parse_checked,
)
from equiformer2.errors import InputError


class AdsorptionBenchmark(Command):
    """Compare a model with adsorption energies of DFT in a file of CatBench.

    Relaxes DFT's structures of slab, adsorbate and molecules with the model, each once, and counts anomalies
    as CatBench does. Writes benchmark.json, benchmark.png and the relaxations. Stopped at any moment, the
    same command continues.

        equiformer2 adsorption benchmark BM_dataset_adsorption.json --checkpoint oc20_small --out runs/bm
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("file", type=Path, metavar="FILE", help="JSON file of CatBench (.gz, …)")
        add_model_arguments(parser.add_argument_group("model"), committee=True, calculator=True)
        parser.add_argument(
            "--out", required=True, type=Path, metavar="FOLDER", help="folder for the results"
        )
        parser.add_argument(
            "--fmax",
            type=float,
            default=0.05,
            help="convergence threshold of the largest force on a free atom, eV/Å (default: %(default)s)",
        )
        parser.add_argument(
            "--steps",
            type=int,
            default=999,
            help="maximum number of steps per relaxation (default: %(default)s)",
        )
        parser.add_argument(
            "--gas",
            action="append",
            default=[],
            metavar="H2gas=EV,…",
            help="energies of molecules in place of the model's, eV, by their names in the file",
        )
        add_overwrite_argument(parser)

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        return parse_checked(parser, arguments, excludes=NETWORK_ONLY)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.benchmark import CLASSES, evaluate, parity_picture, statistics
        from equiformer2.adsorption.catbench import read_catbench
        from equiformer2.adsorption.search_folder import refuse_other_settings
        from equiformer2.checkpoint.tensor_files import sha256
        from equiformer2.files import as_input_error, check_target, read_json, write_bytes, write_json
        from equiformer2.inference.batched import RelaxationSettings
        from equiformer2.inference.engines import open_engine
        from equiformer2.script import header

        target = options.out / "benchmark.json"
        check_target(target, inputs=[options.file])
        finished = read_json(target) if target.is_file() and not options.overwrite else None
        with as_input_error():
            reactions, left_out = read_catbench(options.file)
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
        chosen = ChosenModel(options)
        settings = RelaxationSettings(fmax=options.fmax, steps=options.steps)
        molecules = named_energies(options.gas)
        if molecules and chosen.energy_kind == "adsorption":
            raise InputError("--gas is of total energies: this model's energies have references of their own")
        settings_told = {
            "file_sha256": sha256(options.file),
            "energy_kind": chosen.energy_kind,
            "fmax_eV_A": options.fmax,
            "steps": options.steps,
            "gas_eV": molecules,
        }
        if finished is not None:
            names = [name for name, value in settings_told.items() if finished.get(name) != value]
            refuse_other_settings(options.out, names, "benchmark")
        engine = open_engine(chosen.calculator)
        rows = evaluate(reactions, engine, chosen.energy_kind, options.out, settings, molecules)
        found = statistics(rows)
        record = {
            **header("adsorption-benchmark/2", chosen.checkpoint),
            "file": str(options.file),
            "model": chosen.record(),
            **settings_told,
            **found,
            "reactions": [row.summary() for row in rows],
            "left_out": left_out,
        }
        if finished is not None and all(finished.get(key) == record[key] for key in ("counts", "reactions")):
            print(f"{options.out} holds this benchmark, finished: nothing is written")
            record = finished
        else:
            picture = parity_picture(rows, options.file.stem)
            write_bytes(options.out / "benchmark.png", picture, make_folder=True)
            write_json(target, record)
        print(f"{'adsorbate':16}{'reactions':>10}{'MAE (eV)':>10}{'normal':>10}{'shift (eV)':>12}")
        for name, one in {**found["by_adsorbate"], "all": {**found, "reactions": len(rows)}}.items():
            values = (one["mae_eV"]["all"], one["mae_eV"]["normal"], one.get("shift_eV"))
            texts = ["" if value is None else f"{value:.3f}" for value in values]
            print(f"{name:16}{one['reactions']:10}{texts[0]:>10}{texts[1]:>10}{texts[2]:>12}")
        print(", ".join(f"{found['counts'][name]} {name.replace('_', ' ')}" for name in CLASSES))
        shifted = found["shifted"]["mae_eV"]["all"]
        if any(one is not None for one in found["shifted"]["shift_eV"].values()):
            print(f"MAE {shifted:.3f} eV without the median error of each adsorbate (other gas references)")
        if found["counts"]["failed"]:
            print(f"first failure: {next(row.reason for row in rows if row.kind == 'failed')}")
        print(f"saved in {options.out}: benchmark.json, benchmark.png, trajectories")
        return Result(record, 3 if found["counts"]["failed"] or left_out else 0)


def named_energies(texts: Sequence[str]) -> dict[str, float]:
    """Energies, eV, by name, from `NAME=EV,NAME=EV`.

    Raises:
        InputError: something else.
    """
    found = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not name or not math.isfinite(found[name]):
            raise InputError(f"--gas {part!r} must be a name and an energy in eV, such as H2gas=-6.98")
    return found
