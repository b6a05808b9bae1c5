"""Commands about a search for the lowest adsorption energy, and about what follows from it."""

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets_oc20.untrusted import AnyPath
from equiformer2.cli.adsorption import gas_references
from equiformer2.cli.chosen_model import ChosenModel
from equiformer2.cli.chosen_slabs import add_slab_arguments, chosen_slabs, parse_with_slab
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import Options, add_model_arguments, add_overwrite_argument
from equiformer2.errors import InputError

if TYPE_CHECKING:
    from equiformer2.inference import Relaxation

_MODES = ("heuristic", "random", "random_site_heuristic_placement", "symmetry", "positions")


class AdsorptionSearch(Command):
    """Find the lowest adsorption energy of an adsorbate on a slab: place, relax, compare, report.

    Placements that symmetry makes equal are merged, structures with an anomaly do not count, and the search
    stops where a lower minimum is unlikely. The folder gets search.json, card.json (what the number rests
    on), report.html, the best structure, all trajectories and DFT input for the best. Stopped at any moment,
    the same command continues. Several adsorbates get a folder each and share the clean slab.

        equiformer2 adsorption search --checkpoint oc20_small --slab Pt111 --adsorbate '*CO' --out runs/co
        equiformer2 adsorption search --calculator emt --slab Cu111 --adsorbate '*O' --out runs/o
    """

    def add_arguments(self, parser: Parser) -> None:
        add_model_arguments(parser.add_argument_group("model"), committee=True, calculator=True)
        add_slab_arguments(parser.add_argument_group("slab"))
        search = parser.add_argument_group("search")
        search.add_argument(
            "--adsorbate",
            required=True,
            nargs="+",
            metavar="NAME|FILE",
            help="adsorbates (*CO, *OH, CH3OH, …)",
        )
        search.add_argument(
            "--list-adsorbates",
            action=ListAdsorbates,
            nargs=0,
            help="print OC20's adsorbates by name, and end",
        )
        search.add_argument(
            "--placements",
            type=int,
            help="number of placements at most (default: 40, or one at each --position)",
        )
        search.add_argument(
            "--mode",
            choices=_MODES,
            help="kind of placements (default: heuristic, or positions with --position)",
        )
        add_position_arguments(search)
        search.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
        search.add_argument(
            "--no-stop", action="store_true", help="relax all placements, however unlikely a lower one is"
        )
        search.add_argument(
            "--gas",
            action="append",
            default=[],
            metavar="vacuum|molecules|oc20|X=EV,Y=EV",
            help="energy of the adsorbate by itself, for total energies (default: vacuum)",
        )
        search.add_argument(
            "--fmax",
            type=float,
            default=0.05,
            help="convergence threshold of the largest force on a free atom, eV/Å (default: %(default)s)",
        )
        search.add_argument(
            "--steps",
            type=int,
            default=300,
            help="maximum number of steps per relaxation (default: %(default)s)",
        )
        parser.add_argument(
            "--out", required=True, type=Path, metavar="FOLDER", help="folder for the results"
        )
        add_overwrite_argument(parser)

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        options = parse_with_slab(parser, arguments, needs=[("--height", "--position")])
        complete_positions(parser, options)
        return options

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.adsorbates import find_adsorbate
        from equiformer2.adsorption.find import find_adsorption_energy
        from equiformer2.files import check_target, write_json
        from equiformer2.script import header, show_log

        gas, source = gas_references(options.gas)
        for name in options.adsorbate:  # before hours of work on another one
            find_adsorbate(name)
        show_log()
        chosen = ChosenModel(options)
        slabs, surfaces = chosen_slabs(options, chosen)
        records: dict[str, dict[str, Any]] = {}
        clean: Relaxation | None = None
        folders = search_folders(options.out, [slab.report.origin for slab in slabs], options.adsorbate)
        several = len(folders) > 1
        if several:
            check_target(options.out / "searches.json", overwrite=options.overwrite)
        for folder, (slab, name) in zip(folders, itertools.product(slabs, options.adsorbate), strict=True):
            if name == options.adsorbate[0]:
                clean = None
            found = find_adsorption_energy(
                slab.atoms,
                name,
                chosen.calculator,
                placements=options.placements,
                mode=options.mode,
                seed=options.seed,
                positions=options.position,
                height=options.height,
                fmax=options.fmax,
                steps=options.steps,
                stop=not options.no_stop,
                gas=source,
                gas_per_atom=gas,
                out=folder,
                # Those of several that are finished are read again, with no evaluation of the model.
                overwrite=options.overwrite or several,
                describe=chosen.record,
                notes={"slab": slab.report.summary(), "adsorbate": name},
                clean_slab=clean,
            )
            clean = found.search.clean_slab
            records[str(folder)] = found.record
            self._print(f"{name} on {slab.report.origin}", folder, found.record)
        converged = all(record["converged"] for record in records.values())
        record = next(iter(records.values()))
        if several:
            keys = ("adsorption_energy_eV", "energy_kind", "converged", "model_evaluations")
            record = {
                **header("adsorption-searches/1", chosen.checkpoint),
                "searches": {name: {key: one[key] for key in keys} for name, one in records.items()},
                "surface_energies": surfaces.summary(),
            }
            write_json(options.out / "searches.json", record)
        return Result(record, 0 if converged else 3, chosen.checkpoint)

    def _print(self, name: str, folder: Path, record: dict[str, Any]) -> None:
        best, stop = record["best"], record["stop"]
        rows = sorted(
            (row for row in record["placements"] if row["basin"] == row["id"]),
            key=lambda row: row["energy_eV"],
        )
        print(f"{name}: adsorption energy {record['adsorption_energy_eV']:.4f} eV ({best['id']})")
        print(f"{'minimum':24}{'energy (eV)':>12}{'force (eV/Å)':>14}")
        for row in rows[:10]:
            print(f"{row['id']:24}{row['energy_eV']:12.4f}{row['max_force_eV_A']:14.3f}")
        left = f"; unseen {stop['unseen_probability']:.1%}, lower {stop['p_lower']:.1%}"
        print(stop["reason"] + (left if stop["unseen_basins"] else ""))
        if not best["converged"]:
            print("NOT converged: the energy is not that of a relaxed structure (more --steps)")
        print(f"saved in {folder}: search.json, card.json, report.html, {best['file']}, dft, trajectories")


