"""How a settled problem becomes a champion as it is stored. Refuses to say what was not found out: that is null."""

from collections.abc import Callable
from dataclasses import dataclass

from harness.champions import (
    Certificate,
    Champion,
    ChampionFile,
    Determinism,
    Device,
    Environment,
    KillRate,
    Number,
    Resources,
    RunnerUp,
    Search,
    Subject,
    Timed,
    WorstError,
)  # fmt: skip
from harness.compare import Verdict, worst
from harness.device import DeviceFacts
from harness.outcome import Binary, Estimated, Measured, Mode, Proof, Record, value_ms
from harness.problem import Pass
from harness.space import Config
from harness.stats import median_interval
from harness.tune import Settled
from harness.workspace import digest_modules

CRITERION = "every element of every output lies within a bound derived from the reference"

# The code behind a number: two numbers of the same code answer the same question.
_TIMED = ("measure", "sensor", "stats", "timing")
_ESTIMATED = ("binary", "device", "estimate", "flow")

RateOf = Callable[[str], KillRate | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where champions come from: the device, the kernel and its digest, the versions, and what the suite is worth by its
    digest."""

    device: DeviceFacts
    kernel: str
    family: str
    pass_: Pass
    kernel_digest: str
    triton: str | None
    torch: str | None
    driver: str | None
    kill_rate: RateOf

    def file(self, champions: tuple[Champion, ...], toolchain: str | None) -> ChampionFile:
        """A champion file of them."""
        facts = self.device
        return ChampionFile(
            device=Device(
                name=facts.name, arch=facts.arch, multiprocessors=facts.multiprocessors,
                shared_bytes_per_block=facts.shared_bytes_per_block, clock_mhz=facts.clock_mhz,
            ),
            environment=Environment(
                triton=_plain(self.triton), toolchain=_plain(toolchain), torch=_plain(self.torch), driver=_plain(self.driver)
            ),
            kernel=Subject(name=self.kernel, family=self.family, pass_=self.pass_),
            champions=tuple(sorted(champions, key=lambda champion: champion.problem)),
        )  # fmt: skip


def champion_of(settled: Settled, mode: Mode, origin: Origin) -> Champion | None:
    """The champion of a settled problem as it is stored, or None if it has none."""
    if (
        settled.champion is None
        or not isinstance(settled.champion.outcome, Measured | Estimated)
        or settled.proof is None
    ):
        return None
    outcome = settled.champion.outcome
    return Champion(
        problem=settled.problem.key,
        kernel=Timed(source_digest=origin.kernel_digest, space_digest=settled.space.fingerprint),
        config=dict(settled.champion.config),
        default=dict(settled.default.config),
        number=_number(settled, mode),
        resources=tuple(_resources(binary) for binary in outcome.artifact.binaries),
        certificate=certificate_of(outcome.verdict, settled.proof, origin.kernel_digest, origin.kill_rate),
        search=Search(trials=sum(settled.outcomes.values()), outcomes=dict(settled.outcomes)),
    )


def toolchain_of(settled: Settled) -> str | None:
    """The versions that made the champion's code, if there is one."""
    outcome = settled.champion.outcome if settled.champion else None
    return outcome.artifact.toolchain if isinstance(outcome, Measured | Estimated) else None


def certificate_of(verdict: Verdict, proof: Proof, kernel_digest: str, kill_rate: RateOf) -> Certificate:
    """What gate and suite said, as it is stored. Both have passed."""
    outputs = dict.fromkeys(check.output for check in verdict.checks)
    errors = {name: worst([check for check in verdict.checks if check.output == name]) for name in outputs}
    repeated = proof.oracles.get("repeat", 0)
    return Certificate(
        kernel_digest=kernel_digest,
        where=proof.where,
        oracle=_text(verdict.oracle),
        criterion=CRITERION,
        errors={name: WorstError(ratio=one.ratio, error=one.error, bound=one.bound) for name, one in errors.items()},
        gate_cases=tuple(_text(case) for case in verdict.cases),
        suite=proof.suite,
        cases=proof.cases,
        judges=dict(proof.oracles),
        worst=dict(proof.largest),
        seeds=tuple(dict.fromkeys((verdict.seed, proof.seed))),
        determinism=Determinism(cases=repeated) if repeated else None,
        blind_to=tuple(_text(each) for each in verdict.blind_to),
        kill_rate=kill_rate(proof.suite),
    )


def _resources(binary: Binary) -> Resources:
    return Resources(
        kernel=binary.kernel, registers=binary.registers, spill_bytes=binary.spill_bytes, shared_bytes=binary.shared_bytes,
        warps=binary.warps, code_hash=binary.code_hash,
    )  # fmt: skip


def _number(settled: Settled, mode: Mode) -> Number:
    value = settled.value_ms
    assert value is not None
    plain = Number(
        kind=mode,
        value_ms=value,
        default_ms=settled.default_ms,
        protocol=digest_modules(_TIMED if mode == "measured" else _ESTIMATED),
        runner_up=_runner_up(settled),
    )
    if mode != "measured" or settled.final is None or not isinstance(settled.final.outcome, Measured):
        return plain
    samples, compared = settled.final.outcome.samples, settled.against_default
    chosen = settled.champion is not None and settled.final.config == settled.champion.config
    times = samples.times_ms if chosen else samples.incumbent_ms
    interval = median_interval(times)
    is_default = settled.champion is not None and settled.champion.config == settled.default.config
    raced = compared if compared is not None and not is_default else None
    return plain.model_copy(
        update={
            "interval_ms": None if interval is None else (interval.low, interval.high),
            "samples": len(times),
            "method": _plain(samples.method or None),
            "ratio": raced.ratio if raced else None,
            "ratio_interval": (raced.interval.low, raced.interval.high) if raced and raced.interval else None,
        }
    )


def _runner_up(settled: Settled) -> RunnerUp | None:
    """The best of the others that passed their gate, by the number of its trial."""
    assert settled.champion is not None
    code = _code(settled.champion)
    others = [record for record in settled.records if value_ms(record.outcome) is not None and _code(record) != code]
    best = min(others, key=lambda record: (value_ms(record.outcome), record.trial), default=None)
    number = None if best is None else value_ms(best.outcome)
    return None if best is None or number is None else RunnerUp(config=dict(Config(best.config)), value_ms=number)


def _code(record: Record) -> str | None:
    outcome = record.outcome
    return outcome.artifact.code_hash if isinstance(outcome, Measured | Estimated) else None


def _text(text: str) -> str:
    """As a champion file takes it: printable ASCII, of a length."""
    return "".join(each if " " <= each <= "~" else "?" for each in text)[:400]


def _plain(text: str | None) -> str | None:
    return None if text is None else _text(text)
