"""The whole tuner on a device that exists only here."""

from contextlib import closing
from pathlib import Path

import pytest

from harness import report
from harness.compare import Verdict
from harness.errors import JournalError
from harness.outcome import CompileFailed, Flaky, LaunchFailed, Proof, Pruned, TimedOut, Wrong
from harness.problem import parse_problem
from harness.search import make_strategy, open_study
from harness.space import Config, Param, Space
from harness.store import Journal, open_journal, open_memory_journal, read_journal
from harness.tune import Budget, Settled, Task, Tried, tune
from tests.fake_runner import FakeRunner, fake_artifact, fake_time_ms, wrong_proof, wrong_verdict

PROBLEM = parse_problem("b4 h32/8 s4096 d128 bf16 causal")
SPACE = Space(
    params=(
        Param("block_m", (16, 32, 64, 128), "rows"),
        Param("block_n", (16, 32, 64, 128), "columns"),
        Param("num_warps", (4, 8), "warps", interpreted=False),
    ),
    rules=(),
)
DEFAULT = Config({"block_m": 64, "block_n": 32, "num_warps": 4})
BEST = Config({"block_m": 128, "block_n": 64, "num_warps": 8})
EVERYTHING = Budget(trials=len(SPACE.legal))


def run(
    runner: FakeRunner, folder: Path, *, budget: Budget = EVERYTHING, strategy: str = "exhaustive", seed: int = 0
) -> tuple[list[Tried], Settled]:
    journal = open_journal(folder / "run.jsonl", {"test": 1})
    try:
        return collect(runner, journal, budget, strategy, seed)
    finally:
        journal.close()


def collect(
    runner: FakeRunner, journal: Journal, budget: Budget, strategy: str, seed: int
) -> tuple[list[Tried], Settled]:
    chosen = make_strategy(strategy, SPACE, DEFAULT, study=open_study("test"), seed=seed)
    task = Task(problem=PROBLEM, space=SPACE, default=DEFAULT, strategy=chosen)
    *tried, settled = tune(task, runner, journal, budget=budget, seed=seed)
    return tried, settled


@pytest.mark.parametrize("mode", ["measured", "estimated"])
def test_the_best_config_becomes_champion(tmp_path: Path, mode: str) -> None:
    tried, settled = run(FakeRunner(mode), tmp_path)
    assert len(tried) == len(SPACE.legal)
    assert Config(settled.champion.config) == BEST
    assert settled.outcomes == {mode: 32}
    assert settled.value_ms == pytest.approx(fake_time_ms(PROBLEM, BEST))
    assert Config(settled.default.config) == DEFAULT
    assert [tried[0].record.config, tried[0].again] == [dict(DEFAULT), False]


def test_a_champion_must_beat_the_default_in_fresh_samples(tmp_path: Path) -> None:
    _, settled = run(FakeRunner("measured", noise=0.01), tmp_path)
    assert settled.against_default.verdict == "faster"
    assert settled.final.role == "final"
    assert settled.final.beside == dict(DEFAULT)
    assert settled.value_ms == settled.final.outcome.samples.median_ms


def test_the_default_stays_when_noise_hides_the_difference(tmp_path: Path) -> None:
    # Every config is as fast as the default, so whichever looks best in the screening was only lucky.
    class Level(FakeRunner):
        def _times(self, problem, config):
            return tuple(1 + 0.05 * self._rng.standard_normal(31))

    _, settled = run(Level("measured"), tmp_path)
    assert settled.against_default.verdict == "cannot tell"
    assert Config(settled.champion.config) == DEFAULT


def test_a_resumed_run_repeats_nothing_and_ends_the_same(tmp_path: Path) -> None:
    first, settled = run(FakeRunner("measured", noise=0.01), tmp_path, strategy="tpe", budget=Budget(trials=20), seed=7)
    again = FakeRunner("measured", noise=0.01)
    second, resettled = run(again, tmp_path, strategy="tpe", budget=Budget(trials=20), seed=7)
    assert not again.calls
    assert all(tried.again for tried in second)
    assert [tried.record for tried in first] == [tried.record for tried in second]
    assert resettled == settled


