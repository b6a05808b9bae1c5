"""Names of splits become files and folders."""

from pathlib import Path

import pytest

from datasets_oc20 import DataError
from datasets_oc20.catalogue import find_splits


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("val_id/data.0000.lmdb", "s2ef_val_ood_ads/a.aselmdb", "val_ood_cat.lmdb", "empty/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def test_folders_files_and_names_of_archives(root: Path) -> None:
    found = find_splits(root, ["val_ood_cat", "val_id", "val_ood_ads"])
    assert list(found) == ["val_ood_cat", "val_id", "val_ood_ads"]
    assert [path.name for path in found.values()] == ["val_ood_cat.lmdb", "val_id", "s2ef_val_ood_ads"]


def test_the_folder_that_the_download_proposes(root: Path) -> None:
    (root / "s2ef_val_ood_both/s2ef_val_ood_both").mkdir(parents=True)
    (root / "s2ef_val_ood_both_lmdb").mkdir()
    (root / "s2ef_val_ood_both_lmdb/data.0000.lmdb").write_bytes(b"")
    assert find_splits(root, ["val_ood_both"])["val_ood_both"].name == "s2ef_val_ood_both_lmdb"


def test_all_missing_splits_are_named_beside_what_is_there(root: Path) -> None:
    with pytest.raises(DataError, match=r"val_ood_both, empty;.*val_id, val_ood_cat\.lmdb") as error:
        find_splits(root, ["val_id", "val_ood_both", "empty"])
    assert "x.txt" not in str(error.value)


def test_what_cannot_be_decided_is_refused(root: Path) -> None:
    (root / "val_id.lmdb").write_bytes(b"")
    with pytest.raises(DataError, match=r"val_id is there as val_id and as val_id.lmdb"):
        find_splits(root, ["val_id"])
    with pytest.raises(DataError, match="val_ood_cat is given twice"):
        find_splits(root, ["val_ood_cat", "val_ood_cat"])
    for outside in ("../val_id", "..", str(root / "val_id"), ""):
        with pytest.raises(DataError, match="is not a plain name"):
            find_splits(root, [outside])
    with pytest.raises(DataError, match="no such folder"):
        find_splits(root / "absent", ["val_id"])
