"""Which journals and recorded spaces a new search may learn from, and what they said when it began.

A journal that is continued must be continued with the same proposals, so what its past was is kept beside it. Refuses to let a
file that cannot be read stop a tune: it is left out.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from harness.errors import HarnessError
from harness.files import write_whole
from harness.landscape import Landscape, of_journal, read_landscapes

# The most alike of the past: more would tell little more, and each costs a second where it has to be generalized.
_MOST = 4


def keep_past(journal: Path, kernel: str, folders: Iterable[Path]) -> Mapping[str, int]:
    """The files of `folders` that may say something of `kernel`, each with its bytes, as they were when `journal` began. Raises
    `MachineError` if that cannot be kept."""
    kept = journal.with_suffix(".past.json")
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return {str(path): int(size) for path, size in json.loads(kept.read_bytes()).items()}
    files = {
        str(path): path.stat().st_size
        for folder in folders for path in sorted(folder.glob(f"{kernel}-*"))
        if path.name.endswith((".jsonl", ".jsonl.gz")) and path != journal
    }  # fmt: skip
    write_whole(kept, json.dumps(files, indent=1).encode() + b"\n")
    return files


def past_of(files: Mapping[str, int], kernel: str, problem: str, device: str) -> list[Landscape]:
    """The most alike of what they hold of `kernel`: the same problem comes before the same device."""
    found = []
    for name, size in files.items():
        # Not there any more, damaged, or of another version: there is a search without it.
        with suppress(HarnessError, OSError, ValueError):
            found += [land for land in _read(Path(name), size) if land.kernel == kernel]
    found.sort(key=lambda land: (land.problem != problem, land.device != device))
    return found[:_MOST]


def _read(path: Path, size: int) -> list[Landscape]:
    with path.open("rb") as file:
        if b'"journal"' in file.read(64):
            return of_journal(path.stem, path, size=size)
    return read_landscapes(path) if path.stat().st_size == size else []
