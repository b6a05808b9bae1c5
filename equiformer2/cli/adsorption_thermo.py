"""Commands from the minima of searches to free energies and what is drawn from them."""

import argparse
from pathlib import Path

from equiformer2.cli.adsorption_search import add_model_in_place, model_in_place
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import add_overwrite_argument


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
