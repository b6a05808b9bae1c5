"""Settings and convergence of DFT calculations, from the lines of their outputs that ASE does not read.

Settings are a table of plain values by name, written the same for every code and kind of output, so that
files can be compared: "functional", "cut-off (eV)", "spin", "smearing", "+U of Fe", "potential of Fe", … A
setting that a file does not tell is left out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any
from xml.etree import ElementTree

from ase.units import Rydberg

Settings = dict[str, str | float]

# https://www.vasp.at/wiki/index.php/GGA, and LEXCH of POTCAR files
_VASP_FUNCTIONALS = {
    "PE": "PBE", "8": "PBE", "PS": "PBEsol", "14": "PBEsol", "RP": "RPBE", "11": "RPBE", "RE": "revPBE",
    "9": "revPBE", "91": "PW91", "7": "PW91", "AM": "AM05", "CA": "LDA", "2": "LDA", "B3": "B3LYP",
    "BF": "BEEF", "MK": "optB86b", "BO": "optB88", "OR": "optPBE", "ML": "rPW86", "CX": "cx13",
}  # fmt: skip
_OUTCAR_VALUES = {
    "encut": re.compile(r"^\s*ENCUT\s*=\s*([\d.]+)\s*eV"),
    "nelm": re.compile(r"^\s*NELM\s*=\s*(\d+)"),
    "ispin": re.compile(r"^\s*ISPIN\s*=\s*(\d)"),
    "smearing": re.compile(r"^\s*ISMEAR\s*=\s*(-?\d+);\s*SIGMA\s*=\s*([\d.]+)"),
    "gga": re.compile(r"^\s*GGA\s*=\s*(\S+)\s+GGA type"),
    "lexch": re.compile(r"^\s*LEXCH\s*=\s*(\S+)\s+internal"),
    "metagga": re.compile(r"^\s*METAGGA\s*=\s*([A-Z][\w-]+)"),
    "lhfcalc": re.compile(r"^\s*LHFCALC\s*=\s*([TF])"),
    "aexx": re.compile(r"^\s*AEXX\s*=\s*([\d.]+)"),
    "hfscreen": re.compile(r"^\s*HFSCREEN\s*=\s*([\d.]+)"),
    "luse_vdw": re.compile(r"^\s*LUSE_VDW\s*=\s*([TF])"),
    "ivdw": re.compile(r"^\s*IVDW\s*=\s*(\d+)"),
    "nelect": re.compile(r"^\s*NELECT\s*=\s*([\d.]+)"),
    "zvals": re.compile(r"^\s*ZVAL\s*=\s*([\d.][\d.\s]*)$"),
    "counts": re.compile(r"^\s*ions per type\s*=\s*(\d[\d\s]*)$"),
    "ldautype": re.compile(r"^\s*LDA\+U is selected, type is set to LDAUTYPE\s*=\s*(\d)"),
    "ldaul": re.compile(r"angular momentum for each species LDAUL\s*=\s*([-\d\s]+)$"),
    "ldauu": re.compile(r"U \(eV\)\s+for each species\s+LDAUU\s*=\s*([-\d.\s]+)$"),
    "ldauj": re.compile(r"J \(eV\)\s+for each species\s+LDAUJ\s*=\s*([-\d.\s]+)$"),
}
_TITLE = re.compile(r"^\s*TITEL\s*=\s*(.+?)\s*$")
_ITERATION = re.compile(r"-\s*Iteration\s+\d+\(\s*(\d+)\)")
_QE_VALUES = {
    "cutoff": re.compile(r"kinetic-energy cutoff\s*=\s*([\d.]+)\s*Ry"),
    "functional": re.compile(r"Exchange-correlation\s*=\s*(.+?)\s*(?:\(|$)"),
    "smearing": re.compile(r"(\S+) smearing, width \(Ry\)\s*=\s*([\d.]+)"),
    "electrons": re.compile(r"number of electrons\s*=\s*([\d.]+)"),
    "dispersion": re.compile(r"^\s*(DFT-D3 Dispersion|Dispersion(?: XDM)? Correction)\s*=.*Ry"),
}
_QE_TABLES = {"atomic species   valence": "valence", "Simplified LDA+U calculation": "+U"}
"""Headings of tables with a row per species, which has at least two numbers."""
_QE_ROW = re.compile(r"^\s*([A-Z][a-z]?)[\w-]*\s+([\d.]+)\s+([\d.]+)")
_QE_POTENTIAL = re.compile(r"PseudoPot\. #\s*\d+ for\s+(\S+)\s+read from file")
_QE_U = re.compile(r"^\s*(?:Hubbard\s+)?U\(\s*([A-Z][a-z]?)\S*\s*\)\s*=\s*([\d.]+)")
_LARGEST_LINE = 100_000
_MOST_TABLES = 100
_CODES = {"vasp": "VASP", "espresso": "Quantum ESPRESSO", "gpaw": "GPAW"}
"""Names of codes by those of ASE's calculators."""


