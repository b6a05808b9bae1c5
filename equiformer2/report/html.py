"""Parts of an HTML page. Text is escaped here, so that names from files cannot become markup."""

import base64
import html
import re
from collections.abc import Iterable, Sequence

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .text { text-align: left; } img { max-width: 100%; }
.best { font-weight: bold; } .dim { color: #777; }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; }
.note { background: #f5f5f0; padding: .6rem 1rem; border-left: 4px solid #999; }
.buttons { margin: .5rem 0; } button.shown { font-weight: bold; }
.viewer { position: relative; width: 100%; height: 26rem; outline: 1px solid #ddd; }
"""
_NUMBER = re.compile(r"[-+−–]?\.?\d|[-–—]?$")
"""Begin of a cell that is a number, or empty."""


def page(title: str, parts: Iterable[str]) -> str:
    """Join HTML parts to a page.

    Args:
        title: of the page and its first heading, plain text.
        parts: HTML, such as the other functions here give.
    """
    heading = html.escape(title)
    return "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{heading}</title>",
            f"<style>{_STYLE}</style>",
            f"<h1>{heading}</h1>",
            *parts,
            "</html>",
        ]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], bold: int | None = None) -> str:
    """Format a table of plain text, numbers to the right; the row `bold` is set in bold type."""
    rows = [list(row) for row in rows]
    texts = [any(not _NUMBER.match(row[place]) for row in rows) for place in range(len(head))]

    def line(cells: Sequence[str], tag: str, kind: str = "") -> str:
        styles = (" class='text'" if text else "" for text in texts)
        inner = (
            f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell, style in zip(cells, styles, strict=True)
        )
        return f"<tr{kind}>{''.join(inner)}</tr>"

    lines = [line(head, "th")]
    for number, row in enumerate(rows):
        lines.append(line(row, "td", " class='best'" if number == bold else ""))
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def bullets(sentences: Iterable[str]) -> str:
    """Format a list of plain sentences; nothing for none."""
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def picture(caption: str, png: bytes) -> str:
    """Put a picture into the page, under its caption."""
    caption = html.escape(caption)
    data = base64.b64encode(png).decode()
    return f"<h3>{caption}</h3><img alt='{caption}' src='data:image/png;base64,{data}'>"
