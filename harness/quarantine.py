"""The quarantine: candidates that took their process with them, or would not end, and with which toolchain.

A journal keeps what became of a candidate in one run; this file keeps others from meeting it again, in any run of the same
kernel, device and toolchain. A new toolchain tries again. Refuses to hold what was merely wrong or slow.
"""

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import MachineError
from harness.outcome import CompileFailed, LaunchFailed, Pruned, TimedOut

# History of the schema: 1 is the first.
SCHEMA = 1
RULE = "quarantine"


@dataclass(slots=True)
class Quarantine:
    """The candidates that must not be tried. `scope` is the kernel, device and toolchain that they failed with.

    Without a `path` nothing is kept, and nobody is refused.
    """

    path: Path | None
    scope: Mapping[str, str | None]
    _held: dict[Any, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.path is not None:
            self._held = _read(self.path, dict(self.scope))

    def refusal(self, problem: str, config: Mapping[str, Any]) -> Pruned | None:
        """The outcome of a candidate that is held here, without trying it."""
        reason = self._held.get(_key(problem, config))
        if reason is None:
            return None
        scope = ", ".join(f"{name} {value}" for name, value in self.scope.items() if name not in ("kernel", "digest"))
        return Pruned(rule=RULE, detail=f"{reason} ({scope}); it is tried again with another toolchain")

    def hold(self, problem: str, config: Mapping[str, Any], outcome: CompileFailed | LaunchFailed | TimedOut) -> None:
        """Keep a candidate from being tried again. Raises `MachineError` if that cannot be written down."""
        if self.path is None or _key(problem, config) in self._held:
            return
        if isinstance(outcome, TimedOut):
            reason = f"{outcome.stage} did not end within {outcome.limit_s:g} s"
        else:
            stage = "compile" if isinstance(outcome, CompileFailed) else outcome.stage
            reason = f"{stage}: {outcome.reason}"
        entry = {
            "schema": SCHEMA,
            "scope": dict(self.scope),
            "problem": problem,
            "config": dict(config),
            "reason": reason,
        }
        self._held[_key(problem, config)] = reason
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                # Several tunes may write here, each for its own journal.
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise MachineError(
                f"cannot write {self.path}: {error.strerror}", hint="free some space and run the same command again"
            ) from error


def _read(path: Path, scope: dict[str, str | None]) -> dict[Any, str]:
    """What is held under this scope. A line that cannot be read holds nobody: at worst a bad candidate is met once more."""
    held = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["schema"] == SCHEMA and entry["scope"] == scope:
                held[_key(entry["problem"], entry["config"])] = str(entry["reason"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return held


def _key(problem: str, config: Mapping[str, Any]) -> Any:
    return problem, frozenset(config.items())
