"""Which champions may leave, and why the others stay: files are read with suspicion, champions judged as a lookup judges them.

Refuses those of another kernel family, those whose proof is of another version of the kernel, those whose kernel is not here (so
that nobody can say which version it is), and configs that their space no longer allows. Struck ones are in no file.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness.champions import FORMAT, ChampionFile, read_champions
from harness.device import DeviceFacts
from harness.errors import ChampionError, UsageError
from harness.export.base import Chosen, Request, Target, facts_of
from harness.export_documents import SkippedDocument
from harness.sealed import LIMIT_BYTES, parse, read_file, tame
from harness.trust import Here, standing
from harness.workspace import Workspace, package_version

_JOURNAL = b'{"schema"'
# Beside a journal lies what its search knew when it began.
_PAST = ".past.json"


@dataclass(slots=True)
class Found:
    """What lies in the places that were named: champion files, and journals; what is neither was `passed_by`."""

    files: list[tuple[str, ChampionFile]] = field(default_factory=list)
    journals: list[Path] = field(default_factory=list)
    passed_by: list[SkippedDocument] = field(default_factory=list)


def find(places: Sequence[Path], shown: Path) -> Found:
    """Champion files and journals among `places`, files or folders that are looked through; paths are said as seen from `shown`.

    Raises `ChampionError` for a champion file that is damaged, and for a named file that is none; `UsageError` for nothing.
    """
    found = Found()
    for place in places:
        if place.is_dir():
            for path in sorted(path for path in place.rglob("*.json*") if path.is_file() and path.name[0] != "."):
                _take(path, found, shown, named=False)
        elif place.exists():
            _take(place, found, shown, named=True)
        else:
            raise UsageError(
                f"there is no {tame(place)}", hint="`--from` takes champion files, journals and folders of them"
            )
    return found


def _take(path: Path, found: Found, shown: Path, *, named: bool) -> None:
    if path.suffix == ".jsonl":
        if _begins(path, _JOURNAL):
            found.journals.append(path)
        return
    if path.suffix != ".json":
        return
    if named or _says_champions(path):
        found.files.append((name_of(path, shown), read_champions(path)))
    elif not path.name.endswith(_PAST):
        found.passed_by.append(SkippedDocument(path=name_of(path, shown), problem="", reason="it is no champion file"))


def name_of(path: Path, shown: Path) -> str:
    """A path without whose machine it lies on: as seen from the workspace, else its last two parts."""
    whole = path.resolve()
    named = whole.relative_to(shown.resolve()) if whole.is_relative_to(shown.resolve()) else Path(*whole.parts[-2:])
    return tame(named, 200)


def _begins(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _says_champions(path: Path) -> bool:
    """Whether a file that nobody named claims to hold champions; one that does is then read, and may be found damaged."""
    if path.stat().st_size > LIMIT_BYTES:
        return False
    try:
        return parse(read_file(path), tame(path)).get("format") == FORMAT
    except ChampionError:
        return json.dumps(FORMAT).encode() in path.read_bytes()


def choose(
    found: Found, target: Target, workspace: Workspace, live: DeviceFacts | None = None
) -> tuple[Request, tuple[SkippedDocument, ...]]:
    """What `target` is asked for, and what stays here with the reason."""
    skipped = list(found.passed_by)
    best: dict[tuple[str, str, str], Chosen] = {}
    for one in _candidates(found.files, workspace):
        reason = _refusal(one, target, workspace, live)
        key = (one.file.device.name, one.file.kernel.name, one.champion.problem)
        if reason:
            skipped.append(one.skipped(reason))
        elif key in best:
            skipped.append(one.skipped(f"that of {best[key].path} is trusted more"))
        else:
            best[key] = one
    chosen = [best[key] for key in sorted(best)]
    journals = tuple(found.journals) if target.takes_journals else ()
    return Request(workspace=workspace, champions=chosen, journals=journals, live=live), tuple(skipped)


def _candidates(files: Iterable[tuple[str, ChampionFile]], workspace: Workspace) -> list[Chosen]:
    """Every champion, those that are trusted most first: reviewed times, times of drafts, estimates."""
    found = []
    for path, file in files:
        draft = path.endswith(".draft.json")
        for champion in file.champions:
            one = Chosen(path=path, file=file, champion=champion, problem=champion.read(), draft=draft)
            found.append(replace(one, warnings=tuple(_warnings(one, workspace))))
    return sorted(found, key=lambda one: (one.estimated, one.draft, len(one.warnings), one.path))


def _warnings(one: Chosen, workspace: Workspace) -> Iterator[str]:
    here = Here(
        kernel_digest=one.champion.certificate.kernel_digest, triton=package_version("triton"),
        torch=package_version("torch"),
    )  # fmt: skip
    yield from standing(one.file, one.champion, here).warnings


def _refusal(one: Chosen, target: Target, workspace: Workspace, live: DeviceFacts | None) -> str:
    """Why a champion stays here; empty if it may leave."""
    family, stem = one.file.kernel.family, one.file.kernel.name
    if target.families is not None and family not in target.families:
        wanted = " or ".join(sorted(target.families))
        return f"it is of a kernel of the family `{family}`, and {target.consumer} runs kernels of `{wanted}`"
    if stem not in workspace.stems or workspace.kernel_family(stem) != family:
        return f"the kernel `{stem}` of the family `{family}` is not in this workspace, so its proof cannot be held against it"
    stands = standing(one.file, one.champion, Here(kernel_digest=workspace.kernel_digest(stem)))
    if stands.status != "current":
        return f"{stands.status}: {stands.reason}; `flashtune verify` proves it again"
    return _illegality(one, workspace, facts_of(one.file.device.name, live))


def _illegality(one: Chosen, workspace: Workspace, device: DeviceFacts | None) -> str:
    """Why its space does not allow the config; empty if it does, or if nothing is known of the device."""
    if device is None:
        return ""
    try:
        workspace.load_space(one.file.kernel.name).space(one.problem, device).check(one.champion.config)
    except UsageError as illegal:
        return f"its config is not legal: {illegal.message}"
    return ""
