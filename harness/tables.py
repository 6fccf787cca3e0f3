"""The tables of a report, as values that a page and a pull request show alike. Refuses markup: a cell is plain text.

A number stands beside the word for what it is; what is not there is `not measured`, with the reason where it is known.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.findings import BudgetRow, ChampionRow, Findings, Interval, Roofline, called
from harness.report import FAILURES, plural, three_digits, times
from harness.sealed import tame

NOT_MEASURED = "not measured"
# A reader of more has better tools than a page.
MOST_ROWS = 300


@dataclass(frozen=True, slots=True)
class Cell:
    """`text` as it is read; `order` what it is sorted by, if that is a number; `note` is said below it, `tone` how it is marked:
    time, estimate, bad, quiet or nothing; `code` that it is typed as it stands."""

    text: str
    order: float | None = None
    note: str = ""
    tone: str = ""
    code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """`numbers` are the columns that hold numbers; `folded` says that a page shows it when asked, `more` how many rows
    beyond those there are."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: frozenset[int] = frozenset()
    folded: bool = False
    more: int = 0


def tables(found: Findings) -> dict[str, list[Table]]:
    """The tables of every section; those without a row are left out."""
    sections = {
        "champions": [_champions(found)],
        "peers": [_peers(found)],
        "search": [_searches(found), _judged(found)],
        "landscape": list(_heat_maps(found)),
        "pruning": [_spaces(found), _pruned(found)],
        "roofline": [_roofline(found)],
        "failures": [_failures(found)],
        "budgets": [_budgets(found), _certificates(found)],
        "provenance": [_files(found), _journals(found), _runs(found), _unread(found)],
    }
    return {name: [table for table in several if table.rows] for name, several in sections.items()}


def _table(name: str, title: str, columns: str, rows: Iterable[Sequence[Cell]], *, folded: bool = False) -> Table:
    """Columns are divided by `|`; one that begins with `#` holds numbers."""
    named, every = [each.strip() for each in columns.split("|")], [tuple(row) for row in rows]
    return Table(
        name=name, title=title, columns=tuple(each.removeprefix("#") for each in named), rows=tuple(every[:MOST_ROWS]),
        more=max(0, len(every) - MOST_ROWS),
        numbers=frozenset(place for place, each in enumerate(named) if each.startswith("#")), folded=folded,
    )  # fmt: skip


def _plain(text: object, note: str = "") -> Cell:
    return Cell(tame(text, 400), note=tame(note, 400))


def _code(text: object, note: str = "") -> Cell:
    return Cell(tame(text, 600), note=tame(note, 400), code=True)


def _count(number: int) -> Cell:
    return Cell(f"{number:,}", order=number)


def milliseconds(value: float | None, kind: str) -> Cell:
    """A number with its unit and the word for what it is."""
    if value is None:
        return Cell(NOT_MEASURED, tone="quiet")
    return Cell(f"{three_digits(value)} ms", order=value, note=called(kind), tone=_tone(kind))


def _tone(kind: str) -> str:
    return "estimate" if kind == "estimated" else "time"


def _between(interval: Interval | None, kind: str = "measured") -> str:
    if interval is None:
        return "estimate, no interval" if kind == "estimated" else "no interval"
    return f"95 %: {three_digits(interval[0])} to {three_digits(interval[1])}"


def _ratio(value: float | None, interval: Interval | None, kind: str) -> Cell:
    if value is None:
        return Cell(NOT_MEASURED, tone="quiet")
    return Cell(times(value), order=value, note=_between(interval, kind), tone=_tone(kind))


# ---------------------------------------------------------------------------------------------------------------------
# What was found
# ---------------------------------------------------------------------------------------------------------------------


def _champions(found: Findings) -> Table:
    columns = (
        "Problem | Kernel | #Number | #Default | #Over default | #Over best peer | Changed from the default | Standing"
    )
    return _table("champions", "Champions", columns, (_champion(row, found) for row in found.champions))


