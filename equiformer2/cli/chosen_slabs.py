"""The slabs of a command that takes `--slab`, or `--bulk` and `--miller`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equiformer2.cli.adsorption import add_built_slab_arguments, slab_options
from equiformer2.cli.chosen_model import ChosenModel
from equiformer2.cli.options import NETWORK_ONLY, Options, parse_checked

if TYPE_CHECKING:
    from equiformer2.adsorption.slabs import CleanSlab
    from equiformer2.adsorption.surface_energy import SurfaceEnergies

_BUILT = ("--size", "--vacuum", "--free-layers", "--lattice-constant", "--slab")
_CUT = ("--bulks", "--miller", "--max-miller", "--termination", "--keep-lattice")


def add_slab_arguments(parser: Options) -> None:
    """Add the options of slabs that are built by name, read from a file or cut out of a bulk."""
    parser.add_argument(
        "--slab", metavar="NAME|FILE", help="slab to build (Pt111, …) or a structure file of a clean slab"
    )
    add_built_slab_arguments(parser)
    parser.add_argument(
        "--bulk",
        metavar="BULK",
        help="bulk to cut, in place of --slab: an element, 'Cu3Pt L1_2 a=3.7', a file, or mp-30 with --bulks",
    )
    parser.add_argument(
        "--bulks", type=Path, metavar="FILE", help="database with bulks, where --bulk is a number in it"
    )
    parser.add_argument("--miller", metavar="111|all", help="Miller indices of the cut (with --bulk)")
    parser.add_argument(
        "--max-miller", type=int, default=1, help="largest index for all (default: %(default)s)"
    )
    parser.add_argument("--termination", metavar="N|all", help="termination of the cut (default: 0)")
    parser.add_argument(
        "--keep-lattice",
        action="store_true",
        help="cut the bulk as it is; without, its lattice constants are relaxed with a calculator of "
        "total energies, or taken from a table of RPBE for adsorption energies",
    )


def parse_with_slab(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    needs: Sequence[tuple[str, str]] = (),
) -> argparse.Namespace:
    """Parse the command line of a command with a model and `add_slab_arguments`; see `parse_checked`."""
    options = parse_checked(
        parser,
        arguments,
        excludes=[*NETWORK_ONLY, *((name, "--bulk") for name in _BUILT)],
        needs=[*((name, "--bulk") for name in _CUT), ("--bulk", "--miller"), *needs],
    )
    if options.slab is None and options.bulk is None:
        parser.error("give --slab, or --bulk and --miller")
    return options


def chosen_slabs(
    options: argparse.Namespace, chosen: ChosenModel
) -> "tuple[list[CleanSlab], SurfaceEnergies]":
    """Build, read or cut the slabs, and print each with its notices.

    Several slabs of a bulk come in the order of their surface energies, the most stable first, where the
    model has total energies.

    Returns:
        The slabs, and their surface energies; those of a single slab are not calculated.

    Raises:
        InputError: no slab or bulk of that kind, and what `slabs_of_bulk` raises.
    """
    from equiformer2.adsorption.bulks import find_bulk
    from equiformer2.adsorption.lattice_constants import relaxed_bulk, strain_notices
    from equiformer2.adsorption.slabs import check_miller, find_slab, slabs_of_bulk
    from equiformer2.adsorption.surface_energy import ranked_slabs

    if options.slab is not None:
        slabs = [find_slab(options.slab, **slab_options(options).given())]
    else:
        bulk = find_bulk(options.bulk, options.bulks)
        check_miller(options.miller)
        if not options.keep_lattice:
            relaxed = relaxed_bulk(bulk, chosen.calculator, energy_kind=chosen.energy_kind)
            bulk = relaxed.bulk
            print(f"{bulk.name}: lattice constants by {relaxed.method}, strain {relaxed.strain:+.2%}")
            for notice in relaxed.notices:
                print(f"note: {notice}")
        slabs = slabs_of_bulk(bulk, options.miller, options.termination, max_miller=options.max_miller)
    slabs, energies = ranked_slabs(slabs, chosen.calculator, energy_kind=chosen.energy_kind)
    for slab in slabs:
        print(slab.report)
        strained = () if slab.bulk is None or chosen.energy_kind == "total" else strain_notices(slab.bulk)
        for notice in (*slab.report.notices, *strained):
            print(f"note: {notice}")
    if energies.rows:
        print(energies)
    for notice in energies.notices:
        print(f"note: {notice}")
    return slabs, energies
