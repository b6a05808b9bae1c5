"""Volcano plot: activity of many slabs against a descriptor, with the legs of linear scaling.

The activity is minus the largest step of a reaction path at 0 V against RHE, per pair of proton and electron:
the limiting potential of a reduction, and minus that of an oxidation. The free energy of every state is
fitted as a line in the descriptor by least squares, and each step between two lines is a leg.
"""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from datasets_oc20.untrusted import AnyPath, read_text
from equiformer2.adsorption.corrections import Corrections, correction_text
from equiformer2.adsorption.diagram import CLEAN, DIAGRAM, check_same_gas, gas_state
from equiformer2.adsorption.free_energy import Reaction
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, read_json
from equiformer2.inference.pictures import new_figure, png_bytes

#: Fewest systems for a line.
_ENOUGH = 3
_MOST_SYSTEMS = 100_000
_TEMPERATURE = 298.15  # K, of the gases where free energies do not say theirs
#: Gases that adsorbates are made of, so that their corrections change free energies of formation.
_OF_FORMATION = ("H2", "H2O", "CO", "N2")
_SYSTEM = "system"
#: eV; nothing is bound by more.
_LARGEST = 1000.0


@dataclass(frozen=True)
class State:
    """State of a reaction path.

    Attributes:
        name: adsorbate, without its star; the clean slab and gases have a free energy of their own.
        electrons: pairs of proton and electron that it has taken.
        energy: free energy at 0 V, eV, that is no slab's; None for an adsorbate.
    """

    name: str
    electrons: float
    energy: float | None = None

    @property
    def label(self) -> str:
        """Name as it is written, with the star of an adsorbate."""
        return self.name if self.energy is not None else f"*{self.name}"


def _gas(molecule: str, temperature: float, pressures: Mapping[str, float] | None) -> State:
    state = gas_state(molecule, temperature, 0.0, pressures)
    return State(state["adsorbate"], state["electrons"], state["free_energy_eV"])


def _formation(adsorbate: str) -> tuple[dict[str, float], float] | None:
    """Gases and electrons that an adsorbate is made of; None for a name that is no formula of C, H, O, N."""
    try:
        reaction = Reaction.of(Atoms(adsorbate.replace("*", "")))
    except (InputError, ValueError, KeyError):
        return None
    return reaction.gases, reaction.electrons


def named_path(
    reaction: str, temperature: float = _TEMPERATURE, pressures: Mapping[str, float] | None = None
) -> list[State]:
    """Make the path of a reaction by name.

    Args:
        reaction: `"her"` (2 H+ -> H2 by *H), `"oer"` (H2O -> O2 by *OH, *O and *OOH) or `"orr"`, its reverse.
        temperature: K, of the gas at the end.
        pressures: bar, see `gases.thermal_correction`.

    Raises:
        InputError: another name.
    """
    clean = State(CLEAN, 0.0, 0.0)
    hydrogen, o2 = (_gas(molecule, temperature, pressures) for molecule in ("H2", "O2"))
    oxygen = [clean, State("OH", -1.0), State("O", -2.0), State("OOH", -3.0), o2]
    paths = {"her": [clean, State("H", 1.0), hydrogen], "oer": oxygen, "orr": oxygen[::-1]}
    if reaction not in paths:
        raise InputError(f"the reaction {reaction!r} is unknown: give one of {', '.join(paths)}")
    return paths[reaction]