def test_an_interrupted_run_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    whole, settled = run(FakeRunner("estimated"), tmp_path / "one", strategy="tpe", budget=Budget(trials=24), seed=3)
    runner = FakeRunner("estimated")
    journal = open_journal(tmp_path / "run.jsonl", {"test": 1})
    chosen = make_strategy("tpe", SPACE, DEFAULT, study=open_study("test"), seed=3)
    events = tune(
        Task(problem=PROBLEM, space=SPACE, default=DEFAULT, strategy=chosen),
        runner,
        journal,
        budget=Budget(trials=24),
        seed=3,
    )
    for _ in range(10):
        next(events)
    events.close()
    journal.close()
    runner = FakeRunner("estimated")
    continued, resettled = run(runner, tmp_path, strategy="tpe", budget=Budget(trials=24), seed=3)
    assert sum(tried.again for tried in continued) == 10
    assert runner.calls["compile"] == 14
    assert [tried.record.config for tried in continued] == [tried.record.config for tried in whole]
    assert resettled.champion.config == settled.champion.config


def test_equal_machine_code_is_judged_and_timed_once(tmp_path: Path) -> None:
    # Warps make no difference to the code here.
    same = {"compile": lambda problem, config: fake_artifact(config.restricted(["block_m", "block_n"]))}
    runner = FakeRunner("measured", scripts=same)
    tried, _ = run(runner, tmp_path)
    assert runner.calls["value screen"] == 16
    twins = [one.record for one in tried if one.record.same_code_as is not None]
    assert len(twins) == 16
    for twin in twins:
        original = tried[twin.same_code_as].record
        assert twin.outcome == original.outcome
        assert {**twin.config, "num_warps": 0} == {**original.config, "num_warps": 0}


def test_the_interpreter_judges_candidates_that_it_cannot_tell_apart_once(tmp_path: Path) -> None:
    runner = FakeRunner("estimated")
    tried, _ = run(runner, tmp_path)
    assert runner.calls["verify"] == 16
    assert sum(one.record.shared_verdict for one in tried) == 16
    # The first of two that cannot be told apart was judged itself.
    assert not tried[0].record.shared_verdict
    device = FakeRunner("measured")
    (tmp_path / "device").mkdir()
    tried, _ = run(device, tmp_path / "device")
    assert device.calls["verify"] == 32
    assert not any(one.record.shared_verdict for one in tried)


@pytest.mark.parametrize("mode", ["measured", "estimated"])
@pytest.mark.parametrize(
    ("stage", "outcome", "kind"),
    [
        ("compile", CompileFailed(reason="PassManager::run failed"), "compile_failed"),
        ("compile", TimedOut(stage="compile", limit_s=60), "timed_out"),
        ("compile", fake_artifact({}, shared_bytes=300 << 10), "pruned"),
        ("compile", fake_artifact({}, spill_bytes=4096), "pruned"),
        ("verify", wrong_verdict(PROBLEM), "wrong"),
        ("verify", LaunchFailed(stage="verify", reason="illegal memory access"), "launch_failed"),
        ("verify", TimedOut(stage="verify", limit_s=60), "timed_out"),
        ("value", LaunchFailed(stage="measure", reason="out of resources"), "launch_failed"),
        ("value", TimedOut(stage="measure", limit_s=60), "timed_out"),
    ],
)
def test_every_failure_is_an_outcome_and_no_champion_comes_of_it(tmp_path: Path, mode, stage, outcome, kind) -> None:
    runner = FakeRunner(mode, scripts={stage: lambda problem, config: outcome if config["block_m"] == 128 else None})
    _, settled = run(runner, tmp_path)
    assert settled.outcomes[kind] == 8
    assert settled.champion.config["block_m"] != 128
    (tmp_path / "all").mkdir()
    _, settled = run(FakeRunner(mode, scripts={stage: lambda problem, config: outcome}), tmp_path / "all")
    assert settled.outcomes == {kind: 32}
    assert settled.champion is None
    assert settled.value_ms is None


def test_a_judge_that_cannot_tell_passes_nobody(tmp_path: Path) -> None:
    unsure = Verdict(
        status="unknown", where="device", oracle="fake", cases=(), seed=0, checks=(), detail="nothing was compared"
    )
    _, settled = run(FakeRunner("measured", scripts={"verify": lambda problem, config: unsure}), tmp_path)
    assert settled.champion is None
    assert all(isinstance(record.outcome, Flaky) for record in settled.records)


