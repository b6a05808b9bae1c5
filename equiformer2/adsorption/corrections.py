"""Corrections of energies by species, from one file that serves several searches.

Functionals are wrong for some gases, solvents bind some adsorbates, and a fit against DFT shifts others: such
numbers are the user's, and each is named wherever it has changed an energy.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import AnyPath, read_json, read_text
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import as_input_error

#: eV; larger ones are total energies, or in other units.
_LARGEST = 20.0
#: Gases are formulas; adsorbates may have the names of files.
_NAME = re.compile(r"[A-Z][A-Za-z0-9*()-]*|\*[A-Za-z0-9][\w*()-]*")
#: eV per atom; gas references are the same to so much.
_SAME_GAS = 1e-3
#: Gases whose energies come from those of others by experiment.
_BY_EXPERIMENT = ("O2", "CO2")


SCHEMA = "adsorption-corrections/1"
"""Schema of the file of `adsorption corrections`."""


@dataclass(frozen=True)
class Corrections:
    """Energies that are added to those of species, eV.

    Attributes:
        species: by name; a star in front means an adsorbate (`*OH`), none a gas (`CO`).
        file: that they were read from; empty for those that were given in Python.
        file_sha256: of it.
        model: identity of the model (`Engine.identity`) that they correct; None if they do not say it.
        gas: gas references of that model's adsorption energies (`source`, `per_atom_eV`); None without.

    Raises:
        InputError: a name that is none, or no finite energy of a likely size.
    """

    species: Mapping[str, float] = field(default_factory=dict)
    file: str = ""
    file_sha256: str = ""
    model: Mapping[str, Any] | None = None
    gas: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        where = f"{self.file}: " if self.file else ""
        for name, value in self.species.items():
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"{where}{name!r} is no species: name gases (CO) and, with a star, adsorbates (*OH)"
                )
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or abs(value) > _LARGEST:
                raise InputError(
                    f"{where}the correction of {name} is {value!r}: give eV, at most {_LARGEST:g}"
                )

    @classmethod
    def read(cls, path: AnyPath) -> "Corrections":
        """Read a JSON object of energies by species, or a CSV file with the columns species and eV.

        The JSON file may be that of `adsorption corrections`.

        Raises:
            InputError: something else, a species twice, or as `Corrections`.
            OSError: the file is missing or unreadable.
        """
        model = gas = None
        with as_input_error():
            if Path(path).suffix.lower() == ".json":
                found = read_json(path)
                if isinstance(found, dict) and str(found.get("schema")).startswith(SCHEMA.split("/")[0]):
                    of_model = found.get("model")
                    if isinstance(of_model, dict):
                        model, gas = of_model.get("identity"), of_model.get("gas")
                    found = found.get("species_eV")  # of several searches (`correction_averages`)
                if not isinstance(found, dict):
                    raise InputError(f"{path} is no JSON object of energies by species")
                pairs = list(found.items())
            else:
                pairs = list(cls._rows(path, read_text(path)))
        names = [name for name, _ in pairs]
        if not names or len(set(names)) < len(names):
            again = next((name for name in names if names.count(name) > 1), None)
            problem = "holds no species" if again is None else f"gives {again} twice"
            raise InputError(f"{path} {problem}: give every species once, such as *OH,-0.3")
        return cls(dict(pairs), str(path), sha256(path), model, gas if isinstance(gas, dict) else None)

    @classmethod
    def recorded(cls, summary: Any) -> "Corrections":
        """Make the corrections of a `summary` in a record; none for a record without."""
        known = summary if isinstance(summary, Mapping) else {}
        file, digest = (str(known.get(key) or "") for key in ("file", "file_sha256"))
        return cls(known.get("species_eV") or {}, file, digest)

    def check_model(self, identity: Any, gas: Mapping[str, Any] | None) -> None:
        """Raise `InputError` where they were averaged for another model, or other gas references.

        Args:
            identity: of the model (`Engine.identity`).
            gas: references of its adsorption energies (`source`, `per_atom_eV`); None without.
        """
        if self.model is not None and json.loads(json.dumps(identity, default=str)) != self.model:
            raise InputError(
                f"{self.file} corrects another model than this one, by DFT of searches with that: average "
                "searches with this model, or give the energies of species alone"
            )
        if self.model is None:
            return
        known, own = (dict(one or {}) for one in (self.gas, gas))
        tables = [one.get("per_atom_eV") or {} for one in (known, own)]
        shared = tables[0].keys() & tables[1].keys()
        in_vacuum = [one.get("source") == "vacuum" for one in (known, own)]
        if in_vacuum[0] != in_vacuum[1] or any(
            abs(float(tables[0][one]) - float(tables[1][one])) > _SAME_GAS for one in shared
        ):
            raise InputError(
                f"{self.file} corrects energies of other gas references ({known.get('source')}) than these "
                f"({own.get('source')}): average searches with the same --gas, or give the energies of "
                "species alone"
            )

    @staticmethod
    def _rows(path: AnyPath, text: str) -> Iterator[tuple[str, float]]:
        """Species and energies of a CSV file."""
        try:
            rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline=""))]
        except csv.Error as error:
            raise InputError(f"{path} is no CSV file ({error})") from error
        numbered = [(number, row) for number, row in enumerate(rows, 1) if any(row)]
        if numbered and numbered[0][1][0].lower() in ("species", "name"):
            numbered = numbered[1:]
        for number, row in numbered:
            try:
                name, value = row
                yield name, float(value)
            except ValueError:
                raise InputError(
                    f"{path}, row {number} is no species with an energy in eV, such as *OH,-0.3"
                ) from None

    def of(self, adsorbate: str, gases: Mapping[str, float], electrons: float) -> dict[str, float]:
        """Contributions to the energy of formation of an adsorbate, eV by species, without those that are 0.

        Args:
            adsorbate: its name, with or without a star.
            gases: molecules that are used up, by formula; negative for those that are set free.
            electrons: pairs of proton and electron that are used up, each half an H2.
        """
        own = f"*{adsorbate.lstrip('*')}"
        used = {**gases, "H2": gases.get("H2", 0.0) + electrons / 2.0}
        found = {name: -number * self.species[name] for name, number in used.items() if name in self.species}
        if own in self.species:
            found[own] = self.species[own]
        return {name: float(value) for name, value in found.items() if value}

    def told(self, used: Iterable[str]) -> str:
        """Say which corrections have changed an energy, and which have not; empty without any."""
        used = set(used)
        said = [correction_text({name: value for name, value in self.species.items() if name in used})]
        others = [name for name in self.species if name not in used]
        if others:
            said.append(f"not used here: {', '.join(others)}")
        if set(others) & set(_BY_EXPERIMENT):
            said.append("O2 and CO2 come from H2O, H2 and CO by reaction energies of experiment")
        return "; ".join(filter(None, said))

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {"species_eV": dict(self.species), "file": self.file, "file_sha256": self.file_sha256}


def correction_text(species: Mapping[str, float] | None) -> str:
    """Write corrections for a figure or a terminal; empty without any."""
    if not species:
        return ""
    return "corrections (eV): " + ", ".join(f"{name} {value:+.3g}" for name, value in species.items())
