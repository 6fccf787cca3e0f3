"""Pools of child processes around single stages: whatever a compiler or a kernel does there costs one candidate, not the tune.

Compilation, judging and measuring happen in children with a time limit and a memory cap. An abort, an assertion, a hang or
an exception comes back as an outcome with its reason. A death that may be another's doing is not believed at once: the
candidate is tried again in a process without a past. What the children do is `harness.child`'s.
"""

import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import pebble.pool.process
from pebble import ProcessExpired, ProcessPool

from harness.child import (
    DEVICE_LOST,
    NO_DEVICE,
    Depth,
    Job,
    Passed,
    Settling,
    device_answers,
    failure,
    past_path,
    run_call,
    run_stage,
    settle,
)
from harness.compare import Verdict
from harness.device import DeviceFacts
from harness.errors import MachineError
from harness.outcome import (
    Artifact,
    CompileFailed,
    LaunchFailed,
    Mode,
    Proof,
    Samples,
    Stage,
    TimedOut,
    Valued,
)  # fmt: skip
from harness.problem import Problem
from harness.space import Config

__all__ = ["DEVICE_LOST", "Depth", "Job", "Limits", "Passed", "ProcessRunner", "Runner", "device_answers"]

_LOG_TAIL = 2000
# What is started with no time left still ends by itself, soon.
_LEAST_S = 0.1
# How long a device that answers nobody is waited for before it is asked once more.
_MOURNING_S = (1.0, 4.0)
# How often the children of a pool are started anew for one stage.
_REBUILT = 2

# Pebble keeps its limits by the wall's clock, which somebody may set while a candidate runs.
pebble.pool.process.time = SimpleNamespace(time=time.monotonic, sleep=time.sleep)

Pool = Literal["compiler", "interpreter", "device"]
Compiled = Artifact | CompileFailed | TimedOut
Judged = Verdict | LaunchFailed | TimedOut
Numbered = Valued | LaunchFailed | TimedOut
Proved = Proof | LaunchFailed | TimedOut
Raced = tuple[Samples, ...] | LaunchFailed | TimedOut


class Runner(Protocol):
    """Where candidates are tried: child processes, or a fake in tests. Every method starts work and returns how to wait."""

    @property
    def device(self) -> DeviceFacts: ...

    @property
    def mode(self) -> Mode: ...

    def compile(self, problem: Problem, config: Config) -> Callable[[], Compiled]: ...

    def verify(self, problem: Problem, config: Config) -> Callable[[], Judged]: ...

    def value(
        self, problem: Problem, config: Config, passed: Passed, *, incumbent: Config | None, depth: Depth
    ) -> Callable[[], Numbered]:
        """Put a number on a candidate: a time beside the incumbent's, or an estimate."""
        ...

    def race(self, problem: Problem, entrants: Sequence[Config], *, rounds: int, turn: int) -> Callable[[], Raced]:
        """Time configs that passed their gate in turns, one sample of each in every round; `turn` numbers the parts of a race."""
        ...

    def prove(self, problem: Problem, config: Config) -> Callable[[], Proved]:
        """Ask the whole suite about a finalist."""
        ...

    def close(self) -> None: ...


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


