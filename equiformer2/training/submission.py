"""Make files for the OC20 leaderboard from predictions.

The leaderboard (https://huggingface.co/spaces/facebook/fairchem_leaderboard; fairchem's page "OC20
Leaderboard") takes one `.npz` with these keys for each of its splits `id`, `ood_ads`, `ood_cat`, `ood_both`:

    {split}_ids        [n]     S2EF: "{sid}_{fid}"; IS2RE: "{sid}"
    {split}_energy     [n]     eV
    {split}_forces     [m, 3]  S2EF only: eV/Å, of all structures one after the other
    {split}_chunk_idx  [n - 1] S2EF only: where the forces of the next structure begin
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from datasets_oc20.errors import DataError
from datasets_oc20.npz_file import check_npz
from datasets_oc20.untrusted import AnyPath, open_regular
from equiformer2.errors import InputError
from equiformer2.files import write_bytes
from equiformer2.training.relaxation_run import RELAXED

SPLITS = ("id", "ood_ads", "ood_cat", "ood_both")
FIELDS = {
    "s2ef": ("ids", "energy", "forces", "chunk_idx"),
    "is2re": ("ids", "energy"),
}
_MOST_NAMED = 20
DTYPES = ("float32", "float16")

Arrays = dict[str, np.ndarray]


def read_arrays(path: AnyPath) -> Arrays:
    """Read all arrays of a `.npz` file, by key; nothing in it is executed.

    Raises:
        InputError: not such a file, or a key with Python objects; the key is named.
        OSError: missing or unreadable.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a .npz file")
    try:
        with open_regular(path) as handle:
            check_npz(handle, path)
        file = np.load(path)
    except DataError as error:
        raise InputError(str(error)) from error
    except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path} is not a .npz file, or not a whole one") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise InputError(f"{path} holds a single array: save the keys with numpy.savez_compressed")
    arrays = {}
    with file:
        for key in file.files:
            try:
                arrays[key] = file[key]
            except ValueError as error:
                reason = "Python objects" if "pickle" in str(error) else f"no array ({error})"
                raise InputError(
                    f"{path}: key {key} holds {reason}: save plain numbers, and ids as text"
                ) from error
            except Exception as error:  # a damaged archive fails in zipfile, zlib or numpy
                raise InputError(f"{path}: key {key} cannot be read ({error})") from error
    return arrays


def make_submission(
    task: str, predictions: Mapping[str, Path], atoms: str = "free", dtype: str = "float32"
) -> Arrays:
    """Assemble the arrays of a submission.

    Args:
        task: "s2ef" or "is2re".
        predictions: file for every split of `SPLITS`. For S2EF the `.npz` of `equiformer2 predict`; for IS2RE
            that of a model trained to give the relaxed energy at once, or a folder of
            `equiformer2 relax-is2re`.
        atoms: whose forces go in, "free" or "all". The leaderboard scores free atoms.
        dtype: of energies and forces.

    Raises:
        InputError: a split is missing, a file does not hold what the task needs (split and key are named), or
            systems of a split were not relaxed (they are named), or a number is not finite.
    """
    missing = [split for split in SPLITS if split not in predictions]
    if missing:
        raise InputError(f"there are no predictions for {', '.join(missing)}: the leaderboard needs all four")
    arrays: Arrays = {}
    for split in SPLITS:
        path = predictions[split]
        of_split = _read_s2ef(path, atoms) if task == "s2ef" else _read_is2re(path)
        for name, array in of_split.items():
            if array.dtype.kind == "f":
                with np.errstate(over="ignore"):
                    cast = array.astype(dtype)
                wrong = np.argwhere(~np.isfinite(cast))
                if len(wrong):
                    value = array[tuple(wrong[0])]
                    remedy = ", or take --dtype float32" if np.isfinite(value) else ""
                    raise InputError(
                        f"{path}: key {name} holds {value} in row {wrong[0][0]}, which is not a finite "
                        f"number of {dtype}: predict that structure again{remedy}"
                    )
                array = cast
            arrays[f"{split}_{name}"] = array
    return arrays


def write_submission(target: AnyPath, arrays: Arrays) -> None:
    """Write the arrays as `.npz`, atomically."""
    target = Path(target)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(target, buffer.getvalue(), make_folder=True)


def _read_s2ef(path: Path, atoms: str) -> Arrays:
    found = read_arrays(path)
    for key in ("sid", "fid", "natoms", "energy", "forces", "fixed"):
        if key not in found:
            raise InputError(
                f"{path}: key {key} is missing: make the file with `equiformer2 predict` and a model with "
                "forces"
            )
    natoms, fid = found["natoms"], found["fid"]
    for key in ("natoms", "fid"):
        if found[key].dtype.kind not in "iu":
            raise InputError(f"{path}: key {key} is {found[key].dtype}, not whole numbers")
    structures = (found["sid"], fid, natoms, found["energy"])
    if natoms.ndim != 1 or any(array.shape != natoms.shape for array in structures):
        raise InputError(f"{path}: sid, fid, natoms and energy are not of the same structures")
    forces, fixed = found["forces"], found["fixed"].astype(bool)
    atoms_of_all = int(natoms.sum()) if (natoms >= 0).all() else None
    if forces.shape != (atoms_of_all, 3) or fixed.shape != (atoms_of_all,):
        raise InputError(f"{path}: natoms, fixed and forces are not of the same atoms: make the file again")
    counts = natoms
    if atoms == "free":
        structure = np.repeat(np.arange(len(natoms)), natoms)
        counts = np.bincount(structure[~fixed], minlength=len(natoms))
        forces = forces[~fixed]
    return {
        "ids": np.array([f"{sid}_{fid}" for sid, fid in zip(found["sid"], fid, strict=True)]),
        "energy": found["energy"],
        "forces": forces,
        "chunk_idx": np.cumsum(counts)[:-1].astype(np.int64),
    }


def _read_is2re(path: Path) -> Arrays:
    if path.is_dir():
        if not (path / RELAXED).is_file():
            raise InputError(f"{path} has no {RELAXED}: let `equiformer2 relax-is2re` finish its relaxations")
        path = path / RELAXED
    found = read_arrays(path)
    for key in ("sid", "energy"):
        if key not in found:
            raise InputError(
                f"{path}: key {key} is missing: make the file with `equiformer2 relax-is2re` or "
                "`equiformer2 predict`"
            )
    if "forces" in found:
        raise InputError(
            f"{path} holds energies of structures that were not relaxed, from a model with forces: relax "
            "them with `equiformer2 relax-is2re` and give its folder"
        )
    skipped = found.get("skipped", np.zeros(0, dtype=str)).astype(str).tolist()
    if skipped:
        more = f" and {len(skipped) - _MOST_NAMED} more" if len(skipped) > _MOST_NAMED else ""
        systems = len(found["sid"]) + len(skipped)
        raise InputError(
            f"{path} lacks {len(skipped)} of {systems} systems, which `equiformer2 relax-is2re` could not "
            "relax: "
            f"{', '.join(skipped[:_MOST_NAMED])}{more}; the leaderboard needs all, so repair these in "
            "the data (skipped.jsonl beside it has the reasons) and give the same command again"
        )
    return {"ids": found["sid"].astype(str), "energy": found["energy"]}
