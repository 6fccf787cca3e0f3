"""The gate on the real kernels, in the interpreter: they pass, and a planted bug makes every affected candidate wrong.

One child process for all, because Triton decides between interpreter and compiler when it is imported.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def run_child(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "planted.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def mutants() -> list:
    spec = importlib.util.spec_from_file_location("gate_planted", HERE / "planted.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return list(module.MUTANTS)


MUTANTS = mutants()
QUICK = [mutant for mutant in MUTANTS if mutant.quick]
SLOW = [mutant for mutant in MUTANTS if not mutant.quick]


def ask(mutants: list, folder: Path) -> dict[str, list[dict[str, str]]]:
    child = run_child(str(ROOT / "kernels"), str(folder), *(mutant.name for mutant in mutants))
    assert child.returncode == 0, child.stderr[-3000:]
    found: dict[str, list[dict[str, str]]] = {mutant.name: [] for mutant in mutants}
    for line in child.stdout.splitlines():
        verdict = json.loads(line)
        found[verdict["mutant"]].append(verdict)
    return found


@pytest.fixture(scope="module")
def quick_verdicts(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    return ask(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow_verdicts(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    return ask(SLOW, tmp_path_factory.mktemp("slow"))


def assert_caught(mutant, found: list[dict[str, str]]) -> None:
    """Every candidate of a mutant is wrong, and none of the kernels themselves."""
    assert len(found) == 2 * len(mutant.passes) * len(mutant.problems)
    wanted = "wrong" if mutant.times else "passed"
    assert [verdict for verdict in found if verdict["status"] != wanted] == []
    assert all(bool(verdict["detail"]) == (wanted == "wrong") for verdict in found)


@pytest.mark.parametrize("mutant", QUICK, ids=lambda mutant: mutant.name)
def test_planted_bugs_are_caught_in_every_candidate(quick_verdicts, mutant):
    assert_caught(mutant, quick_verdicts[mutant.name])


@pytest.mark.slow
@pytest.mark.parametrize("mutant", SLOW, ids=lambda mutant: mutant.name)
def test_more_planted_bugs_are_caught_in_every_candidate(slow_verdicts, mutant):
    assert_caught(mutant, slow_verdicts[mutant.name])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_anchor_is_where_it_was(mutant):
    """Also those that only the long tests plant."""
    if mutant.times:
        assert (ROOT / "kernels" / mutant.file).read_text().count(mutant.anchor) == mutant.times


def test_an_anchor_that_is_gone_fails_loudly(tmp_path):
    kernels, scratch = tmp_path / "kernels", tmp_path / "scratch"
    kernels.mkdir()
    scratch.mkdir()
    (kernels / "flash_bwd.py").write_text("PASS = 'bwd'\n")
    child = run_child(str(kernels), str(scratch), "dq unscaled")
    assert child.returncode == 1
    assert "mutant `dq unscaled`" in child.stderr
