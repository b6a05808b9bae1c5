"""OC20's public archives (address, size, checksum, forecast of the LMDB files) and its splits on the disk.

Sizes, MD5 sums and numbers of frames are those of OC20's release notes
(https://github.com/facebookresearch/fairchem, docs/core/datasets/oc20.md and scripts/download_data.py).
An older edition of that page has the sums of 2M and 20M exchanged; those below are the ones that users
measured (https://github.com/facebookresearch/fairchem/issues/302).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath

BASE_URL = "https://dl.fbaipublicfiles.com/opencatalystproject/data"
TASKS = ("s2ef", "is2re")
VALIDATION_SPLITS = ("val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")
"""The validation splits of OC20, over which papers report the average."""
_ENDINGS = (".lmdb", ".aselmdb")
PROPOSED_ENDING = "_lmdb"
"""End of the name of the folder that is proposed for the LMDB files of an archive."""

# A record of OC20's mean size (78 atoms) takes a page of 4096 bytes of its own and a little of the tree, one
# of more than 95 atoms two pages. tests/datasets_oc20/test_download.py compares this with a written file.
LMDB_BYTES_PER_FRAME = 5500
_GIB = 1 << 30


@dataclass(frozen=True)
class Archive:
    """One archive of the release.

    Attributes:
        file: name on the server.
        size: bytes, rounded as the release notes print them.
        unpacked: bytes, likewise. The frames of S2EF stay compressed (`*.extxyz.xz`) when unpacked, since
            preprocessing reads them so.
        md5: hexadecimal sum, or None where none is published.
        frames: number of frames to preprocess, or None where the archive holds LMDB files.
    """

    file: str
    size: int
    unpacked: int
    md5: str | None
    frames: int | None = None

    @classmethod
    def of_frames(cls, name: str, gib: float, md5: str, frames: int) -> "Archive":
        """Describe an archive of raw frames, which are compressed already: unpacking adds nothing.

        Args:
            name: of the file, without `.tar`.
            gib: size in GiB.
            md5: hexadecimal sum.
            frames: number of frames.
        """
        size = int(gib * _GIB)
        return cls(f"{name}.tar", size, size, md5, frames)

    @property
    def url(self) -> str:
        """Address of the archive on Meta's server."""
        return f"{BASE_URL}/{self.file}"

    @property
    def lmdb_bytes(self) -> int:
        """Forecast of the LMDB files that preprocessing writes, without edges, bytes."""
        return (self.frames or 0) * LMDB_BYTES_PER_FRAME


S2EF = {
    "200k": Archive.of_frames("s2ef_train_200K", 344 / 1024, "f8d0909c2623a393148435dede7d3a46", 200_000),
    "2M": Archive.of_frames("s2ef_train_2M", 3.4, "953474cb93f0b08cdc523399f03f7c36", 2_000_000),
    "20M": Archive.of_frames("s2ef_train_20M", 34, "863bc983245ffc0285305a1850e19cf7", 20_000_000),
    "all": Archive.of_frames("s2ef_train_all", 225, "12a7087bfd189a06ccbec9bc7add2bcd", 133_934_018),
    "md": Archive.of_frames("s2ef_md", 42, "9fed845aaab8fb4bf85e3a8db57796e0", 38_315_405),
    "rattled": Archive.of_frames("s2ef_rattled", 29, "40431149b27b64ce1fb40cac4e2e064b", 16_677_031),
    "val_id": Archive.of_frames("s2ef_val_id", 1.7, "f57f7f5c1302637940f2cc858e789410", 999_866),
    "val_ood_ads": Archive.of_frames("s2ef_val_ood_ads", 1.7, "431ab0d7557a4639605ba8b67793f053", 999_838),
    "val_ood_cat": Archive.of_frames("s2ef_val_ood_cat", 1.7, "532d6cd1fe541a0ddb0aa0f99962b7db", 999_809),
    "val_ood_both": Archive.of_frames("s2ef_val_ood_both", 1.9, "5731862978d80502bbf7017d68c2c729", 999_944),
    "test": Archive("s2ef_test_lmdbs.tar.gz", 30 * _GIB, 415 * _GIB, "bcada432482f6e87b24e14b6b744992a"),
}
IS2RE = Archive(
    "is2res_train_val_test_lmdbs.tar.gz", int(8.1 * _GIB), 97 * _GIB, "cfc04dd2f87b4102ab2f607240d25fb1"
)


def find_archive(task: str, split: str | None) -> Archive:
    """Return the archive of a task and split; IS2RE is one archive with all its splits.

    Args:
        task: one of `TASKS`.
        split: a key of `S2EF`; None for IS2RE.

    Raises:
        DataError: there is no such task or split.
    """
    if task == "is2re":
        if split is not None:
            raise DataError("is2re is one archive with all splits; leave --split away.")
        return IS2RE
    if task != "s2ef":
        raise DataError(f"task is {task!r}; it must be one of {', '.join(TASKS)}.")
    if split not in S2EF:
        raise DataError(f"split of s2ef is {split!r}; it must be one of {', '.join(S2EF)}.")
    return S2EF[split]


def find_splits(root: AnyPath, names: Sequence[str]) -> dict[str, Path]:
    """Find the dataset of every split: the folder `root/NAME`, or the file `root/NAME.lmdb` or `.aselmdb`.

    Names of archives, and of the folders that `data download` proposes for their LMDB files, count too:
    `val_id` is also found as `root/s2ef_val_id` and `root/s2ef_val_id_lmdb`.

    Args:
        root: folder with a folder or file for each split.
        names: the splits to find.

    Returns:
        Folder or file by name of the split.

    Raises:
        DataError: `root` is no folder, a name is not plain or given twice, or splits are missing (all of them
            are named) or there twice.
    """

    def is_data(path: Path) -> bool:
        if path.is_dir():
            return any(file.suffix in _ENDINGS for file in path.iterdir())
        return path.is_file() and path.suffix in _ENDINGS

    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds a folder for each split.")
    candidates: dict[str, list[Path]] = {}
    for name in names:
        if not name or Path(name).name != name or name == "..":
            raise DataError(f"the split {name!r} is not a plain name; give the names of folders in {root}.")
        endings = ("", *_ENDINGS, PROPOSED_ENDING)
        paths = [root / f"{prefix}{name}{ending}" for prefix in ("", "s2ef_") for ending in endings]
        candidates[name] = [path for path in paths if is_data(path)]
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise DataError(f"the split {repeated[0]} is given twice; name it once.")
    missing = [name for name, paths in candidates.items() if not paths]
    if missing:
        present = ", ".join(sorted(path.name for path in root.iterdir() if is_data(path))) or "nothing else"
        raise DataError(
            f"{root}: there are no data of {', '.join(missing)}; each split is a folder of LMDB files, or a "
            f"file NAME.lmdb or NAME.aselmdb, and what is there is {present}."
        )
    for name, paths in candidates.items():
        if len(paths) > 1:
            present = " and as ".join(path.name for path in paths)
            raise DataError(f"{root}: {name} is there as {present}; keep one of them.")
    return {name: paths[0] for name, paths in candidates.items()}
