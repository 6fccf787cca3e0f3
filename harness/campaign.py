"""The campaign: everything that the owner of a new GPU wants to know of it, part by part, in the order of their value.

A part is a value that says what to do; a laboratory does it. The ledger on disk says what was done and what it gave, and is
written after every part, so that whatever ends a campaign costs at most the part in flight (and of that no more than the trial in
flight, where a part keeps a journal of its own). Refuses to know what a part does, and to begin one that cannot end in time.
"""

import fcntl
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from harness.errors import MachineError, OutOfTimeError, UsageError, first_line
from harness.files import write_whole

# History of the schema: 1 is the first.
SCHEMA = 1
FILE = "campaign.json"

# What became of a part. "partial": its time ended, it goes on next time; "skipped": this machine lacks what it needs;
# "lost": the device failed under it, which says nothing of the part.
Status = Literal["done", "partial", "failed", "skipped", "lost"]
# A part that failed is tried again in later runs, so often.
MOST_ATTEMPTS = 3
# The end of a run: children are stopped, the last lines are written.
RESERVE_S = 5.0
# With less left, a device is not asked whether it still answers: a new process may need so long to ask it.
_ANSWER_S = 30.0

_VALUE = ConfigDict(extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)

Left = Callable[[], float]


@plain_dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something to do: `what` tells the laboratory, in JSON values. It is not begun with less than `least_s` seconds left, and
    may take `most_s`. `of` names the versions that its result belongs to: a digest of kernel, device and toolchain, `:`, and
    one of the judges."""

    step: str
    name: str
    what: Mapping[str, Any]
    least_s: float
    most_s: float = float("inf")
    of: str = ""


@plain_dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a laboratory gives for a part: JSON values, with units in their names."""

    status: Status
    data: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


class Lab(Protocol):
    """Where parts are done: a GPU, or a fake in tests."""

    def expect(self, parts: Sequence[Part]) -> None:
        """What is coming, in this order: compilers may begin."""
        ...

    def do(self, part: Part, left: Left) -> Given:
        """Do a part within the seconds that `left` gives. May raise; `OutOfTimeError` says that it goes on next time."""
        ...

    def answers(self) -> bool:
        """Whether the device still works; asked where there is time for it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Entry:
    """What became of a part: in which `run` (by number), after how many seconds in all runs and how many attempts that failed;
    `of` as in `Part`, `data` and `reason` as in `Given`."""

    step: str
    status: Status
    run: int
    seconds: float
    of: str
    attempts: int = 0
    reason: str = ""
    data: Mapping[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Run:
    """One call of the command. `machine` is what `doctor` says of it; `ended` is how it ended, empty while it goes on."""

    began: str
    minutes: float
    seconds: float
    ended: str
    machine: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Book:
    """The content of the ledger. `device` and `arch` as in `harness.device`."""

    schema: int
    campaign: Literal["flashtune"]
    device: str
    arch: str
    runs: tuple[Run, ...] = ()
    parts: Mapping[str, Entry] = Field(default_factory=dict)


BOOKS: TypeAdapter[Book] = TypeAdapter(Book)


class Ledger:
    """The file that says what is done. Every change is on the disk, whole, before a method returns.

    With `keep` counts what older versions of the judges gave, of the same kernels, device and toolchain.
    """

    def __init__(self, folder: Path, *, device: str, arch: str, keep: bool = False) -> None:
        self.path = folder / FILE
        self._keep = keep
        self.book = read_book(self.path) if self.path.exists() else Book(
            schema=SCHEMA, campaign="flashtune", device=device, arch=arch
        )  # fmt: skip
        if (self.book.device, self.book.arch) != (device, arch):
            raise UsageError(
                f"{self.path} is a campaign on {self.book.device} ({self.book.arch}), here is {device} ({arch})",
                hint="pass another `--out DIR`",
            )

    def begin(self, *, began: str, minutes: float, machine: Mapping[str, Any]) -> None:
        run = Run(began=began, minutes=minutes, seconds=0.0, ended="", machine=machine)
        self._write(replace(self.book, runs=(*self.book.runs, run)))

    def end(self, how: str, seconds: float) -> None:
        last = replace(self.book.runs[-1], ended=how, seconds=round(seconds, 1))
        self._write(replace(self.book, runs=(*self.book.runs[:-1], last)))

    @property
    def run(self) -> int:
        """The number of the run that goes on."""
        return len(self.book.runs) - 1

    def entry(self, part: Part) -> Entry | None:
        """What became of `part`, unless that was of other versions of what it depends on."""
        found = self.book.parts.get(part.name)
        if found is None or found.of == part.of:
            return found
        return found if self._keep and found.of.partition(":")[0] == part.of.partition(":")[0] else None

    def put(self, part: Part, entry: Entry) -> None:
        self._write(replace(self.book, parts={**self.book.parts, part.name: entry}))

    def _write(self, book: Book) -> None:
        write_whole(self.path, BOOKS.dump_json(book) + b"\n")
        self.book = book


def read_book(path: Path) -> Book:
    """Read a ledger. Raises `UsageError` that says what is wrong with it."""
    try:
        book = BOOKS.validate_json(path.read_bytes())
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise UsageError(
            f"{path} is no campaign: {first['msg']} at {place}", hint="pass another `--out DIR`"
        ) from error
    if book.schema != SCHEMA:
        raise UsageError(
            f"{path} has schema {book.schema}, this version reads {SCHEMA}", hint="pass another `--out DIR`"
        )
    return book


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one campaign at a time writes to a folder, which is made if it is not there. Raises `MachineError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise MachineError(
            f"cannot use the folder {folder}: {error.strerror}", hint="pass another `--out DIR`"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MachineError(
                f"another campaign writes to {folder}", hint="wait for it, or pass another `--out DIR`"
            ) from error
        yield
    finally:
        os.close(handle)


class Clock:
    """The seconds that are left of a run."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.total = seconds
        self._began = now()

    def spent(self) -> float:
        return self._now() - self._began

    def left(self) -> float:
        return self.total - RESERVE_S - self.spent()


