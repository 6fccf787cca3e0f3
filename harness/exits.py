"""How a child process ended, and what it last said, in words."""

import signal
from pathlib import Path

# The exit code of a process that gave itself up because its device failed.
DEVICE_LOST = 97
LOG_TAIL = 2000


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


def first_line(error: BaseException) -> str:
    """The type of what was raised, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def tail_of(path: Path) -> str:
    """The end of a log; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
