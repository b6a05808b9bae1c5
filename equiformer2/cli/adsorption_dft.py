"""Commands about DFT for a search, and about paths between its minima."""

import argparse
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equiformer2.cli.adsorption import GAS_SOURCES, gas_references
from equiformer2.cli.adsorption_benchmark import named_energies
from equiformer2.cli.adsorption_search import add_model_in_place, model_in_place
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import add_overwrite_argument
from equiformer2.errors import InputError

if TYPE_CHECKING:
    from equiformer2.adsorption.finished_search import FinishedSearch
    from equiformer2.inference.engines import Engine


class AdsorptionAsk(Command):
    """Write DFT input for the next structures of a search, and list those that wait for an answer.

    First come structures where a committee's forces differ most, then the lowest minima. Structures that
    were asked before are not asked again. The input is in FOLDER/dft, and FOLDER/dft/ledger.json remembers.

        equiformer2 adsorption ask runs/co --number 3
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a search")
        parser.add_argument(
            "--number",
            type=int,
            default=5,
            help="structures to ask, 0 to list only (default: %(default)s)",
        )
        parser.add_argument(
            "--spread-above",
            type=float,
            default=0.0,
            metavar="X",
            help="standard deviation of a committee's forces, eV/Å, above which a structure comes first "
            "(default: %(default)s)",
        )

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.dft_loop import ask_dft
        from equiformer2.script import header

        asked = ask_dft(options.folder, options.number, options.spread_above)
        new = {str(folder) for folder in asked.folders}
        print(f"{'waits for DFT':24}{'model (eV)':>12}{'spread (eV/Å)':>15}  folder")
        for row in asked.open:
            place = str(options.folder / "dft" / row["folder"])
            values = (row["model_eV"], row["max_force_std_eV_A"])
            energy, spread = ("" if value is None else f"{value:.3f}" for value in values)
            print(f"{row['id']:24}{energy:>12}{spread:>15}  {place}{' (new)' if place in new else ''}")
        print(f"{len(asked.folders)} new; with the outputs in these folders: equiformer2 adsorption collect")
        record = {**header("adsorption-ask/1"), "new": sorted(new), "open": asked.open}
        return Result(record)


class AdsorptionCollect(Command):
    """Read DFT results of a search's structures back, and say whether the model's ranking held.

    Outputs are matched to structures by their atoms, in any order, and remembered: with every call there are
    more. With a result of the clean slab and --gas the energies are adsorption energies; otherwise total
    energies. Writes collect.json and dft/collected.lmdb, which `equiformer2 finetune` reads. Exit status 3 if
    a file that was named is left out.

        equiformer2 adsorption collect --search runs/co
        equiformer2 adsorption collect --search runs/co --dft outputs --gas H2=-6.98,CO=-14.4,H2O=-14.1
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "--search", required=True, type=Path, metavar="FOLDER", help="folder of the search"
        )
        parser.add_argument(
            "--dft",
            nargs="+",
            type=Path,
            default=[],
            metavar="FILE",
            help="outputs of DFT that ASE reads, or folders of them (default: the search's dft/01, …)",
        )
        parser.add_argument(
            "--gas",
            action="append",
            default=[],
            metavar="X=EV,Y=EV",
            help="energies of your DFT, eV: per atom of each element of the adsorbate, or of the molecules "
            "H2, H2O, CO and N2, from which those follow (default: as in the last call)",
        )
        parser.add_argument("--mixed", action="store_true", help="take results of different settings of DFT")
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.dft_loop import collect_dft

        gas = dft_gas(options.gas)
        found = collect_dft(options.search, options.dft, gas, options.mixed, options.overwrite)
        for row in found["left_out"]:
            print(f"left out: {row['file']}: {row['reason']}")
        print(f"{'candidate':24}{'model (eV)':>12}{'DFT (eV)':>14}{'moved (Å)':>12}{'force (eV/Å)':>14}")
        for row in found["ranking"]:
            force = "" if row["max_force_eV_A"] is None else f"{row['max_force_eV_A']:.3f}"
            print(
                f"{row['id']:24}{row['model_eV']:12.4f}{row['dft_eV']:14.4f}{row['moved_A']:12.2f}{force:>14}"
            )
        for sentence in found["warnings"]:
            print(f"warning: {sentence}")
        print(f"correction {found['correction_eV']:+.4f} eV ({found['dft_energy']} energies of DFT)")
        if found["top1_held"] is None:
            print("whether the model's lowest candidate holds takes DFT results of it and of another")
        else:
            held = "held" if found["top1_held"] else "did NOT hold"
            rank = "" if found["spearman"] is None else f"; rank correlation {found['spearman']:.2f}"
            print(f"the model's lowest candidate {held} in DFT{rank}")
        data = found["training_data"]
        kind = f"{data['frames']} frames with {data['energy_kind']} energies"
        print(f"{kind}: equiformer2 finetune --data {data['file']}")
        return Result(found, 3 if found["left_out"] and options.dft else 0)


