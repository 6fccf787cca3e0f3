"""A process under NVIDIA's compute-sanitizer, with Triton's own checks switched on: how it is started and what it found.

The shadow memory of Triton's interpreter sees every access that a program makes; compiled code is watched by these instead.
Refuses to start what it is to watch.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from harness.errors import MachineError
from harness.workspace import environment

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
_SMALLEST = "import torch; torch.ones(8, device='cuda').add_(1).sum().item()"


def program() -> str:
    """The path of compute-sanitizer. Raises `MachineError` if it is not installed."""
    found = find_program()
    if found is None:
        raise MachineError(
            f"`{_PROGRAM}` is not on the PATH", hint="it comes with the CUDA toolkit; leave out `--sanitize`"
        )
    return found


def find_program() -> str | None:
    """The path of compute-sanitizer, on the PATH or where the CUDA toolkit puts it; None if it is nowhere there."""
    toolkits = [Path(folder) / "bin" for folder in (environment("CUDA_HOME"), "/usr/local/cuda") if folder]
    return shutil.which(_PROGRAM) or next(
        (str(folder / _PROGRAM) for folder in toolkits if os.access(folder / _PROGRAM, os.X_OK)), None
    )


def refuses(seconds: float = 120.0) -> str:
    """Why it cannot watch a process on this GPU, in words; empty if it can. Some virtual machines hide what it needs."""
    log = new_log()
    try:
        command = wrapped([sys.executable, "-c", _SMALLEST], "memcheck", log)
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"the smallest program did not end under it within {seconds:.0f} seconds"
    except (OSError, MachineError) as error:
        return str(error).splitlines()[0]
    else:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return "" if done.returncode == 0 else f"the smallest program fails under it: {last or first_complaint(log)}"
    finally:
        log.unlink(missing_ok=True)


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
