"""Which config a problem gets: of its own champion, of one like it, or the safe default, and why. docs/champions.md.

Everything is read when a database is opened; a lookup opens nothing. Refuses to answer with a config that was proved of another
version of the kernel, was made for another architecture, or is not legal for the problem; never raises on a miss, unless a
champion is required.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from harness.champions import Champion, ChampionFile, read_champions
from harness.device import DeviceFacts, find_target
from harness.errors import MissError, UsageError
from harness.likeness import bucket, distance, features
from harness.problem import Problem, parse_problem
from harness.space import Config, Space
from harness.trust import Here, standing
from harness.workspace import Workspace, find_workspace, package_version

Mode = Literal["exact", "bucket", "nearest", "default", "require"]
Match = Literal["exact", "bucket", "nearest", "default"]
MODES: tuple[Mode, ...] = ("exact", "bucket", "nearest", "default", "require")

# Beyond so many doublings in all, another problem says nothing.
FARTHEST = 4.0

_LEVELS: Mapping[Mode, tuple[Match, ...]] = {
    "exact": ("exact",),
    "bucket": ("exact", "bucket"),
    "nearest": ("exact", "bucket", "nearest"),
    "require": ("exact", "bucket", "nearest"),
    "default": (),
}


class SoftMismatchWarning(UserWarning):
    """A champion is used that was made with another driver, Triton or torch than is here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Whose config it is: the champion of `problem` on `device` in the file `path`; its number in milliseconds and the kind of
    it; where it was proved; whether the file is a draft, which nobody reviewed."""

    path: str
    device: str
    problem: str
    kind: str
    value_ms: float
    where: str
    draft: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`distance` is 0 for an exact match, in doublings for another, None for the default, which has no provenance either."""

    config: Config
    match: Match
    distance: float | None = None
    provenance: Provenance | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """A champion that did not answer, and why."""

    path: str
    device: str
    problem: str
    reason: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A champion, whose file it is in, and its problem as a value."""

    path: str
    file: ChampionFile
    champion: Champion
    problem: Problem

    @property
    def draft(self) -> bool:
        return self.path.endswith(".draft.json")

    @property
    def trust(self) -> int:
        """Reviewed times come first, then times of drafts, then estimates."""
        return 2 if self.champion.number.kind != "measured" else 1 if self.draft else 0


@dataclass(slots=True, kw_only=True)
class Database:
    """The champions of one kernel, on all devices. `here` holds what is here now, with the driver of the device `live`, if there
    is one; `space` and `default` are those of the kernel's search space."""

    kernel: str
    entries: Sequence[Entry]
    here: Here
    space: Callable[[Problem, DeviceFacts], Space]
    default: Callable[[Problem, DeviceFacts], Config]
    live: DeviceFacts | None = None
    _answers: dict[Any, Answer] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def lookup(
        self,
        problem: Problem,
        device: str,
        mode: Mode = "nearest",
        deterministic: bool = False,
        sibling: bool = False,
    ) -> Answer:
        """The config for `problem` on `device` (a model or a bare architecture), from the memory of earlier answers if it can.

        `mode` says how far to look: for the problem itself, for its bucket, for the nearest, or not at all; with `require` a miss
        raises `MissError`. `deterministic` leaves out champions that nobody saw repeat their bits; `sibling` also asks those of
        other models of the architecture. Raises `UsageError` for a device or mode that nobody knows.
        """
        try:
            return self._answers[problem, device, mode, deterministic, sibling]
        except KeyError:
            facts = self.live if self.live and self.live.name == device else find_target(device)
            answer, _ = self.explain(problem, facts, mode, deterministic=deterministic, sibling=sibling)
        self._warn_once(answer)
        self._answers[problem, device, mode, deterministic, sibling] = answer
        return answer

    def explain(
        self,
        problem: Problem,
        device: DeviceFacts,
        mode: Mode = "nearest",
        *,
        deterministic: bool = False,
        sibling: bool = False,
    ) -> tuple[Answer, tuple[PassedOver, ...]]:
        """The answer of `lookup`, found anew, and every champion that did not give it."""
        if mode not in MODES:
            raise UsageError(f"there is no mode of looking up `{mode}`", hint=f"known: {', '.join(MODES)}")
        asked = _Asked(self, problem, device, mode, deterministic=deterministic, sibling=sibling)
        passed_over, fits = [], []
        for entry in self.entries:
            reason = asked.refusal(entry)
            if reason:
                passed_over.append(_passed_over(entry, reason))
            else:
                fits.append(entry)
        answer = None
        for entry in sorted(fits, key=asked.order):
            reason = "another one fits better" if answer else asked.illegality(entry)
            if reason:
                passed_over.append(_passed_over(entry, reason))
            else:
                answer = asked.answer(entry)
        if answer is None and mode == "require":
            raise MissError(
                f"no champion of {self.kernel} answers `{problem}` on {device.name}",
                hint=f"`flashtune lookup '{problem}'` says what was passed over, `flashtune tune {self.kernel}` finds one",
            )
        return answer or Answer(config=self.default(problem, device), match="default"), tuple(passed_over)

    def _warn_once(self, answer: Answer) -> None:
        if answer.provenance is None:
            return
        for text in answer.warnings:
            said = f"{answer.provenance.path}: {text}"
            if said not in self._warned:
                self._warned.add(said)
                warnings.warn(said, SoftMismatchWarning, stacklevel=3)


