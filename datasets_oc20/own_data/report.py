"""Report of an import: numbers, dropped frames and notices, as text and as JSON."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ase.data import chemical_symbols

from datasets_oc20.own_data.checks import MAX_FORCE, Place, duplicates, energy_outliers
from datasets_oc20.own_data.labels import notice_sentence
from datasets_oc20.own_data.source_worker import Dropped, SourceResult

_MOST_SHOWN = 20
_MOST_LISTED = 1000


@dataclass
class ImportReport:
    """Result of an import.

    Attributes:
        read: number of frames that were found.
        kept: number of frames that were written.
        dropped: frames and files that could not be used.
        energy_kind: "adsorption" or "total".
        tags_from: origin of the tags.
        fixed_from: origin of the fixed atoms.
        splits: by part: file, number of frames and of systems; empty without a split.
        out: file with the frames (of the part for training).
        files: number of files that were read.
        systems: number of systems.
        not_selected: number of frames that the selection left out.
        targets: fields that are written besides the energy.
        settings: settings of the calculations that all share.
        differences: settings in which calculations differ.
        duplicates: the same structures twice.
        outliers: frames with a large force, or an energy far off a linear fit.
        isolated_atoms: elements of isolated atoms.
        notices: sentences for who reads the report.
    """

    read: int
    kept: int
    dropped: list[Dropped]
    energy_kind: str
    tags_from: str
    fixed_from: str
    out: str
    files: int = 0
    systems: int = 0
    not_selected: int = 0
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    settings: dict[str, str | float] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    duplicates: list[dict[str, Any]] = field(default_factory=list)
    outliers: list[dict[str, Any]] = field(default_factory=list)
    isolated_atoms: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def to_record(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        listed = {
            "dropped": [vars(item) for item in self.dropped],
            "duplicates": self.duplicates[:_MOST_LISTED],
            "outliers": self.outliers[:_MOST_LISTED],
        }
        counts = {"num_duplicates": len(self.duplicates), "num_outliers": len(self.outliers)}
        return {**vars(self), **listed, **counts}

    def to_text(self) -> str:
        """Return the table for a terminal."""
        lines = [
            f"{numbered(self.read, 'frame')} of {numbered(self.files, 'file')} read, {self.kept} kept, "
            f"{numbered(self.systems, 'system')}"
        ]
        if self.not_selected:
            lines.append(f"{numbered(self.not_selected, 'frame')} left out by the selection")
        lines += self._dropped_lines()
        if not self.kept:
            return "\n".join(lines)
        targets = ", ".join(["energy", *self.targets])
        lines += [
            f"energies: {self.energy_kind}; written: {targets}",
            f"tags: {self.tags_from}",
            f"fixed atoms: {self.fixed_from}",
        ]
        if self.settings:
            short = {
                name: value
                for name, value in self.settings.items()
                if not name.startswith("potential") and not (name.startswith("+U") and value == 0.0)
            }
            lines.append("settings: " + ", ".join(f"{name} {_plain(value)}" for name, value in short.items()))
        lines += [f"different settings: {text}" for text in self.differences]
        if self.isolated_atoms:
            lines.append(f"isolated atoms: {', '.join(self.isolated_atoms)}")
        lines += _shown(
            "the same structure twice",
            [
                f"{item['file']}, frame {item['index']} and {item['other_file']}, frame "
                f"{item['other_index']}: "
                f"energies differ by {item['energy_difference_eV']:.6f} eV"
                for item in self.duplicates
            ],
        )
        lines += _shown(
            "unusual, and kept", [f"{i['file']}, frame {i['index']}: {i['reason']}" for i in self.outliers]
        )
        lines += [f"note: {text}." for text in self.notices]
        if self.splits:
            lines.append(f"{'part':<6} {'frames':>8} {'systems':>8}  file")
            lines += [
                f"{name:<6} {part['frames']:>8} {part['systems']:>8}  {part['file']}"
                for name, part in self.splits.items()
            ]
        return "\n".join(lines)

    def _dropped_lines(self) -> list[str]:
        return _shown("dropped", dropped_rows(self.dropped), len(self.dropped))


def dropped_rows(dropped: Iterable[Dropped]) -> list[str]:
    """Write what is not used, one row for all frames of a file with one reason."""
    frames: dict[tuple[str, str], list[int | None]] = {}
    for item in dropped:
        frames.setdefault((item.file, item.reason), []).append(item.index)
    return [f"{file}{_frames(indices)}: {reason}" for (file, reason), indices in frames.items()]


def _frames(indices: Sequence[int | None]) -> str:
    """Name frames of a file; nothing for the whole of it."""
    numbers = [index for index in indices if index is not None]
    if not numbers:
        return ""
    if len(numbers) == 1:
        return f", frame {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f", frames {numbers[0]} to {numbers[-1]}"
    return f", {len(numbers)} frames (first {numbers[0]}, last {numbers[-1]})"


def _shown(title: str, rows: list[str], count: int | None = None) -> list[str]:
    """Return a heading with a number, that of the rows unless given, and the first rows below it."""
    if not rows:
        return []
    more = [f"  and {len(rows) - _MOST_SHOWN} more, in the report"] if len(rows) > _MOST_SHOWN else []
    return [f"{title}: {count or len(rows)}", *(f"  {row}" for row in rows[:_MOST_SHOWN]), *more]


def numbered(count: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _plain(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) else value


def origins(counts: Counter[str]) -> str:
    """Write where something comes from, with numbers of frames where the frames differ."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{origin} ({number} frames)" for origin, number in counts.most_common())


def shared_settings(results: list[SourceResult]) -> dict[str, str | float]:
    """Return the settings that all calculations that tell them share."""
    values: dict[str, set[str | float]] = {}
    for result in results:
        tables = [result.calculation.settings, *(table for _, table in result.calculation.others)]
        for name, value in [item for table in tables for item in table.items()] if result.frames else ():
            values.setdefault(name, set()).add(value)
    return {name: next(iter(known)) for name, known in values.items() if len(known) == 1}


def listed_duplicates(frames: list[Place]) -> list[dict[str, Any]]:
    """Return the same structures twice, as plain values."""
    return [
        {
            "file": later.file,
            "index": later.facts.index,
            "other_file": first.file,
            "other_index": first.facts.index,
            "energy_difference_eV": difference,
        }
        for later, first, difference in duplicates(frames)
    ]


def listed_outliers(frames: list[Place]) -> list[dict[str, Any]]:
    """Return frames with a large force, or an energy far off a linear fit."""
    found = [
        {
            "file": place.file,
            "index": place.facts.index,
            "reason": f"a force of {place.facts.max_force:.4g} eV/Å on a free atom (above {MAX_FORCE:g})",
        }
        for place in frames
        if place.facts.max_force > MAX_FORCE
    ]
    found += [
        {
            "file": place.file,
            "index": place.facts.index,
            "reason": f"an energy {distance:+.4g} eV per atom off the linear fit by composition",
        }
        for place, distance in energy_outliers(frames)
    ]
    return found


def isolated_atoms(frames: list[Place]) -> list[str]:
    """Return the elements of isolated atoms."""
    return sorted(
        {chemical_symbols[place.facts.composition[0][0]] for place in frames if place.facts.is_isolated}
    )


def notice_sentences(counts: Counter[str], kept: int) -> list[str]:
    """Return the notices about single frames, one of each kind."""
    return [f"{number} of {kept} frames: {notice_sentence(kind)}" for kind, number in counts.items()]
