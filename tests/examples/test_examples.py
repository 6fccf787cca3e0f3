"""The examples, run as a person runs them, each in processes of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RING = ROOT / "examples" / "ring_attention.py"


def run(script: Path, root: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_ring_of_processes_attends_to_the_whole_sequence() -> None:
    done = run(RING, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "as near to the exact answer as it must be" in done.stdout
    (ratio,) = re.findall(r"largest error is ([\d.]+) of its bound", done.stdout)
    assert 0.05 < float(ratio) <= 1


def test_a_ring_that_turns_the_wrong_way_is_found_out(tmp_path: Path) -> None:
    """The comparison is not blind: here keys are taken for those of another rank."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "examples").mkdir()
    source = RING.read_text()
    right, wrong = "owner > rank:\n            continue  #", "owner < rank:\n            continue  #"
    assert source.count(right) == 1
    copy = tmp_path / "examples" / RING.name
    copy.write_text(source.replace(right, wrong))
    done = run(copy, tmp_path)
    assert done.returncode == 1
    assert "further from the exact answer than it may be" in done.stdout
