"""The report as one HTML page that needs no network: figures and tables of findings, laid out by `page.html`.

Everything that comes from a file is escaped by the template; only figures are markup, and `harness.pictures` escapes what is in
them. The page forbids itself all but its own style and its own script, by the script's digest. Needs the extra `report`.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from harness import __version__
from harness.charts import MOST_FIGURES, figures
from harness.findings import Findings, Missing
from harness.pictures import Picture
from harness.report import plural, times
from harness.tables import tables


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: its anchor, its heading, and what a reader should know first."""

    name: str
    title: str
    lead: str


SECTIONS = (
    Section(
        "champions",
        "Champions",
        "The best config of each problem that passed its gate and its proof, and how much faster it is than the default.",
    ),
    Section(
        "peers",
        "Beside others",
        "Other implementations of the same attention, timed in turns with ours on the same tensors.",
    ),
    Section(
        "search",
        "Search",
        "How soon each search found what it found: the best number so far, trial by trial.",
    ),
    Section(
        "landscape",
        "Landscape",
        "Block sizes against time: where a space is fast, where it is slow, and where nothing works.",
    ),
    Section(
        "pruning",
        "Pruning",
        "What is never tried, by rule: rules of the space before anything is compiled, then limits of the device after it.",
    ),
    Section(
        "roofline",
        "Roofline",
        "How near each kernel is to what the device could do at best: memory on the left, matrix units on the right.",
    ),
    Section(
        "failures",
        "Failures",
        "What became of the candidates that have no number. A failure costs a trial, and never a wrong champion.",
    ),
    Section(
        "budgets",
        "Error budgets",
        "A config has a number only if every element of every output lies within a bound derived from an fp64 reference. "
        "How much of that bound was used:",
    ),
    Section("provenance", "Provenance", "Where every number comes from: files, devices, versions, digests, seeds."),
)


@dataclass(frozen=True, slots=True)
class Tile:
    """A number at the top of the page, and what it is of."""

    value: str
    label: str
    note: str = ""


def page(found: Findings, *, made: str) -> str:
    """The page; `made` says when and with what, in words."""
    style, script = _part("page.css"), _part("page.js")
    drawn = figures(found)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_part("page.html")).render(
        sections=SECTIONS, figures={name: _marked(several) for name, several in drawn.items()}, tables=tables(found),
        missing=_by_section(found.missing), tiles=tiles(found), banner=banner(found), made=made, version=__version__,
        style=Markup(style), script=Markup(script), digest=digest(script), unread=len(found.evidence.unread),
        left_out=_left_out(found, drawn),
    )  # fmt: skip


def digest(script: str) -> str:
    """What a content security policy calls a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _part(name: str) -> str:
    return (resources.files("harness") / name).read_text(encoding="utf-8")


def _marked(several: Sequence[Picture]) -> list[tuple[Picture, Markup]]:
    return [(one, Markup(one.svg)) for one in several]


def _by_section(missing: Sequence[Missing]) -> Mapping[str, list[Missing]]:
    return {section.name: [one for one in missing if one.section == section.name] for section in SECTIONS}


def _left_out(found: Findings, drawn: Mapping[str, Sequence[Picture]]) -> Mapping[str, int]:
    """How many figures a section would have beyond those drawn."""
    wanted = {
        "search": len(found.convergence), "landscape": len(found.heat_maps), "pruning": len(found.evidence.spaces),
    }  # fmt: skip
    return {name: count - MOST_FIGURES for name, count in wanted.items() if count > MOST_FIGURES and drawn[name]}


def banner(found: Findings) -> str:
    """What a reader must know of the numbers before any of them."""
    kinds = found.kinds
    if not found.champions:
        return "No champion is here yet. What is missing, and the command that gets it, stands in each part."
    if not kinds["measured"]:
        return (
            "Nothing of ours on this page was measured: every time is an estimate from the compiled binary, "
            "and is called so wherever it stands."
        )
    if kinds["estimated"]:
        return (
            f"{kinds['measured']} of {plural(len(found.champions), 'champion')} were measured; the other numbers are estimates, "
            "and are called so wherever they stand."
        )
    return ""


def tiles(found: Findings) -> list[Tile]:
    """The page in a line."""
    kinds = found.kinds
    words = ", ".join(
        f"{kinds[kind]} {word}" for kind, word in (("measured", "measured"), ("estimated", "estimated")) if kinds[kind]
    )
    trials = sum(sum(one.outcomes.values()) for one in found.outcomes)
    failed = sum(one.count for one in found.failures)
    known = [row for row in found.champions if row.speedup]
    # A time before any estimate, however great.
    fastest = max(known, key=lambda row: (row.kind == "measured", row.speedup or 0.0), default=None)
    worst = max((one.worst for one in found.budgets), default=None)
    judged = sum(sum(row.champion.certificate.judges.values()) for row in found.champions)
    return [
        Tile(f"{len(found.champions):,}", "champions", words or "none yet"),
        Tile(times(fastest.speedup or 1.0) if fastest else "–", "most over a default",
             "not measured" if fastest is None else "by estimate" if fastest.kind == "estimated" else "measured"),
        Tile(f"{trials:,}", "trials", f"{failed:,} without a number"),
        Tile(f"{100 * worst:.0f} %" if worst is not None else "–", "of an error bound, at worst",
             "one element beyond 100 % is wrong" if worst is not None else "not judged"),
        Tile(f"{judged:,}", "judgments in proofs",
             plural(sum(row.champion.certificate.cases for row in found.champions), "case")),
    ]  # fmt: skip
