"""Files that are whole at any moment: a reader sees the old content or the new one, whatever stops the writer.

Refuses to leave anything else behind: what was half written is overwritten by the next attempt.
"""

import os
from pathlib import Path

from harness.errors import MachineError


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path` and force it to the disk. Raises `MachineError`, with the old file as it was, if that fails."""
    # One name for all attempts, so that a writer that was killed leaves no second file behind its back.
    fresh = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror or error}",
            hint="what it held before is as it was; make room, and run the same command again",
        ) from error
