"""Archives that mean harm, disks that are full, and the catalogue of the release."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oc20_files import structure
from tar_files import GOOD, link, make_tar

from datasets_oc20 import DataError, LmdbWriter
from datasets_oc20.archives import unpack
from datasets_oc20.catalogue import IS2RE, LMDB_BYTES_PER_FRAME, S2EF, find_archive
from datasets_oc20.disk_space import Need, human, require_space

CONTENT = np.random.default_rng(0).bytes(200_000)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_unpack_and_again(tmp_path: Path, name: str) -> None:
    archive, folder = make_tar(tmp_path / name, *GOOD), tmp_path / "out"
    done = unpack(archive, folder, show_progress=False)
    assert (done.files, done.size, done.already_there) == (3, 16, 0)
    assert done.data_folders == [folder / "a" / "b"]
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files == {"a/README": b"read", "a/b/0.extxyz.xz": b"frames", "a/b/0.txt.xz": b"labels"}
    assert not (folder / "a" / "README").stat().st_mode & 0o7111
    (folder / "a" / "README").unlink()
    before = (folder / "a" / "b" / "0.txt.xz").stat().st_mtime_ns
    assert unpack(archive, folder, show_progress=False).already_there == 2
    assert (folder / "a" / "README").read_bytes() == b"read"
    assert (folder / "a" / "b" / "0.txt.xz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "evil",
    [
        ("../evil", b"x"),
        ("a/../../evil", b"x"),
        ("/tmp/evil", b"x"),
        ("a\\..\\evil", b"x"),
        link("evil", "/etc/passwd", tarfile.SYMTYPE),
        link("evil", "../../etc", tarfile.SYMTYPE),
        link("evil", "a/README", tarfile.LNKTYPE),
        link("evil", "", tarfile.CHRTYPE),
        link("evil", "", tarfile.FIFOTYPE),
    ],
)
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_members_that_would_leave_the_folder(tmp_path: Path, evil: Any, name: str) -> None:
    archive = make_tar(tmp_path / name, *GOOD, evil, ("a/last", b"x"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=f"{name}: .*'.*evil'"):
        unpack(archive, tmp_path / "in" / "out", show_progress=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/evil").exists()


def test_a_link_in_the_folder_leads_nowhere(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "a").symlink_to(elsewhere)
    with pytest.raises(DataError, match=r"a/README.* link"):
        unpack(make_tar(tmp_path / "x.tar", *GOOD), folder, show_progress=False)
    assert not list(elsewhere.iterdir())


def test_files_in_the_way_are_left_alone(tmp_path: Path) -> None:
    archive, folder = make_tar(tmp_path / "x.tar", *GOOD), tmp_path / "out"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "README").write_text("my notes")
    with pytest.raises(DataError, match=r"README: is in the way of a file of x\.tar"):
        unpack(archive, folder, show_progress=False)
    assert [path.name for path in folder.rglob("*")] == ["a", "README"]
    assert (folder / "a" / "README").read_text() == "my notes"
    twice = make_tar(tmp_path / "y.tar", ("b", b"1"), ("./b", b"2"))
    with pytest.raises(DataError, match=r"holds '(\./)?b' twice"):
        unpack(twice, folder, show_progress=False)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_damaged_archives(tmp_path: Path, name: str) -> None:
    archive = make_tar(tmp_path / name, ("a", CONTENT))
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not an archive" * 100, b""):
        archive.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}: .*(damaged|no file)"):
            unpack(archive, tmp_path / "out", show_progress=False)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    with pytest.raises(DataError, match="absent: no such file"):
        unpack(tmp_path / "absent", tmp_path / "out")


def test_a_wrong_byte_in_a_compressed_archive_is_found_before_anything_is_written(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "x.tar.gz", ("a", CONTENT), ("b", CONTENT))
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    archive.write_bytes(damaged)
    with pytest.raises(DataError, match=r"x\.tar\.gz: .*damaged"):
        unpack(archive, tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out").exists()


def test_space_is_added_up_by_disk(tmp_path: Path, free: Callable[[int], None]) -> None:
    needs = [
        Need("archive", tmp_path / "not" / "there", 3 << 30),
        Need("nothing", tmp_path, 0),
        Need("LMDB files", tmp_path, 2 << 30),
    ]
    free(5 << 30)
    require_space(needs)
    free((5 << 30) - 1)
    with pytest.raises(DataError, match=r"5\.0 GiB .*archive 3\.0 GiB, LMDB files 2\.0 GiB.*5\.0"):
        require_space(needs)


def test_unpacking_asks_for_space_first(tmp_path: Path, free: Callable[[int], None]) -> None:
    archive = make_tar(tmp_path / "x.tar", *GOOD)
    free(15)
    with pytest.raises(DataError, match="16 B are needed"):
        unpack(archive, tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out").exists()


def test_every_split_of_the_release() -> None:
    train = ("200k", "2M", "20M", "all", "md", "rattled")
    splits = (*train, "val_id", "val_ood_ads", "val_ood_cat", "val_ood_both", "test")
    archives = [find_archive("s2ef", split) for split in splits] + [find_archive("is2re", None)]
    sums = {archive.md5 for archive in archives}
    assert len(sums) == len(archives)
    assert all(value is not None and len(value) == 32 and int(value, 16) for value in sums)
    assert all(archive.size <= archive.unpacked for archive in archives)
    assert find_archive("s2ef", "2M").url.endswith("/opencatalystproject/data/s2ef_train_2M.tar")
    # Measured by users; an edition of the release notes has the two exchanged.
    assert find_archive("s2ef", "2M").md5 == "953474cb93f0b08cdc523399f03f7c36"
    assert find_archive("s2ef", "20M").md5 == "863bc983245ffc0285305a1850e19cf7"
    for task, split in (("s2ef", None), ("s2ef", "3M"), ("is2re", "2M"), ("is2rs", None)):
        with pytest.raises(DataError, match=r"split|task"):
            find_archive(task, split)


def test_the_page_has_the_sizes_of_the_catalogue() -> None:
    page = (Path(__file__).parents[2] / "docs" / "getting_data.md").read_text(encoding="utf-8")
    for name, archive in [*((f"s2ef {split}", one) for split, one in S2EF.items()), ("is2re", IS2RE)]:
        frames, lmdb = "LMDB files", "none"
        if archive.frames:
            frames, lmdb = f"{archive.frames:,}", human(archive.lmdb_bytes)
        row = f"| `{name}` | {frames} | {human(archive.size)} | {human(archive.unpacked)} | {lmdb} |\n"
        assert row in page


def test_forecast_of_the_lmdb(tmp_path: Path) -> None:
    # 78 atoms on average, as in OC20, from 20 to 225.
    sizes = np.clip(np.random.default_rng(0).normal(78, 35, 500), 20, 225).astype(int)
    with LmdbWriter(tmp_path / "x.lmdb", "adsorption") as writer:
        for natoms in sizes:
            writer.write(structure(natoms=int(natoms)))
    per_frame = (tmp_path / "x.lmdb").stat().st_size / len(sizes)
    assert 0.75 < per_frame / LMDB_BYTES_PER_FRAME <= 1.0
    assert find_archive("s2ef", "2M").lmdb_bytes == 2_000_000 * LMDB_BYTES_PER_FRAME
    assert find_archive("is2re", None).lmdb_bytes == 0
