"""A score function with a number: cap * tanh(score / cap), as in Gemma 2.

Run: TRITON_INTERPRET=1 python -m examples.tanh_softcap
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from examples.judging import report
from harness import inputs
from harness.problem import parse_problem
from kernels.attention import attention
from kernels.functions import register_functions

CAP = 2.0


@triton.jit
def tanh(x):
    shrunk = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def capped(x, batch, head, query, key, given):
    return given[0] * tanh(x / given[0])


@triton.jit
def slope_of_capped(x, batch, head, query, key, given):
    t = tanh(x / given[0])
    return 1.0 - t * t


register_functions("tanh softcap", score=capped, slope=slope_of_capped)


def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, causal=True, functions="tanh softcap", given=(CAP,), return_lse=True)


def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = CAP * torch.tanh(q @ k.mT / q.shape[-1] ** 0.5 / CAP)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def main() -> None:
    problem = parse_problem(f"b2 h2 s40 d16 bf16 causal softcap={CAP} bwd")
    report(problem, inputs.draw(problem, seed=1), ours, reference)


if __name__ == "__main__":
    main()
