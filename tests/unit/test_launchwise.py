"""Searching launch by launch: what single trials say of each launch is put together, and confirmed as a whole."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harness.device import TARGETS
from harness.launch_study import Operation, search
from harness.outcome import Measured, Record, Samples, launches_ms
from harness.problem import parse_problem
from harness.search import make_strategy, open_study
from harness.space import Apart, Config, Param, Space
from harness.store import open_memory_journal
from harness.tune import Budget, Settled, Task, tune
from harness.workspace import find_workspace
from tests.fake_runner import FakeRunner

PROBLEM = parse_problem("b4 h32/8 s4096 d128 bf16 causal bwd")
BLOCKS = (16, 32, 64, 128, 256, 512)
SPACE = Space(
    params=(
        *(Param(f"{launch}_{name}", BLOCKS, "") for launch in ("one", "two") for name in ("m", "n")),
        Param("structure", ("separate", "fused"), ""),
    ),
    rules=(),
    apart=Apart(
        when={"structure": "separate"},
        kernels={"one": ("one_kernel",), "two": ("two_kernel", "more_of_two")},
        tunables={"one": ("one_m", "one_n"), "two": ("two_m", "two_n")},
    ),
)
DEFAULT = Config({"one_m": 16, "one_n": 16, "two_m": 16, "two_n": 16, "structure": "separate"})
BEST = Config({"one_m": 256, "one_n": 32, "two_m": 64, "two_n": 512, "structure": "separate"})


def parts(config: Mapping[str, Any]) -> dict[str, float]:
    def away(launch: str) -> float:
        return sum((np.log2(config[name]) - np.log2(BEST[name])) ** 2 for name in (f"{launch}_m", f"{launch}_n"))

    return {"one_kernel": 1 + 0.1 * away("one"), "two_kernel": 0.5 + 0.1 * away("two"), "more_of_two": 0.25}


def whole(config: Mapping[str, Any]) -> float:
    return sum(parts(config).values()) * (1.2 if config["structure"] == "fused" else 1.0)


def trials_until_best(space: Space, *, seed: int, told: bool) -> int:
    strategy: Any = make_strategy("gp", space, DEFAULT, study=open_study("test"), seed=seed)
    tried = 0
    while True:
        for config in strategy.ask(4):
            tried += 1
            if config == BEST:
                return tried
            if told and config["structure"] == "separate":
                strategy.tell_launches(config, parts(config))
            strategy.tell(config, whole(config))


def test_without_a_word_of_single_launches_it_is_the_joint_search() -> None:
    joint = trials_until_best(replace(SPACE, apart=None), seed=0, told=False)
    assert trials_until_best(SPACE, seed=0, told=False) == joint


def test_the_best_known_halves_are_proposed_next() -> None:
    strategy: Any = make_strategy("gp", SPACE, DEFAULT, study=open_study("test"), seed=1)
    told: list[Config] = []
    for _ in range(4):
        for config in strategy.ask(4):
            told.append(config)
            if config["structure"] == "separate":
                strategy.tell_launches(config, parts(config))
            strategy.tell(config, whole(config))
    apart = [config for config in told if config["structure"] == "separate"]
    best = [min(parts(one)[kernel] for one in apart) for kernel in ("one_kernel", "two_kernel")]
    next_ = strategy.ask(1)[0]
    known = any([parts(one)[kernel] for kernel in ("one_kernel", "two_kernel")] == best for one in told)
    assert known or [parts(next_)[kernel] for kernel in ("one_kernel", "two_kernel")] == best
    assert not known, "the seed is to be one in which no trial has both"


def test_made_up_operations_need_fewer_trials() -> None:
    at = 50
    fractions: dict[bool, list[float]] = {True: [], False: []}
    for seed in (0, 1, 2):
        operation = Operation(np.random.default_rng([7, seed]))
        for together, several in fractions.items():
            several.append(search(operation, trials=at, seed=seed, together=together)[-1])
    assert np.mean(fractions[False]) > np.mean(fractions[True])


@pytest.mark.parametrize("mode", ["measured", "estimated"])
def test_a_tune_tells_its_strategy_of_launches(mode: str) -> None:
    class Halves(FakeRunner):
        def value(self, problem, config, passed, *, incumbent, depth):
            found = super().value(problem, config, passed, incumbent=incumbent, depth=depth)()
            alone = parts(config) if config["structure"] == "separate" else {}
            if isinstance(found, Measured):
                beside = (whole(incumbent),) * 31 if incumbent else ()
                samples = Samples(times_ms=(whole(config),) * 31, incumbent_ms=beside, launches_ms=alone)
                return lambda: replace(found, samples=samples)
            return lambda: replace(found, estimate=replace(found.estimate, value_ms=whole(config), launches_ms=alone))

        def _times(self, problem, config):
            return (whole(config),) * 31

    told: dict[Config, Mapping[str, float]] = {}
    strategy: Any = make_strategy("gp", SPACE, DEFAULT, study=open_study("test"), seed=0)
    inner = strategy.tell_launches
    strategy.tell_launches = lambda config, alone: (told.update({config: alone}), inner(config, alone))
    journal = open_memory_journal({})
    task = Task(problem=PROBLEM, space=SPACE, default=DEFAULT, strategy=strategy)
    *_, settled = tune(task, Halves(mode), journal, budget=Budget(trials=70), seed=0)
    journal.close()
    assert isinstance(settled, Settled)
    assert settled.champion is not None
    assert Config(settled.champion.config) == BEST
    separate = [Config(one.config) for one in settled.records if one.config["structure"] == "separate"]
    assert set(told) == set(separate)
    for config, alone in told.items():
        assert sum(alone.values()) == pytest.approx(whole(config))
    assert all(
        isinstance(one, Record) and launches_ms(one.outcome) for one in settled.records if Config(one.config) in told
    )


def test_the_backward_space_says_which_launches_do_not_interact() -> None:
    workspace = find_workspace(None)
    space = workspace.load_space("flash_bwd").space(PROBLEM, TARGETS["h200"])
    assert space.apart is not None
    apart = {name for several in space.apart.tunables.values() for name in several}
    assert apart == {name for name in space.names if name.startswith(("dkdv_", "dq_"))}
    source = (workspace.root / "kernels" / "flash_bwd.py").read_text()
    for kernels in space.apart.kernels.values():
        assert all(f"def {kernel}(" in source for kernel in kernels)
    # Every half is legal with every other: no rule reads tunables of both launches where they are separate.
    rng = np.random.default_rng(0)
    separate = [config for config in space.legal if space.apart.holds(config)]
    legal = set(separate)
    for _ in range(300):
        one, other = (separate[int(place)] for place in rng.integers(len(separate), size=2))
        mixed = {name: (one if name in space.apart.tunables["dkdv"] else other)[name] for name in space.names}
        assert Config(mixed) in legal
