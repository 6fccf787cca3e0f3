"""A decision table distilled from champions: few rows, the first that fits answers; also as Python that imports nothing.

Each champion is held out once, and the table of the others asked for it. Refuses to invent a time: what a config costs where it
was not timed is unknown, and counts worse than any time that is.
"""

import itertools
import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.likeness import features
from harness.problem import Problem
from harness.space import Config, Value, power_of_two

# More rows than this for one kind of problem are no longer read by a person.
_ROWS_PER_KIND = 4
_MEASURES: Mapping[str, Callable[[Problem], int]] = {
    "q_len": lambda problem: problem.q_len,
    "kv_len": lambda problem: problem.kv_len,
    "heads": lambda problem: problem.batch * problem.q_heads,
}

Legal = Callable[[Problem, Config], bool]
TimeOf = Callable[[Problem, Config], float | None]


@dataclass(frozen=True, slots=True)
class Known:
    """A champion as far as a table cares: its problem, its config, and its number in milliseconds."""

    problem: Problem
    config: Config
    value_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Problems of one kind whose lengths, and batch times heads, are at most the limits (None is no limit) get `config`."""

    kind: Hashable
    config: Config
    q_len: int | None = None
    kv_len: int | None = None
    heads: int | None = None

    def fits(self, problem: Problem) -> bool:
        limits = {"q_len": self.q_len, "kv_len": self.kv_len, "heads": self.heads}
        return kind_of(problem) == self.kind and all(
            limit is None or _MEASURES[name](problem) <= limit for name, limit in limits.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the table made without a champion says of its problem: a config or None, whether it is legal there and the champion's
    own, and its time over the champion's, less 1, where that is known; the same of the default config."""

    problem: str
    config: Config | None
    legal: bool
    same: bool
    regret: float | None
    default_regret: float | None


def kind_of(problem: Problem) -> Hashable:
    """What no row may mix: all that the code depends on, exact head dims too."""
    return (*features(problem).values(), problem.head_dim, problem.v_head_dim)


def distill(champions: Sequence[Known], legal: Legal, time_of: TimeOf) -> tuple[Row, ...]:
    """The rows for some champions; a problem that none fits is for the fallback, the kernel's own config."""
    kinds: dict[Hashable, list[Known]] = {}
    for champion in sorted(champions, key=lambda one: one.problem.key):
        kinds.setdefault(kind_of(champion.problem), []).append(champion)
    return tuple(row for kind, several in kinds.items() for row in _rows(kind, several, legal, time_of))


def choose(rows: Iterable[Row], problem: Problem) -> Config | None:
    """The config of the first row that fits, or None for the fallback."""
    return next((row.config for row in rows if row.fits(problem)), None)


def hold_out(
    champions: Sequence[Known], defaults: Sequence[Config], legal: Legal, time_of: TimeOf
) -> tuple[Trial, ...]:
    """Ask, of each champion, the table of all the others for its problem; `defaults` are the default configs in their order."""
    found = []
    for champion, default in zip(champions, defaults, strict=True):
        others = [one for one in champions if one is not champion]
        config = choose(distill(others, legal, time_of), champion.problem)
        found.append(
            Trial(
                problem=champion.problem.key,
                config=config,
                legal=config is not None and legal(champion.problem, config),
                same=config == champion.config,
                regret=None if config is None else _regret(champion, config, time_of),
                default_regret=_regret(champion, default, time_of),
            )
        )
    return tuple(found)


def _regret(champion: Known, config: Config, time_of: TimeOf) -> float | None:
    if config == champion.config:
        return 0.0
    took = time_of(champion.problem, config)
    return None if took is None else took / champion.value_ms - 1


@dataclass(frozen=True, slots=True)
class _Leaf:
    champions: tuple[Known, ...]
    limits: Mapping[str, int]
    config: Config
    cost: tuple[int, float]


def _rows(kind: Hashable, champions: Sequence[Known], legal: Legal, time_of: TimeOf) -> list[Row]:
    """Split where it saves most, as long as it saves anything and a person can read it."""
    leaves = [_leaf(champions, {}, legal, time_of)]
    while len(leaves) < _ROWS_PER_KIND:
        splits = [(place, pair) for place, leaf in enumerate(leaves) for pair in _splits(leaf, legal, time_of)]
        best = min(splits, key=lambda split: _cost_of(leaves, *split), default=None)
        if best is None or _cost_of(leaves, *best) >= _cost_of(leaves, 0, (leaves[0],)):
            break
        leaves[best[0] : best[0] + 1] = best[1]
    return [Row(kind=kind, config=leaf.config, **leaf.limits) for leaf in leaves]


def _cost_of(leaves: Sequence[_Leaf], place: int, instead: Sequence[_Leaf]) -> tuple[int, float]:
    changed = [*leaves[:place], *instead, *leaves[place + 1 :]]
    return sum(leaf.cost[0] for leaf in changed), sum(leaf.cost[1] for leaf in changed)


