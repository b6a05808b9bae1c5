"""Corrections of a model by the DFT of several searches: mean, number of points and standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets_oc20.own_data.checks import differences
from datasets_oc20.untrusted import AnyPath, read_json
from equiformer2.adsorption.corrections import Corrections
from equiformer2.adsorption.search_folder import COLLECT
from equiformer2.errors import InputError
from equiformer2.files import as_input_error

#: eV; standard deviation of DFT less model, above which one correction does not hold for all structures.
_WIDE = 0.1
#: eV per atom; gas references are the same to so much.
_SAME = 1e-3


def correction_averages(folders: Sequence[AnyPath]) -> dict[str, Any]:
    """Average the comparisons with DFT of several searches, by adsorbate.

    Every structure that counts for the correction of its search (`collect.compare`) is a point. Points of one
    search share slab and setting, so the standard error takes them together (clustered by search; with one
    point per search it is the usual one of a mean).

    Args:
        folders: of the searches, in which `adsorption collect` has left its record, or these records.

    Returns:
        Plain values: `species_eV`, as `Corrections.read` takes them; under `species` for each `mean_eV` (DFT
        less model), `points`, `searches`, `standard_error_eV` and `std_eV` (None for one point), `lowest_eV`,
        `highest_eV` and `by_search`; `model`, `dft_settings` and `gas_per_atom_eV` of all; and `warnings`.

    Raises:
        InputError: no record or an old one, total energies of DFT, a search given twice, or searches of
            different models, references or settings of DFT.
    """
    collected = [_Collected.read(folder) for folder in folders]
    if not collected:
        raise InputError("no search is given: give folders in which adsorption collect has been")
    paths = [one.file.resolve() for one in collected]
    for number, one in enumerate(collected):
        if one.file.resolve() in paths[:number]:
            raise InputError(f"{one.file} is given twice: give every search once")
        one.check_fits(collected[0])
    different = differences((str(one.file), one.record["dft_settings"]) for one in collected)
    if different:
        raise InputError(f"DFT of different settings gives no one correction: {'; '.join(different)}")
    species: dict[str, dict[str, Any]] = {}
    warnings = [f"{one.file.parent}: {text}" for one in collected for text in one.record["warnings"]]
    for name in dict.fromkeys(one.record["adsorbate"] for one in collected):
        own = [one for one in collected if one.record["adsorbate"] == name]
        species[name], said = _averaged(name, own)
        warnings += said
    gas: dict[str, float] = {}
    settings: dict[str, Any] = {}
    for one in collected:
        gas, settings = {**one.record["gas_per_atom_eV"], **gas}, {**one.record["dft_settings"], **settings}
    values = {name: found["mean_eV"] for name, found in species.items()}
    Corrections(values, str(collected[0].file))  # of a likely size
    return {
        "species_eV": values,
        "species": species,
        "model": collected[0].record["model"],
        "dft_settings": settings,
        "gas_per_atom_eV": gas,
        "warnings": warnings,
    }


@dataclass(frozen=True)
class _Collected:
    """Record that `adsorption collect` has left in the folder of a search.

    Attributes:
        file: `collect.json`.
        record: its content.
        points: energies of every structure that counts, by the model and by DFT, eV.
    """

    file: Path
    record: dict[str, Any]
    points: list[tuple[float, float]]

    @classmethod
    def read(cls, path: AnyPath) -> "_Collected":
        """Read the record in the folder of a search, or a record; errors as of `correction_averages`."""
        path = Path(path)
        file = path / COLLECT if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"there is no {file}: run adsorption collect for this search first")
        with as_input_error():
            record = read_json(file)
        schema = record.get("schema") if isinstance(record, dict) else None
        if not str(schema).startswith("adsorption-collect/"):
            raise InputError(f"{file} is no record of adsorption collect: give the folder of a search")
        try:
            rows = [row for row in record["ranking"] if row["in_correction"]]
            points = [(float(row["model_eV"]), float(row["dft_eV"])) for row in rows]
            is_whole = all(
                isinstance(record[key], kind)
                for key, kind in (
                    *(("adsorbate", str), ("slab", str), ("dft_energy", str), ("model", dict)),
                    *(("dft_settings", dict), ("gas_per_atom_eV", dict), ("warnings", list)),
                )
            )
        except (KeyError, TypeError, ValueError):
            points, is_whole = [], False
        if not is_whole or not points or not np.isfinite(points).all():
            raise InputError(f"{file} is of an earlier version or broken: run adsorption collect again")
        if record["dft_energy"] != "adsorption":
            raise InputError(
                f"{file} compares with total energies of DFT, which give no correction: collect with a "
                "result of the clean slab and --gas"
            )
        return cls(file, record, points)

    @property
    def mean(self) -> float:
        """Mean difference of the search, eV."""
        return float(np.diff(self.points).mean())

    def check_fits(self, other: "_Collected") -> None:
        """Raise `InputError` where two searches have different models, or energies with another zero."""

        def told(one: _Collected) -> list[tuple[str, Any]]:
            model, gas = one.record["model"], one.record["model"].get("gas") or {}
            return [
                ("checkpoints", model.get("checkpoint_sha256")),
                ("adapters", model.get("adapter_sha256")),
                ("kinds of energy", model.get("energy_kind")),
                (
                    "models, or settings of the model's energies (weights, precision, D3, parameters)",
                    model.get("identity"),
                ),
                ("gas references of the model", gas.get("source")),
                ("gas references of the model", gas.get("per_atom_eV")),
                ("gas references of DFT", one.record["gas_per_atom_eV"]),
            ]

        for (name, own), (_, others) in zip(told(self), told(other), strict=True):
            same = own == others
            if name.startswith("gas") and isinstance(own, dict) and isinstance(others, dict):
                both = own.keys() & others.keys()  # energies per atom, of the elements of each adsorbate
                same = all(abs(float(own[one]) - float(others[one])) < _SAME for one in both)
            if not same:
                raise InputError(
                    f"{other.file} and {self.file} have different {name}: give searches of one model and one "
                    "DFT"
                )


def _averaged(name: str, collected: Sequence[_Collected]) -> tuple[dict[str, Any], list[str]]:
    """Mean and spread of the points of one adsorbate, and warnings about them; see `correction_averages`."""
    warnings = []
    groups: dict[Path, list[float]] = {}
    known: dict[tuple[float, float], Path] = {}
    for one in collected:
        for energies in one.points:
            if known.setdefault(energies, one.file) != one.file:
                warnings.append(
                    f"{name}: {known[energies].parent} and {one.file.parent} have one result of DFT "
                    f"({energies[1]:.4f} eV) in common, which counts once"
                )
                continue
            groups.setdefault(one.file, []).append(energies[1] - energies[0])
    points = np.concatenate([np.array(group) for group in groups.values()])
    mean, number = float(points.mean()), len(points)
    error = None
    if len(groups) > 1:
        together = sum(float((np.array(group) - mean).sum()) ** 2 for group in groups.values())
        error = math.sqrt(len(groups) / (len(groups) - 1) * together) / number
    elif number > 1:
        error = float(points.std(ddof=1)) / math.sqrt(number)
    found = {
        "mean_eV": mean,
        "points": number,
        "searches": len(groups),
        "standard_error_eV": error,
        "std_eV": None if number < 2 else float(points.std(ddof=1)),
        "lowest_eV": float(points.min()),
        "highest_eV": float(points.max()),
        "by_search": [
            {"search": str(one.file.parent), "slab": one.record["slab"], "correction_eV": one.mean}
            | {"points": len(one.points)}
            for one in collected
        ],
    }
    if number < 2:
        warnings.append(f"{name}: the correction is of one result of DFT, and has no standard error")
    elif points.std(ddof=1) > _WIDE:
        low, high = (choose(collected, key=lambda one: one.mean) for choose in (min, max))
        where = f"; {low.file.parent} has {low.mean:+.3f} eV and {high.file.parent} {high.mean:+.3f} eV"
        warnings.append(
            f"{name}: DFT less model spreads from {points.min():+.3f} to {points.max():+.3f} eV: one "
            f"correction does not hold for all of these structures{where if len(collected) > 1 else ''}"
        )
    if error is not None and abs(mean) < 2 * error:
        warnings.append(
            f"{name}: the correction {mean:+.3f} eV is less than twice its standard error ({error:.3f} eV): "
            "it cannot be told from none"
        )
    return found, warnings
