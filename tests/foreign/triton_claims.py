"""Run in the interpreter: the faults of a function that launches our forward kernel, or falls back.

usage: triton_claims.py launches|falls_back
"""

import sys

import torch
from implementations import ours

from harness.foreign import adapt
from harness.inputs import draw
from harness.problem import parse_problem
from kernels import flash_fwd

CONFIG = {
    "block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1, "load": "pointer", "loops": "single",
    "masked_stages": 1, "head_order": "outer", "warp_specialize": False, "waves_per_eu": 0,
}  # fmt: skip


def launches(q, k, v, **problem):
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32)
    for launch in flash_fwd.launches(q=q, k=k, v=v, out=out, lse=lse, **problem, **CONFIG):
        launch.run()
    return out, lse


def falls_back(q, k, v, **problem):
    return ours(q, k, v, **problem)


function = {"launches": launches, "falls_back": falls_back}[sys.argv[1]]
problem = parse_problem("b1 h2 s20 d16 fp32 causal fwd")
subject = adapt(function, "ours", ("triton", "fwd", "causal", "fp32", "lse"))
sys.stdout.write(f"{list(subject.run(problem, draw(problem, seed=0)).faults)}\n")
