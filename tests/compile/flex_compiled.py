"""FlexAttention's templates compiled for GPUs that are not here, as JSON. Run by `test_flex_compiled.py`."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from harness import inductor
from harness.compile import compile_candidate, compiled_launches, compiling_for
from harness.device import TARGETS
from harness.errors import MachineError
from harness.estimate import estimate
from harness.outcome import Artifact
from harness.problem import parse_problem
from harness.workspace import Workspace

WORKSPACE = Workspace(Path(__file__).parents[2])
ASKED = (
    ("flex_attention", "h200", "b1 h4/2 s1024 d64 bf16 causal fwd"),
    ("flex_attention", "a100", "b1 h4 s1000 d64 fp16 softcap=30.0 fwd"),
    ("flex_attention_bwd", "h200", "b1 h4/2 s1024 d64 bf16 causal bwd"),
)


def main() -> None:
    """Print what the binaries say, and what is said where PyTorch is not known."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"compiled": []}
    for stem, target, text in ASKED:
        kernel, device, problem = WORKSPACE.load_kernel(stem), TARGETS[target], parse_problem(text)
        config = WORKSPACE.load_space(stem).default(problem, device)
        artifact = compile_candidate(kernel, problem, config, device)
        assert isinstance(artifact, Artifact), artifact
        with compiling_for(device):
            launches = compiled_launches(kernel, problem, config, device)
        (binary,) = artifact.binaries
        found["compiled"].append({
            "kernel": binary.kernel, "spills": binary.spill_bytes, "loops": len(binary.loops), "grid": launches[0].grid,
            "steps": sum((*launches[0].steps.plain, *launches[0].steps.masked)), "matrix": binary.instructions.get("matrix", 0),
            "estimate": estimate(problem, launches, artifact, device).value_ms,
        })  # fmt: skip
    inductor.KNOWN = ("1.0",)  # type: ignore[misc, assignment]
    try:
        compile_candidate(kernel, problem, config, device)
    except MachineError as error:
        found["unknown"] = f"{error.message}; {error.hint}"
    unread = [
        compile_candidate(kernel, problem, one, device, unread=True) for one in (config, {**config, "num_stages": 1})
    ]
    found["unread"] = [[len(one.binaries), one.code_hash] for one in unread if isinstance(one, Artifact)]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
