"""A runner that knows what will be asked: it compiles ahead, and gives up in words when its time is over.

One process judges and measures, many compile: without compiling ahead, most of them would wait for it. Refuses to run anything
itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

from harness.device import DeviceFacts
from harness.errors import OutOfTimeError
from harness.outcome import Mode, TimedOut
from harness.problem import Problem
from harness.space import Config
from harness.worker import Depth, Passed, Runner

# With less left, a limit that was hit was the end of the time and not the candidate's own.
_OVER_S = 1.0


class InOrder:
    """A strategy that asks for given configs one after the other, whatever becomes of them."""

    def __init__(self, configs: Sequence[Config]) -> None:
        self._left = list(configs)

    def ask(self, count: int) -> list[Config]:
        asked, self._left = self._left[:count], self._left[count:]
        return asked

    def likely(self, count: int) -> list[Config]:
        """What is asked for next."""
        return self._left[:count]

    def tell(self, config: Config, value_ms: float | None) -> None:
        """Nothing is learnt."""


class Ahead:
    """`runner`, with up to `depth` of the configs in `order` compiling at a time. `left` says how many seconds are left: once a
    stage was cut for lack of them, its wait raises `OutOfTimeError`, so that nothing false is written down."""

    def __init__(
        self, runner: Runner, problem: Problem, order: Sequence[Config], *, depth: int, left: Callable[[], float]
    ) -> None:
        self._runner = runner
        self._problem = problem
        self._order = iter(order)
        self._depth = depth
        self._left = left
        self._started: dict[Config, Callable[[], Any]] = {}

    @property
    def device(self) -> DeviceFacts:
        return self._runner.device

    @property
    def mode(self) -> Mode:
        return self._runner.mode

    def compile(self, problem: Problem, config: Config) -> Callable[[], Any]:
        while len(self._started) < self._depth:
            following = next(self._order, None)
            if following is None:
                break
            self._started.setdefault(following, self._runner.compile(self._problem, following))
        started = self._started.pop(config, None)
        return self._in_time(started or self._runner.compile(problem, config))

    def verify(self, problem: Problem, config: Config) -> Callable[[], Any]:
        return self._in_time(self._runner.verify(problem, config))

    def value(
        self, problem: Problem, config: Config, passed: Passed, *, incumbent: Config | None, depth: Depth
    ) -> Callable[[], Any]:
        return self._in_time(self._runner.value(problem, config, passed, incumbent=incumbent, depth=depth))

    def race(self, problem: Problem, entrants: Sequence[Config], *, rounds: int, turn: int) -> Callable[[], Any]:
        return self._in_time(self._runner.race(problem, entrants, rounds=rounds, turn=turn))

    def prove(self, problem: Problem, config: Config) -> Callable[[], Any]:
        return self._in_time(self._runner.prove(problem, config))

    def close(self) -> None:
        """The runner is not ours to close."""

    def _in_time(self, wait: Callable[[], Any]) -> Callable[[], Any]:
        def waited() -> Any:
            found = wait()
            if isinstance(found, TimedOut) and self._left() < _OVER_S:
                raise OutOfTimeError("the time ended while a candidate was tried; it is tried again")
            return found

        return waited
