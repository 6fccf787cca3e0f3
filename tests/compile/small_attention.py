"""A small attention kernel file, in the contract of `kernels`, so that compiling can be tested with nothing else here.

It is no subject of tuning: no windows, no grouped heads, lengths that the tiles divide. Refuses nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, Steps

PASS = "fwd"


@triton.jit
def _step(acc, total, top, q, k_ptrs, v_ptrs, start, rows, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    k = tl.load(k_ptrs)
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        columns = start + tl.arange(0, BLOCK_N)
        scores = tl.where(rows[:, None] >= columns[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.math.exp2(scores - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    acc = acc * shrink[:, None]
    v = tl.load(v_ptrs)
    acc = tl.dot(weights.to(v.dtype), v, acc)
    total = total * shrink + tl.sum(weights, 1)
    return acc, total, new_top


@triton.jit
def small_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    scale,
    length,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of one block of queries; tensors are contiguous (heads, length, HEAD_DIM)."""
    base = tl.program_id(1).to(tl.int64) * length * HEAD_DIM
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    columns = tl.arange(0, BLOCK_N)
    q = tl.load(q_ptr + base + rows[:, None] * HEAD_DIM + dims[None, :])
    q = (q * (scale * 1.4426950408889634)).to(q.dtype)
    k_ptrs = k_ptr + base + columns[:, None] * HEAD_DIM + dims[None, :]
    v_ptrs = v_ptr + base + columns[:, None] * HEAD_DIM + dims[None, :]
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    full = (tl.program_id(0) * BLOCK_M // BLOCK_N) * BLOCK_N if CAUSAL else length
    for start in tl.range(0, full, BLOCK_N):
        acc, total, top = _step(acc, total, top, q, k_ptrs, v_ptrs, start, rows, BLOCK_N, False)
        k_ptrs += BLOCK_N * HEAD_DIM
        v_ptrs += BLOCK_N * HEAD_DIM
    if CAUSAL:
        for start in tl.range(full, (tl.program_id(0) + 1) * BLOCK_M, BLOCK_N):
            acc, total, top = _step(acc, total, top, q, k_ptrs, v_ptrs, start, rows, BLOCK_N, True)
            k_ptrs += BLOCK_N * HEAD_DIM
            v_ptrs += BLOCK_N * HEAD_DIM
    acc = acc / total[:, None]
    tl.store(out_ptr + base + rows[:, None] * HEAD_DIM + dims[None, :], acc.to(out_ptr.dtype.element_ty))


def launches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    top_left: bool,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
) -> list[Launch]:
    """One launch over (blocks of queries, batch times heads)."""
    batch, heads, length, head_dim = q.shape
    causal = window_right == 0
    blocks = triton.cdiv(length, block_m)
    plain = [start * block_m // block_n if causal else triton.cdiv(length, block_n) for start in range(blocks)]
    masked = [triton.cdiv((start + 1) * block_m, block_n) - steps if causal else 0 for start, steps in enumerate(plain)]
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    return [
        Launch(
            kernel=small_forward,
            grid=(blocks, batch * heads, 1),
            args={"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "scale": scale, "length": length},
            constants={"HEAD_DIM": head_dim, "CAUSAL": causal, "BLOCK_M": block_m, "BLOCK_N": block_n},
            options=options,
            steps=Steps(plain=tuple(plain), masked=tuple(masked), flops_per_step=4 * block_m * block_n * head_dim),
        )
    ]


def workspaces(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """None are needed."""
    return {}
