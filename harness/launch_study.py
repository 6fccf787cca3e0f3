"""What it is worth to search launch by launch: made-up operations of two launches, as large as a backward pass's space.

Each launch has five tunables, whose effects and interactions on its time are drawn; one in ten of its halves fails. Where the two
are fused, all of it takes longer or less by what is drawn, and longer the more the sizes of their tiles differ. Refuses to say
anything of a real kernel.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from harness.search import BATCH, make_strategy, open_study
from harness.space import Apart, Config, Param, Rule, Space
from harness.stats import bootstrap_mean

LAUNCHES = ("first", "second")
_TUNABLES: Mapping[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128), "block_n": (16, 32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3), "load": (0, 1),
}  # fmt: skip
# Spread of what one tunable does, and two of them together, to the logarithm of a time.
_ALONE, _PAIRS = 0.25, 0.15
# How many times longer both take where they are fused, least and most, and what each doubling of one tile against the other adds.
_FUSED, _UNLIKE = (0.9, 1.1), 0.05
AT = (20, 50, 100)


class Operation:
    """One made-up operation. `value_ms` is None for a config that fails; `launches_ms` is by kernel, where they are separate."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._times = {launch: _times(rng) for launch in LAUNCHES}
        self._apart_ms, self._fused = 0.05, float(rng.uniform(*_FUSED))
        params = [
            Param(f"{launch}_{name}", values, "made up") for launch in LAUNCHES for name, values in _TUNABLES.items()
        ]
        # What fits says the space, as registers and shared memory do.
        fits = [Rule(f"{launch}_fits", "too large a tile", _fits(launch)) for launch in LAUNCHES]
        alike = Rule(
            "fused_warps", "as many warps", lambda one: not one["fused"] or one["first_warps"] == one["second_warps"]
        )
        self.space = Space(
            params=(*params, Param("fused", (0, 1), "made up")), rules=(*fits, alike),
            apart=Apart(
                when={"fused": 0}, kernels={launch: (f"{launch}_kernel",) for launch in LAUNCHES},
                tunables={launch: tuple(f"{launch}_{name}" for name in _TUNABLES) for launch in LAUNCHES},
            ),
        )  # fmt: skip
        self.best_ms = min(value for config in self.space.legal if (value := self.value_ms(config)) is not None)

    def launches_ms(self, config: Config) -> dict[str, float] | None:
        found = {launch: self._times[launch][_half(config, launch)] for launch in LAUNCHES}
        if any(time is None for time in found.values()):
            return None
        return {f"{launch}_kernel": time for launch, time in found.items() if time is not None}

    def value_ms(self, config: Config) -> float | None:
        alone = self.launches_ms(config)
        if alone is None:
            return None
        if not config["fused"]:
            return sum(alone.values()) + self._apart_ms
        # Both have the registers of the hungrier.
        sizes = [np.log2(int(config[f"{launch}_block_m"]) * int(config[f"{launch}_block_n"])) for launch in LAUNCHES]
        return sum(alone.values()) * (self._fused + _UNLIKE * abs(float(sizes[0] - sizes[1])))


def _half(config: Mapping[str, Any], launch: str) -> tuple[int, ...]:
    return tuple(int(config[f"{launch}_{name}"]) for name in _TUNABLES)


def _fits(launch: str) -> Any:
    return lambda config: (
        int(config[f"{launch}_block_m"]) * int(config[f"{launch}_block_n"])
        <= 2048 * int(config[f"{launch}_warps"]) // 4
    )


def _times(rng: np.random.Generator) -> dict[tuple[int, ...], float | None]:
    """Milliseconds of one launch by its half of a config; None for those that fail."""
    sizes = [len(values) for values in _TUNABLES.values()]
    alone = [rng.normal(0, _ALONE, size) for size in sizes]
    pairs = {
        pair: rng.normal(0, _PAIRS, (sizes[pair[0]], sizes[pair[1]]))
        for pair in itertools.combinations(range(len(sizes)), 2)
    }
    found: dict[tuple[int, ...], float | None] = {}
    for places in itertools.product(*map(range, sizes)):
        log = sum(effect[place] for effect, place in zip(alone, places, strict=True))
        log += sum(effect[places[one], places[other]] for (one, other), effect in pairs.items())
        values = tuple(each[place] for each, place in zip(_TUNABLES.values(), places, strict=True))
        found[values] = None if rng.random() < 0.1 else float(np.exp(log))
    return found


def search(operation: Operation, *, trials: int, seed: int, together: bool) -> list[float]:
    """The fraction of the optimum after each trial; `together` searches the whole as one, and never hears of single launches."""
    space = replace(operation.space, apart=None) if together else operation.space
    strategy: Any = make_strategy("gp", space, None, study=open_study("launches"), seed=seed)
    best, fractions = np.inf, []
    while len(fractions) < trials:
        for config in strategy.ask(min(BATCH, trials - len(fractions))):
            value, alone = operation.value_ms(config), operation.launches_ms(config)
            if value is not None and alone is not None and not config["fused"]:
                strategy.tell_launches(config, alone)
            strategy.tell(config, value)
            best = min(best, np.inf if value is None else value)
            fractions.append(operation.best_ms / best)
    return fractions


def study_launches(*, runs: int, trials: int, seed: int) -> dict[str, Any]:
    """Both searches on the same made-up operations, one of them a run."""
    found: dict[str, list[list[float]]] = {"together": [], "launch by launch": []}
    legal = 0
    for run in range(runs):
        operation = Operation(np.random.default_rng([seed, run]))
        legal = len(operation.space.legal)
        for name, several in found.items():
            several.append(search(operation, trials=trials, seed=run, together=name == "together"))
    return {"legal": legal, "runs": runs} | {name: _summary(np.array(several), seed) for name, several in found.items()}


def _summary(fractions: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    at = [count for count in AT if count <= fractions.shape[1]]
    intervals = {str(count): bootstrap_mean(list(fractions[:, count - 1]), rng=rng) for count in at}
    return {
        "fraction_at": {str(count): round(float(fractions[:, count - 1].mean()), 4) for count in at},
        "interval_at": {count: [round(one.low, 4), round(one.high, 4)] for count, one in intervals.items()},
        "trials_to_095": _trials_to(fractions, 0.95), "trials_to_099": _trials_to(fractions, 0.99),
    }  # fmt: skip


def _trials_to(fractions: Any, line: float) -> dict[str, Any]:
    """The median of trials until a fraction was reached, those that never did counting as beyond all; and how many did."""
    reached = (fractions >= line).any(1)
    first = np.where(reached, (fractions >= line).argmax(1) + 1, np.inf)
    median = float(np.median(first))
    return {"median": median if np.isfinite(median) else None, "reached": int(reached.sum())}
