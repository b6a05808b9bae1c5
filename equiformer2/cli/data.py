"""Commands about data: download, preprocess, inspect, convert, references."""

import argparse
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets_oc20.catalogue import PROPOSED_ENDING, S2EF, TASKS, Archive, find_archive
from datasets_oc20.disk_space import Need, human, require_space
from datasets_oc20.errors import DataError
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    ENERGY_KINDS,
    add_data_argument,
    add_energy_kind_argument,
    add_overwrite_argument,
    add_worker_argument,
    parse_checked,
)
from equiformer2.files import check_target, write_json
from equiformer2.script import header, show_log

if TYPE_CHECKING:
    from datasets_oc20.archives import Unpacked


def _show_data_log() -> None:
    show_log()
    logging.getLogger("datasets_oc20").setLevel(logging.INFO)


class Download(Command):
    """Download and unpack an archive of OC20.

    A download that was stopped goes on where it stopped; the MD5 sum is checked, and none of your files is
    replaced.
    """

    def add_arguments(self, parser: Parser) -> None:
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument("--task", choices=TASKS, help="task whose archive is downloaded")
        what.add_argument(
            "--url", help="address of another archive, e.g. of OC20's trajectories, or a mirror"
        )
        parser.add_argument("--split", help=f"split of s2ef: {', '.join(S2EF)}")
        parser.add_argument("--md5", help="MD5 sum of the archive at --url")
        parser.add_argument("--out", required=True, type=Path, help="folder for the archive and its files")
        parser.add_argument(
            "--lmdb-out", type=Path, help="folder that will hold the LMDB files (default: --out)"
        )
        parser.add_argument("--no-unpack", action="store_true", help="download only")
        parser.add_argument(
            "--dry-run", action="store_true", help="show sizes and check the free space, then stop"
        )

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.archives import unpack
        from datasets_oc20.download import fetch

        _show_data_log()
        archive, url = self._archive(options)
        needs = self._space_needs(archive, options)
        print(f"{url}: archive {human(archive.size)}, MD5 {archive.md5 or 'not known'}")
        print(
            "to write: " + ", ".join(f"{need.purpose} {human(need.size)} in {need.folder}" for need in needs)
        )
        require_space(needs)
        if options.dry_run:
            return Result({"url": url, "bytes": {need.purpose: need.size for need in needs}})
        options.out.mkdir(parents=True, exist_ok=True)
        target = options.out / archive.file
        report_file = target.with_name(target.name + ".json")
        done = fetch(url, target, archive.md5)
        rate = f" at {human(done.fetched / done.seconds)}/s" if done.fetched and done.seconds else ""
        print(f"{done.path}: {human(done.size)}, {human(done.fetched)} downloaded now{rate}")
        record: dict[str, Any] = {"url": url, **asdict(done), "path": str(done.path)}
        if not options.no_unpack:
            later = [self._lmdb_need(archive, options)]
            unpacked = unpack(target, options.out, later=later, reserved=[report_file])
            print(
                f"{unpacked.files} files, {human(unpacked.size)}; {unpacked.already_there} were there already"
            )
            print(self._next_step(archive, unpacked, options.lmdb_out or options.out))
            folders = [str(folder) for folder in unpacked.data_folders]
            record["unpacked"] = {"files": unpacked.files, "size": unpacked.size, "data_folders": folders}
        record = {**header("data-download/1"), **record}
        write_json(report_file, record)
        return Result(record)

    def _archive(self, options: argparse.Namespace) -> tuple[Archive, str]:
        """The archive and its address."""
        from datasets_oc20.download import remote_size

        if options.url is None:
            if options.md5 is not None:
                raise DataError("--md5 belongs to --url; the sums of OC20's archives are known.")
            archive = find_archive(options.task, options.split)
            return archive, archive.url
        if options.split is not None:
            raise DataError("--split belongs to --task, not to --url.")
        name = options.url.rpartition("/")[2]
        if not name or "?" in name:
            raise DataError(f"{options.url}: the address does not end in the name of a file.")
        md5 = None if options.md5 is None else options.md5.strip().lower()
        if md5 is not None and not re.fullmatch("[0-9a-f]{32}", md5):
            raise DataError(f"--md5 {options.md5}: an MD5 sum has 32 hexadecimal digits.")
        size = remote_size(options.url) or 0
        return Archive(name, size, size, md5), options.url

    def _space_needs(self, archive: Archive, options: argparse.Namespace) -> list[Need]:
        """Bytes that are still to be written, and their folders.

        For an archive that is there already, `unpack` finds out which of its files are missing.
        """
        target = options.out / archive.file
        part = target.with_name(target.name + ".part")
        have = next((path.stat().st_size for path in (target, part) if path.is_file()), 0)
        unpacked = options.no_unpack or target.is_file()
        return [
            Need("archive", options.out, 0 if target.is_file() else max(archive.size - have, 0)),
            Need("unpacked files", options.out, 0 if unpacked else archive.unpacked),
            self._lmdb_need(archive, options),
        ]

    def _lmdb_need(self, archive: Archive, options: argparse.Namespace) -> Need:
        """Bytes that preprocessing will write."""
        return Need("LMDB files", options.lmdb_out or options.out, archive.lmdb_bytes)

    def _next_step(self, archive: Archive, unpacked: "Unpacked", lmdb_folder: Path) -> str:
        folders = ", ".join(str(folder) for folder in unpacked.data_folders)
        if archive.frames is None:
            return f"data: {folders or unpacked.folder}"
        lmdb = lmdb_folder / f"{archive.file.partition('.')[0]}{PROPOSED_ENDING}"
        return f"next: equiformer2 data preprocess --data {folders} --out {lmdb} --shards 64"