def _champion(row: ChampionRow, found: Findings) -> tuple[Cell, ...]:
    number = row.champion.number
    value = milliseconds(row.value_ms, row.kind)
    notes = [value.note, f"{three_digits(row.tflops)} TFLOP/s" if row.tflops else ""]
    if number.interval_ms is not None:
        notes += [_between(number.interval_ms), plural(number.samples or 0, "sample")]
    value = replace(value, note=", ".join(filter(None, notes)))
    changed = " ".join(f"{name}={new}" for name, _, new in row.changed) or "the default"
    status = row.status if row.status != "unknown" else "not checked: its kernel is not here"
    return (
        _code(row.champion.problem), _plain(row.kernel, f"on {row.device}" + (", draft" if row.draft else "")), value,
        milliseconds(number.default_ms, row.kind), _ratio(row.speedup, row.speedup_interval, row.kind), _best_peer(row, found),
        _code(changed), Cell(status, note=tame("; ".join(row.notes), 400), tone="" if status == "current" else "bad"),
    )  # fmt: skip


def _best_peer(row: ChampionRow, found: Findings) -> Cell:
    """Beside the fastest of the peers that were measured in turns with this very config."""
    whose = (row.device, row.champion.problem)
    several = [
        one for one in found.peers if (one.device, one.problem) == whose and one.speedup and one.peer != "default"
    ]
    mine = [one for one in several if one.config == row.champion.config]
    if not mine:
        return Cell(NOT_MEASURED, note="only another config of ours" if several else "", tone="quiet")
    best = min(mine, key=lambda one: one.speedup or 0.0)
    return Cell(times(best.speedup or 0.0), best.speedup, tame(f"{best.peer}, {_between(best.interval)}"), "time")


def _peers(found: Findings) -> Table:
    rows = [
        (
            _code(one.problem), _plain(one.device), _plain(one.peer), _plain(one.config_of),
            milliseconds(one.ours_ms, "measured"), milliseconds(one.peer_ms, "measured"),
            _ratio(one.speedup, one.interval, "measured") if one.speedup
            else Cell(NOT_MEASURED, None, tame(one.not_measured, 300), "quiet"),
        )
        for one in found.peers
    ]  # fmt: skip
    return _table(
        "peers",
        "Beside others, in turns",
        "Problem | Device | Peer | Our config | #Ours | #Peer | #Peer over ours",
        rows,
    )


def _searches(found: Findings) -> Table:
    rows = []
    for one in found.convergence:
        best = min(value for value in one.values if value is not None)
        default = milliseconds(one.default_ms, one.kind) if one.default_ms else Cell("not known", tone="quiet")
        rows.append(
            (
                _code(one.problem), _plain(one.kernel, f"on {one.device}"), _count(len(one.values)),
                _count(sum(value is not None for value in one.values)), milliseconds(best, one.kind),
                _count(one.values.index(best) + 1), default,
            )
        )  # fmt: skip
    return _table(
        "searches", "Searches", "Problem | Kernel | #Trials | #With a number | #Best | #At trial | #Default", rows
    )


def _judged(found: Findings) -> Table:
    rows: list[tuple[Cell, ...]] = []
    steps = sorted({int(at) for _, one in found.evidence.searches for each in one.overall for at in each.fraction_at})
    for path, one in found.evidence.searches:
        for each in sorted(one.overall, key=lambda each: -max(each.fraction_at.values(), default=0.0)):
            shares = [each.fraction_at.get(str(at)) for at in steps]
            cells = [Cell(f"{share:.3f}", share) if share is not None else Cell("") for share in shares]
            rows.append((_plain(each.strategy), *cells, _count(each.spaces), _count(one.seeds), _plain(path)))
    columns = " | ".join(["Strategy", *(f"#After {at}" for at in steps), "#Spaces", "#Seeds", "File"])
    return _table("judged", "Share of the best recorded time, by trials", columns, rows, folded=True)


def _heat_maps(found: Findings) -> Iterator[Table]:
    for place, one in enumerate(found.heat_maps):
        rows = []
        for y in reversed(one.ys):
            cells = [one.cells.get((x, y)) for x in one.xs]
            shown = [
                Cell("not tried", tone="quiet") if each is None
                else Cell("no number", note=plural(each.tried, "config") + " tried", tone="bad") if each.best_ms is None
                else Cell(f"{three_digits(each.best_ms)} ms", each.best_ms, called(one.kind), _tone(one.kind))
                for each in cells
            ]  # fmt: skip
            rows.append((Cell(f"{one.y}={y}"), *shown))
        columns = " | ".join([f"{one.y} \\ {one.x}", *(f"#{x}" for x in one.xs)])
        title = f"{one.kernel} on {one.device}, {one.problem}: {one.y} by {one.x}"
        yield _table(f"heat-{place}", title, columns, rows, folded=True)


