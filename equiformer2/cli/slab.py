"""Command that builds and lists clean slabs, and checks the convergence of an energy with them."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equiformer2.cli.chosen_model import ChosenModel
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    NETWORK_ONLY,
    add_model_arguments,
    add_overwrite_argument,
    parse_checked,
)
from equiformer2.errors import InputError

_NEEDS = [
    *(("--bulks", "--bulk"), ("--miller", "--bulk"), ("--max-miller", "--bulk"), ("--termination", "--bulk")),
    *(("--thickness", "--bulk"), ("--width", "--bulk"), ("--vacuum", "--bulk"), ("--relax-bulk", "--bulk")),
    *(("--check-convergence", "--bulk"), ("--adsorbate", "--check-convergence"), ("--overwrite", "--out")),
    ("--adapter", "--checkpoint"),
]


class BuildSlab(Command):
    """Build clean slabs of a bulk, or complete one, with OC20's tags and constraints.

    Every slab is at least 7 Å thick and 8 Å wide with 20 Å of vacuum, its lower atoms held, unless options
    say otherwise. --out takes a file for one slab, or a folder.

        equiformer2 adsorption slab --bulk Cu --miller 211 --out cu211.extxyz
        equiformer2 adsorption slab --bulk 'Cu3Pt L1_2 a=3.7' --miller all --termination all --out slabs
        equiformer2 adsorption slab --bulk mp-30 --bulks bulks.db --miller 111 --json
        equiformer2 adsorption slab --slab POSCAR.vasp --out slab.extxyz
        equiformer2 adsorption slab --bulk Cu --miller 111 --check-convergence --calculator emt --adsorbate O
        equiformer2 adsorption slab --bulk Cu --miller all --surface-energies --calculator emt
        equiformer2 adsorption slab --list-adsorbates
    """

    def add_arguments(self, parser: Parser) -> None:
        structure = parser.add_argument_group("structure")
        which = structure.add_mutually_exclusive_group(required=True)
        which.add_argument(
            "--bulk",
            metavar="NAME|FILE",
            help="bulk to cut: an element, a formula with its lattice ('Cu3Pt L1_2 a=3.7'), a structure "
            "file, or a number of --bulks",
        )
        which.add_argument(
            "--slab", metavar="NAME|FILE", help="slab by name (Pt111) or file, to be completed"
        )
        which.add_argument(
            "--list-adsorbates",
            action="store_true",
            help="print OC20's adsorbates, known by name",
        )
        structure.add_argument(
            "--bulks", metavar="FILE", help="file of bulks with their numbers: a database of ASE, or JSON"
        )
        structure.add_argument(
            "--miller", default="all", metavar="111|1,1,-1|all", help="Miller indices (default: %(default)s)"
        )
        structure.add_argument(
            "--max-miller", type=int, default=1, help="largest index for --miller all (default: %(default)s)"
        )
        structure.add_argument(
            "--termination", metavar="N|all", help="number of the termination, from 0 (default: all)"
        )
        structure.add_argument("--thickness", type=float, help="thickness at least, Å (default: 7)")
        structure.add_argument("--width", type=float, help="surface vectors at least, Å (default: 8)")
        structure.add_argument("--vacuum", type=float, help="vacuum above the slab at least, Å (default: 20)")
        structure.add_argument(
            "--out", type=Path, metavar="FILE|FOLDER", help="file of the one slab, or folder (default: none)"
        )
        add_overwrite_argument(structure)
        model = parser.add_argument_group(
            "model, for --relax-bulk, --check-convergence and --surface-energies"
        )
        model.add_argument(
            "--relax-bulk",
            action="store_true",
            help="bring the bulk to the lattice constants of the model first (of RPBE, where the table has "
            "them, for a model of adsorption energies)",
        )
        model.add_argument(
            "--check-convergence",
            action="store_true",
            help="print one table of the surface energy, or of the adsorption energy of --adsorbate, over "
            "thickness, vacuum and width",
        )
        model.add_argument(
            "--surface-energies",
            nargs="?",
            const="cut",
            choices=("cut", "relaxed"),
            help="print the slabs by their surface energies, the most stable first: as they are cut, or with "
            "all their atoms relaxed (default: cut)",
        )
        model.add_argument("--adsorbate", metavar="NAME|FILE", help="adsorbate for --check-convergence")
        add_model_arguments(model, committee=True, calculator=True, required=False)

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        options = parse_checked(parser, arguments, needs=_NEEDS, excludes=NETWORK_ONLY)
        has_model = options.calculator is not None or options.checkpoint is not None
        uses_model = options.relax_bulk or options.check_convergence or options.surface_energies
        names = "--relax-bulk, --check-convergence"
        if uses_model and not has_model:
            parser.error(f"{names} and --surface-energies need --checkpoint or --calculator: give one")
        if has_model and not uses_model:
            parser.error(f"a model has no meaning without {names} or --surface-energies: leave it out")
        return options

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.adsorbates import adsorbate_list, oc20_adsorbates

        if options.list_adsorbates:
            print(adsorbate_list())
            return Result({"adsorbates": [one.summary() for one in oc20_adsorbates().values()]})
        return self._slabs(options)

    def _slabs(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.adsorbates import is_file
        from equiformer2.adsorption.slab_files import slab_targets, write_slabs
        from equiformer2.script import header, show_log

        show_log()
        model = ChosenModel(options) if options.calculator or options.checkpoint else None
        record: dict[str, Any] = {}
        notices: list[str] = []
        bulk, slabs = self._built(options, model, record, notices)
        names = [name for name in (options.slab, options.bulk) if name is not None and is_file(name)]
        inputs = [*names, *filter(None, [options.bulks]), *(model.files if model else ())]
        paths = [] if options.out is None else slab_targets(options.out, slabs, inputs, options.overwrite)
        for slab in slabs:
            print(slab.report)
        notices += [notice for slab in slabs for notice in slab.report.notices if notice not in notices]
        if options.surface_energies and model is not None:
            record["surface_energies"] = self._surface_energies(options, slabs, model, notices)
        if options.check_convergence and model is not None:
            record["convergence"] = self._convergence(options, bulk, slabs, model)
        record |= {
            "slabs": [
                {**slab.report.summary(), "file": str(path) if path else None}
                for slab, path in itertools.zip_longest(slabs, paths)
            ],
            "notices": list(dict.fromkeys(notices)),
            "model": None if model is None else model.record(),
        }
        checkpoint = None if model is None else model.checkpoint
        if paths:
            document = {**header("adsorption-slab/1", checkpoint), **record}
            record["notices"] += write_slabs(paths, slabs, document, is_folder=paths[0] != options.out)
            print(f"saved: {', '.join(map(str, paths[:3]))}{', …' if len(paths) > 3 else ''}")
        for notice in record["notices"]:
            print(f"note: {notice}")
        return Result(record, checkpoint=checkpoint)

    def _built(
        self,
        options: argparse.Namespace,
        model: ChosenModel | None,
        record: dict[str, Any],
        notices: list[str],
    ) -> tuple[Any, Sequence[Any]]:
        """Build the slabs of the options, and the bulk that they are cut from; adds to record and notices."""
        from equiformer2.adsorption.bulks import find_bulk
        from equiformer2.adsorption.lattice_constants import relaxed_bulk, strain_notices
        from equiformer2.adsorption.slabs import check_miller, find_slab, slabs_of_bulk

        if options.slab is not None:
            slab = find_slab(options.slab)
            if slab.bulk is not None and options.calculator is None:
                notices += strain_notices(slab.bulk)
            return None, [slab]
        bulk = find_bulk(options.bulk, options.bulks)
        check_miller(options.miller)
        if options.relax_bulk and model is not None:
            relaxed = relaxed_bulk(bulk, model.calculator, energy_kind=model.energy_kind)
            bulk = relaxed.bulk
            record["relaxed_bulk"] = relaxed.summary()
            notices += relaxed.notices
            print(f"bulk {bulk.name}: {relaxed.method}, strain {relaxed.strain:+.4f}")
        elif options.calculator is None:  # a calculator of ASE need not be of RPBE
            notices += strain_notices(bulk)
        sizes = {name: getattr(options, name) for name in ("thickness", "width", "vacuum")}
        slabs = slabs_of_bulk(
            bulk,
            options.miller,
            "all" if options.termination is None else options.termination,
            max_miller=options.max_miller,
            **{name: size for name, size in sizes.items() if size is not None},
        )
        return bulk, slabs

    def _surface_energies(
        self, options: argparse.Namespace, slabs: Sequence[Any], model: ChosenModel, notices: list[str]
    ) -> dict[str, Any]:
        from equiformer2.adsorption.surface_energy import surface_energies
        from equiformer2.inference.batched import RelaxationSettings

        is_relaxed = options.surface_energies == "relaxed"
        energies = surface_energies(
            slabs,
            model.calculator,
            relaxed=RelaxationSettings(fmax=0.02, steps=300, frames="ends") if is_relaxed else None,
            energy_kind=model.energy_kind,
            progress=True,
        )
        print(energies)
        notices += energies.notices
        return energies.summary()

    def _convergence(
        self, options: argparse.Namespace, bulk: Any, slabs: Sequence[Any], model: ChosenModel
    ) -> dict[str, Any]:
        from equiformer2.adsorption.convergence import convergence_table

        if len(slabs) > 1:
            raise InputError(
                f"convergence is checked for one slab, and there are {len(slabs)}: give one --miller and "
                "--termination"
            )
        ignored = [name for name in ("thickness", "width", "vacuum") if getattr(options, name) is not None]
        if ignored:
            raise InputError(f"--check-convergence varies the {' and '.join(ignored)}: leave the option out")
        table = convergence_table(
            bulk,
            options.miller,
            model.calculator,
            adsorbate=options.adsorbate,
            termination=slabs[0].report.termination,
            energy_kind=model.energy_kind,
            progress=True,
        )
        print(table)
        if all(row.value is None for row in table.rows):
            raise InputError(f"no energy could be calculated: {table.rows[0].reason}")
        return table.summary()
