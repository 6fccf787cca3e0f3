"""From evidence to findings: pure functions that make the rows and series of a report. Refuses to draw, and to touch a file."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.device import TARGETS
from harness.errors import ProblemError
from harness.evidence import Evidence, Trial, Trials, possible
from harness.findings import (
    BudgetRow,
    Cell,
    ChampionRow,
    Convergence,
    FailureRow,
    Findings,
    HeatMap,
    Interval,
    Mark,
    Missing,
    OutcomeRow,
    PeerRow,
    Roof,
    Roofline,
)  # fmt: skip
from harness.problem import Problem, parse_problem

# More values on a side of a heat map than this are for no eye.
_MOST_VALUES = 24
_BLOCK = "block"
# What a campaign calls the rates that it has measured.
_COPY = "copy TB/s"
_LETTERS = 26
_MOST = 1e300


def find(evidence: Evidence) -> Findings:
    """What the evidence says."""
    champions = tuple(sorted(_champion_rows(evidence), key=_row_order))
    ordered = sorted(evidence.trials, key=lambda one: (one.device, *problem_order(one.kernel, one.problem), one.path))
    found = Findings(
        evidence=evidence,
        champions=champions,
        peers=tuple(sorted(_peer_rows(evidence), key=lambda row: (row.device, *problem_order("", row.problem)))),
        convergence=tuple(_convergence(one, champions) for one in ordered if _has_number(one)),
        heat_maps=tuple(each for one in ordered for each in heat_maps(one)),
        rooflines=tuple(_rooflines(champions, evidence)),
        outcomes=tuple(_outcomes(one) for one in ordered),
        failures=tuple(_failures(ordered)),
        budgets=tuple(_budgets(champions)),
        missing=(),
    )  # fmt: skip
    return replace(found, missing=tuple(_missing(found)))


def _missing(found: Findings) -> Iterator[Missing]:
    """The parts that have nothing to show, in the order of the report."""
    tune = "flashtune tune flash_fwd --workload quickstart"
    if not found.champions:
        yield Missing(section="champions", what="no champion has been found", command=tune)
    elif not any(row.kind == "measured" for row in found.champions):
        yield Missing(
            section="champions", what="no champion has a measured time: every number is an estimate",
            command=f"{tune} --target MODEL  # on a machine with that GPU",
        )  # fmt: skip
    if not any(row.speedup for row in found.peers):
        yield Missing(
            section="peers", what="no peer has been measured beside ours",
            command="flashtune campaign --only beside --minutes 9 --out results/campaign  # on a machine with a GPU",
        )  # fmt: skip
    if not found.convergence:
        yield Missing(section="search", what="no journal of a search is here", command=tune)
    if not found.heat_maps:
        yield Missing(section="landscape", what="no space with block sizes was tried", command=f"{tune} --budget 200")
    if not found.evidence.spaces:
        yield Missing(
            section="pruning", what="the rules of no space were asked",
            command="flashtune space KERNEL --problem PROBLEM  # inside a workspace",
        )  # fmt: skip
    if not any(roof.kind == "measured" for one in found.rooflines for roof in (*one.memory, *one.compute)):
        yield Missing(
            section="roofline", what="no roof has been measured: those shown are the maker's published rates",
            command="flashtune campaign --only truth --minutes 9 --out results/campaign  # on a machine with a GPU",
        )  # fmt: skip
    if not found.budgets:
        yield Missing(section="budgets", what="no champion has a certificate", command=tune)


def problem_order(kernel: str, problem: str) -> tuple[Any, ...]:
    """Problems as a person would list them: by kernel, head dim, length and batch; what cannot be read comes last."""
    read = read_problem(problem)
    if read is None:
        return (kernel, 1, 0, 0, 0, 0, problem)
    return (kernel, 0, read.head_dim, read.kv_len, read.q_len, read.batch, problem)


def read_problem(text: str) -> Problem | None:
    """The problem of a notation that may be anything."""
    try:
        return parse_problem(text)
    except (ProblemError, ValueError):
        return None


def _row_order(row: ChampionRow) -> tuple[Any, ...]:
    return (row.device, *problem_order(row.kernel, row.champion.problem), row.draft, row.shown.path)


def tflops(problem: Problem | None, value_ms: float | None) -> float | None:
    """10^12 operations a second, of those that the mathematics needs."""
    return possible(problem.flops / value_ms / 1e9) if problem is not None and possible(value_ms) and value_ms else None


def _champion_rows(evidence: Evidence) -> Iterator[ChampionRow]:
    for shown in evidence.champions:
        for champion in shown.file.champions:
            number, problem = champion.number, champion.read()
            speedup = None
            if number.ratio is not None:
                speedup = 1 / number.ratio
            elif number.default_ms is not None:
                speedup = number.default_ms / number.value_ms
            sides = tuple(possible(side) for side in number.ratio_interval or ())
            low, high = sides if len(sides) == 2 else (None, None)
            changed = tuple(
                (name, champion.default[name], value)
                for name, value in champion.config.items()
                if name in champion.default and champion.default[name] != value
            )
            yield ChampionRow(
                shown=shown, champion=champion, problem=problem, kind=number.kind, value_ms=number.value_ms,
                tflops=tflops(problem, number.value_ms), speedup=possible(speedup),
                speedup_interval=(1 / high, 1 / low) if low and high else None, changed=changed,
                draft=shown.path.endswith(".draft.json"),
            )  # fmt: skip


def _peer_rows(evidence: Evidence) -> Iterator[PeerRow]:
    """What campaigns and benches have measured of others. Both hold anybody's values: what is no number is none."""
    for _, book in evidence.campaigns:
        for entry in book.parts.values():
            rivals = entry.data.get("rivals")
            if entry.step == "beside" and isinstance(rivals, Mapping):
                yield from _beside(book.device, entry.data, ((str(name), one) for name, one in rivals.items()))
    for _, bench in evidence.benches:
        problems = bench.get("problems")
        for one in problems if isinstance(problems, list) else ():
            peers = one.get("peers") if isinstance(one, Mapping) else None
            if isinstance(peers, list):
                named = ((str(peer.get("name", "")), peer) for peer in peers if isinstance(peer, Mapping))
                yield from _beside(str(bench.get("device", "")), one, named)


