"""Which figures a report has, and what is in each: from findings to pictures.

A filled round mark is a time, a hollow square an estimate, in every figure. Refuses to compute: `harness.finders` did.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from harness import pictures
from harness.evidence import SpaceFacts
from harness.findings import (
    BudgetRow,
    ChampionRow,
    Convergence,
    Findings,
    HeatMap,
    OutcomeRow,
    PeerRow,
    Roofline,
    called,
)  # fmt: skip
from harness.pictures import COLOUR, Canvas, Picture, cut, draw
from harness.report import FAILURES, three_digits, times
from harness.search_documents import SearchesDocument

# More rows in one figure than this are cut, and the table has them all.
MOST_ROWS = 24
MOST_FIGURES = 12
_ROW_IN = 0.36


def _mark(kind: str, role: str = "") -> dict[str, Any]:
    """How a number of a kind is drawn."""
    colour = COLOUR["default"] if role == "default" else COLOUR["time" if kind != "estimated" else "estimate"]
    if kind != "estimated":
        return {"marker": "o", "color": colour, "markersize": 5.5}
    return {
        "marker": "s",
        "markerfacecolor": "none",
        "markeredgecolor": colour,
        "markeredgewidth": 1.4,
        "markersize": 5.5,
    }


def figures(found: Findings) -> dict[str, list[Picture]]:
    """The figures of every section."""
    return {
        "champions": _some(_by_device(found.champions, _speedups)),
        "peers": _some(_by_device([row for row in found.peers if row.speedup], _peers)),
        "search": [
            *_some(_convergence(each, place) for place, each in enumerate(found.convergence)),
            *_searches(found),
        ],
        "landscape": _some(_heat_map(each, place) for place, each in enumerate(found.heat_maps)),
        "pruning": _some(_census(each, place) for place, each in enumerate(found.evidence.spaces)),
        "roofline": _some(_roofline(each) for each in found.rooflines),
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
        yield paint(device, list(mine)[:MOST_ROWS])


def _anchor(text: str) -> str:
    return "".join(each if each.isascii() and each.isalnum() else "-" for each in text)


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
            pictures.row_label(axes, place, cut(label), right=times(ratio))
            if interval is not None:
                axes.plot(interval, [place, place], color=COLOUR["time"], linewidth=1.4, solid_capstyle="butt")
            axes.plot([1, ratio], [place, place], color=COLOUR["grid"], linewidth=3, zorder=1)
            axes.plot([ratio], [place], linestyle="none", **_mark(kind), gid=canvas.tip(words))
        axes.set_xlabel(what)

    return paint


def _speedups(device: str, rows: list[ChampionRow]) -> Picture:
    shown = [row for row in rows if row.speedup]
    listed = [
        (f"{row.kernel}  {row.champion.problem}", row.kind, row.speedup or 1.0, row.speedup_interval, _speedup_words(row)) for row in shown
    ]  # fmt: skip
    none = len(rows) - len(shown)
    caption = "Default's time over the champion's: right of 1 the champion is faster. A line through a mark is the 95 % interval."
    if any(row.kind == "estimated" for row in shown):
        caption += " Hollow squares are estimates, which have no interval."
    if none:
        caption += f" {none} without a number of the default are in the table only."
    return draw(
        f"speedup-{_anchor(device)}", f"Speed-up over the default on {device}", caption,
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
        (f"{row.peer}: {row.problem}", "measured", row.speedup or 1.0, row.interval, f"{row.problem} beside {row.peer}: {times(row.speedup or 1.0)}")
        for row in rows
    ]  # fmt: skip
    return draw(
        f"peers-{_anchor(device)}", f"Speed-up over peers on {device}",
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
                [trial], [value], linestyle="none", alpha=0.75, **(_mark(one.kind) | {"markersize": 3.5}),
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


def _heat_map(one: HeatMap, place: int) -> Picture:
    word = called(one.kind)
    best = one.best_ms
    worst = max(cell.best_ms for cell in one.cells.values() if cell.best_ms is not None)

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        from matplotlib.patches import Rectangle

        axes.grid(visible=False)
        for column, x in enumerate(one.xs):
            for row, y in enumerate(one.ys):
                cell = one.cells.get((x, y))
                where = f"{one.y}={y}, {one.x}={x}"
                if cell is None:
                    face, ink, text, said = "none", COLOUR["muted"], "", f"{where}: not tried"
                elif cell.best_ms is None:
                    face, ink, text, said = (
                        "none",
                        COLOUR["fail"],
                        "×",
                        f"{where}: {cell.tried} tried, none has a number",
                    )
                else:
                    share = math.log(cell.best_ms / best) / math.log(worst / best) if worst > best else 0.0
                    face, ink = pictures.heat(share)
                    text = three_digits(cell.best_ms)
                    said = (
                        f"{where}: {three_digits(cell.best_ms)} ms ({word}), {times(cell.best_ms / best)} the best's time; "
                        f"{cell.tried} tried, {cell.failed} without a number"
                    )
                chosen = cell is not None and cell.best_ms == best
                axes.add_patch(
                    Rectangle(
                        (column - 0.48, row - 0.48), 0.96, 0.96, facecolor=face, gid=canvas.tip(said),
                        edgecolor=COLOUR["ink"] if chosen else COLOUR["grid"], linewidth=2.2 if chosen else 0.7,
                    )
                )  # fmt: skip
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=8,
                    weight="bold" if chosen else "normal",
                )
        axes.set_xlim(-0.6, len(one.xs) - 0.4)
        axes.set_ylim(-0.6, len(one.ys) - 0.4)
        axes.set_xticks(range(len(one.xs)), [str(x) for x in one.xs])
        axes.set_yticks(range(len(one.ys)), [str(y) for y in one.ys])
        axes.set_xlabel(one.x)
        axes.set_ylabel(one.y)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)

    tried = sum(cell.tried for cell in one.cells.values())
    caption = (
        f"{one.kernel} on {one.device}: the least milliseconds ({word}) of all {tried} configs tried, by their block sizes. "
        "Framed: the best. ×: tried, none has a number. Empty: not tried."
    )
    return draw(f"heat-{place}", one.problem, caption, paint, height_in=0.9 + 0.42 * max(3, len(one.ys)))


def _census(one: SpaceFacts, place: int) -> Picture:
    """What is left of a space after each rule that removes anything."""
    steps = [("all combinations", one.size, 0, "")]
    left = one.size
    for rule, count in one.pruned.items():
        if count:
            left -= count
            steps.append((rule, left, count, one.whys.get(rule, "")))

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        axes.set_xscale("log")
        low, high = max(1, one.legal) / 3, one.size * 1.1
        axes.set_xlim(low, high)
        pictures.log_axis(axes.xaxis, tick=_short_count, low=low, high=high)
        pictures.rows_axis(axes, len(steps))
        for row, (rule, remain, count, why) in enumerate(steps):
            right = f"{remain:,} left" if row else f"{remain:,}"
            pictures.row_label(axes, row, cut(rule, 30), right=right)
            words = (
                f"{rule}: removes {count:,} of {remain + count:,}: {why}" if row else f"{remain:,} combinations in all"
            )
            axes.barh([row], [max(remain, low)], height=0.3, color=COLOUR["s0"], gid=None)[0].set_gid(canvas.tip(words))
        axes.set_xlabel("configs left (logarithmic)")

    return draw(
        f"census-{place}", one.problem,
        f"{one.kernel} on {one.device}: {one.size:,} combinations, {one.legal:,} legal. Each rule in the order in which it is asked; "
        "rules that remove nothing here are left out.",
        paint, height_in=0.7 + 0.33 * len(steps),
    )  # fmt: skip


def _short_count(value: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _roofline(one: Roofline) -> Picture:
    marks = sorted(one.marks, key=lambda mark: mark.role != "default")

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        ridge = max((c.rate / m.rate for c in one.compute for m in one.memory), default=100.0)
        low = min([*(mark.intensity for mark in marks), ridge]) / 4
        high = max([*(mark.intensity for mark in marks), ridge]) * 4
        rates = [mark.tflops for mark in marks] + [roof.rate for roof in one.compute]
        bottom, top = min(mark.tflops for mark in marks) / 2.5, max(rates) * 1.8
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(bottom, top)
        pictures.log_axis(axes.xaxis, tick=three_digits_short, low=low, high=high)
        pictures.log_axis(axes.yaxis, tick=three_digits_short, low=bottom, high=top)
        _roofs(canvas, one, (low, high))
        for mark in marks:
            words = (
                f"{mark.letter}: {mark.kernel}, {mark.problem}, {mark.role}: {three_digits(mark.tflops)} "
                f"TFLOP/s ({called(mark.kind)}) at {three_digits(mark.intensity)} operations a byte"
            )
            axes.plot(
                [mark.intensity], [mark.tflops], linestyle="none", **_mark(mark.kind, mark.role), gid=canvas.tip(words)
            )
            if mark.role == "champion":
                axes.annotate(
                    mark.letter, (mark.intensity, mark.tflops), xytext=(5, 4), textcoords="offset points",
                    fontsize=8, weight="bold",
                )  # fmt: skip
        axes.set_xlabel("operations for each byte that must move at least")
        axes.set_ylabel("TFLOP/s")

    word = ", ".join(
        dict.fromkeys("hollow: estimate" if mark.kind == "estimated" else "filled: time" for mark in one.marks)
    )
    roofs = ", ".join(dict.fromkeys(roof.kind for roof in (*one.memory, *one.compute))) or "not known"
    caption = (
        f"Champions ({word}), defaults in grey. Roofs: {roofs}; published ones are the maker's dense rates at boost clock, a bound "
        f"and no measurement. The table says which letter is which."
    )
    return draw(
        f"roofline-{_anchor(one.device)}", f"Roofline of {one.device}", caption, paint, height_in=3.6, wide=True
    )


def three_digits_short(value: float) -> str:
    """A tick."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _roofs(canvas: Canvas, one: Roofline, sides: tuple[float, float]) -> None:
    axes, (low, high) = canvas.axes, sides
    for memory in one.memory:
        peak = max((roof.rate for roof in one.compute), default=memory.rate * high)
        reach = min(high, peak / memory.rate)
        line = "-" if memory.kind == "measured" else (0, (5, 3))
        axes.plot(
            [low, reach], [low * memory.rate, reach * memory.rate], color=COLOUR["roof"], linewidth=1.3, linestyle=line,
            gid=canvas.tip(f"memory: {three_digits(memory.rate)} TB/s, {memory.kind}"),
        )  # fmt: skip
    heights: Counter[float] = Counter()
    for roof in one.compute:
        start = min((roof.rate / memory.rate for memory in one.memory), default=low)
        line = "-" if roof.kind == "measured" else (0, (5, 3))
        said = f"{roof.name}: {three_digits(roof.rate)} TFLOP/s, {roof.kind}"
        axes.plot(
            [start, high], [roof.rate] * 2, color=COLOUR["roof"], linewidth=1.3, linestyle=line, gid=canvas.tip(said)
        )
        heights[roof.rate] += 1
        if heights[roof.rate] == 1:
            same = "/".join(each.name for each in one.compute if (each.rate, each.kind) == (roof.rate, roof.kind))
            axes.annotate(
                f"{same} {three_digits(roof.rate)} TFLOP/s, {roof.kind}", (high, roof.rate), xytext=(-2, 3),
                textcoords="offset points", ha="right", va="bottom", color=COLOUR["roof"], fontsize=8,
            )  # fmt: skip
    for memory in one.memory[:1]:
        bottom, top = axes.get_ylim()
        at = max(low, bottom / memory.rate) * 1.15
        axes.annotate(
            f"memory {three_digits(memory.rate)} TB/s, {memory.kind}", (at, at * memory.rate), xytext=(6, -2),
            textcoords="offset points", ha="left", va="top", color=COLOUR["roof"], fontsize=8,
        )  # fmt: skip


