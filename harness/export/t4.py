"""T4 results and Kernel Tuner's simulation cache: every trial of the journals, failures too, so that others can search there.

A problem on a device is one file of each format. Where numbers are estimates, the value is called `estimated_time`, and nothing
in the files is called a time. Refuses to invent what a trial cost where that was not recorded.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.export.base import ESTIMATE, Checked, Chosen, Consumer, Made, Request, Target, as_json, made_by
from harness.export.gather import name_of
from harness.export_documents import SkippedDocument
from harness.outcome import CompileFailed, Estimated, Flaky, LaunchFailed, Measured, Pruned, Record, TimedOut, Wrong
from harness.recorded import reason_of
from harness.store import read_journal

_SCHEMA = "1.0.0"
_SIMULATE = "simulate.py"
# Nobody kept when a trial was made; the format wants a text.
_WHEN = "unknown"

# By outcome: T4's word, and Kernel Tuner's.
_WORDS: Mapping[type, tuple[str, str]] = {
    Pruned: ("constraints", "InvalidConfig"), CompileFailed: ("compile", "CompilationFailedConfig"),
    LaunchFailed: ("runtime", "RuntimeFailedConfig"), TimedOut: ("timeout", "RuntimeFailedConfig"),
    Wrong: ("correctness", "RuntimeFailedConfig"), Flaky: ("correctness", "RuntimeFailedConfig"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """A config and what became of it: its number in milliseconds with single times, or a failure in both formats' words."""

    config: Mapping[str, Any]
    value_ms: float | None
    times_ms: tuple[float, ...]
    words: tuple[str, str]
    reason: str
    seconds: float
    compile_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """All trials of one problem in one journal."""

    kernel: str
    device: str
    problem: str
    estimated: bool
    journal: str
    identity: Mapping[str, Any]
    trials: tuple[_Trial, ...]

    @property
    def objective(self) -> str:
        return "estimated_time" if self.estimated else "time"

    @property
    def name(self) -> str:
        """A name for its files; of those with one name each but the first gets a number."""
        # A journal may come from anywhere, and what is in it becomes the name of a file.
        parts = (
            re.sub(r"[^A-Za-z0-9]+", "_", each).strip("_")[:100] for each in (self.kernel, self.device, self.problem)
        )
        return "-".join(parts)

    def tunables(self) -> dict[str, list[Any]]:
        """Each tunable's values, those that were tried, in the order of the first trial."""
        return {
            name: sorted({each.config[name] for each in self.trials}, key=lambda value: (str(type(value)), value))
            for name in self.trials[0].config
        }


def _make(request: Request) -> Made:
    searches, skipped = [], []
    for path in request.journals:
        name = name_of(path, request.workspace.root)
        found = list(_searches(path, name))
        searches += found
        if not found:
            skipped.append(SkippedDocument(path=name, problem="", reason="no trial in it has a number"))
    stale = [one for one in searches if _digest(request, one.kernel) not in (None, one.identity.get("kernel_digest"))]
    skipped += [
        SkippedDocument(path=one.journal, problem=one.problem, reason="it is of another version of the kernel")
        for one in stale
    ]
    kept = _named([one for one in searches if one not in stale])
    files: dict[str, bytes] = {}
    for name, one in kept.items():
        files[f"t4/{name}.json"] = as_json(_results(one, request.champions))
        files[f"kernel-tuner/{name}.json"] = _cache(one)
    if files:
        files[f"kernel-tuner/{_SIMULATE}"] = Path(__file__).with_name(_SIMULATE).read_bytes()
    into = {
        (one.kernel, one.device, one.problem): (f"t4/{name}.json", f"kernel-tuner/{name}.json")
        for name, one in sorted(kept.items(), reverse=True)
    }
    exported = []
    for each in request.champions:
        paths = into.get((each.file.kernel.name, each.file.device.name, each.champion.problem))
        if paths is None:
            skipped.append(each.skipped("no journal of its search is here (`--from` takes some)"))
        else:
            exported.append(each.document(*paths))
    return Made(
        files=files, exported=tuple(exported), skipped=tuple(skipped),
        notes=_notes(kept.values()), use=_USE if files else (),
    )  # fmt: skip


_USE = (
    'cd DIR/kernel-tuner && python -c \'from simulate import simulate; simulate("NAME.json", strategy="pso")\'',
    "flashtune replay --spaces DIR/kernel-tuner --strategies ours",
)


def _notes(searches: Iterable[_Search]) -> tuple[str, ...]:
    found = list(searches)
    counts = Counter(each.words[0] for one in found for each in one.trials)
    said = ", ".join(f"{count} {word}" for word, count in counts.items())
    estimates = sum(one.estimated for one in found)
    notes = [f"{sum(counts.values())} trials: {said}"] if found else []
    if estimates:
        notes.append(
            f"in {estimates} of {len(found)} searches the value is {ESTIMATE}; there it is called `estimated_time`"
        )
    return tuple(notes)


def _digest(request: Request, kernel: str) -> str | None:
    """The kernel's digest, None where the kernel is not here."""
    return request.workspace.kernel_digest(kernel) if kernel in request.workspace.stems else None