def _beside(device: str, ours: Mapping[str, Any], peers: Iterable[tuple[str, Any]]) -> Iterator[PeerRow]:
    config = ours.get("config")
    for name, one in peers:
        if isinstance(one, Mapping):
            yield PeerRow(
                device=device, problem=str(ours.get("problem", "")), config=config if isinstance(config, Mapping) else {},
                config_of=str(ours.get("config_of", "")), peer=name, ours_ms=_number(one.get("ours_ms")),
                peer_ms=_number(one.get("peer_ms", one.get("rival_ms"))), speedup=_number(one.get("ratio")),
                interval=_interval(one.get("interval")), not_measured=str(one.get("not_measured", "")),
            )  # fmt: skip


def _number(value: Any) -> float | None:
    """A number that can be shown, or None. A whole number of JSON may be greater than any float."""
    return None if isinstance(value, bool) or not isinstance(value, int | float) else possible(float(min(value, _MOST)))


def _interval(value: Any) -> Interval | None:
    sides = [_number(one) for one in value] if isinstance(value, list | tuple) and len(value) == 2 else []
    low, high = sides if len(sides) == 2 else (None, None)
    return (low, high) if low is not None and high is not None else None


def _has_number(trials: Trials) -> bool:
    return any(one.value_ms is not None for one in trials.trials)


def _convergence(trials: Trials, champions: Sequence[ChampionRow]) -> Convergence:
    values = tuple(one.value_ms for one in trials.trials)
    best: list[float | None] = []
    for value in values:
        before = best[-1] if best else None
        best.append(before if value is None else value if before is None else min(before, value))
    whose = (trials.kernel, trials.device, trials.problem, trials.kind)
    default = next(
        (row for row in champions if (row.kernel, row.device, row.champion.problem, row.kind) == whose), None
    )
    return Convergence(
        kernel=trials.kernel, device=trials.device, problem=trials.problem, kind=trials.kind, values=values, best=tuple(best),
        default_ms=None if default is None else possible(default.champion.number.default_ms),
    )  # fmt: skip


def heat_maps(trials: Trials) -> Iterator[HeatMap]:
    """A map for each pair of block sizes that belong together: those whose names are equal up to the word `block`."""
    names = list(dict.fromkeys(name for one in trials.trials for name in one.config if _BLOCK in name))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(_BLOCK)[0], []).append(name)
    for group in groups.values():
        if len(group) >= 2 and (found := _heat_map(trials, group[1], group[0])) is not None:
            yield found


def _heat_map(trials: Trials, x: str, y: str) -> HeatMap | None:
    cells: dict[tuple[int, int], Cell] = {}
    for one in trials.trials:
        at = one.config.get(x), one.config.get(y)
        across, down = at
        if not isinstance(across, int) or not isinstance(down, int):
            continue
        old = cells.get((across, down), Cell(best_ms=None, tried=0, failed=0))
        known = [value for value in (old.best_ms, one.value_ms) if value is not None]
        cells[across, down] = Cell(
            best_ms=min(known, default=None), tried=old.tried + 1, failed=old.failed + (one.value_ms is None)
        )
    xs, ys = (tuple(sorted({at[side] for at in cells})) for side in (0, 1))
    counted = len(xs) * len(ys) >= 2 and max(len(xs), len(ys)) <= _MOST_VALUES
    if not counted or all(one.best_ms is None for one in cells.values()):
        return None
    return HeatMap(
        kernel=trials.kernel, device=trials.device, problem=trials.problem, kind=trials.kind, path=trials.path, x=x, y=y, xs=xs,
        ys=ys, cells=cells,
    )  # fmt: skip


