"""Commands about DFT for a search, and about paths between its minima."""

import argparse
from pathlib import Path

from equiformer2.cli.adsorption import gas_references
from equiformer2.cli.adsorption_search import add_model_in_place, model_in_place
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import add_overwrite_argument
from equiformer2.errors import InputError


class AdsorptionCollect(Command):
    """Read DFT results of a search's candidates back, and say whether the model's ranking held.

    Outputs are matched to candidates by their structures. With a result of the clean slab and --gas the
    energies are adsorption energies; otherwise total energies. Writes collect.json into the search's folder.

        equiformer2 adsorption collect --search runs/co --dft runs/co/dft/*/OUTCAR
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "--search", required=True, type=Path, metavar="FOLDER", help="folder of the search"
        )
        parser.add_argument(
            "--dft", required=True, nargs="+", type=Path, metavar="FILE", help="outputs of DFT that ASE reads"
        )
        parser.add_argument(
            "--gas",
            action="append",
            default=[],
            metavar="X=EV,Y=EV",
            help="energies of DFT per atom of each element of the adsorbate by itself, eV",
        )
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.collect import collect, read_dft_result
        from equiformer2.adsorption.finished_search import FinishedSearch
        from equiformer2.files import check_target, write_json
        from equiformer2.script import header

        gas, source = gas_references(options.gas)
        if source != "vacuum":
            raise InputError(f"--gas {source} is of a model: give energies of your DFT, such as O=-7.2")
        target = options.search / "collect.json"
        check_target(target, inputs=options.dft, overwrite=options.overwrite)
        search = FinishedSearch.read(options.search)
        found = collect(
            search.candidates(),
            search.clean_slab,
            [read_dft_result(file) for file in options.dft],
            gas,
            search.adsorbate.get_chemical_symbols(),
        )
        record = {**header("adsorption-collect/1"), **found}
        write_json(target, record)
        print(f"{'candidate':24}{'model (eV)':>12}{'DFT (eV)':>14}")
        for row in found["ranking"]:
            print(f"{row['id']:24}{row['model_eV']:12.4f}{row['dft_eV']:14.4f}")
        print(f"correction {found['correction_eV']:+.4f} eV ({found['dft_energy']} energies of DFT)")
        if found["top1_held"] is None:
            print("whether the model's lowest candidate holds takes DFT results of it and of another")
        else:
            held = "held" if found["top1_held"] else "did NOT hold"
            print(f"the model's lowest candidate {held} in DFT; rank correlation {found['spearman']}")
        return Result(record)


class AdsorptionNeb(Command):
    """Find the barrier between two minima of a search with a nudged elastic band.

    Writes neb.json, neb.traj and neb.png into FOLDER/neb/FROM-TO. Exit status 3 if it has not converged.

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
        from ase.io import write

        from equiformer2.adsorption.finished_search import FinishedSearch
        from equiformer2.adsorption.neb import find_path, path_picture
        from equiformer2.files import check_target, write_bytes, write_json
        from equiformer2.script import header

        folder = options.folder / "neb" / f"{options.start}-{options.end}"
        check_target(folder / "neb.json", overwrite=options.overwrite)
        search = FinishedSearch.read(options.folder)
        ends = search.minimum(options.start), search.minimum(options.end)
        model = search.model(model_in_place(options))
        path = find_path(*ends, model, options.images, options.fmax, options.steps)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "neb.traj", path.images)
        write_bytes(folder / "neb.png", path_picture(path))
        record = {
            **header("adsorption-neb/1", model if isinstance(model, str) else None),
            **path.summary(),
            "start": options.start,
            "end": options.end,
        }
        write_json(folder / "neb.json", record)
        print(
            f"barrier {record['barrier_eV']:.4f} eV, back {record['reverse_barrier_eV']:.4f} eV; "
            f"{record['steps']} steps, largest force {record['max_force_eV_A']:.3f} eV/Å"
        )
        if not record["converged"]:
            print("NOT converged: the barrier is not that of a minimum-energy path (more --steps)")
        print(f"saved in {folder}: neb.json, neb.traj, neb.png")
        return Result(record, 0 if record["converged"] else 3)