def _spaces(found: Findings) -> Table:
    rows = []
    for one in found.evidence.spaces:
        left = one.size
        for rule, count in one.pruned.items():
            left -= count
            if count:
                rows.append(
                    (_code(one.problem), _plain(one.kernel, f"on {one.device}"), _plain(rule), _count(count), _count(left),
                     _plain(one.whys.get(rule, "")))
                )  # fmt: skip
    return _table(
        "rules",
        "What each rule of a space removes",
        "Problem | Kernel | Rule | #Removes | #Left | Why",
        rows,
        folded=True,
    )


def _pruned(found: Findings) -> Table:
    rows = [
        (
            _code(one.problem),
            _plain(one.kernel, f"on {one.device}"),
            _plain(rule),
            _count(count),
            _count(sum(one.outcomes.values())),
        )
        for one in found.outcomes
        for rule, count in one.rules.items()
    ]
    return _table(
        "pruned", "Trials pruned after compiling, by rule", "Problem | Kernel | Rule | #Pruned | #Of trials", rows
    )


def _roofline(found: Findings) -> Table:
    rows = []
    for one in found.rooflines:
        for mark in sorted(one.marks, key=lambda mark: -mark.tflops):
            roof, kind = _roof_over(one, mark.dtype, mark.intensity)
            share = (
                Cell(
                    f"{100 * mark.tflops / roof:.0f} %", mark.tflops / roof, f"of {three_digits(roof)} TFLOP/s, {kind}"
                )
                if roof
                else Cell("not known")
            )
            rows.append(
                (_code(mark.problem), _plain(mark.kernel, f"on {one.device}"), _plain(f"{mark.role} {mark.letter}"),
                 Cell(three_digits(mark.intensity), mark.intensity),
                 Cell(three_digits(mark.tflops), mark.tflops, called(mark.kind), _tone(mark.kind)), share)
            )  # fmt: skip
    columns = "Problem | Kernel | Config | #Operations a byte | #TFLOP/s | #Share of its roof"
    return _table("roofline", "Under the roof", columns, rows)


def _roof_over(one: Roofline, dtype: str, intensity: float) -> tuple[float | None, str]:
    """The lower of memory and matrix units over a mark, measured ones before published ones."""
    compute = [roof for roof in one.compute if roof.name == dtype]
    roofs = [
        max(several, key=lambda roof: roof.kind == "measured")
        for several in (one.memory, compute)
        if several
    ]  # fmt: skip
    if not roofs:
        return None, ""
    rates = [(roof.rate * intensity if roof in one.memory else roof.rate, roof.kind) for roof in roofs]
    return min(rates)


def _failures(found: Findings) -> Table:
    rows = [
        (
            _plain(FAILURES.get(one.outcome, one.outcome)), _plain(one.reason or "no reason is known"), _count(one.count),
            _plain(one.kernel, f"on {one.device}"), _plain(_without(one.detail, one.reason)),
            _code(one.problem, note=_words(one.config)),
        )
        for one in found.failures
    ]  # fmt: skip
    return _table(
        "failures", "Trials without a number, by reason", "Outcome | Reason | #Trials | Kernel | For example | Of", rows
    )


def _without(detail: str, reason: str) -> str:
    return "" if detail == reason else detail.removeprefix(f"{reason}: ")


