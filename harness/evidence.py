"""What lies in files that a report can show: champions, journals, recorded spaces, campaigns, benches, judged searches.

Files may come from anywhere: each is known by what is in it, not by its name, and every text in it is made one tame line. In a
folder, what a report cannot show is passed over, and what is damaged is named. Refuses to interpret anything.
"""

import gzip
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.campaign import Book, read_book
from harness.champion_documents import ShownDocument
from harness.champions import FORMAT, ChampionFile, read_champions
from harness.documents import DOCUMENTS
from harness.errors import HarnessError, MachineError, UsageError
from harness.landscape import Landscape, read_landscapes
from harness.outcome import Record, value_ms
from harness.recorded import FORMAT as RECORDED_FORMAT
from harness.recorded import read_recorded, reason_of
from harness.sealed import parse, read_file, tame
from harness.search_documents import SearchesDocument
from harness.space import Config, Value
from harness.store import read_journal
from harness.trust import Standing

# What tells a kind of file is in its first bytes.
_HEAD = 4096
_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_KNOWN = "champion files, journals, recorded spaces, what campaigns, benches and judged searches print can be shown"
_LONGEST = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One config, in the order of trial: its number in milliseconds or None, and what became of it: an outcome's kind, and the
    reason in words (for pruned ones also the `rule`)."""

    config: Mapping[str, Value]
    value_ms: float | None
    outcome: str
    reason: str = ""
    rule: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """What was tried of a kernel for a problem on a device. `kind` is what the numbers are: measured, estimated or replayed;
    `path` is the file's."""

    kernel: str
    device: str
    problem: str
    kind: str
    path: str
    trials: tuple[Trial, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalFacts:
    """A journal: what every record in it depends on, and how many records it has."""

    path: str
    identity: Mapping[str, str]
    records: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceFacts:
    """A space for a problem on a device: how many configs there are, how many are legal, how many each rule removes in turn, and
    why."""

    kernel: str
    device: str
    problem: str
    size: int
    legal: int
    pruned: Mapping[str, int]
    whys: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was found. `unread` says of files that should have been readable why they were not."""

    champions: tuple[ShownDocument, ...] = ()
    trials: tuple[Trials, ...] = ()
    journals: tuple[JournalFacts, ...] = ()
    campaigns: tuple[tuple[str, Book], ...] = ()
    searches: tuple[tuple[str, SearchesDocument], ...] = ()
    benches: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    spaces: tuple[SpaceFacts, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Found:
    champions: list[ShownDocument] = field(default_factory=list)
    trials: list[Trials] = field(default_factory=list)
    journals: list[JournalFacts] = field(default_factory=list)
    campaigns: list[tuple[str, Book]] = field(default_factory=list)
    searches: list[tuple[str, SearchesDocument]] = field(default_factory=list)
    benches: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)


StandingsOf = Callable[[ChampionFile], Mapping[str, Standing] | None]


def gather(paths: Sequence[Path], standings_of: StandingsOf = lambda file: None) -> Evidence:
    """What the files, and the files in the folders, hold. Raises a `HarnessError` for a file that was named and cannot be
    shown."""
    found = _Found()
    for path in paths:
        if path.is_dir():
            for each in _files_in(path):
                try:
                    _take(each, found, standings_of)
                except (HarnessError, OSError, EOFError, ValueError, RecursionError) as error:
                    said = error.message if isinstance(error, HarnessError) else str(error)
                    found.unread[tame(each, _LONGEST)] = tame(said, _LONGEST)
        elif not _take_named(path, found, standings_of):
            raise UsageError(f"{tame(path, _LONGEST)} is nothing that a report can show", hint=_KNOWN)
    return Evidence(
        champions=tuple(found.champions), trials=tuple(found.trials), journals=tuple(found.journals),
        campaigns=tuple(found.campaigns), searches=tuple(found.searches), benches=tuple(found.benches), unread=found.unread,
    )  # fmt: skip


def _files_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.name.endswith(_SUFFIXES) and not hidden and path.is_file():
            yield path


def _take_named(path: Path, found: _Found, standings_of: StandingsOf) -> bool:
    """A file that somebody named, whatever its name ends in."""
    try:
        if not path.is_file():
            raise MachineError(f"there is no file or folder {tame(path, _LONGEST)}", hint=_KNOWN)
        if _take(path, found, standings_of):
            return True
        # Other tools' caches carry no mark of their own.
        found.trials += [_of_landscape(one) for one in read_landscapes(path)]
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise MachineError(f"cannot read {tame(path, _LONGEST)}: {tame(error, _LONGEST)}", hint=_KNOWN) from error
    return True


def _take(path: Path, found: _Found, standings_of: StandingsOf) -> bool:
    """Add what a file holds, if its first bytes say that it is one of ours."""
    head, name = _head(path), tame(path, _LONGEST)
    if FORMAT.encode() in head:
        file = read_champions(path)
        found.champions.append(ShownDocument(path=name, file=file, standings=standings_of(file)))
    elif b'"journal"' in head[:64]:
        _take_journal(path, name, found)
    elif RECORDED_FORMAT.encode() in head:
        found.trials.append(_of_recorded(path, name))
    elif b'"campaign"' in head and b'"flashtune"' in head:
        found.campaigns.append((name, read_book(path)))
    elif b'"fraction_at"' in head and re.search(rb'"results":\s*\[', head):
        try:
            found.searches.append((name, DOCUMENTS["replay-spaces"].validate_json(path.read_bytes())))
        except ValidationError as error:
            raise UsageError(
                f"{name} is not what `replay --spaces --json` prints: {error.errors()[0]['msg']}"
            ) from error
    elif b'"problems"' in head and b'"peers"' in head:
        found.benches.append((name, parse(read_file(path), name)))
    else:
        return False
    return True


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_HEAD)
        if head[:2] != b"\x1f\x8b":
            return head
    with gzip.open(path) as packed:
        return packed.read(_HEAD)


def _take_journal(path: Path, name: str, found: _Found) -> None:
    identity, records = read_journal(path)
    facts = {str(tame(key)): str(tame(value)) for key, value in identity.items()}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    found.journals.append(JournalFacts(path=name, identity=facts, records=len(records), digest=digest))
    for problem in dict.fromkeys(one.problem for one in records):
        mine = [one for one in records if one.problem == problem and one.role == "screen"]
        if mine:
            found.trials.append(
                Trials(
                    kernel=facts.get("kernel", ""), device=facts.get("device", ""), problem=tame(problem, _LONGEST),
                    kind=facts.get("mode", ""), path=name, trials=tuple(_last_of_each(mine)),
                )
            )  # fmt: skip


def _last_of_each(records: Iterable[Record]) -> Iterator[Trial]:
    """Of what was tried again, the last word, at the place of the first."""
    last = {Config(one.config): one for one in records}
    for one in last.values():
        yield Trial(
            config={str(tame(key)): _tame_value(value) for key, value in one.config.items()},
            value_ms=possible(value_ms(one.outcome)), outcome=one.outcome.kind, reason=tame(reason_of(one), _LONGEST),
            rule=tame(getattr(one.outcome, "rule", "")),
        )  # fmt: skip


def possible(value: float | None) -> float | None:
    """A number of this world, whether milliseconds, a rate or a ratio; None for one that no figure could show, which a file may
    hold all the same."""
    return value if value is not None and 1e-12 < value < 1e12 else None


def _tame_value(value: Any) -> Value:
    return value if isinstance(value, int | float) else tame(value)  # type: ignore[return-value]


def _of_recorded(path: Path, name: str) -> Trials:
    """A recorded space of ours: times, or estimates where there are no times at all."""
    recorded = read_recorded(path)
    header = recorded.header
    measured = bool(recorded.measured)
    trials = []
    for line in recorded.lines:
        value = possible(line.time_ms if measured else line.estimate_ms)
        config = {tame(key): _tame_value(one) for key, one in zip(header.params, line.config, strict=False)}
        rule = line.reason.partition(":")[0] if line.outcome == "pruned" else ""
        trials.append(
            Trial(
                config=config, value_ms=value, outcome=tame(line.outcome), reason=tame(line.reason, _LONGEST), rule=tame(rule)
            )
        )  # fmt: skip
    return Trials(
        kernel=tame(header.kernel), device=tame(header.device), problem=tame(header.problem, _LONGEST),
        kind="measured" if measured else "estimated", path=name, trials=tuple(trials),
    )  # fmt: skip


def _of_landscape(found: Landscape) -> Trials:
    trials = tuple(
        Trial(
            config={tame(key): _tame_value(value) for key, value in config.items()}, value_ms=possible(one.time_ms),
            outcome="measured" if one.time_ms is not None else "launch_failed", reason=tame(one.failure, _LONGEST),
        )
        for config, one in found.recordings.items()
    )  # fmt: skip
    return Trials(
        kernel=tame(found.kernel or found.name), device=tame(found.device), problem=tame(found.problem, _LONGEST),
        kind="measured", path=tame(found.path, _LONGEST), trials=trials,
    )  # fmt: skip
