"""Champions: the best config found for each problem, on disk, with where every number came from.

One file per device and kernel. `results/best/DEVICE/KERNEL.json` is reviewed and committed; `KERNEL.draft.json` beside it is
neither, and holds estimates and trials of the quick start. Refuses to mix devices, to let an estimate replace a time, and
to write a file that it cannot read back.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from harness.compare import Verdict
from harness.errors import WorkspaceError
from harness.files import write_whole
from harness.outcome import Binary, Estimated, Measured, Mode, Proof
from harness.tune import Settled

# History of the schema: 1 is the first; 2 has certificates.
SCHEMA = 2

_STORED = ConfigDict(extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STORED)
class Number:
    """A champion's number in milliseconds and its kind.

    `default_ms` is the default config's number of the same kind. `ratio` is champion time over default time with its 95 %
    interval, and `samples` the count behind it; both only for measured times.
    """

    kind: Literal["measured", "estimated", "replayed"]
    value_ms: float
    default_ms: float | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_STORED)
class Environment:
    """What a number depends on beside the kernel: versions, driver, and the digests of what was tuned."""

    toolchain: str
    torch: str | None
    driver: str | None
    kernel_digest: str
    space_digest: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_STORED)
class KillRate:
    """How many planted bugs of how many the suite saw (`flashtune mutants`), on this kernel and with this suite."""

    killed: int
    planted: int


@dataclass(frozen=True, slots=True, kw_only=True, config=_STORED)
class Certificate:
    """What was proved of a champion, and what the suite that proved it is worth; `kill_rate` is None where that was not
    measured with this version of the suite and of the kernel."""

    proof: Proof
    kill_rate: KillRate | None = None

    def __post_init__(self) -> None:
        if not self.proof.passed:
            raise ValueError("a certificate cannot exist without a proof that passed")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STORED)
class Champion:
    """The best config that passed for one problem. `trials` says how many candidates were tried, by outcome."""

    problem: str
    config: Mapping[str, int | str | bool]
    default: Mapping[str, int | str | bool]
    number: Number
    verdict: Verdict
    certificate: Certificate
    binaries: tuple[Binary, ...]
    environment: Environment
    trials: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STORED)
class ChampionFile:
    """All champions of one kernel on one device, in the order of their problems."""

    schema: int
    device: str
    arch: str
    kernel: str
    champions: tuple[Champion, ...]


CHAMPION: TypeAdapter[Champion] = TypeAdapter(Champion)
CHAMPION_FILES: TypeAdapter[ChampionFile] = TypeAdapter(ChampionFile)


def champion_path(results: Path, device: str, kernel: str, *, draft: bool) -> Path:
    """Where the champions of a kernel on a device are kept."""
    return results / "best" / device / (f"{kernel}.draft.json" if draft else f"{kernel}.json")


def read_champions(path: Path) -> ChampionFile:
    """Read a champion file. Raises `WorkspaceError` that says where it is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkspaceError(f"cannot read the champions in {path}: {error.strerror}") from error
    try:
        found = CHAMPION_FILES.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise WorkspaceError(f"{path} is not a champion file: {first['msg']} at {place}") from error
    if found.schema != SCHEMA:
        raise WorkspaceError(f"{path} has schema {found.schema}, this version reads {SCHEMA}")
    return found


def merge_champions(found: ChampionFile, fresh: Iterable[Champion]) -> ChampionFile:
    """`found` with the fresh champions in place of older ones of the same problem.

    A time never yields to an estimate, nor to a slower time of the same environment: a short tune does not undo a long one.
    """
    kept = {champion.problem: champion for champion in found.champions}
    for champion in fresh:
        older = kept.get(champion.problem)
        if older is None or _yields(older, champion):
            kept[champion.problem] = champion
    champions = tuple(kept[problem] for problem in sorted(kept))
    return ChampionFile(schema=SCHEMA, device=found.device, arch=found.arch, kernel=found.kernel, champions=champions)


def _yields(older: Champion, fresh: Champion) -> bool:
    if older.number.kind != "measured":
        return True
    if fresh.number.kind != "measured":
        return False
    return older.environment != fresh.environment or fresh.number.value_ms <= older.number.value_ms


def write_champions(path: Path, champions: ChampionFile) -> None:
    """Write a champion file so that a reader sees the old one or the new one, whole. Raises `MachineError`."""
    write_whole(
        path,
        CHAMPION_FILES.dump_json(champions, indent=1) + b"\n",
        what=f"the champions to {path}",
        hint="nothing is lost: they are in the journal; make room and run the same command again",
    )


def save_champions(path: Path, fresh: Iterable[Champion], *, device: str, arch: str, kernel: str) -> ChampionFile:
    """Merge fresh champions into the file at `path`, creating it if need be. Refuses a file of another device or kernel."""
    empty = ChampionFile(schema=SCHEMA, device=device, arch=arch, kernel=kernel, champions=())
    found = read_champions(path) if path.exists() else empty
    if (found.device, found.arch, found.kernel) != (device, arch, kernel):
        raise WorkspaceError(
            f"{path} holds {found.kernel} on {found.device} ({found.arch}), these champions are {kernel} on {device} ({arch})",
            hint="move the file to the folder of its own device",
        )
    merged = merge_champions(found, fresh)
    write_champions(path, merged)
    return merged


def champion_of(
    settled: Settled, mode: Mode, environment: Environment, kill_rate: Callable[[str], KillRate | None]
) -> Champion | None:
    """The champion of a settled problem as it is stored, or None if it has none; `kill_rate` is asked about a suite's digest."""
    if settled.champion is None or not isinstance(settled.champion.outcome, Measured | Estimated):
        return None
    if settled.proof is None:
        return None
    outcome = settled.champion.outcome
    return Champion(
        problem=settled.problem.key,
        config=settled.champion.config,
        default=settled.default.config,
        number=_number(settled, mode),
        verdict=outcome.verdict,
        certificate=Certificate(proof=settled.proof, kill_rate=kill_rate(settled.proof.suite)),
        binaries=outcome.artifact.binaries,
        environment=dataclasses.replace(environment, toolchain=outcome.artifact.toolchain),
        trials=settled.outcomes,
    )


def _number(settled: Settled, mode: Mode) -> Number:
    value, compared = settled.value_ms, settled.against_default
    assert value is not None
    default_ms = settled.default_ms
    if mode != "measured" or settled.final is None or not isinstance(settled.final.outcome, Measured):
        return Number(kind=mode, value_ms=value, default_ms=default_ms)
    samples = settled.final.outcome.samples
    is_default = settled.champion is not None and settled.champion.config == settled.default.config
    raced = compared is not None and compared.ratio is not None and compared.interval is not None and not is_default
    return Number(
        kind=mode,
        value_ms=value,
        default_ms=default_ms,
        ratio=compared.ratio if raced and compared else None,
        ratio_interval=(compared.interval.low, compared.interval.high)
        if raced and compared and compared.interval
        else None,
        samples=len(samples.times_ms),
    )
