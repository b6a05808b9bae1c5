"""Commands about a search for the lowest adsorption energy, and about what follows from it."""

import argparse
import errno
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath, read_json
from equiformer2.cli.adsorption import gas_references
from equiformer2.cli.chosen_model import ChosenModel, network_calculator
from equiformer2.cli.chosen_slabs import add_slab_arguments, chosen_slabs, parse_with_slab
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    Options,
    add_corrections_argument,
    add_dispersion_argument,
    add_draft_argument,
    add_model_arguments,
    add_overwrite_argument,
    add_spread_argument,
    add_twin_argument,
    random_seed,
)
from equiformer2.errors import InputError

if TYPE_CHECKING:
    from equiformer2.adsorption.corrections import Corrections
    from equiformer2.adsorption.find import FoundEnergy
    from equiformer2.adsorption.slabs import CleanSlab
    from equiformer2.inference import Relaxation

_SEARCHES = "searches.json"
_OF_SEARCHES = ("searches", "surface_energies")
_MODES = ("heuristic", "random", "random_site_heuristic_placement", "symmetry", "positions")


#: Results whose names a structure or table that is read may have.
_RESULTS = {"clean_slab.extxyz", "clean_slab.traj", "best.extxyz", "card.json", "basins.json", "search.json"}


def _check_inputs(options: argparse.Namespace) -> None:
    """Refuse an input file that has the name of a result and lies in the folder of the results."""
    folder = options.out.resolve()
    given = [
        *(getattr(options, name, None) for name in ("slab", "bulk", "bulks", "corrections")),
        *options.adsorbate,
    ]
    for name in given:
        path = None if name is None else Path(str(name))
        if path is None or path.name not in _RESULTS or not path.is_file():
            continue
        if folder in path.resolve().parents:
            raise InputError(
                f"{path} is read as input and lies in {options.out}, where the search would replace it: give "
                "another --out"
            )


