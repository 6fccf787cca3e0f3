"""Recorded answers of Triton's interpreter to the questions of a campaign: for machines on which it does not work.

Refuses to compare: an answer carries the digest of its inputs, and whoever has others leaves it alone.
"""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.cases import Case
from harness.errors import UsageError
from harness.files import write_whole
from harness.truth import Answer, from_json, to_json

FILE = "interpreted.jsonl.gz"


class Answers:
    """The answers in a folder, by case; none if there is no file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lines: dict[str, Mapping[str, Any]] = {}
        if self._path.exists():
            try:
                lines = gzip.decompress(self._path.read_bytes()).splitlines()
                self._lines = {line["case"]: line for line in map(json.loads, lines)}
            except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{self._path} holds no answers of the interpreter: {error}", hint="remove it, or record it again"
                ) from error

    def __len__(self) -> int:
        return len(self._lines)

    def find(self, case: Case) -> Answer | None:
        """The answer to a case, if it was recorded."""
        line = self._lines.get(case.id)
        return None if line is None else Answer(given=line["given"], outputs=from_json(line["outputs"]))

    def put(self, case: Case, answer: Answer) -> None:
        """Add an answer; `save` keeps it."""
        self._lines[case.id] = {"case": case.id, "problem": case.problem, "given": answer.given,
                                "outputs": to_json(answer.outputs)}  # fmt: skip

    def save(self) -> Path:
        """Write all answers. Raises `MachineError`."""
        content = b"".join(json.dumps(line).encode() + b"\n" for line in self._lines.values())
        write_whole(self._path, gzip.compress(content, mtime=0))
        return self._path
