"""Real compilations for GPUs that are not here. Triton must not interpret, so everything happens in child processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).with_name("small_attention.py")
REFUSING = Path(__file__).with_name("refusing.py")
PROBLEM = "b2 h4 s512 d64 bf16"
CONFIG = {"block_m": 128, "block_n": 64, "num_warps": 4, "num_stages": 2}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def run(jobs: list[dict[str, Any]], cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    kept |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "tests.compile.report", json.dumps(jobs)]
    return subprocess.run(command, capture_output=True, text=True, env=kept, cwd=ROOT, timeout=300)


def compiled(jobs: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    ran = run(jobs, cache)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


def job(target: str = "sm_90", problem: str = PROBLEM, path: Path = SMALL, **changes: Any) -> dict[str, Any]:
    return {"path": str(path), "target": target, "problem": problem, "config": CONFIG | changes}


def the_hash(entry: dict[str, Any]) -> str:
    return str(entry["outcome"]["binaries"][0]["code_hash"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def first(cache: Path) -> list[dict[str, Any]]:
    """One process: every target, then what should change the code, then what should not, then a repetition."""
    jobs = [job(target) for target in TARGETS]
    jobs += [job(block_n=32), job(problem="b2 h4 s512 d64 fp16")]
    jobs += [job(problem="b3 h8 s1024 d64 bf16") | {"on_cpu": True}, job()]
    return compiled(jobs, cache)


@pytest.mark.parametrize(("place", "target"), list(enumerate(TARGETS)))
def test_a_binary_of_every_target_can_be_read(first: list[dict[str, Any]], place: int, target: str) -> None:
    binary = first[place]["outcome"]["binaries"][0]
    assert binary["kernel"] == "small_forward"
    assert 32 <= binary["registers"] <= 512
    assert binary["warps"] == 4
    assert binary["shared_bytes"] >= 128 * 64 * 2
    assert not binary["specialized"]
    (loop,) = binary["loops"]
    # One warp of four does a quarter of the two products of a 128x64 tile; tcgen05 does not say.
    assert loop["matrix_flops"] == (0 if target == "sm_100" else 2 * 2 * 128 * 64 * 64 // 4)
    assert loop["instructions"]["matrix"] > 0
    # 128x64 exponentials over 128 (on AMD 256) threads, and a few to rescale each row.
    exponentials = 128 * 64 // (256 if target == "gfx942" else 128)
    assert exponentials <= loop["instructions"]["special"] <= exponentials + 4
    assert loop["instructions"]["barrier"] > 0
    assert sum(loop["instructions"].values()) < sum(binary["instructions"].values())
    if target != "gfx942":
        assert loop["instructions"]["async_copy"] == 2 * 64 * 64 * 2 // 16 // 128


def test_targets_and_configs_have_different_code(first: list[dict[str, Any]]) -> None:
    hashes = [the_hash(entry) for entry in first[:6]]
    assert len(set(hashes)) == 6


def test_run_time_values_do_not_change_the_code_and_cost_nothing(first: list[dict[str, Any]]) -> None:
    larger, again = first[6], first[7]
    assert the_hash(larger) == the_hash(again) == the_hash(first[1])
    assert first[1]["outcome"]["compile_ms"] > 0
    assert larger["outcome"]["compile_ms"] == again["outcome"]["compile_ms"] == 0


def test_a_launch_on_present_tensors_finds_the_code_of_absent_ones(first: list[dict[str, Any]]) -> None:
    assert first[6]["held"] == 1


def test_a_fresh_process_with_another_file_name_gives_the_same_code(
    first: list[dict[str, Any]], tmp_path: Path
) -> None:
    moved = tmp_path / "moved_attention.py"
    moved.write_text("# Other line numbers.\n\n" + SMALL.read_text())
    (entry,) = compiled([job(path=moved)], tmp_path / "cache")
    assert entry["outcome"]["compile_ms"] > 0
    assert the_hash(entry) == the_hash(first[1])


def test_a_fresh_process_finds_the_code_in_the_cache(first: list[dict[str, Any]], cache: Path) -> None:
    (entry,) = compiled([job()], cache)
    assert entry["outcome"]["compile_ms"] == 0
    assert entry["outcome"] | {"compile_ms": 0} == first[1]["outcome"] | {"compile_ms": 0}


def test_what_the_compiler_refuses_is_a_value(tmp_path: Path) -> None:
    jobs = [job(path=REFUSING) | {"config": {"raises": name}} for name in ("passes", "ptxas", "resources")]
    found = compiled([job(block_n=48), *jobs], tmp_path)
    assert [entry["kind"] for entry in found] == ["CompileFailed"] * 4
    reasons = [entry["outcome"]["reason"] for entry in found]
    assert "power of 2" in reasons[0]
    assert reasons[1] == "RuntimeError: PassManager::run failed"
    assert "too many registers" in reasons[2]
    assert "shared memory" in reasons[3]
    assert "arange" in found[0]["outcome"]["log"]


@pytest.mark.parametrize("raises", ["ours", "type"])
def test_what_no_compiler_raised_propagates(raises: str, tmp_path: Path) -> None:
    ran = run([job(path=REFUSING) | {"config": {"raises": raises}}], tmp_path)
    assert ran.returncode != 0
    assert "a bug in the kernel file" in ran.stderr


def test_an_interpreting_process_is_refused(tmp_path: Path) -> None:
    ran = run([job()], tmp_path, TRITON_INTERPRET="1")
    assert ran.returncode != 0
    assert "where Triton interprets" in ran.stderr


@pytest.mark.parametrize(
    ("kernel", "problem"), [("flash_fwd", "b2 h4/2 s512 d64 bf16 causal fwd"), ("flash_bwd", "b1 h2 s256 d32 fp16 bwd")]
)
def test_what_gate_and_proof_launch_on_a_device_is_compiled_before(cache: Path, kernel: str, problem: str) -> None:
    """The strides and alignments of what will be launched are those that were compiled for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    kept |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.compile.ahead", kernel, problem]
    ran = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=ROOT, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    misses = json.loads(ran.stdout)
    assert misses["candidate"] and misses["gate ahead"] and misses["proof ahead"]
    assert (misses["gate"], misses["proof"]) == (0, 0)
