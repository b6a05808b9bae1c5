"""Commands from the minima of searches to free energies and what is drawn from them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equiformer2.cli.adsorption_search import add_model_in_place, model_in_place
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import add_corrections_argument, add_overwrite_argument, parse_checked
from equiformer2.errors import InputError

#: Times the threshold of a search, above which a structure is no minimum at all.
_FAR_FROM_MINIMUM = 10.0
#: eV/Å; other processors and numbers of threads change forces in the last digits.
_ROUNDING = 5e-3


class AdsorptionFreeEnergy(Command):
    """Compute vibrations and the free energy of the best structure of a search.

    Displaces the adsorbate's atoms on the held slab. The free energy is that of the formation from CO, H2O,
    N2 and protons with electrons (computational hydrogen electrode). Writes free_energy.json into the folder.
    Exit status 3 if the structure has not converged; one with forces above 10 times the search's threshold is
    refused.

        equiformer2 adsorption free-energy runs/co --temperature 298.15 --potential 0 --ph 0
        equiformer2 adsorption free-energy runs/ch3oh --entropy hindered --pressure H2=10,CO=1
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
            "--pressure",
            action="append",
            default=[],
            metavar="H2=1,CO=0.1",
            help="pressures of gases, bar (default: 1, and 0.03534 for H2O, that of liquid water at 300 K)",
        )
        parser.add_argument(
            "--lowest-frequency",
            type=float,
            default=50.0,
            help="frequency that softer and imaginary modes count as, cm^-1 (default: %(default)s)",
        )
        add_corrections_argument(parser, "of the energy of formation")
        hindered = parser.add_argument_group("entropy")
        hindered.add_argument(
            "--entropy",
            choices=("harmonic", "hindered"),
            default="harmonic",
            help="harmonic vibrations alone, or two hindered translations and a hindered rotation in the "
            "place of the three softest (default: %(default)s)",
        )
        for kind in ("translation", "rotation"):
            hindered.add_argument(
                f"--{kind}-barrier",
                type=float,
                metavar="EV",
                help=f"barrier of {kind} along the surface, eV (default: of `adsorption neb`, or the energy "
                "of the next minimum of the search, which is less than the barrier)",
            )
        hindered.add_argument(
            "--rotational-minima",
            type=int,
            metavar="N",
            help="equal minima in a full turn (default: rotations of the clean slab about the site)",
        )
        hindered.add_argument(
            "--symmetry-number",
            type=int,
            default=1,
            metavar="N",
            help="symmetry number of the adsorbate about the normal of the surface (default: %(default)s)",
        )
        add_overwrite_argument(parser)

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        only = ("--translation-barrier", "--rotation-barrier", "--rotational-minima", "--symmetry-number")
        return parse_checked(parser, arguments, excludes=[(option, "--entropy=harmonic") for option in only])

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.corrections import Corrections
        from equiformer2.adsorption.finished_search import FinishedSearch
        from equiformer2.adsorption.free_energy import Reaction, free_energy, referred_energy, vibrations
        from equiformer2.adsorption.hindered import hindered_motion
        from equiformer2.files import check_target, write_json
        from equiformer2.script import header

        target = options.folder / "free_energy.json"
        check_target(target, overwrite=options.overwrite)
        pressures = _pressures(options.pressure)
        corrections = Corrections() if options.corrections is None else Corrections.read(options.corrections)
        search = FinishedSearch.read(options.folder)
        energy, warning = referred_energy(search.record)
        reaction = Reaction.of(search.adsorbate)  # before hours of work on an adsorbate without gases
        name = search.record["settings"].get("adsorbate") or search.adsorbate.get_chemical_formula()
        motion = None
        if options.entropy == "hindered":
            motion = hindered_motion(
                search,
                options.translation_barrier,
                options.rotation_barrier,
                options.rotational_minima,
                options.symmetry_number,
            )
        given = model_in_place(options)
        model = search.model(given, options.adapter)
        corrections.check_model(model.identity(), search.record.get("gas"))
        threshold = float(search.record["settings"].get("fmax_eV_A", 0.05))
        modes = vibrations(search.best, model, largest_force=_FAR_FROM_MINIMUM * threshold)
        found = free_energy(
            energy,
            search.adsorbate,
            modes,
            options.temperature,
            options.potential,
            options.ph,
            options.lowest_frequency,
            pressures,
            motion,
            corrections.of(Path(str(name)).stem, reaction.gases, reaction.electrons),
        )
        converged = bool(search.record["converged"]) and modes.max_force < threshold + _ROUNDING
        water = reaction.water_warning(options.temperature, pressures)
        warnings = [text for text in (warning, water) if text is not None]
        if not converged:
            warnings.append(
                f"the structure has not converged (largest force {modes.max_force:.3f} eV/Å), so its "
                "vibrations are not those of a minimum"
            )
        if found["imaginary"]:
            sizes = ", ".join(f"{size:.0f}" for size in found["imaginary_cm1"])
            counted = (
                "three of the softest modes replaced"
                if motion
                else f"counted as {options.lowest_frequency:g}"
            )
            warnings.append(
                f"imaginary modes: {found['imaginary']} ({sizes} cm^-1), {counted}: the structure may be no "
                "minimum"
            )
        record = {
            **header("adsorption-free-energy/1", search.checkpoint(given)),
            **found,
            "corrections": corrections.summary(),
            "model": model.identity(),
            "converged": converged,
            "warnings": warnings,
        }
        write_json(target, record)
        self._print(record)
        if corrections.species:
            print(corrections.told(record["corrections_eV"]))
        return Result(record, 0 if converged else 3)

    def _print(self, found: Mapping[str, Any]) -> None:
        print(f"formation: {found['reaction'] or 'nothing'}")
        print(f"adsorption energy   {found['adsorption_energy_eV']:10.4f} eV")
        for name, value in found["corrections_eV"].items():
            print(f"correction of {name:5} {value:+10.4f} eV")
        print(f"zero-point energy   {found['zpe_eV']:+10.4f} eV")
        print(f"heat                {found['heat_eV']:+10.4f} eV")
        print(f"entropy             {-found['entropy_eV']:+10.4f} eV ({found['entropy_model']})")
        print(f"gases               {-found['gas_correction_eV']:+10.4f} eV")
        print(f"electrons           {found['electrons'] * found['potential_against_rhe_V'] + 0.0:+10.4f} eV")
        print(f"free energy         {found['free_energy_eV']:10.4f} eV at {found['temperature_K']:g} K")
        if found["hindered"] is not None:
            for kind in ("translation", "rotation"):
                source = found["hindered"]["sources"][f"{kind}_barrier"]
                print(f"barrier of {kind}: {found['hindered'][f'{kind}_barrier_eV']:.3f} eV ({source})")
        for warning in found["warnings"]:
            print(f"warning: {warning}")


