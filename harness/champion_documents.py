"""The JSON documents about champions, as types: of `show`, `validate`, `diff`, `merge`, `verify`, `lookup` and `table`.

`harness.documents` lists them. Refuses extra fields and missing ones, as all documents do.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from harness.champions import Champion, ChampionFile
from harness.trust import Standing

_DOCUMENT = ConfigDict(extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)

ConfigValues = Mapping[str, int | bool | str]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ShownDocument:
    """A champion file, and how each of its problems stands against the kernel that is here; null where that kernel is not."""

    path: str
    file: ChampionFile
    standings: Mapping[str, Standing] | None


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class FileDocument:
    """A file: `detail` says whose champions it holds, or why it is no champion file."""

    path: str
    valid: bool
    detail: str
    champions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ValidateDocument:
    """What `flashtune validate --json` prints."""

    files: tuple[FileDocument, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class DifferenceDocument:
    """What two files do not share: of a problem, or of the files where `problem` is empty; null where it is not there."""

    problem: str
    what: str
    old: Any
    new: Any


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class DiffDocument:
    """What `flashtune diff --json` prints. `same` counts problems with equal champions."""

    same: int
    differences: tuple[DifferenceDocument, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ReportDocument:
    """What `flashtune report --json` prints: the file and its size, how many champions it shows and how many of them have times;
    the commands that get what is missing, by part, and the files that could not be read, with the reason."""

    path: str
    format: Literal["html", "md"]
    bytes: int
    champions: int
    measured: int
    missing: Mapping[str, str]
    unread: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class InitDocument:
    """What `flashtune init --json` prints: the new workspace, how many files it has, and its kernels."""

    path: str
    files: int
    kernels: tuple[str, ...]


def diff_document(old: ChampionFile, new: ChampionFile) -> DiffDocument:
    """What two champion files do not share, in the order of their problems."""
    found = list(_header_differences(old, new))
    before = {champion.problem: champion for champion in old.champions}
    after = {champion.problem: champion for champion in new.champions}
    same = 0
    for problem in sorted({*before, *after}):
        if problem in before and problem in after:
            differences = list(_champion_differences(problem, before[problem], after[problem]))
            same += not differences
            found += differences
        else:
            one, other = (_summary(side.get(problem)) for side in (before, after))
            found.append(DifferenceDocument(problem=problem, what="champion", old=one, new=other))
    return DiffDocument(same=same, differences=tuple(found))


def _summary(champion: Champion | None) -> Any:
    return champion and {
        "config": dict(champion.config),
        "value_ms": champion.number.value_ms,
        "kind": champion.number.kind,
    }


def _header_differences(old: ChampionFile, new: ChampionFile) -> Iterator[DifferenceDocument]:
    for block in ("device", "environment", "kernel"):
        yield from _differences(
            "", block, *(getattr(file, block).model_dump(mode="json", by_alias=True) for file in (old, new))
        )


def _champion_differences(problem: str, old: Champion, new: Champion) -> Iterator[DifferenceDocument]:
    one, other = (champion.model_dump(mode="json", by_alias=True) for champion in (old, new))
    for block in sorted({*one, *other}, key=[*one, *other].index):
        yield from _differences(problem, block, one.get(block), other.get(block))


def _differences(problem: str, what: str, old: Any, new: Any) -> Iterator[DifferenceDocument]:
    """Leaf by leaf, as deep as both sides are objects."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(problem, f"{what}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield DifferenceDocument(problem=problem, what=what, old=old, new=new)


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class RenewedDocument:
    """What became of one champion: renewed, struck, kept where the suite could not tell, or current before."""

    path: str
    problem: str
    became: Literal["renewed", "struck", "unsettled", "current"]
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class VerifyDocument:
    """What `flashtune verify --json` prints."""

    champions: tuple[RenewedDocument, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ProvenanceDocument:
    """Whose config an answer is."""

    path: str
    device: str
    problem: str
    kind: str
    value_ms: float
    where: str
    draft: bool


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class PassedOverDocument:
    """A champion that did not answer, and why."""

    path: str
    device: str
    problem: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class AnswerDocument:
    """What a kernel would be given. `distance` is null where nothing was near, `cached_us` the time of an answer that was given
    before, where that was asked for."""

    kernel: str
    match: str
    config: ConfigValues
    distance: float | None
    provenance: ProvenanceDocument | None
    warnings: tuple[str, ...]
    passed_over: tuple[PassedOverDocument, ...]
    cached_us: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class LookupDocument:
    """What `flashtune lookup --json` prints: an answer for each kernel that was asked."""

    problem: str
    device: str
    mode: str
    answers: tuple[AnswerDocument, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class TableDocument:
    """What `flashtune table --json` prints. Each champion was held out, and the table of the others asked for its problem:
    `answered` of `held_out` got a row, `legal` of these a config that is legal there, `same` the champion's own. `regrets` are
    times over the champion's, less 1, where a time is recorded; `default_regrets` those of the default config. Of the
    `shapes` that workloads have and no champion, `shapes_answered` get a row of the whole table, which is legal for
    `shapes_legal`."""

    kernel: str
    device: str
    out: str
    rows: int
    champions: int
    held_out: int
    answered: int
    legal: int
    same: int
    regrets: Mapping[str, float]
    default_regrets: Mapping[str, float]
    shapes: int
    shapes_answered: int
    shapes_legal: int
