"""LMDB files of data/teacher_large: training, validation by bulk, nested fractions, and the test part.

    python -m studies.study_data                       # about a minute; writes runs/data/study/*.lmdb
    equiformer2 train --config configs/study.yaml

| file | content |
|---|---|
| `train.lmdb` | `teacher_large/train` less the validation bulks |
| `train_1_2.lmdb`, `train_1_4.lmdb`, `train_1_8.lmdb` | shares of it; each holds the next smaller one |
| `older.lmdb` | the systems of `data/teacher` that may be added to the training data |
| `val.lmdb` | the bulks kept back for validation |
| `test.lmdb` | `teacher_large/test` |

Frames of one slab are relatives, so every division is by the reduced formula of the bulk: two files share no
formula unless one is a share of the other. A system is kept out of all training files if its bulk is one of
`test`, holds Se or Te, or its adsorbate holds two nitrogen atoms (the parts `shift_elements` and
`shift_adsorbates` are for judging what was never seen). `systems.json` lists the systems of every file.
"""

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from ase.formula import Formula

from datasets_oc20 import DataError
from datasets_oc20.preprocess import PreprocessOptions, preprocess
from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.files import write_json
from equiformer2.script import run_script

DATA = Path("data")
LABELS = "SevenNet-0, not DFT"
FRACTIONS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
#: Elements of a bulk, and number of nitrogen atoms of an adsorbate, that only the shift parts hold.
SHIFT_ELEMENTS = frozenset({"Se", "Te"})
SHIFT_NITROGEN = 2


@dataclass(frozen=True)
class System:
    """A line of an `index.jsonl`.

    Attributes:
        sid: id of the system.
        bulk: reduced formula of the bulk.
        adsorbate: name as OC20 writes it, such as `*CH2*O`.
        frames: number of frames.
        mpid: the bulk's Materials Project number (`mp-…`), or the prototype it was made from.
        driven: potential that drove the trajectory, `teacher` or `network`.
    """

    sid: str
    bulk: str
    adsorbate: str
    frames: int
    mpid: str
    driven: str

    @property
    def elements(self) -> frozenset[str]:
        """Elements of the bulk."""
        return frozenset(Formula(self.bulk).count())

    @property
    def is_pure(self) -> bool:
        """True for a bulk of one element."""
        return len(self.elements) == 1

    @property
    def is_shifted(self) -> bool:
        """True for a system that only the shift parts may hold."""
        nitrogen = Formula(self.adsorbate.replace("*", "")).count().get("N", 0)
        return bool(SHIFT_ELEMENTS & self.elements) or nitrogen >= SHIFT_NITROGEN


def read_index(folder: AnyPath) -> list[System]:
    """Read the systems of a folder with an `index.jsonl`, in its order.

    Raises:
        DataError: the file is missing, or a line is not of this format.
    """
    path = Path(folder) / "index.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    systems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            reduced = str(Formula(entry["bulk"]).reduce()[0].format("hill"))
            driven = str(entry.get("driven", "teacher"))
            systems.append(
                System(entry["sid"], reduced, entry["ads"], int(entry["frames"]), entry["mpid"], driven)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: {error!r}; expected sid, bulk, ads, frames.") from error
    return systems


def divide(
    train: Sequence[System],
    older: Sequence[System],
    test: Sequence[System],
    validation_share: float,
    seed: int,
) -> dict[str, list[System]]:
    """Divide the systems into the files of the study, by bulk.

    Args:
        train, older, test: systems of `teacher_large/train`, `teacher` and `teacher_large/test`.
        validation_share: share of the frames of `train` that is kept for validation.
        seed: random seed of the order of the bulks.

    Returns:
        Name of the file -> its systems, in the order of the folders.

    Raises:
        InputError: a file would hold nothing.
    """
    tested = {system.bulk for system in test}
    allowed = [system for system in train if system.bulk not in tested and not system.is_shifted]
    bulks = sorted({system.bulk for system in allowed})
    if len(bulks) < 2:
        raise InputError(
            f"the training systems have {len(bulks)} bulk formula: a validation part by bulk needs at least 2"
        )
    order = [bulks[index] for index in np.random.default_rng(seed).permutation(len(bulks))]
    frames = {bulk: sum(system.frames for system in allowed if system.bulk == bulk) for bulk in bulks}
    total = sum(frames.values())

    def first(order: Sequence[str], share: float) -> set[str]:
        """Take the first bulks that together have this share of all frames of `order`."""
        taken: set[str] = set()
        limit = share * sum(frames[bulk] for bulk in order)
        for bulk in order:
            if sum(frames[one] for one in taken) + frames[bulk] / 2 > limit:
                break
            taken.add(bulk)
        return taken

    def of(chosen: Collection[str], systems: Sequence[System]) -> list[System]:
        return [system for system in systems if system.bulk in chosen]

    validation = first(order, validation_share)
    rest = [bulk for bulk in order if bulk not in validation]
    parts = {"train": of(rest, allowed)}
    for share in FRACTIONS:
        parts[f"train_{share.numerator}_{share.denominator}"] = of(first(rest, float(share)), allowed)
    parts["older"] = [
        system
        for system in older
        if system.bulk not in tested and system.bulk not in validation and not system.is_shifted
    ]
    parts["val"] = of(validation, allowed)
    parts["test"] = list(test)
    for name, systems in parts.items():
        if not systems:
            raise InputError(
                f"{name} would hold no system: {len(bulks)} bulks with {total} frames are too few for a "
                f"validation share of {validation_share}"
            )
    return parts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with teacher_large and teacher")
    parser.add_argument("--out", type=Path, default=Path("runs/data/study"), help="folder for the LMDB files")
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.08,
        help="share of the training frames, by bulk, for validation (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the order of the bulks")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.validation_share < 1:
        raise InputError(f"--validation-share is {arguments.validation_share}; it must be between 0 and 1")
    large = arguments.data / "teacher_large"
    folders = {"older": arguments.data / "teacher", "test": large / "test"}
    train, older, test = (read_index(folder) for folder in (large / "train", *folders.values()))
    parts = divide(train, older, test, arguments.validation_share, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    listing: dict[str, Any] = {}
    for name, systems in parts.items():
        out = arguments.out / f"{name}.lmdb"
        folder = folders.get(name, large / "train")
        options = PreprocessOptions(labels=LABELS)
        report = preprocess(folder, out, options, systems=[system.sid for system in systems])
        listing[name] = {
            "bulks": sorted({system.bulk for system in systems}),
            "systems": [system.sid for system in systems],
            "frames": report.written,
        }
        print(f"{out}: {report.written} frames, {len(systems)} systems, {len(listing[name]['bulks'])} bulks")
    write_json(arguments.out / "systems.json", listing)


if __name__ == "__main__":
    run_script(main)
