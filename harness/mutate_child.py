"""The half of measuring mutants that runs kernels: a process in which Triton interprets, and which forks for every task.

It reads one task a line from standard input and writes one trial a line to standard output. What a mutant does to its
memory, and however it ends, stays in the fork. Refuses to catch what a mutant raises: that ends the fork, and is a kill.
"""

import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import IO, Any

import torch

from harness import suite
from harness.cases import kernel_subject
from harness.mutate import SUITE, TASKS, TRIALS, How, Task, Trial
from harness.mutate_judges import EVERY
from harness.quicken import quicken
from harness.worker import describe_exit

_TAIL = 4000
_PROFILE = suite.profile_for("mutation")
_FORKS = multiprocessing.get_context("fork")


def answer(task: Task) -> Trial:
    """Carry out a task in a fork, and say how that ended."""
    began = time.monotonic()
    here, there = _FORKS.Pipe(duplex=False)
    with tempfile.TemporaryFile() as log:
        fork = _FORKS.Process(target=_carry_out, args=(task, there, log))
        fork.start()
        there.close()
        judged = alarms = asked = 0
        how: How = ""
        detail = ""
        by: tuple[str, ...] = ()
        while True:
            if not here.poll(task.hang_s):
                fork.kill()
                how, detail = "timeout", f"no answer within {task.hang_s:.0f} seconds"
                break
            try:
                event = here.recv()
            except EOFError:
                break
            judged += event["judged"]
            asked += 1
            if event["alarm"]:
                alarms += 1
                how, detail, by = "alarm", detail or event["alarm"], by or tuple(event["by"])
        fork.join()
        here.close()
        if fork.exitcode and how != "timeout":
            how, detail = "crash", f"{describe_exit(fork.exitcode)}: {_last_line(log)}"
        # The case that ended the fork counts as judged.
        judged += how in ("crash", "timeout")
        asked += how in ("crash", "timeout")
    return Trial(
        judge=task.judge,
        how=how,
        cases=judged,
        alarms=alarms,
        asked=asked,
        seconds=time.monotonic() - began,
        detail=detail,
        by=by,
    )


def _carry_out(task: Task, events: Connection, log: IO[bytes]) -> None:
    """In the fork: ask the judge case by case, and say after each what came of it."""
    for standard in (1, 2):
        os.dup2(log.fileno(), standard)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.insert(0, str(task.folder))
    kernel: Any = importlib.import_module(f"{task.package}.{task.stem}")
    for case in task.cases:
        subject = kernel_subject(kernel, case)
        names = suite.judges_for(subject, case, _PROFILE.judges) if task.judge == SUITE else [task.judge]
        asked = list(suite.ask_each(subject, case, names, EVERY))
        found = [(name, finding) for name, finding, _ in asked if finding is not None]
        events.send({
            "judged": any(checks or finding for _, finding, checks in asked),
            "alarm": f"{found[0][1].detail} [{case.problem}]" if found else "",
            "by": [name if finding.judge == name else finding.judge for name, finding in found],
        })  # fmt: skip
        if found and task.stop:
            break
    events.close()


def _last_line(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _TAIL))
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def main() -> None:
    """Answer tasks until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quicken()
    torch.set_num_threads(1)
    # What kernels and compilers print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        answers.write(json.dumps(TRIALS.dump_python(answer(TASKS.validate_json(line)))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
