"""A laboratory that exists only in tests: its parts take seconds of a clock that it owns, and do what a script says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.campaign import Given, Left, Part
from harness.errors import OutOfTimeError


class FakeClock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeLab:
    """Does each part in `what["takes"]` seconds, one unit a second: a part that is cut keeps the units that it has, as a journal
    would. `script` may give something else for a part by its name: a `Given`, or an exception to raise."""

    def __init__(self, clock: FakeClock, script: Mapping[str, Any] | None = None) -> None:
        self.clock = clock
        self.script = dict(script or {})
        self.kept: dict[str, int] = {}
        self.done: list[str] = []
        self.expected: list[list[str]] = []
        self.alive = True
        self.closed = False
        self.tidied: list[str] = []
        self.watch: Callable[[Part, Left], None] = lambda part, left: None

    def expect(self, parts: Sequence[Part]) -> None:
        self.expected.append([part.name for part in parts])

    def do(self, part: Part, left: Left) -> Given:
        self.watch(part, left)
        self.done.append(part.name)
        scripted = self.script.get(part.name)
        if isinstance(scripted, BaseException):
            self.clock.now += 1
            raise scripted
        if isinstance(scripted, Given):
            self.clock.now += 1
            return scripted
        takes, units = int(part.what["takes"]), self.kept.get(part.name, 0)
        while units < takes:
            if left() < 1:
                self.kept[part.name] = units
                if part.what.get("silent"):
                    raise OutOfTimeError("the time ended")
                return Given(status="partial", reason=f"{units} of {takes}", data={"units": units})
            self.clock.now += 1
            units += 1
            # A journal: every unit is kept at once.
            self.kept[part.name] = units
        return Given(status="done", data={"units": units})

    def answers(self) -> bool:
        return self.alive

    def tidy(self, done: Sequence[Part]) -> None:
        self.tidied = [part.name for part in done]

    def close(self) -> None:
        self.closed = True


def part(step: str, name: str, takes: int, *, least: float = 1.0, most: float = float("inf"), of: str = "k:j") -> Part:
    return Part(step=step, name=f"{step}/{name}", what={"takes": takes}, least_s=least, most_s=most, of=of)