@dataclass(slots=True, kw_only=True)
class ProcessRunner:
    """Runs stages in pools of child processes, which start when they are first needed.

    Compilers and estimates share one pool. Verdicts come from Triton's interpreter in a second pool when no device is
    here, and from the device otherwise, whose one worker also measures. `left` says how many seconds a stage may take beside
    its own limit, when it is started. `prepare` is called in every child once it is set up.
    """

    job: Job
    jobs: int
    cache: Path
    limits: Limits = field(default_factory=Limits)
    left: Callable[[], float] = lambda: math.inf
    prepare: Callable[[], None] | None = None
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

    def race(self, problem: Problem, entrants: Sequence[Config], *, rounds: int, turn: int) -> Callable[[], Raced]:
        from harness.timing import race

        given = (problem, tuple(entrants), rounds, (self.job.seed, turn))
        return self.call("device", "measure", race, *given, limit_s=self.limits.value_s)

    def call(
        self, pool: Pool, stage: Stage, function: Callable[..., Any], *arguments: Any, limit_s: float
    ) -> Callable[[], Any]:
        """Start `function(kernel, *arguments)` in a child; it comes back as what it returns, `LaunchFailed` or `TimedOut`.

        It must be a function of a module of ours; errors of ours that are not about the kernel are raised by the wait.
        """
        return self._schedule(pool, stage, limit_s, run_call, (stage, self.job, pool == "device", function, arguments))

    def close(self) -> None:
        """Stop every child, at once."""
        for pool in self._pools.values():
            pool.stop()
            pool.join()
        self._pools.clear()
        shutil.rmtree(self._logs, ignore_errors=True)

    def _start(self, pool: Pool, stage: Stage, problem: Problem, config: Config, **extra: Any) -> Callable[[], Any]:
        arguments = (stage, self.job, problem, config)
        return self._schedule(pool, stage, self.limits.seconds(stage), run_stage, arguments, **extra)

    def _schedule(
        self, pool: Pool, stage: Stage, limit_s: float, function: Any, arguments: Any, **extra: Any
    ) -> Callable[[], Any]:
        limit = max(min(limit_s, self.left()), _LEAST_S)

        def start() -> tuple[ProcessPool, Any]:
            return self._submit(pool, function, args=arguments, kwargs=extra, timeout=limit)

        started = start()

        def wait() -> Any:
            at, future = started
            mourned, broken, doubted = 0, 0, False
            while True:
                try:
                    return future.result()
                except FutureTimeoutError:
                    return TimedOut(stage=stage, limit_s=limit)
                except BrokenProcessPool as error:
                    broken += 1
                    self._drop(pool, at, error if broken > _REBUILT else None)
                except ProcessExpired as expired:
                    if expired.exitcode == NO_DEVICE:
                        self._mourn(mourned, expired)
                        mourned += 1
                    elif doubted or not self._doubtful(pool, expired):
                        return failure(stage, describe_exit(expired.exitcode), self._log(expired))
                    else:
                        doubted = True
                at, future = start()

        return wait

    def _submit(self, name: Pool, function: Any, **how: Any) -> tuple[ProcessPool, Any]:
        """A pool, and what it promises. One that broke, as Pebble's do when a child dies that had nothing to do, is replaced."""
        for turn in range(_REBUILT + 1):
            pool = self._pool(name)
            try:
                return pool, pool.schedule(function, **how)
            except RuntimeError as error:
                self._drop(name, pool, error if turn == _REBUILT else None)
        raise AssertionError("a pool that cannot be had is a machine error")

    def _drop(self, name: Pool, pool: ProcessPool, error: BaseException | None) -> None:
        """Have `pool` replaced by whoever needs one next. Raises `MachineError` of `error`, if that is given up."""
        if name in self._pools and self._pools[name] is pool:
            del self._pools[name]
            pool.stop()
            pool.join()
        if error is not None:
            raise MachineError(
                f"the child processes that work as `{name}` cannot be kept alive: {error}",
                hint="see whether memory or processes are short here, then run the same command again",
            ) from error

    def _mourn(self, times: int, expired: ProcessExpired) -> None:
        """Wait for a device that answered nothing before any candidate had touched it; at last give it up."""
        if times == len(_MOURNING_S):
            said = self._log(expired).strip().splitlines()
            raise MachineError(
                f"the device no longer computes what is known: {said[-1] if said else 'it does not say why'}",
                hint="every finished trial is in the journal; see `nvidia-smi`, then run the same command again",
            )
        time.sleep(max(0.0, min(_MOURNING_S[times], self.left())))

    def _doubtful(self, pool: Pool, expired: ProcessExpired) -> bool:
        """Whether a death may not be the candidate's doing: killed from outside, or on a device after others had been there."""
        if describe_exit(expired.exitcode) == KILLED:
            return True
        return pool == "device" and past_path(self._logs, expired.pid).exists()

    def _log(self, expired: ProcessExpired) -> str:
        return _tail(self._logs / f"{expired.pid}.log")

    def _pool(self, name: Pool) -> ProcessPool:
        if name not in self._pools:
            how = Settling(
                environment=_variables(interpret=name == "interpreter") | {"TRITON_CACHE_DIR": str(self.cache)},
                memory_bytes=0 if name == "device" else self.limits.memory_bytes,
                logs=self._logs,
                parent=os.getpid(),
                prepare=self.prepare,
            )
            self._pools[name] = ProcessPool(
                max_workers=1 if name == "device" else self.jobs,
                initializer=settle,
                initargs=(how,),
                context=multiprocessing.get_context("spawn"),
            )
        return self._pools[name]


def child_environment(*, interpret: bool) -> dict[str, str]:
    """All environment variables of a child process, in which Triton interprets or compiles."""
    return dict(os.environ) | _variables(interpret=interpret)


def _variables(*, interpret: bool) -> dict[str, str]:
    # Two children on two cores are faster than four that each believe to have two.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # PyTorch's compiler would start processes of its own in each of ours.
    return {"TRITON_INTERPRET": "1" if interpret else "0", "TORCHINDUCTOR_COMPILE_THREADS": "1", **threads}


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


KILLED = describe_exit(-signal.SIGKILL)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