def _named(searches: Sequence[_Search]) -> dict[str, _Search]:
    """Searches by the name of their files, the largest of those with one name first."""
    found: dict[str, _Search] = {}
    for one in sorted(searches, key=lambda each: (each.name, each.estimated, -len(each.trials), each.journal)):
        name, number = one.name, 2
        while name in found:
            name, number = f"{one.name}-{number}", number + 1
        found[name] = one
    return found


def _searches(path: Path, name: str) -> Iterable[_Search]:
    identity, records = read_journal(path)
    for problem in dict.fromkeys(one.problem for one in records):
        several = [one for one in records if one.problem == problem and one.role == "screen"]
        # What was tried again has its last word only.
        last = {frozenset(one.config.items()): one for one in several}
        trials = tuple(_trial(one) for one in last.values())
        if any(each.value_ms is not None for each in trials):
            estimated = any(isinstance(one.outcome, Estimated) for one in last.values())
            yield _Search(
                kernel=str(identity.get("kernel", "")), device=str(identity.get("device", "")), problem=problem,
                estimated=estimated, journal=name, identity=identity, trials=trials,
            )  # fmt: skip


def _trial(record: Record) -> _Trial:
    outcome, value, compile_ms = record.outcome, None, 0.0
    times: tuple[float, ...] = ()
    if isinstance(outcome, Measured | Estimated):
        value, compile_ms = outcome.value_ms, outcome.artifact.compile_ms
        times = tuple(outcome.samples.times_ms) if isinstance(outcome, Measured) else ()
    words = _WORDS.get(type(outcome), ("correct", "correct"))
    reason = "" if value is not None else (reason_of(record) or outcome.kind)
    return _Trial(
        config=record.config, value_ms=value, times_ms=times, words=words, reason=reason, seconds=record.seconds,
        compile_ms=compile_ms,
    )  # fmt: skip


def _results(one: _Search, champions: Sequence[Chosen]) -> dict[str, Any]:
    """The search as T4 results. `correctness` is 1 where the verdict was passed, 0 where it was not, and nothing else."""
    found = []
    for each in one.trials:
        passed = each.value_ms is not None
        measurements = [{"name": one.objective, "value": each.value_ms, "unit": "ms"}] if passed else []
        entry: dict[str, Any] = {
            "timestamp": _WHEN, "configuration": dict(each.config), "objectives": [one.objective],
            "times": {"compilation_time": each.compile_ms, "runtimes": list(each.times_ms)},
            "invalidity": each.words[0], "correctness": 1 if passed else 0, "measurements": measurements,
        }  # fmt: skip
        found.append(entry | ({"x-reason": each.reason} if each.reason else {}))
    mine = [
        each.provenance()
        for each in champions
        if (each.file.kernel.name, each.file.device.name, each.champion.problem)
        == (one.kernel, one.device, one.problem)
    ]
    return {
        "schema_version": _SCHEMA, "metadata": {"timeunit": "milliseconds"}, "kernel_name": one.kernel,
        "device_name": one.device, "results": found, "x-flashtune": _provenance(one) | {"champions": mine},
    }  # fmt: skip


def _provenance(one: _Search) -> dict[str, Any]:
    note = {"note": f"`estimated_time` is {ESTIMATE}"} if one.estimated else {}
    return {
        **made_by("t4"), "problem": one.problem, "journal": one.journal, "number": one.identity.get("mode"), **note,
        **{name: one.identity.get(name) for name in ("arch", "kernel_digest", "triton", "torch", "driver")},
    }  # fmt: skip


def _cache(one: _Search) -> bytes:
    """The search as Kernel Tuner's cache. It reads lines, and wants its last braces each on one of its own."""
    keys = list(one.trials[0].config)
    head = {
        "device_name": one.device, "kernel_name": one.kernel, "problem_size": one.problem, "tune_params_keys": keys,
        "tune_params": one.tunables(), "objective": one.objective, "x_flashtune": _provenance(one),
    }  # fmt: skip
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}," for name, value in head.items()]
    entries = []
    for each in one.trials:
        value: Any = each.words[1] if each.value_ms is None else each.value_ms
        # A failure is a word in the place of the value; Kernel Tuner looks for it under `time` too.
        numbers = {one.objective: value, **({"time": value} if each.value_ms is None else {})}
        times = {"times": list(each.times_ms)} if each.times_ms else {}
        spent = {"compile_time": each.compile_ms, "verification_time": 0.0, "benchmark_time": _rest(each)}
        entry = {
            **each.config,
            **numbers,
            **times,
            **spent,
            "strategy_time": 0,
            "framework_time": 0,
            "timestamp": _WHEN,
        }
        key = ",".join(str(each.config[name]) for name in keys)
        entries.append(f"{json.dumps(key)}: {json.dumps(entry, allow_nan=False)}")
    return ("{" + "\n".join(lines) + '\n"cache": {\n' + ",\n".join(entries) + "\n}\n}\n").encode()


def _rest(each: _Trial) -> float:
    """What a trial cost beyond compiling, in milliseconds."""
    return max(each.seconds * 1e3 - each.compile_ms, 0.0)


def _check(folder: Path, request: Request, made: Made) -> Checked:
    return Consumer("check_t4.py", "kernel-tuner").ask(folder)


TARGET = Target(
    name="t4",
    consumer="T4 results and Kernel Tuner's simulation",
    families=None,
    make=_make,
    check=_check,
    takes_journals=True,
)
