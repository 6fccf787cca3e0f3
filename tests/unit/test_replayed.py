"""Whole tunes on a recorded space, by the interface of a device."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.errors import UsageError
from harness.landscape import Recording
from harness.replay import resampled
from harness.replayed import STAND_IN, ReplayPlace, ReplayRunner, default_of
from harness.search import make_strategy, open_study
from harness.space import Config
from harness.store import open_memory_journal
from harness.tune import Budget, Settled, Task, tune
from harness.worker import Passed
from tests.unit.test_replay import landscape, written


def tuned(runner: ReplayRunner, *, trials: int, seed: int = 0) -> Settled:
    land = runner.land
    strategy = make_strategy("gp", land.space, default_of(land), study=open_study("test"), seed=seed)
    task = Task(problem=STAND_IN, space=land.space, default=default_of(land), strategy=strategy)
    journal = open_memory_journal({})
    try:
        *_, settled = tune(task, runner, journal, budget=Budget(trials=trials, now_s=runner.now_s), seed=seed)
    finally:
        journal.close()
    return settled


def test_a_tune_of_a_whole_recorded_space_ends_with_its_best() -> None:
    land = landscape()
    runner = ReplayRunner(land=land)
    settled = tuned(runner, trials=500)
    assert settled.value_ms == land.best_ms
    failed = sum(one.time_ms is None for one in land.recordings.values())
    assert settled.outcomes == {"launch_failed": failed, "measured": len(land.recordings) - failed}
    # Sixteen compile at a time, one runs: the device's time is at least what was recorded of it.
    recorded_s = sum(one.run_s for one in land.recordings.values())
    assert runner.busy_s >= recorded_s
    assert runner.now_s() < runner.busy_s + sum(one.compile_s for one in land.recordings.values()) / 4


def test_recorded_samples_are_the_noise() -> None:
    land = landscape()
    runner = ReplayRunner(land=land, noise=resampled, rng=np.random.default_rng(3))
    config = default_of(land)
    passed = Passed(runner.compile(STAND_IN, config)(), runner.verify(STAND_IN, config)())
    samples = runner.value(STAND_IN, config, passed, incumbent=config, depth="final")().samples
    assert set(samples.times_ms) == set(land.recordings[config].times_ms) == set(samples.incumbent_ms)
    settled = tuned(ReplayRunner(land=land, noise=resampled), trials=40)
    assert settled.champion is not None and settled.final is not None


def test_failures_are_what_they_were(tmp_path: Path) -> None:
    land = landscape()
    first, second, third, fourth, *_ = land.recordings
    words = {first: "CompilationFailedConfig", second: "InvalidConfig", third: "timeout", fourth: "correctness"}
    broken = {config: Recording(time_ms=None, failure=word, run_s=1.0) for config, word in words.items()}
    settled = tuned(ReplayRunner(land=replace(land, recordings={**land.recordings, **broken}, _space=[])), trials=500)
    kinds = {Config(one.config): one.outcome.kind for one in settled.records}
    assert [kinds[config] for config in words] == ["compile_failed", "pruned", "timed_out", "launch_failed"]
    with pytest.raises(UsageError, match="was not recorded"):
        ReplayRunner(land=land).compile(STAND_IN, Config({"tile": 7, "warps": 4, "stages": 1}))


def test_a_place_makes_its_runner_anywhere(tmp_path: Path) -> None:
    written(tmp_path / "made.json")
    runner = ReplayPlace(path=tmp_path / "made.json", device="fake")()
    assert runner.device.name == "fake"
    assert tuned(runner, trials=20).champion is not None
