"""Compiles ahead what gate and proof launch on a device, then lets them launch it, and prints how often they had to compile.

Usage: python -m tests.compile.ahead KERNEL PROBLEM. Nothing is run: launches compile, on memory of the CPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

from triton import knobs

from harness import proof, verify
from harness.cases import kernel_subject, tensors_of
from harness.compile import compile_candidate, compile_gate, compiling_for
from harness.device import find_target
from harness.problem import parse_problem
from harness.workspace import Workspace


def main() -> None:
    """Count the compilations of each stage."""
    stem, problem, device = sys.argv[1], parse_problem(sys.argv[2]), find_target("h200")
    workspace = Workspace(Path(__file__).parents[2])
    kernel = workspace.load_kernel(stem)
    config = workspace.load_space(stem).default(problem, device)
    misses = 0

    def listen(**event: Any) -> None:
        nonlocal misses
        misses += not event["cache_hit"]

    knobs.compilation.listener = listen  # type: ignore[assignment]
    found: dict[str, int] = {}

    def counted(stage: str) -> None:
        nonlocal misses
        found[stage], misses = misses, 0

    compile_candidate(kernel, problem, config, device)
    counted("candidate")
    compile_gate(kernel, problem, config, device)
    counted("gate ahead")
    compiling = proof._Compiling(kernel)
    with compiling_for(device):
        verify.gate(compiling, problem, config, seed=0, where="device", device="cpu")
    counted("gate")
    position = 3
    proof.compile_case(kernel, stem, problem, config, 0, (position, device))
    counted("proof ahead")
    case = proof._cases(stem, problem, config, 0)[position]
    subject = kernel_subject(compiling, case)
    with compiling_for(device):
        # What the judge of the bound asks of every case, without the stand-in for a device.
        subject.run(case.asked, tensors_of(case))
    counted("proof")
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
