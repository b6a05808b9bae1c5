"""The numbers on the pages are those of the results files, and these say where they come from."""

import json
import re
from pathlib import Path

import pytest
from figures import agrees, content_of, faults, is_quoting, numbers
from pages import ROOT, name_of, pages, parts
from results import TABLES

RESULTS = sorted((ROOT / "docs/results").glob("*.json"))
#: What scripts write is compared as a whole, below.
QUOTING = [page for page in pages() if page.parent != ROOT / "docs/results"]


@pytest.mark.parametrize("page", QUOTING, ids=name_of)
def test_pages_quote_what_the_results_hold(page: Path) -> None:
    found = [fault for part in parts(page) if part.figures for fault in faults(name_of(page), part)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", QUOTING, ids=name_of)
def test_numbers_beside_a_link_to_results_have_a_source(page: Path) -> None:
    found = [
        f"{name_of(page)}:{part.line}: numbers from a results file, and no comment `figures` below them"
        for part in parts(page)
        if is_quoting(part) and not part.figures
    ]
    assert not found, "\n".join(found)


def program_file(command: str) -> Path:
    """File of a program today; results keep the command of the commit that made them."""
    word = command.split()[-1]
    if not word.startswith("scripts/"):
        return ROOT / f"{word.replace('.', '/')}.py"
    name = "pruning.py" if word.endswith("pruning_study.py") else Path(word).name
    return next(
        (path for path in (ROOT / "benchmarks" / name, ROOT / "studies" / name) if path.exists()), ROOT / word
    )


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_say_what_made_them(path: Path) -> None:
    content = content_of(path)
    for made in content.get("runs") if "units" in content else [content]:
        program = re.match(r"python (?:scripts/\w+\.py|-m (?:benchmarks|studies)\.\w+)", made["command"])
        assert program, path.name
        assert program_file(program.group()).is_file(), path.name
        assert re.fullmatch(r"[0-9a-f]{7,40}\+?", made["commit"]), path.name


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("1.84", 1.8399, True),
        ("7.62", 1.8399, False),
        ("2.8", 2.84, True),
        ("2.8", 2.86, False),
        ("1,480", 1480.8, True),
        ("1,480", 1490.0, False),
        ("300", 300, True),
        ("300", 340, False),
        ("2.4e-7", 2.37e-7, True),
        ("2.4e-7", 2.3e-7, False),
        ("29", 29.25, True),
        ("−0.76", -0.7554, True),
    ],
)
def test_rounding(text: str, value: float, right: bool) -> None:
    assert agrees(text, value) == right


def test_numbers_are_told_from_names() -> None:
    text = "31M on 10,000 atoms, 2.4e-7 eV/Å^3 by fairchem-core 1.10.0, 18 x 19, B4, -0.76 and 29 %"
    assert numbers(text) == ["10,000", "2.4e-7", "18", "19", "-0.76", "29"]


WRONG = [
    (
        "stale number",
        "7.62 % above.",
        "figures FILE\n7.62 % = 100 * data['mean']",
        "7.62 in '7.62 %' is 1.84",
    ),
    ("no such key", "1.84 % above.", "figures FILE\n1.84 % = data['gone']", "KeyError"),
    (
        "other words",
        "1.84 % above.",
        "figures FILE\n1.84 % below = 100 * data['mean']",
        "does not stand above",
    ),
    (
        "one without a source",
        "1.84 % and 3 files.",
        "figures FILE\n1.84 % = 100 * data['mean']",
        "no source for 3",
    ),
    ("count of values", "1.84 % above.", "figures FILE\n1.84 % = (1.84, 2)", "has 1 numbers"),
    ("table", "| a | b |\n|---|---|\n| 1 | 3 |", "table FILE: pair", "| 1 | 2 |"),
    ("table too short", "| a | b |\n|---|---|", "table FILE: pair", "| 1 | 2 |"),
]
RIGHT = [
    ("number", "1.84 % above.", "figures FILE\n1.84 % = 100 * data['mean']"),
    (
        "given",
        "31M on 3 files: 1.84 %.",
        "figures FILE\n1.84 % = 100 * data['mean']\n-->\n\n<!-- given 3: files",
    ),
    ("table", "| a | b |\n|---|---|\n| 1 | 2 |", "table FILE: pair"),
]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "results.json").write_text(json.dumps({"mean": 0.0184}))
    monkeypatch.setitem(TABLES, "pair", lambda data: ["| 1 | 2 |"])
    return tmp_path / "page.md"


@pytest.mark.parametrize(
    ("text", "comment", "told"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)
def test_wrong_figures_are_found(page: Path, text: str, comment: str, told: str) -> None:
    page.write_text(f"{text}\n\n<!-- {comment.replace('FILE', 'results.json')}\n-->\n")
    (part,) = parts(page)
    assert [
        fault
        for fault in faults("page.md", part, page.parent)
        if told in fault and fault.startswith("page.md:")
    ]


@pytest.mark.parametrize(("text", "comment"), [case[1:] for case in RIGHT], ids=[case[0] for case in RIGHT])
def test_right_figures_pass(page: Path, text: str, comment: str) -> None:
    page.write_text(f"{text}\n\n<!-- {comment.replace('FILE', 'results.json')}\n-->\n")
    (part,) = parts(page)
    assert not faults("page.md", part, page.parent)
