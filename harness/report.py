"""What a person reads: progress, results, summaries. The only importer of rich.

Refuses to decide anything: it shows what others found. Colour only repeats what the words already say; a number without
a measurement is never printed without the word *estimated* beside it.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from harness import stats
from harness.device import DeviceFacts
from harness.documents import FailureDocument
from harness.outcome import (
    CompileFailed,
    Flaky,
    LaunchFailed,
    Measured,
    Mode,
    Pruned,
    Record,
    Samples,
    TimedOut,
    Wrong,
)
from harness.problem import Problem
from harness.space import Census, Space
from harness.tune import Settled, Tried

_LABEL = 24
_WIDTH = 100
# Measurements at either end of a tune whose canaries are compared.
_ENDS = 4

FAILURES = {
    "pruned": "pruned",
    "compile_failed": "compile failed",
    "launch_failed": "launch failed",
    "timed_out": "timed out",
    "wrong": "wrong",
    "flaky": "flaky",
}


def open_console(stream: TextIO) -> Console:
    """A console that leaves paths, brackets and numbers as they are."""
    return Console(file=stream, highlight=False, emoji=False, markup=False, soft_wrap=True)


def three_digits(value: float) -> str:
    """Three significant digits without an exponent, thousands separated."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    if "e" in text:
        return f"{value:.8f}".rstrip("0")
    digits = len(text.lstrip("-0.").replace(".", ""))
    if digits >= 3:
        return text
    return text + ("" if "." in text else ".") + "0" * (3 - digits)


def times(ratio: float) -> str:
    """A speed-up with its sign, for example 1.27×."""
    return f"{three_digits(ratio)}×"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def heading(kernel: str, device: DeviceFacts, mode: Mode, problems: Sequence[Problem]) -> Text:
    """The line that a tune starts with."""
    where = f"on {device.name} ({device.arch})"
    if mode == "estimated":
        where = f"for {device.name} ({device.arch}), estimated: no such device is here"
    return Text.assemble(
        ("Tuning ", "bold"), (kernel, "bold cyan"), f" {where} · {plural(len(problems), 'problem')}", ""
    )


def space_line(problem: Problem, space: Space) -> str:
    """One line on a problem's space: its size, what is legal, what each rule removed."""
    census = space.census
    removed = ", ".join(f"{name}\u00a0−{count:,}" for name, count in census.pruned.items() if count)
    counted = f"{census.size:,} configs, {census.legal:,} legal"
    return f"{problem}\n" + wrapped(counted + (f" ({removed})" if removed else ""), first="  ").rstrip()


class _Live:
    """A progress line that is there while its block runs."""

    _progress: Progress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Bar(_Live):
    """A live progress line on a terminal, nothing elsewhere; one trial is one step."""

    def __init__(self, console: Console, *, shown: bool, total: int | None) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not shown,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=total)
        self._failed: Counter[str] = Counter()

    def step(self, tried: Tried, mode: Mode) -> None:
        if tried.record.outcome.kind in FAILURES:
            self._failed[FAILURES[tried.record.outcome.kind]] += 1
        word = " estimated" if mode == "estimated" else ""
        best = "no candidate yet" if tried.best_ms is None else f"best {three_digits(tried.best_ms)} ms{word}"
        failed = f"  ({', '.join(f'{count} {name}' for name, count in self._failed.items())})" if self._failed else ""
        self._progress.update(self._task, advance=1, description=f"{tried.problem}  {best}{failed}")


class FuzzBar(_Live):
    """A live line of a fuzzing campaign on a terminal: cases so far against time and count."""

    def __init__(self, console: Console, *, shown: bool, seconds: float, cases: int) -> None:
        self._limits = (seconds, cases)
        self._progress = Progress(
            SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=console, disable=not shown, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=1.0)

    def step(self, cases: int, seconds: float) -> None:
        done = max(seconds / self._limits[0], cases / self._limits[1])
        self._progress.update(self._task, completed=done, description=f"{plural(cases, 'case')}, nothing wrong")


class CountBar(_Live):
    """A live line of something that has a known number of steps."""

    def __init__(self, console: Console, *, shown: bool, total: int) -> None:
        self._progress = Progress(
            SpinnerColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, disable=not shown, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)

    def step(self) -> None:
        self._progress.update(self._task, advance=1)


def settled_lines(settled: Settled, mode: Mode) -> Text:
    """A problem's champion in the look of a measurement tool."""
    text = Text()
    text.append(f"{settled.problem}\n", style="bold")
    if settled.champion is None:
        text.append("  No champion: no candidate passed\n", style="red")
        for failure in failures(settled.records)[:3]:
            text.append(f"  {failure.count} × {failure.reason}\n")
        return text
    for label, value in _number_lines(settled, mode) + _evidence_lines(settled, mode):
        text.append(wrapped(value, first=f"  {label + ':':<{_LABEL}}"))
    return text


