"""Which figures a report has, and what is in each: from findings to pictures.

A filled round mark is a time, a hollow square an estimate, in every figure. Refuses to compute: `harness.finders` did.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from harness import pictures
from harness.charts_space import census, heat_map, roofline
from harness.findings import (
    BudgetRow,
    ChampionRow,
    Convergence,
    Findings,
    OutcomeRow,
    PeerRow,
    called,
)  # fmt: skip
from harness.pictures import COLOUR, Canvas, Picture, anchor, cut, draw, mark_style
from harness.report import FAILURES, three_digits, times
from harness.search_documents import SearchesDocument

# More rows in one figure than this are cut, and the table has them all.
MOST_ROWS = 24
MOST_FIGURES = 12
_ROW_IN = 0.36


def figures(found: Findings) -> dict[str, list[Picture]]:
    """The figures of every section."""
    return {
        "champions": _some(_by_device(found.champions, _speedups)),
        "peers": _some(_by_device([row for row in found.peers if row.speedup], _peers)),
        "search": [
            *_some(_convergence(each, place) for place, each in enumerate(found.convergence)),
            *_searches(found),
        ],
        "landscape": _some(heat_map(each, place) for place, each in enumerate(found.heat_maps)),
        "pruning": _some(census(each, place) for place, each in enumerate(found.evidence.spaces)),
        "roofline": _some(roofline(each) for each in found.rooflines),
        "failures": _some(_by_device(found.outcomes, _outcomes)),
        "budgets": _some(_by_device(found.budgets, _budgets)),
    }


def _some(several: Iterable[Picture]) -> list[Picture]:
    return [one for one, _ in zip(several, range(MOST_FIGURES), strict=False)]


def _by_device(rows: Sequence[Any], paint: Callable[[str, list[Any]], Picture]) -> Iterator[Picture]:
    """A figure a device, of its first rows."""

    def device_of(row: Any) -> str:
        return str(row.row.device if isinstance(row, BudgetRow) else row.device)

    for device, mine in groupby(sorted(rows, key=device_of), key=device_of):
        every = list(mine)
        picture = paint(device, every[:MOST_ROWS])
        cut_off = f" Drawn are {MOST_ROWS} of {len(every)}; the table has more." if len(every) > MOST_ROWS else ""
        yield replace(picture, caption=picture.caption + cut_off)


def _ratio_rows(
    rows: Sequence[tuple[str, str, float, tuple[float, float] | None, str]], what: str
) -> Callable[[Canvas], None]:
    """Rows of (label, kind, ratio, its interval, words) around 1, on a logarithmic axis."""

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        sides = [side for row in rows for side in (row[2], *(row[3] or ()))]
        low, high = min(0.9, *sides) / 1.06, max(1.1, *sides) * 1.06
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        pictures.rows_axis(axes, len(rows))
        pictures.log_axis(axes.xaxis, tick=lambda value: f"{value:.3g}×", low=low, high=high)
        axes.axvline(1, color=COLOUR["muted"], linewidth=1)
        for place, (label, kind, ratio, interval, words) in enumerate(rows):
            pictures.row_label(axes, place, cut(label, 56), right=times(ratio))
            if interval is not None:
                axes.plot(interval, [place, place], color=COLOUR["time"], linewidth=1.4, solid_capstyle="butt")
            axes.plot([1, ratio], [place, place], color=COLOUR["grid"], linewidth=3, zorder=1)
            axes.plot([ratio], [place], linestyle="none", **mark_style(kind), gid=canvas.tip(words))
        axes.set_xlabel(what)

    return paint


def _speedups(device: str, rows: list[ChampionRow]) -> Picture:
    shown = [row for row in rows if row.speedup]
    listed = [
        (f"{row.kernel}  {row.champion.problem}", row.kind, row.speedup or 1.0, row.speedup_interval, _speedup_words(row))
        for row in shown
    ]  # fmt: skip
    none = len(rows) - len(shown)
    caption = "Default's time over the champion's: right of 1 the champion is faster. A line through a mark is the 95 % interval."
    if any(row.kind == "estimated" for row in shown):
        caption += " Hollow squares are estimates, which have no interval."
    if none:
        caption += f" {none} without a number of the default are in the table only."
    return draw(
        f"speedup-{anchor(device)}", f"Speed-up over the default on {device}", caption,
        _ratio_rows(listed or [("none has a number of the default", "estimated", 1.0, None, "")], "speed-up over default"),
        height_in=0.75 + _ROW_IN * max(1, len(listed)),
    )  # fmt: skip


def _speedup_words(row: ChampionRow) -> str:
    interval = row.speedup_interval
    between = (
        f", 95 % interval {three_digits(interval[0])} to {three_digits(interval[1])}" if interval else ", no interval"
    )
    return (
        f"{row.kernel}, {row.champion.problem}: {times(row.speedup or 1.0)} the default's speed{between}; "
        f"{three_digits(row.value_ms)} ms, {called(row.kind)}"
    )


def _peers(device: str, rows: list[PeerRow]) -> Picture:
    listed = [
        (f"{row.peer}: {row.problem}", "measured", row.speedup or 1.0, row.interval,
         f"{row.problem} beside {row.peer}: {times(row.speedup or 1.0)}")
        for row in rows
    ]  # fmt: skip
    return draw(
        f"peers-{anchor(device)}", f"Speed-up over peers on {device}",
        "The peer's time over ours, measured in turns on the same tensors, with 95 % intervals: right of 1 ours is faster.",
        _ratio_rows(listed, "speed-up over the peer"), height_in=0.75 + _ROW_IN * len(listed),
    )  # fmt: skip


def _convergence(one: Convergence, place: int) -> Picture:
    word = called(one.kind)

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        known = [(trial, value) for trial, value in enumerate(one.values, 1) if value is not None]
        failed = [trial for trial, value in enumerate(one.values, 1) if value is None]
        numbers = [value for _, value in known]
        low, high = min(numbers), max(*numbers, one.default_ms or 0.0)
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.25)
        pictures.log_axis(axes.yaxis, tick=three_digits, low=low / 1.15, high=high * 1.25)
        pictures.whole_axis(axes.xaxis)
        axes.set_xlim(0.2, len(one.values) + 0.8)
        if one.default_ms is not None:
            axes.axhline(one.default_ms, color=COLOUR["default"], linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate("default", (1, one.default_ms), xycoords=("axes fraction", "data"), xytext=(0, 2),
                          textcoords="offset points", ha="right", va="bottom", color=COLOUR["default"], fontsize=8)  # fmt: skip
        many = len(known) > 300
        for trial, value in [] if many else known:
            axes.plot(
                [trial], [value], linestyle="none", alpha=0.75, **(mark_style(one.kind) | {"markersize": 3.5}),
                gid=canvas.tip(f"trial {trial}: {three_digits(value)} ms, {word}"),
            )  # fmt: skip
        if failed and not many:
            axes.plot(
                failed, [0.02] * len(failed), transform=axes.get_xaxis_transform(), linestyle="none", marker="x", markersize=3.5,
                color=COLOUR["fail"], gid=canvas.tip(f"{len(failed)} trials without a number, at the foot of the figure"),
            )  # fmt: skip
        best = [(trial, value) for trial, value in enumerate(one.best, 1) if value is not None]
        axes.step(
            [at for at, _ in best], [value for _, value in best], where="post", color=COLOUR["ink"], linewidth=1.6
        )
        axes.set_xlabel("trial")
        axes.set_ylabel(f"ms, {word}")

    failed = sum(value is None for value in one.values)
    caption = f"{one.kernel} on {one.device}. The line is the best so far"
    caption += ", every mark a trial" if len(one.values) <= 300 else ""
    caption += f"; {failed} of {len(one.values)} trials have no number (crosses at the foot)." if failed else "."
    return draw(f"search-{place}", one.problem, caption, paint)


_OUTCOMES = ("measured", "estimated", "replayed", *FAILURES)


def _outcomes(device: str, rows: list[OutcomeRow]) -> Picture:
    kinds = [kind for kind in _OUTCOMES if any(kind in row.outcomes for row in rows)]
    colours = {kind: COLOUR["time" if kind == "measured" else "estimate"] for kind in kinds if kind not in FAILURES}
    colours |= {kind: pictures.series(place) for place, kind in enumerate(FAILURES)} | {"pruned": COLOUR["default"]}

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        pictures.rows_axis(axes, len(rows))
        pictures.whole_axis(axes.xaxis)
        for place, row in enumerate(rows):
            trials = sum(row.outcomes.values())
            pictures.row_label(axes, place, cut(f"{row.kernel}  {row.problem}", 50), right=f"{trials:,} trials")
            left = 0
            for kind in kinds:
                count = row.outcomes.get(kind, 0)
                if count:
                    said = f"{row.kernel}, {row.problem}: {count} {FAILURES.get(kind, called(kind))}"
                    bar = axes.barh(
                        [place], [count], left=left, height=0.3, color=colours[kind], label=FAILURES.get(kind, called(kind)),
                        edgecolor=COLOUR["paper"], linewidth=0.8,
                    )  # fmt: skip
                    bar[0].set_gid(canvas.tip(said))
                    left += count
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        axes.legend(
            once.values(), once.keys(), frameon=False, ncols=3, fontsize=8, loc="upper left",
            bbox_to_anchor=(-0.02, -0.45 / len(rows)), handlelength=1, handleheight=0.9, columnspacing=1.2, borderaxespad=0.6,
        )  # fmt: skip

    return draw(
        f"outcomes-{anchor(device)}", f"What became of the trials on {device}",
        "Each bar is a search: trials with a number first, then those without, by what became of them.",
        paint, height_in=1.15 + _ROW_IN * len(rows),
    )  # fmt: skip


def _budgets(device: str, rows: list[BudgetRow]) -> Picture:
    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        pictures.rows_axis(axes, len(rows))
        axes.set_xlim(0, 1.16)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.axvline(1, color=COLOUR["fail"], linewidth=1.2)
        for place, row in enumerate(rows):
            words = f"{row.row.kernel}, {row.row.champion.problem}, {row.output}"
            pictures.row_label(
                axes, place, cut(f"{row.output}  {row.row.champion.problem}", 42), right=f"{row.worst:.2f}"
            )
            for share, colour, shift, said in (
                (row.gate, "s0", -0.08, f"gate: error {row.error or 0:.2e} of a bound of {row.bound or 0:.2e}"),
                (row.suite, "s1", 0.1, "suite: worst of all its cases"),
            ):
                if share is not None:
                    bar = axes.barh([place + shift], [share], height=0.15, color=COLOUR[colour])
                    bar[0].set_gid(canvas.tip(f"{words}: {share:.3f} of the bound; {said}"))
        axes.set_xlabel("error as a share of its bound (more than 1 is wrong)")

    return draw(
        f"budgets-{anchor(device)}", f"Error budgets on {device}",
        "The worst element of each output: its error over the bound derived for that element. Upper bar: the gate, on small "
        "problems of the same family; lower bar: the suite that proved the champion.",
        paint, height_in=0.75 + _ROW_IN * len(rows),
    )  # fmt: skip


def _searches(found: Findings) -> list[Picture]:
    return [_judged(path, each, place) for place, (path, each) in enumerate(found.evidence.searches)]


def _judged(path: str, one: SearchesDocument, place: int) -> Picture:
    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        axes.set_xscale("log")
        last = 1.0
        shown = sorted(one.overall, key=lambda each: -max(each.fraction_at.values(), default=0.0))[:8]
        for number, each in enumerate(shown):
            points = sorted((int(trials), share) for trials, share in each.fraction_at.items())
            last = max([last, *(trials for trials, _ in points)])
            axes.plot(
                [trials for trials, _ in points], [share for _, share in points], color=pictures.series(number), marker="o",
                markersize=3, linewidth=1.6 if number == 0 else 1.1, label=cut(each.strategy, 18),
                gid=canvas.tip(f"{each.strategy}: " + ", ".join(f"{share:.3f} after {trials}" for trials, share in points)),
            )  # fmt: skip
        pictures.log_axis(axes.xaxis, tick=lambda value: f"{value:.0f}", low=10, high=last)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", handlelength=1.4, columnspacing=1.2)
        axes.set_xlabel("trials")
        axes.set_ylabel("best time over time found")

    return draw(
        f"judged-{place}", "Search strategies on recorded spaces",
        f"From {path}: the share of the best recorded time that each strategy reaches, in the mean over {one.seeds} seeds "
        "and all spaces. The eight best are drawn. These times were recorded by others, on other kernels.",
        paint,
    )  # fmt: skip