class AdsorptionSearch(Command):
    """Find the lowest adsorption energy of an adsorbate on a slab: place, relax, compare, report.

    Placements that symmetry makes equal are merged, structures with an anomaly do not count, and the search
    stops where a lower minimum is unlikely. The folder gets search.json, card.json (what the number rests
    on), report.html, the best structure, all trajectories and DFT input for the best. Stopped at any moment,
    the same command continues. Several adsorbates get a folder each and share the clean slab; one that cannot
    be searched does not stop the others. Exit status 3 if one has not converged or has no placement left.

        equiformer2 adsorption search --checkpoint oc20_small --slab Pt111 --adsorbate '*CO' --out runs/co
        equiformer2 adsorption search --calculator emt --slab Cu111 --adsorbate '*O' --out runs/o
    """

    def add_arguments(self, parser: Parser) -> None:
        model = parser.add_argument_group("model")
        add_model_arguments(model, committee=True, calculator=True)
        add_dispersion_argument(model)
        add_twin_argument(model)
        add_draft_argument(model)
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
        search.add_argument("--seed", type=random_seed, default=0, help="random seed (default: %(default)s)")
        search.add_argument(
            "--no-stop", action="store_true", help="relax all placements, however unlikely a lower one is"
        )
        add_spread_argument(search)
        search.add_argument(
            "--starts-from",
            type=Path,
            metavar="FOLDER",
            help="earlier search of this adsorbate on this slab, whose minima are relaxed first",
        )
        search.add_argument(
            "--check-minima",
            type=int,
            default=1,
            metavar="N",
            help="number of the lowest minima that are displaced and relaxed again, since they may be saddle "
            "points (default: %(default)s)",
        )
        search.add_argument(
            "--gas",
            action="append",
            default=[],
            metavar="vacuum|molecules|oc20|X=EV,Y=EV",
            help="energy of the adsorbate by itself, for total energies (default: vacuum)",
        )
        add_corrections_argument(search, "for the convention of the literature on the card")
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
        add_overwrite_argument(
            parser,
            "write a finished search again (its relaxations are kept), or replace another search in --out; "
            "what is no file of a search stays",
        )

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        options = parse_with_slab(parser, arguments, needs=[("--height", "--position")])
        complete_positions(parser, options)
        if options.stop_at_spread is not None and len(options.checkpoint or []) < 2:
            parser.error("--stop-at-spread needs a committee: give several checkpoints")
        return options

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.adsorbates import find_adsorbate
        from equiformer2.adsorption.corrections import Corrections
        from equiformer2.files import check_target, write_json
        from equiformer2.script import header, show_log

        _check_inputs(options)
        gas, source = gas_references(options.gas)
        corrections = None if options.corrections is None else Corrections.read(options.corrections)
        for name in options.adsorbate:  # before hours of work on another one
            find_adsorbate(name)
        show_log()
        chosen = ChosenModel(options)
        draft = None if options.draft is None else network_calculator(options, options.draft)
        slabs, surfaces = chosen_slabs(options, chosen)
        folders = search_folders(options.out, [slab.report.origin for slab in slabs], options.adsorbate)
        listed = options.out / _SEARCHES
        several = len(folders) > 1
        finished = None
        if several:
            finished = finished_list(listed, folders)
            check_target(listed, overwrite=options.overwrite or finished is not None or has_errors(listed))
        records: dict[str, dict[str, Any]] = {}
        errors: list[Exception] = []
        clean: dict[int, Relaxation | None] = {}
        for number, (folder, (slab, name)) in enumerate(
            zip(folders, itertools.product(slabs, options.adsorbate), strict=True)
        ):
            title = f"{name} on {slab.report.origin}"
            try:
                place = number // len(options.adsorbate)
                if place not in clean:
                    same_slab = folders[number : number + len(options.adsorbate)] if several else []
                    clean[place] = self._stored_clean_slab(options, chosen, slab, same_slab)
                found = self._search(
                    options, chosen, draft, slab, name, folder, (gas, source), clean[place], corrections
                )
                clean[place], record = found.search.clean_slab, found.record
            except (InputError, DataError, OSError) as error:
                if not several or getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                errors.append(error)
                print(f"error: {title}: {error}", file=sys.stderr)
                records[str(folder)] = {"error": " ".join(str(error).split())}
                continue
            records[str(folder)] = {**record, "error": None}
            self._print(title, folder, record)
        if len(errors) == len(folders):
            raise InputError(f"none of the {len(folders)} searches could be made: see above")
        converged = all(record.get("converged") for record in records.values())
        if not several:
            return Result(record, 0 if converged else 3, chosen.checkpoint)
        keys = ("adsorption_energy_eV", "energy_kind", "converged", "model_evaluations", "error")
        record = {
            **header("adsorption-searches/1", chosen.checkpoint),
            "searches": {name: {key: one.get(key) for key in keys} for name, one in records.items()},
            "surface_energies": surfaces.summary(),
        }
        if (
            finished is not None
            and not options.overwrite
            and all(finished.get(key) == record[key] for key in _OF_SEARCHES)
        ):
            return Result(finished, 0 if converged else 3, chosen.checkpoint)
        write_json(listed, record)
        return Result(record, 0 if converged else 3, chosen.checkpoint)

    def _search(
        self,
        options: argparse.Namespace,
        chosen: ChosenModel,
        draft: Any,
        slab: "CleanSlab",
        name: str,
        folder: Path,
        gas: tuple[dict[str, float], str],
        clean_slab: "Relaxation | None",
        corrections: "Corrections | None",
    ) -> "FoundEnergy":
        """Search one adsorbate on one slab."""
        from equiformer2.adsorption.find import find_adsorption_energy

        return find_adsorption_energy(
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
            gas=gas[1],
            gas_per_atom=gas[0],
            draft=draft,
            check_minima=options.check_minima,
            stop_at_spread=options.stop_at_spread,
            starts_from=options.starts_from,
            corrections=corrections,
            out=folder,
            overwrite=options.overwrite,
            describe=chosen.record,
            notes={
                "slab": slab.report.summary(),
                "adsorbate": name,
                **({} if options.draft is None else {"draft": options.draft}),
            },
            clean_slab=clean_slab,
        )

    def _stored_clean_slab(
        self, options: argparse.Namespace, chosen: ChosenModel, slab: "CleanSlab", folders: Sequence[Path]
    ) -> "Relaxation | None":
        """The relaxed clean slab of earlier searches in these folders."""
        from equiformer2.adsorption.search import SearchSettings, stored_clean_slab

        settings = SearchSettings(options.fmax, options.steps)
        stored = (stored_clean_slab(one, slab.atoms, chosen.calculator, settings) for one in folders)
        return next((one for one in stored if one is not None), None)

    def _print(self, name: str, folder: Path, record: dict[str, Any]) -> None:
        from equiformer2.adsorption.conventions import convention_lines
        from equiformer2.adsorption.dispersion_terms import dispersion_lines

        best, stop = record["best"], record["stop"]
        if best is None:
            print(f"{name}: {record['reason']}")
            print(f"saved in {folder}: search.json, trajectories")
            return
        rows = sorted(
            (row for row in record["placements"] if row["basin"] == row["id"]),
            key=lambda row: row["energy_eV"],
        )
        print(f"{name}: adsorption energy {record['adsorption_energy_eV']:.4f} eV ({best['id']})")
        told = [*dispersion_lines(record["d3_eV"]), *convention_lines(record["conventions"])]
        print("\n".join(f"  {line}" for line in told))
        print(f"{'minimum':24}{'energy (eV)':>12}{'force (eV/Å)':>14}")
        for row in rows[:10]:
            print(f"{row['id']:24}{row['energy_eV']:12.4f}{row['max_force_eV_A']:14.3f}")
        for check in record["saddle_check"]["checks"]:
            print(check["sentence"])
        if record["draft"] is not None:
            print(
                f"{record['model_evaluations']} calls of the model, and {record['draft_evaluations']} of the "
                "draft"
            )
        print(
            f"{stop['reason']}; the next placement ends in an unseen minimum with a probability of "
            f"{stop['unseen_probability']:.1%}, and {stop['further_placements']} more find one lower by "
            f"0.1 eV with {stop['p_lower']:.1%}"
        )
        if record["unconverged"]:
            print(f"NOT converged: {', '.join(record['unconverged'])} (more --steps)")
        print(f"saved in {folder}: search.json, card.json, report.html, {best['file']}, dft, trajectories")


