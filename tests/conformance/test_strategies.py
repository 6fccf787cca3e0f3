"""Every strategy keeps the same promises; a new one inherits these tests by being named in `STRATEGIES`."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from harness.errors import UsageError
from harness.search import STRATEGIES, UNLEARNED, make_strategy, open_study
from harness.space import Config, Param, Rule, Space
from harness.surrogate import Ensemble
from harness.untried import Untried

SPACE = Space(
    params=(
        Param("block_m", (16, 32, 64, 128, 256), "rows"),
        Param("block_n", (16, 32, 64, 128), "columns"),
        Param("num_warps", (1, 2, 4, 8), "warps"),
        Param("load", ("pointer", "tma"), "loads"),
        Param("fixed", (1,), "has one value"),
    ),
    rules=(Rule("area", "tiles up to 128 by 128", lambda config: config["block_m"] * config["block_n"] <= 128 * 128),),
)
DEFAULT = Config({"block_m": 32, "block_n": 32, "num_warps": 4, "load": "tma", "fixed": 1})


def cost(config: Config) -> float:
    distance = sum(
        abs(math.log2(config[name] / best)) for name, best in (("block_m", 128), ("block_n", 64), ("num_warps", 8))
    )
    return 1 + distance + (config["load"] == "pointer") / 2


def search(name: str, trials: int, *, seed: int, fails=lambda config: False) -> list[Config]:
    strategy = make_strategy(name, SPACE, DEFAULT, study=open_study("test"), seed=seed)
    asked: list[Config] = []
    while len(asked) < trials:
        batch = strategy.ask(min(4, trials - len(asked)))
        if not batch:
            break
        asked += batch
        for config in batch:
            strategy.tell(config, None if fails(config) else cost(config))
    return asked


@pytest.mark.parametrize("name", STRATEGIES)
def test_proposes_every_legal_config_once_then_nothing(name: str) -> None:
    asked = search(name, 10_000, seed=1)
    assert len(asked) == len(SPACE.legal)
    assert set(asked) == set(SPACE.legal)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_default_comes_first(name: str) -> None:
    assert search(name, 1, seed=1) == [DEFAULT]


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_seed_and_answers_give_the_same_proposals(name: str) -> None:
    assert search(name, 30, seed=5) == search(name, 30, seed=5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_lives_with_candidates_that_fail(name: str) -> None:
    assert len(set(search(name, 40, seed=2, fails=lambda config: config["load"] == "pointer"))) == 40


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - set(UNLEARNED)))
def test_beats_random_on_a_smooth_cost(name: str) -> None:
    def mean_best(strategy: str) -> float:
        return sum(min(map(cost, search(strategy, 24, seed=seed))) for seed in range(8)) / 8

    assert mean_best(name) < mean_best("random")


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - set(UNLEARNED)))
def test_what_is_expected_comes_first_and_is_not_believed(name: str) -> None:
    # One part of the past is right, one says the opposite, louder: all together are wrong.
    right = [math.log(cost(config)) for config in SPACE.legal]
    expected = np.array([right, [-2 * one for one in right]])
    study = open_study("test")
    strategy = make_strategy(name, SPACE, None, study=study, seed=0, expected=expected)
    asked = strategy.ask(4)
    costs = sorted(map(cost, SPACE.legal))
    assert [cost(config) for config in asked] == [costs[-1], costs[0], *sorted(costs[-3:-1], reverse=True)]
    for config in asked:
        strategy.tell(config, None)
    later = [config for _ in range(6) for config in strategy.ask(4)]
    assert len(set(later) | set(asked)) == 28


@pytest.mark.parametrize("name", ["ensemble", "gp", "forest", "lfbo"])
def test_what_is_likely_is_open_and_changes_nothing(name: str) -> None:
    asked = {}
    for looks in (False, True):
        strategy = make_strategy(name, SPACE, DEFAULT, study=open_study("test"), seed=4)
        tried: list[Config] = []
        hits = 0
        while len(tried) < 40:
            likely = strategy.likely(8) if looks else []
            batch = strategy.ask(4)
            assert not set(likely) & set(tried)
            assert len(set(likely)) == len(likely) <= 8
            hits += len(set(likely) & set(batch))
            tried += batch
            for config in batch:
                strategy.tell(config, cost(config))
        asked[looks] = tried
    assert asked[True] == asked[False]
    assert hits >= 4


def test_the_study_holds_every_trial(tmp_path: Path) -> None:
    storage = tmp_path / "study.log"
    strategy = make_strategy("random", SPACE, DEFAULT, study=open_study("s", storage), seed=3)
    asked = strategy.ask(3)
    for config, value in zip(asked, (2.0, None, 1.0), strict=True):
        strategy.tell(config, value)
    kept = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    study = optuna.load_study(study_name="s", storage=kept)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.best_value == 1.0
    assert study.trials[0].params == {"block_m": 1, "block_n": 1, "num_warps": 2, "load": 1, "fixed": 0}


def test_an_unknown_strategy_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="no search strategy is called `tpee`") as refused:
        make_strategy("tpee", SPACE, DEFAULT, study=open_study("test"), seed=0)
    assert refused.value.hint == "did you mean `tpe`?"


def test_an_ensemble_hears_its_first_model_alone_once_much_is_known() -> None:
    asked: list[str] = []

    class Member:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, untried: Untried, *_: object) -> int:
            asked.append(self.name)
            return int(np.flatnonzero(untried.is_open)[0])

    untried = Untried(SPACE)
    several: Any = Ensemble(*map(Member, "abc"))  # type: ignore[arg-type]
    for _ in range(80):
        untried.is_open[several(untried, None, None, None)] = False
    assert set(asked[:64]) == set("abc") and set(asked[64:]) == {"a"}
