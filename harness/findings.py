"""What a report says, as values: rows of tables and series of figures. `harness.finders` makes them, of evidence.

A number carries its kind, `measured`, `estimated` or `replayed`; what was not found out is None, and never 0. Refuses to draw.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from harness.champion_documents import ShownDocument
from harness.champions import Certificate, Champion
from harness.evidence import Evidence
from harness.problem import Problem
from harness.space import Value

Interval = tuple[float, float]


def called(kind: str) -> str:
    """The word beside every number."""
    return {"measured": "measured", "estimated": "estimate", "replayed": "replayed"}.get(kind, kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChampionRow:
    """A champion. Times in milliseconds, `tflops` by the operations that the mathematics needs; `speedup` is default over
    champion, with its 95 % interval; `changed` are tunables whose value is not the default's: (name, default's, its own)."""

    shown: ShownDocument
    champion: Champion
    problem: Problem
    kind: str
    value_ms: float
    tflops: float | None
    speedup: float | None
    speedup_interval: Interval | None
    changed: tuple[tuple[str, Value, Value], ...]
    draft: bool

    @property
    def is_default(self) -> bool:
        return not self.changed

    @property
    def kernel(self) -> str:
        return self.shown.file.kernel.name

    @property
    def device(self) -> str:
        return self.shown.file.device.name

    @property
    def status(self) -> str:
        standing = (self.shown.standings or {}).get(self.champion.problem)
        return standing.status if standing else "unknown"

    @property
    def notes(self) -> tuple[str, ...]:
        standing = (self.shown.standings or {}).get(self.champion.problem)
        return ((standing.reason,) if standing.reason else ()) + standing.warnings if standing else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """Ours in turns with a peer; `config` is ours, `config_of` says whose. `speedup` is the peer's time over ours, with its 95 %
    interval; None with the reason why not."""

    device: str
    problem: str
    config: Mapping[str, Value]
    config_of: str
    peer: str
    ours_ms: float | None
    peer_ms: float | None
    speedup: float | None
    interval: Interval | None
    not_measured: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Convergence:
    """A search: each trial's number (None if it has none) and the best so far, in the order of trial; `default_ms` where it is
    known."""

    kernel: str
    device: str
    problem: str
    kind: str
    values: tuple[float | None, ...]
    best: tuple[float | None, ...]
    default_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All configs with one pair of block sizes: the least number among them or None, how many were tried, how many of them have
    no number."""

    best_ms: float | None
    tried: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """The best number over pairs of block sizes. `cells` by (x, y); `champion` is the pair of the best. `path` is the file's."""

    kernel: str
    device: str
    problem: str
    kind: str
    path: str
    x: str
    y: str
    xs: tuple[int, ...]
    ys: tuple[int, ...]
    cells: Mapping[tuple[int, int], Cell]

    @property
    def best_ms(self) -> float:
        return min(one.best_ms for one in self.cells.values() if one.best_ms is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A kernel on a roofline: operations for each byte that must move, and TFLOP/s. `role` is champion or default; `letter`
    stands beside it in the figure, and is of its kernel and problem."""

    letter: str
    kernel: str
    problem: str
    dtype: str
    kind: str
    role: str
    intensity: float
    tflops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """A rate that no kernel can exceed: TB/s of memory, or TFLOP/s of a type. `kind` is published, or measured by a campaign."""

    name: str
    rate: float
    kind: str
    interval: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A device's roofs, and the kernels under them."""

    device: str
    memory: tuple[Roof, ...]
    compute: tuple[Roof, ...]
    marks: tuple[Mark, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeRow:
    """How many trials of a search had which outcome, and what they were refused for."""

    kernel: str
    device: str
    problem: str
    kind: str
    outcomes: Mapping[str, int]
    rules: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRow:
    """Trials without a number for one reason (of pruned ones, the rule), with one example of it."""

    kernel: str
    device: str
    outcome: str
    reason: str
    count: int
    detail: str
    problem: str
    config: Mapping[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRow:
    """What one output of a champion made of its error budget: the worst error over its bound, in the gate and in the suite."""

    row: ChampionRow
    output: str
    gate: float | None
    error: float | None
    bound: float | None
    suite: float | None

    @property
    def certificate(self) -> Certificate:
        return self.row.champion.certificate

    @property
    def worst(self) -> float:
        return max(one for one in (self.gate, self.suite, 0.0) if one is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A part of the report that has nothing to show: what is missing, and the command that gets it."""

    section: str
    what: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that a report says."""

    evidence: Evidence
    champions: tuple[ChampionRow, ...]
    peers: tuple[PeerRow, ...]
    convergence: tuple[Convergence, ...]
    heat_maps: tuple[HeatMap, ...]
    rooflines: tuple[Roofline, ...]
    outcomes: tuple[OutcomeRow, ...]
    failures: tuple[FailureRow, ...]
    budgets: tuple[BudgetRow, ...]
    missing: tuple[Missing, ...]

    @property
    def kinds(self) -> Counter[str]:
        """How many champions have which kind of number."""
        return Counter(row.kind for row in self.champions)
