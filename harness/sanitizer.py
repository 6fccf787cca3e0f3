"""A process under NVIDIA's compute-sanitizer, with Triton's own checks switched on: how it is started and what it found.

The shadow memory of Triton's interpreter sees every access that a program makes; compiled code is watched by these instead.
Refuses to start anything itself.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from harness.errors import MachineError

# What compute-sanitizer can look for: accesses outside allocations, races in shared memory, reads of what nobody wrote,
# barriers that not all threads reach.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The exit code that a process is given when something was found; none that Python or a signal gives.
FOUND = 86

_PROGRAM = "compute-sanitizer"
# PyTorch's own allocator hands out parts of large blocks, which hides accesses outside them. Triton then compiles assertions
# and checks of integer overflow in.
ENVIRONMENT: Mapping[str, str] = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_DEBUG": "1"}
_PREFIX = "========= "


def program() -> str:
    """The path of compute-sanitizer. Raises `MachineError` if it is not installed."""
    found = shutil.which(_PROGRAM)
    if found is None:
        raise MachineError(
            f"`{_PROGRAM}` is not on the PATH", hint="it comes with the CUDA toolkit; leave out `--sanitize`"
        )
    return found


def new_log() -> Path:
    """An empty file for what the sanitizer says, so that it does not mix with what the process says."""
    handle, name = tempfile.mkstemp(prefix="flashtune-sanitizer-")
    os.close(handle)
    return Path(name)


def wrapped(command: list[str], tool: str, log: Path) -> list[str]:
    """`command`, watched by `tool`."""
    return [program(), "--tool", tool, "--error-exitcode", str(FOUND), "--log-file", str(log), *command]


def first_complaint(log: Path) -> str:
    """What was found first, in one line, or that the log does not say."""
    lines = [line.removeprefix(_PREFIX).strip() for line in log.read_text(errors="replace").splitlines()]
    telling = [line for line in lines if line and not line.startswith(("COMPUTE-SANITIZER", "=", "ERROR SUMMARY"))]
    return " ".join(telling[:2]) if telling else "something that its log does not name"
