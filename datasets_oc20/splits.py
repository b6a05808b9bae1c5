"""Where the data of a named split are."""

from collections.abc import Sequence
from pathlib import Path

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath

#: The validation splits of OC20, over which papers report the average.
VALIDATION_SPLITS = ("val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")
_ENDINGS = (".lmdb", ".aselmdb")


def find_splits(root: AnyPath, names: Sequence[str]) -> dict[str, Path]:
    """The dataset of every split: the folder `root/NAME`, or the file `root/NAME.lmdb` or `.aselmdb`.

    Names of archives count too: `val_id` is also found as `root/s2ef_val_id`.

    Raises:
        DataError: `root` is no folder, a name is not plain or given twice, or splits are missing (all of them
            are named) or there twice.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds a folder for each split.")
    for name in names:
        if not name or Path(name).name != name or name == "..":
            raise DataError(f"the split {name!r} is not a plain name; give the names of folders in {root}.")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"the split {twice[0]} is given twice; name it once.")
    found = {name: _candidates(root, name) for name in names}
    missing = [name for name, paths in found.items() if not paths]
    if missing:
        there = ", ".join(sorted(path.name for path in root.iterdir() if _is_data(path))) or "nothing else"
        raise DataError(
            f"{root}: there are no data of {', '.join(missing)}; each split is a folder of LMDB files, or a "
            f"file NAME.lmdb or NAME.aselmdb, and what is there is {there}."
        )
    for name, paths in found.items():
        if len(paths) > 1:
            there = " and as ".join(path.name for path in paths)
            raise DataError(f"{root}: {name} is there as {there}; keep one of them.")
    return {name: paths[0] for name, paths in found.items()}


def _candidates(root: Path, name: str) -> list[Path]:
    paths = [root / f"{prefix}{name}{ending}" for prefix in ("", "s2ef_") for ending in ("", *_ENDINGS)]
    return [path for path in paths if _is_data(path)]


def _is_data(path: Path) -> bool:
    if path.is_dir():
        return any(file.suffix in _ENDINGS for file in path.iterdir())
    return path.is_file() and path.suffix in _ENDINGS
