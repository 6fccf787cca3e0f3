"""Candidate to artifact: really compile every launch for a target, whether or not such a GPU is here.

Runs inside a worker, in a process in which Triton is not interpreting; the caller decides Triton's cache folder.
Refuses to launch anything, to allocate anything that lasts (tensors are on the `meta` device), and to say "failed" of an error
that no compiler raised: such an error propagates, for it is a bug of ours or of the kernel file. A compiler that aborts
takes its process with it, which the caller sees.
"""

import contextlib
import inspect
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError, CompileTimeAssertionFailure, UnsupportedLanguageConstruct
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError

from harness.binary import read_binary
from harness.device import DeviceFacts
from harness.errors import BugError, MachineError
from harness.gate_cases import gate_cases
from harness.inputs import DTYPES, placement_for, unwritten
from harness.operation import operation_for, problem_keywords, shapes
from harness.outcome import Artifact, Binary, CompileFailed
from harness.problem import Layout, Problem
from harness.space import Config
from harness.subject import calls_pytorch, workspaces_of

# What the compiler raises when it refuses a program. The middle end has no type of its own: it raises RuntimeError,
# whose text is one of `_REFUSALS`; any other RuntimeError is not the compiler's.
_REFUSAL_TYPES = (
    CompilationError,
    CompileTimeAssertionFailure,
    UnsupportedLanguageConstruct,
    OutOfResources,
    PTXASError,
)
_REFUSALS = ("PassManager::run failed", "failed to translate module to LLVM IR", "failed to legalize", "LLVM")

_LOG_TAIL = 4000


def compile_candidate(
    kernel: Any, problem: Problem, config: Config, device: DeviceFacts, *, unread: bool = False
) -> Artifact | CompileFailed:
    """Compile every launch of `config` for `problem` on `device`, and read the binaries.

    `kernel` is a loaded kernel file. The signature and its specialisation (divisibility by 16, ones, 32 or 64 bit) come
    from Triton's own launch path, so a launch on tensors of the same shape finds this code in the cache.

    Returns `CompileFailed` when the compiler refuses. Raises `BugError` in a process in which Triton interprets. What PyTorch
    compiles is lowered for the device first; where this PyTorch cannot be asked to, that is a `MachineError`, or, if `unread`
    is allowed because a device will compile it anyway, an artifact without binaries.
    """
    if knobs.runtime.interpret:
        raise BugError("asked to compile where Triton interprets", hint="compile in a worker of its own")
    with compiling_for(device), _compiler_log() as log:
        try:
            binaries, compile_ms = _compile(compiled_launches(kernel, problem, config, device))
        except MachineError as unknown:
            if not unread:
                raise
            stand_in = f"{unknown.message}; {config}"
            return Artifact(binaries=(), toolchain=f"{toolchain(device)}, not read here", unread=stand_in)
        except _REFUSAL_TYPES as refusal:
            return _failed(refusal, log())
        except RuntimeError as refusal:
            if not any(text in str(refusal) for text in _REFUSALS):
                raise
            return _failed(refusal, log())
    return Artifact(binaries=binaries, toolchain=toolchain(device), compile_ms=compile_ms)


def compiled_launches(kernel: Any, problem: Problem, config: Config, device: DeviceFacts) -> Sequence[Any]:
    """`meta_launches`, with what PyTorch makes of its functions for `device` in place of calls of them."""
    found: list[Any] = []
    for launch in meta_launches(kernel, problem, config, device):
        if not hasattr(launch, "subject"):
            found.append(launch)
            continue
        from harness.inductor import launches  # PyTorch's compiler takes seconds to import

        found += launches(launch.subject, device)
    return found


def compile_gate(kernel: Any, problem: Problem, config: Config, device: DeviceFacts) -> None:
    """Leave in Triton's cache what the gate on a device launches to judge `config`; what the compiler refuses, it meets again
    there."""
    if calls_pytorch(kernel):
        return  # PyTorch compiles where it runs
    with compiling_for(device), _compiler_log():
        for case in gate_cases(problem, config, unit=True):
            lies = case.placements()
            tensors = {
                name: unwritten(name, shape, DTYPES[dtype], lies[name], device="meta").view
                for name, (shape, dtype) in shapes(case.problem).items()
            }
            with contextlib.suppress(*_REFUSAL_TYPES, RuntimeError, ValueError):
                for launch in _launches(kernel, case.problem, config, tensors, device):
                    launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.constants, **launch.options)


def meta_launches(kernel: Any, problem: Problem, config: Config, device: DeviceFacts | None = None) -> Sequence[Any]:
    """The launches (`kernels.launch.Launch`) that `config` makes for `problem` on `device`, on `meta` tensors, which hold
    nothing. A kernel whose grid depends on the device is told its multiprocessors."""
    tensors = {name: _empty(shape, dtype, problem.layout) for name, (shape, dtype) in shapes(problem).items()}
    return _launches(kernel, problem, config, tensors, device)


