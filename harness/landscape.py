"""Landscapes: spaces of which it is recorded what became of every config, so that searches can be judged without a GPU.

Kernel Tuner's caches, T4 results, our own recorded spaces and our journals are read. Refuses to make up what was not recorded.
"""

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UsageError
from harness.outcome import Estimated, Measured, Record
from harness.recorded import Recorded, read_recorded, reason_of
from harness.space import Config, Param, Rule, Space, Value
from harness.store import read_journal

_SUFFIX = re.compile(r"\.jsonl?(\.gz)?$")
# Kernel Tuner's older caches write this for a config that failed.
_NO_TIME = 1e20
_FORMATS = "caches of Kernel Tuner, T4 results, recorded spaces and journals of flashtune can be read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What became of one config: its time in milliseconds, or `failure` in words; `times_ms` are single runs, `compile_s` and
    `run_s` what the trial cost, in seconds."""

    time_ms: float | None
    failure: str = ""
    times_ms: tuple[float, ...] = ()
    compile_s: float = 0.0
    run_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Landscape:
    """A space, and what became of its configs; what was not recorded is not legal in it. `name` is that of its file, `path` where
    it lies, `kernel`, `device` and `problem` what it says of itself."""

    name: str
    path: Path
    kernel: str
    device: str
    params: tuple[Param, ...]
    recordings: Mapping[Config, Recording]
    problem: str = ""
    # A space is enumerated once.
    _space: list[Space] = field(default_factory=list, compare=False, repr=False)

    @property
    def space(self) -> Space:
        """The recorded configs as the legal ones of a space."""
        if not self._space:
            known = Rule("recorded", "only what was recorded can be replayed", lambda config: config in self.recordings)
            self._space.append(Space.listed(self.params, known, tuple(self.recordings)))
        return self._space[0]

    @property
    def best_ms(self) -> float:
        """The least time of all. There is one: a space in which everything failed is not read."""
        return min(found.time_ms for found in self.recordings.values() if found.time_ms is not None)


def landscapes(folder: Path) -> list[Landscape]:
    """Every landscape of the files in `folder`, in the order of their names. Raises `UsageError` if there is none, and for a file
    that is none."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", hint="`--spaces` takes a folder of recorded spaces")
    paths = sorted(path for path in folder.iterdir() if _SUFFIX.search(path.name))
    if not paths:
        raise UsageError(f"{folder} holds no recorded space", hint=_FORMATS)
    return [found for path in paths for found in read_landscapes(path)]


def read_landscapes(path: Path) -> list[Landscape]:
    """What a file holds: one landscape, or one for each problem of a journal. Raises `UsageError` that names the file and why."""
    name = _SUFFIX.sub("", path.name)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        first = text.lstrip()[:4096].partition("\n")[0]
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            if '"journal"' in first:
                known = of_journal(name, path)
                if not known:
                    raise ValueError("no config in it has a number")
                return known
            return [of_recorded(name, path, read_recorded(path))]
        document = parsed(text)
        if "cache" in document:
            found = _from_cache(document)
        elif "results" in document:
            found = _from_results(document)
        else:
            raise ValueError("it has neither `cache` (Kernel Tuner) nor `results` (T4)")
        kernel, device = str(document.get("kernel_name", "")), str(document.get("device_name", ""))
        return [_landscape(name, path, kernel, device, *found)]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{path} is no recorded space: {reason}", hint=_FORMATS) from error


def of_recorded(name: str, path: Path, found: Recorded) -> Landscape:
    """A recorded space of ours as a landscape."""
    names = tuple(found.header.params)
    recordings = {}
    for line in found.lines:
        compile_s = (line.compile_ms or 0.0) / 1000
        recordings[Config(dict(zip(names, line.config, strict=True)))] = Recording(
            time_ms=line.time_ms, failure="" if line.time_ms is not None else line.reason or line.outcome,
            times_ms=line.times_ms, compile_s=compile_s, run_s=max(line.seconds - compile_s, 0.0),
        )  # fmt: skip
    params = tuple(Param(name, values, "recorded") for name, values in found.header.params.items())
    land = _landscape(name, path, found.header.kernel, found.header.device, params, recordings)
    return replace(land, problem=found.header.problem)


def of_records(name: str, path: Path, identity: Mapping[str, Any], records: Sequence[Record]) -> Landscape | None:
    """The trials of one problem in a journal as a landscape, or None if none of them has a number."""
    trials = [one for one in records if one.role == "screen"]
    pairs = [(one.config, _from_record(one)) for one in trials]
    if not any(one.time_ms is not None for _, one in pairs):
        return None
    names = tuple(trials[0].config)
    device = str(identity.get("device", ""))
    land = _landscape(name, path, str(identity.get("kernel", "")), device, *_space_of(names, pairs))
    return replace(land, problem=trials[0].problem)


