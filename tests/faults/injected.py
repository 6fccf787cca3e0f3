"""Faults, injected one by one into whole tunes with real children: what became of each, and how many trials it cost.

`rows` runs them all; docs/faults.md is what they gave.
"""

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from harness import report
from harness.ahead import InOrder
from harness.device import TARGETS
from harness.errors import HarnessError
from harness.outcome import Measured, Record
from harness.problem import parse_problem
from harness.quarantine import Quarantine
from harness.space import Config, Param, Space
from harness.store import Journal, open_journal, read_journal
from harness.tune import Budget, Settled, Task, Tried, tune
from harness.worker import Job, Limits
from tests.faults.device import UNHURRIED, PretendedRunner, pretend

PROBLEM = parse_problem("b1 h1 s16 d16 fp16")
IDENTITY = {"test": "faults"}
SCOPE = {"kernel": "subject", "digest": "1", "device": "h200", "triton": "3.6.0", "driver": "580.1"}
LIMIT_S = 2.5
CALM = "calm"

# What a candidate does, and how it is done to it.
CANDIDATES = {
    "segfault in the compiler": "a null pointer is read in the compiling child",
    "compiler abort": "`abort()` after `LLVM ERROR` in the compiling child",
    "hang in the compiler": "the compiling child sleeps for an hour",
    "out of memory on the host": "64 GiB are allocated under the child's memory limit",
    "compiler killed once": "`kill -9` of the compiling child, the first time",
    "illegal address": "the gate raises CUDA's error, and the device answers nobody in that process from then on",
    "misaligned access": "measuring raises CUDA's error, likewise sticky",
    "hang on the device": "the child that owns the device sleeps for an hour",
    "out of memory on the device": "measuring raises CUDA's error; the device still answers",
    "segfault on the device": "a null pointer is read in the child that owns the device",
    "worker killed once": "`kill -9` of the child that owns the device, the first time",
    "worker killed always": "`kill -9` of the child that owns the device, every time",
    "error that shows in the next candidate": "the device is lost without a word after a candidate was measured",
}


@dataclass(frozen=True)
class Row:
    """One line of the table: `lost` counts trials that neither ended as an outcome nor were run again."""

    fault: str
    how: str
    outcome: str
    lost: int


def configs(*acts: str) -> list[Config]:
    """The default and one candidate for each act."""
    return [Config({"number": number, "act": act}) for number, act in enumerate((CALM, *acts))]


def task_of(order: list[Config]) -> Task:
    acts = tuple(dict.fromkeys(str(config["act"]) for config in order))
    params = (Param("number", tuple(range(len(order))), "which"), Param("act", acts, "what it does"))
    return Task(problem=PROBLEM, space=Space(params=params, rules=()), default=order[0], strategy=InOrder(order))


@contextmanager
def runner_in(folder: Path, **limits: Any) -> Iterator[PretendedRunner]:
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    job = Job(root=folder, stem="subject", device=TARGETS["h200"], mode="measured", seed=0)
    kept = Limits(**{"compile_s": LIMIT_S, "verify_s": LIMIT_S, "value_s": LIMIT_S, "memory_bytes": 4 << 30} | limits)
    with closing(PretendedRunner(job=job, jobs=1, cache=folder / "cache", limits=kept, prepare=pretend)) as runner:
        yield runner


def tune_in(folder: Path, order: list[Config], runner: Any = None) -> tuple[list[Record], Settled]:
    """A whole tune of `order` in a folder, continued if it was begun there."""
    with runner_in(folder) as made, closing(open_journal(folder / "run.jsonl", IDENTITY)) as journal:
        held = Quarantine(folder / "quarantine.jsonl", SCOPE)
        events = tune(
            task_of(order), runner or made, journal, budget=Budget(trials=len(order)), seed=0, quarantine=held
        )
        *tried, settled = events
        return [one.record for one in tried if isinstance(one, Tried)], settled


def said(record: Record) -> str:
    """What became of a trial, in words."""
    return "measured" if isinstance(record.outcome, Measured) else report.reason_of(record)