def test_a_wrong_default_leaves_the_best_right_candidate(tmp_path: Path) -> None:
    wrong = {"verify": lambda problem, config: wrong_verdict(problem, "device") if config == DEFAULT else None}
    _, settled = run(FakeRunner("measured", scripts=wrong), tmp_path)
    assert isinstance(settled.default.outcome, Wrong)
    assert Config(settled.champion.config) == BEST
    assert settled.against_default is None
    assert settled.final.beside is None


def test_a_winner_that_fails_when_measured_again_is_not_a_champion(tmp_path: Path) -> None:
    class Brittle(FakeRunner):
        def value(self, problem, config, passed, *, incumbent, depth):
            if depth == "final":
                return lambda: LaunchFailed(stage="measure", reason="illegal memory access")
            return super().value(problem, config, passed, incumbent=incumbent, depth=depth)

    _, settled = run(Brittle("measured"), tmp_path)
    assert Config(settled.champion.config) == DEFAULT
    assert "measuring the best again failed" in str(report.settled_lines(settled, "measured"))
    assert "replayed" not in str(report.settled_lines(settled, "measured"))
    # A failure to measure is not kept for ever: the next run measures again.
    _, settled = run(FakeRunner("measured"), tmp_path)
    assert Config(settled.champion.config) == BEST


def test_the_budget_is_kept(tmp_path: Path) -> None:
    tried, settled = run(FakeRunner("measured"), tmp_path, budget=Budget(trials=6))
    assert len(tried) == 6
    assert sum(settled.outcomes.values()) == 6
    (tmp_path / "none").mkdir()
    tried, settled = run(FakeRunner("measured"), tmp_path / "none", budget=Budget(seconds=0.0))
    assert not tried
    assert settled.champion is None
    assert isinstance(settled.default.outcome, Pruned)


def test_a_disk_that_fills_up_loses_the_trial_in_flight_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Journal.append

    def append(self: Journal, record) -> None:
        if len(self.records) == 5:
            raise JournalError("cannot write to the journal: No space left on device")
        real(self, record)

    journal = open_journal(tmp_path / "run.jsonl", {"test": 1})
    with monkeypatch.context() as full, pytest.raises(JournalError, match="No space left"):
        full.setattr(Journal, "append", append)
        collect(FakeRunner("measured"), journal, EVERYTHING, "exhaustive", 0)
    journal.close()
    assert len(read_journal(tmp_path / "run.jsonl")[1]) == 5
    _, settled = run(FakeRunner("measured"), tmp_path)
    assert Config(settled.champion.config) == BEST


def test_problems_are_not_mixed_in_one_journal(tmp_path: Path) -> None:
    _, settled = run(FakeRunner("estimated"), tmp_path)
    other = PROBLEM.replace(q_len=512, kv_len=512)
    journal = open_journal(tmp_path / "run.jsonl", {"test": 1})
    runner = FakeRunner("estimated")
    chosen = make_strategy("exhaustive", SPACE, DEFAULT, study=open_study("test"), seed=0)
    task = Task(problem=other, space=SPACE, default=DEFAULT, strategy=chosen)
    *_, resettled = tune(task, runner, journal, budget=EVERYTHING, seed=0)
    journal.close()
    assert runner.calls["compile"] == 32
    assert resettled.value_ms < settled.value_ms


def test_verdicts_carry_where_they_were_obtained(tmp_path: Path) -> None:
    _, settled = run(FakeRunner("estimated"), tmp_path)
    assert settled.champion.outcome.verdict.where == "interpreter"


# ---------------------------------------------------------------------------------------------------------------------
# Proof of finalists
# ---------------------------------------------------------------------------------------------------------------------


def refuting(*wrong: Config, answer: object = None) -> dict:
    def prove(problem, config):
        return (answer or wrong_proof()) if config in wrong else None

    return {"prove": prove}