def _words(config: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def _budgets(found: Findings) -> Table:
    return _table(
        "budgets", "Worst error over its bound, by output", "Problem | Kernel | Output | #Gate | #Suite | #Error | #Bound",
        (_budget(one) for one in sorted(found.budgets, key=lambda one: -one.worst)),
    )  # fmt: skip


def _budget(one: BudgetRow) -> tuple[Cell, ...]:
    def digits(value: float | None, form: str) -> Cell:
        return Cell(format(value, form), value) if value is not None else Cell("not asked", tone="quiet")

    return (
        _code(one.row.champion.problem), _plain(one.row.kernel, f"on {one.row.device}"), _plain(one.output),
        digits(one.gate, ".3f"), digits(one.suite, ".3f"), digits(one.error, ".3g"), digits(one.bound, ".3g"),
    )  # fmt: skip


def _certificates(found: Findings) -> Table:
    rows = []
    for row in found.champions:
        one = row.champion.certificate
        rate = f"{one.kill_rate.killed} of {one.kill_rate.planted}" if one.kill_rate else NOT_MEASURED
        equal = f"in {plural(one.determinism.cases, 'case')}" if one.determinism else "nobody asked"
        judged = f"{plural(sum(one.judges.values()), 'judgment')} by {plural(len(one.judges), 'judge')}"
        rows.append(
            (
                _code(row.champion.problem), _plain(row.kernel, f"on {row.device}"),
                _plain("on the device" if one.where == "device" else "in Triton's interpreter"),
                _plain(f"{one.cases} cases", judged), _plain(equal), _plain(rate),
                _plain(", ".join(one.blind_to) or "nothing known"), _plain(one.oracle, one.criterion),
            )
        )  # fmt: skip
    columns = "Problem | Kernel | Proved | Suite | Equal bits | Planted bugs seen | Not seen by the judge | Oracle"
    return _table("certificates", "Certificates", columns, rows)


def _files(found: Findings) -> Table:
    rows = []
    for shown in found.evidence.champions:
        file, then = shown.file, shown.file.environment
        made = ", ".join(
            filter(None, [then.toolchain, then.torch and f"torch {then.torch}", f"driver {then.driver or 'none'}"])
        )
        device = f"{file.device.product or file.device.name} ({file.device.arch})"
        kernels = ", ".join(sorted({one.kernel.source_digest for one in file.champions}))
        proved = ", ".join(sorted({one.certificate.kernel_digest for one in file.champions}))
        spaces = ", ".join(sorted({one.kernel.space_digest for one in file.champions}))
        suites = ", ".join(sorted({one.certificate.suite for one in file.champions}))
        seeds = ", ".join(map(str, sorted({seed for one in file.champions for seed in one.certificate.seeds})))
        rows.append(
            (
                _plain(shown.path, file.digest or "no digest"), _plain(device), _plain(made),
                _plain(file.kernel.name, f"family {file.kernel.family}"), _code(kernels, f"proved: {proved}"), _code(spaces),
                _code(suites), _plain(seeds),
            )
        )  # fmt: skip
    columns = "File | Device | Environment | Kernel | Kernel digest | Space digests | Suite digest | Seeds"
    return _table("files", "Champion files", columns, rows)


def _journals(found: Findings) -> Table:
    rows = []
    for one in found.evidence.journals:
        facts = one.identity
        versions = ", ".join(f"{name} {facts.get(name, 'None')}" for name in ("triton", "torch", "driver"))
        rows.append(
            (
                _plain(one.path, f"sha256 {one.digest}"), _plain(facts.get("device", "")),
                _plain(versions.replace("None", "none")),
                _plain(facts.get("kernel", ""), facts.get("mode", "")), _code(facts.get("kernel_digest", "")),
                _code(facts.get("judge_digest", "")), _plain(facts.get("gate_seed", "")), _count(one.records),
            )
        )  # fmt: skip
    columns = "File | Device | Environment | Kernel | Kernel digest | Judge digest | Seed | #Records"
    return _table("journals", "Journals", columns, rows)


def _runs(found: Findings) -> Table:
    rows = [
        (
            _plain(path),
            _plain(f"{book.device} ({book.arch})"),
            _plain(run.began),
            Cell(f"{run.seconds / 60:.1f}", run.seconds),
            _plain(run.ended),
        )
        for path, book in found.evidence.campaigns
        for run in book.runs
    ]
    return _table("campaigns", "Campaigns", "File | Device | Began | #Minutes | Ended", rows)


def _unread(found: Findings) -> Table:
    rows = [(_plain(path), _plain(reason)) for path, reason in found.evidence.unread.items()]
    return _table("unread", "Files that could not be read", "File | Why", rows)
