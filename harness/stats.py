"""What a set of times says: location, spread, intervals, outliers, and which of two kernels is faster.

Pure functions over samples. Refuses to guess: what cannot be decided is "cannot tell", and no sample is ever dropped.

Samples taken in turns share the clock, the temperature and the neighbours of the moment. Their ratios, pair by pair, do
not contain what they share, so that a GPU that slows down while it is measured widens both times but not the
comparison.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Answer = Literal["faster", "slower", "cannot tell"]

# Below this many samples the two-sided sign test at 95 % has too little to say: 8 pairs may contain no dissenting one.
FEWEST_SAMPLES = 8
RESAMPLES = 2000

# Standard deviations per median absolute deviation of a normal distribution, and per mean absolute deviation.
_SIGMA_PER_MAD = 1.482602218505602
_SIGMA_PER_MEAN_DEVIATION = 1.2533141373155001
_ELEMENTS_AT_ONCE = 1 << 21

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval. `low` and `high` are in the unit of what it is an interval of."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Which of two kernels is faster, and on what evidence.

    `ratio` is candidate time over incumbent time, below 1 when the candidate is faster, `interval` its interval; both
    are None when the samples could not be used. `wins` of `pairs` pairs were won by the candidate (0 of 0 when the
    samples were not taken in turns). `reason` says in words why the answer is what it is.
    """

    verdict: Answer
    ratio: float | None
    interval: Interval | None
    wins: int
    pairs: int
    confidence: float
    reason: str


def median(samples: ArrayLike) -> float:
    """The median, in the unit of the samples. Raises `ValueError` on no samples or on one that is not finite."""
    return float(np.median(_finite(samples)))


def mad(samples: ArrayLike) -> float:
    """The median absolute deviation from the median, unscaled, in the unit of the samples."""
    values = _finite(samples)
    return float(np.median(np.abs(values - np.median(values))))


def percentile(samples: ArrayLike, percent: float) -> float:
    """The `percent`-th percentile (0 to 100), linearly interpolated, in the unit of the samples."""
    return float(np.percentile(_finite(samples), percent))


def median_interval(samples: ArrayLike, *, confidence: float = 0.95) -> Interval | None:
    """Exact interval of the median from order statistics: it assumes nothing about the shape of the noise.

    Covers the median with at least `confidence`. None when there are too few samples for that (fewer than 6 at 95 %).
    """
    values = np.sort(_finite(samples))
    count = len(values)
    rank = _rank_of_interval(count, confidence)
    if rank == 0:
        return None
    return Interval(float(values[rank - 1]), float(values[count - rank]))


@functools.lru_cache(maxsize=4096)
def _rank_of_interval(count: int, confidence: float) -> int:
    """Which of `count` ordered samples, from either side, bounds the median; 0 where none does."""
    # P(at most k of n samples lie below the median) is binomial with p = 1/2; integers keep it exact for any n.
    allowed = round((1 - confidence) / 2 * 2**53) * 2**count // 2**53
    below, rank, term = 1, 0, 1
    while below <= allowed:
        rank += 1
        term = term * (count - rank + 1) // rank
        below += term
    return rank


