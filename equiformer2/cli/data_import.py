"""Import of own DFT results: the command `equiformer2 data import`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    ENERGY_KINDS,
    add_overwrite_argument,
    add_worker_argument,
    parse_checked,
    random_seed,
)
from equiformer2.errors import InputError
from equiformer2.files import check_target, write_json
from equiformer2.script import header, show_log

if TYPE_CHECKING:
    from datasets_oc20.own_data.report import ImportReport

_ENERGY_UNITS = (
    "eV",
    "Ha",
    "Ry",
    "kcal/mol",
    "kJ/mol",
    "meV",
)  # the tables of own_data.labels, which needs ASE
_FORCE_UNITS = ("eV/A", "Ha/bohr", "Ry/bohr", "eV/bohr", "kcal/mol/A", "kJ/mol/A", "meV/A")
_STRESS_UNITS = ("eV/A^3", "GPa", "kbar")


class Import(Command):
    """Import your own DFT results into a file for training, fine-tuning and evaluation.

    Files may be anything that ASE reads with energies: OUTCAR and vasprun.xml of VASP, outputs of Quantum
    ESPRESSO and GPAW, trajectories, ase.db databases, extended XYZ, ASE-LMDB; compressed (.gz, .bz2, .xz) or
    not. Folders are searched with all folders in them. A frame or file that cannot be used is left out and
    listed with the reason, in the terminal and in OUT.import.json; nothing else is dropped.
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("files", nargs="+", type=Path, metavar="FILES", help="files and folders to read")
        parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="LMDB file to write")
        parser.add_argument(
            "--mixed",
            action="store_true",
            help="allow calculations with different settings (functional, cut-off, +U, spin, smearing, "
            "potentials) and energies that look like two kinds; without, such sets are refused",
        )
        self._add_label_arguments(parser)
        self._add_structure_arguments(parser)
        self._add_split_arguments(parser)
        add_worker_argument(parser)
        add_overwrite_argument(parser)

    def _add_label_arguments(self, parser: Parser) -> None:
        add = parser.add_argument_group("energies, forces and stress").add_argument
        add(
            "--energy",
            choices=("energy", "free_energy"),
            default="energy",
            help="energy as ASE's get_potential_energy() gives it (VASP: extrapolated to zero smearing), or "
            "the free energy, of which the forces are the derivative (default: %(default)s)",
        )
        add(
            "--energy-kind",
            choices=ENERGY_KINDS,
            help="kind of the energies (default: what the file declares, else total)",
        )
        add("--energy-key", metavar="KEY", help="key of a structure with its energy (default: ASE's energy)")
        add("--forces-key", metavar="KEY", help="key with the forces (default: ASE's forces)")
        add(
            "--stress-key",
            metavar="KEY",
            help="key with the stress, or with a virial if its name says so (default: ASE's stress)",
        )
        add(
            "--energy-unit",
            choices=_ENERGY_UNITS,
            default="eV",
            help="unit of the energies, and of a virial (default: %(default)s)",
        )
        add(
            "--forces-unit",
            choices=_FORCE_UNITS,
            default="eV/A",
            help="unit of the forces (default: %(default)s)",
        )
        add(
            "--stress-unit",
            choices=_STRESS_UNITS,
            default="eV/A^3",
            help="unit of the stress (default: %(default)s)",
        )
        add(
            "--stress-sign",
            choices=("tension", "compression"),
            default="tension",
            help="deformation for which a stress is positive; tension is ASE's (default: %(default)s)",
        )
        add(
            "--no-unit-check",
            action="store_true",
            help="keep files whose energies do not change as their forces say, as with forces in other units",
        )

    def _add_structure_arguments(self, parser: Parser) -> None:
        add = parser.add_argument_group("structures").add_argument
        add(
            "--select",
            metavar="CONDITIONS",
            help="frames to use, as ase db selects: comparisons of numbers of atoms, of natoms, formula, "
            "volume, mass, energy, fmax, smax, charge and pbc, and of keys of the file, such as "
            "'natoms>5,Cu>0' (default: all)",
        )
        add("--pbc", metavar="T,T,F", help="periodic directions of all structures (default: as in the files)")
        add(
            "--adsorbate",
            metavar="RULE",
            help="atoms of the adsorbate, which get tag 2: 'last 2', 'first 2', 'indices 0-17,20', "
            "'z>12' (Å), a formula such as CO, or none (default: the tags 0, 1, 2 of the file, else fixed "
            "atoms get 0 and others 1)",
        )
        add(
            "--fixed",
            metavar="RULE",
            help="atoms that DFT held, such as 'z<4.5' (default: the constraints of the file, for an OUTCAR "
            "those of the CONTCAR or POSCAR beside it)",
        )

    def _add_split_arguments(self, parser: Parser) -> None:
        add = parser.add_argument_group("splits").add_argument
        add(
            "--split",
            choices=("system", "composition", "source"),
            help="split by system, ratio of the elements, or source file into train (--out), val and test "
            "(OUT.val.lmdb, OUT.test.lmdb); frames of one trajectory stay together (default: one file)",
        )
        add("--group-key", metavar="KEY", help="split by the values of this key of the structures")
        add(
            "--fractions",
            metavar="A,B,C",
            help="shares of the frames for train, val and, with three, test (default: 0.8,0.1,0.1)",
        )
        add("--seed", type=random_seed, help="random seed of the split (default: 0)")

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        options = parse_checked(
            parser,
            arguments,
            excludes=[
                ("--split", "--group-key"),
                ("--energy-key", "--energy=free_energy"),
            ],
        )
        if options.split is None and options.group_key is None:
            for name in ("fractions", "seed"):
                if getattr(options, name) is not None:
                    parser.error(f"--{name} has no meaning without --split or --group-key: leave it out")
        return options

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.own_data.atom_rules import AtomRule
        from datasets_oc20.own_data.importer import ImportOptions, import_files, part_files, report_file
        from datasets_oc20.own_data.labels import LabelOptions
        from datasets_oc20.own_data.selection import FrameSelection
        from datasets_oc20.own_data.splits import SplitOptions

        show_log()
        logging.getLogger("datasets_oc20").setLevel(logging.INFO)
        labels = LabelOptions(
            energy=options.energy,
            energy_key=options.energy_key,
            forces_key=options.forces_key,
            stress_key=options.stress_key,
            energy_unit=options.energy_unit,
            forces_unit=options.forces_unit,
            stress_unit=options.stress_unit,
            stress_sign=options.stress_sign,
            pbc=self._directions(options.pbc),
            adsorbate=None if options.adsorbate is None else AtomRule(options.adsorbate),
            fixed=None if options.fixed is None else AtomRule(options.fixed),
            group_key=options.group_key,
            select=None if options.select is None else FrameSelection(options.select),
        )
        split = None
        if options.split is not None or options.group_key is not None:
            split = SplitOptions(options.split or "key", self._shares(options.fractions), options.seed or 0)
        settings = ImportOptions(labels, options.energy_kind, options.mixed, not options.no_unit_check, split)
        report_path = report_file(options.out)
        written = part_files(options.out, split).values()
        for path in (*written, report_path):
            check_target(path, inputs=options.files, overwrite=options.overwrite)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        self._print_defaults(options)
        report = import_files(options.files, options.out, settings, options.num_workers)
        for path in part_files(options.out, SplitOptions()).values():
            if path not in written and path.exists():
                report.notices.append(
                    f"{path} is of an earlier import, and its frames may be among those for training now: "
                    "remove it, or give --split"
                )
        record = {**header("data-import/1"), **report.to_record()}
        print(report.to_text())
        if not report.kept:
            print(f"error: {self._nothing_kept(report)}", file=sys.stderr)
            return Result(record, status=2)
        write_json(report_path, record)
        print(f"{report.kept} frames to {options.out}; report: {report_path}")
        return Result(record)

    def _nothing_kept(self, report: "ImportReport") -> str:
        """Sentence about an import of which nothing is left."""
        if report.not_selected:
            return (
                f"the selection leaves out all {report.not_selected} frames that could be read, so nothing "
                "was written"
            )
        first = report.dropped[0]
        place = "" if first.index is None else f", frame {first.index}"
        more = f" (and {len(report.dropped) - 1} more)" if len(report.dropped) > 1 else ""
        return f"no frame could be used, so nothing was written: {first.file}{place}: {first.reason}{more}"

    def _print_defaults(self, options: argparse.Namespace) -> None:
        """Print what is taken where nothing was said, and why."""
        energy = {
            "energy": "ASE's potential energy (VASP: extrapolated to zero smearing, as OC20's; --energy "
            "free_energy takes the energy that the forces are of)",
            "free_energy": "free energy, which the forces are the derivative of",
        }[options.energy]
        print(f"energy: {options.energy_key or energy}")
        kind = options.energy_kind or "total, unless the file says otherwise (codes write total energies)"
        print(f"kind of energy: {kind}")
        print(
            f"units: energies in {options.energy_unit}, forces in {options.forces_unit}, stress in "
            f"{options.stress_unit}, positive under {options.stress_sign} (ASE's: eV, eV/A, eV/A^3, tension; "
            "--energy-unit, --forces-unit, --stress-unit, --stress-sign)"
        )
        print("steps whose electronic steps did not converge: dropped (their energies are not final)")
        print(f"periodic directions: {options.pbc or 'as in the files (--pbc sets them)'}")

    def _directions(self, text: str | None) -> tuple[bool, bool, bool] | None:
        """Three flags from `T,T,F`."""
        if text is None:
            return None
        words = text.replace(",", " ").split() if "," in text or " " in text else list(text)
        flags = {"t": True, "true": True, "1": True, "f": False, "false": False, "0": False}
        if len(words) != 3 or any(word.lower() not in flags for word in words):
            raise InputError(f"--pbc {text}: give three of T and F, such as T,T,F")
        a, b, c = (flags[word.lower()] for word in words)
        return a, b, c

    def _shares(self, text: str | None) -> tuple[float, ...]:
        """Numbers from `0.8,0.1,0.1`."""
        if text is None:
            return (0.8, 0.1, 0.1)
        try:
            return tuple(float(word) for word in text.split(","))
        except ValueError as error:
            raise InputError(f"--fractions {text}: give numbers such as 0.8,0.1,0.1") from error
