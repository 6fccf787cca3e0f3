"""The bounds against the stock kernels in Triton's interpreter: over a fixed campaign they are neither loose nor wrong.

usage, in the interpreter: test_bounds_kernels.py COUNT. JSON on stdout: the greatest error over bound by dtype and output.
"""

import importlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch

HERE = Path(__file__).parent
CONFIGS = {
    "fwd": {
        "block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1, "load": "pointer", "loops": "split",
        "masked_stages": 1, "head_order": "outer", "warp_specialize": False, "waves_per_eu": 0,
    },
    "bwd": {
        "dkdv_block_m": 16, "dkdv_block_n": 16, "dkdv_warps": 4, "dkdv_stages": 1, "dkdv_load": "pointer",
        "dq_block_m": 16, "dq_block_n": 32, "dq_warps": 4, "dq_stages": 1, "dq_load": "pointer", "waves_per_eu": 0,
    },
}  # fmt: skip


def worst_ratios(count: int) -> dict[str, float]:
    """Greatest error over bound by "dtype output", over `count` problems of each dtype and pass: small ones, in which so few
    numbers are rounded that some come near the worst case."""
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
    problems = importlib.import_module("test_bounds_emulated")
    from harness import bounds, compare, inputs, oracle
    from harness.quicken import quicken
    from harness.subject import KernelSubject

    quicken()

    found: dict[str, float] = defaultdict(float)
    for dtype in ("fp16", "bf16", "fp32"):
        for pass_, config in CONFIGS.items():
            subject = KernelSubject(kernel=importlib.import_module(f"kernels.flash_{pass_}"), config=config)
            contract = bounds.contract_for(dtype, key_block=16, where="interpreter")
            expect = bounds.expect_forward if pass_ == "fwd" else bounds.expect_backward
            for seed in range(count):
                problem = problems.random_problem(seed, dtype, pass_, small=True)
                values = inputs.draw(problem, seed=seed)
                expected = expect(problem, values, contract, structured=False)
                if pass_ == "bwd":
                    made = oracle.forward(problem, values)
                    values |= {"out": made["out"].to(inputs.DTYPES[dtype]), "lse": made["lse"].float()}
                for check in compare.judge(subject.run(problem, values).outputs, expected, case=str(problem)):
                    key = f"{dtype} {check.output}"
                    found[key] = max(found[key], check.ratio)
    return dict(found)


def test_the_bounds_of_the_stock_kernels_are_neither_loose_nor_wrong():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "40"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    ratios = json.loads(child.stdout)
    assert len(ratios) == 15
    assert all(0.1 < ratio < 1 for ratio in ratios.values()), ratios


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(worst_ratios(int(sys.argv[1]))))