def wrapped(text: str, *, first: str) -> str:
    """`text` behind `first`, broken between words at 100 columns, its further lines indented as far."""
    kept = text.replace(" ± ", "\u00a0±\u00a0")
    lines = textwrap.wrap(
        kept, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False,
        break_on_hyphens=False, drop_whitespace=True, replace_whitespace=False,
    )  # fmt: skip
    return "".join(line.replace("\u00a0", " ") + "\n" for line in lines or [first.rstrip()])


def _number_lines(settled: Settled, mode: Mode) -> list[tuple[str, str]]:
    value = settled.value_ms
    assert value is not None
    rate = three_digits(settled.problem.flops / value / 1e9)
    if mode == "estimated":
        return [("Time (estimated)", f"{three_digits(value)} ms{rate:>14} TFLOP/s estimated      not measured")]
    samples = _champion_times(settled)
    if not samples:
        return [("Time (replayed)", f"{three_digits(value)} ms{rate:>14} TFLOP/s")]
    spread = three_digits(stats.mad(samples))
    low, high = stats.percentile(samples, 5), stats.percentile(samples, 95)
    return [
        (
            "Time (median ± MAD)",
            f"{three_digits(value)} ms ± {spread} ms{rate:>12} TFLOP/s    {plural(len(samples), 'sample')}",
        ),
        ("Range (p5 … p95)", f"{three_digits(low)} ms … {three_digits(high)} ms"),
    ]


def _champion_times(settled: Settled) -> tuple[float, ...]:
    record = settled.champion
    if settled.final is not None and isinstance(settled.final.outcome, Measured):
        record = settled.final
    if record is None or not isinstance(record.outcome, Measured):
        return ()
    samples: Samples = record.outcome.samples
    chosen = settled.champion is not None and record.config == settled.champion.config
    return samples.times_ms if chosen else samples.incumbent_ms


def _evidence_lines(settled: Settled, mode: Mode) -> list[tuple[str, str]]:
    champion = settled.champion
    assert champion is not None
    # A parameter that has one value on this device says nothing to a reader; the documents keep it.
    varied = {param.name for param in settled.space.params if len(param.values) > 1}
    lines = [("Config", " ".join(f"{name}={value}" for name, value in champion.config.items() if name in varied))]
    lines.append(("Against default", _against_default(settled, mode)))
    if settled.race is not None and settled.race.race is not None:
        raced = settled.race.race
        lines.append(
            ("Race", f"{plural(len(raced.entrants), 'config')} in turns, {raced.rounds} rounds: {raced.ended}")
        )
    lines += _conditions(settled)
    outcome = champion.outcome
    verdict = getattr(outcome, "verdict", None)
    if verdict is not None:
        worst = max(check.ratio for check in verdict.checks)
        cases = f"{verdict.status} {plural(len(verdict.cases), 'case')} "
        place = "in Triton's interpreter" if verdict.where == "interpreter" else "on the device"
        place = "by PyTorch's reference on the CPU" if "PyTorch's own reference" in verdict.oracle else place
        lines.append(("Verdict", f"{cases}{place}, worst error {three_digits(worst)} of its bound"))
        if verdict.blind_to:
            lines.append(("Not seen by the judge", ", ".join(verdict.blind_to)))
    proof = settled.proof
    if proof is not None:
        greatest = max(proof.largest.values(), default=0.0)
        asked = f"{plural(sum(proof.oracles.values()), 'judgment')} by {plural(len(proof.oracles), 'judge')}"
        worst_of = f"worst error {three_digits(greatest)} of its bound"
        lines.append(("Proof", f"passed {plural(proof.cases, 'case')}, {asked}, {worst_of}"))
    return lines


def _conditions(settled: Settled) -> list[tuple[str, str]]:
    """What spoils times, if it was there while they were taken: a lowered clock, or a canary that changed."""
    taken = [*settled.records, *([settled.final] if settled.final else [])]
    samples = [record.outcome.samples for record in taken if isinstance(record.outcome, Measured)]
    lines = []
    lowered = sum(one.throttled for one in samples)
    if lowered:
        why = (
            ", ".join(sorted({reason for one in samples for reason in one.throttle})) or "for a reason that is not said"
        )
        lines.append(("Clock lowered", f"during {lowered} of {plural(len(samples), 'measurement')}: {why}"))
    canary = [one.canary_ms for one in samples if one.canary_ms is not None]
    if len(canary) >= 2 * _ENDS:
        drift = stats.median(canary[-_ENDS:]) / stats.median(canary[:_ENDS]) - 1
        lines.append(
            ("Drift", f"the canary took {abs(drift) * 100:.1f} % {'longer' if drift > 0 else 'less'} at the end")
        )
    return lines


