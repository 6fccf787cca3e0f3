"""The fuzzer as a person uses it: on the real kernels, on kernels with a planted bug, on kernels that crash."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from harness import documents
from harness.cases import read_counterexample
from harness.problem import parse_problem

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    for part in ("kernels", "search_spaces"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def flashtune(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", *argv], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
    )  # fmt: skip


def plant(workspace: Path, file: str, right: str, wrong: str) -> None:
    path = workspace / "kernels" / file
    source = path.read_text()
    assert right in source, f"{file} no longer contains `{right}`"
    path.write_text(source.replace(right, wrong))


@pytest.mark.parametrize("kernel", ["flash_fwd", "flash_bwd"])
def test_the_kernels_survive_a_few_cases(workspace: Path, kernel: str) -> None:
    done = flashtune("fuzz", kernel, "--cases", "12", "--time", "60s", "--seed", "2", "--json", cwd=workspace)
    assert done.returncode == 0, done.stderr + done.stdout
    document = json.loads(done.stdout)
    jsonschema.validate(document, documents.json_schema("fuzz"))
    assert document["cases"] >= 12
    assert document["verdicts"]["passed"] >= 6
    assert document["oracles"]["bound"] >= 6
    assert len(document["oracles"]) > 3
    assert document["counterexamples"] == []
    assert all(0 < ratio <= 1 for ratio in document["largest"].values())


def test_a_planted_bug_is_found_shrunk_kept_and_replayed(workspace: Path) -> None:
    right, wrong = "col <= row + (offset + right)", "col < row + (offset + right)"
    plant(workspace, "primitives.py", right, wrong)
    done = flashtune("fuzz", "flash_fwd", "--time", "90s", "--seed", "1", "--json", cwd=workspace)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    (path,) = document["counterexamples"]
    example = read_counterexample(Path(path))
    problem = parse_problem(example.case.problem)
    # Shrunk to something that a person can read: one head, tiny lengths, nothing unusual about the memory.
    assert problem.right is not None
    assert problem.batch * problem.q_heads <= 2
    assert problem.q_len <= 3
    assert problem.kv_len <= 3
    assert not example.case.patches

    again = flashtune("replay", Path(path).stem, cwd=workspace)
    assert again.returncode == 1
    assert "times its bound" in again.stdout or "must be" in again.stdout
    plant(workspace, "primitives.py", wrong, right)
    mended = flashtune("replay", path, "--json", cwd=workspace)
    assert mended.returncode == 0, mended.stdout
    jsonschema.validate(json.loads(mended.stdout), documents.json_schema("replay"))


@pytest.mark.parametrize(
    ("act", "says"),
    [
        # A minute of shrinking each; test_impl.py has a foreign function that crashes in every run.
        pytest.param("import os; os.abort()", "the process was killed by SIGABRT", marks=pytest.mark.slow),
        pytest.param("import ctypes; ctypes.string_at(0)", "the process was killed by SIGSEGV", marks=pytest.mark.slow),
    ],
)
def test_a_crash_is_a_counterexample_and_not_the_end_of_the_tool(workspace: Path, act: str, says: str) -> None:
    anchor = "    primitives.require_blocks(block_m=block_m, block_n=block_n)\n"
    plant(workspace, "flash_fwd.py", anchor, anchor + f"    if q.shape[2] > 4:\n        {act}\n")
    done = flashtune("fuzz", "flash_fwd", "--time", "60s", "--seed", "1", cwd=workspace)
    assert done.returncode == 1, done.stderr
    assert says in done.stdout
    (path,) = (workspace / "results" / "corpus" / "flash_fwd").iterdir()
    assert parse_problem(read_counterexample(path).case.problem).q_len > 4
    again = flashtune("replay", str(path), cwd=workspace)
    assert again.returncode == 1
    assert says in again.stdout


def test_a_kernel_that_refuses_everything_is_not_passed(workspace: Path) -> None:
    anchor = "    primitives.require_blocks(block_m=block_m, block_n=block_n)\n"
    plant(workspace, "flash_fwd.py", anchor, anchor + '    raise ValueError("not today")\n')
    done = flashtune("fuzz", "flash_fwd", "--cases", "8", "--time", "60s", cwd=workspace)
    assert done.returncode == 3
    assert "cannot tell" in done.stderr


def test_a_bug_on_the_host_side_is_a_finding_about_the_kernel(workspace: Path) -> None:
    anchor = "    primitives.require_blocks(block_m=block_m, block_n=block_n)\n"
    plant(workspace, "flash_fwd.py", anchor, anchor + "    None + 1\n")
    done = flashtune("fuzz", "flash_fwd", "--time", "60s", cwd=workspace)
    assert done.returncode == 1
    assert "exception: TypeError" in done.stdout


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["fuzz", "flash_fwd", "--time", "soon"], 2, "the time `soon` cannot be read"),
        (["fuzz", "flash_fwdd"], 2, "did you mean `flash_fwd`?"),
        (["replay", "0123abcd"], 2, "`0123abcd` is no file, and 0 counterexamples"),
    ],
)
def test_bad_input_is_answered_in_words(workspace: Path, argv: list[str], code: int, says: str) -> None:
    done = flashtune(*argv, cwd=workspace)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
