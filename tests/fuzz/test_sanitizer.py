"""Fuzzing under compute-sanitizer, with a stand-in that complains of what it is told to."""

import os
from pathlib import Path

import pytest

from harness import sanitizer
from harness.fuzz import fuzz
from harness.fuzz_child import Plan
from harness.proving import fuzz_configs
from harness.workspace import Workspace
from tests.fuzz.test_fuzz import REPOSITORY, flashtune

# It runs the command, and complains at the end if a case with causal masking was announced.
STAND_IN = r"""#!/bin/bash
while [ "${1#--}" != "$1" ]; do
  [ "$1" = --log-file ] && log=$2
  [ "$1" = --error-exitcode ] && code=$2
  shift 2
done
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING$TRITON_DEBUG" = 11 ] || exit 3
"$@" | tee "$log.events" || exit 4
grep -q '"event": "case".*causal' "$log.events" || { rm "$log.events"; exit 0; }
rm "$log.events"
printf '========= %s\n' COMPUTE-SANITIZER 'Invalid __global__ read of size 2 bytes' '    at flash_fwd_kernel+0x10' > "$log"
exit "$code"
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(STAND_IN)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    configs = {"fp16": fuzz_configs(Workspace(REPOSITORY), "flash_fwd", "fwd", "fp16")[:2]}
    return Plan(
        seed=3,
        seconds=60,
        cases=8,
        profile="pr",
        root=REPOSITORY,
        kernel="flash_fwd",
        configs=configs,
        sanitize="memcheck",
    )


def test_a_complaint_is_a_counterexample_with_the_case_that_brings_it_about_alone(plan: Plan, tmp_path: Path) -> None:
    tally = fuzz(plan, tmp_path / "corpus", versions={}, seen=lambda tally: None)
    (example,) = tally.found
    assert example.judge == "memcheck"
    assert "Invalid __global__ read of size 2 bytes at flash_fwd_kernel+0x10" in example.detail
    assert "depends on earlier" not in example.detail
    assert "causal" in example.case.problem


def test_a_silent_sanitizer_is_a_pass(plan: Plan, tmp_path: Path) -> None:
    stand_in = tmp_path / "bin" / "compute-sanitizer"
    stand_in.write_text(STAND_IN.replace("causal", "nothing like this"))
    tally = fuzz(plan, tmp_path / "corpus", versions={}, seen=lambda tally: None)
    assert not tally.found
    assert tally.cases == 8


def test_without_a_gpu_it_is_refused_with_what_to_do(tmp_path: Path) -> None:
    done = flashtune("fuzz", "flash_fwd", "--sanitize", "memcheck", "--workspace", str(REPOSITORY), cwd=tmp_path)
    assert done.returncode == 3
    assert "no GPU here" in done.stderr and "shadow" in done.stderr
    done = flashtune("fuzz", "flash_fwd", "--sanitize", "memchek", "--workspace", str(REPOSITORY), cwd=tmp_path)
    assert done.returncode == 2
    assert "memcheck" in done.stderr


def test_a_tool_that_does_not_work_here_is_known_before_it_blames_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/bash\necho 'Error: Device not supported' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert sanitizer.find_program() == str(tool)
    assert sanitizer.refuses() == "the smallest program fails under it: Error: Device not supported"
    tool.write_text("#!/bin/bash\nexit 0\n")
    assert sanitizer.refuses() == ""
    tool.write_text("#!/bin/bash\nexec sleep 30\n")
    assert "did not end under it within 0 seconds" in sanitizer.refuses(0.2)
