"""The tables of a report as Markdown for a pull request. Needs no library.

Text from files stands in code spans, in which nothing is markup, and nobody is called by name. Refuses pictures.
"""

from collections.abc import Iterator, Sequence

from harness.findings import Findings, Missing
from harness.tables import Cell, Table, tables

_TITLES = {
    "champions": "Champions", "peers": "Beside others", "search": "Search", "pruning": "Pruning", "roofline": "Roofline",
    "failures": "Failures", "budgets": "Error budgets", "provenance": "Provenance",
}  # fmt: skip
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
    more = len(one.rows) - MOST_ROWS
    ending = [f"\n{more} more rows are in the page." for _ in range(more > 0)]
    if one.folded:
        yield from (f"<details><summary>{one.title}</summary>", "", *body, *ending, "", "</details>")
    else:
        yield from (f"**{one.title}**", "", *body, *ending)


def _cell(one: Cell) -> str:
    plain = one.order is not None or one.tone in ("quiet", "time", "estimate")
    text = _plain(one.text) if plain else _span(one.text)
    note = _plain(one.note) if plain else _span(one.note)
    return f"{text} ({note})" if note else text


def _plain(text: str) -> str:
    """Text of ours, and of theirs where it is harmless whatever it says."""
    kept = "".join(each if each.isalnum() or each in " .,:;%×–-+/()'" else f"&#{ord(each)};" for each in text)
    return kept.strip()


def _span(text: str) -> str:
    """Text as a code span. A pipe would end the cell even there, and a backtick the span."""
    kept = text.replace("`", "'").replace("|", "¦").strip()
    return f"`{kept}`" if kept else ""
