"""A device that exists in child processes only, and candidates that do to it, or to their process, what their config says.

`pretend` is called in every child of a `PretendedRunner`, so the processes, their deaths and the limits are real.
"""

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import child
from harness.child import Passed
from harness.outcome import Measured, Samples
from harness.worker import ProcessRunner
from tests.fake_runner import fake_artifact, passing_proof, passing_verdict

# Harmless, but long enough for whoever looks at a clock meanwhile.
UNHURRIED = "takes its time"

_sticky = {"lost": False}


def pretend() -> None:
    """Replace what needs a GPU, a compiler or torch."""
    child.STAGES.update(compile=_compile, verify=_verify, measure=_measure, prove=_prove)
    child._kernel = lambda job: job.root
    child.device_answers = lambda: not _sticky["lost"]
    child.canary_complaint = _canary


class PretendedRunner(ProcessRunner):
    """The tuner's own runner, whose children pretend a device."""

    def race(self, problem: Any, entrants: Any, *, rounds: int, turn: int) -> Callable[[], Any]:
        return self.call("device", "measure", race, entrants, rounds, limit_s=self.limits.value_s)

    def prove(self, problem: Any, config: Any) -> Callable[[], Any]:
        return self._start("device", "prove", problem, config)


def race(folder: Path, entrants: Sequence[Any], rounds: int) -> tuple[Samples, ...]:
    del folder
    return tuple(Samples(times_ms=_times(config, rounds)) for config in entrants)


def _times(config: Any, count: int) -> tuple[float, ...]:
    cost = 1.0 + 0.1 * int(config["number"])
    return tuple(cost * (1 + 1e-4 * (place % 7)) for place in range(count))


def _compile(job: Any, problem: Any, config: Any) -> Any:
    _fault("compile", job.root, config)
    return fake_artifact(config)


def _verify(job: Any, problem: Any, config: Any) -> Any:
    _fault("verify", job.root, config)
    return passing_verdict(problem, "device")


def _prove(job: Any, problem: Any, config: Any) -> Any:
    return passing_proof("device")


def _measure(job: Any, problem: Any, config: Any, *, passed: Passed, incumbent: Any, depth: str) -> Measured:
    _fault("measure", job.root, config)
    beside = () if incumbent is None else _times(incumbent, 40)
    samples = Samples(times_ms=_times(config, 40), incumbent_ms=beside)
    return Measured(verdict=passed.verdict, samples=samples, artifact=passed.artifact)


def _canary() -> str:
    broken = Path(os.environ["TRITON_CACHE_DIR"]) / "broken"
    if not broken.exists():
        return ""
    left = int(broken.read_text()) - 1
    broken.write_text(str(left)) if left else broken.unlink()
    return "the canary failed: CUDA error: unspecified launch failure"


def _once(folder: Path, name: str) -> bool:
    """Whether this is the first time of all."""
    mark = folder / f"{name}.once"
    first = not mark.exists()
    mark.touch()
    return first


def _raise(words: str, *, sticky: bool = False) -> None:
    _sticky["lost"] |= sticky
    raise RuntimeError(words)


def _poison() -> None:
    """An error of the device that nobody notices until the next candidate asks it something."""
    _sticky["lost"] = True


def _abort() -> None:
    os.write(2, b"LLVM ERROR: the compiler gave up\n")
    os.abort()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "kernel.cubin")


def _fault(stage: str, folder: Path, config: Any) -> None:
    if stage != "compile" and _sticky["lost"]:
        _raise("CUDA error: an illegal memory access was encountered", sticky=True)
    faults: dict[tuple[str, str], Callable[[], Any]] = {
        ("segfault in the compiler", "compile"): lambda: ctypes.string_at(0),
        ("compiler abort", "compile"): _abort,
        ("hang in the compiler", "compile"): lambda: time.sleep(3600),
        ("out of memory on the host", "compile"): lambda: bytearray(1 << 36),
        ("full disk under the compiler", "compile"): _fill_the_disk,
        ("compiler killed once", "compile"): lambda: kill() if _once(folder, "compiler") else None,
        ("illegal address", "verify"): lambda: _raise(
            "CUDA error: an illegal memory access was encountered", sticky=True
        ),
        ("misaligned access", "measure"): lambda: _raise("CUDA error: misaligned address", sticky=True),
        ("hang on the device", "measure"): lambda: time.sleep(3600),
        ("out of memory on the device", "measure"): lambda: _raise("CUDA out of memory. Tried to allocate 2.00 TiB."),
        ("segfault on the device", "verify"): lambda: ctypes.string_at(0),
        ("worker killed once", "measure"): lambda: kill() if _once(folder, "worker") else None,
        ("worker killed always", "measure"): kill,
        ("error that shows in the next candidate", "measure"): _poison,
        (UNHURRIED, "measure"): lambda: time.sleep(0.6),
    }
    faults.get((str(config["act"]), stage), lambda: None)()