@dataclass
class Calculation:
    """Settings of one output file and the convergence of its steps.

    Attributes:
        settings: table that the module docstring describes; of a set of structures, that of the first.
        others: other tables of structures of a set, each with the index of the first that has it.
        converged: one flag for every step in the file, in order; None where nothing is known of it.
        charge: charge of the cell, elementary charges; None if unknown.
        max_steps: limit of electronic steps; None if unknown.
        electrons: number of electrons, of a calculation whose charge follows from its atoms.
        valences: electrons that an atom of each element brings, likewise.
    """

    settings: Settings = field(default_factory=dict)
    converged: list[bool | None] = field(default_factory=list)
    charge: float | None = None
    max_steps: int | None = None
    electrons: float | None = None
    valences: dict[str, float] = field(default_factory=dict)
    others: list[tuple[int, Settings]] = field(default_factory=list)

    def note_settings(self, index: int, settings: Settings) -> None:
        """Add the settings of a structure of a set."""
        if not settings or len(self.others) >= _MOST_TABLES:
            return
        if not self.settings:
            self.settings = settings
        elif settings != self.settings and all(settings != table for _, table in self.others):
            self.others.append((index, settings))

    def set_charge(self, symbols: Sequence[str]) -> None:
        """Set the charge from the elements of the atoms, where electrons and valences are known."""
        if self.electrons is not None and {*symbols} <= self.valences.keys():
            neutral = sum(self.valences[symbol] for symbol in symbols)
            self.charge = round(neutral - self.electrons, 3)


def outcar_settings(lines: Iterable[str]) -> Calculation:
    """Read the settings of a VASP calculation from the head of its OUTCAR."""
    found: dict[str, Any] = {}
    titles: list[str] = []
    for line in lines:
        if len(line) > _LARGEST_LINE or "=" not in line:
            continue
        if (title := _TITLE.match(line)) is not None:
            titles.append(title[1])
            continue
        for name, pattern in _OUTCAR_VALUES.items():
            # The first is of the calculation; tables further down repeat some names with other meanings.
            if name not in found and (match := pattern.search(line)) is not None:
                found[name] = match.groups() if match.re.groups > 1 else match[1]
    if "zvals" in found:
        found["zvals"] = [float(word) for word in found["zvals"].split()]
    if "counts" in found:
        found["counts"] = [int(word) for word in found["counts"].split()]
    for name in ("ldaul", "ldauu", "ldauj"):
        if name in found:
            found[name] = [float(word) for word in found[name].split()]
    if "smearing" in found:
        found["ismear"], found["sigma"] = found.pop("smearing")
    return _vasp_calculation(found, titles)


def outcar_step_converged(lines: Iterable[str], max_steps: int | None) -> bool | None:
    """Tell from the lines of one ionic step of an OUTCAR if its electronic steps converged.

    Args:
        lines: lines up to the energies of the step.
        max_steps: limit of electronic steps.

    Returns:
        None where the lines do not tell.
    """
    last = None
    for line in lines:
        if "aborting loop because EDIFF is reached" in line:
            return True
        if "EDIFF was not reached" in line:
            return False
        if (match := _ITERATION.search(line)) is not None:
            last = int(match[1])
    return False if last is not None and max_steps is not None and last >= max_steps else None


