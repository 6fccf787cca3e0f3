"""The kernels, in processes of their own.

Triton decides whether it interprets when it is imported, for the whole process. So the tests that need the interpreter lie
in `interpreted_*.py`, which pytest does not collect by itself; each file runs here as a child with TRITON_INTERPRET=1. This
process never imports Triton, and neither way of running it can leak into other tests. To run one of them alone:
TRITON_INTERPRET=1 pytest -o python_files='interpreted_*.py' -W 'ignore:Conversion of an array' tests/kernels
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
INTERPRETED = sorted(path.name for path in Path(__file__).parent.glob("interpreted_*.py"))
ARCHITECTURES = {"a100": "sm_80", "rtx4090": "sm_89", "h200": "sm_90", "b200": "sm_100", "mi300x": "gfx942"}
FEW = [
    ("h200", "b2 h8/2 s4096 d128 bf16 causal fwd"),
    ("h200", "b2 h8 s4001 d64 fp16 bwd"),
    ("rtx4090", "b2 h8 s4096 d64 bf16 causal fwd"),
    ("a100", "b2 h8 s4096 d128 bf16 causal bwd"),
    ("mi300x", "b2 h8 s4096 d64 bf16 causal fwd"),
    ("b200", "b2 h8/2 s4096 d128 bf16 causal fwd"),
]
FEW_DECODING = [("h200", "b4 h32/8 q1 k8192 d128 bf16 causal"), ("mi300x", "b4 h32/8 q1 k8192 d128 bf16 causal")]
# Tiles are so small that threads would only wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MASKS = ("", "causal", "causal window=512", "window=256:256")
ALL = [
    (device, f"b2 h8/4 s{length} d{head_dim} {dtype} {mask} {pass_}")
    for device in ARCHITECTURES
    for dtype in ("bf16", "fp16", "fp32")
    for head_dim in ("64", "128", "256", "192/128")
    for mask, length in [*((mask, 4096) for mask in MASKS), ("causal", 4001)]
    for pass_ in ("fwd", "bwd")
]
# One query of few heads, several of several, and rows enough for more than one tile; MLA's heads in 16 bits.
DECODING = [
    (device, f"b2 {heads} d{head_dim} {dtype} {mask}")
    for device in ARCHITECTURES
    for dtype in ("bf16", "fp16", "fp32")
    for head_dim in ("40", "64", "80", "96", "128", "192/128", "256", "512", "576/512")
    for heads, mask in (
        ("h32/8 q1 k8192", "causal"), ("h32/8 q5 k8190", "causal"), ("h32/1 q4 k8192", "causal window=1024"),
    )
    if dtype != "fp32" or not head_dim.startswith("5")
]  # fmt: skip


def child(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=3000
    )


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name: str) -> None:
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-o",
        f"python_files={name}",
        f"tests/kernels/{name}",
    ]
    # Triton 3.6 turns arrays of one element into numbers in a way that numpy will not allow for ever.
    ran = child(
        [*command, "-W", "ignore:Conversion of an array with ndim:DeprecationWarning"],
        TRITON_INTERPRET="1",
        **ONE_THREAD,
    )
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-6000:] + ran.stderr[-2000:]


def compiled(jobs: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Registers, spills and shared memory of every launch of the default config of every job, in one child."""
    ran = child(["-m", "tests.kernels.compiled_defaults", json.dumps(jobs)])
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


def complaints(problems: list[tuple[str, str]], stem: str = "") -> list[str]:
    """Of the kernel `stem`, or of the plain one of each problem's pass."""
    jobs = [(device, problem, stem or f"flash_{problem.split()[-1]}") for device, problem in problems]
    found = compiled(jobs)
    assert len(found) >= len(jobs)
    return [str(entry) for entry in found if entry["spill_bytes"] or entry["shared_bytes"] > entry["shared_limit"]]


def test_defaults_compile_without_spills() -> None:
    assert not complaints(FEW)


def test_defaults_of_decoding_compile_without_spills() -> None:
    assert not complaints(FEW_DECODING, "flash_decode")


@pytest.mark.slow
@pytest.mark.parametrize("device", ARCHITECTURES)
def test_every_default_compiles_without_spills(device: str) -> None:
    found = complaints([job for job in ALL if job[0] == device])
    found += complaints([job for job in DECODING if job[0] == device], "flash_decode")
    assert not found, "\n".join(found)


SPILLING = ("h200", "b2 h8 s4096 d256 bf16 causal bwd", "flash_bwd")


def test_a_default_that_spills_would_be_seen() -> None:
    """The complaint is not blind: 128 by 128 scores of fp32 in four warps cannot fit."""
    ran = child(["-m", "tests.kernels.compiled_defaults", json.dumps([SPILLING]), "large"])
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert any(entry["spill_bytes"] > 0 for entry in json.loads(ran.stdout))
