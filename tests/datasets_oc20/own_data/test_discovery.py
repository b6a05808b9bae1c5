"""Files of an import: what is found, what cannot be read, and what no result replaces."""

import multiprocessing
import os
import shutil
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from ase.io import write
from own_files import DATA, in_folder, run, slab, trajectory  # noqa: F401

from datasets_oc20 import OC20Lmdb
from datasets_oc20.errors import DataError
from datasets_oc20.own_data.discovery import find_sources
from equiformer2.files import read_json, write_json

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("in_folder")]


def test_a_folder_without_permission_hides_its_own_files_alone() -> None:
    """As an ordinary user: root may read everything."""

    def look(folder: str, answer: Connection) -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        found = find_sources([folder])
        answer.send(([source.name for source in found.sources], found.missing))
        answer.close()

    # Beside, not in, pytest's folders, which other users cannot enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "closed").mkdir()
        for place in (folder, folder / "closed"):
            shutil.copy(DATA / "hfo2_OUTCAR_5.gz", place / "OUTCAR.gz")
        os.chmod(folder, 0o755)
        os.chmod(folder / "closed", 0o744)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=look, args=(name, sender))
        process.start()
        sender.close()
        sources, missing = receiver.recv()
        process.join()
        os.chmod(folder / "closed", 0o755)
    assert sources == [f"{name}/OUTCAR.gz"]
    assert missing == [(f"{name}/closed/OUTCAR.gz", "cannot be read (Permission denied)")]


def test_names_that_are_no_utf_8_are_written_with_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"Stra\xdfe.extxyz")
    write("good.extxyz", trajectory(slab("Cu"), 3))
    shutil.copy("good.extxyz", name)
    report = run(".", out="out.lmdb")
    assert (report.kept, report.dropped) == (6, [])
    assert {record.sid.rpartition("/")[2] for record in OC20Lmdb("out.lmdb")} == {"good", r"Stra\xdfe"}
    write_json(tmp_path / "record.json", {"file": name})
    assert read_json(tmp_path / "record.json") == {"file": r"Stra\xdfe.extxyz"}


@pytest.mark.parametrize("out", ["set/OUTCAR.gz", "linked"])
def test_a_file_of_a_folder_that_is_read_is_not_replaced(out: str) -> None:
    Path("set").mkdir()
    shutil.copy(DATA / "hfo2_OUTCAR_5.gz", "set/OUTCAR.gz")
    os.symlink("set/OUTCAR.gz", "linked")
    before = Path("set/OUTCAR.gz").read_bytes()
    with pytest.raises(DataError, match=f"^{out} is read as input and would be replaced"):
        run("set", out=out)
    assert Path("set/OUTCAR.gz").read_bytes() == before
    assert sorted(path.name for path in Path("set").iterdir()) == ["OUTCAR.gz"]
