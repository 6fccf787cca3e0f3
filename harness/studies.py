"""What a selection is worth, found out where the truth is known: whole tunes on simulated devices.

`python -m harness.studies selection`, `same`, `overhead`, `launches`, `fleet`; each prints one JSON document. The tunes are the
tuner's own, on a clock that is made up. Refuses to say anything of a real device: its noise may be of another kind.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.ahead import InOrder
from harness.fleet_study import Scene, study_fleet
from harness.landscape import Landscape, landscapes
from harness.launch_study import study_launches
from harness.outcome import Measured
from harness.problem import parse_problem
from harness.replayed import default_of
from harness.search import DEFAULT_STRATEGY, make_strategy, open_study
from harness.shared import shown_url
from harness.simulated import SimulatedDevice, SimulatedRunner, normal
from harness.space import Config, Param, Space
from harness.stats import bootstrap_mean
from harness.store import open_memory_journal
from harness.tune import Budget, Settled, Task, tune

_PROBLEM = parse_problem("b1 h1 s64 d32 fp16")
# A search ends among good configs: half of what it tries is of the best tenth.
_NEAR = 0.1
_TYPICAL_MS = 1.0
_COMPILE_S = 0.7
_FLUSH_MS = 0.1
# A clock that falls by 8 % while the device warms up, half of it within 20 seconds.
_DRIFT, _WARM_S = 0.08, 20.0
Scenario = Callable[[np.random.Generator], SimulatedDevice]


Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Times:
    """True times of a space's configs, in milliseconds of whatever device, and the seconds that each took to compile."""

    times_ms: Floats
    compile_s: Floats


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one simulated tune chose. Regrets are true times over the best true time among what was tried, less 1: of its
    champion, and of whoever looked fastest in the screening. `reported` is the champion's reported time over its true one."""

    regret: float
    screened: float
    reported: float
    verdict: str
    device_s: float
    rounds: int


def steady(noise: float) -> Scenario:
    """A device with nothing but independent noise."""
    return lambda rng: SimulatedDevice(rng, noise=normal(noise), flush_ms=_FLUSH_MS)


def drifting(noise: float) -> Scenario:
    """A device that also gets slower as it gets warm: what is timed later seems worse."""

    def slower(seconds: float) -> float:
        return 1.0 + _DRIFT * (1.0 - math.exp(-seconds * math.log(2) / _WARM_S))

    return lambda rng: SimulatedDevice(rng, noise=normal(noise), flush_ms=_FLUSH_MS, drift=slower)


def synthetic(rng: np.random.Generator, count: int = 1000) -> Times:
    """A made-up space: a few factors, each with a best value, and roughness; from crowded at the top to sparse. Compile times are
    as those of the recorded spaces."""
    factors = rng.integers(3, 7)
    steps = rng.integers(0, 5, size=(count, factors))
    weights = np.exp(rng.uniform(np.log(0.005), np.log(0.2))) * rng.lognormal(0, 1.0, size=factors)
    times = np.exp((steps * weights).sum(1) + rng.normal(0, 0.01, count))
    return Times(np.asarray(times, dtype=np.float64), _COMPILE_S * rng.lognormal(0, 0.3, count))


def recorded(folder: Path) -> dict[str, Times]:
    """All configs that ran, by space, of the recorded spaces in a folder. Raises `UsageError` if it has none."""
    found = {}
    for land in landscapes(folder):
        ran = [one for one in land.recordings.values() if one.time_ms is not None]
        found[land.name] = Times(np.array([one.time_ms for one in ran]), np.array([one.compile_s for one in ran]))
    return found


def simulate(
    costs: Sequence[float],
    scenario: Scenario,
    rng: np.random.Generator,
    strategy: type[InOrder] = InOrder,
    **runner: Any,
) -> tuple[Chosen, SimulatedRunner]:
    """One tune that tries all of `costs` (milliseconds), the first of which is the default's, on a device of `scenario`."""
    configs = [Config({"config": number}) for number in range(len(costs))]
    space = Space(params=(Param("config", tuple(range(len(costs))), "made up"),), rules=())
    order = [configs[0], *(configs[int(place)] for place in 1 + rng.permutation(len(costs) - 1))]
    made = SimulatedRunner(costs_ms=dict(zip(configs, costs, strict=True)), simulated=scenario(rng), **runner)
    task = Task(problem=_PROBLEM, space=space, default=configs[0], strategy=strategy(order))
    journal = open_memory_journal({})
    try:
        budget = Budget(trials=len(costs), now_s=made.now_s)
        *_, settled = tune(task, made, journal, budget=budget, seed=int(rng.integers(1 << 31)))
    finally:
        journal.close()
    assert isinstance(settled, Settled)
    return _chosen(settled, costs, made), made


