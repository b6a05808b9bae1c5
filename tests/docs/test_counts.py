"""Numbers on the pages that need no results file, because counting is quick."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ase.formula import Formula
from figures import agrees, numbers, plain
from pages import ROOT

from benchmarks.compare_neighbor_lists import count_ties
from equiformer2.checkpoint import load_checkpoint


def frames(folder: str) -> dict[str, list[int]]:
    """Numbers of atoms of the frames of every bundled system."""
    found = {}
    for path in sorted((ROOT / "data" / folder).glob("*.extxyz.xz")):
        lines = lzma.decompress(path.read_bytes()).decode().splitlines()
        at, sizes = 0, []
        while at < len(lines):
            sizes.append(int(lines[at]))
            at += sizes[-1] + 2
        found[path.name] = sizes
    return found


def relaxations() -> tuple[int, ...]:
    found = frames("oc20_trajs")
    sizes = [size for of in found.values() for size in of]
    return len(found), min(sizes), max(sizes)


def teacher() -> tuple[int, ...]:
    found = frames("teacher")
    sizes = [size for of in found.values() for size in of]
    return len(found), len(sizes), min(sizes), max(sizes)


def teacher_large() -> tuple[int, ...]:
    """Numbers of all parts together; atoms by their indexes, which is quick."""
    lines = [line for part in PARTS for line in index(part)]
    sizes = [line["natoms"] for line in lines]
    return len(lines), sum(line["frames"] for line in lines), min(sizes), max(sizes)


PARTS = ("train", "test", "shift_elements", "shift_adsorbates")


def index(part: str) -> list[dict[str, Any]]:
    path = ROOT / "data/teacher_large" / part / "index.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def part_counts(part: str) -> tuple[int, ...]:
    """Systems, frames, bulks, systems without copper, and elements of the bulks."""
    lines = index(part)
    bulks = [Formula(line["bulk"]) for line in lines]
    reduced = {str(bulk.reduce()[0].format("hill")) for bulk in bulks}
    elements = {element for bulk in bulks for element in bulk.count()}
    without_copper = sum("Cu" not in bulk.count() for bulk in bulks)
    frames_of_part = sum(line["frames"] for line in lines)
    return len(lines), frames_of_part, len(reduced), without_copper, len(elements)


def ties() -> tuple[int, ...]:
    count = count_ties(12.0, 20)
    assert count["structures"] == count["structures with a tie"]
    return count["structures"], count["atoms with a tie"], count["atoms"]


def network() -> tuple[float, ...]:
    checkpoint = load_checkpoint(ROOT / "models/oc20_small.pt")
    config = checkpoint.config
    million = sum(parameter.numel() for parameter in checkpoint.model.parameters()) / 1e6
    sizes = (config.num_layers, config.lmax, config.mmax, config.sphere_channels)
    return (million, *sizes, config.max_neighbors, config.max_radius)


def reference_file() -> tuple[int, ...]:
    layout = json.loads(
        gzip.decompress((ROOT / "tests/fixtures/checkpoint/eqv2_31M_layout.json.gz").read_bytes())
    )
    names = next(value for value in layout.values() if isinstance(value, dict | list) and len(value) > 1000)
    return (len(names),)


CLAIMS: list[tuple[str, str, Callable[[], tuple[Any, ...]]]] = [
    (
        "data/README.md",
        "23 relaxations of the Open Catalyst dataset (VASP, RPBE), 17 to 185 atoms",
        relaxations,
    ),
    ("data/README.md", "190 systems, 2,466 frames, 22 to 80 atoms", teacher),
    ("data/README.md", "1,470 systems, 12,295 frames, 8 to 69 atoms", teacher_large),
    (
        "docs/graph.md",
        "all 23 bundled DFT relaxations have such a tie at their last frame, at 530 of 1,848 atoms",
        ties,
    ),
    (
        "models/README.md",
        "(1.07 million parameters: 4 blocks, L = 3, M = 2, 32 channels, 12 neighbours within 8 Å)",
        network,
    ),
    ("docs/checkpoints.md", "4,455 keys", reference_file),
]


@pytest.mark.parametrize(
    ("page", "words", "counted"),
    [pytest.param(*claim, marks=pytest.mark.slow if claim[2] is ties else ()) for claim in CLAIMS],
    ids=[claim[2].__name__ for claim in CLAIMS],
)
def test_counts_on_pages(page: str, words: str, counted: Callable[[], tuple[Any, ...]]) -> None:
    text = plain(Path(ROOT / page).read_text(encoding="utf-8")).replace(
        "Catalyst 2020 dataset", "Catalyst dataset"
    )
    assert words in text, f"{page} does not say: {words}"
    found = counted()
    assert len(numbers(words)) == len(found)
    wrong = [
        (number, value)
        for number, value in zip(numbers(words), found, strict=True)
        if not agrees(number, value)
    ]
    assert not wrong, f"{page}: {words} (quoted, counted: {wrong})"


@pytest.mark.parametrize("part", PARTS)
def test_the_table_of_the_larger_teacher_set_counts_its_files(part: str) -> None:
    page = (ROOT / "data/README.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{part}` |")]
    told = tuple(int(cell.replace(",", "")) for cell in row.split("|")[2:7])
    assert told == part_counts(part)
    folder = ROOT / "data/teacher_large" / part
    assert {path.name for path in folder.glob("*.xz")} == {f"{one['sid']}.extxyz.xz" for one in index(part)}