class AdsorptionVerify(Command):
    """Recompute the numbers of a trust card, and compare.

    Exit status 3 if one differs. The checkpoint is the one that the card names, unless another is given.

        equiformer2 adsorption verify runs/co/card.json
        equiformer2 adsorption verify runs/o/card.json --calculator emt
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("card", type=Path, metavar="CARD", help="card.json of a search")
        add_model_in_place(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.cards import verify_card

        rows = verify_card(options.card, model_in_place(options))
        for name, row in rows.items():
            print(f"{name:22} {'same' if row['ok'] else 'DIFFERS'}: card {row['card']}, now {row['now']}")
        return Result(rows, 0 if all(row["ok"] for row in rows.values()) else 3)


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


class AdsorptionFreeEnergy(Command):
    """Compute vibrations and the free energy of the best structure of a search.

    Displaces the adsorbate's atoms on the held slab. The free energy is that of the formation from CO, H2O,
    N2 and protons with electrons (computational hydrogen electrode). Writes free_energy.json into the folder.
    Exit status 3 if the structure has not converged.

        equiformer2 adsorption free-energy runs/co --temperature 298.15 --potential 0 --ph 0
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a search")
        add_model_in_place(parser)
        parser.add_argument(
            "--temperature", type=float, default=298.15, help="temperature, K (default: %(default)s)"
        )
        parser.add_argument(
            "--potential",
            type=float,
            default=0.0,
            help="potential against the standard hydrogen electrode, V (default: %(default)s)",
        )
        parser.add_argument("--ph", type=float, default=0.0, help="pH (default: %(default)s)")
        parser.add_argument(
            "--lowest-frequency",
            type=float,
            default=50.0,
            help="frequency that softer and imaginary modes count as, cm^-1 (default: %(default)s)",
        )
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.finished_search import FinishedSearch
        from equiformer2.adsorption.free_energy import Reaction, free_energy, vibrations
        from equiformer2.files import check_target, write_json
        from equiformer2.script import header

        target = options.folder / "free_energy.json"
        check_target(target, overwrite=options.overwrite)
        search = FinishedSearch.read(options.folder)
        Reaction.check_referred(search.record["energy_kind"], search.record["gas"])
        if not search.record["converged"]:
            print("warning: the structure has not converged, so its vibrations are not those of a minimum")
        model = search.model(model_in_place(options))
        found = free_energy(
            search.record["adsorption_energy_eV"],
            search.adsorbate,
            vibrations(search.best, model),
            options.temperature,
            options.potential,
            options.ph,
            options.lowest_frequency,
        )
        converged = bool(search.record["converged"])
        record = {
            **header("adsorption-free-energy/1", model if isinstance(model, str) else None),
            **found,
            "converged": converged,
        }
        write_json(target, record)
        print(f"formation: {found['reaction'] or 'nothing'}")
        print(f"adsorption energy   {found['adsorption_energy_eV']:10.4f} eV")
        print(f"zero-point energy   {found['zpe_eV']:+10.4f} eV")
        print(f"heat                {found['heat_eV']:+10.4f} eV")
        print(f"entropy             {-found['entropy_eV']:+10.4f} eV")
        print(f"gases               {-found['gas_correction_eV']:+10.4f} eV")
        print(f"electrons           {found['electrons'] * found['potential_against_rhe_V'] + 0.0:+10.4f} eV")
        print(f"free energy         {found['free_energy_eV']:10.4f} eV at {options.temperature:g} K")
        if found["imaginary"]:
            sizes = ", ".join(f"{size:.0f}" for size in found["imaginary_cm1"])
            print(
                f"warning: {found['imaginary']} imaginary modes ({sizes} cm^-1), counted as "
                f"{options.lowest_frequency:g} cm^-1: the structure may be no minimum"
            )
        return Result(record, 0 if converged else 3)


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