_OUTCOMES = ("measured", "estimated", "replayed", *FAILURES)


def _outcomes(device: str, rows: list[OutcomeRow]) -> Picture:
    kinds = [kind for kind in _OUTCOMES if any(kind in row.outcomes for row in rows)]
    colours = {kind: COLOUR["time" if kind == "measured" else "estimate"] for kind in kinds if kind not in FAILURES}
    colours |= {kind: pictures.series(place) for place, kind in enumerate(kind for kind in FAILURES if kind in kinds)}

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
            once.values(), once.keys(), frameon=False, ncols=3, fontsize=8, loc="upper left", bbox_to_anchor=(-0.02, -0.16 - 0.05 / len(rows)),
            handlelength=1, handleheight=0.9, columnspacing=1.2, borderaxespad=0.6,
        )  # fmt: skip
        axes.set_xlabel("trials")

    return draw(
        f"outcomes-{_anchor(device)}", f"What became of the trials on {device}",
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
        axes.set_xlabel("error as a share of its bound (1 would be wrong)")

    return draw(
        f"budgets-{_anchor(device)}", f"Error budgets on {device}",
        "The worst element of each output: its error over the bound derived for that element. Upper bar: the gate, on small problems "
        "of the same family; lower bar: the suite that proved the champion.",
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
        f"From {path}: the share of the best recorded time that each strategy reaches, in the mean over {one.seeds} seeds and all "
        "spaces. The eight best are drawn. These times were recorded by others, on other kernels.",
        paint,
    )  # fmt: skip
