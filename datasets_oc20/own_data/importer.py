"""Import of results of DFT: read in several processes, checked together, written to one LMDB per part."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datasets_oc20.atomic import remove_stale, temporary_beside
from datasets_oc20.errors import DataError
from datasets_oc20.own_data.checks import (
    MAX_FORCE,
    Place,
    check_one_kind,
    different_settings,
    duplicates,
    places,
    unit_problem,
)
from datasets_oc20.own_data.discovery import Found, find_sources
from datasets_oc20.own_data.frame_facts import FrameFacts
from datasets_oc20.own_data.labels import LabelOptions, check_kind
from datasets_oc20.own_data.report import (
    ImportReport,
    isolated_atoms,
    listed_duplicates,
    listed_outliers,
    notice_sentences,
    numbered,
    origins,
    shared_settings,
)
from datasets_oc20.own_data.source_worker import (
    Dropped,
    SourceResult,
    is_divided,
    part_file,
    read_source,
)
from datasets_oc20.own_data.splits import SplitOptions, split_frames
from datasets_oc20.periodicity import Periodicity
from datasets_oc20.structure_record import PackedRecord, pack
from datasets_oc20.target_sums import NUM_ELEMENTS
from datasets_oc20.targets import TargetSample
from datasets_oc20.untrusted import AnyPath
from datasets_oc20.workers import parallel_map
from datasets_oc20.writer import LmdbWriter

_LOG = logging.getLogger(__name__)
_MOST_NAMED = 5


@dataclass(frozen=True)
class ImportOptions:
    """Choices of an import.

    Attributes:
        labels: keys, units and rules of single frames.
        energy_kind: "adsorption" or "total"; None takes what the files declare, and "total" where they do
            not.
        mixed: allow calculations with different settings, and energies that look like two kinds.
        checked: drop files whose energies and forces are in different units.
        split: split into parts; None writes one file.
    """

    labels: LabelOptions = field(default_factory=LabelOptions)
    energy_kind: str | None = None
    mixed: bool = False
    checked: bool = True
    split: SplitOptions | None = None


@dataclass
class ReadSet:
    """Frames of an import, read and checked, with their records in a folder.

    Attributes:
        found: the files.
        results: what was read of every source, in order.
        folder: folder with the records.
        energy_kind: kind of the energies.
        targets: results that all frames have, and that are written.
        notices: sentences about the set.
        differences: settings in which calculations differ.
    """

    found: Found
    results: list[SourceResult]
    folder: Path
    energy_kind: str = "total"
    targets: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def dropped(self) -> list[Dropped]:
        """Return what is not used, in the order of the files."""
        missing = [Dropped(name, None, reason) for name, reason in self.found.missing]
        return missing + [item for result in self.results for item in result.dropped]

    def records(self) -> Iterator[tuple[SourceResult, FrameFacts, bytes]]:
        """Read the records back, in order, with the same fields in all."""
        for result in self.results:
            if not result.frames:
                continue
            with part_file(self.folder, result.source).open("rb") as file:
                for facts in result.frames:
                    file.seek(facts.offset)
                    record = file.read(facts.size)
                    if facts.targets != self.targets:
                        record = _without(record, facts.targets - self.targets)
                    yield result, facts, record


def import_files(
    paths: Iterable[AnyPath],
    out: AnyPath,
    options: ImportOptions | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> ImportReport:
    """Import files and folders to an LMDB.

    Frames are written to a folder beside `out` while they are read, and from there to the LMDB, so that
    memory holds some facts per frame only. The result does not depend on the number of processes. Nothing
    takes its name before it is complete; a killed import leaves a hidden folder, which the next one removes.

    Args:
        paths: files and folders (`discovery.find_sources`).
        out: the LMDB; with a split it holds the part for training, and `OUT.val.lmdb` and `OUT.test.lmdb`
            beside it the others.
        options: choices; ASE's conventions by default.
        num_workers: number of processes; None takes one per core.
        progress: show a bar on a terminal.

    Returns:
        The report; with `kept` 0 nothing was written.

    Raises:
        DataError: settings or kinds of energy are mixed, a split is not possible, or `out` is an input.
        OSError: the disk is full, or the folder of `out` not writable.
    """
    options = options or ImportOptions()
    out = Path(out)
    found = find_sources(paths)
    _check_out(out, found, options)
    with scratch_folder(out) as folder:
        frames = read_set(found, options, folder, num_workers, progress)
        placed = places(frames.results)
        report = _report(frames, placed, str(out))
        if not placed:
            return report
        parts = None if options.split is None else split_frames(placed, options.split)
        if parts is not None:
            report.notices += _shared_notices(placed, parts)
        _write(frames, placed, parts, out, options, report, progress)
    return report


def _check_out(out: Path, found: Found, options: ImportOptions) -> None:
    """Raise `DataError` if a file of the result is one that is read."""
    read = {os.path.realpath(path) for source in found.sources for path in source.paths}
    for path in (*part_files(out, options.split).values(), report_file(out)):
        if os.path.realpath(path) in read:
            raise DataError(f"{path} is read as input and would be replaced; give another name to --out.")


def part_files(out: AnyPath, split: SplitOptions | None) -> dict[str, Path]:
    """Return the file of every part, by name."""
    out = Path(out)
    names = ("train", "val", "test")[: len(split.fractions)] if split is not None else ("train",)
    return {
        name: out if name == "train" else out.with_name(f"{out.stem}.{name}{out.suffix}") for name in names
    }


@contextmanager
def scratch_folder(out: AnyPath) -> Iterator[Path]:
    """Make a hidden folder beside `out` for the time of an import."""
    out = Path(out)
    if not out.parent.is_dir():
        raise DataError(f"{out.parent}: no such folder; make it first.")
    target = out.with_name(f"{out.name}.parts")
    remove_stale(target)
    folder = temporary_beside(target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_set(
    found: Found,
    options: ImportOptions,
    folder: AnyPath,
    num_workers: int | None = None,
    progress: bool = True,
    needs_energy: bool = True,
) -> ReadSet:
    """Read all sources into `folder` and check them against each other.

    Args:
        found: the sources.
        options: choices.
        folder: an empty folder for the records.
        num_workers: number of processes; None takes one per core.
        progress: show a bar on a terminal.
        needs_energy: drop frames without an energy.

    Raises:
        DataError: as `import_files`.
    """
    folder = Path(folder)
    results = list(_read_all(found, options, folder, num_workers, progress, needs_energy))
    frames = ReadSet(found, results, folder)
    _share_targets(frames) if not needs_energy else _drop_other_targets(frames)
    if options.checked:
        _drop_other_units(frames)
    placed = places(results)
    frames.energy_kind = _energy_kind(results, options)
    frames.differences = different_settings(results)
    if frames.differences and not options.mixed:
        raise DataError(
            f"the calculations have different settings, and so energies that cannot be compared: "
            f"{frames.differences[0]}; import them apart, or give --mixed."
        )
    if needs_energy and not options.mixed:
        check_one_kind(placed)
    if needs_energy and placed:
        _check_size(frames, placed)
    _note(frames, placed)
    return frames


def _read_all(
    found: Found,
    options: ImportOptions,
    folder: Path,
    num_workers: int | None,
    progress: bool,
    needs_energy: bool,
) -> Iterator[SourceResult]:
    """Read the sources in order, with a bar that counts files, or frames where there is one file.

    Large files that can be divided are each read by all processes, the others side by side.
    """
    sources = found.sources
    read = partial(read_source, options=options.labels, folder=folder, needs_energy=needs_energy)
    read_large = partial(read, num_workers=num_workers)
    disable = None if progress else True
    with ExitStack() as stack:
        if len(sources) == 1:
            bar = stack.enter_context(tqdm(desc="Reading", unit=" frames", disable=disable))
            yield read_large(sources[0], progress=lambda number: bar.update(number - bar.n))
            return
        divided = {source.number for source in sources if is_divided(source)}
        others = [source for source in sources if source.number not in divided]
        work = iter(stack.enter_context(parallel_map(read, others, num_workers)))
        frames = 0
        bar = stack.enter_context(tqdm(total=len(sources), desc="Reading", unit=" files", disable=disable))
        for source in sources:
            result = read_large(source) if source.number in divided else next(work)
            frames += len(result.frames)
            bar.update()
            bar.set_postfix(frames=frames, refresh=False)
            yield result


def _share_targets(frames: ReadSet) -> None:
    """Keep the results that all frames have; nothing is dropped for their sake."""
    counts = Counter(facts.targets for result in frames.results for facts in result.frames)
    frames.targets = frozenset.intersection(*counts) if counts else frozenset()


def _drop_other_targets(frames: ReadSet) -> None:
    """Keep frames of the same fields: without forces only if none has them; stress only if all have it."""
    counts = Counter(facts.targets for result in frames.results for facts in result.frames)
    if not counts:
        return
    if any("forces" in targets for targets in counts):
        reason = "it has no forces, which other frames have; import energies without forces apart"
        _drop(frames, lambda facts: "forces" not in facts.targets, reason)
        counts = Counter(facts.targets for result in frames.results for facts in result.frames)
    else:
        frames.notices.append("no frame has forces, so a network can only be trained on the energies")
    frames.targets = frozenset.intersection(*counts)
    some = frozenset.union(*counts) - frames.targets
    if some:
        number = sum(count for targets, count in counts.items() if some <= targets)
        frames.notices.append(f"only {number} frames have {', '.join(sorted(some))}, which is not written")


def _drop(frames: ReadSet, is_wrong: Any, reason: str) -> None:
    for result in frames.results:
        wrong = [facts for facts in result.frames if is_wrong(facts)]
        if wrong:
            result.frames = [facts for facts in result.frames if not is_wrong(facts)]
            result.dropped += [Dropped(result.file, facts.index, reason) for facts in wrong]
            result.dropped.sort(key=lambda item: (item.index is None, item.index or 0))


def _drop_other_units(frames: ReadSet) -> None:
    """Drop files whose energies and forces are in different units."""
    for result in frames.results:
        problem = unit_problem(result)
        if problem is None:
            continue
        index, text, is_unit = problem
        if not is_unit:
            frames.notices.append(f"{result.file}, frame {index}: {text}")
            continue
        result.dropped += [Dropped(result.file, facts.index, text) for facts in result.frames]
        result.frames = []


def _energy_kind(results: Sequence[SourceResult], options: ImportOptions) -> str:
    """Return the kind of the energies, as declared or given."""
    declared: dict[str, str] = {}
    for result in results:
        if result.frames and result.energy_kind is not None:
            declared.setdefault(result.energy_kind, result.file)
    given = options.energy_kind
    if len(declared) > 1:
        one, other = declared.items()
        raise DataError(
            f"{one[1]} declares {one[0]} energies and {other[1]} {other[0]} energies; import them apart."
        )
    for kind, file in declared.items():
        if given is not None and given != kind:
            raise DataError(f"{file} declares {kind} energies, but --energy-kind {given} was given.")
        undeclared = next((item for item in results if item.frames and item.energy_kind is None), None)
        if undeclared is not None and given is None and kind == "adsorption":
            raise DataError(
                f"{file} declares adsorption energies and {undeclared.file} does not say of which kind its "
                "energies are (codes write total energies); import them apart, or give --energy-kind."
            )
        return kind
    return check_kind(given or "total")


def _check_size(frames: ReadSet, placed: Sequence[Place]) -> None:
    """Check that energies have a size that is possible for their kind."""
    composition = np.zeros((len(placed), NUM_ELEMENTS + 20))
    for row, place in enumerate(placed):
        for number, count in place.facts.composition:
            composition[row, number] = count
    energies = np.array([place.facts.energy for place in placed])
    size = TargetSample(composition, energies, None).unlikely_size(frames.energy_kind)
    if size is None:
        return
    if frames.energy_kind == "adsorption":
        raise DataError(
            f"{placed[0]}: the energies are declared adsorption energies, but {size}, as of total energies; "
            "give --energy-kind total."
        )
    frames.notices.append(
        f"the energies are taken as total energies, but {size}; if they are adsorption energies, give "
        "--energy-kind "
        "adsorption, if they are energies per atom, multiply them by the number of atoms, and if they are in "
        "another unit, give --energy-unit"
    )


def _note(frames: ReadSet, placed: Sequence[Place]) -> None:
    """Add notices about charges, periodic directions, files left out and single frames."""
    charged = [item for item in frames.results if item.frames and abs(item.calculation.charge or 0.0) > 1e-3]
    if charged:
        charge = charged[0].calculation.charge
        frames.notices.append(
            f"{numbered(len(charged), 'calculation')} of charged cells (first {charged[0].file}, {charge:+g} "
            "e): the "
            "network does not see a charge, and such energies depend on the size of the cell"
        )
    kinds: dict[tuple[bool, ...], Place] = {}
    for place in placed:
        kinds.setdefault(place.facts.pbc, place)
    if len(kinds) > 1:
        periodicity = Periodicity(directions={pbc: (1, str(place)) for pbc, place in kinds.items()})
        frames.notices += periodicity.notices().values()
    total = Counter(kind for place in placed for kind in place.facts.origins.notices)
    frames.notices += notice_sentences(total, len(placed))
    for names, text in (
        (frames.found.merged, "of calculations of which vasprun.xml is read"),
        (frames.found.ignored, "in the folders left out, without results in a format that ASE reads"),
    ):
        if names:
            shown = ", ".join(names[:_MOST_NAMED]) + (", …" if len(names) > _MOST_NAMED else "")
            frames.notices.append(f"{numbered(len(names), 'file')} {text} ({shown})")


def _set_notices(placed: Sequence[Place]) -> list[str]:
    """Return notices about sets that are too small to learn from or to test on, or have too large forces."""
    notices: list[str] = []
    if len(placed) == 1:
        notices.append("there is one frame, which is too few to train or to test on")
    systems = {place.facts.sid for place in placed}
    if len(systems) == 1 and len(placed) > 1:
        notices.append(
            f"all frames are of one system ({next(iter(systems))}), so nothing is known about others; errors "
            "on held-out frames will look better than they are"
        )
    large = sum(place.facts.max_force > MAX_FORCE for place in placed)
    if 2 * large > len(placed):
        notices.append(
            f"{large} of {len(placed)} frames have forces above {MAX_FORCE:g} eV/Å, as hardly any "
            "relaxation has; if they are in another unit, such as meV/Å, give --forces-unit"
        )
    return notices


def _shared_notices(placed: Sequence[Place], parts: Sequence[str]) -> list[str]:
    """Return a notice about the same structures in several parts of a split."""
    part_of = {id(place): part for place, part in zip(placed, parts, strict=True)}
    shared = [
        (later, first) for later, first, _ in duplicates(placed) if part_of[id(later)] != part_of[id(first)]
    ]
    if not shared:
        return []
    later, first = shared[0]
    verb = "is" if len(shared) == 1 else "are"
    return [
        f"{numbered(len(shared), 'structure')} of one part of the split {verb} in another one, too (such "
        f"as {later} in {part_of[id(later)]} and {first} in {part_of[id(first)]}), so that "
        "errors on held-out frames will look better than they are; leave copies out, or give --split "
        "composition"
    ]


def _report(frames: ReadSet, placed: list[Place], out: str) -> ImportReport:
    dropped = frames.dropped()
    tags = Counter(place.facts.origins.tags for place in placed)
    fixed = Counter(place.facts.origins.fixed for place in placed)
    not_selected = sum(result.not_selected for result in frames.results)
    return ImportReport(
        read=len(placed) + not_selected + sum(item.index is not None for item in dropped),
        kept=len(placed),
        dropped=dropped,
        energy_kind=frames.energy_kind,
        tags_from=origins(tags) if tags else "none",
        fixed_from=origins(fixed) if fixed else "none",
        out=out,
        files=len(frames.found.sources) + len(frames.found.missing),
        systems=len({place.facts.sid for place in placed}),
        not_selected=not_selected,
        targets=sorted(frames.targets - {"energy"}),
        settings=shared_settings(frames.results),
        differences=frames.differences,
        duplicates=listed_duplicates(placed),
        outliers=listed_outliers(placed),
        isolated_atoms=isolated_atoms(placed),
        notices=[*_set_notices(placed), *frames.notices],
    )


def _write(
    frames: ReadSet,
    placed: list[Place],
    parts: list[str] | None,
    out: Path,
    options: ImportOptions,
    report: ImportReport,
    progress: bool,
) -> None:
    """Write the parts; all of them take their names together, when all are complete."""
    files = part_files(out, options.split)
    provenance = {
        "source": "data import",
        "options": {name: value for name, value in asdict(options.labels).items() if value is not None},
        "settings": report.settings,
    }
    counts: Counter[str] = Counter()
    systems: dict[str, set[str]] = {name: set() for name in files}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(LmdbWriter(path, frames.energy_kind, provenance))
            for name, path in files.items()
        }
        disable = None if progress else True
        bar = tqdm(frames.records(), total=len(placed), desc="Writing", unit=" frames", disable=disable)
        for number, (_, facts, record) in enumerate(bar):
            part = "train" if parts is None else parts[number]
            writers[part].write_packed(record, facts.natoms)
            counts[part] += 1
            systems[part].add(facts.sid)
    if parts is not None:
        report.splits = {
            name: {"file": str(path), "frames": counts[name], "systems": len(systems[name])}
            for name, path in files.items()
        }


def _without(record: bytes, fields: frozenset[str]) -> bytes:
    """Return a packed record without some of its fields."""
    data = PackedRecord(record, "record").to_data()
    for name in fields:
        del data[name]
    return pack(data)


def report_file(out: AnyPath) -> Path:
    """Return the path of the report of an import."""
    return Path(f"{os.fspath(out)}.import.json")
