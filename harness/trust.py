"""Whether a champion may be used here: what it was proved of and made with, against what is here.

A hard mismatch (another architecture, or a proof of another version of the kernel) refuses; a soft one (driver, Triton, torch)
is a warning. Refuses to prove anything.
"""

from dataclasses import dataclass
from typing import Literal

from harness.champions import Champion, ChampionFile

Status = Literal["current", "stale", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """What is here: the kernel's digest, the architecture that is asked about, and versions; None where that is not known."""

    kernel_digest: str
    arch: str | None = None
    triton: str | None = None
    torch: str | None = None
    driver: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """`stale`: its proof is of another version of the kernel, `flashtune verify` proves it again; `refused`: it is of another
    architecture. `reason` says why it is not current; `warnings` what differs softly."""

    status: Status
    reason: str = ""
    warnings: tuple[str, ...] = ()


def standing(file: ChampionFile, champion: Champion, here: Here) -> Standing:
    """How a champion of a file stands here."""
    proved, timed = champion.certificate.kernel_digest, champion.kernel.source_digest
    warnings = soft_differences(file, here)
    if proved != timed:
        warnings += (f"its number is of an older version of the kernel ({timed}), which was proved again since",)
    if champion.number.kind == "measured" and champion.certificate.where == "interpreter":
        warnings += ("it was proved in the interpreter, which sees no races and no compiler",)
    if here.arch is not None and file.device.arch != here.arch:
        return Standing(status="refused", reason=f"it is of {file.device.arch}, this is {here.arch}", warnings=warnings)
    if proved != here.kernel_digest:
        reason = f"it was proved of kernel {proved}, the kernel is {here.kernel_digest} now"
        return Standing(status="stale", reason=reason, warnings=warnings)
    return Standing(status="current", warnings=warnings)


def soft_differences(file: ChampionFile, here: Here) -> tuple[str, ...]:
    """Versions that differ from those here, in words; what is not known on one side does not differ."""
    then = file.environment
    pairs = (
        ("driver", then.driver, here.driver),
        ("triton", then.triton, here.triton),
        ("torch", then.torch, here.torch),
    )
    return tuple(f"made with {name} {old}, here is {new}" for name, old, new in pairs if old and new and old != new)
