"""Commands about adsorption: the energy of an adsorbate on a slab."""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from equiformer2.cli.chosen_model import ChosenModel
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    NETWORK_ONLY,
    Options,
    add_dispersion_argument,
    add_model_arguments,
    add_overwrite_argument,
    add_relaxation_arguments,
    add_spread_argument,
    add_twin_argument,
    parse_checked,
)
from equiformer2.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

    from equiformer2.adsorption import SlabOptions

GAS_SOURCES = ("vacuum", "molecules", "oc20")  # those of inference.references, which needs ASE
ONLY_FOR_PLACING = (
    *("size", "vacuum", "free_layers", "lattice_constant"),
    *("site", "position", "height", "binding_atom", "flat"),
)
"""Options that build and place, which mean nothing for a whole system."""


class AdsorptionEnergy(Command):
    """Compute the adsorption energy of an adsorbate on a slab with an EquiformerV2 or an ASE calculator.

    Relaxes slab + adsorbate and prints the adsorption energy. With a model of total energies the clean slab
    is relaxed too, and it and the adsorbate in vacuum are subtracted; with one of adsorption energies nothing
    is. Several checkpoints are a committee: their mean, and the spread beside it. Exit status 3: the
    relaxation has not converged.

        equiformer2 adsorption energy --checkpoint oc20_small --slab Pt111 --adsorbate CO --site ontop
        equiformer2 adsorption energy --checkpoint model.pt --slab slab.cif --adsorbate '*OH'
        equiformer2 adsorption energy --checkpoint model.pt --system slab_with_adsorbate.traj
        equiformer2 adsorption energy --calculator emt --slab Cu111 --adsorbate O --site fcc
    """

    def add_arguments(self, parser: Parser) -> None:
        model = parser.add_argument_group("model")
        add_model_arguments(model, committee=True, calculator=True)
        add_twin_argument(model)
        add_spread_argument(model)
        add_dispersion_argument(model)
        structure = parser.add_argument_group("structure: --system, or --slab and --adsorbate")
        structure.add_argument(
            "--system", metavar="FILE", help="structure file of slab + adsorbate; adsorbate atoms carry tag 2"
        )
        structure.add_argument(
            "--adsorbate-indices",
            type=lambda text: _integers(text, ","),
            metavar="36,37",
            help="indices of the adsorbate's atoms in a --system without tags",
        )
        structure.add_argument(
            "--slab", metavar="NAME|FILE", help="slab to build (Pt111, Fe110, Ru0001, …) or a structure file"
        )
        structure.add_argument(
            "--adsorbate", metavar="NAME|FILE", help="adsorbate (CO, *OH, CH3OH, …) or a structure file"
        )
        add_built_slab_arguments(structure)
        structure.add_argument(
            "--site", help="adsorption site: ontop, bridge, fcc, hcp, hollow, … (default: ontop)"
        )
        structure.add_argument(
            "--position",
            type=float,
            nargs=2,
            metavar=("X", "Y"),
            help="position of the adsorbate in the plane, Å, in place of --site",
        )
        structure.add_argument(
            "--height", type=float, help="height above the top atoms, Å (default: in contact)"
        )
        structure.add_argument(
            "--binding-atom",
            type=int,
            help="index of the adsorbate's atom that binds (default: docs/adsorption.md)",
        )
        structure.add_argument("--flat", action="store_true", help="lay the adsorbate flat")
        self._add_reference_arguments(parser)
        relaxation = parser.add_argument_group("relaxation")
        relaxation.add_argument(
            "--relax-clean-slab",
            action="store_true",
            help="find anomalies by comparing the surface with the relaxed clean slab (a second relaxation), "
            "not with the initial one",
        )
        add_relaxation_arguments(relaxation)
        relaxation.add_argument(
            "--out", default="runs/adsorption_energy", help="output folder (default: %(default)s)"
        )
        add_overwrite_argument(relaxation)

    def _add_reference_arguments(self, parser: Parser) -> None:
        references = parser.add_argument_group("references (models of total energies only)")
        references.add_argument(
            "--slab-energy", type=float, help="total energy of the relaxed clean slab, same method, eV"
        )
        references.add_argument(
            "--gas-reference",
            type=gas_reference,
            action="append",
            default=[],
            metavar="X=EV",
            help="energy per atom of element X, eV; give every element of the adsorbate",
        )
        references.add_argument(
            "--gas",
            action="append",
            default=[],
            metavar="vacuum|molecules|oc20|X=EV,Y=EV",
            help="energy of the adsorbate by itself: relaxed in vacuum (default), per atom from the model's "
            "H2, H2O, CO and N2, OC20's RPBE values (for OC20's total energies only), or eV per atom",
        )

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        return parse_checked(parser, arguments, excludes=NETWORK_ONLY)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption import adsorption_energy
        from equiformer2.adsorption.adsorbates import is_file
        from equiformer2.adsorption.conventions import convention_lines
        from equiformer2.adsorption.record import adsorption_report, write_adsorption_record
        from equiformer2.adsorption.start_checks import check_vacuum
        from equiformer2.files import read_json
        from equiformer2.inference.atoms import ADSORBATE
        from equiformer2.inference.record import ADSORPTION_RECORD, RUN_FILES, claim_folder
        from equiformer2.script import show_log

        _check_structure_options(options)
        of_elements = [f"{symbol}={value!r}" for symbol, value in options.gas_reference]
        gas, source = gas_references([*options.gas, *of_elements])
        show_log()
        system = _system(options)
        chosen = ChosenModel(options)
        if options.slab is not None and chosen.cutoff is not None:
            check_vacuum(system[system.get_tags() != ADSORBATE], chosen.cutoff)
        named = [name for name in (options.slab, options.adsorbate) if name is not None and is_file(name)]
        inputs = [*chosen.files, *named, *filter(None, [options.system])]
        folder = claim_folder(options.out, ADSORPTION_RECORD, options.overwrite, inputs, RUN_FILES)
        result = adsorption_energy(
            system,
            chosen.calculator,
            energy_kind=chosen.energy_kind,
            slab_energy=options.slab_energy,
            gas_references=gas,
            gas_source=source,
            relax_clean_slab=options.relax_clean_slab,
            optimizer=options.optimizer,
            fmax=options.fmax,
            steps=options.steps,
            stop_at_spread=options.stop_at_spread,
            folder=folder,
            progress=True,
        )
        states = [result.initial, result.system.atoms]
        write_adsorption_record(folder, result, chosen.record(states), chosen.provenance)
        record = read_json(folder / ADSORPTION_RECORD)
        print(adsorption_report(result))
        print("\n".join(f"  {line}" for line in convention_lines(record["conventions"])))
        print(f"saved in {folder}: {ADSORPTION_RECORD}, trajectory, relaxed structure, pictures")
        if not result.converged:
            print(
                "NOT converged: the energy is not that of a relaxed structure (more --steps, another start)"
            )
        return Result(record, 0 if result.converged else 3, chosen.checkpoint)


