"""Recorded spaces, replayed: search strategies judged without a GPU, on spaces that others measured in full.

A recording holds what became of every legal config. `replay` lets a strategy ask and answers from it. Refuses to make up what
was not recorded: a config that failed there fails here.
"""

import gzip
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import UsageError
from harness.search import make_strategy, open_study
from harness.space import Config, Param, Rule, Space, Value
from harness.tune import BATCH

Floats = NDArray[np.float64]


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
class RecordedSpace:
    """A space of which every legal config was tried. `name` is that of its file, `path` where it lies."""

    name: str
    path: Path
    kernel: str
    device: str
    params: tuple[Param, ...]
    recordings: Mapping[Config, Recording]
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


def recorded_spaces(folder: Path) -> list[RecordedSpace]:
    """Every recorded space in `folder`, in the order of their names. Raises `UsageError` if there is none."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", hint="`--spaces` takes a folder of recorded spaces")
    paths = sorted(path for path in folder.iterdir() if re.search(r"\.json(\.gz)?$", path.name))
    if not paths:
        raise UsageError(f"{folder} holds no recorded space", hint="they are files *.json or *.json.gz")
    return [read_space(path) for path in paths]


def read_space(path: Path) -> RecordedSpace:
    """Read a cache of Kernel Tuner, closed or still open, or T4 results. Raises `UsageError` that names the file and why."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        document = _parsed(text)
        if "cache" in document:
            found = _from_cache(document)
        elif "results" in document:
            found = _from_results(document)
        else:
            raise ValueError("it has neither `cache` (Kernel Tuner) nor `results` (T4)")
        params, recordings = found
        if not any(one.time_ms is not None for one in recordings.values()):
            raise ValueError("no config in it has a time")
        return RecordedSpace(
            name=path.name.removesuffix(".gz").removesuffix(".json"),
            path=path,
            kernel=str(document.get("kernel_name", "")),
            device=str(document.get("device_name", "")),
            params=params,
            recordings=recordings,
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{path} is no recorded space: {reason}", hint="a cache of Kernel Tuner and T4 results can be read"
        ) from error


def _parsed(text: str) -> dict[str, Any]:
    """The document. A cache that Kernel Tuner did not close lacks its last two braces, and ends in a comma."""
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
    recorded = [(entry, _from_entry(entry)) for entry in entries]
    return _space_of(document["tune_params_keys"], recorded)


def _from_entry(entry: Mapping[str, Any]) -> Recording:
    time_ms = entry["time"]
    compile_s = float(entry.get("compile_time") or 0.0) / 1000
    run_s = sum(float(entry.get(name) or 0.0) for name in ("benchmark_time", "verification_time")) / 1000
    # A failure is a name, in older files a time that no kernel has.
    if isinstance(time_ms, str) or isinstance(time_ms, bool) or not np.isfinite(time_ms) or time_ms >= 1e20:
        return Recording(time_ms=None, failure=str(time_ms), compile_s=compile_s, run_s=run_s)
    times = tuple(float(one) for one in entry.get("times") or ())
    return Recording(time_ms=float(time_ms), times_ms=times, compile_s=compile_s, run_s=run_s)


def _from_results(document: Mapping[str, Any]) -> _Found:
    recorded = []
    names: list[str] = []
    for entry in document["results"]:
        names += [name for name in entry["configuration"] if name not in names]
        times = entry.get("times") or {}
        costs = {
            "compile_s": float(times.get("compilation_time") or 0.0) / 1000,
            "run_s": float(times.get("benchmark_time") or 0.0) / 1000,
        }
        measured = {one["name"]: one["value"] for one in entry.get("measurements") or ()}
        found = measured.get("time", measured.get("runtime"))
        if entry["invalidity"] != "correct" or not isinstance(found, int | float):
            one = Recording(time_ms=None, failure=str(entry["invalidity"]), **costs)
        else:
            runs = times.get("runtimes") or ()
            one = Recording(time_ms=float(found), times_ms=tuple(map(float, runs)), **costs)
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


# ---------------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One search: by trial, the best recorded time over the best found so far (0 until something ran), and the milliseconds
    that the strategy itself took for each trial."""

    space: str
    strategy: str
    seed: int
    fractions: tuple[float, ...]
    ms_per_trial: float


def replay(recorded: RecordedSpace, strategy: str, *, budget: int, seed: int) -> Replayed:
    """Let a strategy search a recorded space for `budget` trials, as `tune` does: asked for a few configs at a time, and told
    of all of them before it is asked again."""
    space = recorded.space
    # Enumerating the space is no part of a strategy.
    legal = len(space.legal)
    searcher = make_strategy(strategy, space, None, study=open_study("replay"), seed=seed)
    best, found = np.inf, []
    spent = 0.0
    while len(found) < min(budget, legal):
        began = time.perf_counter()
        configs = searcher.ask(min(BATCH, budget - len(found)))
        spent += time.perf_counter() - began
        for config in configs:
            time_ms = recorded.recordings[config].time_ms
            began = time.perf_counter()
            searcher.tell(config, time_ms)
            spent += time.perf_counter() - began
            best = min(best, np.inf if time_ms is None else time_ms)
            found.append(recorded.best_ms / best)
    return Replayed(
        space=recorded.name, strategy=strategy, seed=seed, fractions=tuple(found), ms_per_trial=1000 * spent / len(found)
    )
