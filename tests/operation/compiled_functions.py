"""Child of `test_operation.py`: compile functions of the caller for a GPU that is not here, and print as JSON
the kernels and their spills.

The functions are those of the examples, which register them when they are imported.
"""

import json
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from examples import dilated_window, relative_bias, tanh_softcap  # noqa: F401
from harness.compile import compile_candidate
from harness.device import TARGETS
from harness.outcome import Artifact
from harness.problem import parse_problem
from harness.workspace import find_workspace
from kernels.functions import apart, together
from kernels.variants import Functions

H200 = TARGETS["h200"]
TABLE = torch.empty(8, 2 * relative_bias.REACH + 1, device="meta")
JOBS = (
    ("fwd", "causal", "tanh softcap", (2.0,)),
    ("fwd", "", "relative bias", (TABLE, relative_bias.REACH)),
    ("bwd", "causal window=24", "dilated", (3,)),
    ("bwd", "", "relative bias", (TABLE, relative_bias.REACH)),
)


@triton.jit
def impossible(x, batch, head, query, key, given):
    return tl.no_such_function(x)


def main() -> None:
    workspace = find_workspace()
    found = []
    for pass_, words, name, given in JOBS:
        problem = parse_problem(f"b2 h8/2 s1000 d64 bf16 {words} {pass_}")
        stem = f"flash_{pass_}"
        kernel = with_functions(workspace.load_kernel(stem), together(name, apart(given)))
        config = workspace.load_space(stem).default(problem, H200)
        artifact = compile_candidate(kernel, problem, config, H200)
        if not isinstance(artifact, Artifact):
            raise SystemExit(f"{name}: {artifact}")
        found += [[name, binary.kernel, binary.spill_bytes] for binary in artifact.binaries]
    # Functions are really looked at: one that cannot be compiled is refused.
    kernel = with_functions(workspace.load_kernel("flash_fwd"), Functions(score=impossible))
    problem = parse_problem("b2 h8/2 s1000 d64 bf16 fwd")
    refused = compile_candidate(kernel, problem, workspace.load_space("flash_fwd").default(problem, H200), H200)
    sys.stdout.write(json.dumps({"compiled": found, "refused": refused.reason}))


def with_functions(kernel: ModuleType, functions: Functions) -> Any:
    return SimpleNamespace(launches=partial(kernel.launches, functions=functions), workspaces=kernel.workspaces)


main()
