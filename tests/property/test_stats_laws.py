"""Laws that hold for all samples, and how often a kernel raced against itself wins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.stats import Interval, bootstrap_median, compare, mad, median, median_interval, outliers

TIMES = st.floats(min_value=1e-3, max_value=1e4)
SEEDS = st.integers(0, 2**32 - 1)
PAIRS = st.lists(st.tuples(TIMES, TIMES), min_size=8, max_size=24).map(lambda pairs: tuple(zip(*pairs, strict=True)))
CLOSE_TIMES = st.floats(min_value=0.9, max_value=1.1)
CLOSE_PAIRS = st.lists(st.tuples(CLOSE_TIMES, CLOSE_TIMES), min_size=8, max_size=24).map(
    lambda pairs: tuple(zip(*pairs, strict=True))
)
POWERS = st.integers(-10, 10).map(lambda exponent: 2.0**exponent)


@given(PAIRS | CLOSE_PAIRS, SEEDS, SEEDS, st.booleans())
def test_two_kernels_are_never_both_faster(pairs, seed, other, paired):
    a, b = pairs
    forth = compare(a, b, rng=np.random.default_rng(seed), paired=paired)
    back = compare(b, a, rng=np.random.default_rng(other), paired=paired)
    assert {forth.verdict, back.verdict} not in ({"faster"}, {"slower"})


@given(PAIRS, SEEDS, POWERS, st.booleans())
def test_the_unit_of_time_does_not_matter(pairs, seed, factor, paired):
    a, b = pairs
    plain = compare(a, b, rng=np.random.default_rng(seed), paired=paired)
    scaled = compare([factor * x for x in a], [factor * x for x in b], rng=np.random.default_rng(seed), paired=paired)
    assert scaled.ratio == pytest.approx(plain.ratio, rel=1e-12)
    if paired:  # the quotients of the pairs are the very same numbers
        assert scaled == plain


@given(PAIRS, SEEDS)
def test_faster_means_ratio_and_interval_below_one(pairs, seed):
    told = compare(*pairs, rng=np.random.default_rng(seed))
    assert told.interval.low <= told.interval.high
    if told.verdict == "faster":
        assert told.ratio < 1
        assert told.interval.high < 1
        assert told.wins * 2 > told.pairs
    if told.verdict == "slower":
        assert told.interval.low > 1


@given(st.lists(TIMES, min_size=1, max_size=30), SEEDS)
def test_intervals_hold_samples_and_statistics_forget_their_order(samples, seed):
    shuffled = np.random.default_rng(seed).permutation(samples)
    assert median(samples) == median(shuffled)
    assert mad(samples) == mad(shuffled)
    assert median_interval(samples) == median_interval(shuffled)
    assert sorted(samples[i] for i in outliers(samples)) == sorted(shuffled[i] for i in outliers(shuffled))
    interval = bootstrap_median(samples, rng=np.random.default_rng(seed), resamples=50)
    assert min(samples) <= interval.low <= interval.high <= max(samples)
    exact = median_interval(samples)
    assert exact is None or median(samples) in Interval(exact.low, exact.high)


def _raced_against_itself(kind: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Times of one kernel that plays both parts, in turns of random order."""
    plain = rng.standard_normal(2 * count)
    moment = np.arange(2 * count)
    times = {
        "normal": 1 + 0.01 * plain,
        "heavy tails": 1 + 0.01 * np.abs(rng.standard_cauchy(2 * count)),
        "spikes": 1 + 0.002 * plain + (rng.random(2 * count) < 0.1) * rng.random(2 * count),
        "coarse clock": np.round((1 + 0.01 * plain) * 200) / 200,
        "drifting clock": (1 + 0.003 * plain) * np.linspace(1, 1.2, 2 * count),
        "two clock states": (1 + 0.002 * plain) * np.where((moment // (count // 3 + 1)) % 2, 1.15, 1.0),
        "second of a turn is slower": (1 + 0.003 * plain) * np.tile([1.0, 1.02], count),
    }[kind].reshape(count, 2)
    swapped = rng.random(count) < 0.5
    times[swapped] = times[swapped][:, ::-1]
    return times[:, 0], times[:, 1]


KINDS = (
    "normal",
    "heavy tails",
    "spikes",
    "coarse clock",
    "drifting clock",
    "two clock states",
    "second of a turn is slower",
)


@pytest.mark.parametrize("count", [8, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_raced_against_itself_is_seldom_faster(kind, count):
    rng = np.random.default_rng([KINDS.index(kind), count])
    races = 150
    verdicts = [compare(*_raced_against_itself(kind, count, rng), rng=rng).verdict for _ in range(races)]
    # At most 2.5 % are expected on each side; 5 % of 150 races is 7.
    assert verdicts.count("faster") <= 7
    assert verdicts.count("slower") <= 7


@pytest.mark.parametrize("kind", KINDS)
def test_five_percent_is_found_under_each_noise(kind):
    rng = np.random.default_rng([7, KINDS.index(kind)])
    found = 0
    for _ in range(20):
        candidate, incumbent = _raced_against_itself(kind, 40, rng)
        found += compare(0.95 * candidate, incumbent, rng=rng).verdict == "faster"
    assert found >= 18


@settings(max_examples=25)
@given(CLOSE_PAIRS, SEEDS)
def test_the_same_seed_says_the_same(pairs, seed):
    first, again = (compare(*pairs, rng=np.random.default_rng(seed)) for _ in range(2))
    assert first == again
