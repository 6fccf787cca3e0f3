"""Workloads: named sets of problems from real models, ours and those that a workspace adds.

Refuses what cannot be read, naming the file, the entry and what is wrong with it. Knows neither kernels nor devices.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from harness.errors import ProblemError, UsageError, did_you_mean
from harness.problem import Pass, Problem, parse_problem

TAGS = ("prefill", "training", "long-context")

# Where a workspace may add workloads of its own, or override ours by name; relative to its root.
WORKSPACE_FILE = Path("search_spaces") / "workloads.toml"

_TEXTS = ("source", "leaves_out")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Problems that belong together. `tags` says what each of `problems` is for, in the same order; may be empty.

    `source` names the published figures; `leaves_out` what of them the notation cannot say.
    """

    name: str
    source: str
    problems: tuple[Problem, ...]
    tags: tuple[str, ...] = ()
    leaves_out: str = ""

    def __post_init__(self) -> None:
        if not self.problems or (self.tags and len(self.tags) != len(self.problems)):
            raise ValueError(f"workload `{self.name}` has {len(self.problems)} problems and {len(self.tags)} tags")

    def tagged(self, tag: str) -> "Workload":
        """Only the problems for `tag`, as a workload named `NAME:TAG`. Raises `UsageError` if it has none."""
        chosen = tuple(problem for problem, own in zip(self.problems, self.tags, strict=bool(self.tags)) if own == tag)
        if not chosen:
            there = [own for own in TAGS if own in self.tags]
            known = tag in TAGS
            because = f" ({self.leaves_out})" if known and self.leaves_out else ""
            raise UsageError(
                f"workload `{self.name}` has no problems for `{tag}`{because}",
                hint=f"it has: {', '.join(there)}" if known else did_you_mean(tag, there),
            )
        return Workload(
            name=f"{self.name}:{tag}",
            source=self.source,
            problems=chosen,
            tags=(tag,) * len(chosen),
            leaves_out=self.leaves_out,
        )


def load_workloads(extra: Path | None = None) -> dict[str, Workload]:
    """All workloads by name: ours, then those of the file `extra` if it exists, which add or override whole entries."""
    ours = resources.files("harness") / "workloads.toml"
    loaded = _read(ours.read_text(encoding="utf-8"), "harness/workloads.toml")
    if extra is not None and extra.is_file():
        try:
            text = extra.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"workload file {extra} cannot be read: {error}") from error
        loaded |= _read(text, str(extra))
    return loaded


def workload_names(extra: Path | None = None) -> list[str]:
    """Names of all workloads, in the order of their files."""
    return list(load_workloads(extra))


def find_workload(name: str, *, extra: Path | None = None) -> Workload:
    """The workload called `name`, or with `name:tag` its problems for that tag. Raises `UsageError` if unknown."""
    base, colon, tag = name.partition(":")
    loaded = load_workloads(extra)
    if base not in loaded:
        raise UsageError(f"no workload is called `{base}`", hint=did_you_mean(base, list(loaded)))
    return loaded[base].tagged(tag) if colon else loaded[base]


def problems_for(workload: Workload, pass_: Pass) -> list[Problem]:
    """The problems of `workload` with their pass set, each once, in order."""
    return list(dict.fromkeys(problem.replace(pass_=pass_) for problem in workload.problems))


def _read(text: str, where: str) -> dict[str, Workload]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = 'a name with a dot needs quotes: `["my-model-1.5"]`'
        raise UsageError(f"workload file {where} is not valid TOML: {error}", hint=hint) from error
    return {name: _read_entry(name, table, where) for name, table in tables.items()}


def _read_entry(name: str, table: Any, where: str) -> Workload:
    here = f"workload file {where}, entry `{name}`"
    if not isinstance(table, dict):
        raise UsageError(f"{here}: expected a table, found {table!r}", hint=f"write `[{name}]` and the keys below it")
    if not _NAME.fullmatch(name):
        hint = 'use small letters, digits, `-`, `_` and `.`; a name with a dot needs quotes: `["my-model-1.5"]`'
        raise UsageError(f"{here}: not a usable name", hint=hint)
    for key in table:
        if key not in (*TAGS, *_TEXTS):
            hint = did_you_mean(key, [*TAGS, *_TEXTS])
            if isinstance(table[key], dict):
                hint = f'a name with a dot needs quotes: `["{name}.{key}"]`'
            raise UsageError(f"{here}: `{key}` means nothing here", hint=hint)
    texts = {key: _read_text(table, key, here) for key in _TEXTS}
    if not texts["source"]:
        hint = "name the paper or the config file that the numbers come from"
        raise UsageError(f"{here}: `source` is missing", hint=hint)
    found = [(tag, problem) for tag in TAGS for problem in _read_problems(table, tag, here)]
    if not found:
        hint = f"list problems under {', '.join(f'`{tag}`' for tag in TAGS)}"
        raise UsageError(f"{here}: there are no problems", hint=hint)
    problems, tags = tuple(problem for _, problem in found), tuple(tag for tag, _ in found)
    return Workload(name=name, problems=problems, tags=tags, **texts)


def _read_text(table: Mapping[str, Any], key: str, here: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise UsageError(f"{here}: `{key}` must be a text, found {value!r}")
    return value


def _read_problems(table: Mapping[str, Any], tag: str, here: str) -> list[Problem]:
    notations = table.get(tag, [])
    if not isinstance(notations, list) or not all(isinstance(notation, str) for notation in notations):
        hint = f'write `{tag} = ["b1 h32/8 s2048 d128 bf16 causal"]`'
        raise UsageError(f"{here}: `{tag}` must be a list of problems, found {notations!r}", hint=hint)
    problems: list[Problem] = []
    for notation in notations:
        try:
            problem = parse_problem(notation)
        except ProblemError as error:
            raise UsageError(f"{here}, `{tag}`: {error.message}", hint=error.hint) from error
        if problem.pass_ != "fwd":
            raise UsageError(
                f"{here}, `{tag}`: problem `{notation}` names a pass",
                hint="leave it out: the kernel that is tuned decides the pass",
            )
        if problem in problems:
            raise UsageError(f"{here}, `{tag}`: problem `{notation}` is listed twice")
        problems.append(problem)
    return problems