@dataclass(slots=True)
class _Asked:
    """One question to a database."""

    database: Database
    problem: Problem
    device: DeviceFacts
    mode: Mode
    deterministic: bool = field(kw_only=True)
    sibling: bool = field(kw_only=True)

    def refusal(self, entry: Entry) -> str:
        """Why a champion cannot answer, whatever its config is; empty if it can."""
        stands = standing(entry.file, entry.champion, replace(self.database.here, arch=self.device.arch))
        if stands.status != "current":
            return stands.reason
        if entry.file.device.name != self.device.name and not self.sibling:
            return f"it is of {entry.file.device.name}, a sibling, which was not asked for"
        if self.deterministic and entry.champion.certificate.determinism is None:
            return "nobody saw it give equal bits twice"
        match, apart = self.match(entry)
        if match is None:
            return apart
        if match not in _LEVELS[self.mode]:
            return f"it is a match of kind `{match}`, and `{self.mode}` was asked for"
        return ""

    def match(self, entry: Entry) -> tuple[Match | None, str]:
        """How the problem of a champion matches, or why it does not."""
        mine, theirs = features(self.problem), features(entry.problem)
        other = [name for name in mine if mine[name] != theirs[name]]
        if other:
            return None, f"its problem has another {' and another '.join(other)}"
        if entry.problem == self.problem:
            return "exact", ""
        if bucket(entry.problem, self.device.multiprocessors) == bucket(self.problem, self.device.multiprocessors):
            return "bucket", ""
        apart = distance(entry.problem, self.problem)
        return (
            ("nearest", "")
            if apart <= FARTHEST
            else (None, f"it is {apart:.1f} doublings away, more than {FARTHEST:g}")
        )

    def order(self, entry: Entry) -> Any:
        """The best first: of the device itself, trusted more, a closer match; then of the smaller problem, with less memory."""
        match, _ = self.match(entry)
        shared = max((one.shared_bytes for one in entry.champion.resources), default=0)
        return (
            entry.file.device.name != self.device.name, entry.trust, _LEVELS["nearest"].index(match or "nearest"),
            distance(entry.problem, self.problem), len(self.notes(entry)), entry.problem.flops, shared, entry.path,
        )  # fmt: skip

    def illegality(self, entry: Entry) -> str:
        """Why the config of a champion may not be used for this problem; empty if it may."""
        try:
            self.database.space(self.problem, self.device).check(entry.champion.config)
        except UsageError as illegal:
            return illegal.message
        return ""

    def notes(self, entry: Entry) -> tuple[str, ...]:
        """What is to be known of an answer by this champion."""
        here = replace(self.database.here, arch=self.device.arch)
        live = self.database.live
        if live is None or entry.file.device.name != live.name:
            here = replace(here, driver=None)
        return standing(entry.file, entry.champion, here).warnings

    def answer(self, entry: Entry) -> Answer:
        champion, match = entry.champion, self.match(entry)[0]
        assert match is not None
        notes = self.notes(entry)
        if champion.number.kind != "measured":
            notes += ("its number is an estimate, not a time",)
        if entry.draft:
            notes += ("it is of a draft, which nobody reviewed",)
        if entry.file.device.name != self.device.name:
            notes += (f"it was tuned on {entry.file.device.name}, a sibling of {self.device.name}",)
        source = Provenance(
            path=entry.path, device=entry.file.device.name, problem=champion.problem, kind=champion.number.kind,
            value_ms=champion.number.value_ms, where=champion.certificate.where, draft=entry.draft,
        )  # fmt: skip
        apart = distance(entry.problem, self.problem)
        return Answer(config=Config(champion.config), match=match, distance=apart, provenance=source, warnings=notes)


def _passed_over(entry: Entry, reason: str) -> PassedOver:
    return PassedOver(path=entry.path, device=entry.file.device.name, problem=entry.champion.problem, reason=reason)


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def open_database(
    workspace: Workspace,
    kernel: str,
    *,
    live: DeviceFacts | None = None,
    driver: str | None = None,
    drafts: bool = True,
) -> Database:
    """The champions of a kernel of a workspace; `live` is the device that is here, with its `driver`. Raises `ChampionError` for
    a damaged file."""
    space = workspace.load_space(kernel)
    here = Here(
        kernel_digest=workspace.kernel_digest(kernel), triton=package_version("triton"), torch=package_version("torch"),
        driver=driver,
    )  # fmt: skip
    entries = [entry for entry in _entries(workspace, kernel) if drafts or not entry.draft]
    return Database(kernel=kernel, entries=entries, here=here, space=space.space, default=space.default, live=live)


def _entries(workspace: Workspace, kernel: str) -> Iterator[Entry]:
    for path in sorted((workspace.results / "best").glob(f"*/{kernel}*.json")):
        file = read_champions(path)
        if (file.kernel.name, file.kernel.family) == (kernel, workspace.kernel_family(kernel)):
            shown = str(path.relative_to(workspace.root))
            for champion in file.champions:
                yield Entry(shown, file, champion, champion.read())


@functools.cache
def database_of(kernel: str, root: Path | None = None) -> Database:
    """The database of a kernel of the workspace at `root`, or of that around the current folder, opened once."""
    return open_database(find_workspace(root), kernel)


def lookup(
    problem: Problem | str,
    device: str,
    mode: Mode = "nearest",
    *,
    kernel: str,
    deterministic: bool = False,
    sibling: bool = False,
) -> Answer:
    """What `Database.lookup` of `database_of(kernel)` answers; the problem may be given in its notation."""
    asked = parse_problem(problem) if isinstance(problem, str) else problem
    return database_of(kernel).lookup(asked, device, mode, deterministic, sibling)
