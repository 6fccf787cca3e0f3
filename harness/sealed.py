"""JSON files that carry a digest of themselves: read with suspicion, written whole, changed under a lock.

A file may come from anywhere. Refuses what is no regular file, too large, too deep, no UTF-8, no JSON, gives a key twice, holds a
number that is not finite, or says another digest than it has; each with an error in words. Knows nothing of what is in it.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import ChampionError, MachineError

LIMIT_BYTES = 16 << 20
DEEPEST = 32
DIGEST = "digest"
_PATIENCE_S = 30.0
_SHOWN = 120


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of at most `LIMIT_BYTES`. Raises `ChampionError`.

    What is no file is not opened: a pipe would make us wait, a device never end.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ChampionError(f"{tame(path)} is no file")
        with path.open("rb") as file:
            content = file.read(LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ChampionError(f"cannot read {tame(path)}: {reason}") from error
    if len(content) > LIMIT_BYTES:
        raise ChampionError(f"{tame(path)} has more than {LIMIT_BYTES >> 20} MiB, which no champion file has")
    return content


def parse(content: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `content`; `name` says whose it is. Raises `ChampionError`."""
    try:
        text = content.decode("utf-8")
        # Python's own reader takes `NaN`, 1e999 and the last of two equal keys without a word.
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ChampionError(f"{name} is no UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ChampionError(f"{name} is nested deeper than {DEEPEST} levels") from error
    except json.JSONDecodeError as error:
        raise ChampionError(f"{name} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except ValueError as error:
        raise ChampionError(f"{name} is no JSON that we read: {tame(error)}") from error
    if not isinstance(found, dict):
        raise ChampionError(f"{name} holds no JSON object")
    _require_shallow(found, name)
    return found


def digest_of(tree: Mapping[str, Any]) -> str:
    """`sha256:` and the digest of an object without its own `digest`: of its JSON with sorted keys, without spaces, in ASCII."""
    rest = {name: value for name, value in tree.items() if name != DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def require_digest(tree: Mapping[str, Any], name: str) -> None:
    """Raise `ChampionError` unless `tree` has the digest that it says."""
    if tree.get(DIGEST) != digest_of(tree):
        raise ChampionError(
            f"{name} is not what was written: its digest is not that of its content",
            hint="it was damaged or changed by hand; take it from where it came from, and combine files by `flashtune merge`",
        )


def sealed(tree: Mapping[str, Any]) -> bytes:
    """`tree` with its digest, as it is written: in the order given, a value a line, so that changes are easy to read."""
    return json.dumps({**tree, DIGEST: digest_of(tree)}, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"


@contextlib.contextmanager
def locked(path: Path, *, patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Hold the lock file `path`, which stays behind. Raises `MachineError` when another process keeps it for too long.

    Files are replaced, never rewritten, so the lock cannot be the file itself: who waited would hold that of the old one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}") from error
    with file:
        until = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise MachineError(
                        f"another process has held {path} for {patience_s:.0f} s",
                        hint="wait for it to end, and try again",
                    ) from error
                time.sleep(0.02)
        yield


def tame(value: object, limit: int = _SHOWN) -> str:
    """Text from a file that nobody vouches for, as one line of a terminal: cut, and without what could steer it."""
    text = str(value)
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key `{tame(twice, 40)}` stands twice in one object")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"`{text}` is no finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"`{tame(text, 40)}` is no finite number")
    return number


def _require_shallow(tree: Any, name: str) -> None:
    level, depth = [tree], 0
    while level:
        if depth > DEEPEST:
            raise ChampionError(f"{name} is nested deeper than {DEEPEST} levels")
        depth += 1
        inside: list[Any] = []
        for node in level:
            inside += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        level = inside
