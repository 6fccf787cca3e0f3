"""The public operation, in processes of its own, for the reason given in `tests/kernels/test_kernels.py`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ("dilated_window", "relative_bias", "tanh_softcap")
INTERPRETED = sorted(path.name for path in Path(__file__).parent.glob("interpreted_*.py"))
# Triton 3.6 turns arrays of one element into numbers in a way that numpy will not allow for ever.
QUIET = ("-W", "ignore:Conversion of an array with ndim:DeprecationWarning")
# Tiles are so small that threads would only wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def child(*command: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=kept | ONE_THREAD | environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name: str) -> None:
    ran = child(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", f"python_files={name}", f"tests/operation/{name}",
        *QUIET, TRITON_INTERPRET="1",
    )  # fmt: skip
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-6000:] + ran.stderr[-2000:]


def test_a_copy_of_the_folder_is_enough(tmp_path: Path) -> None:
    """Under another name, inside another package, where neither the harness nor the original can be found."""
    package = tmp_path / "library" / "attention_kernels"
    shutil.copytree(ROOT / "kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "library" / "__init__.py").touch()
    script = Path(__file__).parent / "uses_a_copy.py"
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    ran = child("-P", "-W", "error", *QUIET, str(script), str(ROOT), folder=tmp_path, **environment)
    assert ran.returncode == 0 and ran.stdout == "done\n", ran.stdout + ran.stderr[-3000:]


def test_without_a_gpu_and_without_the_interpreter() -> None:
    """Shapes are known everywhere; numbers are refused with a reason."""
    ran = child("-W", "error", "-m", "tests.operation.uses_no_gpu", PYTHONPATH=str(ROOT))
    assert ran.returncode == 0 and ran.stdout == "done\n", ran.stdout + ran.stderr[-3000:]


def test_examples_lie_within_their_bounds() -> None:
    """One after the other in one process, which has to import PyTorch once."""
    run = "import runpy, sys\nfor name in sys.argv[1:]: runpy.run_module(name, run_name='__main__')"
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    ran = child("-W", "error", *QUIET, "-c", run, *(f"examples.{name}" for name in EXAMPLES), **environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    said = re.findall(r"The largest error is 0\.\d\d of its derived bound \(.*\)\.\n", ran.stdout)
    assert "".join(said) == ran.stdout and len(said) == len(EXAMPLES), ran.stdout


def test_functions_of_the_caller_compile_for_a_gpu_that_is_not_here() -> None:
    ran = child("-W", "error", "-m", "tests.operation.compiled_functions", PYTHONPATH=str(ROOT))
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    assert len(found["compiled"]) == 2 + 2 * 3 and "no_such_function" in found["refused"], found
    assert not [kernel for kernel in found["compiled"] if kernel[2]], "spills"