class Preprocess(Command):
    """Write raw OC20 files (*.extxyz[.xz] with their reference energies) to LMDB files for training."""

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("--data", required=True, type=Path, help="folder of the raw release")
        parser.add_argument(
            "--out", required=True, type=Path, help="LMDB file to write, or folder for --shards"
        )
        parser.add_argument(
            "--shards",
            type=int,
            help="number of LMDB files, written by one process each; a stopped run goes on",
        )
        parser.add_argument(
            "--energy",
            choices=ENERGY_KINDS,
            default="adsorption",
            help="kind of the energies that are written (default: %(default)s)",
        )
        parser.add_argument(
            "--labels",
            help='statement about the labels, such as "VASP, RPBE", that files and checkpoints will carry',
        )
        add_worker_argument(parser)
        self._add_filter_arguments(parser)
        self._add_later_arguments(parser)
        add_overwrite_argument(parser)

    def _add_filter_arguments(self, parser: Parser) -> None:
        add = parser.add_argument_group("choice of frames").add_argument
        add(
            "--max-energy",
            type=float,
            default=10.0,
            help="largest |adsorption energy| kept, eV (default: %(default)s)",
        )
        add(
            "--max-force",
            type=float,
            default=50.0,
            help="largest force on a free atom kept, eV/Å (default: %(default)s)",
        )
        add(
            "--min-force",
            type=float,
            help="threshold for the largest force on a free atom, below which a frame is removed, eV/Å",
        )
        add("--no-filter", action="store_true", help="keep frames of any energy and force")
        add("--systems", help="names of the systems to keep, separated by commas")
        add("--systems-file", type=Path, help="file with the names of the systems to keep, one a line")
        add("--exclude", help="names of systems to leave out, separated by commas")
        add(
            "--frames",
            type=int,
            help="maximum number of frames per system: half spread evenly, half with the largest forces",
        )

    def _add_later_arguments(self, parser: Parser) -> None:
        add = parser.add_argument_group("last frames of every system, for validation").add_argument
        add("--later-out", type=Path, help="second LMDB file, for the last frames of every system")
        add(
            "--later-fraction",
            type=float,
            default=0.2,
            help="part of a relaxation that goes to --later-out (default: %(default)s)",
        )
        add(
            "--later-gap",
            type=float,
            default=0.1,
            help="part of a relaxation before it that goes to neither file (default: %(default)s)",
        )
        add(
            "--later-tail",
            type=float,
            default=0.0,
            help="part of a relaxation behind it that is for training again (default: %(default)s)",
        )
        add(
            "--later-frames",
            type=int,
            help="maximum number of frames per system in --later-out, spread evenly",
        )

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        later = ("--later-fraction", "--later-gap", "--later-tail", "--later-frames")
        return parse_checked(
            parser,
            arguments,
            needs=[(option, "--later-out") for option in later],
            excludes=[
                ("--max-energy", "--no-filter"),
                ("--max-force", "--no-filter"),
                ("--max-energy", "--energy=total"),
                ("--overwrite", "--shards"),
            ],
        )

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.preprocess import PreprocessOptions, preprocess
        from datasets_oc20.shards import preprocess_shards

        settings = PreprocessOptions(
            energy_kind=options.energy,
            max_energy=None if options.no_filter else options.max_energy,
            max_force=None if options.no_filter else options.max_force,
            min_force=options.min_force,
            frames=options.frames,
            later_fraction=options.later_fraction if options.later_out else 0.0,
            later_gap=options.later_gap,
            later_tail=options.later_tail,
            later_frames=options.later_frames,
            labels=options.labels,
        )
        _show_data_log()
        self._check_outputs(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        choice: dict[str, Any] = {
            "options": settings,
            "systems": self._systems(options),
            "exclude": self._names(options.exclude),
            "num_workers": options.num_workers,
        }
        if options.shards is None:
            report = preprocess(options.data, options.out, later_out=options.later_out, **choice)
            file = options.out.with_suffix(".json")
        else:
            report = preprocess_shards(options.data, options.out, options.shards, **choice)
            file = options.out / "report.json"
        record = {**header("data-preprocess/1"), **asdict(report)}
        write_json(file, record)
        later = f", {report.written_later} later frames to {options.later_out}" if options.later_out else ""
        print(f"{report.written} of {report.read} frames of {report.files} files to {options.out}{later}")
        print(
            f"removed: {report.removed_energy} by energy, {report.removed_force} by force, "
            f"{report.removed_rest} nearly at rest; "
            f"{report.not_chosen} not chosen"
        )
        return Result(record)

    def _systems(self, options: argparse.Namespace) -> list[str] | None:
        """Names from `--systems` or `--systems-file`, or None for all systems."""
        from datasets_oc20.extxyz import read_text

        if options.systems is not None and options.systems_file is not None:
            raise DataError("give --systems or --systems-file, not both.")
        if options.systems_file is not None:
            lines = read_text(options.systems_file).splitlines()
            chosen = [line.strip() for line in lines if line.strip()]
        elif options.systems is not None:
            chosen = self._names(options.systems)
        else:
            return None
        if not chosen:
            raise DataError("--systems and --systems-file must name a system; leave them away for all.")
        return chosen

    def _names(self, text: str | None) -> list[str]:
        return [name.strip() for name in (text or "").split(",") if name.strip()]

    def _check_outputs(self, options: argparse.Namespace) -> None:
        """Refuse names under which a result would replace another one, an input, or an earlier file."""
        if options.shards is not None:  # a stopped run goes on; its folder says of what
            check_target(options.out, is_folder=True)
            return
        report = options.out.with_suffix(".json")
        for path in (options.out, options.later_out):
            if path is not None and path.resolve() == report.resolve():
                raise DataError(f"{path}: is the name of the report on --out; name the LMDB file *.lmdb.")
        inputs = [path for path in (options.data, options.systems_file) if path is not None]
        for path in (options.out, options.later_out, report):
            if path is not None:
                check_target(path, inputs=inputs, overwrite=options.overwrite)


class Inspect(Command):
    """Show frames, systems, elements, energies and tags of a dataset, and the frames that look wrong."""

    def add_arguments(self, parser: Parser) -> None:
        add_data_argument(parser)
        parser.add_argument(
            "--out", required=True, type=Path, help="folder for inspection.json and inspection.png"
        )
        add_energy_kind_argument(parser)
        parser.add_argument(
            "--max-frames",
            type=int,
            default=50_000,
            help="maximum number of frames, evenly spread; 0 for all (default: %(default)s)",
        )
        add_worker_argument(parser)
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.inspection import inspect_dataset
        from datasets_oc20.inspection_figure import draw_inspection
        from datasets_oc20.inspection_report import to_record, to_text
        from datasets_oc20.own_data.opening import open_dataset

        check_target(options.out, is_folder=True)
        for name in ("inspection.json", "inspection.png"):
            check_target(options.out / name, inputs=options.data, overwrite=options.overwrite)
        dataset = open_dataset(options.data, options.energy_kind)
        inspection = inspect_dataset(dataset, options.max_frames or None, options.num_workers)
        record = to_record(inspection, dataset)
        print(to_text(record))
        options.out.mkdir(parents=True, exist_ok=True)
        record = {**header("data-inspect/1"), **record}
        write_json(options.out / "inspection.json", record)
        title = ", ".join(path.name for path in options.data)
        draw_inspection(inspection, title, options.out / "inspection.png")
        print(f"figure: {options.out / 'inspection.png'}")
        return Result(record)


class Convert(Command):
    """Convert LMDB files (OC20's or ours) to ASE-LMDB, or ASE-LMDB files to ours, without loss."""

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("--data", required=True, type=Path, help="file, or folder of shards")
        parser.add_argument("--out", required=True, type=Path, help="file, or folder when --data is one")
        parser.add_argument("--to", required=True, choices=("ase", "oc20"), help="format to write")
        add_energy_kind_argument(parser)
        add_worker_argument(parser)
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.convert import convert, shard_targets
        from datasets_oc20.reader import OC20Lmdb

        _show_data_log()
        if options.data.is_dir():
            check_target(options.out, is_folder=True)
            targets = shard_targets(OC20Lmdb(options.data).shards, options.out, options.to)
            finished = all(path.exists() for path in targets)  # else a stopped call goes on
            for path in targets:
                check_target(path, inputs=[options.data], overwrite=options.overwrite or not finished)
        else:
            check_target(options.out, inputs=[options.data], overwrite=options.overwrite)
            options.out.parent.mkdir(parents=True, exist_ok=True)
        count = convert(
            options.data,
            options.out,
            options.to,
            options.energy_kind,
            options.num_workers,
            options.overwrite,
        )
        print(f"{count} records in {options.out}")
        return Result({"out": str(options.out), "records": count})


class References(Command):
    """Fit per-element reference energies to a dataset of total energies (least squares), for training."""

    def add_arguments(self, parser: Parser) -> None:
        add_data_argument(parser)
        parser.add_argument(
            "--out", required=True, type=Path, help=".npz file; a .json with the table is written beside it"
        )
        add_energy_kind_argument(parser)
        add_worker_argument(parser)
        add_overwrite_argument(parser)

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        options = parser.parse_args(arguments)
        if options.out.suffix != ".npz":
            parser.error(f"--out {options.out}: give a name that ends with .npz")
        return options

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.own_data.opening import open_dataset
        from datasets_oc20.reference_fit import fit_references, to_text, write_references

        table = options.out.with_suffix(".json")
        for path in (options.out, table):
            check_target(path, inputs=options.data, overwrite=options.overwrite)
        dataset = open_dataset(options.data, options.energy_kind)
        fit = fit_references(dataset, options.num_workers, progress=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {**header("data-references/1"), **fit.to_record()}
        write_json(table, record)
        write_references(fit, options.out)
        print(to_text(fit, str(options.out)))
        return Result(record)