def candidate_rows(folder: Path) -> list[Row]:
    """Every fault of a candidate in one tune, a calm candidate behind each: nobody's fault may become another's."""
    order = configs(*[act for fault in CANDIDATES for act in (fault, CALM)])
    records, settled = tune_in(folder, order)
    calm = [record for record in records if record.config["act"] == CALM]
    hurt = [record for record in calm if not isinstance(record.outcome, Measured)]
    assert not hurt, [said(record) for record in hurt]
    assert settled.champion is not None
    found = {str(record.config["act"]): record for record in records}
    return [Row(fault, how, said(found[fault]), len(order) - len(records)) for fault, how in CANDIDATES.items()]


def idle_child_killed(folder: Path) -> Row:
    """The pool's library gives up when a child dies that had nothing to do; ours starts anew."""
    order = configs(*[CALM] * 6)

    def kill_children(record: Record) -> None:
        if record.trial == 2:
            mine = [child for child in psutil.Process().children(recursive=True) if "spawn_main" in _command(child)]
            for child in mine:
                child.kill()
            time.sleep(0.5)

    with runner_in(folder) as runner, closing(open_journal(folder / "run.jsonl", IDENTITY)) as journal:
        records = []
        for event in tune(task_of(order), runner, journal, budget=Budget(trials=len(order)), seed=0):
            if isinstance(event, Tried):
                records.append(event.record)
                kill_children(event.record)
    measured = sum(isinstance(record.outcome, Measured) for record in records)
    return Row(
        "all children killed between trials", "`kill -9` of every child", f"{measured} of {len(order)} measured",
        len(order) - len(records),
    )  # fmt: skip


def broken_device(folder: Path, *, heals: bool) -> Row:
    """The canary before the first trial in a process fails, once or for ever."""
    (folder / "cache").mkdir(parents=True)
    (folder / "cache" / "broken").write_text("1" if heals else "100")
    name = "device that fails its canary" + (" once" if heals else " for good")
    try:
        with mock.patch("harness.worker._MOURNING_S", (0.2, 0.2)):
            records, _ = tune_in(folder, configs(CALM))
    except HarnessError as error:
        kept = len(read_journal(folder / "run.jsonl")[1])
        return Row(name, "the canary's answer in each new process", f"the tune ends: {error.message}", kept and 1)
    measured = sum(isinstance(record.outcome, Measured) for record in records)
    return Row(name, "the canary's answer in a new process", f"waited for; {measured} of 2 measured", 2 - len(records))


def full_disk_in_a_child(folder: Path) -> Row:
    order = configs(CALM, "full disk under the compiler", CALM)
    try:
        tune_in(folder, order)
    except HarnessError as error:
        kept = [record.config["number"] for record in read_journal(folder / "run.jsonl")[1]]
        assert 2 not in kept
        return Row(
            "full disk under the compiler", "the child's write raises ENOSPC", f"the tune ends: {error.message}", 1
        )
    raise AssertionError("a full disk was taken for the candidate's fault")


