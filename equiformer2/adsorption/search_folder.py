"""Names of the files in a search's folder, and how another search takes their place."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath, read_json, read_text
from equiformer2.errors import InputError

SEARCH, CARD, BEST, BASINS, REPORT = "search.json", "card.json", "best.extxyz", "basins.json", "report.html"
CLEAN_SLAB, GAS = "clean_slab.extxyz", "gas.json"
#: Of `equiformer2.inference.relaxation_log`.
RELAXED, SETTINGS, TRAJECTORIES = "relaxed.jsonl", "settings.json", "trajectories"
DFT, NEB, COLLECT = "dft", "neb", "collect.json"
_INPUT_OF_DFT = {"POSCAR", "INCAR", "KPOINTS", "POTCAR.txt", "pw.in", "candidate.json", "ledger.json"}
_OF_NEB = {"neb.json", "neb.traj", "neb.png", CARD}


def check_has_best(folder: AnyPath, record: Mapping[str, Any]) -> None:
    """Raise `InputError` where the record of a search has no best placement."""
    if record.get("best") is None:
        said = record.get("reason") or "no placement has relaxed to the intended adsorbate"
        raise InputError(f"the search in {folder} has found no energy: {said}")


def refuse_other_settings(folder: AnyPath, names: Sequence[str], what: str = "search") -> None:
    """Raise `InputError` for a folder that holds a finished search whose settings of these names differ."""
    if names:
        told = ", ".join(name.split("_eV")[0].removesuffix("_A").replace("_", " ") for name in names)
        raise InputError(
            f"{folder} holds a finished {what} with other settings ({told}): give another folder, or "
            "--overwrite"
        )


def remove_search(folder: AnyPath) -> None:
    """Remove the files of a search from its folder, so that another one can be made in it.

    Files beside them stay. `settings.json`, by which a search is known, goes last: when stopped on the way,
    the same call goes on.

    Raises:
        InputError: the folder holds no search, or files of others stand in its folders of trajectories, DFT
            input or barriers; nothing is removed then.
    """
    folder = Path(folder)
    if not is_search(folder):
        raise InputError(f"{folder} holds something else than a search: give another folder")
    names = {f"{name}.traj" for name in _relaxed(folder)}
    ours: list[Path] = [folder / name for name in (SEARCH, REPORT, BEST, CLEAN_SLAB)]
    ours += [file for file in folder.glob("*.json") if file.name == GAS or _schema(file)]
    for file in _files_below(folder):
        inside = file.relative_to(folder).parts
        known = {
            TRAJECTORIES: file.name in names or (file.name.startswith(".") and file.suffix == ".tmp"),
            DFT: file.name in _INPUT_OF_DFT,
            NEB: file.name in _OF_NEB,
        }
        if not known[inside[0]]:
            raise InputError(
                f"{file} is no file of the search that is to be replaced: move it away, or give another "
                "folder"
            )
        ours.append(file)
    for file in ours:
        file.unlink(missing_ok=True)
    for name in (TRAJECTORIES, DFT, NEB):
        for place in sorted((folder / name).rglob("*"), reverse=True):
            place.rmdir()
        if (folder / name).is_dir():
            (folder / name).rmdir()
    (folder / RELAXED).unlink(missing_ok=True)
    (folder / SETTINGS).unlink(missing_ok=True)


def _files_below(folder: Path) -> Iterator[Path]:
    """Everything that is no folder in the folders of a search."""
    for name in (TRAJECTORIES, DFT, NEB):
        top = folder / name
        if top.is_symlink() or top.is_file():
            yield top
        elif top.is_dir():
            yield from (file for file in sorted(top.rglob("*")) if file.is_symlink() or not file.is_dir())


def is_search(folder: AnyPath) -> bool:
    """Tell whether the settings or the record in a folder are a search's."""
    folder = Path(folder)
    if _schema(folder / SEARCH).startswith("adsorption-search/"):
        return True
    # Series of coverages keep their relaxations alike.
    return {"model", "slab", "adsorbate"} <= set(_settings(folder)) and not is_series(folder)


def is_series(folder: AnyPath) -> bool:
    """Tell whether the settings in a folder are a coverage series'."""
    return "coverage" in _settings(Path(folder))


def _settings(folder: Path) -> Mapping[str, Any]:
    """Settings of the relaxations in a folder; empty where there are none that can be read."""
    try:
        settings = read_json(folder / SETTINGS)
    except (DataError, OSError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _schema(file: Path) -> str:
    """Schema of a JSON document of these commands, else an empty text."""
    try:
        content = read_json(file)
    except (DataError, OSError):
        return ""
    schema = content.get("schema") if isinstance(content, dict) else None
    return schema if isinstance(schema, str) and schema.startswith("adsorption-") else ""


def _relaxed(folder: Path) -> set[str]:
    """Names of the relaxations in a folder, as far as they can be read."""
    names: set[str] = set()
    try:
        lines = read_text(folder / RELAXED).splitlines()
    except (DataError, OSError):
        return names
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("id"), str):
            names.add(row["id"])
    return names