@dataclass(frozen=True)
class SystemTable:
    """Free energies of adsorbates on several slabs, at 0 V against RHE.

    Attributes:
        energies: by system, by adsorbate (without its star), eV.
        path: of the diagrams that they were read from; None of a table.
        notes: sentences about what was left out, and doubts that the diagrams carry.
        corrections: eV by species, that have changed an energy.
        temperature: K, of the energies.
        pressures: bar, by formula, where they are not those of `gases.GASES`.
        model: identity of the model of the diagrams; None where it is not known.
        gas: gas references of its adsorption energies; None without.
    """

    energies: dict[str, dict[str, float]]
    path: list[State] | None
    notes: list[str]
    corrections: dict[str, float] = field(default_factory=dict)
    temperature: float = _TEMPERATURE
    pressures: dict[str, float] = field(default_factory=dict)
    model: Any = None
    gas: Mapping[str, Any] | None = None

    def corrected(self, corrections: Corrections) -> "SystemTable":
        """The table with corrections of adsorbates and of the gases that they are made of.

        Raises:
            InputError: the energies are corrected already, the corrections are of another model, or those of
                gases meet an adsorbate whose name does not say what it is made of.
        """
        if self.corrections:
            raise InputError("the diagrams are corrected already: leave --corrections out")
        if self.model is not None:
            corrections.check_model(self.model, self.gas)
        names = {name for energies in self.energies.values() for name in energies}
        made_of = {name: _formation(name) for name in names}
        nameless = sorted(name for name, found in made_of.items() if found is None)
        gases = [name for name in _OF_FORMATION if name in corrections.species]
        if nameless and gases:
            raise InputError(
                f"the correction of {gases[0]} cannot be applied to *{nameless[0]}, whose name is no formula "
                "of C, H, O and N: name it by its formula, or give --corrections to `adsorption free-energy`"
            )
        added = {name: corrections.of(name, *(made_of[name] or ({}, 0.0))) for name in names}
        energies = {
            system: {name: value + sum(added[name].values()) for name, value in known.items()}
            for system, known in self.energies.items()
        }
        used = {name for one in added.values() for name in one}
        species = {name: value for name, value in corrections.species.items() if name in used}
        return replace(self, energies=energies, corrections=species)


def read_table(file: AnyPath) -> SystemTable:
    """Read a CSV file with a column `system` and one column of free energies per adsorbate.

    Args:
        file: energies in eV, at 0 V against RHE; an empty cell is an energy that is not known.

    Raises:
        InputError: no such column, a cell that is no number, a system twice.
        OSError: the file is missing or unreadable.
    """
    with as_input_error():
        reader = csv.reader(io.StringIO(read_text(file), newline=""), skipinitialspace=True)
        try:
            rows = [[cell.strip() for cell in row] for row in itertools.islice(reader, _MOST_SYSTEMS)]
        except csv.Error as error:
            raise InputError(f"{file} is no CSV file ({error})") from error
    rows = [row for row in rows if any(row)]
    head = [cell.removesuffix("_eV").lstrip("*") for cell in rows[0]] if rows else []
    if _SYSTEM not in head or len(head) < 2 or len(set(head)) < len(head):
        raise InputError(
            f"{file}: give a first line with the columns {_SYSTEM} and one per adsorbate, each once, such as "
            "system,OH,O,OOH"
        )
    energies: dict[str, dict[str, float]] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) > len(head):
            raise InputError(f"{file}, row {number} has {len(row)} cells, and there are {len(head)} columns")
        cells = dict(zip(head, row, strict=False))
        name = cells.pop(_SYSTEM, "")
        if not name or name in energies:
            problem = "has no name" if not name else f"is {name} again"
            raise InputError(f"{file}, row {number} {problem}: give every system once, with its name")
        energies[name] = {}
        for column, text in cells.items():
            try:
                value = float(text) if text else None
            except ValueError:
                value = math.nan
            if value is not None and not abs(value) <= _LARGEST:
                raise InputError(
                    f"{file}, row {number}, column {column}: {text!r} is no finite energy in eV (at most "
                    f"{_LARGEST:g})"
                )
            if value is not None:
                energies[name][column] = value
    if not energies:
        raise InputError(f"{file} holds no system below its first line")
    return SystemTable(energies, None, [])


