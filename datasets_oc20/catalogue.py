"""OC20's public archives: where they are, how large they are, and what they become on the disk.

Sizes, MD5 sums and numbers of frames are those of OC20's release notes
(https://github.com/facebookresearch/fairchem, docs/core/datasets/oc20.md and scripts/download_data.py).
An older edition of that page has the sums of 2M and 20M exchanged; those below are the ones that users
measured (https://github.com/facebookresearch/fairchem/issues/302).
"""

from dataclasses import dataclass

from datasets_oc20.errors import DataError

BASE_URL = "https://dl.fbaipublicfiles.com/opencatalystproject/data"
TASKS = ("s2ef", "is2re")

# A record of OC20's mean size (78 atoms) takes a page of 4096 bytes of its own and a little of the tree, one
# of more than 95 atoms two pages. tests/datasets_oc20/test_download.py compares this with a written file.
LMDB_BYTES_PER_FRAME = 5500
_GIB = 1 << 30


@dataclass(frozen=True)
class Archive:
    """One archive of the release.

    `size` and `unpacked` are bytes, rounded as the release notes print them; the frames of S2EF stay
    compressed (`*.extxyz.xz`) when unpacked, since preprocessing reads them so. `frames` is the number of
    frames to preprocess, or None where the archive holds LMDB files. `md5` is None when nobody published it.
    """

    file: str
    size: int
    unpacked: int
    md5: str | None
    frames: int | None = None

    @property
    def url(self) -> str:
        """Where Meta serves the archive."""
        return f"{BASE_URL}/{self.file}"

    @property
    def lmdb_bytes(self) -> int:
        """Forecast of the LMDB files that preprocessing writes, without edges, bytes."""
        return (self.frames or 0) * LMDB_BYTES_PER_FRAME


def _raw(name: str, gib: float, md5: str, frames: int) -> Archive:
    size = int(gib * _GIB)
    return Archive(f"{name}.tar", size, size, md5, frames)


S2EF = {
    "200k": _raw("s2ef_train_200K", 344 / 1024, "f8d0909c2623a393148435dede7d3a46", 200_000),
    "2M": _raw("s2ef_train_2M", 3.4, "953474cb93f0b08cdc523399f03f7c36", 2_000_000),
    "20M": _raw("s2ef_train_20M", 34, "863bc983245ffc0285305a1850e19cf7", 20_000_000),
    "all": _raw("s2ef_train_all", 225, "12a7087bfd189a06ccbec9bc7add2bcd", 133_934_018),
    "md": _raw("s2ef_md", 42, "9fed845aaab8fb4bf85e3a8db57796e0", 38_315_405),
    "rattled": _raw("s2ef_rattled", 29, "40431149b27b64ce1fb40cac4e2e064b", 16_677_031),
    "val_id": _raw("s2ef_val_id", 1.7, "f57f7f5c1302637940f2cc858e789410", 999_866),
    "val_ood_ads": _raw("s2ef_val_ood_ads", 1.7, "431ab0d7557a4639605ba8b67793f053", 999_838),
    "val_ood_cat": _raw("s2ef_val_ood_cat", 1.7, "532d6cd1fe541a0ddb0aa0f99962b7db", 999_809),
    "val_ood_both": _raw("s2ef_val_ood_both", 1.9, "5731862978d80502bbf7017d68c2c729", 999_944),
    "test": Archive("s2ef_test_lmdbs.tar.gz", 30 * _GIB, 415 * _GIB, "bcada432482f6e87b24e14b6b744992a"),
}
IS2RE = Archive(
    "is2res_train_val_test_lmdbs.tar.gz", int(8.1 * _GIB), 97 * _GIB, "cfc04dd2f87b4102ab2f607240d25fb1"
)


def find_archive(task: str, split: str | None) -> Archive:
    """The archive of a task and split; IS2RE is one archive with all its splits.

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
