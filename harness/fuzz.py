"""The fuzzer: search for a counterexample to "this kernel computes attention", in children that may crash or hang.

A crash of the child is a finding about the case it had announced, not a failure of the tool. Refuses to decide what is
wrong: judges do, in the child.
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from harness import sanitizer
from harness.cases import CASES, SCHEMA, Case, Counterexample, read_counterexample, write_counterexample
from harness.errors import BugError, UsageError
from harness.fuzz_child import PLANS, Plan
from harness.shrink import shrink
from harness.space import Config
from harness.worker import child_environment, describe_exit

# A case takes seconds in the interpreter at the very most, imports at the start of a child a little longer.
HANG_S = 90.0
# A sanitizer makes everything many times slower, the start of a process on a GPU above all.
_WATCHED_HANG_S = 300.0
_LOG_TAIL = 1500
# Hypothesis remembers constants of the code; not in the folder of whoever runs us.
_HYPOTHESIS = {"HYPOTHESIS_STORAGE_DIRECTORY": str(Path(tempfile.gettempdir()) / "flashtune-hypothesis")}
# Processes that may die to make a crash plainer.
_CRASHES = 10


@dataclass(slots=True)
class Tally:
    """What a fuzzing campaign did. `judges` counts the cases that each judge had something to say about; `largest` is the
    greatest error over bound of each output among the cases that passed."""

    cases: int = 0
    seconds: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)
    judges: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    counterexamples: list[Path] = field(default_factory=list)
    found: list[Counterexample] = field(default_factory=list)


def fuzz(plan: Plan, corpus: Path, *, versions: Mapping[str, str], seen: Callable[[Tally], None]) -> Tally:
    """Replay what lies in `corpus`, then run a plan to its end or to the first counterexample, which goes there too.

    `seen` is told after each case.
    """
    tally = Tally()
    began = time.monotonic()
    _replay_corpus(plan, corpus, tally)
    turn = 0
    while True:
        left = plan.seconds - (time.monotonic() - began)
        if left <= 0 or tally.cases >= plan.cases or tally.counterexamples:
            break
        part = replace(plan, seed=plan.seed + turn, seconds=left, cases=plan.cases - tally.cases)
        found = _watch(part, tally, began, seen)
        if found is not None:
            case, judge, detail = found
            if judge == "crash":
                case = _shrunk_crash(plan, case)
            elif judge != plan.sanitize and not any(
                answer["detail"] for answer in replay_case(replace(plan, only=(case,)))
            ):
                detail += "; not in a process of its own, so it depends on what was asked before"
            example = Counterexample(schema=SCHEMA, case=case, judge=judge, detail=detail, found_with=dict(versions))
            tally.counterexamples.append(write_counterexample(corpus, example))
            tally.found.append(example)
            break
        turn += 1
    tally.seconds = time.monotonic() - began
    return tally


def _shrunk_crash(plan: Plan, case: Case) -> Case:
    """A crash ends the process that would shrink it, so every try has a process of its own, and there are few."""

    def crashes(simpler: Case) -> bool:
        return any(answer["judge"] == "crash" for answer in replay_case(replace(plan, only=(simpler,))))

    configs = {dtype: [Config(values) for values in several] for dtype, several in plan.configs.items()}
    return shrink(case, configs, crashes, most=_CRASHES)


def _replay_corpus(plan: Plan, corpus: Path, tally: Tally) -> None:
    """What was found once is asked first, each in a process of its own: it may be a crash."""
    for path in sorted(corpus.glob("*.json")):
        example = read_counterexample(path)
        answers = replay_case(replace(plan, only=(example.case,)))
        wrong = next((answer for answer in answers if answer["detail"]), None)
        tally.cases += 1
        tally.verdicts[
            "wrong" if wrong else "passed" if any(one["checks"] for one in answers) else "nothing to compare"
        ] += 1
        tally.judges.update(answer["judge"] for answer in answers if answer["checks"] or answer["detail"])
        if wrong is not None:
            tally.counterexamples.append(path)
            tally.found.append(replace(example, judge=wrong["judge"], detail=wrong["detail"]))


def replay_case(plan: Plan) -> list[dict[str, Any]]:
    """Ask every judge about each case of `plan.only`, in one process: a dict for each answer with `case` (its id), `judge`,
    `detail` ("" if nothing is wrong), `worst` and `checks`."""
    answers: list[dict[str, Any]] = []
    with _Child(plan) as child:
        answers += [event for event in child.events() if event["event"] == "asked"]
        judge = plan.sanitize if child.sanitized else "crash"
        if child.died:
            answers.append({"case": "", "judge": judge, "detail": child.died, "worst": None, "checks": 0})
    return answers


def _blamed(plan: Plan, cases: list[Case], detail: str) -> tuple[Case, str, str]:
    """The first of the cases of a process in which the sanitizer complains when it is alone; it speaks at the end only."""
    for case in cases:
        for answer in replay_case(replace(plan, only=(case,))):
            if answer["judge"] == plan.sanitize:
                return case, plan.sanitize, answer["detail"]
    return cases[-1], plan.sanitize, f"{detail}; by none of the {len(cases)} cases alone, so it depends on earlier ones"


def _watch(plan: Plan, tally: Tally, began: float, seen: Callable[[Tally], None]) -> tuple[Case, str, str] | None:
    """Run one child to its end. The counterexample that it found, or that it is."""
    announced: list[Case] = []
    with _Child(plan) as child:
        for event in child.events():
            if event["event"] == "case":
                announced.append(CASES.validate_json(json.dumps(event["case"])))
            elif event["event"] == "found":
                return CASES.validate_json(json.dumps(event["case"])), event["judge"], event["detail"]
            elif event["event"] == "judged":
                tally.cases += 1
                tally.verdicts[event["verdict"]] += 1
                tally.judges.update(event["judges"])
                if event["verdict"] == "passed":
                    for output, ratio in event["ratios"].items():
                        tally.largest[output] = max(tally.largest.get(output, 0.0), ratio)
                tally.seconds = time.monotonic() - began
                seen(tally)
        if not child.died:
            return None
        if child.sanitized and announced:
            return _blamed(plan, announced, child.died)
        if not announced or child.raised:
            raise BugError(
                f"the fuzzing process failed: {child.died}", hint="this is a bug in flashtune, not in the kernel"
            )
        tally.cases += 1
        tally.verdicts["crashed" if "seconds" not in child.died else "timed out"] += 1
        return announced[-1], "crash", child.died


class _Child:
    """A fuzzing process: started on entry, gone on exit. `died` says in words how it ended, if not by itself, `raised` that it
    was Python that ended it, and `sanitized` that a sanitizer complained."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.died = ""
        self.raised = False
        self.sanitized = False

    def __enter__(self) -> "_Child":
        command = [sys.executable, "-m", "harness.fuzz_child"]
        environment = child_environment(interpret=self._plan.device == "cpu") | _HYPOTHESIS
        if self._plan.sanitize:
            self._log = sanitizer.new_log()
            command = sanitizer.wrapped(command, self._plan.sanitize, self._log)
            environment |= sanitizer.ENVIRONMENT
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._process.stdin.write(PLANS.dump_json(self._plan))
        self._process.stdin.close()
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._said: list[bytes] = []
        self._threads = [
            threading.Thread(target=_pump, args=(self._process.stdout, self._lines.put), daemon=True),
            threading.Thread(target=_pump, args=(self._process.stderr, self._keep), daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self._process.stdout, self._process.stderr):
            if stream:
                stream.close()
        if self._plan.sanitize:
            self._log.unlink(missing_ok=True)

    def events(self) -> Iterator[dict[str, Any]]:
        """Events until the child ends; one that says nothing for too long is killed."""
        patience = _WATCHED_HANG_S if self._plan.sanitize else HANG_S
        while True:
            try:
                line = self._lines.get(timeout=patience)
            except queue.Empty:
                self.died = f"no answer within {patience:.0f} seconds"
                return
            if line is None:
                break
            event = json.loads(line)
            if event["event"] == "refused":
                raise UsageError(event["message"], hint=event["hint"])
            yield event
        code = self._process.wait()
        self.raised = code == 1
        self.sanitized = bool(self._plan.sanitize) and code == sanitizer.FOUND
        if self.sanitized:
            self.died = f"compute-sanitizer, {self._plan.sanitize}: {sanitizer.first_complaint(self._log)}"
        elif code:
            tail = b"".join(self._said)[-_LOG_TAIL:].decode(errors="replace").strip().splitlines()
            self.died = describe_exit(code) + (f": {tail[-1]}" if tail else "")

    def _keep(self, line: bytes | None) -> None:
        if line is not None:
            self._said.append(line)
            del self._said[:-200]


def _pump(stream: IO[bytes], put: Callable[[bytes | None], None]) -> None:
    for line in stream:
        put(line)
    put(None)