def read_diagrams(folders: Sequence[Path]) -> SystemTable:
    """Read free-energy diagrams of one reaction on several slabs.

    Args:
        folders: folders of `adsorption diagram`, or their `diagram.json`; a folder's name is that of its
            system, or where several have the same, that of the folder around it.

    Raises:
        InputError: no diagram that can be read, or a folder twice.
    """
    energies: dict[str, dict[str, float]] = {}
    path: list[State] | None = None
    notes: list[str] = []
    corrections: dict[str, float] | None = None
    conditions: _Conditions | None = None
    files = [folder / DIAGRAM if folder.is_dir() else folder for folder in folders]
    for file, name in zip(files, _system_names(files), strict=True):
        try:
            record = read_json(file)
            states, own_conditions = _states_of(record), _Conditions.of(file, record)
            own_conditions.check(conditions)
            _check_each_once(states)
            added = {str(key): float(value) for key, value in (record.get("corrections_eV") or {}).items()}
        except (InputError, OSError) as error:
            notes.append(f"{file} is left out: {error}")
            continue
        except (KeyError, TypeError, ValueError):
            notes.append(f"{file} is left out: it is no diagram, or broken")
            continue
        own = [
            State(one.name, one.electrons, None if one.name not in _fixed(states) else one.energy)
            for one in states
        ]
        if path is not None and [(s.name, s.electrons) for s in own] != [(s.name, s.electrons) for s in path]:
            notes.append(f"{file} is left out: its path is another one than that of {next(iter(energies))}")
            continue
        if corrections not in (None, added):
            notes.append(f"{file} is left out: it has other corrections than {next(iter(energies))}")
            continue
        path, corrections, conditions = path or own, added, conditions or own_conditions
        energies[name] = {
            one.name: float(one.energy or 0.0) for one in states if one.name not in _fixed(states)
        }
        if record.get("converged") is False:
            notes.append(f"{name}: one of its states has not converged")
        warnings = record.get("warnings")
        notes += [f"{name}: {text}" for text in warnings] if isinstance(warnings, list) else []
    if path is None or conditions is None:
        raise InputError("; ".join(notes) or "no diagram was given")
    return SystemTable(
        energies,
        path,
        notes,
        corrections or {},
        conditions.temperature or _TEMPERATURE,
        conditions.pressures,
        conditions.model,
        next(iter(conditions.gases), None),
    )


@dataclass(frozen=True)
class _Conditions:
    """Conditions, model and references of the free energies in a diagram; one volcano has one set of them.

    Attributes:
        file: the diagram.
        temperature: K; None where it does not say.
        pressures: bar, by formula.
        model: identity of the model; None where it does not say.
        gases: gas references of every state that has some.
    """

    file: Path
    temperature: float | None
    pressures: dict[str, float]
    model: Any
    gases: list[Mapping[str, Any]]

    @classmethod
    def of(cls, file: Path, record: Mapping[str, Any]) -> "_Conditions":
        """Read them from the record of a diagram."""
        rows = [row for row in record["states"] if row.get("temperature_K") is not None]
        temperature = float(rows[0]["temperature_K"]) if rows else None
        pressures = dict(rows[0].get("pressures_bar") or {}) if rows else {}
        gases = [row["gas_references"] for row in rows if row.get("gas_references")]
        return cls(file, temperature, pressures, record.get("model"), gases)

    def check(self, other: "_Conditions | None") -> None:
        """Raise `InputError` where they are no electrode's, or others than those of another diagram."""
        hydrogen = self.pressures.get("H2", 1.0)
        if hydrogen != 1.0:
            raise InputError(
                f"its H2 has {hydrogen:g} bar, and activities are potentials against H2 of 1 bar"
            )
        if other is None:
            return
        pairs = [("temperature", self.temperature, other.temperature), ("model", self.model, other.model)]
        different = [name for name, a, b in pairs if a is not None and b is not None and a != b]
        different += ["pressures"] if self.pressures != other.pressures else []
        if different:
            raise InputError(f"it is of another {different[0]} than {other.file}")
        for own, known in itertools.product(self.gases, other.gases):
            check_same_gas(other.file, known, self.file, own)


def _check_each_once(states: Sequence[State]) -> None:
    """Raise `InputError` for an adsorbate that is more than one state, of which one energy would be lost."""
    names = [one.name for one in states if one.name not in _fixed(states)]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise InputError(f"*{again} is more than one of its states, and a volcano takes one of each")


def _system_names(files: Sequence[Path]) -> list[str]:
    """Name every diagram by the innermost folder that tells it from the others."""
    parts = [file.resolve().parent.parts for file in files]
    if len(set(parts)) < len(parts):
        raise InputError("a diagram is given twice: give each once")
    for depth in range(1, max(len(one) for one in parts) + 1):
        names = [one[max(len(one) - depth, 0)] for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(file.parent) for file in files]


def _states_of(record: Mapping[str, Any]) -> list[State]:
    """States of a diagram, at 0 V."""
    potential = float(record["potential_against_rhe_V"])
    return [
        State(
            str(row["adsorbate"]).lstrip("*") or CLEAN,
            float(row["electrons"]),
            float(row["free_energy_eV"]) - float(row["electrons"]) * potential,
        )
        for row in record["states"]
    ]


def _fixed(states: Sequence[State]) -> set[str]:
    return {one.name for one in states if one.name == CLEAN or one.name.endswith("(g)")}


