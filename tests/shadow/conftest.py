"""Child processes: Triton decides between interpreter and compiler when it is imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def in_interpreter(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="session")
def child() -> Callable[..., subprocess.CompletedProcess[str]]:
    return in_interpreter


@pytest.fixture(scope="session")
def report() -> Callable[..., list[dict[str, Any]]]:
    """The JSON lines that a script prints in the interpreter."""

    def lines(script: str, *arguments: str) -> list[dict[str, Any]]:
        done = in_interpreter(script, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return lines
