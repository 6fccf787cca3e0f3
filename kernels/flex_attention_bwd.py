"""The gradients of attention as PyTorch's FlexAttention computes them, compiled with the `bwd_` options that a search may
choose.

See `flex_attention.py`. The out and lse that are given are not used: FlexAttention differentiates what its own forward pass,
with the options that PyTorch chooses, has computed; that pass is no part of the time. `block_m1` and `block_n1` are the tiles
of dk and dv, `block_m2` and `block_n2` those of dq.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .flex_attention import (
    Attention,
    check_shapes,
    check_tiles,
    compiled_once,
    differentiable,
    judged,
    triton_only,
)
from .launch import Call

PASS = "bwd"
FAMILY = "flex_attention"
UNSEEN = ("kernel_options", "BlockMask", "generated Triton code", "roundings", "races", "compiler")


def launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    slopes: Tensor | None = None, prefix: Tensor | None = None, q_documents: Tensor | None = None,
    kv_documents: Tensor | None = None, mask: Tensor | None = None,
    *, scale: float, window_left: int | None, window_right: int | None, top_left: bool, softcap: float | None = None,
    chunk: int | None = None,
    block_m1: int, block_n1: int, block_m2: int, block_n2: int, num_warps: int, num_stages: int, sparse: int,
) -> list[Call]:  # fmt: skip
    """The one call. Raises `ValueError` naming what FlexAttention does not do."""
    named = {
        "slopes": slopes, "prefix": prefix, "q_documents": q_documents, "kv_documents": kv_documents, "mask": mask,
    }  # fmt: skip
    given = {name: value for name, value in named.items() if value is not None}
    tensors = {"q": q, "k": k, "v": v, "dout": dout, **given}
    options = {
        "bwd_BLOCK_M1": block_m1, "bwd_BLOCK_N1": block_n1, "bwd_BLOCK_M2": block_m2, "bwd_BLOCK_N2": block_n2,
        "bwd_num_warps": num_warps, "bwd_num_stages": num_stages,
    }  # fmt: skip
    attention = Attention(
        scale=scale, left=window_left, right=window_right, offset=0 if top_left else k.shape[2] - q.shape[2],
        softcap=softcap, chunk=chunk, captured=tuple(given), options=triton_only(options), sparse=sparse, backward=True,
    )  # fmt: skip
    check_shapes(tensors)
    check_tiles(attention, queries=(block_m1, block_m2), keys=(block_n1, block_n2))
    if block_n1 % block_m1 or block_m2 % block_n2:
        raise ValueError(
            f"FlexAttention needs tiles with block_n1 % block_m1 == 0 and block_m2 % block_n2 == 0, found"
            f" {block_m1}, {block_n1} and {block_m2}, {block_n2}"
        )
    return [
        Call(
            outputs=(dq, dk, dv),
            results=lambda: judged(attention, tensors),
            prepared=lambda: _prepared(attention, tensors),
            subject=(attention, tensors),
        )
    ]


def workspaces(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, **more: Tensor
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """None: PyTorch allocates for itself."""
    return {}


def _prepared(attention: Attention, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """What is timed of a backward pass, on what one forward pass left."""
    block_mask = attention.block_mask(tensors, attention.band, attention.sparse)
    leaves, made = differentiable(compiled_once(), attention, tensors, attention.band, block_mask)
    dout = tensors["dout"]

    def run() -> None:
        torch.autograd.grad(made, leaves, dout, retain_graph=True)

    return run
