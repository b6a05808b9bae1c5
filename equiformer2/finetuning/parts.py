"""Parts of the data: frames to train on, to watch, to judge by, and original data to replay."""

from dataclasses import dataclass, field

import numpy as np
from ase.data import chemical_symbols

from datasets_oc20.division import divide
from equiformer2.errors import InputError
from equiformer2.finetuning.data_curve import nested_parts
from equiformer2.finetuning.folder import FineTuneSettings, OutFolder
from equiformer2.finetuning.frames import Frames, open_frames, read_frames, spread, write_part
from equiformer2.finetuning.start import read_isolated_atoms

_WATCHED, _JUDGED, _OLD_JUDGED = 40, 500, 40
"""Most frames that a training watches, that the table is made of, and of a file of original data."""
_MANY_SYSTEMS, _SHARE, _SHARE_OF_MANY, _OLD_SHARE = 20, 0.2, 0.1, 0.1


@dataclass
class Parts:
    """Division of all data of a fine-tuning; rows are indices into the frames that they belong to.

    Attributes:
        frames: the new data.
        train: rows of `frames` to train on, by share of the learning curve; 1.0 is all of them.
        watched, judged: frames and rows that choose the best weights, and that the table is made of.
        isolated: energies of isolated atoms, eV by atomic number.
        replay: frames of the original data to mix in and their rows by share of the learning curve, one entry
            per file.
        old: frames and rows of the original data to judge by, one entry per file.
        sentences: what was divided how.
    """

    frames: Frames
    train: dict[float, np.ndarray]
    watched: tuple[Frames, np.ndarray]
    judged: tuple[Frames, np.ndarray]
    isolated: dict[int, float]
    replay: list[tuple[Frames, dict[float, np.ndarray]]] = field(default_factory=list)
    old: list[tuple[Frames, np.ndarray]] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    @property
    def all(self) -> np.ndarray:
        """Rows of the new data to train on."""
        return self.train[1.0]

    def count(self, share: float) -> int:
        """Count the frames to train on, replay included."""
        return len(self.train[share]) + sum(len(rows[share]) for _, rows in self.replay)


def divide_data(settings: FineTuneSettings, largest_element: int, checkpoint_kind: str | None) -> Parts:
    """Read all data and divide them.

    Args:
        settings: names of the files.
        largest_element: that the network knows.
        checkpoint_kind: kind of energy of the checkpoint, for original data that do not declare one.

    Raises:
        InputError, datasets_oc20.DataError: something is wrong with the data; file and frame are named.
    """
    frames = read_frames(
        open_frames(settings.data, settings.energy_kind), largest_element, settings.energy_kind
    )
    told = [f"data: {frames.describe()}"]
    isolated: dict[int, float] = {}
    lone = np.flatnonzero(frames.isolated)
    if len(lone) and frames.energy_kind == "total":
        isolated = read_isolated_atoms(frames.dataset.select(lone, "isolated atoms"))
        told.append(
            f"isolated atoms among the frames: {_symbols(isolated)}, taken as references and not trained on"
        )
    elif len(lone):
        told.append(f"isolated atoms: {len(lone)} of the frames, left out of these adsorption energies")
    if settings.isolated_atoms is not None:
        isolated |= read_isolated_atoms(open_frames([settings.isolated_atoms], "total"))
        told.append(f"isolated atoms of {settings.isolated_atoms}: {_symbols(isolated)}")
    usable = np.flatnonzero(~frames.isolated)
    if not len(usable):
        raise InputError(f"{frames.dataset.path} holds isolated atoms alone: give structures to learn")
    parts = _divide_new(settings, frames, usable, isolated, largest_element, told)
    _add_original(settings, parts, largest_element, checkpoint_kind)
    _check_labels_vary(parts)
    return parts


def _symbols(isolated: dict[int, float]) -> str:
    return ", ".join(
        f"{chemical_symbols[number]} {energy:.4f} eV" for number, energy in sorted(isolated.items())
    )


def _divide_new(
    settings: FineTuneSettings,
    frames: Frames,
    usable: np.ndarray,
    isolated: dict[int, float],
    largest_element: int,
    told: list[str],
) -> Parts:
    """Divide the new data, or take the frames to judge by from `--val`."""
    systems = [frames.systems[row] for row in usable]
    numbers = frames.frame_numbers[usable]
    chosen_on = (
        "the best weights are chosen on the frames that the table is made of, so it is a little too good"
    )
    if settings.val:
        given = read_frames(
            open_frames(settings.val, frames.energy_kind), largest_element, frames.energy_kind
        )
        if given.has_forces != frames.has_forces:
            raise InputError(
                f"{given.dataset.path}: only one of --data and --val has forces; give both the same"
            )
        shared = sorted(set(given.systems) & set(systems))
        if shared:
            told.append(
                f"warning: {len(shared)} of the systems of --val are in --data, too (such as {shared[0]}), "
                "so "
                "that the errors say nothing about new systems"
            )
        every = np.flatnonzero(~given.isolated)
        if not len(every):
            raise InputError(f"{given.dataset.path} holds isolated atoms alone: give structures to judge by")
        lone = f", without {len(given) - len(every)} isolated atoms" if len(every) < len(given) else ""
        told.append(f"judged by {len(every)} frames of --val{lone}; {chosen_on}")
        watched, judged, train = (given, every), (given, every), usable
    else:
        many = len(set(systems)) >= _MANY_SYSTEMS
        division = divide(
            systems, numbers.tolist(), _SHARE_OF_MANY if many else _SHARE, settings.seed, frames.dataset.path
        )
        told.append(f"division: {division.sentence}")
        train, held = usable[division.train], usable[division.held_out]
        watched, judged = (frames, held), (frames, held)
        if many:
            left = [frames.systems[row] for row in train]
            again = divide(left, frames.frame_numbers[train].tolist(), _SHARE_OF_MANY, settings.seed + 1, "")
            watched = frames, train[again.held_out]
            train = train[again.train]
            told.append(f"{len(again.held_out)} of the frames for training choose the best weights instead")
        else:
            told.append(chosen_on)
    watched, judged = (watched[0], spread(watched[1], _WATCHED)), (judged[0], spread(judged[1], _JUDGED))
    unknown = sorted(set(judged[0].elements(judged[1])) - set(frames.elements(train)))
    if unknown:
        told.append(
            f"warning: frames to judge by hold {', '.join(chemical_symbols[n] for n in unknown)}, which no "
            "frame for training does"
        )
    curve = {1.0: train}
    if settings.curve:
        curve = {
            share: train[rows]
            for share, rows in nested_parts([frames.systems[row] for row in train], settings.seed).items()
        }
    return Parts(frames, curve, watched, judged, isolated, sentences=told)


