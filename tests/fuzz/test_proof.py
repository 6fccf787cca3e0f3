"""The proof of a finalist, for real: the stock kernels pass it, and one with a bug that the gate does not see does not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.test_mutants import CONFIGS

ROOT = Path(__file__).parents[2]

PROVE = """
import json, sys
from pathlib import Path
from harness.outcome import OUTCOMES
from harness.problem import parse_problem
from harness.proof import prove
from harness.quicken import quicken
from harness.verify import gate
from harness.workspace import Workspace
root, stem, problem, config = sys.argv[1:]
kernel = Workspace(Path(root)).load_kernel(stem)
quicken()
asked, config = parse_problem(problem), json.loads(config)
proof = prove(kernel, stem, asked, config, seed=0)
verdict = gate(kernel, asked, config, seed=0, where="interpreter")
print(json.dumps({
    "gate": verdict.status, "status": proof.status, "oracles": dict(proof.oracles), "detail": proof.detail,
    "largest": dict(proof.largest), "case": proof.counterexample, "cases": proof.cases,
}))
"""


def prove(root: Path, stem: str) -> dict:
    problem = f"b1 h4/2 s4096 d16 fp16 causal {stem.removeprefix('flash_')}"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROVE, str(root), stem, problem, json.dumps(CONFIGS[stem])],
        env=environment, capture_output=True, text=True, timeout=300, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("stem", ["flash_fwd", "flash_bwd"])
def test_every_judge_that_can_is_asked_about_a_finalist(stem: str) -> None:
    found = prove(ROOT, stem)
    assert (found["status"], found["cases"], found["detail"]) == ("passed", 12, "")
    assert {"bound", "fp64", "shadow", "far", "agreement", "repeat", "memory", "negation", "strides"} <= set(
        found["oracles"]
    )
    assert len(found["oracles"]) > 20
    assert all(0 < ratio <= 1 for ratio in found["largest"].values())


def test_offsets_in_32_bits_pass_the_gate_and_not_the_proof(tmp_path: Path) -> None:
    for part in ("kernels", "search_spaces"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "kernels" / "primitives.py"
    source = path.read_text()
    assert ">= 1 << 31" in source
    path.write_text(source.replace(">= 1 << 31", ">= 1 << 63"))
    found = prove(tmp_path, "flash_fwd")
    assert (found["gate"], found["status"]) == ("passed", "wrong")
    assert found["detail"].startswith("far: ")
    assert found["case"]["kernel"] == "flash_fwd"