@pytest.mark.parametrize("mode", ["measured", "estimated"])
def test_a_finalist_that_the_suite_refutes_is_no_champion_and_the_next_one_is(tmp_path: Path, mode: str) -> None:
    runner = FakeRunner(mode, scripts=refuting(BEST))
    _, settled = run(runner, tmp_path)
    assert Config(settled.champion.config) != BEST
    better = [config for config in SPACE.legal if fake_time_ms(PROBLEM, config) < settled.value_ms]
    assert better == [BEST]
    assert settled.proof.passed
    _, records = read_journal(tmp_path / "run.jsonl")
    first, second = (record for record in records if record.role == "proof")
    assert isinstance(first.outcome, Wrong)
    assert first.proof.counterexample == {"kernel": "fake"}
    assert second.proof.passed
    assert Config(second.config) == Config(settled.champion.config)
    assert any("shadow: store out of bounds" in failure.reason for failure in report.failures(records))


@pytest.mark.parametrize(
    "answer",
    [
        LaunchFailed(stage="prove", reason="the process was killed by SIGSEGV"),
        TimedOut(stage="prove", limit_s=600),
        Proof(
            status="unknown", where="interpreter", suite="s", seed=0, cases=0, oracles={}, largest={}, detail="refused"
        ),
    ],
    ids=["crash", "timeout", "unknown"],
)
def test_what_could_not_be_proved_is_no_champion(tmp_path: Path, answer: object) -> None:
    _, settled = run(FakeRunner("estimated", scripts=refuting(*SPACE.legal, answer=answer)), tmp_path)
    assert settled.champion is None
    assert settled.proof is None


def test_a_default_that_stays_must_be_proved_too(tmp_path: Path) -> None:
    class Level(FakeRunner):
        def _times(self, problem, config):
            return tuple(1 + 0.05 * self._rng.standard_normal(31))

    runner = Level("measured", scripts=refuting(DEFAULT))
    _, settled = run(runner, tmp_path)
    assert settled.against_default.verdict == "cannot tell"
    assert Config(settled.champion.config) != DEFAULT
    assert settled.proof.passed


def test_a_resumed_run_proves_nothing_again(tmp_path: Path) -> None:
    run(FakeRunner("estimated", scripts=refuting(BEST)), tmp_path)
    again = FakeRunner("estimated")
    _, settled = run(again, tmp_path)
    assert again.calls["prove"] == 0
    assert Config(settled.champion.config) != BEST


def test_a_proof_that_compared_nothing_cannot_pass() -> None:
    passed = {"status": "passed", "where": "device", "suite": "s", "seed": 0, "largest": {"out": 0.5}}
    Proof(**passed, cases=1, oracles={"bound": 1})
    for changes in ({"cases": 0, "oracles": {"bound": 1}}, {"cases": 1, "oracles": {"shadow": 1}}):
        with pytest.raises(ValueError, match="compared nothing"):
            Proof(**passed, **changes)
    with pytest.raises(ValueError, match="beyond its bound"):
        Proof(**{**passed, "largest": {"out": 1.5}}, cases=1, oracles={"bound": 1})
    with pytest.raises(ValueError, match="beyond its bound"):
        Proof(**{**passed, "largest": {"out": float("nan")}}, cases=1, oracles={"bound": 1})


# ---------------------------------------------------------------------------------------------------------------------
# The race of the finalists
# ---------------------------------------------------------------------------------------------------------------------


def test_finalists_and_the_default_race_and_the_race_is_kept(tmp_path: Path) -> None:
    runner = FakeRunner("measured", noise=0.001)
    _, settled = run(runner, tmp_path)
    race = settled.race.race
    assert len(race.entrants) == 9
    assert Config(race.entrants[0].config) == BEST
    assert dict(DEFAULT) in [dict(one.config) for one in race.entrants]
    again = FakeRunner("measured", noise=0.001)
    _, resettled = run(again, tmp_path)
    assert not again.calls
    assert resettled.race == settled.race


def test_an_estimate_never_races(tmp_path: Path) -> None:
    runner = FakeRunner("estimated")
    _, settled = run(runner, tmp_path)
    assert settled.race is None
    assert runner.calls["race"] == 0