def _add_original(
    settings: FineTuneSettings, parts: Parts, largest_element: int, checkpoint_kind: str | None
) -> None:
    """Read the original data, to replay and to judge by."""
    weights = settings.replay_weights * (len(settings.replay) if len(settings.replay_weights) == 1 else 1)

    def read(path: str) -> Frames:
        dataset = open_frames([path])
        return read_frames(dataset, largest_element, dataset.energy_kind or checkpoint_kind)

    for path, weight in zip(settings.replay, weights, strict=False):
        frames = read(path)
        pool = np.arange(len(frames))
        if len(frames) > 1:
            division = divide(
                frames.systems, frames.frame_numbers.tolist(), _OLD_SHARE, settings.seed, frames.dataset.path
            )
            pool = division.train
            parts.old.append((frames, spread(division.held_out, _OLD_JUDGED)))
        counts = {share: max(1, round(weight * len(rows))) for share, rows in parts.train.items()}
        by_share = {share: spread(pool, count) for share, count in counts.items()}
        parts.replay.append((frames, by_share))
        wanted, rows = counts[1.0], by_share[1.0]
        parts.sentences.append(
            f"replay: {len(rows)} of {len(frames)} frames of {path} ({weight:g} per new frame asked for"
            f"{', all there are beside those to judge by' if len(rows) < wanted else ''})"
        )
    replayed = {
        frames.systems[row] for frames, shares in parts.replay for rows in shares.values() for row in rows
    }
    for path in settings.old:
        frames = read(path)
        shared = sorted(set(frames.systems) & replayed)
        if shared:
            parts.sentences.append(
                f"warning: {len(shared)} of the systems of {path} in --old are replayed, too (such as "
                f"{shared[0]}), so that the errors on old data say little about forgetting"
            )
        parts.old.append((frames, spread(np.arange(len(frames)), _OLD_JUDGED)))
    kinds = {frames.energy_kind for frames, _ in parts.old}
    if len(kinds) > 1:
        raise InputError(
            "--replay and --old mix adsorption and total energies: give original data of one kind"
        )


def _check_labels_vary(parts: Parts) -> None:
    """Say where nothing can be learned because all labels are the same."""
    energies = parts.frames.energy[parts.all]
    if len(energies) > 1 and float(np.ptp(energies)) == 0.0:
        parts.sentences.append(
            "warning: all energies for training are the same, so nothing of them is learned"
        )


def write_parts(parts: Parts, folder: OutFolder, keeps_zero: bool) -> dict[str, list[str]]:
    """Write the parts as files for the trainer.

    Args:
        parts: the division.
        folder: of the results.
        keeps_zero: whether energies of the original data can be learned beside the new ones.

    Returns:
        Names of the files in the folder's `data` by part: `train-SHARE`, `replay-SHARE`,
        `forces_only-SHARE`, `watched`, `judged` and `old`.
    """
    forces = parts.frames.has_forces
    files: dict[str, list[str]] = {"old": []}

    def write(frames: Frames, rows: np.ndarray, name: str, with_forces: bool) -> list[str]:
        return [write_part(frames, rows, folder.data / f"{name}.lmdb", with_forces).name]

    for share, rows in parts.train.items():
        files[f"train-{share:g}"] = write(parts.frames, rows, f"train-{share:g}", forces)
        files |= {f"replay-{share:g}": [], f"forces_only-{share:g}": []}
    files["watched"] = write(*parts.watched, "watched", forces)
    files["judged"] = write(*parts.judged, "judged", forces)
    for number, (frames, rows) in enumerate(parts.old):
        files["old"] += write(frames, rows, f"old-{number}", frames.has_forces)
    for number, (frames, by_share) in enumerate(parts.replay):
        labels, new_labels = frames.dataset.labels, parts.frames.dataset.labels
        same_method = labels == new_labels or not labels or not new_labels
        energies = keeps_zero and same_method and frames.energy_kind == parts.frames.energy_kind
        if not frames.has_forces and (forces or not energies):
            raise InputError(
                f"{frames.dataset.path} has no forces to replay"
                + ("" if energies else ", and its energies have another zero than the new ones")
                + ": give original data with forces"
            )
        if not energies and not forces:
            raise InputError(
                f"{frames.dataset.path}: its energies have another zero than the new ones, so only its "
                "forces "
                "could be replayed, and the new data have none: leave out --replay"
            )
        for share, rows in by_share.items():
            part = f"{'replay' if energies else 'forces_only'}-{share:g}"
            files[part] += write(frames, rows, f"replay-{number}-{share:g}", forces)
    return files
