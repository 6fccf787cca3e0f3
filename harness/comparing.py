"""What the verb `compare` does, given its parsed options: which problem became faster or slower from one run to another.

Numbers come from journals or champion files. Two samples that were not taken in turns are compared by their intervals alone: only
where these do not overlap is one called faster, and drift between the two runs is not seen. Refuses to compare an estimate with a
time, numbers of two devices, and numbers that different code has taken.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness import report
from harness.bench_documents import ComparedDocument, CompareDocument
from harness.champions import Champion, ChampionFile, read_champions
from harness.commands import print_document
from harness.errors import UsageError
from harness.outcome import Estimated, Measured, Record
from harness.report_bench import compare_lines
from harness.sealed import tame
from harness.stats import median, median_interval
from harness.store import read_journal

FOUND = 1

Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What one side says of a kernel on a device and a problem: a number in milliseconds and its 95 % interval. `protocol` names
    the code that took it, `environment` the versions, None where a side does not keep that."""

    kind: Literal["measured", "estimated", "replayed"]
    value_ms: float
    interval_ms: tuple[float, float] | None
    config: Mapping[str, Any]
    protocol: str | None
    method: str | None
    environment: tuple[str | None, ...]


def run_compare(options: argparse.Namespace) -> int:
    """`flashtune compare`: exit 1 when something became slower."""
    old, new = (known_of(Path(name)) for name in (options.old, options.new))
    if not old or not new:
        empty = options.new if old else options.old
        raise UsageError(
            f"{tame(empty)} holds no number that could be compared", hint="a tune that found nothing left it"
        )
    document = compared(old, new, (options.old, options.new))
    if options.json:
        print_document("compare", document)
    else:
        for line in compare_lines(document):
            report.open_console(sys.stdout).print(line)
    if not {(kernel, device) for kernel, device, _ in old} & {(kernel, device) for kernel, device, _ in new}:
        raise UsageError(
            "no kernel on a device is in both", hint="numbers of two kernels, or of two devices, cannot be compared"
        )
    return FOUND if document.regressions else 0


def compared(old: Mapping[Key, Known], new: Mapping[Key, Known], names: tuple[str, str]) -> CompareDocument:
    """What became of every problem that either side knows."""
    found = tuple(_compared(key, old.get(key), new.get(key)) for key in sorted({*old, *new}))
    changed = {
        (old[key].environment, new[key].environment)
        for key in old.keys() & new.keys()
        if old[key].environment != new[key].environment
    }
    notes = tuple(
        f"another environment: {_versions(before)} → {_versions(after)}" for before, after in sorted(changed, key=str)
    )
    return CompareDocument(
        old=names[0],
        new=names[1],
        problems=found,
        regressions=sum(one.verdict == "slower" for one in found),
        notes=notes,
    )


def _versions(environment: tuple[str | None, ...]) -> str:
    return ", ".join(part for part in environment if part) or "nothing known"


def _compared(key: Key, old: Known | None, new: Known | None) -> ComparedDocument:
    kernel, device, problem = key
    named: dict[str, Any] = {"kernel": kernel, "device": device, "problem": problem}
    if old is None or new is None:
        one = old or new
        assert one is not None
        return ComparedDocument(
            **named, verdict="gone" if new is None else "new", kind=one.kind,
            old_ms=old.value_ms if old else None, new_ms=new.value_ms if new else None,
        )  # fmt: skip
    if old.kind != new.kind:
        return ComparedDocument(
            **named, verdict="cannot tell", reason=f"the old number is {old.kind}, the new one {new.kind}"
        )
    both: dict[str, Any] = {
        **named, "kind": old.kind, "old_ms": old.value_ms, "new_ms": new.value_ms,
        "config_changed": dict(old.config) != dict(new.config),
    }  # fmt: skip
    reason = _incomparable(old, new)
    if reason:
        return ComparedDocument(**both, verdict="cannot tell", reason=reason)
    speedup = old.value_ms / new.value_ms
    if old.kind == "estimated":
        verdict: Any = "same" if old.value_ms == new.value_ms else "faster" if speedup > 1 else "slower"
        return ComparedDocument(
            **both, verdict=verdict, speedup=speedup, reason="" if verdict == "same" else _PREDICTED
        )
    if old.interval_ms is None or new.interval_ms is None:
        return ComparedDocument(
            **both, verdict="cannot tell", speedup=speedup, reason="too few samples were kept for an interval"
        )
    low, high = old.interval_ms[0] / new.interval_ms[1], old.interval_ms[1] / new.interval_ms[0]
    verdict = "faster" if low > 1 else "slower" if high < 1 else "cannot tell"
    told = "" if verdict != "cannot tell" else "the intervals of both overlap"
    return ComparedDocument(**both, verdict=verdict, speedup=speedup, interval=(low, high), reason=told)


