"""Child processes around single stages: whatever a compiler or a kernel does there costs one candidate, not the tune.

Compilation, judging and measuring happen in children with a time limit and a memory cap. An abort, an assertion, a hang or
an exception comes back as an outcome with its reason. This is the one module with a broad `except`.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from pebble import ProcessExpired, ProcessPool

from harness.compare import Verdict
from harness.device import DeviceFacts
from harness.errors import HarnessError, RefusedError, SubjectError, first_line
from harness.outcome import (
    Artifact,
    CompileFailed,
    Estimated,
    LaunchFailed,
    Measured,
    Mode,
    Proof,
    Stage,
    TimedOut,
    Valued,
)  # fmt: skip
from harness.problem import Problem
from harness.prune import prune
from harness.space import Config

_LOG_TAIL = 2000
_PR_SET_PDEATHSIG = 1
DEVICE_LOST = 97
# What is started with no time left still ends by itself, soon.
_LEAST_S = 0.1

Depth = Literal["screen", "final"]
Pool = Literal["compiler", "interpreter", "device"]
Compiled = Artifact | CompileFailed | TimedOut
Judged = Verdict | LaunchFailed | TimedOut
Numbered = Valued | LaunchFailed | TimedOut
Proved = Proof | LaunchFailed | TimedOut


class Runner(Protocol):
    """Where candidates are tried: child processes, or a fake in tests. Every method starts work and returns how to wait."""

    @property
    def device(self) -> DeviceFacts: ...

    @property
    def mode(self) -> Mode: ...

    def compile(self, problem: Problem, config: Config) -> Callable[[], Compiled]: ...

    def verify(self, problem: Problem, config: Config) -> Callable[[], Judged]: ...

    def value(
        self, problem: Problem, config: Config, passed: "Passed", *, incumbent: Config | None, depth: Depth
    ) -> Callable[[], Numbered]:
        """Put a number on a candidate: a time beside the incumbent's, or an estimate."""
        ...

    def prove(self, problem: Problem, config: Config) -> Callable[[], Proved]:
        """Ask the whole suite about a finalist."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Passed:
    """A candidate that compiled and passed its gate: what a number needs to exist."""

    artifact: Artifact
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a child may use: seconds per stage, and bytes of memory where the stage does not map a GPU."""

    compile_s: float = 180.0
    verify_s: float = 120.0
    value_s: float = 120.0
    prove_s: float = 600.0
    memory_bytes: int = 8 << 30

    def seconds(self, stage: Stage) -> float:
        return {"compile": self.compile_s, "verify": self.verify_s, "prove": self.prove_s}.get(stage, self.value_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the children work on: a kernel of a workspace, for a device."""

    root: Path
    stem: str
    device: DeviceFacts
    mode: Mode
    seed: int


@dataclass(slots=True, kw_only=True)
class ProcessRunner:
    """Runs stages in pools of child processes, which start when they are first needed.

    Compilers and estimates share one pool. Verdicts come from Triton's interpreter in a second pool when no device is
    here, and from the device otherwise, whose one worker also measures. `left` says how many seconds a stage may take beside
    its own limit, when it is started.
    """

    job: Job
    jobs: int
    cache: Path
    limits: Limits = field(default_factory=Limits)
    left: Callable[[], float] = lambda: math.inf
    _pools: dict[str, ProcessPool] = field(default_factory=dict)
    _logs: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="flashtune-")))

    @property
    def device(self) -> DeviceFacts:
        return self.job.device

    @property
    def mode(self) -> Mode:
        return self.job.mode

    def for_kernel(self, stem: str) -> "ProcessRunner":
        """The same children, working on another kernel of the workspace."""
        return replace(self, job=replace(self.job, stem=stem))

    def compile(self, problem: Problem, config: Config) -> Callable[[], Compiled]:
        return self._start("compiler", "compile", problem, config)

    def verify(self, problem: Problem, config: Config) -> Callable[[], Judged]:
        return self._start("device" if self.mode == "measured" else "interpreter", "verify", problem, config)

    def prove(self, problem: Problem, config: Config) -> Callable[[], Proved]:
        if self.mode != "measured":
            return self._start("interpreter", "prove", problem, config)
        from harness.proof import CASES_PER_FINALIST, compile_case

        # Every case needs code of its own, which one process would compile one after the other.
        limit, shared = self.limits.compile_s, (self.job.stem, problem, config, self.job.seed)
        ahead = [
            self.call("compiler", "prove", compile_case, *shared, (position, self.device), limit_s=limit)
            for position in range(CASES_PER_FINALIST)
        ]

        def wait() -> Any:
            for each in ahead:
                each()
            return self._start("device", "prove", problem, config)()

        return wait

    def value(
        self, problem: Problem, config: Config, passed: Passed, *, incumbent: Config | None, depth: Depth
    ) -> Callable[[], Numbered]:
        extra = {"passed": passed, "incumbent": incumbent, "depth": depth}
        if self.mode == "measured":
            return self._start("device", "measure", problem, config, **extra)
        return self._start("compiler", "estimate", problem, config, **extra)

    def call(
        self, pool: Pool, stage: Stage, function: Callable[..., Any], *arguments: Any, limit_s: float
    ) -> Callable[[], Any]:
        """Start `function(kernel, *arguments)` in a child; it comes back as what it returns, `LaunchFailed` or `TimedOut`.

        It must be a function of a module of ours; errors of ours that are not about the kernel are raised by the wait.
        """
        return self._schedule(pool, stage, limit_s, _run_call, (stage, self.job, pool == "device", function, arguments))

    def close(self) -> None:
        """Stop every child, at once."""
        for pool in self._pools.values():
            pool.stop()
            pool.join()
        self._pools.clear()
        shutil.rmtree(self._logs, ignore_errors=True)

    def _start(self, pool: Pool, stage: Stage, problem: Problem, config: Config, **extra: Any) -> Callable[[], Any]:
        arguments = (stage, self.job, problem, config)
        return self._schedule(pool, stage, self.limits.seconds(stage), _run_stage, arguments, **extra)

    def _schedule(
        self, pool: Pool, stage: Stage, limit_s: float, function: Any, arguments: Any, **extra: Any
    ) -> Callable[[], Any]:
        limit = max(min(limit_s, self.left()), _LEAST_S)
        future = self._pool(pool).schedule(function, args=arguments, kwargs=extra, timeout=limit)

        def wait() -> Any:
            try:
                return future.result()
            except FutureTimeoutError:
                return TimedOut(stage=stage, limit_s=limit)
            except ProcessExpired as expired:
                return _failure(stage, describe_exit(expired.exitcode), _tail(self._logs / f"{expired.pid}.log"))

        return wait

    def _pool(self, name: Pool) -> ProcessPool:
        if name not in self._pools:
            environment = _variables(interpret=name == "interpreter") | {"TRITON_CACHE_DIR": str(self.cache)}
            cap = 0 if name == "device" else self.limits.memory_bytes
            self._pools[name] = ProcessPool(
                max_workers=1 if name == "device" else self.jobs,
                initializer=_settle,
                initargs=(environment, cap, self._logs),
                context=multiprocessing.get_context("spawn"),
            )
        return self._pools[name]


def child_environment(*, interpret: bool) -> dict[str, str]:
    """All environment variables of a child process, in which Triton interprets or compiles."""
    return dict(os.environ) | _variables(interpret=interpret)


def _variables(*, interpret: bool) -> dict[str, str]:
    # Two children on two cores are faster than four that each believe to have two.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {"TRITON_INTERPRET": "1" if interpret else "0", **threads}


def _settle(environment: dict[str, str], memory_bytes: int, logs: Path) -> None:
    """Set up a child: die with the parent, leave Ctrl-C to it, keep what native code prints, cap the memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    log = os.open(logs / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if environment["TRITON_INTERPRET"] == "1":
        from harness.quicken import quicken

        quicken()


def _run_stage(stage: Stage, job: Job, problem: Problem, config: Config, **extra: Any) -> Any:
    """Runs in the child. Whatever a candidate raises is its outcome, not ours."""
    on_device = job.mode == "measured" and stage in ("verify", "prove", "measure")
    found = _guarded(stage, on_device, lambda: _STAGES[stage](job, problem, config, **extra))
    if on_device and isinstance(found, Proof) and not found.passed:
        # The suite takes what a kernel raises for an answer, also an error of the device.
        _give_up_a_lost_device(found.detail)
    return found


def _run_call(stage: Stage, job: Job, on_device: bool, function: Callable[..., Any], arguments: Any) -> Any:
    return _guarded(stage, on_device, lambda: function(_kernel(job), *arguments))


def _guarded(stage: Stage, on_device: bool, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        if on_device:
            _give_up_a_lost_device(first_line(error))
        if isinstance(error, RefusedError | SubjectError):
            return _failure(stage, error.message, "")
        # Ours to mend or the caller's to hear.
        if isinstance(error, HarnessError):
            raise
        return _failure(stage, first_line(error), traceback.format_exc()[-_LOG_TAIL:])


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


def _compile(job: Job, problem: Problem, config: Config) -> Compiled:
    from harness.compile import compile_candidate, compile_gate

    kernel = _kernel(job)
    found = compile_candidate(kernel, problem, config, job.device)
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
    from harness.compile import meta_launches
    from harness.estimate import estimate

    launches = meta_launches(_kernel(job), problem, config, job.device)
    predicted = estimate(problem, launches, passed.artifact, job.device)
    return Estimated(verdict=passed.verdict, estimate=predicted, artifact=passed.artifact)


def _measure(
    job: Job, problem: Problem, config: Config, *, passed: Passed, incumbent: Config | None, depth: Depth
) -> Measured:
    from harness.timing import sample

    samples = sample(_kernel(job), problem, config, incumbent=incumbent, seed=job.seed, depth=depth)
    return Measured(verdict=passed.verdict, samples=samples, artifact=passed.artifact)


_STAGES: dict[Stage, Callable[..., Any]] = {
    "compile": _compile,
    "verify": _verify,
    "prove": _prove,
    "estimate": _estimate,
    "measure": _measure,
}


def _kernel(job: Job) -> Any:
    from harness.workspace import Workspace

    return Workspace(job.root).load_kernel(job.stem)


def _failure(stage: Stage, reason: str, log: str) -> CompileFailed | LaunchFailed:
    if stage == "compile":
        return CompileFailed(reason=reason, log=log)
    return LaunchFailed(stage=stage, reason=reason, log=log)


def describe_exit(code: int) -> str:
    """How a process ended, in words, from its exit code."""
    if code == DEVICE_LOST:
        return "the device failed and its process was given up"
    # The pool reports a death by signal as the negative number or as 128 and the number, by how it learned of it.
    number = -code if code < 0 else code - 128
    try:
        return f"the process was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"the process ended with exit code {code}"


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