class AdsorptionDiagram(Command):
    """Draw the free-energy diagram of several adsorbates on one slab.

    The folders are those of searches, in the order of the reaction, each with its free energy
    (`equiformer2 adsorption free-energy`) at the same temperature and potential.

        equiformer2 adsorption diagram runs/oh runs/o runs/ooh --out runs/diagram
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "folders", nargs="+", type=Path, metavar="FOLDER", help="folders of searches, in order"
        )
        parser.add_argument(
            "--out", required=True, type=Path, metavar="FOLDER", help="folder for the diagram"
        )
        parser.add_argument("--title", default="free energy", help="title of the figure")
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.diagram import FREE_ENERGY, diagram, diagram_picture, read_states
        from equiformer2.files import check_target, read_json, write_bytes, write_json
        from equiformer2.script import header

        target = options.out / "diagram.json"
        check_target(target, overwrite=options.overwrite)
        states = read_states(options.folders)
        potential = float(read_json(options.folders[0] / FREE_ENERGY)["potential_against_rhe_V"])
        balanced = diagram(states, potential)
        options.out.mkdir(parents=True, exist_ok=True)
        write_bytes(options.out / "diagram.png", diagram_picture(balanced, options.title))
        record = {**header("adsorption-diagram/1"), **balanced, "potential_against_rhe_V": potential}
        write_json(target, record)
        for step in balanced["steps"]:
            print(
                f"{step['from']} -> {step['to']}: {step['change_eV']:+.3f} eV, "
                f"electrons {step['electrons']:g}"
            )
        if balanced["limiting_potential_V"] is not None:
            print(f"limiting potential {balanced['limiting_potential_V']:.3f} V against RHE")
        print(f"saved in {options.out}: diagram.json, diagram.png")
        return Result(record)


class ListAdsorbates(argparse.Action):
    """Print OC20's adsorbates by name, and end."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from equiformer2.adsorption.adsorbates import adsorbate_list

        print(adsorbate_list())
        parser.exit()


def add_model_in_place(parser: Parser) -> None:
    """Add `--checkpoint` and `--calculator`, for a model in place of the one that a search was made with."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--checkpoint", metavar="FILE|NAME", help="checkpoint in place of the search's")
    group.add_argument(
        "--calculator",
        metavar="NAME",
        help="ASE calculator of this name, or module:factory, which is imported and run",
    )


def model_in_place(options: argparse.Namespace) -> Any:
    """The model of `add_model_in_place`; None for the search's own."""
    from equiformer2.inference.named_calculators import calculator_by_name

    return options.checkpoint if options.calculator is None else calculator_by_name(options.calculator)


def add_position_arguments(parser: Options) -> None:
    """Add `--position` and `--height`, of placements by hand."""
    parser.add_argument(
        "--position",
        type=float,
        nargs=2,
        action="append",
        metavar=("X", "Y"),
        help="position of the binding atom in the plane, Å; give the option once for every position",
    )
    parser.add_argument(
        "--height",
        type=float,
        help="height of the binding atom above the highest slab atom, Å, at every --position (default: in "
        "contact)",
    )


def complete_positions(parser: Parser, options: argparse.Namespace) -> None:
    """Let `--position` choose the mode and the number of placements, where they are not given."""
    if options.mode not in (None, "positions") and options.position is not None:
        parser.error(f"--position has no meaning with --mode {options.mode}: leave one of them out")
    if options.mode == "positions" and options.position is None:
        parser.error("--mode positions needs --position X Y: give one for every position")
    if options.mode is None:
        options.mode = "heuristic" if options.position is None else "positions"
    if options.placements is None and options.position is None:
        options.placements = 40


def search_folders(out: AnyPath, slabs: Sequence[str], adsorbates: Sequence[str]) -> list[Path]:
    """Folders of the searches of every slab with every adsorbate, slab by slab.

    Raises:
        InputError: two searches would have the same folder.
    """
    owners: dict[Path, str] = {}
    for slab, adsorbate in itertools.product(slabs, adsorbates):
        folder = Path(out)
        if len(slabs) > 1:
            folder /= _folder_name(slab)
        if len(adsorbates) > 1:
            folder /= _folder_name(adsorbate)
        # A case-insensitive file system has one folder for both.
        same = [path for path in owners if str(path).lower() == str(folder).lower()]
        if same:
            raise InputError(
                f"{owners[same[0]]} and {adsorbate} on {slab} would both be written into {folder}: give "
                "each once, and files of different names, or search them one by one"
            )
        owners[folder] = f"{adsorbate} on {slab}"
    return list(owners)


def _folder_name(name: str) -> str:
    """A folder name for the name of a slab or adsorbate, or for a file."""
    name = Path(name).stem if "/" in name else name
    return re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_") or "adsorbate"
