"""Replayed searches, the models behind them, the past, and the rivals beside them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from harness.experience import expected_slowdown
from harness.forest import grow
from harness.gaussian import GaussianProcess
from harness.landscape import Landscape, Recording, read_landscapes
from harness.replay import exactly, follow, replay, resampled
from harness.rivals import PLAIN_TPE, PREFIX, rival
from harness.space import Config, Param

TILES, WARPS, STAGES = (16, 32, 64, 128, 256), (1, 2, 4, 8), (1, 2, 3, 4)


def time_of(tile: int, warps: int, stages: int, *, best: int = 64) -> float | None:
    if tile * stages > 512:
        return None
    apart = abs(np.log2(tile / best)) + abs(np.log2(warps / 4)) * (1 + (tile == 256)) + abs(stages - 2) / 2
    return float(1.0 + apart**1.5)


def landscape(path: Path = Path("none.json"), *, best: int = 64, name: str = "made") -> Landscape:
    names = ("tile", "warps", "stages")
    recordings = {
        Config(dict(zip(names, values, strict=True))): Recording(
            time_ms=(time := time_of(*values, best=best)), failure="" if time else "does not fit",
            times_ms=(0.9 * time, time, 1.2 * time) if time else (), compile_s=1.0, run_s=0.5 if time else 0.0,
        )
        for values in itertools.product(TILES, WARPS, STAGES)
    }  # fmt: skip
    params = tuple(Param(one, values, "") for one, values in zip(names, (TILES, WARPS, STAGES), strict=True))
    return Landscape(name=name, path=path, kernel="attend", device="here", params=params, recordings=recordings)


class Given:
    """A search that asks for given configs, as many as it is asked for at a time."""

    def __init__(self, configs: list[Config]) -> None:
        self.left, self.told = list(configs), []

    def ask(self, count: int) -> list[Config]:
        asked, self.left = self.left[:count], self.left[count:]
        return asked

    def tell(self, config: Config, value_ms: float | None) -> None:
        self.told.append(value_ms)


def test_a_search_hears_what_was_recorded_and_pays_for_its_trials() -> None:
    land = landscape()
    configs = [
        Config({"tile": tile, "warps": 4, "stages": stages}) for tile, stages in ((256, 4), (16, 2), (64, 2), (32, 2))
    ]
    search = Given(configs)
    found = follow(land, search, "given", budget=10, seed=0)
    assert search.told == [land.recordings[config].time_ms for config in configs]
    assert search.told[0] is None
    slow = land.recordings[configs[1]].time_ms
    assert found.fractions == (0.0, 1.0 / slow, 1.0, 1.0)
    assert found.seconds == (1.0, 2.5, 4.0, 5.5)
    assert found.fraction_at(2) == 1.0 / slow
    assert found.fraction_at(200) == 1.0
    with pytest.raises(KeyError):
        follow(land, Given([Config({"tile": 7, "warps": 4, "stages": 1})]), "given", budget=1, seed=0)


def test_under_noise_the_true_time_of_what_looked_best_counts() -> None:
    land = landscape()
    configs = [Config({"tile": 64, "warps": 4, "stages": 2}), Config({"tile": 64, "warps": 4, "stages": 1})]
    told = {configs[0]: 3.0, configs[1]: 2.0}
    noise = lambda recording, rng: next(value for config, value in told.items() if land.recordings[config] is recording)  # noqa: E731
    found = follow(land, Given(configs), "given", budget=2, seed=0, noise=noise)
    assert found.fractions == (1.0, 1.0 / land.recordings[configs[1]].time_ms)
    recording, rng = land.recordings[configs[0]], np.random.default_rng(0)
    assert {resampled(recording, rng) for _ in range(40)} == set(recording.times_ms)
    assert exactly(recording, rng) == recording.time_ms


def test_the_default_search_finds_the_best_of_a_smooth_space_sooner_than_chance() -> None:
    land = landscape()
    trials = [
        replay(land, name, budget=80, seed=seed).fractions.index(1.0) for name in ("gp", "random") for seed in range(6)
    ]
    assert np.mean(trials[:6]) < np.mean(trials[6:]) / 1.5
    assert replay(land, "gp", budget=500, seed=0).fractions[-1] == 1.0


def test_the_past_of_another_device_is_a_hint(tmp_path: Path) -> None:
    land, other = landscape(best=64), landscape(best=128, name="other")
    expected = expected_slowdown([other], land.space)
    assert expected is not None
    assert expected.shape == (1, len(land.space.legal))
    best = land.space.legal[int(np.argmin(expected))]
    assert dict(best) == {"tile": 128, "warps": 4, "stages": 2}
    # What failed there is no place to begin, and is not out of the question.
    worst = land.space.legal.index(Config({"tile": 256, "warps": 1, "stages": 4}))
    assert expected[0, worst] == expected.max()
    warm = [replay(land, "gp", budget=12, seed=seed, expected=expected).fraction_at(12) for seed in range(6)]
    cold = [replay(land, "gp", budget=12, seed=seed).fraction_at(12) for seed in range(6)]
    assert np.mean(warm) > np.mean(cold)
    fewer = Landscape(name="x", path=other.path, kernel="attend", device="", params=other.params[:1], recordings={})
    assert expected_slowdown([fewer], land.space) is None


def test_what_the_past_did_not_try_is_generalized() -> None:
    land, other = landscape(), landscape()
    some = dict(itertools.islice(other.recordings.items(), 0, None, 2))
    half = Landscape(name="half", path=other.path, kernel="attend", device="", params=other.params, recordings=some)
    expected = expected_slowdown([half], land.space)
    assert expected is not None
    times = np.array([np.nan if (time := land.recordings[one].time_ms) is None else time for one in land.space.legal])
    new = np.array([config not in some for config in land.space.legal]) & np.isfinite(times)
    assert np.corrcoef(expected[0, new], np.log(times[new]))[0, 1] > 0.9


def test_a_gaussian_process_learns_what_is_additive_and_is_unsure_far_away() -> None:
    rng = np.random.default_rng(1)
    points = rng.random((60, 3))
    targets = 3 * points[:, 0] + np.abs(points[:, 1] - 0.5)
    process = GaussianProcess(3)
    for _ in range(4):
        process.learn(points[:40], targets[:40], rng)
    mean, deviation = process.predict(points[40:])
    assert np.corrcoef(mean, targets[40:])[0, 1] > 0.95
    assert np.mean(np.abs(mean - targets[40:]) < 2.5 * deviation) > 0.8
    _, known = process.predict(points[:40])
    assert known.mean() < deviation.mean() / 2
    with pytest.raises(ValueError, match="nothing was learned"):
        GaussianProcess(1).predict(points[:, :1])


def test_a_forest_learns_steps() -> None:
    rng = np.random.default_rng(2)
    points = rng.random((200, 4))
    targets = np.where(points[:, 2] > 0.4, 2.0, 0.0) + (points[:, 0] > 0.7)
    mean, deviation = grow(points[:150], targets[:150], rng, trees=40).predict(points[150:])
    assert np.mean((mean - targets[150:]) ** 2) < np.var(targets) / 4
    assert (deviation >= 0).all()
    alone, _ = grow(points[:1], targets[:1], rng, trees=3).predict(points)
    assert (alone == targets[0]).all()


def written(path: Path) -> Landscape:
    land = landscape(path)
    entries = {
        ",".join(map(str, config.values())): dict(config) | {
            "time": "RuntimeFailedConfig" if one.time_ms is None else one.time_ms, "times": list(one.times_ms),
            "compile_time": 1000.0, "verification_time": 0, "benchmark_time": 500.0, "strategy_time": 0,
            "framework_time": 0, "timestamp": "2026-01-01 00:00:00",
        }
        for config, one in land.recordings.items()
    }  # fmt: skip
    names = [param.name for param in land.params]
    document = {
        "schema_version": "1.0.0", "device_name": "here", "kernel_name": "attend", "problem_size": [1],
        "tune_params_keys": names, "tune_params": {param.name: list(param.values) for param in land.params},
        "objective": "time", "cache": entries,
    }  # fmt: skip
    path.write_text(json.dumps(document))
    return read_landscapes(path)[0]


def test_kernel_tuner_searches_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("kernel_tuner", reason="Kernel Tuner is not installed: pip install 'flashtune[rivals]'")
    land = written(tmp_path / "made.json")
    found = rival(land, PREFIX + "genetic_algorithm", budget=30, seed=1)
    assert 20 <= len(found.fractions) <= 30
    assert found.fractions[-1] > 0.5
    assert list(found.fractions) == sorted(found.fractions)
    again = rival(land, PREFIX + "genetic_algorithm", budget=30, seed=1)
    assert again.fractions == found.fractions
    assert rival(land, PREFIX + "random_sample", budget=500, seed=0).fractions[-1] == 1.0


def test_plain_tpe_counts_legal_configs_once() -> None:
    land = landscape()
    legal = dict(itertools.islice(land.recordings.items(), 0, None, 3))
    third = Landscape(name="x", path=land.path, kernel="", device="", params=land.params, recordings=legal)
    found = rival(third, PLAIN_TPE, budget=20, seed=0)
    assert len(found.fractions) == 20
    assert found.seconds[-1] <= 30.0
