"""The laboratory of a campaign on the GPU that is here: which part is whose.

Refuses to know the order of parts and their shares of the time: `harness.campaign` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.answers import Answers
from harness.bench import Bench
from harness.campaign import Given, Left, Part
from harness.errors import BugError, MachineError
from harness.lab_beside import Beside
from harness.lab_truth import Truth
from harness.lab_tuning import Tuning
from harness.outcome import LaunchFailed, TimedOut
from harness.problem import parse_problem
from harness.truth import device_name

_ANSWER_S = 30.0


@dataclass(slots=True, eq=False)
class GpuLab:
    """Does parts with the children of a `Bench`. `runs` says of every run when it was and on what."""

    bench: Bench
    stem: str
    runs: Sequence[Any] = ()
    _truth: Truth = field(init=False)
    _tuning: Tuning = field(init=False)
    _beside: Beside = field(init=False)

    def __post_init__(self) -> None:
        self._truth = Truth(self.bench, Answers(self.bench.folder))
        self._tuning = Tuning(self.bench, self.runs)
        self._beside = Beside(self.bench)

    def expect(self, parts: Sequence[Part]) -> None:
        self._truth.expect(parts)
        self._beside.expect(parts)

    def do(self, part: Part, left: Left) -> Given:
        """See `harness.campaign.Lab`."""
        self.bench.left = left
        what = part.what
        match what["do"]:
            case "ceilings":
                return self._truth.ceilings(self.stem)
            case "question":
                return self._truth.question(part)
            case "fuzz" | "memcheck" as kind:
                seconds = min(float(what["seconds"]), left() / 2)
                return self._truth.fuzz(what["kernel"], seconds, watched=kind == "memcheck")
            case "space":
                return self._tuning.space(what["kernel"], parse_problem(what["problem"]), what["groups"])
            case "champion":
                return self._tuning.champion(what["kernel"], parse_problem(what["problem"]))
            case "beside":
                problem, before = parse_problem(what["problem"]), self.bench.known(part.name)
                return self._beside.rivals(what["kernel"], problem, list(what["rivals"]), before)
            case "traffic":
                return self._beside.traffic(what["kernel"], parse_problem(what["problem"]))
            case "same":
                return self._beside.same(what["kernel"], parse_problem(what["problem"]), what["runs"])
            case "estimate":
                return self._tuning.estimate(what["kernel"], parse_problem(what["problem"]), what["groups"])
            case unknown:
                raise BugError(f"no laboratory knows how to do `{unknown}`")

    def answers(self) -> bool:
        """Whether the device still works, asked in the process that uses it, or in a new one if that is gone."""
        # A part that has no time left says nothing about the device.
        self.bench.left = lambda: _ANSWER_S
        try:
            found = self.bench.kernel(self.stem).call("device", "verify", device_name, limit_s=_ANSWER_S)()
        except MachineError:  # not even the canary was answered
            return False
        return not isinstance(found, LaunchFailed | TimedOut)

    def tidy(self, done: Sequence[Part]) -> None:
        """Remove what only parts in flight need."""
        self._tuning.tidy([part.what for part in done])

    def close(self) -> None:
        self.bench.runner.close()
