"""The JSON document of `flashtune replay --spaces`, as types. Refuses extra fields and missing ones, as all documents do."""

from collections.abc import Mapping

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_DOCUMENT = ConfigDict(extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class SearchResult:
    """One strategy on one space, in the mean over its seeds. By number of trials: `fraction_at`, best time over that of the
    config it ended with, and its 95 % interval; `share_095_at`, `share_099_at`, the share of runs that came so near;
    `seconds_at`, what was recorded for compiling and running so many."""

    space: str
    legal: int
    strategy: str
    seeds: int
    fraction_at: Mapping[str, float]
    fraction_interval_at: Mapping[str, tuple[float, float]]
    share_095_at: Mapping[str, float]
    share_099_at: Mapping[str, float]
    seconds_at: Mapping[str, float]
    ms_per_trial: float


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class OverallResult:
    """One strategy over all spaces, which count alike; `worst_at` is its worst space's fraction. Intervals are over seeds."""

    strategy: str
    spaces: int
    fraction_at: Mapping[str, float]
    fraction_interval_at: Mapping[str, tuple[float, float]]
    worst_at: Mapping[str, float]
    share_095_at: Mapping[str, float]
    share_099_at: Mapping[str, float]
    ms_per_trial: float


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class SearchesDocument:
    """What `flashtune replay --spaces DIR --json` prints. `left_out` names strategies that could not run on a space, and why."""

    results: tuple[SearchResult, ...]
    overall: tuple[OverallResult, ...]
    budget: int
    seeds: int
    seconds: float
    versions: Mapping[str, str]
    left_out: Mapping[str, str]
