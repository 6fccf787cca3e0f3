"""The documents of `flashtune bench` and `flashtune compare`. `harness.documents` lists them."""

from collections.abc import Mapping
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_DOCUMENT = ConfigDict(extra="forbid", allow_inf_nan=False)

Standing = Literal["faster", "slower", "cannot tell"]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class PeerDocument:
    """A peer beside ours, in turns. Times are medians in milliseconds, rates TFLOP/s of what the mathematics needs; `ratio` is
    the peer's time over ours, above 1 ours is the faster one, `interval` its 95 % interval, `verdict` what that says of ours.
    `method` names the timer, bytes are the most device memory each held beside the inputs. `not_measured` says why all of this is
    null."""

    name: str
    peer_ms: float | None = None
    ours_ms: float | None = None
    peer_tflops: float | None = None
    ours_tflops: float | None = None
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    verdict: Standing | None = None
    samples: int = 0
    method: str = ""
    peer_bytes: int | None = None
    ours_bytes: int | None = None
    throttled: bool = False
    not_measured: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class BenchedDocument:
    """One problem: the config of ours that was timed, whose it is (a champion's, or the default), and its peers. `reason` says
    why nothing of ours could be timed."""

    problem: str
    flops: int
    config: Mapping[str, int | str | bool]
    config_of: str
    peers: tuple[PeerDocument, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class BenchDocument:
    """What `flashtune bench --json` prints."""

    kernel: str
    device: str
    arch: str
    driver: str | None
    torch: str | None
    triton: str | None
    problems: tuple[BenchedDocument, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ComparedDocument:
    """One kernel on one problem, in the old and in the new: numbers in milliseconds of the same `kind`, and old over new, above 1
    the new one is faster, with its 95 % interval where there are times. `verdict` is of the new one; `reason` says why it is
    "cannot tell", or which of the two is missing."""

    kernel: str
    device: str
    problem: str
    verdict: Literal["faster", "slower", "same", "cannot tell", "gone", "new"]
    kind: Literal["measured", "estimated", "replayed"] | None = None
    old_ms: float | None = None
    new_ms: float | None = None
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    config_changed: bool | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class CompareDocument:
    """What `flashtune compare --json` prints. `regressions` counts what became slower; `notes` is what a reader has to know."""

    old: str
    new: str
    problems: tuple[ComparedDocument, ...]
    regressions: int
    notes: tuple[str, ...] = ()
