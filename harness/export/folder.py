"""The folder that an export writes: whole or not at all, and never over what somebody else has put there.

What we wrote is known by its manifest, with a digest for each file. Refuses a folder with anything in it that is not ours, or
that was changed since.
"""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter, ValidationError

from harness.errors import BugError, MachineError, UsageError
from harness.export_documents import MANIFEST, ExportDocument
from harness.sealed import tame

MANIFESTS: TypeAdapter[ExportDocument] = TypeAdapter(ExportDocument)

# What Python leaves where it has imported from.
_TRACES = "__pycache__"


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """The sha256 of each file."""
    return {path: "sha256:" + hashlib.sha256(content).hexdigest() for path, content in sorted(files.items())}


def require_ours(out: Path, target: str) -> None:
    """Raise `UsageError` unless `out` may be written: it is not there, empty, or an earlier export to `target`, unchanged."""
    if Path.cwd().is_relative_to(out.resolve()):
        raise UsageError(f"{tame(out)} holds the folder you are in", hint="give a folder of its own as `--out`")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{tame(out)} is a file, not a folder", hint="give another `--out`")
    there = {
        path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir() and _TRACES not in path.parts
    }
    if not there:
        return
    hint = "give another `--out`, or move what is there away"
    if MANIFEST not in there:
        raise UsageError(f"{tame(out)} is not empty, and no earlier export", hint=hint)
    try:
        ours = MANIFESTS.validate_json((out / MANIFEST).read_bytes())
    except ValidationError as error:
        raise UsageError(f"{tame(out / MANIFEST)} is not what an export writes", hint=hint) from error
    if ours.target != target:
        raise UsageError(f"{tame(out)} is an export to {ours.target}, not to {target}", hint=hint)
    if foreign := sorted(there - {MANIFEST, *ours.files}):
        raise UsageError(f"{tame(out / foreign[0])} is not of the export there", hint=hint)
    for path in sorted(there & ours.files.keys()):
        if digests({path: (out / path).read_bytes()})[path] != ours.files[path]:
            raise UsageError(f"{tame(out / path)} was changed since it was exported", hint=hint)


@contextlib.contextmanager
def drafted(out: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder beside `out` that holds `files`; it is gone at the end, unless `put_in_place` has moved it."""
    for path in files:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise BugError(f"an export was about to write to {tame(path)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise MachineError(f"cannot write beside {tame(out)}: {error.strerror}", hint="give another `--out`") from error
    try:
        draft.chmod(0o755)
        write(draft, files)
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder that nobody reads yet."""
    for path, content in files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)


def put_in_place(draft: Path, out: Path) -> None:
    """Move the finished folder to `out`. What was there goes, at the end; if the move fails, it is put back."""
    older = None
    if out.exists():
        older = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.")) / "older"
        out.rename(older)
    try:
        draft.rename(out)
    except BaseException:
        if older is not None and not out.exists():
            older.rename(out)
        raise
    finally:
        if older is not None:
            shutil.rmtree(older.parent, ignore_errors=True)
