"""Figures of spaces and devices: block sizes against time, what rules remove, rooflines. Refuses to compute."""

import math
from typing import Any

from matplotlib.patches import Rectangle

from harness import pictures
from harness.evidence import SpaceFacts
from harness.findings import HeatMap, Roof, Roofline, called
from harness.pictures import COLOUR, Canvas, Picture, anchor, cut, draw, mark_style
from harness.report import three_digits, times


def heat_map(one: HeatMap, place: int) -> Picture:
    word = called(one.kind)
    best = one.best_ms
    worst = max(cell.best_ms for cell in one.cells.values() if cell.best_ms is not None)

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
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


def census(one: SpaceFacts, place: int) -> Picture:
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
        f"{one.kernel} on {one.device}: {one.size:,} combinations, {one.legal:,} legal. Each rule in the order in which it is "
        "asked; rules that remove nothing here are left out.",
        paint, height_in=0.7 + 0.33 * len(steps),
    )  # fmt: skip


def _short_count(value: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def roofline(one: Roofline) -> Picture:
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
        pictures.log_axis(axes.xaxis, tick=_short_number, low=low, high=high)
        pictures.log_axis(axes.yaxis, tick=_short_number, low=bottom, high=top)
        _roofs(canvas, one, (low, high))
        for mark in marks:
            words = (
                f"{mark.letter}: {mark.kernel}, {mark.problem}, {mark.role}: {three_digits(mark.tflops)} "
                f"TFLOP/s ({called(mark.kind)}) at {three_digits(mark.intensity)} operations a byte"
            )
            axes.plot(
                [mark.intensity],
                [mark.tflops],
                linestyle="none",
                **mark_style(mark.kind, mark.role),
                gid=canvas.tip(words),
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
        f"Champions ({word}), defaults in grey. Roofs: {roofs}; published ones are the maker's dense rates at boost clock, a "
        "bound and no measurement. The table says which letter is which."
    )
    return draw(f"roofline-{anchor(one.device)}", f"Roofline of {one.device}", caption, paint, height_in=3.6)


def _short_number(value: float) -> str:
    """A tick."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _roofs(canvas: Canvas, one: Roofline, sides: tuple[float, float]) -> None:
    """Published roofs dashed, measured ones in full; memory ends where the highest roof of its kind begins."""
    axes, (low, high) = canvas.axes, sides
    for memory in one.memory:
        same = [roof.rate for roof in one.compute if roof.kind == memory.kind] or [roof.rate for roof in one.compute]
        reach = min(high, max(same, default=memory.rate * high) / memory.rate)
        said = f"memory {three_digits(memory.rate)} TB/s, {memory.kind}"
        axes.plot(
            [low, reach], [low * memory.rate, reach * memory.rate], color=COLOUR["roof"], linewidth=1.3, linestyle=_line(memory),
            gid=canvas.tip(said),
        )  # fmt: skip
    lowest = min((memory.rate for memory in one.memory), default=0.0)
    for place, memory in enumerate(one.memory[:2]):
        at = max(low, axes.get_ylim()[0] / lowest) * 1.15
        axes.annotate(
            f"memory {three_digits(memory.rate)} TB/s, {memory.kind}", (at, at * lowest), xytext=(10, -3 - 11 * place),
            textcoords="offset points", ha="left", va="top", color=COLOUR["roof"], fontsize=8,
        )  # fmt: skip
    drawn = set()
    for roof in one.compute:
        several = [memory for memory in one.memory if memory.kind == roof.kind] or list(one.memory)
        start = min((roof.rate / memory.rate for memory in several), default=low)
        said = f"{roof.name}: {three_digits(roof.rate)} TFLOP/s, {roof.kind}"
        axes.plot(
            [start, high],
            [roof.rate] * 2,
            color=COLOUR["roof"],
            linewidth=1.3,
            linestyle=_line(roof),
            gid=canvas.tip(said),
        )
        if (roof.rate, roof.kind) not in drawn:
            names = "/".join(each.name for each in one.compute if (each.rate, each.kind) == (roof.rate, roof.kind))
            axes.annotate(
                f"{names} {three_digits(roof.rate)} TFLOP/s, {roof.kind}", (high, roof.rate), xytext=(-2, 3),
                textcoords="offset points", ha="right", va="bottom", color=COLOUR["roof"], fontsize=8,
            )  # fmt: skip
        drawn.add((roof.rate, roof.kind))


def _line(roof: Roof) -> Any:
    return "-" if roof.kind == "measured" else (0, (5, 3))
