"""Download and unpack an archive of OC20: resumed where it stopped, checked, nothing of yours replaced."""

import argparse
import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets_oc20.archives import Unpacked, unpack
from datasets_oc20.catalogue import S2EF, TASKS, Archive, find_archive
from datasets_oc20.disk_space import Need, human, require_space
from datasets_oc20.download import fetch, remote_size
from datasets_oc20.errors import DataError
from equiformer2.files import write_json
from equiformer2.script import run_script, show_log


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=TASKS)
    what.add_argument("--url", help="another archive, e.g. of OC20's trajectories, or a mirror")
    parser.add_argument("--split", help=f"of s2ef: {', '.join(S2EF)}")
    parser.add_argument("--md5", help="MD5 sum for --url")
    parser.add_argument("--out", required=True, type=Path, help="folder for the archive and its files")
    parser.add_argument("--lmdb-out", type=Path, help="folder that will hold the LMDB files (default: --out)")
    parser.add_argument("--no-unpack", action="store_true", help="only download")
    parser.add_argument("--dry-run", action="store_true", help="show sizes and check the space, then stop")
    return parser.parse_args()


def chosen_archive(arguments: argparse.Namespace) -> tuple[Archive, str]:
    """The archive and its address."""
    if arguments.url is None:
        if arguments.md5 is not None:
            raise DataError("--md5 belongs to --url; the sums of OC20's archives are known.")
        archive = find_archive(arguments.task, arguments.split)
        return archive, archive.url
    if arguments.split is not None:
        raise DataError("--split belongs to --task, not to --url.")
    name = arguments.url.rpartition("/")[2]
    if not name or "?" in name:
        raise DataError(f"{arguments.url}: the address does not end in the name of a file.")
    md5 = None if arguments.md5 is None else arguments.md5.strip().lower()
    if md5 is not None and not re.fullmatch("[0-9a-f]{32}", md5):
        raise DataError(f"--md5 {arguments.md5}: an MD5 sum has 32 hexadecimal digits.")
    size = remote_size(arguments.url) or 0
    return Archive(name, size, size, md5), arguments.url


def space_needs(archive: Archive, arguments: argparse.Namespace) -> list[Need]:
    """What is still to be written, and where.

    What is missing of the files of an archive that is there already, `unpack` finds out.
    """
    target = arguments.out / archive.file
    part = target.with_name(target.name + ".part")
    have = next((path.stat().st_size for path in (target, part) if path.is_file()), 0)
    unpacked = arguments.no_unpack or target.is_file()
    return [
        Need("archive", arguments.out, 0 if target.is_file() else max(archive.size - have, 0)),
        Need("unpacked files", arguments.out, 0 if unpacked else archive.unpacked),
        lmdb_need(archive, arguments),
    ]


def lmdb_need(archive: Archive, arguments: argparse.Namespace) -> Need:
    """What preprocessing will write."""
    return Need("LMDB files", arguments.lmdb_out or arguments.out, archive.lmdb_bytes)


def next_step(archive: Archive, unpacked: Unpacked, lmdb_folder: Path) -> str:
    """What to do with the files."""
    folders = ", ".join(str(folder) for folder in unpacked.data_folders)
    if archive.frames is None:
        return f"data: {folders or unpacked.folder}"
    lmdb = lmdb_folder / f"{archive.file.partition('.')[0]}_lmdb"
    return f"next: python scripts/preprocess_oc20.py --data {folders} --out {lmdb} --shards 64"


def main() -> None:
    arguments = parse()
    show_log()
    logging.getLogger("datasets_oc20").setLevel(logging.INFO)
    archive, url = chosen_archive(arguments)
    needs = space_needs(archive, arguments)
    print(f"{url}: archive {human(archive.size)}, MD5 {archive.md5 or 'not known'}")
    print("to write: " + ", ".join(f"{need.purpose} {human(need.size)} in {need.folder}" for need in needs))
    require_space(needs)
    if arguments.dry_run:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / archive.file
    report_file = target.with_name(target.name + ".json")
    done = fetch(url, target, archive.md5)
    rate = f" at {human(done.fetched / done.seconds)}/s" if done.fetched and done.seconds else ""
    print(f"{done.path}: {human(done.size)}, {human(done.fetched)} downloaded now{rate}")
    report: dict[str, Any] = {"url": url, **asdict(done), "path": str(done.path)}
    if not arguments.no_unpack:
        unpacked = unpack(
            target, arguments.out, later=[lmdb_need(archive, arguments)], reserved=[report_file]
        )
        print(f"{unpacked.files} files, {human(unpacked.size)}; {unpacked.already_there} were there already")
        print(next_step(archive, unpacked, arguments.lmdb_out or arguments.out))
        folders = [str(folder) for folder in unpacked.data_folders]
        report["unpacked"] = {"files": unpacked.files, "size": unpacked.size, "data_folders": folders}
    write_json(report_file, report)


if __name__ == "__main__":
    run_script(main)