def campaign(
    plan: Sequence[Part], lab: Lab, ledger: Ledger, clock: Clock, *, shares: Mapping[str, float]
) -> Iterator[tuple[Part, Entry]]:
    """Do what of `plan` is not done yet, yielding each part with what became of it.

    Steps take their turns in the order of `shares`. First each may take its share of the run's time; then what is left goes
    to what is open, step by step in the same order, and to what failed in earlier runs. Raises `MachineError` once the device
    no longer answers.
    """
    for again in (False, True):
        for step, share in shares.items():
            parts = [part for part in plan if part.step == step and _is_open(ledger, part, again=again)]
            end = clock.spent() + (clock.total if again else share * clock.total)
            fitting = [part for part in parts if _seconds(clock, end, part) >= part.least_s]
            if fitting:
                lab.expect(fitting)
            for part in fitting:
                # Those before it may have taken its time; a shorter one may still fit.
                if _seconds(clock, end, part) >= part.least_s:
                    entry = _attempt(part, lab, ledger, clock, _until(clock, end, part))
                    yield part, entry
                    if entry.status == "lost":
                        raise MachineError(
                            f"the device no longer answers since `{part.name}`: {entry.reason}",
                            hint="see its driver's log; what was done is kept, and the same command goes on",
                        )


def _is_open(ledger: Ledger, part: Part, *, again: bool) -> bool:
    entry = ledger.entry(part)
    if entry is None or entry.status == "partial":
        return True
    if entry.run == ledger.run or entry.status == "done":
        return False
    # What this machine lacked, or what was lost with it, another may have.
    return entry.status in ("skipped", "lost") or (again and entry.attempts < MOST_ATTEMPTS)


def _seconds(clock: Clock, end: float, part: Part) -> float:
    return min(clock.left(), end - clock.spent(), part.most_s)


def _until(clock: Clock, end: float, part: Part) -> Left:
    last = clock.spent() + part.most_s
    return lambda: min(clock.left(), end - clock.spent(), last - clock.spent())


def _attempt(part: Part, lab: Lab, ledger: Ledger, clock: Clock, left: Left) -> Entry:
    """Do one part and write down what became of it; whatever it raises is its outcome."""
    before = ledger.entry(part)
    began = clock.spent()
    try:
        given = lab.do(part, left)
    except OutOfTimeError as cut:
        given = Given(status="partial", data=before.data if before else {}, reason=cut.message)
    except Exception as error:
        given = Given(status="failed", reason=_in_words(error))
    if given.status == "failed" and clock.left() >= _ANSWER_S and not lab.answers():
        given = replace(given, status="lost")
    entry = Entry(
        step=part.step,
        status=given.status,
        run=ledger.run,
        seconds=round((before.seconds if before else 0.0) + clock.spent() - began, 2),
        of=part.of,
        attempts=(before.attempts if before else 0) + (given.status == "failed"),
        reason=given.reason,
        data=given.data,
    )
    ledger.put(part, entry)
    return entry


def _in_words(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{first_line(error)} ({Path(where.filename).name}:{where.lineno})"