def bootstrap_median(
    samples: ArrayLike, *, rng: np.random.Generator, confidence: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of the median (Efron, 1979)."""
    values = _finite(samples)
    return _percentile_interval(_resampled_medians(values, rng, resamples), confidence)


def bootstrap_mean(
    values: ArrayLike, *, rng: np.random.Generator, confidence: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of the mean."""
    found = _finite(values)
    picks = rng.integers(0, len(found), size=(resamples, len(found)))
    return _percentile_interval(found[picks].mean(axis=1), confidence)


def bootstrap_ratio(
    candidate: ArrayLike,
    incumbent: ArrayLike,
    *,
    rng: np.random.Generator,
    paired: bool = True,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> tuple[float, Interval]:
    """The typical ratio of candidate to incumbent and its percentile bootstrap interval.

    Paired (taken in turns, equally many): the median of the ratios of the pairs, whole pairs resampled, so that drift
    which both share cancels. Not paired: the ratio of the medians, each side resampled on its own; drift between them
    does not cancel. Raises `ValueError` on samples that are not positive and finite, or on unequal numbers of paired
    ones.
    """
    logs = _positive_logs(candidate), _positive_logs(incumbent)
    if paired:
        if len(logs[0]) != len(logs[1]):
            raise ValueError(f"paired samples must be equally many, found {len(logs[0])} and {len(logs[1])}")
        differences = np.log(np.asarray(candidate, np.float64) / np.asarray(incumbent, np.float64))
        center = float(np.median(differences))
        spread = _resampled_medians(differences, rng, resamples)
    else:
        center = float(np.median(logs[0]) - np.median(logs[1]))
        spread = _resampled_medians(logs[0], rng, resamples) - _resampled_medians(logs[1], rng, resamples)
    interval = _percentile_interval(spread, confidence)
    return math.exp(center), Interval(math.exp(interval.low), math.exp(interval.high))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of `wins` against `losses` if either were equally likely; ties are left out (Conover, 1999)."""
    count = wins + losses
    if count == 0:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(tail * 2 / 2**count))


def outliers(samples: ArrayLike, *, cutoff: float = 3.5) -> tuple[int, ...]:
    """Positions of samples whose modified z-score is above `cutoff` (Iglewicz and Hoaglin, 1993). Removes nothing."""
    values = _finite(samples)
    distance = np.abs(values - np.median(values))
    scale = _SIGMA_PER_MAD * float(np.median(distance))
    if scale == 0:  # more than half of the samples are equal, as coarse clocks make them
        scale = _SIGMA_PER_MEAN_DEVIATION * float(np.mean(distance))
    if scale == 0:
        return ()
    return tuple(int(index) for index in np.flatnonzero(distance / scale > cutoff))


def compare(
    candidate_ms: Sequence[float],
    incumbent_ms: Sequence[float],
    *,
    rng: np.random.Generator,
    confidence: float = 0.95,
    paired: bool = True,
) -> Comparison:
    """Say whether the candidate is faster than the incumbent, or that it cannot be told.

    `paired` says that the samples were taken in turns, in random order within each turn (see `harness.measure`). Then
    the answer needs two witnesses: the bootstrap interval of the ratio excludes 1, and the sign test rejects at the
    same level. The order within a turn being random, the sign test of a kernel against itself errs at most as often
    as it says, whatever the noise looks like. Not paired, only the interval speaks, and drift between the two is not
    seen.
    """
    unusable = _why_unusable(candidate_ms, incumbent_ms, paired)
    if unusable:
        return Comparison(
            verdict="cannot tell", ratio=None, interval=None, wins=0, pairs=0, confidence=confidence, reason=unusable
        )
    candidate, incumbent = np.asarray(candidate_ms, np.float64), np.asarray(incumbent_ms, np.float64)
    ratio, interval = bootstrap_ratio(candidate, incumbent, rng=rng, paired=paired, confidence=confidence)
    wins = int(np.sum(candidate < incumbent)) if paired else 0
    losses = int(np.sum(candidate > incumbent)) if paired else 0
    chance = sign_test(wins, losses) if paired else 0.0
    # Exact integers settle the direction, so that rounding in the ratio can never make both of two kernels faster.
    excess = losses - wins if paired else (ratio > 1) - (ratio < 1)

    verdict: Answer = "cannot tell"
    reason = f"the ratio may be anything from {interval.low:.4f} to {interval.high:.4f}"
    if chance > 1 - confidence:
        reason += f"; winning {wins} and losing {losses} turns happens by chance with probability {chance:.2g}"
    elif excess < 0 and interval.high < 1:
        verdict = "faster"
    elif excess > 0 and interval.low > 1:
        verdict = "slower"
    return Comparison(
        verdict=verdict,
        ratio=ratio,
        interval=interval,
        wins=wins,
        pairs=len(candidate) if paired else 0,
        confidence=confidence,
        reason=reason,
    )


def _why_unusable(candidate_ms: Sequence[float], incumbent_ms: Sequence[float], paired: bool) -> str:
    for whose, times in (("candidate", candidate_ms), ("incumbent", incumbent_ms)):
        wrong = [time for time in times if not (math.isfinite(time) and time > 0)]
        if wrong:
            return f"a {whose} sample is `{wrong[0]}`, which is no time"
        if len(times) < FEWEST_SAMPLES:
            return f"{len(times)} {whose} samples are too few, {FEWEST_SAMPLES} are needed"
    if paired and len(candidate_ms) != len(incumbent_ms):
        return f"{len(candidate_ms)} candidate and {len(incumbent_ms)} incumbent samples were not taken in turns"
    return ""


def _resampled_medians(values: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    rows = max(1, min(resamples, _ELEMENTS_AT_ONCE // len(values)))
    parts = []
    for start in range(0, resamples, rows):
        picks = rng.integers(0, len(values), size=(min(rows, resamples - start), len(values)))
        parts.append(np.median(values[picks], axis=1))
    return np.concatenate(parts)


def _percentile_interval(estimates: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _finite(samples: ArrayLike) -> Floats:
    values = np.asarray(samples, dtype=np.float64).ravel()
    if not values.size or not np.all(np.isfinite(values)):
        raise ValueError(f"statistics need at least one sample, all finite, found {values.tolist()[:8]}")
    return values


def _positive_logs(samples: ArrayLike) -> Floats:
    values = _finite(samples)
    if not np.all(values > 0):
        raise ValueError(f"times must be positive, found {float(values.min())}")
    return np.asarray(np.log(values), dtype=np.float64)
