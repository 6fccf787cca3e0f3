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
    ("h200", "b2 h8/2 s4096 d128 fp8e4m3 causal fwd"),
    ("rtx4090", "b2 h8/2 s4096 d64 fp8e5m2 causal fwd"),
]
FEW_DECODING = [
    ("h200", "b4 h32/8 q1 k8192 d128 bf16 causal"),
    ("mi300x", "b4 h32/8 q1 k8192 d128 bf16 causal"),
    ("h200", "b4 h32/8 q4 k8192 d128 bf16 causal paged=16"),
    ("b200", "b4 h32/8 q1 k8192 d128 bf16 causal paged=64"),
]
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
] + [
    (device, f"b2 h32/8 q{queries} k8190 d{head_dim} {dtype} causal paged={page}")
    for device in ARCHITECTURES
    for dtype in ("bf16", "fp32")
    for head_dim in ("80", "128", "256", "512")
    for queries, page in ((1, 1), (4, 16), (1, 256))
    if dtype != "fp32" or head_dim != "512"
]  # fmt: skip


# What a problem may have beside attention inside a band, one at a time.
ADDED = (
    "softcap=30.0", "alibi", "bias=hqk", "sinks", "dropout=0.1", "prefix", "chunk=512", "documents", "mask=bhqk", "packed=4",
)  # fmt: skip
VARIANTS = [
    (device, f"b{1 if added.startswith('packed') else 2} h8/2 s4096 d{head_dim} bf16 causal {added} {pass_}")
    for device in ("h200", "a100", "b200", "mi300x")
    for head_dim in (64, 128, 256)
    for added in ADDED
    for pass_ in ("fwd", "bwd")
]
# Those that once spilled, or nearly.
FEW_VARIANTS = [
    ("h200", "b2 h8/2 s4096 d128 bf16 causal bias=hqk fwd"),
    ("a100", "b2 h8/2 s4096 d256 bf16 causal mask=bhqk fwd"),
    ("b200", "b2 h8/2 s4096 d256 bf16 causal dropout=0.1 fwd"),
    ("h200", "b2 h8/2 s4096 d128 bf16 causal dropout=0.1 bwd"),
    ("h200", "b2 h8/2 s4096 d256 bf16 causal dropout=0.1 bwd"),
    ("mi300x", "b2 h8/2 s4096 d576/512 bf16 causal bwd"),
]
# Heads that fill the registers, of latent attention and others.
WIDE = [
    (device, f"b2 h8/2 s4096 d{head_dim} bf16 causal {pass_}")
    for device in ARCHITECTURES
    for head_dim in ("8", "32", "96", "512", "64/512", "576/512")
    for pass_ in ("fwd", "bwd")
    if (device, head_dim, pass_) != ("rtx4090", "576/512", "bwd")  # refused by a rule
]  # fmt: skip


