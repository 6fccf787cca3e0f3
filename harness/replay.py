"""Replays: a strategy searches a recorded space, and is told what was recorded.

Refuses to judge by anything but what a tune would end with: the config that the strategy's own numbers call best.
"""

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from harness.landscape import Landscape, Recording
from harness.search import BATCH, Strategy, make_strategy, open_study

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One search. By trial: the fraction of the optimum that was reached, best recorded time over that of the config which looks
    best so far (0 until something ran), and `seconds`, what was recorded for compiling and running until then.
    `ms_per_trial` is what the strategy itself took."""

    space: str
    strategy: str
    seed: int
    fractions: tuple[float, ...]
    seconds: tuple[float, ...]
    ms_per_trial: float

    def fraction_at(self, trials: int) -> float:
        """After so many trials, or at the end of a space that has fewer."""
        return self.fractions[min(trials, len(self.fractions)) - 1] if self.fractions else 0.0


class Noise(Protocol):
    """What a measurement says of a config."""

    def __call__(self, recording: Recording, rng: np.random.Generator) -> float | None: ...


def exactly(recording: Recording, rng: np.random.Generator) -> float | None:
    """The recorded median, every time."""
    return recording.time_ms


def resampled(recording: Recording, rng: np.random.Generator) -> float | None:
    """One of the recorded runs, as a tuner that measures once would see it."""
    return float(rng.choice(recording.times_ms)) if recording.times_ms and recording.time_ms else recording.time_ms


def replay(
    land: Landscape, name: str, *, budget: int, seed: int, noise: Noise = exactly, expected: Floats | None = None
) -> Replayed:
    """Let the strategy `name` search `land` for `budget` trials as `tune` does: asked for a few at a time, and told of all of
    them before it is asked again."""
    study = open_study("replay")
    strategy = make_strategy(name, land.space, None, study=study, seed=seed, expected=expected)
    return follow(land, strategy, name, budget=budget, seed=seed, noise=noise)


def follow(
    land: Landscape, strategy: Strategy, name: str, *, budget: int, seed: int, noise: Noise = exactly
) -> Replayed:
    """`replay` with a strategy that was made already."""
    rng = np.random.default_rng((seed, 1))
    told, true, spent = np.inf, np.inf, 0.0
    fractions: list[float] = []
    seconds: list[float] = []
    while len(fractions) < budget:
        began = time.perf_counter()
        configs = strategy.ask(min(BATCH, budget - len(fractions)))
        spent += time.perf_counter() - began
        if not configs:
            break
        for config in configs:
            recording = land.recordings[config]
            seen = noise(recording, rng)
            began = time.perf_counter()
            strategy.tell(config, seen)
            spent += time.perf_counter() - began
            if seen is not None and recording.time_ms is not None and seen < told:
                told, true = seen, recording.time_ms
            fractions.append(land.best_ms / true)
            seconds.append(recording.compile_s + recording.run_s + (seconds[-1] if seconds else 0.0))
    return Replayed(
        space=land.name, strategy=name, seed=seed, fractions=tuple(fractions), seconds=tuple(seconds),
        ms_per_trial=1000 * spent / max(len(fractions), 1),
    )  # fmt: skip
