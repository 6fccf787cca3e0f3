"""What a selection is worth, found out where the truth is known: whole tunes on simulated devices.

`python -m harness.studies selection`, `same` and `overhead`; each prints one JSON document. The tunes are the tuner's own, on a
clock that is made up. Refuses to say anything of a real device: its noise may be of another kind.
"""

import argparse
import gzip
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.ahead import InOrder
from harness.errors import UsageError
from harness.outcome import Measured
from harness.problem import parse_problem
from harness.simulated import SimulatedDevice, SimulatedRunner, normal
from harness.space import Config, Param, Space
from harness.stats import bootstrap_mean
from harness.store import open_memory_journal
from harness.tune import Budget, Settled, Task, tune

_PROBLEM = parse_problem("b1 h1 s64 d32 fp16")
# A search ends among good configs: half of what it tries is of the best tenth.
_NEAR = 0.1
_TYPICAL_MS = 1.0
_FLUSH_MS = 0.1
# A clock that falls by 8 % while the device warms up, half of it within 20 seconds.
_DRIFT, _WARM_S = 0.08, 20.0
# How a tune that stops at the end of its trials, and believes what it saw, would have chosen.
Scenario = Callable[[np.random.Generator], SimulatedDevice]


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


def synthetic(rng: np.random.Generator, count: int = 1000) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Times of a made-up space: a few factors, each with a best value, and roughness; from crowded at the top to sparse."""
    factors = rng.integers(3, 7)
    steps = rng.integers(0, 5, size=(count, factors))
    weights = np.exp(rng.uniform(np.log(0.005), np.log(0.2))) * rng.lognormal(0, 1.0, size=factors)
    return np.asarray(np.exp((steps * weights).sum(1) + rng.normal(0, 0.01, count)), dtype=np.float64)


def recorded(folder: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Times of all configs that ran, by space, of the Kernel Tuner caches in a folder. Raises `UsageError` if it has none."""
    found = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.json.gz")]):
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        try:
            document = json.loads(text)
        except ValueError:  # Kernel Tuner leaves the braces of a cache open
            document = json.loads(text.rstrip().rstrip(",") + "}}")
        if not isinstance(document, dict) or not isinstance(document.get("cache"), dict):
            continue
        times = [entry.get("time") for entry in document["cache"].values()]
        found[path.name.split(".")[0]] = np.array([t for t in times if isinstance(t, int | float)], dtype=np.float64)
    if not found:
        raise UsageError(
            f"no cache of Kernel Tuner is in {folder}", hint="leave `--spaces` out: made-up spaces are used"
        )
    return found


def simulate(costs: Sequence[float], scenario: Scenario, rng: np.random.Generator, **runner: Any) -> tuple[Chosen, Any]:
    """One tune that tries all of `costs` (milliseconds), the first of which is the default's, on a device of `scenario`."""
    configs = [Config({"config": number}) for number in range(len(costs))]
    space = Space(params=(Param("config", tuple(range(len(costs))), "made up"),), rules=())
    order = [configs[0], *(configs[int(place)] for place in 1 + rng.permutation(len(costs) - 1))]
    made = SimulatedRunner(costs_ms=dict(zip(configs, costs, strict=True)), simulated=scenario(rng), **runner)
    task = Task(problem=_PROBLEM, space=space, default=configs[0], strategy=InOrder(order))
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


def tried_by_a_search(times: np.ndarray[Any, Any], count: int, rng: np.random.Generator) -> list[float]:
    """Times of `count` configs as a search would have tried them, in milliseconds; the first, the default's, is one of the better
    half."""
    ordered = np.sort(times) * (_TYPICAL_MS / float(np.median(times)))
    near = max(count, round(_NEAR * len(ordered)))
    good = rng.choice(ordered[:near], count // 2, replace=False)
    default = rng.choice(ordered[: max(1, len(ordered) // 2)], 1)
    any_ = rng.choice(ordered, count - 1 - len(good), replace=False)
    return [float(t) for t in (*default, *good, *any_)]


def study_selection(
    spaces: Mapping[str, np.ndarray[Any, Any]] | None, *, runs: int, trials: int, noise: float, seed: int
) -> dict[str, Any]:
    """Regret of the selection over many tunes, on recorded spaces or made-up ones, on a steady and a drifting device."""
    found: dict[str, Any] = {}
    for name, scenario in (("steady", steady(noise)), ("drifting", drifting(noise))):
        chosen = []
        for run in range(runs):
            rng = np.random.default_rng([seed, run, name == "drifting"])
            times = list(spaces.values())[run % len(spaces)] if spaces else synthetic(rng)
            chosen.append(simulate(tried_by_a_search(times, trials, rng), scenario, rng)[0])
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


def study_overhead(*, trials: int, compile_s: float, verify_ms: float, jobs: int, seed: int) -> dict[str, Any]:
    """What the harness adds to the time that the device works: waiting for compilers on the simulated clock, and its own work on
    the real one."""
    rng = np.random.default_rng(seed)
    took: dict[Config, float] = {}

    def compiling(config: Config) -> float:
        return took.setdefault(config, compile_s * float(rng.lognormal(0, 0.4)))

    costs = tried_by_a_search(synthetic(rng), trials, rng)
    began = time.process_time()
    _, made = simulate(costs, steady(0.005), rng, compile_s=compiling, verify_ms=verify_ms, jobs=jobs)
    own_s = time.process_time() - began
    busy_s, wall_s = made.device_ms / 1e3, made.now_s()
    return {
        "trials": trials, "device_s": busy_s, "waiting_s": wall_s - busy_s, "own_s": own_s,
        "added": (wall_s - busy_s + own_s) / busy_s,
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.studies", description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, runs in (("selection", 400), ("same", 1000)):
        one = kinds.add_parser(kind)
        one.add_argument("--runs", type=int, default=runs)
        one.add_argument("--noise", type=float, default=0.03, help="relative standard deviation of a sample")
    kinds.choices["selection"].add_argument("--spaces", type=Path, help="a folder of Kernel Tuner caches")
    kinds.choices["selection"].add_argument("--trials", type=int, default=60)
    overhead = kinds.add_parser("overhead")
    overhead.add_argument("--trials", type=int, default=100)
    overhead.add_argument("--compile-s", type=float, default=2.0)
    overhead.add_argument("--verify-ms", type=float, default=300.0)
    overhead.add_argument("--jobs", type=int, default=8)
    for one in kinds.choices.values():
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--out", type=Path, help="a file for the document, beside stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one study and print its document."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = vars(_parser().parse_args(given))
    kind, out = options.pop("kind"), options.pop("out")
    if kind == "selection":
        folder = options.pop("spaces")
        spaces = recorded(folder) if folder else None
        found = study_selection(spaces, **options) | {"spaces": sorted(spaces) if spaces else "made up"}
    else:
        found = {"same": study_same, "overhead": study_overhead}[kind](**options)
    shown = [word if not word.startswith("/") else Path(word).name for word in given]
    document = json.dumps({"command": f"python -m harness.studies {' '.join(shown)}", "results": found}, indent=1)
    sys.stdout.write(document + "\n")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(document + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
