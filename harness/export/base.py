"""What an export target is, what it is given, and what it hands back.

A target makes files as values and writes nothing. Refuses to call something verified that no consumer's code has read.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
from harness import __version__
from harness.champions import Champion, ChampionFile
from harness.device import TARGETS as DEVICES
from harness.device import DeviceFacts
from harness.errors import BugError, ExportError, UsageError, did_you_mean
from harness.export import TARGETS
from harness.export_documents import ExportedDocument, SkippedDocument, VerifiedDocument
from harness.problem import Problem
from harness.workspace import Workspace

ESTIMATE = "an estimate from the compiled binary, not a time"
_PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A champion that may leave: the file it is in (`path` as it is shown), its problem as a value, what is to be known of it."""

    path: str
    file: ChampionFile
    champion: Champion
    problem: Problem
    draft: bool
    warnings: tuple[str, ...] = ()

    @property
    def estimated(self) -> bool:
        return self.champion.number.kind != "measured"

    @property
    def product(self) -> str:
        """What the driver calls the device, or its short name where no such device was there."""
        return self.file.device.product or self.file.device.name

    def document(self, *into: str) -> ExportedDocument:
        """What is said of it where it was exported."""
        champion = self.champion
        return ExportedDocument(
            path=self.path, digest=self.file.digest or "", device=self.file.device.name, arch=self.file.device.arch,
            kernel=self.file.kernel.name, family=self.file.kernel.family,
            kernel_digest=champion.certificate.kernel_digest, problem=champion.problem, kind=champion.number.kind,
            value_ms=champion.number.value_ms, proved=champion.certificate.where, draft=self.draft, into=into,
            warnings=self.warnings,
        )  # fmt: skip

    def provenance(self) -> dict[str, Any]:
        """Where a config comes from, as it stands in a file that a consumer reads. Its keys never look like those of a time."""
        champion, number = self.champion, self.champion.number
        value = {f"{number.kind}_ms": number.value_ms}
        return {
            "problem": champion.problem, "device": self.file.device.name, "arch": self.file.device.arch,
            "kernel": self.file.kernel.name, "family": self.file.kernel.family,
            "kernel_digest": champion.certificate.kernel_digest, "proved": champion.certificate.where,
            "number": number.kind, **value, **({"note": ESTIMATE} if self.estimated else {}),
            "file": self.path, "file_digest": self.file.digest,
            "environment": {
                name: getattr(self.file.environment, name) for name in ("triton", "toolchain", "torch", "driver")
            },
        }  # fmt: skip

    def skipped(self, reason: str) -> SkippedDocument:
        return SkippedDocument(path=self.path, problem=self.champion.problem, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a target exports: champions of its families, in order, and (where it takes them) journals. `workspace` has the
    kernels that they are of; `live` is the device that is here."""

    workspace: Workspace
    champions: Sequence[Chosen]
    journals: Sequence[Path] = ()
    live: DeviceFacts | None = None

    def facts(self, one: Chosen) -> DeviceFacts | None:
        """What is known of the device of a champion, if it is the one that is here or has published figures."""
        return facts_of(one.file.device.name, self.live)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Files by their path in the folder; which champions are in them, and which are not; what a reader has to know; how the
    consumer loads them, a line each."""

    files: Mapping[str, bytes]
    exported: tuple[ExportedDocument, ...] = ()
    skipped: tuple[SkippedDocument, ...] = ()
    notes: tuple[str, ...] = ()
    use: tuple[str, ...] = ()


def facts_of(device: str, live: DeviceFacts | None) -> DeviceFacts | None:
    """The figures of a device by its name, None where nobody knows them."""
    return live if live is not None and live.name == device else DEVICES.get(device)


# What a check ends with: what was verified by whom, or in words why nothing was.
Checked = VerifiedDocument | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A consumer. `families` are those of the kernels whose configs it may use (the same-kernel rule), None where it only reads
    numbers. `make` gives the files, `check` lets the consumer's code read the folder they were written to."""

    name: str
    consumer: str
    families: frozenset[str] | None
    make: Callable[[Request], Made]
    check: Callable[[Path, Request, Made], Checked]
    takes_journals: bool = False


def find_target(name: str) -> Target:
    """The export target called `name`. Raises `UsageError` if there is none."""
    if name not in TARGETS:
        raise UsageError(f"there is no export target `{name}`", hint=did_you_mean(name, sorted(TARGETS)))
    found: Target = importlib.import_module(f"harness.export.{TARGETS[name]}").TARGET
    return found


def as_json(tree: Any) -> bytes:
    """A document as it is written: in the order given, indented, ASCII, finite numbers only."""
    return json.dumps(tree, indent=2, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def made_by(target: str) -> dict[str, str]:
    """Who wrote a file, for its provenance."""
    return {"by": f"flashtune {__version__}", "target": target}


@dataclass(frozen=True, slots=True)
class Consumer:
    """A script beside this file that lets a consumer's own code read a folder. Unless it says `ours`, it imports nothing of us.

    It runs as `python -I SCRIPT FOLDER QUESTION`, in a process of its own: consumers read their environment when they are
    imported, and one of them is called `kernels`, like a workspace's folder. `QUESTION` is a file of JSON. It prints one JSON
    object as its last line: `version` and `check` in words; or `missing`, a package that is not installed; or `refused`.
    """

    script: str
    package: str
    environment: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False

    def ask(self, folder: Path, question: Any = None) -> Checked:
        """What the consumer said. Raises `ExportError` if it refused what we wrote, `BugError` if the script itself failed."""
        with tempfile.TemporaryDirectory(prefix="flashtune-check-") as scratch:
            asked = Path(scratch) / "question.json"
            asked.write_text(json.dumps(question))
            script = Path(__file__).with_name(self.script)
            command = [
                sys.executable,
                "-P" if self.ours else "-I",
                "-B",
                str(script),
                str(folder.resolve()),
                str(asked),
            ]
            added = {"PYTHONPATH": str(Path(harness.__file__).parents[1])} if self.ours else {}
            try:
                ended = subprocess.run(
                    command, cwd=scratch, env=_environment({**added, **self.environment}, scratch),
                    capture_output=True, text=True, timeout=_PATIENCE_S, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"{self.package} did not answer within {_PATIENCE_S:.0f} s"
        return self._answer(ended)

    def _answer(self, ended: "subprocess.CompletedProcess[str]") -> Checked:
        try:
            said = json.loads(ended.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            tail = ended.stderr.strip().splitlines()[-1:] or ["nothing"]
            raise BugError(f"{self.script} ended with {ended.returncode}, and said: {tail[0]}") from None
        if "missing" in said:
            return f"the package `{said['missing']}` is not installed here"
        if "refused" in said:
            raise ExportError(
                f"{self.package} {said.get('version', '')} does not take what was made: {said['refused']}",
                hint="nothing was written; another version of it may (docs/exports.md says which ones were tried)",
            )
        return VerifiedDocument(package=self.package, version=said["version"], check=said["check"])


def _environment(added: Mapping[str, str], scratch: str) -> dict[str, str]:
    """The environment of a check: ours, without what would let it read or write elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLA_", "FIB_", "HF_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "TRITON_CACHE_DIR": f"{scratch}/triton", **added}
