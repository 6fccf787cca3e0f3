"""Several problems in one tune: what was learnt on one is tried on the next, and few configs are sought that serve all.

Compiled code is shared by Triton's cache, whose key is the code. Refuses to trust: a config counts for a problem only with its
own gate and its own samples there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from harness.outcome import Measured, Record
from harness.portfolio import WITHIN, Portfolio, smallest_portfolio
from harness.quarantine import Quarantine
from harness.space import Config
from harness.stats import compare
from harness.store import Journal
from harness.trials import Trials
from harness.tune import Budget, Settled, Task, Tried, tune
from harness.worker import Runner

# Configs of other problems that are tried first, and the share of the trials that they may take.
SEEDS = 4
_SHARE = 4
# A config that was this much slower than the best on so many problems, and near it on none but its own, is a loser everywhere.
_LOST, _LOSSES = 1.1, 3
# What the screening puts farther behind a champion than this is not measured beside it: its noise is a few percent at most.
_HOPE = 1.05


def tune_all(
    tasks: Sequence[Task],
    runner: Runner,
    journal: Journal,
    *,
    budget: Budget,
    seed: int,
    quarantine: Quarantine | None = None,
) -> Iterator[Tried | Settled | Portfolio]:
    """Tune one problem after the other, yielding what `tune` yields, and after several problems a portfolio."""
    settled: list[Settled] = []
    for task in tasks:
        most = SEEDS if budget.trials is None else min(SEEDS, budget.trials // _SHARE)
        given = replace(task, first=seeds_for(task, settled, most))
        for event in tune(given, runner, journal, budget=budget, seed=seed, quarantine=quarantine):
            if isinstance(event, Settled):
                settled.append(event)
            yield event
    if len(settled) > 1:
        held = quarantine or Quarantine(None, {})
        ratios = {one.problem.key: _ratios(one, settled, runner, journal, held, seed) for one in settled}
        yield smallest_portfolio(ratios)


def seeds_for(task: Task, settled: Sequence[Settled], most: int) -> tuple[Config, ...]:
    """Configs that did well on other problems, best first: champions, who came close, but nobody who lost everywhere else."""
    legal = set(task.space.legal)
    ratios: dict[Config, list[float]] = {}
    homes = {Config(one.champion.config) for one in settled if one.champion is not None}
    for one in settled:
        best = min(one.scores_ms.values(), default=math.nan)
        for config, value in one.scores_ms.items():
            ratios.setdefault(config, []).append(value / best)
    ranked = []
    for config, found in ratios.items():
        lost = sum(ratio > _LOST for ratio in found)
        near = sum(ratio <= 1 + WITHIN for ratio in found) - (config in homes)
        if config in legal and config != task.default and not (lost >= _LOSSES and near <= 0):
            # What was tried on few problems is known less well: as if it had been a tenth slower once more.
            ranked.append(((sum(map(math.log, found)) + math.log(_LOST)) / (len(found) + 1), config))
    ranked.sort(key=lambda pair: pair[0])
    return tuple(config for _, config in ranked[:most])


def _ratios(
    one: Settled, settled: Sequence[Settled], runner: Runner, journal: Journal, quarantine: Quarantine, seed: int
) -> Mapping[Config, float]:
    """By config, how many times longer it takes on a problem than the champion there, at most."""
    if one.champion is None:
        return {}
    home = Config(one.champion.config)
    if runner.mode != "measured":
        best = one.scores_ms[home]
        return {config: max(value / best, 1.0) for config, value in one.scores_ms.items()}
    legal = set(one.space.legal)
    champions = [Config(other.champion.config) for other in settled if other.champion is not None]
    others = [config for config in dict.fromkeys(champions) if config in legal and config != home]
    trials = Trials(one.problem, one.space, runner, journal, quarantine)
    tried = list(trials.finish(trials.start([home, *others])))
    champion = tried[0][1]
    found = {home: 1.0}
    for config, record, _ in tried[1:]:
        ratio = _upper_ratio(trials, record, champion, seed)
        if ratio is not None:
            found[config] = ratio
    return found


def _upper_ratio(trials: Trials, record: Record, champion: Record, seed: int) -> float | None:
    """The upper end of the interval of a config's time over the champion's; None if it was far behind in the screening."""
    if not isinstance(record.outcome, Measured) or not isinstance(champion.outcome, Measured):
        return None
    if record.outcome.artifact.code_hash == champion.outcome.artifact.code_hash:
        return 1.0
    behind, ahead = trials.score_ms(record), trials.score_ms(champion)
    if behind is None or ahead is None or behind > _HOPE * ahead:
        return None
    fresh = trials.take_fresh(record, champion, "shared")
    if not isinstance(fresh.outcome, Measured):
        return None
    samples = fresh.outcome.samples
    interval = compare(samples.times_ms, samples.incumbent_ms, rng=np.random.default_rng(seed)).interval
    return interval.high if interval is not None else None
