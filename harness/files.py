"""Files that are whole at any moment: a reader sees the old content or the new one, whatever stops the writer.

Refuses to write in place.
"""

import os
import tempfile
from pathlib import Path

from harness.errors import MachineError

_HINT = "what it held before is as it was; make room, and run the same command again"


def write_whole(path: Path, content: bytes, *, what: str = "", hint: str = _HINT) -> None:
    """Put `content` at `path` and force it to the disk. Raises `MachineError`, with the old file as it was, if that fails:
    `what` (the path, without it) could not be written, and `hint` says what to do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two writers at one moment must not write into one file.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).chmod(0o644)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise MachineError(f"cannot write {what or path}: {error.strerror or error}", hint=hint) from error
