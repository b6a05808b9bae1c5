"""Pages of the documentation, taken apart: code blocks with their markers, quoted figures with their sources.

A page is Markdown, and what the tests need to know stands in HTML comments, which are not shown:

    <!-- not run: REASON -->    the next block is not executed
    <!-- slow: REASON -->       the next block is executed with `-m slow` only
    <!-- hidden python          code of the page's own set-up, executed where it stands
    …
    -->
    <!-- figures FILE           numbers of the paragraph, list or table above, and where FILE holds them
    TEXT = EXPRESSION
    -->
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "bash", "yaml", "text")
_COMMENT = re.compile(r"<!--[ \t]*(.*?)[ \t]*\n?-->", flags=re.DOTALL)
_KINDS = ("not run", "slow", "hidden", "figures", "given", "table")


def pages() -> list[Path]:
    """Every page that a reader may copy from; what scripts write (docs/results) has no code."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md", ROOT / "models/README.md"]
    found += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "tests/fixtures").rglob("README.md"))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        line: of its first line of code, from 1.
        language: the word behind the fence; "" without one, None for an indented block, which has no fence.
        not_run, slow: the reason of the marker; None without a marker.
        hidden: it stands in a comment.
    """

    page: str
    line: int
    language: str | None
    code: str
    not_run: str | None = None
    slow: str | None = None
    hidden: bool = False

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Comment:
    """`<!-- KIND[ ARGUMENT] … -->`: the first line's argument, and what stands below."""

    line: int
    kind: str
    argument: str
    body: str


@dataclass
class Part:
    """A paragraph, heading, list item's paragraph or table with the comments on its figures."""

    line: int
    text: str
    figures: list[Comment] = field(default_factory=list)


def tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def comments(token: Token) -> Iterator[Comment]:
    """Comments of this file's kinds in an HTML block; others are remarks."""
    for found in _COMMENT.finditer(token.content):
        first, _, body = found[1].partition("\n")
        kind = next((kind for kind in _KINDS if re.match(rf"{kind}\b", first)), None)
        if kind is not None and token.map is not None:
            line = token.map[0] + 1 + token.content.count("\n", 0, found.start())
            yield Comment(line, kind, first.removeprefix(kind).strip(" :"), body)


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, hidden ones included, in order."""
    found, markers = [], {}
    for token in tokens(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            for comment in comments(token):
                if comment.kind == "hidden":
                    found.append(
                        Block(name_of(page), comment.line + 1, comment.argument, comment.body, hidden=True)
                    )
                elif comment.kind in ("not run", "slow"):
                    markers[comment.kind.replace(" ", "_")] = comment.argument
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            fenced = token.type == "fence"
            language = token.info.strip() if fenced else None
            line = token.map[0] + (2 if fenced else 1)
            found.append(Block(name_of(page), line, language, token.content, **markers))
            markers = {}
        elif token.map is not None and markers:
            # A marker is for the block below it, not for one that comes after some text.
            raise ValueError(
                f"{name_of(page)}:{token.map[0] + 1}: a marker must stand right above a code block"
            )
    if markers:
        raise ValueError(f"{name_of(page)}: a marker at the end belongs to no code block")
    return found


def parts(page: Path) -> list[Part]:
    """Paragraphs, headings and tables of a page, each with the `figures` comments that follow it."""
    text = page.read_text(encoding="utf-8")
    lines = text.split("\n")
    found: list[Part] = []
    in_table = False
    for token in tokens(text):
        if token.type == "table_close":
            in_table = False
        if in_table or token.map is None:
            continue
        if token.type in ("paragraph_open", "heading_open", "table_open"):
            in_table = token.type == "table_open"
            first, end = token.map
            found.append(Part(first + 1, "\n".join(lines[first:end])))
        elif token.type == "html_block":
            for comment in comments(token):
                if comment.kind in ("figures", "given", "table"):
                    if not found:
                        raise ValueError(f"{name_of(page)}:{comment.line}: figures of nothing")
                    found[-1].figures.append(comment)
    return found
