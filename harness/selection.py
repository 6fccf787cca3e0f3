"""Which of the candidates that looked best is the best: who races, who is out, and what ends the race.

Pure functions of times. The screening measured every candidate beside the same one, at moments of its own; its ratios are free
of drift, but few, and the least of many noisy numbers is too good to be true. So the best of them race: one sample of each in
every round, in random order, until those who are surely slower are out and the rest cannot be told apart or time is up.
Refuses to say how fast the winner is: that takes samples that had no part in the choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.outcome import Entrant, Race, Samples
from harness.space import Config
from harness.stats import Interval, median, median_interval

# More finalists than this add rounds to the race, and nothing to its end: what the screening ranks below them is rarely the best.
FINALISTS = 8
# After so many rounds the race is looked at: rarely enough that chance gets few turns.
LOOKS = (16, 32, 64, 128, 256)
# Whoever is slower than the leader with this confidence, at a look, is out.
CONFIDENCE = 0.99
# What is not worth another round: a difference of a thousandth.
SLACK = 0.001


def relative(samples: Samples) -> float:
    """The typical ratio of a candidate's times to those of whom it was measured beside, pair by pair."""
    return median(np.asarray(samples.times_ms) / np.asarray(samples.incumbent_ms))


@dataclass(slots=True)
class Course:
    """A race that is going on. `times_ms` of each entrant grow by parts of a race, equally for all that are still in it."""

    entrants: list[Config]
    times_ms: dict[Config, list[float]] = field(default_factory=dict)
    left: dict[Config, str] = field(default_factory=dict)
    rounds: int = 0

    def __post_init__(self) -> None:
        self.times_ms = {config: [] for config in self.entrants}

    @property
    def running(self) -> list[Config]:
        return [config for config in self.entrants if config not in self.left]

    def add(self, part: Sequence[Samples]) -> None:
        """Take the next rounds of all that are running, in their order."""
        for config, samples in zip(self.running, part, strict=True):
            self.times_ms[config] += samples.times_ms
        self.rounds += len(part[0].times_ms)

    def drop(self, config: Config, why: str) -> None:
        self.left[config] = why

    def leader(self) -> Config:
        """Who is typically fastest in rounds, each taken against the mean of its round."""
        running = self.running
        logs = np.log([self.times_ms[config] for config in running])
        standing = np.median(logs - logs.mean(axis=0), axis=1)
        return running[int(np.argmin(standing))]

    def look(self) -> str:
        """Put out who is surely slower than the leader. Says in words why the race is decided, or nothing if it is not."""
        leader = self.leader()
        open_ = []
        for config in self.running:
            if config == leader:
                continue
            found = self._behind(config, leader)
            if found is not None and found.low > 1:
                self.drop(config, f"at least {(found.low - 1) * 100:.2g} % slower after {self.rounds} rounds")
            elif found is None or found.high > 1 + SLACK or found.low < 1 - SLACK:
                open_.append(config)
        if open_:
            return ""
        level = len(self.running) - 1
        return (
            "all others are slower" if not level else f"{level} cannot be told from the winner within {SLACK * 100:g} %"
        )

    def _behind(self, config: Config, leader: Config) -> Interval | None:
        """The interval of how many times longer a config takes than the leader."""
        ratios = np.asarray(self.times_ms[config]) / np.asarray(self.times_ms[leader])
        return median_interval(ratios, confidence=CONFIDENCE)

    def result(self, ended: str) -> Race:
        """The race as a value, the winner first, then who ran to the end, then those who left, the last ones first."""
        leader = self.leader()

        def behind(config: Config) -> tuple[bool, int, float]:
            times = self.times_ms[config]
            ratio = median(np.asarray(times) / np.asarray(self.times_ms[leader][: len(times)])) if times else np.inf
            return config in self.left, -len(times), ratio

        order = [leader, *sorted((config for config in self.entrants if config != leader), key=behind)]
        return Race(
            entrants=tuple(
                Entrant(config=dict(config), times_ms=tuple(self.times_ms[config]), left=self.left.get(config, ""))
                for config in order
            ),
            rounds=self.rounds,
            ended=ended,
        )
