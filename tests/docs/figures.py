"""Numbers that pages quote, against the results files that hold them.

Below a paragraph, list or table stand comments like

    <!-- figures docs/results/reader.json
    245 MiB = one(data["datasets"], keys=5_000_000)["private_before"]
    4.6, 4.1 and 4.3 times = (speed("31M", "B1"), speed("31M", "B4"), speed("83M", "B1"))
    -->
    <!-- given 31M 73: what else is a number there and not measured -->
    <!-- table docs/results/batches.json: batches -->

Left of ` = ` stand words of the page, right a Python expression of the file's content, `data`, and of the
functions in results.py: a value for every number of these words, in order. A page's number must be the value
rounded to as many digits as it has. A table must be what the function of that name makes of the file.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pages import ROOT, Comment, Part
from results import TABLES, names

#: 4,720 · -0.76 · 2.4e-7; no part of a name, a version, a size such as 31M or 18 x 18's neighbours.
_ALONE = r"(?<![\w./,^-])(?<!SO\()[-−]?"
NUMBER = re.compile(
    rf"{_ALONE}\d{{1,3}}(?:,\d{{3}})+(?!\w)|{_ALONE}\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w^]|\.\d)"
)
_CODE = re.compile(r"`[^`]*`")
_LINK = re.compile(r"\]\([^)]*\)")


def plain(text: str) -> str:
    """The words of a part on one line: code and the targets of links removed."""
    return " ".join(_LINK.sub("]", _CODE.sub("`…`", text)).split())


def numbers(text: str) -> list[str]:
    return NUMBER.findall(text)


@cache
def content_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def agrees(number: str, value: float) -> bool:
    """`number` is `value`, rounded to its digits (of a whole number, zeros at the end may be rounding)."""
    text = number.replace(",", "").replace("−", "-")
    mantissa, _, exponent = text.partition("e")
    unit = 10.0 ** -len(mantissa.partition(".")[2])
    if "." not in mantissa and not exponent:
        digits = mantissa.lstrip("-")
        unit = 10.0 ** min(len(digits) - len(digits.rstrip("0")), max(0, len(digits) - 2))
    unit *= 10.0 ** int(exponent or 0)
    return abs(float(text) - value) <= 0.5 * unit * (1 + 1e-9)


@dataclass(frozen=True)
class Quote:
    """A line of a `figures` comment."""

    line: int
    words: str
    expression: str


def quotes(comment: Comment) -> list[Quote]:
    found = []
    for line, text in enumerate(comment.body.split("\n"), comment.line + 1):
        if text.strip():
            words, _, expression = text.rpartition(" = ")
            found.append(Quote(line, " ".join(words.split()), expression.strip()))
    return found


def faults(page: str, part: Part, root: Path = ROOT) -> list[str]:
    """`page:line: …` of every number of a part with `figures` comments that its file in `root` lacks."""
    found = []
    text = plain(part.text)
    left = text
    for comment in part.figures:
        place = f"{page}:{comment.line}"
        if comment.kind == "given":
            for given in comment.argument.split(":")[0].split():
                left = re.sub(rf"(?<![\w.,]){re.escape(given)}(?![\w]|[.,]\d)", "", left)
        elif comment.kind == "table":
            file, _, name = (word.strip() for word in comment.argument.partition(":"))
            expected = [" ".join(row.split()) for row in TABLES[name](content_of(root / file))]
            rows = [" ".join(row.split()) for row in part.text.split("\n")][2:]
            wrong = [(a, b) for a, b in zip(rows, expected, strict=False) if a != b]
            if len(rows) != len(expected) or wrong:
                shown = "\n".join(expected)
                found.append(f"{page}:{part.line}: the table is not that of {file}, which gives\n{shown}")
            left = ""
        else:
            known = names(content_of(root / comment.argument))
            for quote in quotes(comment):
                here = f"{page}:{quote.line}"
                if quote.words not in text:
                    found.append(f"{here}: {quote.words!r} does not stand above (line {part.line})")
                    continue
                left = left.replace(quote.words, "", 1)
                found += [f"{here}: {fault}" for fault in compare(quote, known)]
        if not (root / comment.argument.partition(":")[0].strip()).is_file() and comment.kind != "given":
            found.append(f"{place}: there is no {comment.argument}")
    rest = numbers(left)
    if rest:
        found.append(f"{page}:{part.line}: no source for {', '.join(rest)} in: {text[:80]}…")
    return found


def compare(quote: Quote, known: dict[str, Any]) -> list[str]:
    try:
        values = eval(quote.expression, dict(known))
    except Exception as error:
        return [f"{quote.expression}: {type(error).__name__}: {error}"]
    values = values if isinstance(values, tuple) else (values,)
    quoted = numbers(quote.words)
    if len(values) != len(quoted):
        return [f"{quote.words!r} has {len(quoted)} numbers, {quote.expression} has {len(values)}"]
    return [
        f"{number} in {quote.words!r} is {value:.6g} in the results"
        for number, value in zip(quoted, values, strict=True)
        if not agrees(number, float(value))
    ]


def is_quoting(part: Part) -> bool:
    """A part that links to a results file and has numbers."""
    return bool(re.search(r"\]\([^)]*results/[\w.]+(?:#[\w-]+)?\)", part.text)) and bool(
        numbers(plain(part.text))
    )


def page_parts(page: Path) -> list[Part]:
    from pages import parts

    return parts(page)