@dataclass(frozen=True)
class Descriptor:
    """Descriptor of a slab: the free energy of an adsorbate, or the difference of two (`O-OH`).

    Attributes:
        plus: adsorbate.
        minus: adsorbate whose free energy is subtracted; None for none.
    """

    plus: str
    minus: str | None = None

    @classmethod
    def read(cls, text: str, adsorbates: Sequence[str]) -> "Descriptor":
        """Read a descriptor, of these adsorbates.

        Raises:
            InputError: of another adsorbate.
        """
        parts = [part.strip().lstrip("*") for part in text.split("-")]
        if len(parts) > 2 or not set(parts) <= set(adsorbates):
            raise InputError(
                f"the descriptor {text!r} is not one of the adsorbates ({', '.join(adsorbates)}) or the "
                "difference of two, such as O-OH"
            )
        return cls(*parts)

    def value(self, energies: Mapping[str, float]) -> float:
        """Value for one slab, eV."""
        return energies[self.plus] - (0.0 if self.minus is None else energies[self.minus])

    def label(self) -> str:
        """Name for the axis of a figure."""
        return f"ΔG(*{self.plus})" + ("" if self.minus is None else f" - ΔG(*{self.minus})")


def volcano(table: SystemTable, path: Sequence[State], descriptor: str | None = None) -> dict[str, Any]:
    """Compute the activities of all systems, and the legs between them.

    Args:
        table: free energies; systems that lack one are left out and named.
        path: of the reaction; steps without electrons do not count.
        descriptor: see `Descriptor`; None for OH, or else the first adsorbate of the path.

    Returns:
        Plain values: `points` (`system`, `descriptor_eV`, `activity_V`, `limiting_potential_V`,
        `limiting_step`), `scaling` (by adsorbate `slope`, `intercept_eV`, `mae_eV`), `legs` (by step `slope`
        and `intercept_V` of minus its change, per electron) and `peak`; the last three are empty or None with
        fewer than three systems, or where all have one descriptor.

    Raises:
        InputError: a descriptor that is none, a path without electrons or in both senses, no complete system.
    """
    adsorbates = [state.name for state in path if state.energy is None]
    usual = "OH" if "OH" in adsorbates else next(iter(adsorbates), "")
    chosen = Descriptor.read(usual if descriptor is None else descriptor, adsorbates)
    steps = [(a, b) for a, b in itertools.pairwise(path) if a.electrons != b.electrons]
    senses = {np.sign(b.electrons - a.electrons) for a, b in steps}
    if len(senses) != 1:
        raise InputError(
            "a volcano is of a path that takes electrons in every step, or gives them in every step"
        )
    sense = senses.pop()
    notes = list(table.notes)
    systems = {}
    for name, energies in table.energies.items():
        missing = [one for one in adsorbates if one not in energies]
        if missing:
            notes.append(
                f"{name} is left out: it has no free energy of {', '.join('*' + m for m in missing)}"
            )
        else:
            systems[name] = energies
    if not systems:
        raise InputError(f"no system has free energies of all of {', '.join(adsorbates)} ({notes[0]})")

    def activities(energies: Mapping[str, Any]) -> list[Any]:
        """Minus the change of every step, per electron."""
        at = [energies[state.name] if state.energy is None else state.energy for state in path]
        known = dict(zip(path, at, strict=True))
        return [-(known[b] - known[a]) / abs(b.electrons - a.electrons) for a, b in steps]

    names = [f"{a.label} -> {b.label}" for a, b in steps]
    points = []
    for name, energies in systems.items():
        values = activities(energies)
        worst = int(np.argmin(values))
        points.append(
            {
                "system": name,
                "descriptor_eV": chosen.value(energies),
                "activity_V": values[worst],
                "limiting_potential_V": sense * values[worst],
                "limiting_step": names[worst],
                "free_energies_eV": {one: energies[one] for one in adsorbates},
            }
        )
    points.sort(key=lambda point: -float(point["activity_V"]))
    scaling = _scaling(systems, adsorbates, chosen)
    legs: list[dict[str, Any]] = []
    peak = None
    if scaling:
        lines = {one: np.array([fit["slope"], fit["intercept_eV"]]) for one, fit in scaling.items()}
        at = {
            state: lines[state.name] if state.energy is None else np.array([0.0, state.energy])
            for state in path
        }
        for (a, b), name in zip(steps, names, strict=True):
            slope, intercept = (-(at[b] - at[a]) / abs(b.electrons - a.electrons)).tolist()
            legs.append({"step": name, "slope": slope, "intercept_V": intercept})
        peak = _peak(legs, [float(point["descriptor_eV"]) for point in points])
    return {
        "descriptor": chosen.label(),
        "path": [state.label for state in path],
        "points": points,
        "scaling": scaling,
        "legs": legs,
        "peak": peak,
        "corrections_eV": table.corrections,
        "notes": notes,
    }