def _launches(
    kernel: Any,
    problem: Problem,
    config: Config,
    tensors: Mapping[str, torch.Tensor],
    device: DeviceFacts | None,
) -> Sequence[Any]:
    inputs = {name: tensors[name] for name in operation_for(problem).inputs}
    scratch = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in workspaces_of(kernel, inputs, config).items()
    }
    told: dict[str, Any] = {}
    if device is not None and "multiprocessors" in inspect.signature(kernel.launches).parameters:
        told["multiprocessors"] = device.multiprocessors
    found: Sequence[Any] = kernel.launches(**tensors, **scratch, **problem_keywords(problem), **config, **told)
    return found


def toolchain(device: DeviceFacts) -> str:
    """The versions that decide which code comes out, for example `triton 3.6.0, ptxas 12.8`."""
    if device.vendor != "cuda":
        return f"triton {triton.__version__}"
    tool = knobs.nvidia.ptxas_blackwell if device.compute_capability >= 100 else knobs.nvidia.ptxas
    return f"triton {triton.__version__}, ptxas {tool.version}"


@dataclass(slots=True)
class _Misses:
    """Counts, as Triton's compilation listener, the compilations that no cache answered."""

    count: int = 0
    before: Any = field(default=None)

    def __call__(self, **event: Any) -> None:
        self.count += not event["cache_hit"]
        if self.before is not None:
            self.before(**event)


def _compile(launches: Sequence[Any]) -> tuple[tuple[Binary, ...], float]:
    """Binaries of the launches, and the milliseconds spent on those that no cache had."""
    spent = 0.0
    binaries = []
    before = knobs.compilation.listener
    misses = _Misses(before=before)
    knobs.compilation.listener = cast("Any", misses)
    try:
        for launch in launches:
            seen, began = misses.count, time.perf_counter()
            compiled = launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.constants, **launch.options)
            if misses.count > seen:
                spent += (time.perf_counter() - began) * 1e3
            binaries.append(read_binary(compiled.asm, compiled.metadata))
    finally:
        knobs.compilation.listener = before
    return tuple(binaries), spent


def _empty(shape: Sequence[int], dtype: str, layout: Layout) -> torch.Tensor:
    """A tensor in the strides that a measurement would give it."""
    order = placement_for(layout, axes=len(shape)).order
    laid_out = torch.empty([shape[axis] for axis in order], dtype=DTYPES[dtype], device="meta")
    return laid_out.permute([order.index(axis) for axis in range(len(shape))])


class _AbsentDriver:
    """Stands in for the driver of a GPU that is not here; enough of one to compile, not to launch."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device: another target must be another device, or its code would be reused.
        return f"absent {self._target.backend}:{self._target.arch}"

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def compiling_for(device: DeviceFacts) -> Iterator[None]:
    """Make Triton compile for `device`, with a stand-in for its driver also where such a GPU is here.

    The code and its place in the cache are the same. A real driver would make a context on the GPU in each of many compiling
    processes, which takes its memory, and address space beyond what such a process may use.
    """
    arch = device.compute_capability if device.vendor == "cuda" else device.arch
    driver.set_active(cast("Any", _AbsentDriver(GPUTarget(device.vendor, arch, device.warp_size))))
    try:
        yield
    finally:
        # Whoever asks next gets the driver that is here, if there is one.
        driver.set_active(cast("Any", None))


@contextmanager
def _compiler_log() -> Iterator[Callable[[], str]]:
    """A reader of what has been written to standard error since, by the compiler's C++ code too.

    Where standard error is a file already, it stays where it is: whoever sent it there wants to read it if the compiler
    takes this process with it. Else it goes to a temporary file in the meantime.
    """
    sys.stderr.flush()
    if stat.S_ISREG(os.fstat(2).st_mode):
        begin = os.fstat(2).st_size
        yield lambda: _read_from(Path("/proc/self/fd/2"), begin)
        return
    with tempfile.NamedTemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield lambda: _read_from(Path(sink.name), 0)
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def _read_from(path: Path, begin: int) -> str:
    sys.stderr.flush()
    with path.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def _failed(refusal: Exception, log: str) -> CompileFailed:
    return CompileFailed(reason=_reason(refusal, log), log=_tail(str(refusal), log))


def _reason(refusal: Exception, log: str) -> str:
    """The type, what of an often long message says most, and the pass that failed, if the log names it."""
    innermost: BaseException = refusal
    while isinstance(innermost, CompilationError) and innermost.__cause__ is not None:
        innermost = innermost.__cause__
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip(" \t^`")]
    telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
    failed = re.search(r"Pipeline failed while executing \[`(\w+)`", log)
    where = f" in {failed[1]}" if failed else ""
    return f"{type(innermost).__name__}: {telling[0] if telling else 'no explanation'}{where}"[:300]


def _tail(message: str, log: str) -> str:
    """What was said: the lines that name a failure (listings of the whole program surround them), then the message."""
    telling = [line for line in log.splitlines() if re.search(r"\b(error|note|Assertion|LLVM ERROR)\b", line)]
    said = "\n".join(dict.fromkeys(telling)) or log
    return "\n".join(part[-_LOG_TAIL:] for part in (said, message) if part.strip())
