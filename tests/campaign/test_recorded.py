"""Recorded spaces on disk, and what an estimate is worth on them."""

import itertools
import json
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from harness import judging, recorded
from harness.errors import UsageError
from harness.outcome import CompileFailed, Measured, Record, Samples
from harness.problem import parse_problem
from harness.recorded import Header, Line, Recorded, read_recorded, write_recorded
from harness.space import Config, Param, Space
from tests.fake_runner import fake_artifact, passing_verdict

PROBLEM = parse_problem("b1 h8/2 s512 d64 bf16 causal")
SPACE = Space(params=(Param("block_m", (32, 64), "w"), Param("fast", (False, True), "w")), rules=())
HEADER = {
    "kernel": "flash_fwd", "problem": PROBLEM.key, "of": 4, "device": "h200", "arch": "sm_90",
    "default": Config({"block_m": 64, "fast": True}),
    "versions": {"triton": "3.6.0", "driver": None}, "runs": ({"began": "2026-01-01", "driver": "580.1"},),
}  # fmt: skip


def measured(trial: int, config: Config, time_ms: float, beside: float | None = None) -> Record:
    samples = Samples(
        times_ms=(time_ms, time_ms * 1.1, time_ms * 0.9), incumbent_ms=() if beside is None else (beside,) * 3,
        throttled=trial == 1,
    )  # fmt: skip
    outcome = Measured(verdict=passing_verdict(PROBLEM, "device"), samples=samples, artifact=fake_artifact(config))
    return Record(trial=trial, problem=PROBLEM.key, config=dict(config), outcome=outcome, seconds=0.5)


def records() -> list[Record]:
    found = [measured(0, SPACE.legal[3], 0.41234567), measured(1, SPACE.legal[0], 0.5, beside=0.4)]
    failed = CompileFailed(reason="LLVM gave up", log="a long log")
    return [*found, Record(trial=2, problem=PROBLEM.key, config=dict(SPACE.legal[1]), outcome=failed, seconds=2.0)]


def test_a_space_comes_back_as_it_was_written_and_says_what_is_missing(tmp_path: Path) -> None:
    found = recorded.record(SPACE, records(), header=HEADER, estimates={0: 0.3333333333})
    assert not found.header.complete and found.header.legal == 4
    path = write_recorded(tmp_path, "some", found)
    assert path.name == "some.jsonl" and read_recorded(path) == found
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["params"] == {"block_m": [32, 64], "fast": [False, True]} and lines[0]["default"] == [64, True]
    assert lines[1]["config"] == [64, True] and lines[1]["time_ms"] == 0.412346 and lines[1]["estimate_ms"] == 0.333333
    assert lines[1]["times_ms"] == [0.412346, 0.45358, 0.371111] and "beside_ms" not in lines[1]
    assert lines[2]["beside_ms"] == 0.4 and lines[2]["throttled"] is True and "estimate_ms" not in lines[2]
    # A config without a time has none, and a reason.
    assert lines[3] == {"config": [32, True], "outcome": "compile_failed", "seconds": 2.0, "reason": "LLVM gave up"}
    whole = [*records(), measured(3, SPACE.legal[2], 0.7)]
    assert recorded.record(SPACE, whole, header=HEADER).header.complete
    assert len(recorded.record(SPACE, whole, header=HEADER).measured) == 3


def test_a_large_space_is_compressed_and_equal_content_gives_equal_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "_PLAIN_BYTES", 100)
    found = recorded.record(SPACE, records(), header=HEADER)
    path = write_recorded(tmp_path, "some", found)
    first = path.read_bytes()
    assert path.name == "some.jsonl.gz" and read_recorded(path) == found
    assert write_recorded(tmp_path, "some", found).read_bytes() == first


def test_a_damaged_space_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_recorded(tmp_path, "some", recorded.record(SPACE, records(), header=HEADER))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1], lines[2].replace('"outcome"', '"outcme"')]))
    with pytest.raises(UsageError, match=r"is no recorded space: .* in line 3"):
        read_recorded(path)
    path.write_text("nothing")
    with pytest.raises(UsageError, match="in line 1"):
        read_recorded(path)


def space_of(times: list[float | None], estimates: list[float]) -> Recorded:
    lines = tuple(
        Line(
            config=(place,),
            outcome="wrong" if time is None else "measured",
            seconds=1.0,
            time_ms=time,
            estimate_ms=estimate,
        )
        for place, (time, estimate) in enumerate(zip(times, estimates, strict=True))
    )
    return Recorded(
        Header(
            format="flashtune recorded space", schema=1, kernel="k", problem="p", device="d", arch="a", legal=50, of=50,
            complete=False,
            params={"place": tuple(range(len(times)))}, default=(3,), versions={},
        ),
        lines,
    )  # fmt: skip


def test_an_estimate_in_the_right_order_has_no_regret_and_one_in_the_wrong_order_all_of_it() -> None:
    times: list[float | None] = [1.0 + 0.1 * place for place in range(24)]
    best = judging.judge_estimate(space_of(times, [2.0 * one for one in times if one]))
    assert best is not None and best.correlation == pytest.approx(1)
    assert best.regret == {1: 0.0, 5: 0.0, 10: 0.0}
    assert best.default_regret == pytest.approx(0.3)
    assert best.near == pytest.approx(1 / 24) and best.configs == 24 and best.legal == 50
    worst = judging.judge_estimate(space_of(times, [-one for one in times if one]))
    assert worst is not None and worst.correlation == pytest.approx(-1)
    assert worst.regret == pytest.approx({1: 2.3, 5: 1.9, 10: 1.4})
    assert best.random_regret == worst.random_regret


def test_configs_without_a_time_do_not_count_and_too_few_say_nothing() -> None:
    times: list[float | None] = [None, *(1.0 + place for place in range(24))]
    found = judging.judge_estimate(space_of(times, [0.1, *(1.0 + place for place in range(24))]))
    assert found is not None and found.configs == 24 and found.regret[1] == 0.0
    assert judging.judge_estimate(space_of(times[:20], [1.0] * 20)) is None


def test_the_expected_least_of_a_draw_is_the_mean_over_all_draws() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for count in range(1, 7):
        every = mean(min(draw) for draw in itertools.combinations(values, count))
        assert judging.expected_least(values, count) == pytest.approx(every)
    assert judging.expected_least(values, 20) == 1.0


def test_ranks_of_equal_values_are_shared() -> None:
    assert judging.rank_correlation([1, 2, 2, 3], [10, 20, 20, 30]) == pytest.approx(1)
    assert judging.rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert np.isnan(judging.rank_correlation([1, 1, 1], [1, 2, 3]))
