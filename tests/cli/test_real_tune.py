"""The whole tool for real, in a process of its own: compile for a GPU that is not here, judge in the interpreter, estimate.

The one slow path that everything else replaces by fakes; a handful of candidates is enough.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FORWARD = "b1 h4/2 s512 d64 fp16 causal"


def flashtune(*argv: str, cwd: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", *argv],
        cwd=cwd, capture_output=True, text=True, timeout=500,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(cache), "HOME": str(cache)},
    )  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    for part in ("kernels", "search_spaces"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


# The tests below tune the backward kernel too.
@pytest.mark.parametrize("kernel", ["flash_fwd", pytest.param("flash_bwd", marks=pytest.mark.slow)])
def test_a_tune_without_a_gpu_and_its_continuation(workspace: Path, cache: Path, kernel: str) -> None:
    command = ("tune", kernel, "--problem", FORWARD, "--target", "h200", "--budget", "5", "--seed", "1", "--json")
    first = flashtune(*command, cwd=workspace, cache=cache)
    assert first.returncode == 0, first.stderr
    document = json.loads(first.stdout)
    (problem,) = document["problems"]
    assert document["mode"] == "estimated"
    assert problem["champion"]["kind"] == "estimated"
    assert problem["champion"]["verdict"]["status"] == "passed"
    assert problem["champion"]["verdict"]["where"] == "interpreter"
    assert 0.05 < max(check["ratio"] for check in problem["champion"]["verdict"]["checks"]) <= 1
    assert problem["champion"]["value_ms"] <= problem["default"]["value_ms"]
    assert sum(problem["outcomes"].values()) == 5

    # In the second run nothing is compiled: a cache of its own stays empty.
    assert list(cache.rglob("*.cubin"))
    unused = workspace / "unused"
    second = flashtune(*command, cwd=workspace, cache=unused)
    assert json.loads(second.stdout) == document
    assert not list(unused.rglob("*.cubin"))

    elsewhere = flashtune(*command, "--runs", str(workspace / "again"), cwd=workspace, cache=cache)
    assert json.loads(elsewhere.stdout)["problems"] == document["problems"]


@pytest.mark.parametrize(
    ("kernel", "file", "right", "wrong"),
    [
        # One of each pass in every run, twenty seconds each; tests/gate/test_planted.py plants all of them in less.
        ("flash_fwd", "flash_fwd.py", "(head // group).to(tl.int64)", "(head % (q_heads // group)).to(tl.int64)"),
        pytest.param(
            "flash_fwd",
            "primitives.py",
            "col <= row + (offset + right)",
            "col < row + (offset + right)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "flash_fwd",
            "flash_fwd.py",
            "shrink = tl.exp2(m - shift)",
            "shrink = tl.exp2(tl.zeros_like(m))",
            marks=pytest.mark.slow,
        ),
        ("flash_bwd", "flash_bwd.py", "head = kv_head * group", "head = kv_head"),
        pytest.param(
            "flash_bwd",
            "flash_bwd.py",
            "(head // group).to(tl.int64)",
            "(head % (q_heads // group)).to(tl.int64)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "flash_bwd",
            "primitives.py",
            "col <= row + (offset + right)",
            "col < row + (offset + right)",
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "key head of a query head",
        "causal off by one",
        "no rescale",
        "dk and dv of the wrong head",
        "key head of a query head, backward",
        "causal off by one, backward",
    ],
)
def test_a_planted_bug_leaves_no_champion(
    workspace: Path, cache: Path, kernel: str, file: str, right: str, wrong: str
) -> None:
    path = workspace / "kernels" / file
    source = path.read_text()
    assert source.count(right) >= 1, f"{file} no longer contains `{right}`"
    path.write_text(source.replace(right, wrong))
    done = flashtune("tune", kernel, "--problem", FORWARD, "--budget", "3", "--json", cwd=workspace, cache=cache)
    assert done.returncode == 0, done.stderr
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["champion"] is None
    assert problem["outcomes"].get("wrong", 0) + problem["outcomes"].get("pruned", 0) == 3
    assert problem["outcomes"]["wrong"] >= 1
    assert not (workspace / "results" / "best").exists()
