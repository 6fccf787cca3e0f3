"""Keeping champions: where their files lie, how they are written, and which of two champions stays.

Only one process at a time changes the files of a kernel. Refuses to mix devices and environments, to let an estimate replace a
time, to lose what it does not know, and to write a file that it cannot read back.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.champions import Champion, ChampionFile, Environment, champions_from, read_champions
from harness.errors import BugError, ChampionError
from harness.files import write_whole
from harness.sealed import DIGEST, locked, sealed, tame


def champion_path(results: Path, device: str, kernel: str, *, draft: bool) -> Path:
    """Where the champions of a kernel on a device are kept, those of the first environment."""
    return results / "best" / device / (f"{kernel}.draft.json" if draft else f"{kernel}.json")


def champion_paths(folder: Path, kernel: str, *, draft: bool) -> list[Path]:
    """The files of a kernel in a device's folder: that of the first environment, then those of others."""
    ending = ".draft.json" if draft else ".json"
    found = [folder / f"{kernel}{ending}", *sorted(folder.glob(f"{kernel}-*{ending}"))]
    return [path for path in found if path.exists() and path.name.endswith(".draft.json") == draft]


def write_champions(path: Path, champions: ChampionFile) -> ChampionFile:
    """Write a champion file so that a reader sees the old one or the new one, whole. Raises `MachineError`."""
    tree = champions.model_dump(mode="json", by_alias=True, exclude={DIGEST})
    content = sealed(tree)
    try:
        written = champions_from(content, tame(path))
    except ChampionError as error:
        raise BugError(f"we were about to write champions that we cannot read: {error.message}") from error
    hint = "nothing is lost: they are in the journal; make room and run the same command again"
    write_whole(path, content, what=f"the champions to {path}", hint=hint)
    return written


def save_champions(results: Path, fresh: ChampionFile, *, draft: bool) -> Path:
    """Merge fresh champions into the file of their device, kernel and environment, creating it if need be; return its path.

    A file of another environment is left as it is: the fresh ones then get `KERNEL-ENVIRONMENT.json` beside it. Only one
    process at a time does this. Raises `ChampionError` for a file there that is damaged, or of another device or kernel.
    """
    first = champion_path(results, fresh.device.name, fresh.kernel.name, draft=draft)
    with locked(lock_of(first)):
        path, found = _place(first, fresh, draft=draft)
        if found is not None and found.belongs_to != fresh.belongs_to:
            raise ChampionError(
                f"{path} holds {found}, these champions are {fresh}",
                hint="move the file to the folder of its own device",
            )
        write_champions(path, fresh if found is None else put(found, fresh.champions))
    return path


def replace_champion(path: Path, before: Champion, after: Champion | None) -> bool:
    """Put `after` in the place of `before` in a file, or strike it; False if the file has another one by now."""
    with locked(lock_of(path)):
        found = read_champions(path)
        if before not in found.champions:
            return False
        rest = tuple(one if one != before else after for one in found.champions)
        write_champions(path, found.model_copy(update={"champions": tuple(one for one in rest if one is not None)}))
    return True


def lock_of(path: Path) -> Path:
    """The lock file of all files of a kernel in a folder."""
    return path.with_name(f".{re.split(r'[-.]', path.name)[0]}.lock")


def _place(first: Path, fresh: ChampionFile, *, draft: bool) -> tuple[Path, ChampionFile | None]:
    """The file of the environment of `fresh`, which may have any of the names, and what it holds."""
    paths = champion_paths(first.parent, fresh.kernel.name, draft=draft)
    for path in paths:
        found = read_champions(path)
        if found.environment.digest == fresh.environment.digest:
            return path, found
    if first not in paths:
        return first, None
    name = f"{fresh.kernel.name}-{fresh.environment.digest}"
    return champion_path(first.parents[2], fresh.device.name, name, draft=draft), None


def put(found: ChampionFile, fresh: Iterable[Champion]) -> ChampionFile:
    """`found` with the fresh champions in place of older ones of the same problem, of the same device and environment.

    A time never yields to an estimate, nor to a slower time of the same kernel and protocol: a short tune does not undo a long
    one. What others have written under `x-` beside a champion that yields goes with it.
    """
    kept = {champion.problem: champion for champion in found.champions}
    for champion in fresh:
        older = kept.get(champion.problem)
        if older is None or _yields(older, champion):
            kept[champion.problem] = champion
    return found.model_copy(update={"champions": tuple(kept[problem] for problem in sorted(kept))})


def merge(files: Sequence[tuple[str, ChampionFile]]) -> ChampionFile:
    """The champions of several named files together, in any order the same. Raises `ChampionError` where they do not mix."""
    (name, merged), *others = sorted(files, key=lambda file: file[1].digest or "")
    for other_name, other in others:
        _require_mixable(name, merged, other_name, other)
        mine = {champion.problem: champion for champion in merged.champions}
        for champion in other.champions:
            if champion.problem in mine:
                _require_comparable(mine[champion.problem], champion, other_name)
        fresh = [one for one in other.champions if not _proved_later(mine.get(one.problem), one)]
        extras = {**(other.model_extra or {}), **(merged.model_extra or {})}
        version = max(merged, other, key=lambda one: [int(part) for part in one.version.split(".")])
        named = {"version": version.version, "schema_id": version.schema_id}
        merged = put(merged, fresh).model_copy(update=named | extras)
    return merged


def _require_mixable(name: str, one: ChampionFile, other_name: str, other: ChampionFile) -> None:
    if one.belongs_to != other.belongs_to:
        raise ChampionError(f"champions of {one} ({name}) and of {other} ({other_name}) do not mix")
    if one.environment.digest != other.environment.digest:
        raise ChampionError(
            f"{name} and {other_name} are of two environments: {differing(one.environment, other.environment)}",
            hint="keep both files: numbers of two environments cannot be compared, and everything reads both",
        )


def _require_comparable(mine: Champion, theirs: Champion, name: str) -> None:
    same = mine.number.kind != theirs.number.kind or _question(mine) == _question(theirs)
    if not same:
        raise ChampionError(
            f"`{mine.problem}` has two champions, and {name} has the one of another version of the kernel or of the timing",
            hint="tune it again, or leave one of the two files out",
        )


def _proved_later(mine: Champion | None, theirs: Champion) -> bool:
    """Whether of one champion in two files mine is the one that was proved again since it was timed."""
    if mine is None or mine.number != theirs.number:
        return False
    return _proved_again(mine) and not _proved_again(theirs)


def _proved_again(champion: Champion) -> bool:
    return champion.certificate.kernel_digest != champion.kernel.source_digest


def differing(one: Environment, other: Environment) -> str:
    """What two environments do not share, in words."""
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in ("triton", "toolchain", "torch", "driver"))
    return ", ".join(
        f"{name} {mine or 'unknown'} and {theirs or 'unknown'}" for name, mine, theirs in pairs if mine != theirs
    )


def _question(champion: Champion) -> tuple[str, str, str | None]:
    """Numbers that answer the same question can be compared."""
    return champion.number.kind, champion.kernel.source_digest, champion.number.protocol


def _yields(older: Champion, fresh: Champion) -> bool:
    if (older.number.kind == "measured") != (fresh.number.kind == "measured"):
        return fresh.number.kind == "measured"
    if _question(older) != _question(fresh) or fresh.number.value_ms == older.number.value_ms:
        return True
    return fresh.number.value_ms < older.number.value_ms
