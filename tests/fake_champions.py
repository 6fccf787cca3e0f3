"""Champions that nobody measured: files as a tune writes them, with any value changed."""

from pathlib import Path
from typing import Any

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
    Search,
    Subject,
    Timed,
    WorstError,
)  # fmt: skip
from harness.device import TARGETS
from harness.keeping import champion_path, write_champions
from harness.problem import parse_problem

ENVIRONMENT = {"triton": "3.6.0", "toolchain": "triton 3.6.0, ptxas 12.8", "torch": "2.13.0", "driver": "580.1"}


def champion(
    problem: str = "b1 h8 s64 d32 fp16", kind: str = "measured", value_ms: float = 1.0, **changes: Any
) -> Champion:
    """A champion; `changes` replace fields, `kernel_digest` that of its certificate, `source_digest` that of what was timed."""
    proved, timed = changes.pop("kernel_digest", "k1"), changes.pop("source_digest", "k1")
    fields = {
        "problem": parse_problem(problem).key,
        "kernel": Timed(source_digest=timed, space_digest="s1"),
        "config": {"block_m": 64},
        "default": {"block_m": 32},
        "number": Number(kind=kind, value_ms=value_ms, default_ms=2.0, protocol="p1"),
        "resources": (
            Resources(kernel="fake", registers=64, spill_bytes=0, shared_bytes=1024, warps=4, code_hash="c0de"),
        ),
        "certificate": certificate(proved, "device" if kind == "measured" else "interpreter"),
        "search": Search(trials=24, outcomes={kind: 24}),
    }
    return Champion(**(fields | changes))


def certificate(kernel_digest: str = "k1", where: str = "device", *, repeated: int = 2) -> Certificate:
    return Certificate(
        kernel_digest=kernel_digest, where=where, oracle="fp64", criterion="within a bound", suite="5u17e", cases=12,
        errors={"out": WorstError(ratio=0.5, error=1e-3, bound=2e-3)}, gate_cases=("b1 h1 s16 d16 fp16 fwd",),
        judges={"bound": 12, "repeat": repeated}, worst={"out": 0.5}, seeds=(0,), blind_to=(),
        determinism=Determinism(cases=repeated) if repeated else None, kill_rate=KillRate(killed=3, planted=4),
    )  # fmt: skip


def champion_file(
    *champions: Champion, device: str = "h200", kernel: str = "flash_fwd", **changes: Any
) -> ChampionFile:
    """A file of them in order; `changes` replace versions of its environment."""
    facts = TARGETS[device]
    return ChampionFile(
        device=Device(name=facts.name, arch=facts.arch, multiprocessors=facts.multiprocessors),
        environment=Environment(**(ENVIRONMENT | changes)),
        kernel=Subject(name=kernel, family="flashtune", pass_="bwd" if kernel.endswith("bwd") else "fwd"),
        champions=tuple(sorted(champions, key=lambda one: one.problem)),
    )


def keep(results: Path, file: ChampionFile, *, draft: bool = False, name: str | None = None) -> Path:
    """Write a file where the champions of a workspace lie."""
    path = champion_path(results, file.device.name, name or file.kernel.name, draft=draft)
    write_champions(path, file)
    return path