def _rooflines(champions: Sequence[ChampionRow], evidence: Evidence) -> Iterator[Roofline]:
    for device in dict.fromkeys(row.device for row in champions):
        rows = [row for row in champions if row.device == device]
        facts = TARGETS.get(device)
        marks = tuple(_marks(rows))
        dtypes = sorted({mark.dtype for mark in marks})
        memory = [Roof(name="memory", rate=facts.memory_gb_per_s / 1000, kind="published")] if facts else []
        rates = facts.matrix_tflops if facts else {}
        compute = [
            Roof(name=dtype, rate=rates[key], kind="published")
            for dtype in dtypes
            if (key := "fp8" if dtype.startswith("fp8") else dtype) in rates
        ]
        for name, rate, interval in _ceilings(evidence, device):
            target = memory if name == _COPY else compute
            target.append(Roof(name=name.partition(" ")[0], rate=rate, kind="measured", interval=interval))
        if marks:
            source = facts.source if facts else ""
            yield Roofline(device=device, memory=tuple(memory), compute=tuple(compute), marks=marks, source=source)


def _marks(rows: Iterable[ChampionRow]) -> Iterator[Mark]:
    letters: dict[tuple[str, str], str] = {}
    for row in rows:
        place = len(letters)
        letter = letters.setdefault(
            (row.kernel, row.champion.problem), chr(ord("A") + place) if place < _LETTERS else str(place + 1)
        )
        number, problem = row.champion.number, row.problem
        if not problem.flops or not problem.least_bytes:
            continue
        numbers = [("champion", number.value_ms), *([] if row.is_default else [("default", number.default_ms)])]
        for role, value in numbers:
            rate = tflops(problem, value)
            if rate is not None:
                yield Mark(
                    letter=letter, kernel=row.kernel, problem=row.champion.problem, dtype=problem.dtype, kind=row.kind, role=role,
                    intensity=problem.flops / problem.least_bytes, tflops=rate,
                )  # fmt: skip


def _ceilings(evidence: Evidence, device: str) -> Iterator[tuple[str, float, Interval | None]]:
    """The rates that campaigns on a device have measured, the best of each kind."""
    best: dict[str, tuple[str, float, Interval | None]] = {}
    for _, book in evidence.campaigns:
        for entry in book.parts.values() if book.device == device else ():
            for one in entry.data.get("ceilings", ()):
                rate = _number(one.get("rate")) if isinstance(one, Mapping) else None
                name = str(one.get("what", "")) if rate else ""
                if rate and (name not in best or rate > best[name][1]):
                    best[name] = (name, rate, _interval(one.get("interval")))
    yield from best.values()


def _outcomes(trials: Trials) -> OutcomeRow:
    outcomes, rules = (
        Counter(one.outcome for one in trials.trials),
        Counter(one.rule for one in trials.trials if one.rule),
    )
    return OutcomeRow(
        kernel=trials.kernel, device=trials.device, problem=trials.problem, kind=trials.kind,
        outcomes=dict(outcomes.most_common()), rules=dict(rules.most_common()),
    )  # fmt: skip


def _failures(several: Iterable[Trials]) -> Iterator[FailureRow]:
    counts: Counter[tuple[str, str, str, str]] = Counter()
    examples: dict[tuple[str, str, str, str], tuple[str, Trial]] = {}
    for trials in several:
        for one in trials.trials:
            if one.value_ms is None:
                key = (trials.kernel, trials.device, one.outcome, one.rule or one.reason)
                counts[key] += 1
                examples.setdefault(key, (trials.problem, one))
    for key, count in counts.most_common():
        kernel, device, outcome, reason = key
        problem, example = examples[key]
        yield FailureRow(
            kernel=kernel, device=device, outcome=outcome, reason=reason, count=count, detail=example.reason, problem=problem,
            config=example.config,
        )  # fmt: skip


def _budgets(champions: Iterable[ChampionRow]) -> Iterator[BudgetRow]:
    for row in champions:
        found = row.champion.certificate
        for output in dict.fromkeys((*found.errors, *found.worst)):
            gate = found.errors.get(output)
            yield BudgetRow(
                row=row, output=output, gate=gate.ratio if gate else None, error=gate.error if gate else None,
                bound=gate.bound if gate else None, suite=found.worst.get(output),
            )  # fmt: skip
