"""The document of `flashtune export`, which also lies beside what was exported. `harness.documents` lists it."""

from collections.abc import Mapping
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_DOCUMENT = ConfigDict(extra="forbid", allow_inf_nan=False)

MANIFEST = "flashtune-export.json"
FORMAT: Literal["flashtune export"] = "flashtune export"


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ExportedDocument:
    """A champion that was exported: the file it comes from and that file's digest, what it is of, where its proof was made, and
    its number. `kind` says whether `value_ms` is a time (`measured`) or not; `into` names the files that hold its config."""

    path: str
    digest: str
    device: str
    arch: str
    kernel: str
    family: str
    kernel_digest: str
    problem: str
    kind: Literal["measured", "estimated", "replayed"]
    value_ms: float
    proved: Literal["interpreter", "device"]
    draft: bool
    into: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class SkippedDocument:
    """What was not exported, and why; `problem` is empty where a whole file is meant."""

    path: str
    problem: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class VerifiedDocument:
    """The consumer's own code read what was written, in this export: which package in which version, and what it was asked."""

    package: str
    version: str
    check: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ExportDocument:
    """What `flashtune export --json` prints, and what `flashtune-export.json` in the folder says (where `out` is `.`).

    `files` are digests (sha256) by path, without that of this document. `verified_by` is null where no check ran, and
    `not_verified` then says why. `notes` is what a reader has to know, `use` how the consumer loads it, a line each.
    """

    format: Literal["flashtune export"] = FORMAT
    target: str
    consumer: str
    out: str
    flashtune: str
    files: Mapping[str, str]
    exported: tuple[ExportedDocument, ...]
    skipped: tuple[SkippedDocument, ...]
    verified_by: VerifiedDocument | None
    not_verified: str
    notes: tuple[str, ...]
    use: tuple[str, ...]