def test_who_fails_when_the_race_fails_is_out_and_the_innocent_race_on(tmp_path: Path) -> None:
    class Brittle(FakeRunner):
        """The best runs in the screening, beside the default, and never again."""

        def value(self, problem, config, passed, *, incumbent, depth):
            if config == BEST and incumbent is None:
                return lambda: LaunchFailed(stage="measure", reason="illegal memory access")
            return super().value(problem, config, passed, incumbent=incumbent, depth=depth)

    def raced(problem, entrants):
        return LaunchFailed(stage="measure", reason="illegal memory access") if BEST in entrants else None

    _, settled = run(Brittle("measured", scripts={"race": raced}), tmp_path)
    race = settled.race.race
    assert Config(race.entrants[-1].config) == BEST
    assert race.entrants[-1].left == "failed when it was measured again"
    assert Config(settled.champion.config) not in (BEST, DEFAULT)
    assert settled.against_default.verdict == "faster"


def test_finalists_that_do_not_fit_together_race_in_fewer(tmp_path: Path) -> None:
    def raced(problem, entrants):
        return LaunchFailed(stage="measure", reason="out of memory") if len(entrants) > 3 else None

    _, settled = run(FakeRunner("measured", scripts={"race": raced}), tmp_path)
    race = settled.race.race
    assert [one.left for one in race.entrants].count("could not be measured beside the others") == 7
    assert Config(settled.champion.config) == BEST


def test_a_race_that_nobody_can_run_leaves_the_choice_to_the_screening(tmp_path: Path) -> None:
    never = {"race": lambda problem, entrants: TimedOut(stage="measure", limit_s=1)}
    _, settled = run(FakeRunner("measured", scripts=never), tmp_path)
    assert settled.race is None
    assert Config(settled.champion.config) == BEST


def test_a_clock_that_falls_during_the_screening_does_not_choose(tmp_path: Path) -> None:
    class Falling(FakeRunner):
        """Everything takes longer the later it is timed; what is timed in turns shares that."""

        slow = 1.0

        def value(self, problem, config, passed, *, incumbent, depth):
            self.slow *= 1.01
            return super().value(problem, config, passed, incumbent=incumbent, depth=depth)

        def _times(self, problem, config):
            return tuple(self.slow * time for time in super()._times(problem, config))

    _, settled = run(Falling("measured", noise=0.001), tmp_path)
    assert Config(settled.champion.config) == BEST
    scores = settled.scores_ms
    assert min(scores, key=scores.get) == BEST
    ratio = scores[BEST] / scores[DEFAULT]
    assert ratio == pytest.approx(fake_time_ms(PROBLEM, BEST) / fake_time_ms(PROBLEM, DEFAULT), rel=1e-2)


class Logged(FakeRunner):
    """Writes down when a compilation is begun, and when a candidate is measured."""

    def __init__(self, mode) -> None:
        super().__init__(mode)
        self.log: list[tuple[str, Config]] = []

    def compile(self, problem, config):
        self.log.append(("compile", config))
        return super().compile(problem, config)

    def value(self, problem, config, passed, *, incumbent, depth):
        self.log.append((f"value {depth}", config))
        return super().value(problem, config, passed, incumbent=incumbent, depth=depth)


def test_the_next_batch_compiles_while_one_is_measured_and_what_is_foreseen_too(tmp_path: Path) -> None:
    from harness.ahead import InOrder
    from harness.tune import AHEAD, BATCH, EXPECTED

    def begun_before_the_first_time(strategy) -> int:
        runner = Logged("measured")
        task = Task(problem=PROBLEM, space=SPACE, default=SPACE.legal[0], strategy=strategy)
        with closing(open_memory_journal({})) as journal:
            *tried, _ = tune(task, runner, journal, budget=EVERYTHING, seed=0)
        assert [Config(one.record.config) for one in tried] == list(SPACE.legal)
        assert runner.calls["compile"] == len(SPACE.legal)
        return [what for what, _ in runner.log].index("value screen")

    assert begun_before_the_first_time(InOrder(SPACE.legal)) == AHEAD * BATCH + EXPECTED
    chosen = make_strategy("exhaustive", SPACE, SPACE.legal[0], study=open_study("test"), seed=0)
    assert begun_before_the_first_time(chosen) == AHEAD * BATCH
