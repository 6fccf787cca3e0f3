"""What a child process does with a stage: it settles in, does the work, and says in words what went wrong.

Runs in children only. Whatever a candidate raises is its outcome and not ours: this is the one module of the tuner with a
broad `except`. What is nobody's fault but the machine's (a full disk, a device that answers nobody) is never a candidate's.
"""

import contextlib
import ctypes
import errno
import gc
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.compare import Verdict
from harness.device import DeviceFacts
from harness.errors import HarnessError, MachineError, RefusedError, SubjectError, first_line
from harness.outcome import (
    Artifact,
    CompileFailed,
    Estimated,
    LaunchFailed,
    Measured,
    Mode,
    Proof,
    Stage,
)  # fmt: skip
from harness.problem import Problem
from harness.prune import prune
from harness.space import Config

_LOG_TAIL = 2000
_PR_SET_PDEATHSIG = 1
# How a child ends that a candidate cost the device, and one whose device failed before any candidate had touched it.
DEVICE_LOST = 97
NO_DEVICE = 98
_FULL = (errno.ENOSPC, errno.EDQUOT)

Depth = Literal["screen", "final"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the children work on: a kernel of a workspace, for a device."""

    root: Path
    stem: str
    device: DeviceFacts
    mode: Mode
    seed: int


@dataclass(frozen=True, slots=True)
class Passed:
    """A candidate that compiled and passed its gate: what a number needs to exist."""

    artifact: Artifact
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Settling:
    """How a child is set up: its environment variables, a cap on its memory (0 is none), where it logs, whose child it is, and
    what else is called in it (tests pretend a device there)."""

    environment: dict[str, str]
    memory_bytes: int
    logs: Path
    parent: int
    prepare: Callable[[], None] | None = None


@dataclass(slots=True)
class _Past:
    """What this process has been through: the stages that it ended, whether its device was seen to work, where it says so."""

    stages: int = 0
    device_seen: bool = False
    logs: Path | None = None


_past = _Past()


def settle(how: Settling) -> None:
    """Set up a child: die with the parent, leave Ctrl-C to it, keep what native code prints, cap the memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != how.parent:  # it died before it could be asked to take us along
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(how.environment)
    _past.logs = how.logs
    log = os.open(how.logs / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    if how.memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (how.memory_bytes, how.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if how.environment["TRITON_INTERPRET"] == "1":
        from harness.quicken import quicken

        quicken()
    if how.prepare is not None:
        how.prepare()


def run_stage(stage: Stage, job: Job, problem: Problem, config: Config, **extra: Any) -> Any:
    """One stage of one candidate."""
    on_device = job.mode == "measured" and stage in ("verify", "prove", "measure")
    found = _guarded(stage, on_device, lambda: STAGES[stage](job, problem, config, **extra))
    if on_device and isinstance(found, Proof) and not found.passed:
        # The suite takes what a kernel raises for an answer, also an error of the device.
        _give_up_a_lost_device(found.detail)
    return found


def run_call(stage: Stage, job: Job, on_device: bool, function: Callable[..., Any], arguments: Any) -> Any:
    """One function of ours, called with a kernel."""
    return _guarded(stage, on_device, lambda: function(_kernel(job), *arguments))


def _guarded(stage: Stage, on_device: bool, work: Callable[[], Any]) -> Any:
    if on_device:
        _see_the_device()
    try:
        found = work()
    except Exception as error:
        if on_device:
            _give_up_a_lost_device(first_line(error))
        found = _blamed(stage, error)
    if isinstance(found, CompileFailed):
        _refuse_a_full_disk(found.reason + found.log)
    if isinstance(found, LaunchFailed) and on_device:
        _let_memory_go()
    _count_the_stage()
    return found


def _blamed(stage: Stage, error: Exception) -> CompileFailed | LaunchFailed:
    """The outcome of what a candidate raised. Raises what is ours to mend or the caller's to hear."""
    if isinstance(error, RefusedError | SubjectError):
        return failure(stage, error.message, "")
    if isinstance(error, HarnessError):
        raise error
    if isinstance(error, OSError) and error.errno in _FULL:
        _refuse_a_full_disk(os.strerror(errno.ENOSPC))
    trace = "".join(traceback.format_exception(error))
    return failure(stage, first_line(error), trace[-_LOG_TAIL:])


def _refuse_a_full_disk(text: str) -> None:
    """A candidate that found no room for its code says nothing about itself."""
    if os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text:
        raise MachineError(
            "a child process found no room on the disk",
            hint="make room (Triton's cache may be removed); then run again",
        )


def _see_the_device() -> None:
    """Before the first candidate in this process: the device must answer a question whose answer is known."""
    if _past.device_seen:
        return
    wrong = canary_complaint()
    if wrong:
        os.write(2, f"{wrong}\n".encode())
        os._exit(NO_DEVICE)
    _past.device_seen = True


def canary_complaint() -> str:
    """Why the device cannot be trusted with a candidate, or nothing."""
    from harness.canary import complaint

    return complaint()


def _give_up_a_lost_device(reason: str) -> None:
    """A device error sticks to the process: whoever came next would be blamed for it. A new process has no past."""
    if not device_answers():
        os.write(2, f"{reason}\n".encode())
        os._exit(DEVICE_LOST)


def device_answers() -> bool:
    """Whether the device still works in this process after something was raised."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _let_memory_go() -> None:
    """What a failed candidate held on the device must not be missed by the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.cuda.empty_cache()


def _count_the_stage() -> None:
    """Write down that this process has done something: a later death may then be an earlier candidate's doing."""
    _past.stages += 1
    if _past.logs is not None:
        with contextlib.suppress(OSError):
            past_path(_past.logs, os.getpid()).touch()


def past_path(logs: Path, pid: int) -> Path:
    """Where a child leaves the sign that it has ended a stage."""
    return logs / f"{pid}.past"


def _compile(job: Job, problem: Problem, config: Config) -> Artifact | CompileFailed:
    from harness.compile import compile_candidate, compile_gate

    kernel = _kernel(job)
    found = compile_candidate(kernel, problem, config, job.device, unread=job.mode == "measured")
    if job.mode == "measured" and isinstance(found, Artifact) and prune(found, config, job.device) is None:
        # Many compile at a time, and one judges: what its questions need beside this is then in the cache. What goes wrong
        # here goes wrong there again, and is its outcome.
        with contextlib.suppress(Exception):
            compile_gate(kernel, problem, config, job.device)
    return found


def _verify(job: Job, problem: Problem, config: Config) -> Verdict:
    from harness.verify import gate

    on_device = job.mode == "measured"
    return gate(
        _kernel(job),
        problem,
        config,
        seed=job.seed,
        where="device" if on_device else "interpreter",
        device="cuda" if on_device else "cpu",
    )


def _prove(job: Job, problem: Problem, config: Config) -> Proof:
    from harness.proof import prove

    device = "cuda" if job.mode == "measured" else "cpu"
    return prove(_kernel(job), job.stem, problem, config, seed=job.seed, device=device)


def _estimate(
    job: Job, problem: Problem, config: Config, *, passed: Passed, incumbent: Config | None, depth: Depth
) -> Estimated:
    from harness.compile import compiled_launches, compiling_for
    from harness.estimate import estimate

    with compiling_for(job.device):
        launches = compiled_launches(_kernel(job), problem, config, job.device)
    predicted = estimate(problem, launches, passed.artifact, job.device)
    return Estimated(verdict=passed.verdict, estimate=predicted, artifact=passed.artifact)


def _measure(
    job: Job, problem: Problem, config: Config, *, passed: Passed, incumbent: Config | None, depth: Depth
) -> Measured:
    from harness.timing import sample

    samples = sample(_kernel(job), problem, config, incumbent=incumbent, seed=job.seed, depth=depth)
    return Measured(verdict=passed.verdict, samples=samples, artifact=passed.artifact)


STAGES: dict[Stage, Callable[..., Any]] = {
    "compile": _compile,
    "verify": _verify,
    "prove": _prove,
    "estimate": _estimate,
    "measure": _measure,
}


def _kernel(job: Job) -> Any:
    from harness.workspace import Workspace

    return Workspace(job.root).load_kernel(job.stem)


def failure(stage: Stage, reason: str, log: str) -> CompileFailed | LaunchFailed:
    """What a stage that could not be ended is called."""
    if stage == "compile":
        return CompileFailed(reason=reason, log=log)
    return LaunchFailed(stage=stage, reason=reason, log=log)
