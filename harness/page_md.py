"""The tables of a report as Markdown for a pull request. Needs no library.

Text that could be markup stands in code spans, in which nothing is, and nobody is called by name. Refuses pictures.
"""

import re
from collections.abc import Iterator, Sequence

from harness.findings import Findings, Missing
from harness.tables import Cell, Table, tables

_TITLES = {
    "champions": "Champions", "peers": "Beside others", "search": "Search", "pruning": "Pruning", "roofline": "Roofline",
    "failures": "Failures", "budgets": "Error budgets", "provenance": "Provenance",
}  # fmt: skip
# Letters and signs that mean nothing to Markdown, wherever they stand; and what becomes a link all the same.
_HARMLESS = re.compile(r"[A-Za-z0-9 ,.:%×()'/-]*")
_LINK = re.compile(r"www|:/")
# A description of a pull request has 65,536 characters at most.
MOST_ROWS = 40


def markdown(found: Findings, *, made: str) -> str:
    """The report, a heading for each part; landscapes are pictures, and left to the page."""
    shown = tables(found)
    lines = ["## FlashTune report", "", _span(made), ""]
    if found.champions and not found.kinds["measured"]:
        lines += ["**Nothing of ours here was measured: every time is an estimate from the compiled binary.**", ""]
    for name, title in _TITLES.items():
        missing = [one for one in found.missing if one.section == name]
        several = shown.get(name, [])
        if missing or several:
            lines += [f"### {title}", "", *_missing(missing)]
        for table in several:
            lines += [*_table(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def _missing(several: Sequence[Missing]) -> Iterator[str]:
    for one in several:
        yield f"Not here: {one.what}. {_span(one.command)}"
        yield ""


def _table(one: Table) -> Iterator[str]:
    body = [
        f"| {' | '.join(one.columns)} |",
        "|" + "|".join(" ---: " if place in one.numbers else " --- " for place in range(len(one.columns))) + "|",
        *(f"| {' | '.join(map(_cell, row))} |" for row in one.rows[:MOST_ROWS]),
    ]
    more = len(one.rows) + one.more - MOST_ROWS
    ending = [f"\n{more} more rows are left out." for _ in range(more > 0)]
    if one.folded:
        yield from (f"<details><summary>{one.title}</summary>", "", *body, *ending, "", "</details>")
    else:
        yield from (f"**{one.title}**", "", *body, *ending)


def _cell(one: Cell) -> str:
    text = _span(one.text) if one.code else _words(one.text)
    return f"{text} ({_words(one.note)})" if one.note else text


def _words(text: str) -> str:
    """Text that is nothing but words and numbers as it is, all other as a code span."""
    return text.strip() if _HARMLESS.fullmatch(text) and not _LINK.search(text) else _span(text)


def _span(text: str) -> str:
    """Text as a code span. A pipe would end the cell even there, and a backtick the span."""
    kept = text.replace("`", "'").replace("|", "¦").strip()
    return f"`{kept}`" if kept else ""