def _scaling(
    systems: Mapping[str, Mapping[str, float]], adsorbates: Sequence[str], descriptor: Descriptor
) -> dict[str, dict[str, float]]:
    """Lines of every adsorbate's free energy in the descriptor; empty where there are too few systems."""
    x = np.array([descriptor.value(energies) for energies in systems.values()])
    exact = list(adsorbates) == [descriptor.plus] and descriptor.minus is None
    if not exact and (len(x) < _ENOUGH or np.ptp(x) < 1e-6):
        return {}
    found = {}
    for one in adsorbates:
        y = np.array([energies[one] for energies in systems.values()])
        itself = one == descriptor.plus and descriptor.minus is None
        slope, intercept = (1.0, 0.0) if itself else np.polyfit(x, y, 1)
        error = float(np.abs(y - slope * x - intercept).mean())
        found[one] = {"slope": float(slope), "intercept_eV": float(intercept), "mae_eV": error}
    return found


def _peak(legs: Sequence[Mapping[str, float]], descriptors: Sequence[float]) -> dict[str, float] | None:
    """Highest point of the lowest leg, where two legs of opposite slope cross; None where none do."""
    best = None
    for one, other in itertools.combinations(legs, 2):
        if one["slope"] * other["slope"] >= 0.0:
            continue
        x = (other["intercept_V"] - one["intercept_V"]) / (one["slope"] - other["slope"])
        height = one["slope"] * x + one["intercept_V"]
        lowest = min(leg["slope"] * x + leg["intercept_V"] for leg in legs)
        if height <= lowest + 1e-9:
            best = {"descriptor_eV": x, "activity_V": height}
    if best is not None:
        best["extrapolated_eV"] = max(min(descriptors) - best["descriptor_eV"], 0.0) + max(
            best["descriptor_eV"] - max(descriptors), 0.0
        )
    return best


def volcano_picture(found: Mapping[str, Any], title: str) -> bytes:
    """Draw the points with their names, and the legs, as PNG."""
    figure = new_figure(7.2, 5.0)
    axis = figure.subplots()
    x = np.array([point["descriptor_eV"] for point in found["points"]])
    y = np.array([point["activity_V"] for point in found["points"]])
    ends = [*x, *([found["peak"]["descriptor_eV"]] if found["peak"] else [])]
    margin = 0.15 * (max(ends) - min(ends)) + 0.1
    grid = np.linspace(min(ends) - margin, max(ends) + margin, 300)
    bottom = min(y) - 0.15 * np.ptp(y) - 0.1
    if found["legs"]:
        lines = np.array([leg["slope"] * grid + leg["intercept_V"] for leg in found["legs"]])
        axis.plot(grid, lines.min(axis=0), color="#1f4e79", linewidth=2)
        for number, (leg, line) in enumerate(zip(found["legs"], lines, strict=True)):
            axis.plot(grid, line, ":", color=f"C{number + 1}", linewidth=1, label=leg["step"])
        axis.legend(fontsize=8, frameon=False)
        bottom = min(bottom, float(lines.min(axis=0).min()))
        top = max(float(lines.min(axis=0).max()), float(max(y)))
        axis.set_ylim(bottom, top + 0.2 * (top - bottom) + 0.05)
    axis.plot(x, y, "o", color="#c55a11", markersize=6, zorder=3)
    for point in found["points"]:
        axis.annotate(
            point["system"],
            (point["descriptor_eV"], point["activity_V"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_xlim(grid[0], grid[-1])
    axis.set(xlabel=f"{found['descriptor']} (eV)", ylabel="activity: minus the largest step (V)")
    headline = "\n".join(filter(None, [title, correction_text(found["corrections_eV"])]))
    axis.set_title(headline, fontsize=10, wrap=True)
    axis.grid(alpha=0.3)
    return png_bytes(figure)