def _chosen(settled: Settled, costs: Sequence[float], made: SimulatedRunner) -> Chosen:
    assert settled.champion is not None and settled.value_ms is not None
    best = min(costs)
    true = costs[int(settled.champion.config["config"])]
    timed = [one for one in settled.records if isinstance(one.outcome, Measured)]
    screened = min(timed, key=lambda one: one.outcome.value_ms)  # type: ignore[union-attr]
    drift = made.simulated._slower()
    return Chosen(
        regret=true / best - 1,
        screened=costs[int(screened.config["config"])] / best - 1,
        reported=settled.value_ms / (true * drift),
        verdict=settled.against_default.verdict if settled.against_default else "it is the default",
        device_s=made.device_ms / 1e3,
        rounds=settled.race.race.rounds if settled.race and settled.race.race else 0,
    )


def tried_by_a_search(given: Times, count: int, rng: np.random.Generator) -> Times:
    """`count` configs as a search would have tried them, the typical one scaled to a millisecond; the first, the default, is one
    of the better half."""
    order = np.argsort(given.times_ms)
    near = max(count, round(_NEAR * len(order)))
    default = rng.choice(order[: max(1, len(order) // 2)], 1)
    good = rng.choice(order[:near], count // 2, replace=False)
    any_ = rng.choice(order, count, replace=False)
    kept = np.array(list(dict.fromkeys([*default, *good, *any_]))[:count])
    return Times(given.times_ms[kept] * (_TYPICAL_MS / float(np.median(given.times_ms))), given.compile_s[kept])


def study_selection(
    spaces: Mapping[str, Times] | None, *, runs: int, trials: int, noise: float, seed: int
) -> dict[str, Any]:
    """Regret of the selection over many tunes, on recorded spaces or made-up ones, on a steady and a drifting device."""
    found: dict[str, Any] = {}
    for name, scenario in (("steady", steady(noise)), ("drifting", drifting(noise))):
        chosen = []
        for run in range(runs):
            rng = np.random.default_rng([seed, run, name == "drifting"])
            space = list(spaces.values())[run % len(spaces)] if spaces else synthetic(rng)
            chosen.append(simulate(list(tried_by_a_search(space, trials, rng).times_ms), scenario, rng)[0])
        found[name] = _summary(chosen, seed)
    return found


def _summary(chosen: Sequence[Chosen], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    regrets, screened = [one.regret for one in chosen], [one.screened for one in chosen]
    interval = bootstrap_mean(regrets, rng=rng)
    return {
        "runs": len(chosen),
        "regret_mean": float(np.mean(regrets)), "regret_mean_interval": [interval.low, interval.high],
        "regret_p95": float(np.percentile(regrets, 95)), "regret_max": max(regrets),
        "screened_regret_mean": float(np.mean(screened)), "screened_regret_p95": float(np.percentile(screened, 95)),
        "reported_over_true": float(np.mean([one.reported for one in chosen])),
        "verdicts": {word: sum(one.verdict == word for one in chosen) for word in sorted({one.verdict for one in chosen})},
        "device_s_mean": float(np.mean([one.device_s for one in chosen])),
        "rounds_median": float(np.median([one.rounds for one in chosen])),
    }  # fmt: skip


def study_same(*, runs: int, noise: float, seed: int) -> dict[str, Any]:
    """A/A: how often a kernel is called faster than itself."""
    found = {}
    for name, scenario in (("steady", steady(noise)), ("drifting", drifting(noise))):
        verdicts = [
            simulate([1.0, 1.0], scenario, np.random.default_rng([seed, run, name == "drifting"]))[0].verdict
            for run in range(runs)
        ]
        found[name] = {
            "runs": runs,
            "called_faster": verdicts.count("faster"),
            "share": verdicts.count("faster") / runs,
        }
    return found


def study_overhead(
    spaces: Mapping[str, Times] | None,
    *,
    trials: int,
    verify_ms: float,
    jobs: int,
    seed: int,
    lands: Sequence[Landscape] = (),
) -> dict[str, Any]:
    """What the harness adds to the time that the device works: waiting for compilers on the simulated clock, and its own work on
    the real one, by space; with a strategy that foresees what it asks for, with one that does not, and (`searched`, in `lands`)
    with the default strategy, which foresees some."""
    found: dict[str, Any] = {}
    rng = np.random.default_rng(seed)
    for name, space in (spaces or {"made up": synthetic(rng)}).items():
        tried = tried_by_a_search(space, trials, rng)
        found[name] = {
            word: _overhead(tried, verify_ms, jobs, seed, strategy)
            for word, strategy in (("foreseen", InOrder), ("unforeseen", _Blind))
        }
    for land in lands:
        found.setdefault(land.name, {})["searched"] = _searched(land, trials, verify_ms, jobs, seed)
    return found


def _searched(land: Landscape, trials: int, verify_ms: float, jobs: int, seed: int) -> dict[str, float]:
    """The same of a tune of a recorded space by the default strategy, the typical config scaled to a millisecond. `compilers_s`
    is what the compiling of what was tried takes `jobs` compilers at least."""
    times = {config: found.time_ms for config, found in land.recordings.items()}
    scale = _TYPICAL_MS / float(np.median([one for one in times.values() if one is not None]))
    rng = np.random.default_rng(seed)
    made = SimulatedRunner(
        costs_ms={config: None if one is None else one * scale for config, one in times.items()},
        simulated=steady(0.005)(rng), compile_s=lambda config: land.recordings[config].compile_s, verify_ms=verify_ms,
        jobs=jobs,
    )  # fmt: skip
    default = default_of(land)
    strategy = make_strategy(DEFAULT_STRATEGY, land.space, default, study=open_study("overhead"), seed=seed)
    task = Task(problem=_PROBLEM, space=land.space, default=default, strategy=strategy)
    began = time.process_time()
    with contextlib.closing(open_memory_journal({})) as journal:
        *_, settled = tune(task, made, journal, budget=Budget(trials=trials, now_s=made.now_s), seed=seed)
    assert isinstance(settled, Settled)
    compiling_s = sum(land.recordings[Config(one.config)].compile_s for one in settled.records) / jobs
    return {**_added(made, time.process_time() - began), "compilers_s": compiling_s}


class _Blind(InOrder):
    """Does not know what comes."""

    def likely(self, count: int) -> list[Config]:
        return []


def _overhead(tried: Times, verify_ms: float, jobs: int, seed: int, strategy: type[InOrder]) -> dict[str, float]:
    def compiling(config: Config) -> float:
        return float(tried.compile_s[int(config["config"])])

    began = time.process_time()
    rng = np.random.default_rng(seed)
    costs = [float(cost) for cost in tried.times_ms]
    _, made = simulate(costs, steady(0.005), rng, strategy, compile_s=compiling, verify_ms=verify_ms, jobs=jobs)
    return _added(made, time.process_time() - began)


def _added(made: SimulatedRunner, own_s: float) -> dict[str, float]:
    busy_s = made.device_ms / 1e3
    waiting_s = made.now_s() - busy_s
    return {
        "device_s": busy_s, "waiting_s": waiting_s, "own_s": own_s, "added": (waiting_s + own_s) / busy_s,
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.studies", description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    launches = kinds.add_parser("launches")
    launches.add_argument("--runs", type=int, default=20)
    launches.add_argument("--trials", type=int, default=100)
    for kind, runs in (("selection", 400), ("same", 1000)):
        one = kinds.add_parser(kind)
        one.add_argument("--runs", type=int, default=runs)
        one.add_argument("--noise", type=float, default=0.03, help="relative standard deviation of a sample")
    overhead = kinds.add_parser("overhead")
    for name, trials in (("selection", 60), ("overhead", 100)):
        kinds.choices[name].add_argument("--spaces", type=Path, help="a folder of Kernel Tuner caches")
        kinds.choices[name].add_argument("--trials", type=int, default=trials)
    overhead.add_argument("--verify-ms", type=float, default=270.0)
    overhead.add_argument("--jobs", type=int, default=14)
    several = kinds.add_parser("fleet")
    several.add_argument("--space", type=Path, required=True, help="a recorded space, which is the device")
    several.add_argument("--storage", required=True, help="postgresql://... or grpc://HOST:PORT")
    several.add_argument("--workers", type=lambda text: [int(one) for one in text.split(",")], default=[1, 2, 4])
    several.add_argument("--trials", type=int, default=100)
    several.add_argument("--kill-every-s", type=float, default=3.0)
    several.add_argument("--pace", type=float, default=0.1, help="real seconds for a recorded second")
    for one in kinds.choices.values():
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--out", type=Path, help="a file for the document, beside stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one study and print its document."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = vars(_parser().parse_args(given))
    kind, out = options.pop("kind"), options.pop("out")
    if kind == "same":
        found = study_same(**options)
    elif kind == "launches":
        found = study_launches(**options)
    elif kind == "fleet":
        with tempfile.TemporaryDirectory() as folder:
            workers = options.pop("workers")
            found = study_fleet(Scene(folder=Path(folder), **options), workers)
    else:
        folder = options.pop("spaces")
        spaces = recorded(folder) if folder else None
        if kind == "selection":
            found = study_selection(spaces, **options)
        else:
            found = study_overhead(spaces, lands=landscapes(folder) if folder else (), **options)
    shown = [shown_url(word) if "://" in word else Path(word).name if word.startswith("/") else word for word in given]
    document = json.dumps({"command": f"python -m harness.studies {' '.join(shown)}", "results": found}, indent=1)
    sys.stdout.write(document + "\n")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(document + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
