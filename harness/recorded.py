"""Recorded spaces: what became of every config of a space that was tried, as a compact file that needs nothing else to be read.

docs/recorded-spaces.md describes the format. Times in it are of candidates that passed their gate, and of no others. Refuses to
fill in what was not measured.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from harness.errors import UsageError
from harness.files import write_whole
from harness.outcome import (
    CompileFailed,
    Estimated,
    Flaky,
    LaunchFailed,
    Measured,
    Pruned,
    Record,
    TimedOut,
    Wrong,
)  # fmt: skip
from harness.space import Space, Value
from harness.stats import median

# History of the schema: 1 is the first.
SCHEMA = 1
FORMAT: Literal["flashtune recorded space"] = "flashtune recorded space"
# Beyond this a file is compressed.
_PLAIN_BYTES = 12 << 20
# A timer resolves half a microsecond: six digits keep it up to half a second.
_DIGITS = 6

_VALUE = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Header:
    """What all lines have in common. `params` are the values of each tunable in their order, `default` the default's values;
    `legal` counts the configs, of `of` in the kernel's whole space, that agree with the default in all tunables of one of
    `groups`, if there are any; `complete` says that each has a line. `versions` are of whatever the numbers depend on,
    `runs` when and on what they were taken. `estimates` names the model behind `estimate_ms`, if there is one."""

    format: Literal["flashtune recorded space"]
    schema: int
    kernel: str
    problem: str
    device: str
    arch: str
    params: Mapping[str, tuple[Value, ...]]
    default: tuple[Value, ...]
    legal: int
    of: int
    complete: bool
    versions: Mapping[str, str | None]
    runs: tuple[Mapping[str, Any], ...] = ()
    estimates: str = ""
    groups: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Line:
    """One config, its values in the order of the header's `params`.

    `outcome` as in `harness.outcome`; times are milliseconds: `time_ms` the median of `times_ms`, `beside_ms` the median of
    the config that all are measured beside, sampled in turns with it; `estimate_ms` is a prediction. Registers and spills (bytes)
    per thread, shared memory (bytes) and warps per block, each for every launch; `code` the digest of the machine code. `worst`
    is the largest error over its bound in the gate. `seconds` is all that the trial took, `compile_ms` what compilers did of it.
    """

    config: tuple[Value, ...]
    outcome: str
    seconds: float
    time_ms: float | None = None
    times_ms: tuple[float, ...] = ()
    beside_ms: float | None = None
    throttled: bool = False
    estimate_ms: float | None = None
    registers: tuple[int, ...] = ()
    spill_bytes: tuple[int, ...] = ()
    shared_bytes: tuple[int, ...] = ()
    warps: tuple[int, ...] = ()
    compile_ms: float | None = None
    code: str = ""
    worst: float | None = None
    reason: str = ""


_HEADER: TypeAdapter[Header] = TypeAdapter(Header)
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


@plain_dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded space in memory."""

    header: Header
    lines: tuple[Line, ...]

    @property
    def measured(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.time_ms is not None)


def record(
    space: Space, records: Sequence[Record], *, header: Mapping[str, Any], estimates: Mapping[int, float] | None = None
) -> Recorded:
    """The trials among `records` as a recorded space; `estimates` are milliseconds by trial. `header` gives what is not in the
    space: kernel, problem, device, arch, default, versions, runs."""
    names = space.names
    trials = [one for one in records if one.role == "screen"]
    lines = tuple(_line(one, names, (estimates or {}).get(one.trial)) for one in trials)
    values = dict(header) | {"default": tuple(header["default"][name] for name in names)}
    return Recorded(
        Header(
            format=FORMAT, schema=SCHEMA, params={param.name: param.values for param in space.params}, legal=len(space.legal),
            complete=len({line.config for line in lines}) == len(space.legal), **values,
        ),
        lines,
    )  # fmt: skip


def _line(found: Record, names: Sequence[str], estimate_ms: float | None) -> Line:
    outcome = found.outcome
    common: dict[str, Any] = {
        "config": tuple(found.config[name] for name in names), "outcome": outcome.kind, "seconds": round(found.seconds, 3),
    }  # fmt: skip
    if not isinstance(outcome, Measured | Estimated):
        return Line(**common, reason=reason_of(found))
    binaries = outcome.artifact.binaries
    common |= {
        "registers": tuple(one.registers for one in binaries), "spill_bytes": tuple(one.spill_bytes for one in binaries),
        "shared_bytes": tuple(one.shared_bytes for one in binaries), "warps": tuple(one.warps for one in binaries),
        "compile_ms": round(outcome.artifact.compile_ms, 1), "code": outcome.artifact.code_hash,
        "worst": _short(max(check.ratio for check in outcome.verdict.checks)), "estimate_ms": _short(estimate_ms),
    }  # fmt: skip
    if isinstance(outcome, Estimated):
        return Line(**common | {"estimate_ms": _short(outcome.value_ms)})
    samples = outcome.samples
    return Line(
        **common,
        time_ms=_short(samples.median_ms),
        times_ms=tuple(float(f"{time:.{_DIGITS}g}") for time in samples.times_ms),
        beside_ms=_short(median(samples.incumbent_ms)) if samples.incumbent_ms else None,
        throttled=samples.throttled,
    )


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.{_DIGITS}g}")


def reason_of(found: Record) -> str:
    """Why a config has no number, in a line; empty if it has one."""
    outcome = found.outcome
    if isinstance(outcome, Pruned):
        return f"{outcome.rule}: {outcome.detail}"
    if isinstance(outcome, CompileFailed | LaunchFailed):
        return outcome.reason
    if isinstance(outcome, TimedOut):
        return f"{outcome.stage} took more than {outcome.limit_s:.0f} s"
    return outcome.verdict.detail if isinstance(outcome, Wrong | Flaky) else ""


def write_recorded(folder: Path, name: str, found: Recorded) -> Path:
    """Write a recorded space into `folder` as `NAME.jsonl`, or `NAME.jsonl.gz` where it is large. Raises `MachineError`."""
    lines = [_plain(_HEADER, found.header), *(_plain(_LINE, line) for line in found.lines)]
    content = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
    path = folder / f"{name}.jsonl"
    if len(content) > _PLAIN_BYTES:
        # The time of day would make equal content differ.
        path, content = folder / f"{name}.jsonl.gz", gzip.compress(content, mtime=0)
    write_whole(path, content)
    return path


def _plain(adapter: TypeAdapter[Any], value: Any) -> Any:
    """JSON values without the fields that say nothing."""
    return adapter.dump_python(value, mode="json", exclude_defaults=True)


def read_recorded(path: Path) -> Recorded:
    """Read a recorded space. Raises `UsageError` that names the line in which it is damaged."""
    try:
        content = path.read_bytes()
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    number = 0
    found = []
    try:
        header = _HEADER.validate_json(lines[0] if lines else b"")
        for line in lines[1:]:
            number += 1
            found.append(_LINE.validate_json(line))
    except ValidationError as error:
        raise UsageError(f"{path} is no recorded space: {error.errors()[0]['msg']} in line {number + 1}") from error
    if header.schema != SCHEMA:
        raise UsageError(f"{path} has schema {header.schema}, this version reads {SCHEMA}")
    return Recorded(header, tuple(found))
