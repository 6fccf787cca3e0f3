"""The JSON documents that commands print for scripts, as types; their JSON Schemas are generated from these.

Refuses extra fields and missing ones: a script that reads a document today must be able to read it tomorrow.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from harness import bench_documents, champion_documents, export_documents, search_documents
from harness.champion_documents import ShownDocument
from harness.champions import KillRate, champion_schema
from harness.compare import Verdict
from harness.device import DeviceFacts
from harness.errors import WorkspaceError
from harness.outcome import Estimated, Measured, Mode, Proof
from harness.portfolio import Portfolio
from harness.probe import Machine
from harness.readiness import Readiness
from harness.tune import Settled

_DOCUMENT = ConfigDict(extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)
_DIALECT = "https://json-schema.org/draft/2020-12/schema"

ConfigValues = Mapping[str, int | str | bool]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class DeviceDocument:
    """A device: its short name and its architecture (`sm_90`, `gfx942`)."""

    name: str
    arch: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class SpaceDocument:
    """What `flashtune space --json` prints: size = legal + the sum of pruned, by the first rule that refused."""

    size: int
    legal: int
    pruned: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class DefaultDocument:
    """The default config and its number, None when it has none."""

    config: ConfigValues
    value_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ChampionDocument:
    """The best config that passed, its number in milliseconds, what kind of number it is, and what it rests on: the verdict of
    the gate and the proof by the suite."""

    config: ConfigValues
    value_ms: float
    kind: Mode
    verdict: Verdict
    proof: Proof


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ProblemDocument:
    """What became of one problem; `champion` is null when no candidate passed."""

    problem: str
    space: SpaceDocument
    outcomes: Mapping[str, int]
    champion: ChampionDocument | None
    default: DefaultDocument


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class PortfolioMember:
    """A config, and the problems that it serves: how many times longer than the best there it takes at most."""

    config: ConfigValues
    serves: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class PortfolioDocument:
    """The fewest configs that keep every problem `within` of its own best (0.02 is 2 %), by measurement or by estimate as the
    rest is. `exact` says that no fewer do; else they are at most `bound` times as many as needed."""

    members: tuple[PortfolioMember, ...]
    within: float
    exact: bool
    bound: float
    unserved: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class TuneDocument:
    """What `flashtune tune --json` prints. `journal` is the path of the run's journal; several problems have a `portfolio`."""

    kernel: str
    device: DeviceDocument
    mode: Mode
    problems: tuple[ProblemDocument, ...]
    journal: str
    portfolio: PortfolioDocument | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class FailureDocument:
    """A reason why candidates have no number, how often it was found, and one candidate that it befell."""

    kind: str
    reason: str
    count: int
    problem: str
    config: ConfigValues


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class FindingDocument:
    """Something that a measurement or a tune here would suffer from."""

    severity: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class DoctorDocument:
    """What `flashtune doctor --json` prints. `trustworthy` says whether a time measured here could be trusted."""

    trustworthy: bool
    mode: Mode
    device: DeviceDocument | None
    workspace: str | None
    kernels: tuple[str, ...]
    machine: Machine
    findings: tuple[FindingDocument, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ShowDocument:
    """What `flashtune show --json` prints: champion files with their paths, or with `--failed` failures by reason."""

    champions: tuple[ShownDocument, ...] = ()
    failures: tuple[FailureDocument, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class FuzzDocument:
    """What `flashtune fuzz --json` prints. `oracles` counts the cases that each judge had something to compare in;
    `largest` is the greatest error over bound by output among the cases that passed; `counterexamples` are files."""

    cases: int
    seconds: float
    verdicts: Mapping[str, int]
    oracles: Mapping[str, int]
    largest: Mapping[str, float]
    counterexamples: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ReplayedJudge:
    """What one judge said of a replayed case: `detail` is empty if it found nothing wrong, `worst` the largest error over
    bound of its `checks` comparisons."""

    judge: str
    detail: str
    worst: float | None
    checks: int


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class ReplayDocument:
    """What `flashtune replay FILE --json` prints."""

    file: str
    problem: str
    judges: tuple[ReplayedJudge, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class MutantDocument:
    """A planted bug: the judges that objected to the case that killed it ("crash" and "timeout" if it ended its process), and
    the number of that case; a survivor has none. `detail` is what the first of them said."""

    name: str
    kernel: str
    equivalent: bool
    killed_by: tuple[str, ...]
    cases: int | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class CriterionDocument:
    """What another way to judge sees of the same mutants: how many it kills of those it was shown, and how many of its cases it
    objects to on the kernels as they are."""

    name: str
    killed: int
    shown: int
    false_alarms: int
    cases: int


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class MutantsDocument:
    """What `flashtune mutants --json` prints. `suite` and `kernel_digest` say which code was measured; `median_cases` is over
    the killed ones that are not equivalent; `criteria` is empty without `--compare`."""

    mutants: tuple[MutantDocument, ...]
    seconds: float
    suite: str
    kernel_digest: str
    versions: Mapping[str, str]
    seed: int
    most_cases: int
    median_cases: float | None
    criteria: tuple[CriterionDocument, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class CampaignStep:
    """A step of a campaign: how many parts it has, and what became of them; those of no count are open. `seconds` of all runs."""

    parts: int
    done: int
    partial: int
    failed: int
    skipped: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, config=_DOCUMENT)
class CampaignDocument:
    """What `flashtune campaign --json` prints. `ended` is how the last run ended; `wrong` says in words what speaks against our
    kernels; `files` are those of `folder` with their bytes, of which `campaign.json` holds every number."""

    folder: str
    device: str
    arch: str
    runs: int
    seconds: float
    ended: str
    steps: Mapping[str, CampaignStep]
    wrong: tuple[str, ...]
    files: Mapping[str, int]


DOCUMENTS: Mapping[str, TypeAdapter[Any]] = {
    "tune": TypeAdapter(TuneDocument),
    "space": TypeAdapter(SpaceDocument),
    "doctor": TypeAdapter(DoctorDocument),
    "show": TypeAdapter(ShowDocument),
    "fuzz": TypeAdapter(FuzzDocument),
    "replay": TypeAdapter(ReplayDocument),
    "replay-spaces": TypeAdapter(search_documents.SearchesDocument),
    "mutants": TypeAdapter(MutantsDocument),
    "campaign": TypeAdapter(CampaignDocument),
    "readiness": TypeAdapter(Readiness),
    "validate": TypeAdapter(champion_documents.ValidateDocument),
    "diff": TypeAdapter(champion_documents.DiffDocument),
    "merge": TypeAdapter(champion_documents.FileDocument),
    "verify": TypeAdapter(champion_documents.VerifyDocument),
    "lookup": TypeAdapter(champion_documents.LookupDocument),
    "table": TypeAdapter(champion_documents.TableDocument),
    "export": TypeAdapter(export_documents.ExportDocument),
    "bench": TypeAdapter(bench_documents.BenchDocument),
    "compare": TypeAdapter(bench_documents.CompareDocument),
    "report": TypeAdapter(champion_documents.ReportDocument),
    "init": TypeAdapter(champion_documents.InitDocument),
}


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of the document that the command `name` prints."""
    title = f"flashtune {name} --json"
    return {"$schema": _DIALECT, "title": title, **DOCUMENTS[name].json_schema(mode="serialization")} | {"title": title}


def tune_document(
    kernel: str,
    device: DeviceFacts,
    mode: Mode,
    settled: Sequence[Settled],
    journal: Path,
    portfolio: Portfolio | None = None,
) -> TuneDocument:
    """What a tune found, as its document."""
    return TuneDocument(
        kernel=kernel,
        device=DeviceDocument(name=device.name, arch=device.arch),
        mode=mode,
        problems=tuple(_problem_document(one, mode) for one in settled),
        journal=str(journal),
        portfolio=None if portfolio is None else _portfolio_document(portfolio),
    )


def _portfolio_document(found: Portfolio) -> PortfolioDocument:
    return PortfolioDocument(
        members=tuple(PortfolioMember(config=dict(one.config), serves=one.serves) for one in found.members),
        within=found.within,
        exact=found.exact,
        bound=found.bound,
        unserved=found.unserved,
    )


def mutants_path(results: Path, kernel: str) -> Path:
    """Where the measured suite of a kernel is kept: what `flashtune mutants KERNEL --json` printed."""
    return results / "mutants" / f"{kernel}.json"


def kill_rate(results: Path, kernel: str, *, suite: str, kernel_digest: str) -> KillRate | None:
    """What the suite with this digest is worth on this kernel, if that was measured and kept. Raises `WorkspaceError`."""
    path = mutants_path(results, kernel)
    if not path.exists():
        return None
    try:
        found: MutantsDocument = DOCUMENTS["mutants"].validate_json(path.read_bytes())
    except ValidationError as error:
        raise WorkspaceError(
            f"{path} is not what `flashtune mutants --json` prints: {error.errors()[0]['msg']}", hint="write it again"
        ) from error
    if (found.suite, found.kernel_digest) != (suite, kernel_digest):
        return None
    real = [one for one in found.mutants if not one.equivalent]
    return KillRate(killed=sum(bool(one.killed_by) for one in real), planted=len(real))


def _problem_document(settled: Settled, mode: Mode) -> ProblemDocument:
    census, champion = settled.space.census, settled.champion
    shown = None
    value, proof = settled.value_ms, settled.proof
    if champion is not None and value is not None and proof and isinstance(champion.outcome, Measured | Estimated):
        shown = ChampionDocument(
            config=champion.config, value_ms=value, kind=mode, verdict=champion.outcome.verdict, proof=proof
        )
    return ProblemDocument(
        problem=settled.problem.key,
        space=SpaceDocument(size=census.size, legal=census.legal, pruned=census.pruned),
        outcomes=settled.outcomes,
        champion=shown,
        default=DefaultDocument(config=settled.default.config, value_ms=settled.default_ms),
    )


def write_schemas(folder: Path) -> None:
    """Write every schema to `folder`, as the files in the repository are."""
    for name in DOCUMENTS:
        (folder / f"{name}.json").write_text(json.dumps(json_schema(name), indent=2) + "\n", encoding="utf-8")
    (folder / "champions.json").write_text(json.dumps(champion_schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(__file__).parent / "schemas")
