"""Child processes around single stages: whatever a compiler or a kernel does there costs one candidate, not the tune.

Compilation, judging and measuring happen in children with a time limit and a memory cap. An abort, an assertion, a hang or
an exception comes back as an outcome with its reason. This is the one module with a broad `except`.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pebble import ProcessExpired, ProcessPool

from harness.compare import Verdict
from harness.device import DeviceFacts
from harness.errors import HarnessError, RefusedError
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
from harness.space import Config

_LOG_TAIL = 2000
_PR_SET_PDEATHSIG = 1
DEVICE_LOST = 97

Depth = Literal["screen", "final"]
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
    here, and from the device otherwise, whose one worker also measures.
    """

    job: Job
    jobs: int
    cache: Path
    limits: Limits = field(default_factory=Limits)
    _pools: dict[str, ProcessPool] = field(default_factory=dict)
    _logs: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="flashtune-")))

    @property
    def device(self) -> DeviceFacts:
        return self.job.device

    @property
    def mode(self) -> Mode:
        return self.job.mode

    def compile(self, problem: Problem, config: Config) -> Callable[[], Compiled]:
        return self._start("compiler", "compile", problem, config)

    def verify(self, problem: Problem, config: Config) -> Callable[[], Judged]:
        return self._start("device" if self.mode == "measured" else "interpreter", "verify", problem, config)

    def prove(self, problem: Problem, config: Config) -> Callable[[], Proved]:
        return self._start("device" if self.mode == "measured" else "interpreter", "prove", problem, config)

    def value(
        self, problem: Problem, config: Config, passed: Passed, *, incumbent: Config | None, depth: Depth
    ) -> Callable[[], Numbered]:
        extra = {"passed": passed, "incumbent": incumbent, "depth": depth}
        if self.mode == "measured":
            return self._start("device", "measure", problem, config, **extra)
        return self._start("compiler", "estimate", problem, config, **extra)

    def close(self) -> None:
        """Stop every child, at once."""
        for pool in self._pools.values():
            pool.stop()
            pool.join()
        self._pools.clear()
        shutil.rmtree(self._logs, ignore_errors=True)

    def _start(self, pool: str, stage: Stage, problem: Problem, config: Config, **extra: Any) -> Callable[[], Any]:
        limit = self.limits.seconds(stage)
        future = self._pool(pool).schedule(
            _run_stage, args=(stage, self.job, problem, config), kwargs=extra, timeout=limit
        )

        def wait() -> Any:
            try:
                return future.result()
            except FutureTimeoutError:
                return TimedOut(stage=stage, limit_s=limit)
            except ProcessExpired as expired:
                return _failure(stage, describe_exit(expired.exitcode), _tail(self._logs / f"{expired.pid}.log"))

        return wait

    def _pool(self, name: str) -> ProcessPool:
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
    try:
        return _STAGES[stage](job, problem, config, **extra)
    except HarnessError as error:
        # Ours to mend or the caller's to hear, except when it is the kernel that refuses.
        if isinstance(error, RefusedError):
            return _failure(stage, error.message, "")
        raise
    except Exception as error:
        reason, log = _first_line(error), traceback.format_exc()[-_LOG_TAIL:]
        if job.mode == "measured" and stage in ("verify", "prove", "measure") and not device_answers():
            # A device error sticks to the process: whoever came next would be blamed for it. A new process has no past.
            os.write(2, f"{reason}\n".encode())
            os._exit(DEVICE_LOST)
        return _failure(stage, reason, log)


def device_answers() -> bool:
    """Whether the device still works in this process after something was raised."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _compile(job: Job, problem: Problem, config: Config) -> Compiled:
    from harness.compile import compile_candidate

    return compile_candidate(_kernel(job), problem, config, job.device)


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


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
