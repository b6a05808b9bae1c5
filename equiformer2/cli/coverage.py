"""Command that compares adsorption energies over coverage."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from equiformer2.cli.adsorption import gas_references
from equiformer2.cli.chosen_model import ChosenModel
from equiformer2.cli.chosen_slabs import add_slab_arguments, chosen_slabs, parse_with_slab
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import add_model_arguments, add_overwrite_argument, random_seed
from equiformer2.errors import InputError


class AdsorptionCoverage(Command):
    r"""Compute adsorption energies over coverage: one, two, three and more molecules on one slab.

    Relaxes several arrangements of every number of molecules, leaves out those with an anomaly, and prints
    the total, average and differential adsorption energy of the lowest of each. Several adsorbates are a
    mixture, whose compositions are compared. The folder gets coverage.json, coverage.png, the lowest
    structures and all trajectories. Stopped at any moment, the same command continues. Only a model of total
    energies has these energies. Exit status 3: not all converged.

        equiformer2 adsorption coverage --calculator emt --slab Cu111 --size 2x2x3 --adsorbate O --out runs/o
        equiformer2 adsorption coverage --checkpoint total.pt --slab Pt111 --adsorbate '*CO' --out runs/co
        equiformer2 adsorption coverage --checkpoint total.pt --slab Pt111 --adsorbate '*CO' '*O' \
            --counts 1,0 0,1 1,1 2,1 --out runs/co_o
    """

    def add_arguments(self, parser: Parser) -> None:
        add_model_arguments(parser.add_argument_group("model"), committee=True, calculator=True)
        add_slab_arguments(parser.add_argument_group("slab"))
        series = parser.add_argument_group("coverage")
        series.add_argument(
            "--adsorbate",
            required=True,
            nargs="+",
            action="extend",
            metavar="NAME|FILE",
            help="adsorbate (*CO, …), or several for mixtures",
        )
        series.add_argument(
            "--counts",
            type=_composition,
            nargs="+",
            metavar="N[,N]",
            help="numbers of molecules in the cell (default: 1 2 3 4, as many as fit), or compositions of a "
            "mixture, such as 2,1 for two of the first adsorbate and one of the second; a number alone "
            "stands for all compositions of as many molecules (default of mixtures: 1 2)",
        )
        series.add_argument(
            "--placements",
            type=int,
            default=8,
            help="number of arrangements of every composition, copies by symmetry included "
            "(default: %(default)s)",
        )
        series.add_argument("--seed", type=random_seed, default=0, help="random seed (default: %(default)s)")
        series.add_argument(
            "--min-distance",
            type=float,
            default=2.5,
            help="distance of atoms of different molecules at the start at least, Å (default: %(default)s)",
        )
        series.add_argument(
            "--check-minima",
            type=int,
            default=1,
            metavar="N",
            help="number of the lowest arrangements of every composition that are displaced and relaxed "
            "again, since they may be saddle points (default: %(default)s)",
        )
        series.add_argument(
            "--gas",
            action="append",
            default=[],
            metavar="vacuum|molecules|oc20|X=EV,Y=EV",
            help="energy of the adsorbate by itself (default: vacuum)",
        )
        series.add_argument(
            "--fmax",
            type=float,
            default=0.05,
            help="convergence threshold of the largest force on a free atom, eV/Å (default: %(default)s)",
        )
        series.add_argument(
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
        return parse_with_slab(parser, arguments)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.adsorbates import find_adsorbate
        from equiformer2.adsorption.coverage_series import CoverageSettings, coverage_series
        from equiformer2.script import show_log

        gas, source = gas_references(options.gas)
        for name in options.adsorbate:  # before the lattice is relaxed
            find_adsorbate(name)
        show_log()
        chosen = ChosenModel(options)
        slabs, _ = chosen_slabs(options, chosen)
        if len(slabs) > 1:
            raise InputError(
                f"a coverage series is of one slab, and there are {len(slabs)}: give one --miller and "
                "--termination"
            )
        series = coverage_series(
            slabs[0].atoms,
            options.adsorbate,
            chosen.calculator,
            options.counts,
            CoverageSettings(
                placements=options.placements,
                seed=options.seed,
                min_distance=options.min_distance,
                fmax=options.fmax,
                steps=options.steps,
                gas=source,
                gas_per_atom=gas,
                check_minima=options.check_minima,
            ),
            out=options.out,
            overwrite=options.overwrite,
            energy_kind=chosen.energy_kind,
            describe=chosen.record,
            notes={"slab": slabs[0].report.summary()},
        )
        for notice in series.notices:
            print(f"WARNING: {notice}")
        print(series)
        for check in series.record["saddle_check"]["checks"]:
            if check["fell"]:
                print(check["sentence"])
        print(f"saved in {options.out}: {', '.join(['coverage.json', *series.record['files']])}")
        return Result(series.record, 0 if series.converged else 3, chosen.checkpoint)


def _composition(text: str) -> int | tuple[int, ...]:
    """Number of molecules, or numbers of each adsorbate's."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of molecules nor a composition such as 2,1"
        ) from None
    return numbers if "," in text else numbers[0]