def vasprun_calculation(file: IO[bytes]) -> Calculation:
    """Read the settings of a `vasprun.xml` and the number of electronic steps of each of its steps.

    Args:
        file: content, of which everything is read that is well-formed.
    """
    found: dict[str, Any] = {}
    titles: list[str] = []
    steps: list[int] = []
    electronic = 0
    try:
        for _, element in ElementTree.iterparse(file, events=("end",)):
            if element.tag == "scstep":
                electronic += 1
            elif element.tag == "calculation":
                steps.append(electronic)
                electronic = 0
            elif element.tag in ("incar", "parameters"):
                for item in element.iter():
                    if item.tag in ("i", "v") and item.text is not None:
                        # Tables further down (of GW) have a NELM of their own: the first is meant.
                        found.setdefault(f"{element.tag} {item.get('name', '').lower()}", item.text.strip())
            elif element.tag == "array" and element.get("name") == "atomtypes":
                rows = [[cell.text or "" for cell in row] for row in element.iter("rc")]
                titles = [" ".join(row[-1].split()) for row in rows]
                found["counts"] = [int(row[0]) for row in rows]
                found["zvals"] = [float(row[3]) for row in rows]
            if element.tag in ("scstep", "calculation", "dos", "eigenvalues", "projected"):
                element.clear()
    except (ElementTree.ParseError, ValueError, IndexError):
        pass  # cut off: the steps before are known
    if electronic:
        steps.append(electronic)
    values: dict[str, Any] = {name: found[name] for name in ("counts", "zvals") if name in found}
    for part in ("parameters", "incar"):
        for name, text in found.items():
            if isinstance(text, str) and name.startswith(f"{part} "):
                values.setdefault(name.removeprefix(f"{part} "), text)
    values["encut"] = values.get("enmax", values.get("encut"))
    if values.pop("ldau", "F")[:1] == "T":
        species = len(titles)
        for name in ("ldaul", "ldauu", "ldauj"):
            # `parameters` leaves out species without U in old versions; `incar` has all of them.
            texts = [found.get(f"{part} {name}", "") for part in ("incar", "parameters")]
            lists = [[float(word) for word in text.split()] for text in texts]
            values[name] = next((numbers for numbers in lists if len(numbers) == species), lists[-1])
    else:
        values = {name: value for name, value in values.items() if not name.startswith("ldau")}
    calculation = _vasp_calculation(values, titles)
    limit = calculation.max_steps
    calculation.converged = [None if limit is None else count < limit for count in steps]
    return calculation


def _vasp_calculation(found: Mapping[str, Any], titles: list[str]) -> Calculation:
    """Build the table from the values of a VASP calculation, by the names of its INCAR."""
    settings: Settings = {"code": "VASP", "functional": _vasp_functional(found, titles)}
    elements = [re.split(r"[_.\s]", title.split()[1])[0] if " " in title else "" for title in titles]
    for element, title in zip(elements, titles, strict=True):
        settings[f"potential of {element}"] = title
    if found.get("encut") is not None:
        settings["cut-off (eV)"] = float(found["encut"])
    if "ispin" in found:
        settings["spin"] = "polarised" if str(found["ispin"]).strip() == "2" else "not polarised"
    if "ismear" in found and "sigma" in found:
        kind = int(found["ismear"])
        width = "" if kind == -5 else f", SIGMA {float(found['sigma']):g} eV"  # tetrahedra have no width
        settings["smearing"] = f"ISMEAR {kind}{width}"
    values = found.get("ldauu") or []
    momenta = found.get("ldaul") or []
    for place, element in enumerate(elements):
        hubbard = values[place] if place < len(values) else 0.0
        shell = momenta[place] if place < len(momenta) else -1
        exchange = found.get("ldauj") or []
        shift = exchange[place] if place < len(exchange) else 0.0
        settings[f"+U of {element} (eV)"] = hubbard - shift if shell >= 0 else 0.0
    charge = None
    zvals, counts = found.get("zvals"), found.get("counts")
    if zvals and counts and len(zvals) == len(counts) and found.get("nelect") is not None:
        neutral = sum(count * valence for count, valence in zip(counts, zvals, strict=True))
        charge = round(neutral - float(found["nelect"]), 3)
    steps = int(str(found["nelm"]).strip()) if "nelm" in found else None
    return Calculation(settings, [], charge, steps)


def _vasp_functional(found: Mapping[str, Any], titles: list[str]) -> str:
    """Name the functional of a VASP calculation."""
    gga = str(found.get("gga") or "--").strip().upper()
    if gga == "--":
        gga = str(found.get("lexch", "")).strip() or (
            "PE" if any("PBE" in title for title in titles) else "CA"
        )
    name = _VASP_FUNCTIONALS.get(gga, gga)
    meta = str(found.get("metagga") or "--").strip().upper()
    if meta not in ("--", "NONE", "F", "T", ""):
        name = meta
    if str(found.get("lhfcalc") or "F").strip()[:1] == "T":
        screening = float(found.get("hfscreen") or 0.0)
        name += f", exact exchange {float(found.get('aexx') or 0.25):g}"
        name += f" screened {screening:.3g}" if screening else ""
    if str(found.get("luse_vdw") or "F").strip()[:1] == "T":
        name += ", vdW-DF"
    dispersion = str(found.get("ivdw") or "0").strip()
    return name if dispersion in ("0", "") else f"{name}, IVDW {dispersion}"