class AdsorptionDiagram(Command):
    """Draw the free-energy diagram of several adsorbates on one slab.

    The folders are those of searches, in the order of the reaction, each with its free energy
    (`equiformer2 adsorption free-energy`) at the same temperature, potential and pressures, of one model and
    with the same gas references. A reaction that starts or ends with a gas above the clean slab names it
    (--start, --end). Exit status 3 if a state has not converged.

        equiformer2 adsorption diagram runs/oh runs/o runs/ooh --end O2 --potentials 0 1.23 --out runs/oer
        equiformer2 adsorption diagram runs/cooh runs/co --start CO2 --end CO --out runs/co2rr
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "folders", nargs="+", type=Path, metavar="FOLDER", help="folders of searches, in order"
        )
        parser.add_argument(
            "--start", metavar="GAS", help="gas that the reaction starts from: O2, CO2, N2, … (default: none)"
        )
        parser.add_argument("--end", metavar="GAS", help="gas that the reaction ends with (default: none)")
        parser.add_argument(
            "--potentials",
            type=float,
            nargs="+",
            default=[],
            metavar="V",
            help="potentials against the reversible hydrogen electrode to draw, V (default: that of the free "
            "energies)",
        )
        parser.add_argument(
            "--out", required=True, type=Path, metavar="FOLDER", help="folder for the diagram"
        )
        parser.add_argument("--title", default="free energy", help="title of the figure")
        add_corrections_argument(parser, "for free energies that have none")
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.corrections import Corrections
        from equiformer2.adsorption.diagram import (
            DIAGRAM,
            FREE_ENERGY,
            diagram,
            diagram_picture,
            gas_state,
            read_states,
            used_corrections,
        )
        from equiformer2.files import check_target, read_json, write_bytes, write_json
        from equiformer2.script import header

        target = options.out / DIAGRAM
        check_target(target, overwrite=options.overwrite)
        given = None if options.corrections is None else Corrections.read(options.corrections)
        states = read_states(options.folders, given)
        of_first = read_json(options.folders[0] / FREE_ENERGY)
        potential = float(of_first["potential_against_rhe_V"])
        corrections = given or Corrections.recorded(of_first.get("corrections"))
        used = used_corrections(states, corrections.species)
        ends = [
            [] if name is None else [gas_state(name, states[0]["temperature_K"], potential, pressures)]
            for name in (options.start, options.end)
            for pressures in [states[0]["pressures_bar"]]
        ]
        balanced = diagram([*ends[0], *states, *ends[1]], potential, options.potentials)
        options.out.mkdir(parents=True, exist_ok=True)
        write_bytes(options.out / "diagram.png", diagram_picture(balanced, options.title, used))
        record = {
            **header("adsorption-diagram/1"),
            **balanced,
            "model": of_first.get("model"),
            "potential_against_rhe_V": potential,
            "corrections": corrections.summary(),
            "corrections_eV": used,
        }
        write_json(target, record)
        for step in balanced["steps"]:
            taken = {"(H+ + e-)": step["electrons"], **step["gases"]}
            told = ", ".join(f"{number:+g} {name}" for name, number in taken.items() if number)
            print(f"{step['from']} -> {step['to']}: {step['change_eV']:+.3f} eV; takes {told or 'nothing'}")
        if balanced["limiting_potential_V"] is not None:
            print(
                f"limiting potential {balanced['limiting_potential_V']:.3f} V against RHE "
                f"({balanced['limiting_step']})"
            )
        if corrections.species:
            print(corrections.told(used))
        for warning in balanced["warnings"]:
            print(f"warning: {warning}")
        print(f"saved in {options.out}: diagram.json, diagram.png")
        return Result(record, 0 if balanced["converged"] else 3)


class AdsorptionVolcano(Command):
    """Draw a volcano: the activity of many slabs against the free energy of an adsorbate.

    Takes the folders of free-energy diagrams (`equiformer2 adsorption diagram`) of one reaction on several
    slabs, each folder named after its slab, or a CSV file with a column `system` and one column of free
    energies per adsorbate (eV, at 0 V against the reversible hydrogen electrode). The activity is minus the
    largest step per electron: the limiting potential of a reduction, minus that of an oxidation. With three
    systems or more the legs are those of linear scaling, fitted by least squares.

        equiformer2 adsorption volcano table.csv --reaction orr --out runs/volcano
        equiformer2 adsorption volcano runs/pt111/oer runs/ir111/oer runs/ru0001/oer --out runs/volcano
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "inputs", nargs="+", type=Path, metavar="TABLE|FOLDER", help="CSV file, or folders of diagrams"
        )
        parser.add_argument(
            "--reaction",
            choices=("her", "orr", "oer"),
            help="hydrogen evolution (H), oxygen reduction or evolution (OH, O, OOH); needed with a CSV file "
            "(default: the path of the diagrams)",
        )
        parser.add_argument(
            "--descriptor",
            metavar="X|X-Y",
            help="adsorbate whose free energy is the descriptor, or a difference such as O-OH (default: OH, "
            "or the first of the path)",
        )
        parser.add_argument(
            "--out", required=True, type=Path, metavar="FOLDER", help="folder for the volcano"
        )
        parser.add_argument("--title", default="volcano", help="title of the figure")
        add_corrections_argument(parser, "for free energies that have none")
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adsorption.corrections import Corrections, correction_text
        from equiformer2.adsorption.volcano import (
            named_path,
            read_diagrams,
            read_table,
            volcano,
            volcano_picture,
        )
        from equiformer2.files import check_target, write_bytes, write_json
        from equiformer2.script import header

        target = options.out / "volcano.json"
        check_target(target, inputs=options.inputs, overwrite=options.overwrite)
        tables = [path for path in options.inputs if path.suffix.lower() == ".csv"]
        if tables and len(options.inputs) > 1:
            raise InputError("give one CSV file, or folders of diagrams")
        if tables and options.reaction is None:
            raise InputError(f"{tables[0]} does not say of which reaction it is: give --reaction")
        table = read_table(tables[0]) if tables else read_diagrams(options.inputs)
        given = None if options.corrections is None else Corrections.read(options.corrections)
        table = table if given is None else table.corrected(given)
        path = table.path
        if options.reaction is not None:
            path = named_path(options.reaction, table.temperature, table.pressures)
        found = volcano(table, path or [], options.descriptor)
        options.out.mkdir(parents=True, exist_ok=True)
        write_bytes(options.out / "volcano.png", volcano_picture(found, options.title))
        corrections = None if given is None else given.summary()
        record = {**header("adsorption-volcano/1"), **found, "corrections": corrections}
        write_json(target, record)
        print(f"{'system':24}{found['descriptor'] + ' (eV)':>24}{'activity (V)':>14}  limiting step")
        for point in found["points"]:
            print(
                f"{point['system']:24}{point['descriptor_eV']:24.3f}{point['activity_V']:14.3f}"
                f"  {point['limiting_step']}"
            )
        for name, fit in found["scaling"].items():
            print(
                f"G(*{name}) = {fit['slope']:.3f} x {fit['intercept_eV']:+.3f} eV, mean error "
                f"{fit['mae_eV']:.3f} eV"
            )
        if found["peak"] is not None:
            peak = found["peak"]
            print(f"peak at {peak['descriptor_eV']:.3f} eV: activity {peak['activity_V']:.3f} V")
        elif not found["legs"]:
            print("no legs: lines take three systems of different descriptors")
        used = found["corrections_eV"]
        if given is not None or used:
            print(correction_text(used) if given is None else given.told(used))
        for note in found["notes"]:
            print(f"note: {note}")
        print(f"saved in {options.out}: volcano.json, volcano.png")
        return Result(record)


def _pressures(texts: Sequence[str]) -> dict[str, float]:
    """Pressures in bar of `--pressure`."""
    found: dict[str, float] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, _, value = part.partition("=")
        try:
            pressure = float(value)
        except ValueError:
            raise InputError(
                f"--pressure {part!r} is no gas with a pressure in bar, such as CO=0.1"
            ) from None
        if found.get(name, pressure) != pressure:
            raise InputError(f"--pressure gives {name} twice, {found[name]:g} and {value} bar: give one")
        found[name] = pressure
    return found