def full_disk_under_the_journal(folder: Path) -> Row:
    real = Journal.append

    class Full:
        def close(self) -> None:
            self.file.close()

        def __init__(self, file: Any) -> None:
            self.file = file

        def fileno(self) -> int:
            return int(self.file.fileno())

        def write(self, line: bytes) -> int:
            self.file.write(line[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def append(self: Journal, record: Record) -> None:
        if len(self.records) == 2:
            self._file = Full(self._file)  # type: ignore[assignment]
        real(self, record)

    order = configs(CALM, CALM, CALM)
    message = ""
    try:
        with mock.patch.object(Journal, "append", append):
            tune_in(folder, order)
    except HarnessError as error:
        message = error.message.replace(str(folder), "RUNS")
    kept = len(read_journal(folder / "run.jsonl")[1])
    return Row(
        "full disk under the journal",
        "a write of the journal raises ENOSPC half-way",
        f"the tune ends: {message}",
        3 - kept,
    )


def damaged_tail(folder: Path, tail: bytes, name: str) -> Row:
    order = configs(CALM, CALM)
    tune_in(folder, order)
    path = folder / "run.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    # The header and two whole trials; the third is what the power cut hit.
    path.write_bytes(b"".join(lines[:3]) + tail)
    with closing(open_journal(path, IDENTITY)) as journal:
        kept, torn = len(journal.records), journal.torn
    records, _ = tune_in(folder, order)
    assert path.with_suffix(".torn").read_bytes() == tail and len(records) == 3
    return Row(
        "corrupted journal tail", name, f"{torn} bytes set aside, {kept} trials kept, the rest run again", 3 - kept
    )


def clock_jump(folder: Path) -> Row:
    real, jumps = time.time, itertools.cycle([3600.0, -3600.0, 86400.0])
    with mock.patch("time.time", lambda: real() + next(jumps)):
        records, settled = tune_in(folder, configs(UNHURRIED, UNHURRIED))
    measured = sum(isinstance(record.outcome, Measured) for record in records)
    assert settled.champion is not None
    return Row(
        "clock jump",
        "the wall clock jumps by hours, both ways, at every look",
        f"{measured} of 3 measured",
        3 - len(records),
    )


def two_tuners(folder: Path) -> Row:
    order = configs(CALM, CALM)
    with closing(open_journal(folder / "run.jsonl", IDENTITY)):
        try:
            tune_in(folder, order)
        except HarnessError as error:
            message = error.message.replace(str(folder), "RUNS")
    records, _ = tune_in(folder, order)
    return Row("two tuners on one journal", "a second tune opens it", f"the second ends: {message}", 3 - len(records))


def parent_killed(folder: Path) -> Row:
    """The tuner itself is killed while a trial hangs; its children go with it, and the next run goes on."""
    order = configs("hang on the device", CALM)
    script = Path(__file__).parent / "parent.py"
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == "hanging\n"
    children = [one for one in psutil.Process(parent.pid).children(recursive=True) if "spawn_main" in _command(one)]
    time.sleep(0.5)
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=10)
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children and not alive
    kept = len(read_journal(folder / "run.jsonl")[1])
    records, _ = tune_in(folder, order)
    assert len(records) == 3
    words = f"its {len(children)} children die with it; {kept} finished trial kept, the next run goes on"
    return Row("parent killed", "`kill -9` of the tuner while a candidate is measured", words, 1)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


SINGLE: dict[str, Callable[[Path], Row]] = {
    "idle": idle_child_killed,
    "heals": lambda folder: broken_device(folder, heals=True),
    "broken": lambda folder: broken_device(folder, heals=False),
    "disk": full_disk_in_a_child,
    "journal": full_disk_under_the_journal,
    "cut": lambda folder: damaged_tail(folder, b'{"trial":2,"probl', "the last line is cut"),
    "garbage": lambda folder: damaged_tail(folder, b'{"trial":2,\x7f\x00"probl\n', "the last line is garbage"),
    "zeros": lambda folder: damaged_tail(folder, bytes(4096), "a block of zeros, as after a power cut"),
    "clock": clock_jump,
    "two": two_tuners,
    "parent": parent_killed,
}


def rows(folder: Path) -> list[Row]:
    """All faults, injected."""
    found = candidate_rows(folder / "candidates")
    for name, inject in SINGLE.items():
        (folder / name).mkdir()
        found.append(inject(folder / name))
    return found


def table(found: list[Row]) -> str:
    """docs/faults.md."""
    lines = [
        "# What faults end as",
        "",
        "Written by `python -m tests.faults --write`, which injects each fault into a whole tune with real child processes on a",
        "pretended device; `tests/faults` keeps it true. A lost trial has neither an outcome nor was it run again in that run;",
        "the next run of the same command tries it.",
        "",
        "| fault | injected how | outcome | lost trials |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row.fault} | {row.how} | {row.outcome} | {row.lost} |" for row in found]
    return "\n".join(lines) + "\n"