def _from_record(found: Record) -> Recording:
    outcome = found.outcome
    if isinstance(outcome, Measured):
        samples = outcome.samples
        return Recording(time_ms=samples.median_ms, times_ms=tuple(samples.times_ms), run_s=found.seconds)
    if isinstance(outcome, Estimated):
        return Recording(time_ms=outcome.value_ms, run_s=found.seconds)
    return Recording(time_ms=None, failure=reason_of(found) or outcome.kind, run_s=found.seconds)


def of_journal(name: str, path: Path, *, size: int | None = None) -> list[Landscape]:
    """The problems of a journal, or of its first `size` bytes, that have numbers. Raises `JournalError`."""
    identity, records = read_journal(path, size=size)
    problems = dict.fromkeys(one.problem for one in records)
    found = [
        of_records(f"{name} {problem}", path, identity, [one for one in records if one.problem == problem])
        for problem in problems
    ]
    return [one for one in found if one is not None]


def _landscape(
    name: str, path: Path, kernel: str, device: str, params: tuple[Param, ...], recordings: Mapping[Config, Recording]
) -> Landscape:
    if not any(one.time_ms is not None for one in recordings.values()):
        raise ValueError("no config in it has a time")
    return Landscape(name=name, path=path, kernel=kernel, device=device, params=params, recordings=recordings)


def parsed(text: str) -> dict[str, Any]:
    """The JSON object. A cache that Kernel Tuner did not close lacks its last two braces, and ends in a comma."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = json.loads(text.rstrip().rstrip(",") + "}}")
    if not isinstance(found, dict):
        raise TypeError("it is not a JSON object")
    return found


_Found = tuple[tuple[Param, ...], dict[Config, Recording]]


def _from_cache(document: Mapping[str, Any]) -> _Found:
    entries = list(document["cache"].values())
    recorded = [(entry, _from_entry(entry, str(document.get("objective") or "time"))) for entry in entries]
    return _space_of(document["tune_params_keys"], recorded)


def _from_entry(entry: Mapping[str, Any], objective: str) -> Recording:
    # What was minimised: other objectives are read where times are, as estimates are which we export ourselves.
    time_ms = entry[objective if objective in entry else "time"]
    compile_s = float(entry.get("compile_time") or 0.0) / 1000
    run_s = sum(float(entry.get(name) or 0.0) for name in ("benchmark_time", "verification_time")) / 1000
    # A failure is a name, in older files a time that no kernel has.
    if isinstance(time_ms, str | bool) or not np.isfinite(time_ms) or time_ms >= _NO_TIME:
        return Recording(time_ms=None, failure=str(time_ms), compile_s=compile_s, run_s=run_s)
    times = tuple(float(one) for one in entry.get("times") or ())
    return Recording(time_ms=float(time_ms), times_ms=times, compile_s=compile_s, run_s=run_s)


def _from_results(document: Mapping[str, Any]) -> _Found:
    recorded = []
    names: list[str] = []
    for entry in document["results"]:
        names += [name for name in entry["configuration"] if name not in names]
        times = entry.get("times") or {}
        compile_s = float(times.get("compilation_time") or 0.0) / 1000
        run_s = float(times.get("benchmark_time") or 0.0) / 1000
        measured = {one["name"]: one["value"] for one in entry.get("measurements") or ()}
        found = next((measured[name] for name in ("time", "runtime", "estimated_time") if name in measured), None)
        if entry["invalidity"] != "correct" or not isinstance(found, int | float):
            one = Recording(time_ms=None, failure=str(entry["invalidity"]), compile_s=compile_s, run_s=run_s)
        else:
            runs = times.get("runtimes") or ()
            one = Recording(time_ms=float(found), times_ms=tuple(map(float, runs)), compile_s=compile_s, run_s=run_s)
        recorded.append((entry["configuration"], one))
    return _space_of(names, recorded)


def _space_of(names: Sequence[str], recorded: Iterable[tuple[Mapping[str, Any], Recording]]) -> _Found:
    """Parameters with the values that occur, numbers in their order, and the recordings by config."""
    found = {Config({name: _value(entry[name]) for name in names}): one for entry, one in recorded}
    values: dict[str, dict[Value, None]] = {name: {} for name in names}
    for config in found:
        for name, value in config.items():
            values[name][value] = None
    params = tuple(Param(name, _in_order(several), "recorded") for name, several in values.items())
    ordered = {param.name: {value: place for place, value in enumerate(param.values)} for param in params}
    configs = sorted(found, key=lambda config: [ordered[name][value] for name, value in config.items()])
    return params, {config: found[config] for config in configs}


def _value(value: Any) -> Value:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str | bool) else str(value)


def _in_order(values: Iterable[Value]) -> tuple[Value, ...]:
    several = tuple(values)
    numbers = all(isinstance(value, int | float) for value in several)
    return tuple(sorted(several, key=float)) if numbers else tuple(sorted(several, key=str))
