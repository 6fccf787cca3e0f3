"""The first step of a campaign on a GPU: whether compiled kernels tell the truth, and what the device could do at best.

Refuses to stop at what is wrong: it is written down, with the case that `flashtune replay` asks again.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ceilings, sanitizer, truth
from harness.answers import Answers
from harness.bench import Bench, seed_of, short
from harness.campaign import Given, Part, Status
from harness.cases import CASES, Case
from harness.compile import compile_candidate
from harness.errors import OutOfTimeError, UsageError
from harness.outcome import Artifact, CompileFailed, LaunchFailed, TimedOut
from harness.problem import parse_problem
from harness.prune import prune
from harness.space import Config
from harness.truth import Answer, Reply
from harness.worker import child_environment

_COMPILE_S, _ASK_S, _INTERPRET_S, _CEILINGS_S = 180.0, 60.0, 120.0, 60.0
# After so many failures and no success the interpreter is taken for broken here.
_ENOUGH_FAILURES = 3
# Rules about what cannot be launched; the others are about what cannot be fast.
_UNLAUNCHABLE = ("shared_memory", "registers")
# With less left, a limit that was hit was the end of the part's time.
_OVER_S = 1.0


@dataclass(slots=True, eq=False)
class _Begun:
    """A question whose candidates are compiling, the first of which is being interpreted too."""

    cases: Sequence[Case]
    compiled: Sequence[Callable[[], Any]]
    interpreted: Callable[[], Any] | None


@dataclass(slots=True, eq=False)
class Truth:
    """Asks questions of kernels. `answers` are the interpreter's that were recorded before."""

    bench: Bench
    answers: Answers
    _coming: deque[Part] = field(default_factory=deque)
    _begun: dict[str, _Begun] = field(default_factory=dict)
    _interpreter_failures: int = 0
    _interpreter_reason: str = ""

    def expect(self, parts: Sequence[Part]) -> None:
        """What will be asked next."""
        self._coming = deque(part for part in parts if part.what["do"] == "question")

    def question(self, part: Part) -> Given:
        """One problem, under the default config and a few others: each against its bounds, ten times, and the first against the
        interpreter."""
        begun = self._begun.pop(part.name, None) or self._begin(part)
        self._begin_more(part)
        found = []
        for position, (case, compiled) in enumerate(zip(begun.cases, begun.compiled, strict=True)):
            other = self._interpreted(begun, case) if position == 0 else None
            found.append(self._candidate(part, case, compiled(), other))
        wrong = [one for one in found if one["status"] != "right"]
        worst = max((one["worst"] for one in found if one.get("worst") is not None), default=None)
        data = {"candidates": found, "right": len(found) - len(wrong), "worst": worst}
        return Given(status="done", data=data)

    def _begin(self, part: Part) -> _Begun:
        stem, problem = part.what["kernel"], parse_problem(part.what["problem"])
        space, default = self.bench.space(stem, problem)
        configs = truth.chosen_configs(space, default, part.what["more"], seed_of(part.name))
        cases = [self.case(stem, part.what["problem"], part.what["recipe"], config) for config in configs]
        runner, device = self.bench.kernel(stem), self.bench.device
        compiled = [
            runner.call("compiler", "compile", compile_candidate, problem, config, device, limit_s=_COMPILE_S)
            for config in configs
        ]
        interpreted = None
        if self.answers.find(cases[0]) is None and not self._interpreter_reason:
            interpreted = runner.call("interpreter", "verify", truth.ask, cases[0], "cpu", 1, limit_s=_INTERPRET_S)
        return _Begun(cases, compiled, interpreted)

    def _begin_more(self, part: Part) -> None:
        """Start what comes next, so that all cores compile and interpret while the device is asked."""
        while self._coming and len(self._begun) < self.bench.jobs:
            following = self._coming.popleft()
            if following.name == part.name or following.name in self._begun:
                continue
            try:
                self._begun[following.name] = self._begin(following)
            except UsageError:
                # It is said when its turn comes.
                continue

    @staticmethod
    def case(stem: str, problem: str, recipe: str, config: Config) -> Case:
        """The question as the fuzzer's case, so that it can be replayed."""
        return Case(kernel=stem, problem=problem, config=dict(config), recipe=recipe, seed=0, lies={})

    def _interpreted(self, begun: _Begun, case: Case) -> Answer | str:
        """The interpreter's answer, or why there is none."""
        recorded = self.answers.find(case)
        if recorded is not None:
            return recorded
        if begun.interpreted is None:
            return self._interpreter_reason or "no answer was recorded"
        found = begun.interpreted()
        if isinstance(found, Reply):
            self._interpreter_failures = -1_000_000
            return found.answer if not found.wrong else f"the interpreter is wrong: {found.wrong}"
        reason = f"the interpreter gave no answer: {getattr(found, 'reason', 'it took too long')}"
        self._interpreter_failures += 1
        if self._interpreter_failures >= _ENOUGH_FAILURES:
            self._interpreter_reason = reason
        return reason

    def _candidate(self, part: Part, case: Case, compiled: Any, other: Answer | str | None) -> dict[str, Any]:
        """What became of one candidate, as JSON values."""
        config = Config(case.config)
        found: dict[str, Any] = {"config": dict(config)}
        if not isinstance(compiled, Artifact):
            self._in_time(compiled)
            return found | {"status": "compile failed", "detail": _reason(compiled)}
        found |= {
            "registers": [one.registers for one in compiled.binaries],
            "spill_bytes": [one.spill_bytes for one in compiled.binaries],
        }
        pruned = prune(compiled, config, self.bench.device)
        if pruned is not None and pruned.rule in _UNLAUNCHABLE:
            return found | {"status": "pruned", "detail": f"{pruned.rule}: {pruned.detail}"}
        answer = other if isinstance(other, Answer) else None
        runner = self.bench.kernel(part.what["kernel"])
        reply = runner.call("device", "verify", truth.ask, case, "cuda", truth.RUNS, answer, limit_s=_ASK_S)()
        if isinstance(reply, LaunchFailed) and reply.reason.startswith("the kernel "):
            return found | {"status": "refused", "detail": reply.reason}
        if not isinstance(reply, Reply):
            self._in_time(reply)
            return found | {"status": "crashed", "detail": _reason(reply), "case": _plain(case)}
        found |= {"worst": short(reply.worst), "runs": reply.runs}
        if other is not None:
            found["interpreter"] = other if isinstance(other, str) else reply.incomparable or "compared"
            if reply.against:
                found["difference"] = short(max(check.ratio for check in reply.against))
        if reply.wrong:
            return found | {"status": "wrong", "detail": reply.wrong, "case": _plain(case)}
        return found | {"status": "right"}

    def _in_time(self, found: Any) -> None:
        """Raises `OutOfTimeError` where not the candidate but the part's time came to its end."""
        if isinstance(found, TimedOut) and self.bench.left() < _OVER_S:
            raise OutOfTimeError("the time ended while a candidate was asked; it is asked again")

    def ceilings(self, stem: str) -> Given:
        """Copy bandwidth and matrix rate."""
        wait = self.bench.kernel(stem).call(
            "device", "measure", ceilings.ceilings, self.bench.seed, limit_s=_CEILINGS_S
        )
        found = wait()
        if not isinstance(found, tuple):
            return Given(status="failed", reason=_reason(found))
        rates = [
            {"what": one.what, "size": one.size, "rate": short(one.rate), "interval": [short(side) for side in one.interval],
             "samples": len(one.times_ms)} for one in found
        ]  # fmt: skip
        return Given(status="done", data={"ceilings": rates})

    def fuzz(self, stem: str, seconds: float, *, watched: bool) -> Given:
        """A slice of the fuzzer's campaign on compiled kernels, or a few cases under memcheck."""
        if watched:
            why = "" if sanitizer.find_program() else "compute-sanitizer is not installed"
            why = why or sanitizer.refuses(max(min(self.bench.left() / 2, 120.0), 1.0))
            if why:
                return Given(status="skipped", reason=why)
        with tempfile.TemporaryDirectory(prefix="flashtune-corpus-") as corpus:
            command = [
                sys.executable, "-m", "harness", "fuzz", stem, "--profile", "gpu", "--time", f"{max(int(seconds), 1)}s",
                "--seed", str(self.bench.seed), "--workspace", str(self.bench.workspace.root), "--corpus", corpus, "--json",
                "--quiet", *(("--sanitize", "memcheck", "--cases", "12") if watched else ()),
            ]  # fmt: skip
            code, out, said = run_within(command, self.bench.left(), cwd=self.bench.workspace.root)
            found = [json.loads(path.read_text()) for path in sorted(Path(corpus).glob("*.json"))]
        if code is None:
            status: Status = "done" if found else "partial"
            return Given(status=status, reason="it was stopped at the end of its time", data={"counterexamples": found})
        try:
            document = json.loads(out)
        except ValueError:
            return Given(status="failed", reason=(said.strip().splitlines() or [f"exit code {code}"])[0])
        kept = ("cases", "seconds", "verdicts", "oracles", "largest")
        return Given(status="done", data={name: document[name] for name in kept} | {"counterexamples": found})


def run_within(command: Sequence[str], seconds: float, *, cwd: Path) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of a command that is killed with all its children after so many seconds (code None)."""
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=child_environment(interpret=False),
    )  # fmt: skip
    try:
        out, said = process.communicate(timeout=max(seconds, 0.1))
    except BaseException as cut:
        # Also when the campaign itself is interrupted: nothing may go on in its name.
        os.killpg(process.pid, signal.SIGKILL)
        out, said = process.communicate()
        if not isinstance(cut, subprocess.TimeoutExpired):
            raise
        return None, out, said
    return process.returncode, out, said


def _plain(case: Case) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(CASES.dump_json(case))
    return found


def _reason(found: Any) -> str:
    if isinstance(found, TimedOut):
        return f"it took more than {found.limit_s:.0f} s"
    return found.reason if isinstance(found, LaunchFailed | CompileFailed) else str(found)