def add_built_slab_arguments(parser: Options) -> None:
    """Add the options of a slab that is built by name."""
    parser.add_argument(
        "--size", type=_size, metavar="3x3x4", help="repetitions and layers of the slab (default: 3x3x4)"
    )
    parser.add_argument("--vacuum", type=float, help="vacuum on either side of a built slab, Å (default: 10)")
    parser.add_argument(
        "--free-layers", type=int, help="number of layers that move, from the top (default: 2)"
    )
    parser.add_argument(
        "--lattice-constant",
        type=float,
        help="lattice constant a, Å (default: ASE's experimental value)",
    )


def slab_options(options: argparse.Namespace) -> "SlabOptions":
    """The options of `add_built_slab_arguments`."""
    from equiformer2.adsorption import SlabOptions

    return SlabOptions(options.size, options.vacuum, options.free_layers, options.lattice_constant)


def _system(options: argparse.Namespace) -> "Atoms":
    from equiformer2.adsorption import PlacementOptions, load_system, prepare_system

    if options.system is not None:
        return load_system(options.system, options.adsorbate_indices)
    return prepare_system(
        options.slab,
        options.adsorbate,
        slab_options(options),
        PlacementOptions(options.site, options.position, options.height, options.binding_atom, options.flat),
    )


def _check_structure_options(options: argparse.Namespace) -> None:
    """Raise `InputError` unless one structure is given, and for options that would be ignored."""
    if (options.system is None) == (options.slab is None or options.adsorbate is None):
        raise InputError("give either --system, or --slab and --adsorbate")
    if options.system is not None:
        ignored = [
            name
            for name in ONLY_FOR_PLACING
            if (value := getattr(options, name)) is not None and value is not False
        ]
        beside = "--system, which is slab and adsorbate already"
    else:
        ignored = ["adsorbate_indices"] if options.adsorbate_indices is not None else []
        beside = "--slab and --adsorbate, which say what is the adsorbate"
    if ignored:
        names = ", ".join("--" + name.replace("_", "-") for name in ignored)
        raise InputError(f"{names} would be ignored beside {beside}: leave it out")


def gas_references(texts: list[str]) -> tuple[dict[str, float], str]:
    """Energies per atom and source of `--gas`."""
    table: dict[str, float] = {}
    sources: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        if part in GAS_SOURCES:
            sources.append(part)
            continue
        try:
            symbol, value = gas_reference(part)
        except argparse.ArgumentTypeError:
            raise InputError(
                f"--gas {part!r} is none of {', '.join(GAS_SOURCES)} "
                "or an element and an energy in eV, such as S=-4.1"
            ) from None
        if table.get(symbol, value) != value:
            raise InputError(f"--gas gives {symbol} twice, {table[symbol]:g} and {value:g} eV: give one")
        table[symbol] = value
    if len(set(sources)) > 1:
        raise InputError(f"--gas {' and '.join(sorted(set(sources)))} were both given: give one of them")
    if table and "vacuum" in sources:
        raise InputError(
            f"--gas vacuum and the energy of {next(iter(table))} per atom were both given: give one of them"
        )
    return table, sources[0] if sources else "vacuum"


def gas_reference(text: str) -> tuple[str, float]:
    """Element and energy, eV, from `X=EV`."""
    from ase.data import atomic_numbers

    symbol, _, value = text.partition("=")
    try:
        if symbol in atomic_numbers and math.isfinite(float(value)):
            return symbol, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be an element and an energy in eV, such as S=-4.1")


def _size(text: str) -> tuple[int, ...]:
    size = tuple(_integers(text, "x"))
    if len(size) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers such as 3x3x4")
    return size


def _integers(text: str, separator: str) -> list[int]:
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers joined by {separator!r}") from None