class AdsorptionCorrections(Command):
    """Average what DFT has said of several searches into one file of corrections.

    Reads the collect.json of every folder and averages DFT less model by adsorbate, with number of points and
    standard error. The file is one for --corrections. Searches of different checkpoints, adapters, gas
    references or settings of DFT are refused.

        equiformer2 adsorption corrections runs/pt111/CO runs/pd111/CO runs/pt111/OH --out corrections.json
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "folders",
            nargs="+",
            type=Path,
            metavar="FOLDER",
            help="folders of searches in which `adsorption collect` was run with adsorption energies of DFT",
        )
        parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON file to write")
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.correction_averages import correction_averages
        from equiformer2.adsorption.corrections import SCHEMA
        from equiformer2.adsorption.search_folder import COLLECT
        from equiformer2.files import check_target, write_json
        from equiformer2.script import header

        if options.out.suffix.lower() != ".json":
            raise InputError(f"{options.out}: corrections are written as JSON, give this ending")
        inputs = [file for folder in options.folders for file in (folder, folder / COLLECT)]
        check_target(options.out, inputs=inputs, overwrite=options.overwrite)
        found = correction_averages(options.folders)
        print(f"{'adsorbate':16}{'DFT - model (eV)':>18}{'standard error':>16}{'points':>8}{'searches':>10}")
        for name, row in found["species"].items():
            error = "-" if row["standard_error_eV"] is None else f"{row['standard_error_eV']:.4f}"
            mean = f"{row['mean_eV']:+.4f}"
            print(f"{name:16}{mean:>18}{error:>16}{row['points']:8d}{row['searches']:10d}")
            for one in row["by_search"] if len(row["by_search"]) > 1 else []:
                print(f"  {one['correction_eV']:+.4f} eV of {one['points']}: {one['search']} ({one['slab']})")
        for sentence in found["warnings"]:
            print(f"warning: {sentence}")
        record = {**header(SCHEMA), **found}
        record["checkpoint_sha256"] = found["model"].get("checkpoint_sha256")
        write_json(options.out, record, make_folder=True)
        print(f"saved in {options.out}: use it with --corrections {options.out}")
        return Result(record)


class AdsorptionNeb(Command):
    """Find the barrier between two minima of a search with a nudged elastic band.

    The end is moved to its copy by symmetry of the slab that is nearest to the start. Writes neb.json,
    card.json (what the barrier rests on), neb.traj and neb.png into FOLDER/neb/FROM-TO, and a section of
    FOLDER/report.html. Exit status 3 if it has not converged.

        equiformer2 adsorption neb runs/co --start heuristic-0000 --end heuristic-0003
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a search")
        parser.add_argument(
            "--start", required=True, metavar="ID", help="placement whose minimum is the start"
        )
        parser.add_argument("--end", required=True, metavar="ID", help="placement whose minimum is the end")
        add_model_in_place(parser)
        parser.add_argument(
            "--images",
            type=int,
            default=7,
            help="number of structures between the ends (default: %(default)s)",
        )
        parser.add_argument(
            "--fmax",
            type=float,
            default=0.05,
            help="threshold of the band's forces, eV/Å (default: %(default)s)",
        )
        parser.add_argument(
            "--steps", type=int, default=300, help="maximum number of steps (default: %(default)s)"
        )
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.finished_search import FinishedSearch
        from equiformer2.adsorption.search_folder import CARD, NEB, REPORT, refuse_other_settings
        from equiformer2.files import check_target, read_json

        folder = options.folder / NEB / f"{options.start}-{options.end}"
        target = folder / "neb.json"
        check_target(target)
        search = FinishedSearch.read(options.folder)
        given = model_in_place(options)
        model = search.model(given, options.adapter)
        settings = {"images": options.images, "fmax_eV_A": options.fmax, "steps": options.steps}
        if target.is_file() and not options.overwrite:
            record = read_json(target)
            before = record.get("settings") or {}
            names = [name for name, value in settings.items() if before.get(name) != value]
            refuse_other_settings(folder, names, "path")
            print(f"{folder} holds this path, finished: its result is given, and nothing is written")
        else:
            record = self._find(options, search, model, search.checkpoint(given), folder, settings)
        if record["end_moved_to_copy"]:
            print("the end is the copy by symmetry of the slab whose adsorbate is nearest to the start")
        print(
            f"barrier {record['barrier_eV']:.4f} eV, back {record['reverse_barrier_eV']:.4f} eV; "
            f"{record['steps']} steps, largest force {record['max_force_eV_A']:.3f} eV/Å"
        )
        for sentence in [*record["warnings"], *(record["familiarity"] or {}).get("sentences", [])]:
            print(f"warning: {sentence}")
        if not record["converged"]:
            print("NOT converged: the barrier is not that of a minimum-energy path (more --steps)")
        print(f"saved in {folder}: neb.json, {CARD}, neb.traj, neb.png; see {options.folder / REPORT}")
        return Result(record, 0 if record["converged"] else 3)

    def _find(
        self,
        options: argparse.Namespace,
        search: "FinishedSearch",
        model: "Engine",
        checkpoint: str | list[str] | None,
        folder: Path,
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """Find the path and write its files; gives the content of neb.json, which is written last."""
        import numpy as np
        from ase.io import write

        from equiformer2.adsorption.cards import path_card
        from equiformer2.adsorption.neb import find_path, nearest_copy, path_picture
        from equiformer2.adsorption.path_section import update_report
        from equiformer2.adsorption.search_folder import CARD
        from equiformer2.files import write_bytes, write_json
        from equiformer2.script import header

        first, end = search.end_of_path(options.start), search.end_of_path(options.end)
        last = nearest_copy(first, end, search.clean_slab, search.symmetry())
        path = find_path(first, last, model, options.images, options.fmax, options.steps)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "neb.traj", path.images)
        write_bytes(folder / "neb.png", path_picture(path))
        ends = {"start": options.start, "end": options.end}
        card = path_card(path, search.record, model, checkpoint, folder / "neb.traj")
        card |= {**ends, "settings": settings}
        write_json(folder / CARD, {**header("adsorption-neb-card/1", checkpoint), **card})
        record = {
            **header("adsorption-neb/1", checkpoint),
            **path.summary(),
            "familiarity": card["model"].get("familiarity"),
            "model": model.identity(),
            **ends,
            "end_moved_to_copy": not np.array_equal(last.positions, end.positions),
            "settings": settings,
        }
        write_json(folder / "neb.json", record)
        update_report(options.folder)
        return record


def dft_gas(texts: Sequence[str]) -> dict[str, float]:
    """Energies per atom, eV, from those of atoms and molecules that DFT gave.

    Raises:
        InputError: something else than `X=EV`, or molecules that do not suffice for any element.
    """
    from equiformer2.adsorption.references import energies_per_atom

    parts = [part.strip() for text in texts for part in text.split(",")]
    is_molecule = [part.partition("=")[0] in ("H2", "H2O", "CO", "N2") for part in parts]
    molecules = named_energies(list(compress(parts, is_molecule)))
    of_model = next((part for part in parts if part in GAS_SOURCES), None)
    if of_model is not None:
        raise InputError(f"--gas {of_model} is of a model: give energies of your DFT, such as O=-7.2")
    atoms, _ = gas_references([part for part, skip in zip(parts, is_molecule, strict=True) if not skip])
    of_molecules = energies_per_atom(molecules)
    if molecules and not of_molecules:
        raise InputError(f"--gas {', '.join(molecules)} gives no element: add H2, and H2O for O and C")
    return {**of_molecules, **atoms}