# Those of 8 bits, on devices that multiply them.
EIGHT_BITS = [
    (device, f"b{1 if added.startswith('packed') else 2} h8/2 s4096 d{head_dim} {dtype} causal {added} fwd")
    for device in ("rtx4090", "h200", "b200")
    for head_dim, every in (
        ("64", ADDED), ("128", ADDED), ("256", ADDED), ("192/128", ()), ("96", ()), ("512", ()), ("576/512", ())
    )
    for dtype, several in (("fp8e4m3", ("", *every)), ("fp8e5m2", ("",)))
    for added in several
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


def compiled(jobs: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Registers, spills and shared memory of every launch of every job, in one child: (device, problem, stem), and changes of
    the default config, if any."""
    ran = child(["-m", "tests.kernels.compiled_defaults", json.dumps(jobs)])
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


def complaints(problems: list[tuple[str, str]], stem: str = "") -> list[str]:
    """Of the kernel `stem`, or of the plain one of each problem's pass."""
    jobs: list[tuple[Any, ...]] = [
        (device, problem, stem or f"flash_{problem.split()[-1]}") for device, problem in problems
    ]
    found = compiled(jobs)
    assert len(found) >= len(jobs)
    return faults(found)


def faults(found: list[dict[str, Any]]) -> list[str]:
    """What spills, does not fit, or is a trap where code should be."""
    return [
        str(entry)
        for entry in found
        if entry["spill_bytes"] or entry["shared_bytes"] > entry["shared_limit"] or entry["trap"]
    ]


def test_defaults_compile_without_spills() -> None:
    assert not complaints(FEW)


# What changes the code of a default: two heads in two tiles, sums rescaled late, one launch for both parts of a backward pass.
STRUCTURES = [
    ("h200", "b2 h8/2 s4096 d96 bf16 causal fwd", "flash_fwd", {"head_chunks": True, "lag": 8}),
    ("h200", "b2 h8/2 s4096 d576/512 bf16 causal fwd", "flash_fwd", {}),
    ("h200", "b2 h8/2 s4096 d128 bf16 causal bwd", "flash_bwd", {"structure": "fused"}),
    ("mi300x", "b2 h8/2 s4096 d128 bf16 causal bwd", "flash_bwd", {"structure": "fused"}),
    ("h200", "b2 h8/2 s4096 d128 bf16 causal nondeterministic bwd", "flash_bwd", {"structure": "atomic"}),
    ("mi300x", "b2 h8/2 s4096 d64 bf16 causal nondeterministic bwd", "flash_bwd", {"structure": "atomic"}),
]  # fmt: skip


# dq by atomic additions, with the tiles of the default.
ATOMIC = [
    (
        device,
        f"b2 h8/2 s4096 d{head_dim} bf16 causal nondeterministic {added} bwd",
        "flash_bwd",
        {"structure": "atomic"},
    )
    for device in ARCHITECTURES
    for head_dim in ("64", "128", "192/128", "256")
    for added in ("", "dropout=0.1")
]


def test_every_structure_compiles_without_spills() -> None:
    found = compiled(STRUCTURES)
    assert [entry["kernel"] for entry in found if "rows" not in entry["kernel"]] == [
        "flash_fwd_kernel", "flash_fwd_kernel", "flash_bwd_fused_kernel", "flash_bwd_fused_kernel",
        *("flash_bwd_dkdv_kernel", "flash_bwd_dq_cast_kernel") * 2,
    ]  # fmt: skip
    assert not faults(found)


def test_defaults_of_decoding_compile_without_spills() -> None:
    assert not complaints(FEW_DECODING, "flash_decode")


def test_defaults_of_variants_compile_without_spills() -> None:
    assert not complaints(FEW_VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h200", "a100", "b200", "mi300x"])
def test_every_default_of_a_variant_compiles_without_spills(device: str) -> None:
    found = complaints([job for job in VARIANTS if job[0] == device])
    assert not found, "\n".join(found)


ONE_LOOP = {
    "num_warps": 4,
    "num_stages": 2,
    "loops": "single",
    "masked_stages": 1,
    "warp_specialize": True,
    "block_n": 64,
}


def test_warps_that_are_to_be_specialized_are_so_in_the_binary() -> None:
    """Four warps are asked for; a producer and two groups of consumers are launched, also where heads are two tiles."""
    plain = {**ONE_LOOP, "warp_specialize": False}
    whole, halves = (("h200", f"b2 h8/2 s4096 d{dim} bf16 causal fwd", "flash_fwd") for dim in (128, 96))
    found = compiled([(*halves, {**ONE_LOOP, "head_chunks": True}), (*whole, plain)])
    assert [(entry["specialized"], entry["warps"]) for entry in found] == [(True, 12), (False, 4)]
    assert not found[0]["spill_bytes"]


@pytest.mark.slow
def test_warps_of_programs_that_stay_are_specialized() -> None:
    problem = ("h200", "b2 h8/2 s4096 d128 bf16 causal fwd", "flash_fwd")
    found = compiled([(*problem, ONE_LOOP), (*problem, {**ONE_LOOP, "programs_per_sm": 1})])
    assert [(entry["specialized"], entry["warps"], entry["spill_bytes"]) for entry in found] == [(True, 12, 0)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("device", ARCHITECTURES)
def test_every_default_compiles_without_spills(device: str) -> None:
    found = complaints([job for job in (*ALL, *WIDE, *EIGHT_BITS) if job[0] == device])
    found += complaints([job for job in DECODING if job[0] == device], "flash_decode")
    found += faults(compiled([job for job in ATOMIC if job[0] == device]))
    assert not found, "\n".join(found)


SPILLING = ("h200", "b2 h8 s4096 d256 bf16 causal bwd", "flash_bwd")


def test_a_default_that_spills_would_be_seen() -> None:
    """The complaint is not blind: 128 by 128 scores of fp32 in four warps cannot fit."""
    ran = child(["-m", "tests.kernels.compiled_defaults", json.dumps([SPILLING]), "large"])
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert any(entry["spill_bytes"] > 0 for entry in json.loads(ran.stdout))


if __name__ == "__main__":
    every = [(*job, f"flash_{job[1].split()[-1]}") for job in VARIANTS if job[0] in sys.argv[1:]]
    subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled_defaults", json.dumps(every), "table"], cwd=ROOT, check=True
    )
