"""What all parts of a campaign on a GPU share: the workspace, the children, the folder, the time, and what was found before.

Refuses to do a part.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.commands import Setting, journal_identity
from harness.device import DeviceFacts
from harness.errors import UsageError
from harness.problem import Problem
from harness.space import Config, Rule, Space
from harness.store import Journal, open_journal, read_journal
from harness.worker import ProcessRunner
from harness.workspace import Workspace

# A part's numbers in campaign.json: six digits are more than any of them is good for.
_DIGITS = 6


@dataclass(slots=True, kw_only=True)
class Bench:
    """`runner` works on any kernel of the workspace, in `jobs` compiling children. `left` gives the seconds of the part in
    flight; `known` the data of a part that is done, by name; `memory_bytes` what the device has, if that is known. With `keep`
    what older versions of the judges recorded is continued."""

    workspace: Workspace
    setting: Setting
    folder: Path
    runner: ProcessRunner
    jobs: int
    known: Callable[[str], Mapping[str, Any] | None]
    seed: int = 0
    memory_bytes: int | None = None
    keep: bool = False
    left: Callable[[], float] = lambda: float("inf")
    _spaces: dict[tuple[str, Problem], tuple[Space, Config]] = field(default_factory=dict)

    @property
    def device(self) -> DeviceFacts:
        return self.setting.device

    def seconds(self) -> float:
        """The seconds that the part in flight may still take."""
        return self.left()

    def kernel(self, stem: str) -> ProcessRunner:
        """The children at work on a kernel."""
        return self.runner.for_kernel(stem)

    def slice(self, stem: str, problem: Problem, groups: Sequence[Sequence[str]]) -> tuple[Space, Config]:
        """Of a space the configs that agree with its default in all tunables of some group, or the whole if there is no group;
        and the default. Tunables that the space does not have do not count."""
        whole, default = self.space(stem, problem)
        known = [[name for name in group if name in whole.names] for group in groups]
        if not known:
            return whole, default

        def holds(config: Config) -> bool:
            return any(all(config[name] == default[name] for name in group) for group in known)

        rule = Rule("outside_the_slice", "only a part of this space is measured in full", holds)
        return Space(params=whole.params, rules=(rule, *whole.rules)), default

    def space(self, stem: str, problem: Problem) -> tuple[Space, Config]:
        """The space of a kernel for a problem on this device, and its default. Raises `UsageError` where nothing is legal."""
        if (stem, problem) not in self._spaces:
            module = self.workspace.load_space(stem)
            space: Space = module.space(problem, self.device)
            if not space.legal:
                raise UsageError(f"no config of `{stem}` is legal for `{problem}`")
            self._spaces[stem, problem] = space, space.check(module.default(problem, self.device))
        return self._spaces[stem, problem]

    def journal(self, path: Path, stem: str, problem: Problem) -> Journal:
        """The journal of one problem, continued if it belongs to the same kernel, device, toolchain and judges; one of others is
        moved aside."""
        identity = journal_identity(stem, self.workspace, self.setting, self.seed) | {"problem": problem.key}
        if path.exists():
            found = read_journal(path)[0]
            if self.keep and found:
                identity["judge_digest"] = found.get("judge_digest")
            if found and found != identity:
                path.replace(path.with_suffix(".old"))
        return open_journal(path, identity)

    def spaces_path(self, stem: str, problem: Problem) -> Path:
        """Where the journal of a whole space is while it is measured."""
        return self.folder / "spaces" / f"{slug(stem, problem)}.journal.jsonl"

    def tuning_path(self, stem: str, problem: Problem) -> Path:
        """Where the journal of a tune is while it goes on."""
        return self.folder / f"tuning-{slug(stem, problem)}.jsonl"


def slug(stem: str, problem: Problem) -> str:
    """A short name for files, of letters, digits, `-` and `_`."""
    return f"{stem}-" + re.sub(r"[^A-Za-z0-9]+", "-", problem.key).strip("-")


def seed_of(text: str) -> int:
    """A seed that depends on a text and on nothing else."""
    return zlib.crc32(text.encode())


def short(number: float | None) -> float | None:
    """`number` with the digits that are kept; None where it is not finite, which JSON has no word for."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.{_DIGITS}g}")