class AdsorptionVerify(Command):
    """Recompute the numbers of a trust card, and compare.

    The card is that of a search, a coverage series or a path. With the clean slab and the files of the search
    beside it, these are compared, too. Exit status 3 if a number differs. The checkpoint is the one that the
    card names, unless another is given.

        equiformer2 adsorption verify runs/co/card.json
        equiformer2 adsorption verify runs/o/card.json --calculator emt
        equiformer2 adsorption verify runs/co/neb/heuristic-0000-heuristic-0003/card.json
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "card", type=Path, metavar="CARD", help="card.json of a search, a series or a path"
        )
        add_model_in_place(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.cards import verify_card

        rows = verify_card(options.card, model_in_place(options), options.adapter)
        for name, row in rows.items():
            print(f"{name:30} {'same' if row['ok'] else 'DIFFERS'}: card {row['card']}, now {row['now']}")
        return Result(rows, 0 if all(row["ok"] for row in rows.values()) else 3, whole=True)


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
    parser.add_argument(
        "--adapter",
        metavar="FILE",
        help="adapter of the network, where its file is no longer where the search has found it",
    )


def model_in_place(options: argparse.Namespace) -> Any:
    """The model of `add_model_in_place` without its adapter; None for the search's own.

    Raises:
        InputError: an adapter beside a calculator, or no such calculator.
    """
    from equiformer2.inference.named_calculators import calculator_by_name

    if options.calculator is None:
        return options.checkpoint
    if options.adapter is not None:
        raise InputError("--adapter has no meaning with --calculator: leave one of them out")
    return calculator_by_name(options.calculator)


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


def has_errors(file: AnyPath) -> bool:
    """Tell whether a list of several searches names one that failed, so that the command goes on."""
    return any(one.get("error") is not None for one in _listed(file).values())


def finished_list(file: AnyPath, folders: Sequence[Path]) -> dict[str, Any] | None:
    """The list of several searches, if it is of the searches in these folders; else None."""
    searches = _listed(file)
    return dict(read_json(file)) if searches and set(searches) == set(map(str, folders)) else None


def _listed(file: AnyPath) -> dict[str, dict[str, Any]]:
    """Searches of a list by their folders; none where it cannot be read."""
    try:
        searches = read_json(file)["searches"]
    except (DataError, OSError, LookupError, TypeError):
        return {}
    is_list = isinstance(searches, dict) and all(isinstance(one, dict) for one in searches.values())
    return searches if is_list else {}


def _folder_name(name: str) -> str:
    """A folder name for the name of a slab or adsorbate, or for a file."""
    name = Path(name).stem if "/" in name else name
    return re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_") or "adsorbate"
