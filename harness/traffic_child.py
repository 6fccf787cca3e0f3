"""One run of a kernel, or of another implementation, between the marks that a profiler waits for: a process of its own.

Usage: python -m harness.traffic_child QUESTION, where QUESTION is a JSON object with `root`, `kernel`, `problem`, and `config`
(of ours) or `rival` (one of `harness.beside.RIVALS`). Refuses to measure anything itself.
"""

import json
import sys
from pathlib import Path

import torch

from harness import beside, timing
from harness.problem import parse_problem
from harness.workspace import Workspace


def main() -> None:
    """Run once to compile, then once between the marks."""
    asked = json.loads(sys.argv[1])
    problem = parse_problem(asked["problem"])
    kernel = Workspace(Path(asked["root"])).load_kernel(asked["kernel"])
    tensors = timing.tensors_on_device(problem, 0)
    run = beside.run_of(kernel, problem, tensors, asked.get("rival") or asked["config"])
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
