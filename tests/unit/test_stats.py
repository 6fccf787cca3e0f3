"""What the statistics say of samples whose answer is known by hand."""

import math

import numpy as np
import pytest

from harness.stats import (
    FEWEST_SAMPLES,
    Interval,
    bootstrap_median,
    bootstrap_ratio,
    compare,
    mad,
    median,
    median_interval,
    outliers,
    percentile,
    sign_test,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def test_location_and_spread_of_known_samples():
    samples = [3.0, 1.0, 100.0, 2.0, 4.0]
    assert median(samples) == 3.0
    assert mad(samples) == 1.0
    assert percentile(samples, 25) == 2.0
    assert median([1.0, 2.0]) == 1.5


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
@pytest.mark.parametrize("statistic", [median, mad, outliers, median_interval])
def test_statistics_of_nothing_or_of_no_number_raise(statistic, samples):
    with pytest.raises(ValueError, match="at least one sample, all finite"):
        statistic(samples)


def test_exact_interval_takes_the_ranks_of_the_binomial_table():
    # Order statistics (2, 9) of 10 cover the median with 97.85 %, (3, 8) with only 89.06 %.
    samples = [float(value) for value in range(1, 11)]
    assert median_interval(samples) == Interval(2.0, 9.0)
    assert median_interval(samples, confidence=0.89) == Interval(3.0, 8.0)


def test_exact_interval_needs_six_samples_at_95_percent():
    assert median_interval([1.0] * 5) is None
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Interval(1.0, 6.0)


def test_exact_interval_of_thousands_of_samples_stays_finite_and_narrow(rng):
    interval = median_interval(rng.normal(10, 1, 5000))
    assert interval is not None
    assert median(np.random.default_rng(20).normal(10, 1, 5000)) in interval
    assert interval.width < 0.1


@pytest.mark.parametrize("count", [7, 20, 61])
def test_exact_interval_covers_the_median_as_often_as_it_says(rng, count):
    covered = sum(0.0 in median_interval(rng.standard_cauchy(count)) for _ in range(400))
    assert covered >= 0.92 * 400


def test_bootstrap_interval_covers_the_median_about_as_often_as_it_says(rng):
    covered = sum(1.0 in bootstrap_median(rng.normal(1, 0.1, 25), rng=rng, resamples=300) for _ in range(200))
    assert 0.88 * 200 <= covered <= 200


def test_paired_ratio_does_not_see_drift_that_both_share(rng):
    drift = np.linspace(1.0, 1.5, 40)
    candidate, incumbent = 0.9 * drift, 1.0 * drift
    ratio, interval = bootstrap_ratio(candidate, incumbent, rng=rng)
    assert ratio == pytest.approx(0.9)
    assert interval.width < 1e-9
    _, blind = bootstrap_ratio(candidate, incumbent, rng=rng, paired=False)
    assert blind.width > 0.1


def test_ratio_refuses_pairs_without_a_partner_and_times_that_are_none(rng):
    with pytest.raises(ValueError, match="equally many, found 2 and 1"):
        bootstrap_ratio([1.0, 2.0], [1.0], rng=rng)
    with pytest.raises(ValueError, match="positive"):
        bootstrap_ratio([1.0, 0.0], [1.0, 1.0], rng=rng)


def test_the_same_generator_gives_the_same_interval():
    samples = np.random.default_rng(1).normal(1, 0.1, 30)
    first, again = (bootstrap_median(samples, rng=np.random.default_rng(7)) for _ in range(2))
    assert first == again


def test_resampling_in_slices_is_resampling(rng, monkeypatch):
    samples = rng.normal(1, 0.1, 30)
    whole = bootstrap_median(samples, rng=np.random.default_rng(7))
    monkeypatch.setattr("harness.stats._ELEMENTS_AT_ONCE", 30 * 7)
    assert bootstrap_median(samples, rng=np.random.default_rng(7)) == whole


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(0, 0, 1.0), (5, 5, 1.0), (8, 0, 2 / 256), (0, 8, 2 / 256), (9, 1, 22 / 1024)]
)
def test_sign_test_gives_binomial_tails(wins, losses, p):
    assert sign_test(wins, losses) == p


def test_sign_test_of_thousands_of_turns_does_not_overflow():
    assert sign_test(3000, 2000) < 1e-40
    assert sign_test(2500, 2500) == 1.0


def test_outliers_are_marked_where_they_are():
    assert outliers([1.0, 1.01, 0.99, 5.0, 1.0, 1.02]) == (3,)
    assert outliers([1.0] * 9 + [2.0]) == (9,)
    assert outliers([1.0] * 5) == ()


@pytest.mark.parametrize(("factor", "verdict"), [(0.97, "faster"), (1.03, "slower")])
def test_a_real_difference_is_told_through_drift(rng, factor, verdict):
    drift = np.linspace(1.0, 1.3, 30)
    candidate = factor * drift * rng.normal(1, 0.005, 30)
    incumbent = drift * rng.normal(1, 0.005, 30)
    told = compare(candidate, incumbent, rng=rng)
    assert told.verdict == verdict
    assert told.ratio == pytest.approx(factor, abs=0.01)
    assert told.interval is not None
    assert factor in told.interval
    assert told.pairs == 30


def test_a_real_difference_is_told_of_samples_not_taken_in_turns(rng):
    told = compare(rng.normal(0.9, 0.01, 20), rng.normal(1, 0.01, 31), rng=rng, paired=False)
    assert (told.verdict, told.pairs) == ("faster", 0)


@pytest.mark.parametrize(
    ("candidate", "incumbent", "reason"),
    [
        ([1.0] * (FEWEST_SAMPLES - 1), [2.0] * 20, "7 candidate samples are too few, 8 are needed"),
        ([1.0] * 20, [], "0 incumbent samples are too few"),
        ([1.0] * 20, [2.0] * 19, "20 candidate and 19 incumbent samples were not taken in turns"),
        ([1.0] * 19 + [math.nan], [2.0] * 20, "a candidate sample is `nan`, which is no time"),
        ([1.0] * 20, [2.0] * 19 + [math.inf], "an incumbent sample is `inf`"),
        ([0.0] * 20, [2.0] * 20, "a candidate sample is `0.0`"),
    ],
)
def test_unusable_samples_cannot_tell_and_say_why(rng, candidate, incumbent, reason):
    told = compare(candidate, incumbent, rng=rng)
    assert told.verdict == "cannot tell"
    assert told.ratio is None
    assert told.interval is None
    assert reason.removeprefix("an ") in told.reason


def test_equal_samples_cannot_tell(rng):
    told = compare([1.0] * 50, [1.0] * 50, rng=rng)
    assert told.verdict == "cannot tell"
    assert told.ratio == 1.0


def test_a_single_dissenting_turn_of_eight_is_not_enough(rng):
    # The bootstrap alone would call this faster; seven of eight happens by chance in 7 % of races.
    candidate = [0.9] * 7 + [1.1]
    told = compare(candidate, [1.0] * 8, rng=rng)
    assert told.verdict == "cannot tell"
    assert "winning 7 and losing 1 turns happens by chance with probability 0.07" in told.reason
    assert compare([0.9] * 8, [1.0] * 8, rng=rng).verdict == "faster"
