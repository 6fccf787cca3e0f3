"""Judging ourselves: what an estimate, a default and a random choice are worth on spaces that were measured.

Pure functions of recorded spaces and of samples. Refuses to say anything of spaces with too few times to say it of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.recorded import Recorded
from harness.stats import Comparison

Floats = NDArray[np.float64]

# A rank correlation of fewer says nothing.
FEWEST = 20
FIRST = (1, 5, 10)
# Within so much of the best a config is as good as the best.
NEAR = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgment:
    """What the estimate is worth on one space.

    `configs` were measured of `legal`. `correlation` is Spearman's, of estimates and times. Regrets are times over the best time
    measured, less 1: of the best of the estimate's first 1, 5, 10; of the best of so many drawn at random, on average; of the
    default. `near` is the share of configs within 5 % of the best.
    """

    configs: int
    legal: int
    best_ms: float
    correlation: float
    regret: Mapping[int, float]
    random_regret: Mapping[int, float]
    default_regret: float | None
    near: float


def judge_estimate(found: Recorded) -> Judgment | None:
    """None where fewer than `FEWEST` configs have both a time and an estimate."""
    lines = [line for line in found.measured if line.estimate_ms is not None]
    if len(lines) < FEWEST:
        return None
    times = np.array([line.time_ms for line in lines], dtype=np.float64)
    estimates = np.array([line.estimate_ms for line in lines], dtype=np.float64)
    best = float(min(times))
    # Of equal estimates the order of the space decides, as it would in a tune.
    order = np.argsort(estimates, kind="stable")
    default = next((line.time_ms for line in lines if line.config == found.header.default), None)
    return Judgment(
        configs=len(lines),
        legal=found.header.legal,
        best_ms=best,
        correlation=rank_correlation(estimates, times),
        regret={count: float(times[order[:count]].min()) / best - 1 for count in FIRST},
        random_regret={count: expected_least(times, count) / best - 1 for count in FIRST},
        default_regret=None if default is None else default / best - 1,
        near=float(np.mean(times <= (1 + NEAR) * best)),
    )


def rank_correlation(one: Sequence[float] | Floats, other: Sequence[float] | Floats) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where one side has a single value only."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (one, other)]
    centred = [side - side.mean() for side in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale else float("nan")


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: Floats = (last - (counts - 1) / 2)[place]
    return found


def expected_least(values: Sequence[float] | Floats, count: int) -> float:
    """The expected minimum of `count` of the values, drawn without putting back."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    total = len(ordered)
    count = min(count, total)
    # P(the minimum is the value of rank r) = P(none of the r before it) P(it, given that), as a running product.
    expected, none_before = 0.0, 1.0
    for rank, value in enumerate(ordered[: total - count + 1]):
        here = count / (total - rank)
        expected += none_before * here * float(value)
        none_before *= 1 - here
    return expected


def false_alarms(comparisons: Sequence[Comparison]) -> tuple[int, int]:
    """Of kernels compared with themselves: how many were called faster or slower, of how many."""
    return sum(one.verdict != "cannot tell" for one in comparisons), len(comparisons)
