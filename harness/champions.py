"""Champions: the best config found for each problem, on disk, with where every number came from. docs/champions.md.

A file holds the champions of one kernel on one device in one environment. `results/best/DEVICE/KERNEL.json` is reviewed and
committed; `KERNEL.draft.json` beside it is neither, and holds estimates and trials of the quick start. Refuses what it cannot
vouch for: a certificate that compared nothing, a number that is not finite, a name that could be anything else.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from harness.errors import ChampionError, ProblemError
from harness.problem import Pass, Problem, parse_problem
from harness.sealed import parse, read_file, require_digest, tame

# Semantic version of the format. Other majors are refused; what a newer minor has added is kept and not looked at.
VERSION = "1.0.0"
FORMAT: Literal["flashtune champions"] = "flashtune champions"
_ID = "urn:flashtune:schema:champions:"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_EXTENSION = "x-"

# What stands in a file may become the name of a file, a line on a terminal or a line of Python: it has few letters to say it in.
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{0,64}$")]
Text = Annotated[str, Field(pattern=r"^[ -~]{0,400}$")]
Label = Annotated[str, Field(pattern=r"^[ -~]{1,80}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-z]{1,64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(ge=-(1 << 31), le=1 << 31)]
ConfigValues = Annotated[Mapping[Name, Whole | bool | Word], Field(min_length=1, max_length=100)]


def _closed(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = False
    schema["patternProperties"] = {f"^{_EXTENSION}": {}}


class Block(BaseModel):
    """A value of a champion file: frozen, of exact types, finite. Keys that begin with `x-` are anybody's, and are kept."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="allow", allow_inf_nan=False, populate_by_name=True, json_schema_extra=_closed
    )

    @model_validator(mode="after")
    def _known(self, asked: ValidationInfo) -> Self:
        newer = bool(asked.context and asked.context.get("newer"))
        unknown = [name for name in self.model_extra or () if not name.startswith(_EXTENSION)]
        if unknown and not newer:
            raise ValueError(f"the key `{tame(unknown[0], 40)}` means nothing; begin it with `x-` to have it kept")
        return self


class Device(Block):
    """The GPU. `name` is the folder's; `product` is what the driver calls it. Bytes are bytes, clocks MHz."""

    name: Slug
    arch: Slug
    product: Text | None = None
    multiprocessors: Count | None = None
    shared_bytes_per_block: Count | None = None
    clock_mhz: Count | None = None


class Environment(Block):
    """Versions that a number depends on: where one differs, it is another environment, with a file of its own."""

    triton: Text | None
    toolchain: Text | None
    torch: Text | None
    driver: Text | None

    @property
    def digest(self) -> str:
        """A short name of it, for a file."""
        named = [self.triton, self.toolchain, self.torch, self.driver]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:8]


class Subject(Block):
    """The kernel: `name` is its stem, `family` whose kernel it is, which alone may use its configs."""

    name: Name
    family: Word
    pass_: Pass = Field(alias="pass")


class Timed(Block):
    """What was tuned: digests of the kernel's source with all helpers, and of its space for the problem."""

    source_digest: Digest
    space_digest: Digest


class RunnerUp(Block):
    """The next best config with other machine code, and its number when it was tried."""

    config: ConfigValues
    value_ms: Positive


class Number(Block):
    """A champion's number in milliseconds (the median of its times) and its kind.

    `interval_ms` is the 95 % interval of the median, `samples` the count of times, `protocol` the digest of the code that took
    them (or that estimated), `method` the timer. `default_ms` is the default config's number of the same kind, `ratio`
    champion time over default time with its 95 % interval. What does not exist for the kind, or was not kept, is null.
    """

    kind: Literal["measured", "estimated", "replayed"]
    value_ms: Positive
    interval_ms: tuple[Positive, Positive] | None = None
    samples: Count | None = None
    protocol: Word | None = None
    method: Text | None = None
    default_ms: Positive | None = None
    ratio: Positive | None = None
    ratio_interval: tuple[Positive, Positive] | None = None
    runner_up: RunnerUp | None = None


class Resources(Block):
    """One launch, as its binary says: registers and spills (bytes) per thread, shared memory (bytes) and warps per block."""

    kernel: Word
    registers: Count
    spill_bytes: Count
    shared_bytes: Count
    warps: Count
    code_hash: Digest


class WorstError(Block):
    """The worst element of one output in the gate: its error, the bound there, and their ratio."""

    ratio: Share
    error: Annotated[float, Field(ge=0)]
    bound: Annotated[float, Field(ge=0)]


class Determinism(Block):
    """In so many cases equal inputs were asked twice, and gave equal bits."""

    cases: Annotated[Count, Field(ge=1)]


class KillRate(Block):
    """How many planted bugs of how many the suite saw (`flashtune mutants`), on this kernel and with this suite."""

    killed: Count
    planted: Count


