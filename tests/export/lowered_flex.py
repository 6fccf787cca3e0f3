"""What PyTorch's lowering does with options of FlexAttention on a pretended GPU, as one JSON object. Run by `test_flex.py`."""

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import inductor
from harness.compile import compiling_for, meta_launches
from harness.device import TARGETS
from harness.errors import RefusedError
from harness.problem import parse_problem
from harness.workspace import Workspace

DEVICE = TARGETS["h200"]
WORKSPACE = Workspace(Path(__file__).parents[2])
FWD, BWD = "b1 h4/2 s512 d64 bf16 causal fwd", "b1 h4/2 s512 d64 bf16 causal bwd"
LEGAL = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}


def lowered(text: str, options: Mapping[str, Any], *, sparse: int = 128) -> Any:
    """By template what it was given, or in words why there is none."""
    problem = parse_problem(text)
    stem = "flex_attention" if problem.pass_ == "fwd" else "flex_attention_bwd"
    config = WORKSPACE.load_space(stem).default(problem, DEVICE)
    (call,) = meta_launches(WORKSPACE.load_kernel(stem), problem, config, DEVICE)
    attention, tensors = call.subject
    changed = replace(attention, options=tuple(options.items()), sparse=sparse)
    try:
        with compiling_for(DEVICE):
            found = inductor.lowered((changed, tensors), DEVICE)
    except RefusedError as refusal:
        return refusal.message
    return {template.name: dict(template.given) for template in found}


def main() -> None:
    """Print the answers."""
    warnings.simplefilter("ignore")
    answers = {
        "256 queries": lowered(FWD, {"fwd_BLOCK_M": 256}),
        "256 keys": lowered(FWD, {"fwd_BLOCK_N": 256}),
        "256 queries in blocks of 256": lowered(FWD, {"fwd_BLOCK_M": 256, "fwd_num_warps": 8}, sparse=256),
        "both passes": lowered(BWD, {**LEGAL, "fwd_num_warps": 2, "bwd_num_warps": 8}),
        "no prefix": lowered(BWD, {**LEGAL, "num_warps": 2}),
        "tiles that do not fit": lowered(BWD, {**LEGAL, "bwd_BLOCK_M1": 128}),
        "blocks of 64": lowered(BWD, {**LEGAL, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}, sparse=64),
        "forbidden": lowered(FWD, {"OUTPUT_LOGSUMEXP": True}),
    }
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
