"""A score function that reads a tensor: one number per head and distance.

Run: TRITON_INTERPRET=1 python -m examples.relative_bias
Distances beyond REACH share the number of the farthest one. The table is not learned here: tensors of functions have no gradient.
A bias that is learned goes to `attention(bias=...)`, whose gradient the kernels compute.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from examples.judging import report
from harness import inputs
from harness.problem import Problem, parse_problem
from kernels.attention import attention
from kernels.functions import register_functions

REACH = 9


@triton.jit
def biased(x, batch, head, query, key, given):
    """given: the table (heads, 2 reach + 1), fp32 and contiguous, and reach."""
    table, reach = given
    distance = tl.minimum(tl.maximum(key - query, -reach), reach)
    return x + tl.load(table + head * (2 * reach + 1) + distance + reach)


@triton.jit
def slope_of_biased(x, batch, head, query, key, given):
    return tl.full(x.shape, 1.0, x.dtype)


register_functions("relative bias", score=biased, slope=slope_of_biased)


def main() -> None:
    problem = parse_problem("b2 h2 q40 k33 d16 bf16 bias=hqk bwd")
    table = torch.randn(problem.q_heads, 2 * REACH + 1, generator=torch.Generator().manual_seed(1))
    bias = spread(table, problem)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, functions="relative bias", given=(table.to(q.device), REACH), return_lse=True)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias.to(q.device)
        return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)

    report(problem, inputs.draw(problem, seed=1) | {"bias": bias}, ours, reference)


def spread(table: Tensor, problem: Problem) -> Tensor:
    """The table as a bias (1, heads, queries, keys)."""
    distance = torch.arange(problem.kv_len) - torch.arange(problem.q_len)[:, None]
    return table[:, distance.clamp(-REACH, REACH) + REACH][None]


if __name__ == "__main__":
    main()