def _splits(leaf: _Leaf, legal: Legal, time_of: TimeOf) -> list[tuple[_Leaf, _Leaf]]:
    """Every way to cut a leaf in two: the lower part comes first, so that the upper one needs no lower limit."""
    found = []
    for name, measure in _MEASURES.items():
        values = sorted({measure(one.problem) for one in leaf.champions})
        for low, high in itertools.pairwise(values):
            limit = min(power_of_two(low), high - 1)
            below = [one for one in leaf.champions if measure(one.problem) <= limit]
            above = [one for one in leaf.champions if measure(one.problem) > limit]
            lower = _leaf(below, {**leaf.limits, name: limit}, legal, time_of)
            found.append((lower, _leaf(above, leaf.limits, legal, time_of)))
    return found


def _leaf(champions: Sequence[Known], limits: Mapping[str, int], legal: Legal, time_of: TimeOf) -> _Leaf:
    """The config that costs its champions least: first by how many it is unknown or illegal for, then by its regrets."""

    def cost(config: Config) -> tuple[int, float]:
        regrets = [_regret(one, config, time_of) if legal(one.problem, config) else None for one in champions]
        return sum(regret is None for regret in regrets), sum(regret or 0.0 for regret in regrets)

    # Of equal ones the first, in the order of the problems.
    best = min(dict.fromkeys(one.config for one in champions), key=cost)
    return _Leaf(tuple(champions), dict(limits), best, cost(best))


# ---------------------------------------------------------------------------------------------------------------------
# As Python
# ---------------------------------------------------------------------------------------------------------------------

_PYTHON = '''"""Configs of {kernel} on {device} ({arch}), distilled from {source} by `flashtune table`.

Of the kernel with the digest {digest}. Needs nothing but Python.
"""

KERNEL, DEVICE, ARCH, KERNEL_DIGEST = {names}

# What all configs share, and what is their own.
COMMON = {common}
CONFIGS = (
{configs}
)

# A row answers for one kind of problem (pass, dtype, head dims, band, variants, page) whose queries, keys, and batch times heads
# are at most its limits (None: any number). The first row that fits answers; the number is its config's.
ROWS = (
{rows}
)

# Where no row fits: None lets the kernel take its own safe config.
FALLBACK = None


def config(*, kind, q_len, kv_len, heads):
    """The config of the first row that fits, or the fallback; `heads` is the batch times the query heads."""
    for row_kind, most_queries, most_keys, most_heads, number in ROWS:
        limits = ((q_len, most_queries), (kv_len, most_keys), (heads, most_heads))
        if kind == row_kind and all(most is None or given <= most for given, most in limits):
            return {{**COMMON, **CONFIGS[number]}}
    return FALLBACK


def lookup(question):
    """The `lookup` of `kernels.attention.attention`."""
    dtype = {{"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}}.get(str(question.dtype))
    left, right = question.window_left, question.window_right
    causal = right == 0
    placed = question.top_left and question.q_len != question.kv_len and (left is not None or right is not None)
    band = (causal, left is None, causal or right is None, placed)
    dims = (question.head_dim, question.v_head_dim)
    padded = tuple(max(16, 1 << (dim - 1).bit_length()) for dim in dims)
    kind = (question.pass_, dtype, padded, band, question.variants, None, *dims)
    heads = question.batch * question.q_heads
    return config(kind=kind, q_len=question.q_len, kv_len=question.kv_len, heads=heads)
'''


def python_table(rows: Sequence[Row], *, kernel: str, device: str, arch: str, digest: str, source: str) -> str:
    """The table as a Python module. What is said in it comes from champion files, where names and words have few letters."""
    configs = list(dict.fromkeys(row.config for row in rows))
    common = _common(configs)
    own = [{name: value for name, value in each.items() if name not in common} for each in configs]
    lines = [
        f"    ({row.kind!r}, {row.q_len}, {row.kv_len}, {row.heads}, {configs.index(row.config)})," for row in rows
    ]
    return _PYTHON.format(
        kernel=kernel, device=device, arch=arch, digest=digest, source=source,
        names=repr((kernel, device, arch, digest))[1:-1], common=_pretty(common, ""),
        configs="\n".join(f"    {_pretty(each, '    ')}," for each in own), rows="\n".join(lines),
    )  # fmt: skip


def _pretty(values: Mapping[str, Value], indent: str) -> str:
    """A dict in lines that a person reads."""
    # Names and words in it have no blanks, so that a line ends between two of them.
    return textwrap.fill(repr(dict(values)), 112, subsequent_indent=indent + " ", break_on_hyphens=False)


def _common(configs: Sequence[Config]) -> dict[str, Value]:
    first = configs[0] if configs else Config({})
    return {name: value for name, value in first.items() if all(each.get(name) == value for each in configs)}
