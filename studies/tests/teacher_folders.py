"""Small copies of the bundled teacher data, for tests of what reads and judges them."""

import json
import shutil
from pathlib import Path

LARGE = Path(__file__).parents[2] / "data/teacher_large"


def copy_systems(folder: Path, sids: list[str], part: str = "test") -> Path:
    """Copy systems of a part of data/teacher_large, with their references and lines of the index."""
    folder.mkdir(parents=True)
    source = LARGE / part
    lines = {
        json.loads(line)["sid"]: line
        for line in (source / "index.jsonl").read_text(encoding="utf-8").splitlines()
    }
    references = dict(
        line.split(",") for line in (source / "system.txt").read_text(encoding="utf-8").splitlines()
    )
    for sid in sids:
        shutil.copy(source / f"{sid}.extxyz.xz", folder)
    (folder / "index.jsonl").write_text("".join(f"{lines[sid]}\n" for sid in sids), encoding="utf-8")
    text = "".join(f"{sid},{references[sid]}\n" for sid in sids)
    (folder / "system.txt").write_text(text, encoding="utf-8")
    return folder