def _against_default(settled: Settled, mode: Mode) -> str:
    assert settled.champion is not None
    if settled.champion.config == settled.default.config:
        if settled.final is not None and not isinstance(settled.final.outcome, Measured):
            return f"it is the default; measuring the best again failed: {reason_of(settled.final)}"
        if settled.against_default is not None:
            return f"it is the default ({settled.against_default.reason})"
        return "it is the default; nothing tried was faster"
    before = settled.default_ms
    if before is None:
        return f"the default has no number ({FAILURES.get(settled.default.outcome.kind, settled.default.outcome.kind)})"
    assert settled.value_ms is not None
    found = settled.against_default
    if found is not None and found.ratio is not None and found.interval is not None:
        low, high = 1 / found.interval.high, 1 / found.interval.low
        return f"{times(1 / found.ratio)} faster  (95 % interval {three_digits(low)} … {three_digits(high)})"
    word = " by estimate" if mode == "estimated" else ""
    return f"{_gain(before / settled.value_ms)}{word}  (default: {three_digits(before)} ms {mode})"


def _gain(ratio: float) -> str:
    """A gain in words; one that three digits do not show is none."""
    return "as fast" if three_digits(ratio) == "1.00" else f"{times(ratio)} faster"


def summary_lines(settled: Sequence[Settled], journal: str, saved: str | None, mode: Mode) -> Text:
    """The end of a tune: how many problems, what was rejected and why, where everything is."""
    text = Text()
    words = Counter(_standing(one, mode) for one in settled)
    counted = " · ".join(f"{count} {word}" for word, count in words.items())
    text.append("Summary", style="bold")
    text.append(f"  {plural(len(settled), 'problem')} · {counted}\n")
    rejected = Counter[str]()
    for one in settled:
        rejected.update({FAILURES[kind]: count for kind, count in one.outcomes.items() if kind in FAILURES})
    if rejected:
        listed = " · ".join(f"{count} {name}" for name, count in rejected.items())
        text.append(f"  rejected: {listed}      details: flashtune show --failed\n")
    text.append(f"  journal:  {journal}\n")
    if saved:
        text.append(f"  champions: {saved}\n")
    if mode == "estimated":
        text.append("  every number above is an estimate from the compiled binary: nothing was measured\n")
    return text


def _standing(settled: Settled, mode: Mode) -> str:
    if settled.champion is None:
        return "without a champion"
    if settled.champion.config == settled.default.config:
        cannot = settled.against_default is not None and settled.against_default.verdict == "cannot tell"
        return "cannot tell from default" if cannot else "default stays"
    before = settled.default_ms
    if before is None or settled.value_ms is None:
        return "with a champion, the default has no number"
    if mode != "estimated":
        return "faster than default"
    level = _gain(before / settled.value_ms) == "as fast"
    return "as fast as default by estimate" if level else "faster than default by estimate"


def reason_of(record: Record) -> str:
    """Why a candidate has no number, in a line."""
    outcome = record.outcome
    if isinstance(outcome, Pruned):
        return f"pruned by {outcome.rule}: {outcome.detail}"
    if isinstance(outcome, CompileFailed):
        return f"compile failed: {outcome.reason}"
    if isinstance(outcome, LaunchFailed):
        return f"{outcome.stage} failed: {outcome.reason}"
    if isinstance(outcome, TimedOut):
        return f"timed out in {outcome.stage} after {three_digits(outcome.limit_s)} s"
    if isinstance(outcome, Wrong | Flaky):
        return f"{outcome.kind}: {outcome.verdict.detail}"
    return ""


def failures(records: Iterable[Record]) -> tuple[FailureDocument, ...]:
    """Candidates without a number by reason, most frequent first, with one example each."""
    examples: dict[str, Record] = {}
    counts = Counter[str]()
    for record in records:
        reason = reason_of(record)
        if reason:
            examples.setdefault(reason, record)
            counts[reason] += 1
    return tuple(
        FailureDocument(
            kind=examples[reason].outcome.kind,
            reason=reason,
            count=count,
            problem=examples[reason].problem,
            config=examples[reason].config,
        )
        for reason, count in counts.most_common()
    )


def census_lines(problem: Problem, device: DeviceFacts, census: Census, whys: Mapping[str, str]) -> list[str]:
    """A space and what each rule removes from it, as a table."""
    lines = [f"{problem} on {device.name} ({device.arch})", ""]
    width = max([len(name) for name in census.pruned] + [8])
    lines.append(f"  {'rule':<{width}}  {'removes':>9}  {'alone':>9}  why")
    for name, count in census.pruned.items():
        lines.append(f"  {name:<{width}}  {count:>9,}  {census.alone[name]:>9,}  {whys[name]}")
    lines += ["", f"  {'size':<{width}}  {census.size:>9,}", f"  {'legal':<{width}}  {census.legal:>9,}"]
    return lines
