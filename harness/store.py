"""The journal: an append-only file of records that survives any interruption with at most the trial in flight lost.

Refuses a file that is not a journal, one of another run, one that is damaged anywhere but in its last line, and one that
another tune is writing. Never rewrites what it has written.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import JournalError
from harness.outcome import RECORDS, Record

# History of the schema: 1 is the first.
SCHEMA = 1


@dataclass(slots=True)
class Journal:
    """An open journal. `identity` says what every record in it depends on; `records` are all that it holds.

    `torn` is the length in bytes of an unfinished or unreadable last line that was dropped when it was opened; it is kept in a
    file beside the journal, whose name ends in `.torn`.
    """

    path: Path
    identity: Mapping[str, Any]
    records: list[Record]
    torn: int
    _file: FileIO = field(repr=False)
    # The last record of each kind: a journal of a whole space is asked thousands of times.
    _last: dict[Any, Record] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for record in self.records:
            self._last[key_of(record)] = record

    def find(self, problem: str, config: Mapping[str, Any]) -> Record | None:
        """The record of this candidate's trial, if it was tried before."""
        return self._last.get(_key(problem, config, "screen", None))

    def find_race(self, problem: str, entrants: Iterable[Mapping[str, Any]]) -> Record | None:
        """The race of these configs, in whichever order, if it took place before."""
        return self._last.get(_race_key(problem, entrants))

    def find_shared(self, problem: str, config: Mapping[str, Any], beside: Mapping[str, Any]) -> Record | None:
        """The samples of another problem's config beside that champion, if they were taken before."""
        return self._last.get(_key(problem, config, "shared", beside))

    def find_final(self, problem: str, config: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Record | None:
        """The fresh samples of this candidate beside that one, if they were taken before."""
        return self._last.get(_key(problem, config, "final", beside))

    def find_proof(self, problem: str, config: Mapping[str, Any]) -> Record | None:
        """What the suite said of this candidate as a finalist, if it was asked before."""
        return self._last.get(_key(problem, config, "proof", None))

    def begin(self, problem: str, config: Mapping[str, Any]) -> None:
        """Say that a candidate is about to be tried, where a journal is shared: nothing here."""

    def append(self, record: Record) -> None:
        """Write one record and force it to the disk. Raises `JournalError`, with the file as it was, if that fails."""
        try:
            _write(self._file, RECORDS.dump_json(record) + b"\n")
        except OSError as error:
            raise JournalError(
                f"cannot write to the journal {self.path}: {error.strerror}",
                hint="free some space and run the same command again; everything before this trial is kept",
            ) from error
        self.records.append(record)
        self._last[key_of(record)] = record

    def close(self) -> None:
        self._file.close()


def key_of(record: Record) -> Any:
    """What a record is of: the last one of a key counts."""
    if record.race is not None:
        return _race_key(record.problem, [entrant.config for entrant in record.race.entrants])
    # A trial is the same trial whatever it was screened beside.
    beside = record.beside if record.role in ("final", "shared") else None
    return _key(record.problem, record.config, record.role, beside)


def _race_key(problem: str, entrants: Iterable[Mapping[str, Any]]) -> Any:
    return problem, frozenset(frozenset(config.items()) for config in entrants), "race"


def _key(problem: str, config: Mapping[str, Any], role: str, beside: Mapping[str, Any] | None) -> Any:
    return problem, frozenset(config.items()), role, None if beside is None else frozenset(beside.items())


def open_journal(path: Path, identity: Mapping[str, Any]) -> Journal:
    """Open or create the journal at `path` for appending.

    `identity` (JSON values) must equal what the file says, if it exists: records of different devices, kernels or
    toolchains never mix. Raises `JournalError`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise JournalError(
            f"cannot open the journal {path} for writing: {error.strerror}",
            hint="pass `--runs DIR` with a folder that can be written",
        ) from error
    try:
        return _adopt(path, file, identity)
    except BaseException:
        file.close()
        raise


def open_memory_journal(identity: Mapping[str, Any]) -> Journal:
    """A journal that nobody reads again: it is gone when it is closed. For tunes on devices that do not exist."""
    file = FileIO(os.memfd_create("journal"), "a+b")
    return Journal(path=Path(os.devnull), identity=dict(identity), records=[], torn=0, _file=file)


def read_journal(path: Path, *, size: int | None = None) -> tuple[dict[str, Any], list[Record]]:
    """Identity and records of a journal, or of its first `size` bytes, without locking or changing it. Raises `JournalError`."""
    try:
        content = path.read_bytes()[:size]
    except OSError as error:
        raise JournalError(f"cannot read the journal {path}: {error.strerror}") from error
    identity, records, _ = _parse(path, content)
    return identity or {}, records


def _adopt(path: Path, file: FileIO, identity: Mapping[str, Any]) -> Journal:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise JournalError(
            f"the journal {path} is being written by another tune", hint="wait for it, or pass another `--runs DIR`"
        ) from error
    file.seek(0)
    content = file.read()
    found, records, whole = _parse(path, content)
    if found is None:
        header = {"schema": SCHEMA, "journal": "flashtune", "identity": dict(identity)}
        os.ftruncate(file.fileno(), 0)
        try:
            _write(file, json.dumps(header).encode() + b"\n")
        except OSError as error:
            raise JournalError(
                f"cannot write to the journal {path}: {error.strerror}", hint="free some space"
            ) from error
    else:
        _require_same(path, found, identity)
        if whole < len(content):
            with contextlib.suppress(OSError):
                path.with_suffix(".torn").write_bytes(content[whole:])
            os.ftruncate(file.fileno(), whole)
    return Journal(path=path, identity=dict(identity), records=records, torn=len(content) - whole, _file=file)


def _write(file: FileIO, line: bytes) -> None:
    """Write a line whole and force it to the disk, or leave the file as it was and raise `OSError`."""
    before = os.fstat(file.fileno()).st_size
    try:
        written = file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), before)
        raise


def _parse(path: Path, content: bytes) -> tuple[dict[str, Any] | None, list[Record], int]:
    """Identity (None for an empty or header-torn file), records, and the length of the whole lines."""
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].split(b"\n")[:-1]
    if not lines:
        if content and not content.startswith(b'{"schema"'):
            raise JournalError(f"{path} is not a journal of flashtune")
        return None, [], 0
    try:
        header = json.loads(lines[0])
        identity = header["identity"]
        if header["journal"] != "flashtune" or header["schema"] != SCHEMA:
            raise JournalError(f"the journal {path} has schema {header['schema']}, this version reads {SCHEMA}")
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{path} is not a journal of flashtune: its first line cannot be read") from error
    if len(lines) > 1 and not _is_json(lines[-1]):
        # What a power cut leaves of the trial in flight may end in a line break that belongs to something else.
        whole -= len(lines.pop()) + 1
    records = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            records.append(RECORDS.validate_json(line))
        except ValidationError as error:
            raise JournalError(
                f"the journal {path} is damaged in line {number} of {len(lines)}: {error.errors()[0]['msg']}",
                hint="move the file away and run again, or cut it before that line to keep what is above",
            ) from error
    return identity, records, whole


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _require_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise JournalError(
                f"the journal {path} belongs to another run: its {name} is `{found.get(name)}`, this one's `{wanted.get(name)}`",
                hint="pass another `--runs DIR`",
            )
