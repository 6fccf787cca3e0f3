"""A mask function with whole numbers: every third key of the last 24.

Run: TRITON_INTERPRET=1 python -m examples.dilated_window
The window itself is said to the kernels, so that they leave out whole blocks of keys; the function makes the gaps.
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

REACH, STEP = 24, 3


@triton.jit
def dilated(batch, head, query, key, given):
    return tl.abs(query - key) % given[0] == 0


register_functions("dilated", allowed=dilated)


def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, causal=True, window=(REACH, None), functions="dilated", given=(STEP,), return_lse=True)


def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen(q.shape[2]).to(q.device), -torch.inf)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def seen(length: int) -> Tensor:
    """Which key (column) each query (row) sees."""
    back = torch.arange(length)[:, None] - torch.arange(length)
    return (back >= 0) & (back <= REACH) & (back % STEP == 0)


def main() -> None:
    problem = parse_problem("b2 h2 s70 d16 bf16 mask=qk bwd")
    tensors = inputs.draw(problem, seed=1) | {"mask": seen(problem.q_len)[None, None]}
    report(problem, tensors, ours, reference)


if __name__ == "__main__":
    main()
