"""Every code block of the documentation works, or says why it is not executed."""

import re
from pathlib import Path

import pytest
from pages import LANGUAGES, ROOT, Block, blocks, name_of, pages
from running import BlockError, check_without_running, run_page

PAGES = [page for page in pages() if blocks(page)]
#: Folders that a page sees as its own and must not write into.
KEPT = ("benchmarks", "configs", "data", "docs", "models", "scripts", "studies")


def wrong_blocks(page: Path) -> list[str]:
    """`page:line: fault` of every block that neither can be executed nor says why it is not."""
    found = []
    for block in blocks(page):
        if block.language is None:
            found.append(f"{block.place}: indented code has no language: fence it")
        elif block.language not in LANGUAGES:
            found.append(f"{block.place}: language {block.language!r}; known are {', '.join(LANGUAGES)}")
        for marker, reason in (("not run", block.not_run), ("slow", block.slow)):
            if reason is not None and len(reason.split()) < 2:
                found.append(f"{block.place}: the marker '{marker}' needs a reason")
        if block.language == "text" and re.search(
            r"^\s*(\$ )?(equiformer2|python|make|pip|torchrun|srun|import|from \w+ import)\b",
            block.code,
            re.MULTILINE,
        ):
            found.append(f"{block.place}: code that is called text")
    return found


def content(folders: tuple[str, ...]) -> set[str]:
    return {
        str(path)
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if "__pycache__" not in path.parts
    }


#: Pages whose blocks take longer than 8 s together; `make test-slow` runs them.
LONG = {"docs/adsorption.md", "docs/model.md"}


def run(page: Path, folder: Path, slow: bool) -> None:
    before = content(KEPT)
    run_page(blocks(page), folder, slow)
    assert content(KEPT) == before, f"{name_of(page)} writes into the checkout"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_blocks_have_a_language_and_markers_a_reason(page: Path) -> None:
    assert not wrong_blocks(page)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if name_of(page) in LONG else ()) for page in PAGES],
    ids=name_of,
)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    run(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(block.slow for block in blocks(p))], ids=name_of)
def test_long_blocks_run(page: Path, tmp_path: Path) -> None:
    run(page, tmp_path, slow=True)


def test_what_is_not_run_could_run() -> None:
    """Syntax and imports of Python, names and options of scripts; all help texts in one process."""
    helps: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.not_run is not None or block.slow is not None:
                check_without_running(block, helps)


CASES = [
    ("no language", "```\nx = 1\n```\n", "page.md:2: language ''"),
    ("unknown language", "```perl\nx = 1\n```\n", "page.md:2: language 'perl'"),
    ("indented", "Text\n\n    x = 1\n", "page.md:3: indented code"),
    (
        "no reason",
        "<!-- not run -->\n```python\nx = 1\n```\n",
        "page.md:3: the marker 'not run' needs a reason",
    ),
    ("slow without a reason", "<!-- slow: -->\n```python\nx\n```\n", "the marker 'slow' needs a reason"),
    ("disguised", "```text\npython scripts/train.py\n```\n", "page.md:2: code that is called text"),
    ("in a list", "- a\n\n  ```\n  x\n  ```\n", "page.md:4: language ''"),
]


@pytest.mark.parametrize(("text", "fault"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_wrong_blocks_are_found(tmp_path: Path, text: str, fault: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert [found for found in wrong_blocks(page) if fault in found]


FAILURES = [
    ("python", "```python\nx = 1\n\ny = z\n```\n", "page.md:4: NameError"),
    (
        "later block",
        "```python\nx = 1\n```\n\n```python\nassert x == 1\nassert x == 2\n```\n",
        "page.md:7: Assert",
    ),
    (
        "script",
        "```bash\npython scripts/relax.py --checkpoint none.pt --structure a\n```\n",
        "page.md:2: python",
    ),
    ("joined lines", "```bash\nmkdir a\nmkdir \\\n  a\n```\n", "page.md:3: mkdir a"),
    ("other program", "```bash\ncurl example.org\n```\n", "page.md:2: curl"),
    ("yaml key", "```yaml\noptim:\n  lrr: 1\n```\n", "page.md:2: .*lrr"),
]


@pytest.mark.parametrize(
    ("text", "told"), [case[1:] for case in FAILURES], ids=[case[0] for case in FAILURES]
)
def test_failures_name_page_and_line(tmp_path: Path, text: str, told: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(BlockError, match=told):
        run_page(blocks(page), tmp_path, slow=False)


@pytest.mark.parametrize(
    ("language", "code", "told"),
    [
        ("python", "from equiformer2 import Nothing", "page.md:7: equiformer2 has no"),
        ("bash", "python scripts/relax.py --no-such 1", "relax.py has no option --no-such"),
        ("bash", "equiformer2 prune plan --nothing", "equiformer2 prune plan has no option --nothing"),
        ("bash", "equiformer2 train --model.num_layer 1", "train has no option --model.num_layer"),
        ("bash", "torchrun scripts/train.py --model.num_layer 1", "train.py has no option --model.num_layer"),
        ("bash", "python scripts/prune.py plan --nothing", "prune.py plan has no option --nothing"),
        ("bash", "equiformer2 nothing", "equiformer2 has no command nothing"),
    ],
)
def test_blocks_that_are_not_run_are_looked_at(language: str, code: str, told: str) -> None:
    with pytest.raises(BlockError, match=told):
        check_without_running(Block("page.md", 7, language, code, not_run="a reason"), {})


def test_a_marker_belongs_to_the_next_block(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: needs a GPU -->\n\nText\n\n```python\nx\n```\n")
    with pytest.raises(ValueError, match="right above"):
        blocks(page)