_PREDICTED = "both are predictions from compiled binaries, and no times"


def _incomparable(old: Known, new: Known) -> str:
    """Why two numbers of one kind do not answer the same question; empty if they do."""
    if old.protocol is not None and new.protocol is not None and old.protocol != new.protocol:
        return "the numbers were taken by different versions of the code that takes them"
    if old.method is not None and new.method is not None and old.method != new.method:
        return f"the old time was taken by `{old.method}`, the new one by `{new.method}`"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def known_of(path: Path) -> dict[Key, Known]:
    """The numbers of a journal, a champion file, or all champion files of a folder. Raises `UsageError` for anything else, and
    for a folder that holds two files of one kernel on one device."""
    if path.is_dir():
        found: dict[Key, Known] = {}
        for file in sorted(each for each in path.rglob("*.json") if each.is_file()):
            several = _of_champions(read_champions(file))
            twice = sorted(several.keys() & found.keys())
            if twice:
                raise UsageError(
                    f"{tame(path)} holds more than one number for `{twice[0][2]}` of {twice[0][0]} on {twice[0][1]}",
                    hint="name one of its files; reviewed champions and drafts are not mixed",
                )
            found |= several
        return found
    if not path.exists():
        raise UsageError(f"there is no {tame(path)}", hint="name a journal, a champion file or a folder of them")
    if path.suffix == ".jsonl":
        return _of_journal(path)
    return _of_champions(read_champions(path))


def _of_champions(file: ChampionFile) -> dict[Key, Known]:
    environment = (file.environment.torch, file.environment.toolchain, file.environment.driver)

    def known(champion: Champion) -> Known:
        number = champion.number
        return Known(
            kind=number.kind, value_ms=number.value_ms, interval_ms=number.interval_ms, config=champion.config,
            protocol=number.protocol, method=number.method, environment=environment,
        )  # fmt: skip

    return {(file.kernel.name, file.device.name, champion.problem): known(champion) for champion in file.champions}


def _of_journal(path: Path) -> dict[Key, Known]:
    """Of each problem the number of the last choice: fresh samples where they were taken, else the best of the screening."""
    identity, records = read_journal(path)
    environment = tuple(identity.get(name) for name in ("torch", "triton", "driver"))
    best: dict[str, _Number] = {}
    for record in records:
        for number in _numbers(record):
            known = best.get(record.problem)
            if known is None or (number.rank, -number.value_ms) >= (known.rank, -known.value_ms):
                best[record.problem] = number
    found = {}
    for problem, number in best.items():
        spread = median_interval(number.times_ms) if number.times_ms else None
        estimated = not number.times_ms
        key = (str(identity.get("kernel")), str(identity.get("device")), problem)
        found[key] = Known(
            kind="estimated" if estimated else "measured", value_ms=number.value_ms, config=number.config,
            interval_ms=None if spread is None else (spread.low, spread.high), method=number.method, environment=environment,
            # A time is what it is, whoever judged its kernel; an estimate is what the model says.
            protocol=identity.get("judge_digest") if estimated else None,
        )  # fmt: skip
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Number:
    """A number of a record. Samples that were taken after the choice have the higher `rank`."""

    rank: int
    value_ms: float
    config: Mapping[str, Any]
    times_ms: tuple[float, ...] = ()
    method: str | None = None


def _numbers(record: Record) -> Iterator[_Number]:
    """Those of a trial, or the two of the last comparison: the candidate's and the default's, which stays if it is no slower."""
    outcome = record.outcome
    if record.role == "screen" and isinstance(outcome, Estimated):
        yield _Number(rank=0, value_ms=outcome.value_ms, config=record.config)
    if record.role in ("screen", "final") and isinstance(outcome, Measured):
        samples, rank = outcome.samples, int(record.role == "final")
        sides = [(samples.times_ms, record.config)]
        if rank and record.beside is not None and samples.incumbent_ms:
            sides.append((samples.incumbent_ms, record.beside))
        for times, config in sides:
            method = samples.method or None
            yield _Number(rank=rank, value_ms=median(times), config=config, times_ms=times, method=method)