def calculator_settings(name: Any, parameters: Any) -> Settings:
    """Build the table from what ASE keeps of a calculator, in trajectories and databases.

    Args:
        name: of the calculator.
        parameters: its parameters, as they are in the file; of some codes in tables inside of them.
    """
    settings: Settings = {}
    if isinstance(name, str) and 0 < len(name) < 40 and name != "unknown":
        settings["code"] = _CODES.get(name.lower(), name)
    values: dict[str, Any] = {}
    waiting = [parameters] if isinstance(parameters, Mapping) else []
    while waiting:  # the namelists of Quantum ESPRESSO, the mode of GPAW
        for key, value in waiting.pop().items():
            if isinstance(value, Mapping) and key in ("input_data", "system", "SYSTEM", "mode"):
                waiting.append(value)
            elif isinstance(key, str):
                values.setdefault(key.lower(), value)
    for key in ("metagga", "gga", "xc", "input_dft"):
        if isinstance(values.get(key), str) and "functional" not in settings:
            text = values[key].strip()[:40]
            known = {each.casefold(): each for each in _VASP_FUNCTIONALS.values()}
            settings["functional"] = _VASP_FUNCTIONALS.get(text.upper(), known.get(text.casefold(), text))
    for key, unit in (("encut", 1.0), ("ecut", 1.0), ("ecutwfc", Rydberg)):
        number = values.get(key)
        if isinstance(number, int | float) and not isinstance(number, bool):
            settings["cut-off (eV)"] = round(float(number) * unit, 3)
    if "ispin" in values or "nspin" in values:
        polarised = 2 in (values.get("ispin"), values.get("nspin"))
        settings["spin"] = "polarised" if polarised else "not polarised"
    hubbard = values.get("ldau_luj")
    for element, shell in hubbard.items() if isinstance(hubbard, Mapping) else ():
        numbers = [shell.get(each, 0.0) for each in ("U", "J")] if isinstance(shell, Mapping) else []
        if numbers and all(isinstance(number, int | float) for number in numbers):
            settings[f"+U of {str(element)[:2]} (eV)"] = float(numbers[0] - numbers[1])
    return settings


def _note_hubbard(settings: Settings, element: str, value: float) -> None:
    """Set +U of an element; the largest of its species where several have one."""
    name = f"+U of {element} (eV)"
    settings[name] = max(float(settings.get(name, 0.0)), value)


def espresso_calculation(lines: Iterator[str]) -> Calculation:
    """Read the settings of Quantum ESPRESSO's `pw.x`, and the convergence of every configuration.

    Args:
        lines: the output; a configuration begins with the start of the program or with `ATOMIC_POSITIONS`,
            as in ASE's reader.
    """
    settings: Settings = {"code": "Quantum ESPRESSO", "spin": "not polarised", "dispersion": "none"}
    converged: list[bool | None] = []
    valences: dict[str, float] = {}
    electrons: float | None = None
    potential: str | None = None
    table = ""
    for line in lines:
        heading = next((name for text, name in _QE_TABLES.items() if text in line), None)
        if heading is not None:
            table = heading
        elif table and (match := _QE_ROW.match(line)) is not None:
            if table == "valence":
                valences[match[1]] = float(match[2])
                settings.setdefault(f"+U of {match[1]} (eV)", 0.0)
            else:  # the second number, behind the angular momentum
                _note_hubbard(settings, match[1], float(match[3]))
        elif table and "atomic species" not in line:
            table = ""
        if "Program PWSCF" in line or "ATOMIC_POSITIONS" in line:
            converged.append(None)
        elif converged and "convergence NOT achieved" in line:
            converged[-1] = False
        elif converged and "convergence has been achieved" in line:
            converged[-1] = True
        elif (match := _QE_VALUES["cutoff"].search(line)) is not None:
            settings.setdefault("cut-off (eV)", round(float(match[1]) * Rydberg, 3))
        elif (match := _QE_VALUES["functional"].search(line)) is not None:
            settings.setdefault("functional", " ".join(match[1].split()))
        elif (match := _QE_POTENTIAL.search(line)) is not None:
            potential = re.sub(r"[\d_-].*", "", match[1])
        elif potential is not None:
            settings[f"potential of {potential}"] = line.split("/")[-1].strip()
            potential = None
        elif (match := _QE_VALUES["smearing"].search(line)) is not None:
            settings.setdefault("smearing", f"{match[1]}, {float(match[2]) * Rydberg:.4g} eV")
        elif (match := _QE_VALUES["electrons"].search(line)) is not None:
            electrons = float(match[1]) if electrons is None else electrons
        elif (match := _QE_U.search(line)) is not None:
            _note_hubbard(settings, match[1], float(match[2]))
        elif "Starting magnetic structure" in line:
            settings["spin"] = "polarised"
        elif "Noncollinear calculation" in line:
            settings["spin"] = "not collinear"
        elif (match := _QE_VALUES["dispersion"].search(line)) is not None:
            settings["dispersion"] = match[1]
    return Calculation(settings, converged, electrons=electrons, valences=valences)