class Certificate(Block):
    """What was proved of a champion, of the kernel with `kernel_digest`, and what the suite that proved it is worth.

    `oracle` and `criterion` say what was compared with what, `errors` the worst of every output in the gate (problems
    `gate_cases`), `worst` the largest error over bound in the `cases` of the suite with digest `suite`. `judges` counts the
    cases in which each had something to compare. `seeds` are those of gate and suite. `determinism` is null where nobody asked.
    """

    kernel_digest: Digest
    where: Literal["interpreter", "device"]
    oracle: Text
    criterion: Text
    errors: Mapping[Name, WorstError]
    gate_cases: tuple[Text, ...]
    suite: Digest
    cases: Annotated[Count, Field(ge=1)]
    judges: Mapping[Label, Count]
    worst: Mapping[Name, Share]
    seeds: tuple[Count, ...]
    determinism: Determinism | None
    blind_to: tuple[Text, ...]
    kill_rate: KillRate | None = None

    @model_validator(mode="after")
    def _compared(self) -> Self:
        if not self.judges.get("bound") or not self.errors or not self.gate_cases:
            raise ValueError("a certificate that compared nothing cannot exist")
        return self


class Search(Block):
    """How many candidates were tried, and how many had which outcome."""

    trials: Count
    outcomes: Mapping[Name, Count]


class Champion(Block):
    """The best config that passed, for one problem."""

    problem: Annotated[str, Field(max_length=300)]
    kernel: Timed
    config: ConfigValues
    default: ConfigValues
    number: Number
    resources: tuple[Resources, ...]
    certificate: Certificate
    search: Search

    @model_validator(mode="after")
    def _readable(self) -> Self:
        try:
            key = self.read().key
        except ProblemError as error:
            raise ValueError(tame(error.message)) from error
        if key != self.problem:
            raise ValueError(f"the problem is not written as `{key}`")
        return self

    def read(self) -> Problem:
        """The problem that its notation says."""
        return parse_problem(self.problem)


class ChampionFile(Block):
    """All champions of one kernel on one device in one environment, in the order of their problems."""

    schema_id: str = Field(alias="$schema", pattern=rf"^{_ID}1\.\d+\.\d+$", default=_ID + VERSION)
    format: Literal["flashtune champions"] = FORMAT
    version: Annotated[str, Field(pattern=r"^1\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})$")] = VERSION
    device: Device
    environment: Environment
    kernel: Subject
    champions: tuple[Champion, ...] = ()
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [champion.problem for champion in self.champions]
        if problems != sorted(set(problems)):
            raise ValueError("the champions are not in the order of their problems, or one problem has two")
        if wrong := next((one for one in self.champions if one.read().pass_ != self.kernel.pass_), None):
            raise ValueError(f"`{wrong.problem}` is no problem of a kernel that computes the {self.kernel.pass_} pass")
        return self

    @property
    def belongs_to(self) -> tuple[str, ...]:
        """What files that may be merged have in common, beside their environment."""
        return self.device.name, self.device.arch, self.kernel.family, self.kernel.name, self.kernel.pass_

    def __str__(self) -> str:
        return f"{self.kernel.name} on {self.device.name} ({self.device.arch})"


def champion_schema() -> dict[str, Any]:
    """The JSON Schema of a champion file."""
    made = ChampionFile.model_json_schema(by_alias=True)
    return {"$schema": _DIALECT, "$id": _ID + VERSION, **made, "title": "flashtune champion file"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_champions(path: Path) -> ChampionFile:
    """Read a champion file, which may come from anywhere. Raises `ChampionError` that says what is wrong with it, and where."""
    return champions_from(read_file(path), tame(path, 400))


def champions_from(content: bytes, name: str) -> ChampionFile:
    """The champion file in `content`; `name` says whose it is. Raises `ChampionError`."""
    tree = parse(content, name)
    newer = _require_version(tree, name)
    try:
        found = ChampionFile.model_validate_json(content, context={"newer": newer})
    except ValidationError as error:
        raise _refusal(error, name) from error
    require_digest(tree, name)
    return found


def champion_file_of(tree: Mapping[str, Any], name: str) -> ChampionFile:
    """A champion file as JSON values say it, without a digest. Raises `ChampionError`."""
    try:
        return ChampionFile.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise _refusal(error, name) from error


def _require_version(tree: Mapping[str, Any], name: str) -> bool:
    """Whether a newer minor version has written it."""
    if tree.get("format") != FORMAT:
        raise ChampionError(f"{name} is not a champion file: its `format` is not `{FORMAT}`")
    said = tree.get("version")
    numbers = re.fullmatch(r"(\d{1,6})\.(\d{1,6})\.\d{1,6}", said) if isinstance(said, str) else None
    if numbers is None:
        raise ChampionError(f"{name} is not a champion file: its `version` is no version")
    major, minor = (int(part) for part in VERSION.split(".")[:2])
    if int(numbers[1]) != major:
        raise ChampionError(
            f"{name} has version {numbers[0]} of the format, this flashtune reads {major}.x",
            hint="take a flashtune of its time",
        )
    return int(numbers[2]) > minor


def _refusal(error: ValidationError, name: str) -> ChampionError:
    first = error.errors(include_url=False)[0]
    place = tame(".".join(map(str, first["loc"])) or "the whole file")
    return ChampionError(f"{name} is not a champion file: {tame(first['msg'], 400)} at {place}")
