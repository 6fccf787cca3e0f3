"""Gradients of attention: dq, dk and dv from dout, without storing the attention matrix.

FlashAttention-2 (Dao 2023, algorithm 2) in two or three launches, of themselves without atomic operations, so that equal inputs
give equal bits.
First two numbers per row, delta = rowsum(dout * out) and the log-sum-exp to base 2. A gradient of the log-sum-exp, dlse, is
taken from delta, as d lse = sum_j p_j d s_j. Then dk and dv, a program per key block
that loops over the query heads of its group and the query blocks that see it. Then dq, a program per query block. These two
may be one launch, so that no multiprocessor waits for the last tile of keys before it begins with queries. Both
recompute p = exp(scale * q k^T - lse). Where the caller allows bits to change from run to run, the program of a key block may
add its share of dq to sums in memory instead, in an order that nobody knows, and nothing is computed twice. As in the forward
pass, blocks inside the band run without a mask and blocks outside it are not visited. The gradients of a bias and of sinks, if
asked for, are one more launch each: a program per tile of the bias, which adds up what all pairs under it give, and a program
per sink. Refuses second derivatives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from . import primitives, variants
from .launch import Launch, Steps
from .primitives import (
    Band,
    band_blocks,
    base_two,
    load_tile,
    masked_block,
    product,
    program_row,
    rounded,
    store_tile,
    tile_at_zero,
    visible,
    widened,
)
from .variants import (
    Functions,
    Variant,
    bounds_of,
    changed_scores,
    kept,
    key_blocks,
    narrowed,
    query_blocks,
    sequence_of,
    sink_of,
    through_scores,
)

PASS = "bwd"

# Rows per program of the first launch: it only streams, so this is not worth a search.
_SUM_STRIDES = ("stride_dq_sum_batch", "stride_dq_sum_head", "stride_dq_sum_row")
_STREAMED_ROWS = 32
_SINK_ROWS = 256
# What a block needs at least of shared memory where heads are wider than 512 (tiles of 16 rows, read in binaries for NVIDIA).
WIDEST_BYTES = 112 << 10

_LOG2_E = tl.constexpr(primitives.LOG2_E)


@triton.jit(do_not_specialize=["q_len", "rows", "q_heads"])
def flash_bwd_rows_kernel(
    out, dout, lse, delta, lse_two,
    stride_out_batch, stride_out_head, stride_out_row, stride_out_col,
    stride_dout_batch, stride_dout_head, stride_dout_row, stride_dout_col,
    stride_lse_batch, stride_lse_head, stride_lse_row,
    stride_delta_batch, stride_delta_head, stride_delta_row,
    stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row,
    dlse, stride_dlse_batch, stride_dlse_head, stride_dlse_row,
    dq_sum, stride_dq_sum_batch, stride_dq_sum_head, stride_dq_sum_row,
    q_len, q_heads, rows,
    V_HEAD_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, FOLDED: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, and lse to base 2 with +inf for empty rows, of BLOCK_M queries of one head; and zeros,
    where sums of dq begin."""
    # Position
    head_row = program_row(rows, FOLDED)
    batch = (head_row // q_heads).to(tl.int64)
    head = (head_row % q_heads).to(tl.int64)
    start_m = tl.program_id(0) * BLOCK_M
    row = start_m + tl.arange(0, BLOCK_M)

    # Load
    out_base = out + batch * stride_out_batch + head * stride_out_head
    dout_base = dout + batch * stride_dout_batch + head * stride_dout_head
    out_at = tile_at_zero(out_base, q_len, stride_out_row, stride_out_col, V_HEAD_DIM, BLOCK_M, BLOCK_DV, False, WIDE)
    dout_at = tile_at_zero(dout_base, q_len, stride_dout_row, stride_dout_col, V_HEAD_DIM, BLOCK_M, BLOCK_DV, False, WIDE)
    o = load_tile(out_at, start_m, q_len, stride_out_row, V_HEAD_DIM, BLOCK_M, BLOCK_DV, True, False)
    do = load_tile(dout_at, start_m, q_len, stride_dout_row, V_HEAD_DIM, BLOCK_M, BLOCK_DV, True, False)

    # Accumulate
    total = tl.sum(widened(o, ACC) * widened(do, ACC), 1)
    row = row.to(tl.int64)
    lse_at = lse + batch * stride_lse_batch + head * stride_lse_head + row * stride_lse_row
    natural = tl.load(lse_at, mask=row < q_len, other=0.0)
    if dlse is not None:
        dlse_at = dlse + batch * stride_dlse_batch + head * stride_dlse_head + row * stride_dlse_row
        # An empty row depends on nothing, whatever comes back to its -inf.
        total = total - tl.load(dlse_at, mask=(row < q_len) & (natural != float("-inf")), other=0.0).to(ACC)

    # Store
    delta_at = delta + batch * stride_delta_batch + head * stride_delta_head + row * stride_delta_row
    lse_two_at = lse_two + batch * stride_lse_two_batch + head * stride_lse_two_head + row * stride_lse_two_row
    tl.store(delta_at, total.to(delta.dtype.element_ty), mask=row < q_len)
    tl.store(lse_two_at, base_two(natural).to(lse_two.dtype.element_ty), mask=row < q_len)
    if dq_sum is not None:
        nothing = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
        dq_sum_base = dq_sum + batch * stride_dq_sum_batch + head * stride_dq_sum_head
        store_tile(nothing, dq_sum_base, start_m, q_len, stride_dq_sum_row, 1, HEAD_DIM, BLOCK_M, BLOCK_D, WIDE)


@triton.jit
def _member_tiles_at_zero(
    base, group, length, stride_head, stride_row, stride_col, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, GROUPED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`tile_at_zero` of the first member of a group; a descriptor covers all members."""
    if GROUPED and TMA:
        at_zero = tl.make_tensor_descriptor(
            base, [group, length, COLS], [stride_head, stride_row, 1], [1, BLOCK_ROWS, BLOCK_COLS]
        )
    else:
        at_zero = tile_at_zero(base, length, stride_row, stride_col, COLS, BLOCK_ROWS, BLOCK_COLS, TMA, WIDE)
    return at_zero


@triton.jit
def _load_member_tile(
    at_zero, member, start, length, stride_head, stride_row, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, CHECK_ROWS: tl.constexpr, GROUPED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`load_tile` from one member of a group."""
    if GROUPED and TMA:
        tile = at_zero.load([member, start, 0]).reshape(BLOCK_ROWS, BLOCK_COLS)
    elif GROUPED:
        at_member = at_zero + tl.cast(member, tl.int64) * stride_head
        tile = load_tile(at_member, start, length, stride_row, COLS, BLOCK_ROWS, BLOCK_COLS, CHECK_ROWS, TMA)
    else:
        tile = load_tile(at_zero, start, length, stride_row, COLS, BLOCK_ROWS, BLOCK_COLS, CHECK_ROWS, TMA)
    return tile


@triton.jit
def _member_and_index(i, count, GROUPED: tl.constexpr):
    """Step i of a walk over `count` blocks of every member of a group."""
    member = 0
    index = i
    if GROUPED:
        member = i // count
        index = i - member * count
    return member, index


@triton.jit
def _gather_dkdv(
    k, v, dk, dv, q_at, do_at, lse_base, delta_base, member, start, key, scale, q_len, kv_len, offset, left, right,
    variant, batch, first_head, q_first, kv_first,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    stride_q_head, stride_q_row, stride_dout_head, stride_dout_row,
    stride_lse_head, stride_lse_row, stride_delta_head, stride_delta_row,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, GROUPED: tl.constexpr, TMA: tl.constexpr, dq_sum_base, stride_dq_sum_head, stride_dq_sum_row,
):  # fmt: skip
    """What queries start... of one head of the group add to (dk, dv); scores lie transposed, keys by queries. What the keys add
    to dq goes to its sums, if there are any."""
    CHECK: tl.constexpr = MASKED and not EVEN
    query = start + tl.arange(0, BLOCK_M)

    # Load
    q = _load_member_tile(
        q_at, member, start, q_len, stride_q_head, stride_q_row, HEAD_DIM, BLOCK_M, BLOCK_D, CHECK, GROUPED, TMA
    )
    whole_member = tl.cast(member, tl.int64)
    lse_at = lse_base + whole_member * stride_lse_head + query.to(tl.int64) * stride_lse_row
    delta_at = delta_base + whole_member * stride_delta_head + query.to(tl.int64) * stride_delta_row
    if CHECK:
        lse = tl.load(lse_at, mask=query < q_len, other=float("inf"))
        delta = tl.load(delta_at, mask=query < q_len, other=0.0)
    else:
        lse = tl.load(lse_at)
        delta = tl.load(delta_at)

    # Score
    s = product(k, tl.trans(q), tl.zeros([k.shape[0], BLOCK_M], dtype=dk.dtype)) * scale
    head = first_head + member
    if CHANGED:
        s, before, tangent = changed_scores(
            s, variant, batch, head, query[None, :], key[:, None], -offset, q_len, kv_len, SCORE
        )  # fmt: skip
        s = s * _LOG2_E
    s = s - lse[None, :]

    # Mask
    if MASKED:
        seen = visible(key[:, None], query[None, :], offset, left, right, q_len, HAS_LEFT, HAS_RIGHT, EVEN)
        if FREE:
            seen = narrowed(
                seen, variant, batch, head, query[None, :], key[:, None], -offset, q_len, kv_len, q_first, kv_first, ALLOWED
            )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))

    # Softmax
    p = tl.exp2(s)

    # Accumulate
    do = _load_member_tile(
        do_at, member, start, q_len, stride_dout_head, stride_dout_row, V_HEAD_DIM, BLOCK_M, BLOCK_DV, CHECK, GROUPED, TMA
    )
    used = p
    if variant.seed is not None:
        keep = kept(variant, batch, head, query[None, :] + q_first, key[:, None] + kv_first)
        used = tl.where(keep, p * variant.kept_scale, 0.0)
    dv = product(rounded(used, do.dtype), do, dv)
    dp = product(v, tl.trans(do), tl.zeros([k.shape[0], BLOCK_M], dtype=dk.dtype))
    if variant.seed is not None:
        dp = tl.where(keep, dp * variant.kept_scale, 0.0)
    ds = p * (dp - delta[None, :])
    if CHANGED:
        _, ds = through_scores(ds, before, tangent, variant, batch, head, query[None, :], key[:, None], SLOPE)
    dk = product(rounded(ds, q.dtype), q, dk)
    if dq_sum_base is not None:
        # Keys beyond the last one give dk rows that nobody stores; here their weights, which may be infinite, would meet zeros.
        ds = tl.where((key < kv_len)[:, None], ds, 0.0)
        share = product(tl.trans(rounded(ds, k.dtype)), k, tl.zeros([BLOCK_M, BLOCK_D], dtype=dk.dtype))
        column = tl.arange(0, BLOCK_D)
        dq_sum_at = dq_sum_base + whole_member * stride_dq_sum_head + query.to(tl.int64)[:, None] * stride_dq_sum_row
        inside = (query < q_len)[:, None] & (column < HEAD_DIM)[None, :]
        tl.atomic_add(dq_sum_at + column[None, :], share, mask=inside, sem="relaxed")
    return dk, dv


@triton.jit
def _dkdv_tile(
    position, blocks, head_row,
    q, k, v, lse_two, dout, delta, dk, dv,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row,
    stride_dout_batch, stride_dout_head, stride_dout_row, stride_dout_col,
    stride_delta_batch, stride_delta_head, stride_delta_row,
    stride_dk_batch, stride_dk_head, stride_dk_row, stride_dk_col,
    stride_dv_batch, stride_dv_head, stride_dv_row, stride_dv_col,
    scale, natural_scale, q_len, kv_len, offset, left, right, kv_heads, group, variant,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, REVERSED: tl.constexpr, GROUPED: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
    dq_sum=None, stride_dq_sum_batch=None, stride_dq_sum_head=None, stride_dq_sum_row=None,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one head: the tile at `position` of `blocks` in `head_row`. The band is that of keys (rows)
    and queries (columns). `lse_two` is to base 2, as `scale` is unless scores are CHANGED. `dq_sum`, if given, gets what these
    keys add to dq, before the scale."""
    # Position: heavy blocks first.
    if REVERSED:
        position = blocks - 1 - position
    batch = (head_row // kv_heads).to(tl.int64)
    kv_head = (head_row % kv_heads).to(tl.int64)
    q_first = 0
    kv_first = 0
    if variant.kv_starts is not None:
        sequence, position = sequence_of(
            variant.kv_starts, variant.sequences, variant.search_steps, position, BLOCK_N
        )  # fmt: skip
        q_first, q_len = bounds_of(variant.q_starts, sequence)
        kv_first, kv_len = bounds_of(variant.kv_starts, sequence)
        offset = 0
        if variant.bottom_right is not None:
            offset = q_len - kv_len
    start_n = position * BLOCK_N
    key = start_n + tl.arange(0, BLOCK_N)

    # Load
    k_base = k + batch * stride_k_batch + kv_head * stride_k_head + tl.cast(kv_first, tl.int64) * stride_k_row
    v_base = v + batch * stride_v_batch + kv_head * stride_v_head + tl.cast(kv_first, tl.int64) * stride_v_row
    k_at = tile_at_zero(k_base, kv_len, stride_k_row, stride_k_col, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, WIDE)
    v_at = tile_at_zero(v_base, kv_len, stride_v_row, stride_v_col, V_HEAD_DIM, BLOCK_N, BLOCK_DV, TMA, WIDE)
    k_tile = load_tile(k_at, start_n, kv_len, stride_k_row, HEAD_DIM, BLOCK_N, BLOCK_D, True, TMA)
    v_tile = load_tile(v_at, start_n, kv_len, stride_v_row, V_HEAD_DIM, BLOCK_N, BLOCK_DV, True, TMA)
    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_DV], dtype=ACC)

    # Gather
    last_key = tl.minimum(start_n + BLOCK_N, kv_len) - 1
    first, plain_first, plain_last, last = band_blocks(
        start_n, last_key, offset, left, right, q_len, BLOCK_M, HAS_LEFT, HAS_RIGHT
    )
    # One walk over all heads of the group, not a loop in a loop: blocks of the next head arrive during the last ones of
    # this head, and fewer numbers are kept in registers.
    head = kv_head * group
    q_base = q + batch * stride_q_batch + head * stride_q_head + tl.cast(q_first, tl.int64) * stride_q_row
    do_base = dout + batch * stride_dout_batch + head * stride_dout_head + tl.cast(q_first, tl.int64) * stride_dout_row
    lse_base = lse_two + batch * stride_lse_two_batch + head * stride_lse_two_head
    lse_base += tl.cast(q_first, tl.int64) * stride_lse_two_row
    delta_base = delta + batch * stride_delta_batch + head * stride_delta_head + tl.cast(q_first, tl.int64) * stride_delta_row
    dq_sum_base = None
    if dq_sum is not None:
        dq_sum_base = dq_sum + batch * stride_dq_sum_batch + head * stride_dq_sum_head
        dq_sum_base += tl.cast(q_first, tl.int64) * stride_dq_sum_row
    q_at = _member_tiles_at_zero(
        q_base, group, q_len, stride_q_head, stride_q_row, stride_q_col, HEAD_DIM, BLOCK_M, BLOCK_D, GROUPED, TMA, WIDE
    )
    do_at = _member_tiles_at_zero(
        do_base, group, q_len, stride_dout_head, stride_dout_row, stride_dout_col, V_HEAD_DIM, BLOCK_M, BLOCK_DV,
        GROUPED, TMA, WIDE,
    )  # fmt: skip
    if FREE:
        first, last = query_blocks(first, last, start_n, last_key, variant, batch, -offset, q_len, BLOCK_M)
        plain_first = first
        plain_last = first
    plain = plain_last - plain_first
    for i in tl.range(0, group * plain, num_stages=STAGES):
        member, index = _member_and_index(i, plain, GROUPED)
        dk_sum, dv_sum = _gather_dkdv(
            k_tile, v_tile, dk_sum, dv_sum, q_at, do_at, lse_base, delta_base, member, (plain_first + index) *
            BLOCK_M, key, scale, q_len, kv_len, offset, left, right, variant, batch, head, q_first, kv_first, SCORE,
            SLOPE, ALLOWED, CHANGED, FREE, stride_q_head, stride_q_row, stride_dout_head, stride_dout_row,
            stride_lse_two_head, stride_lse_two_row, stride_delta_head, stride_delta_row, HEAD_DIM, V_HEAD_DIM,
            BLOCK_M, BLOCK_D, BLOCK_DV, False, HAS_LEFT, HAS_RIGHT, EVEN, GROUPED, TMA, dq_sum_base, stride_dq_sum_head,
            stride_dq_sum_row,
        )  # fmt: skip
    if HAS_LEFT or HAS_RIGHT or FREE or not EVEN:
        masked = last - first - plain
        for i in tl.range(0, group * masked, num_stages=STAGES):
            member, index = _member_and_index(i, masked, GROUPED)
            block = masked_block(index, first, plain_first, plain_last, HAS_LEFT)
            dk_sum, dv_sum = _gather_dkdv(
                k_tile, v_tile, dk_sum, dv_sum, q_at, do_at, lse_base, delta_base, member, block * BLOCK_M, key,
                scale, q_len, kv_len, offset, left, right, variant, batch, head, q_first, kv_first, SCORE, SLOPE,
                ALLOWED, CHANGED, FREE, stride_q_head, stride_q_row, stride_dout_head, stride_dout_row,
                stride_lse_two_head, stride_lse_two_row, stride_delta_head, stride_delta_row, HEAD_DIM, V_HEAD_DIM,
                BLOCK_M, BLOCK_D, BLOCK_DV, True, HAS_LEFT, HAS_RIGHT, EVEN, GROUPED, TMA, dq_sum_base,
                stride_dq_sum_head, stride_dq_sum_row,
            )  # fmt: skip

    # Store
    dk_base = dk + batch * stride_dk_batch + kv_head * stride_dk_head + tl.cast(kv_first, tl.int64) * stride_dk_row
    dv_base = dv + batch * stride_dv_batch + kv_head * stride_dv_head + tl.cast(kv_first, tl.int64) * stride_dv_row
    dk_sum = dk_sum * natural_scale
    store_tile(dk_sum, dk_base, start_n, kv_len, stride_dk_row, stride_dk_col, HEAD_DIM, BLOCK_N, BLOCK_D, WIDE)
    store_tile(dv_sum, dv_base, start_n, kv_len, stride_dv_row, stride_dv_col, V_HEAD_DIM, BLOCK_N, BLOCK_DV, WIDE)


@triton.jit(do_not_specialize=["q_len", "kv_len", "offset", "left", "right", "rows", "kv_heads"])
def flash_bwd_dkdv_kernel(
    q, k, v, lse_two, dout, delta, dk, dv,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row,
    stride_dout_batch, stride_dout_head, stride_dout_row, stride_dout_col,
    stride_delta_batch, stride_delta_head, stride_delta_row,
    stride_dk_batch, stride_dk_head, stride_dk_row, stride_dk_col,
    stride_dv_batch, stride_dv_head, stride_dv_row, stride_dv_col,
    scale, natural_scale, q_len, kv_len, offset, left, right, kv_heads, group, rows, variant,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, REVERSED: tl.constexpr, FOLDED: tl.constexpr, GROUPED: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
    dq_sum=None, stride_dq_sum_batch=None, stride_dq_sum_head=None, stride_dq_sum_row=None,
):  # fmt: skip
    """A tile of keys for each program."""
    _dkdv_tile(
        tl.program_id(0), tl.num_programs(0), program_row(rows, FOLDED),
        q, k, v, lse_two, dout, delta, dk, dv, stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
        stride_k_batch, stride_k_head, stride_k_row, stride_k_col, stride_v_batch, stride_v_head, stride_v_row,
        stride_v_col, stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row, stride_dout_batch,
        stride_dout_head, stride_dout_row, stride_dout_col, stride_delta_batch, stride_delta_head, stride_delta_row,
        stride_dk_batch, stride_dk_head, stride_dk_row, stride_dk_col, stride_dv_batch, stride_dv_head, stride_dv_row,
        stride_dv_col, scale, natural_scale, q_len, kv_len, offset, left, right, kv_heads, group, variant, SCORE,
        SLOPE, ALLOWED, CHANGED, FREE, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT,
        EVEN, REVERSED, GROUPED, TMA, WIDE, STAGES, ACC, dq_sum, stride_dq_sum_batch, stride_dq_sum_head, stride_dq_sum_row,
    )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "rows", "q_heads"])
def flash_bwd_dq_cast_kernel(
    dq_sum, dq,
    stride_dq_sum_batch, stride_dq_sum_head, stride_dq_sum_row,
    stride_dq_batch, stride_dq_head, stride_dq_row, stride_dq_col,
    natural_scale, q_len, q_heads, rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FOLDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq from its sums: BLOCK_M queries of one head."""
    head_row = program_row(rows, FOLDED)
    batch = (head_row // q_heads).to(tl.int64)
    head = (head_row % q_heads).to(tl.int64)
    start_m = tl.program_id(0) * BLOCK_M
    sum_base = dq_sum + batch * stride_dq_sum_batch + head * stride_dq_sum_head
    sum_at = tile_at_zero(sum_base, q_len, stride_dq_sum_row, 1, HEAD_DIM, BLOCK_M, BLOCK_D, False, WIDE)
    total = load_tile(sum_at, start_m, q_len, stride_dq_sum_row, HEAD_DIM, BLOCK_M, BLOCK_D, True, False)
    own_base = dq + batch * stride_dq_batch + head * stride_dq_head
    store_tile(
        total * natural_scale, own_base, start_m, q_len, stride_dq_row, stride_dq_col, HEAD_DIM, BLOCK_M, BLOCK_D, WIDE
    )  # fmt: skip


@triton.jit
def _score_slopes(
    q, k, v, do, lse, delta, query, key, scale, q_len, kv_len, offset, left, right, variant, batch, head, q_first,
    kv_first, SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE:
    tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of scores, queries by keys: of what a bias is added to, and of the scaled products."""
    # Score
    s = product(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], dtype=lse.dtype)) * scale
    if CHANGED:
        s, before, tangent = changed_scores(
            s, variant, batch, head, query[:, None], key[None, :], offset, q_len, kv_len, SCORE
        )  # fmt: skip
        s = s * _LOG2_E
    s = s - lse[:, None]

    # Mask
    if MASKED:
        seen = visible(query[:, None], key[None, :], offset, left, right, kv_len, HAS_LEFT, HAS_RIGHT, EVEN)
        if FREE:
            seen = narrowed(
                seen, variant, batch, head, query[:, None], key[None, :], offset, q_len, kv_len, q_first, kv_first, ALLOWED
            )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))

    # Softmax
    p = tl.exp2(s)

    # Slopes
    dp = product(do, tl.trans(v), tl.zeros([q.shape[0], k.shape[0]], dtype=lse.dtype))
    if variant.seed is not None:
        keep = kept(variant, batch, head, query[:, None] + q_first, key[None, :] + kv_first)
        dp = tl.where(keep, dp * variant.kept_scale, 0.0)
    ds = p * (dp - delta[:, None])
    added = ds
    if CHANGED:
        added, ds = through_scores(ds, before, tangent, variant, batch, head, query[:, None], key[None, :], SLOPE)
    return added, ds


@triton.jit
def _gather_dq(
    q, do, lse, delta, dq, k_at, v_at, start, query, scale, q_len, kv_len, offset, left, right, stride_k_row,
    stride_v_row, variant, batch, head, q_first, kv_first,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EVEN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """What keys start... start + BLOCK_N add to dq."""
    CHECK: tl.constexpr = MASKED and not EVEN

    # Load
    k = load_tile(k_at, start, kv_len, stride_k_row, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK, TMA)
    v = load_tile(v_at, start, kv_len, stride_v_row, V_HEAD_DIM, BLOCK_N, BLOCK_DV, CHECK, TMA)

    key = start + tl.arange(0, BLOCK_N)
    _, ds = _score_slopes(
        q, k, v, do, lse, delta, query, key, scale, q_len, kv_len, offset, left, right, variant, batch, head, q_first,
        kv_first, SCORE, SLOPE, ALLOWED, CHANGED, FREE, MASKED, HAS_LEFT, HAS_RIGHT, EVEN,
    )  # fmt: skip
    return product(rounded(ds, k.dtype), k, dq)


@triton.jit
def _dq_tile(
    position, blocks, head_row,
    q, k, v, lse_two, dout, delta, dq,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row,
    stride_dout_batch, stride_dout_head, stride_dout_row, stride_dout_col,
    stride_delta_batch, stride_delta_head, stride_delta_row,
    stride_dq_batch, stride_dq_head, stride_dq_row, stride_dq_col,
    scale, natural_scale, q_len, kv_len, offset, left, right, q_heads, group, variant,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, REVERSED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head: the tile at `position` of `blocks` in `head_row`. `lse_two` is to base 2, as `scale` is
    unless scores are CHANGED."""
    # Position: heavy blocks first.
    if REVERSED:
        position = blocks - 1 - position
    batch = (head_row // q_heads).to(tl.int64)
    head = head_row % q_heads
    kv_head = (head // group).to(tl.int64)
    head = head.to(tl.int64)
    q_first = 0
    kv_first = 0
    if variant.q_starts is not None:
        sequence, position = sequence_of(
            variant.q_starts, variant.sequences, variant.search_steps, position, BLOCK_M
        )  # fmt: skip
        q_first, q_len = bounds_of(variant.q_starts, sequence)
        kv_first, kv_len = bounds_of(variant.kv_starts, sequence)
        offset = 0
        if variant.bottom_right is not None:
            offset = kv_len - q_len
    start_m = position * BLOCK_M
    query = start_m + tl.arange(0, BLOCK_M)

    # Load
    q_base = q + batch * stride_q_batch + head * stride_q_head + tl.cast(q_first, tl.int64) * stride_q_row
    do_base = dout + batch * stride_dout_batch + head * stride_dout_head + tl.cast(q_first, tl.int64) * stride_dout_row
    k_base = k + batch * stride_k_batch + kv_head * stride_k_head + tl.cast(kv_first, tl.int64) * stride_k_row
    v_base = v + batch * stride_v_batch + kv_head * stride_v_head + tl.cast(kv_first, tl.int64) * stride_v_row
    q_at = tile_at_zero(q_base, q_len, stride_q_row, stride_q_col, HEAD_DIM, BLOCK_M, BLOCK_D, TMA, WIDE)
    do_at = tile_at_zero(do_base, q_len, stride_dout_row, stride_dout_col, V_HEAD_DIM, BLOCK_M, BLOCK_DV, TMA, WIDE)
    k_at = tile_at_zero(k_base, kv_len, stride_k_row, stride_k_col, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, WIDE)
    v_at = tile_at_zero(v_base, kv_len, stride_v_row, stride_v_col, V_HEAD_DIM, BLOCK_N, BLOCK_DV, TMA, WIDE)
    q_tile = load_tile(q_at, start_m, q_len, stride_q_row, HEAD_DIM, BLOCK_M, BLOCK_D, True, TMA)
    do_tile = load_tile(do_at, start_m, q_len, stride_dout_row, V_HEAD_DIM, BLOCK_M, BLOCK_DV, True, TMA)
    row = (query + q_first).to(tl.int64)
    lse_at = lse_two + batch * stride_lse_two_batch + head * stride_lse_two_head + row * stride_lse_two_row
    delta_at = delta + batch * stride_delta_batch + head * stride_delta_head + row * stride_delta_row
    lse_row = tl.load(lse_at, mask=query < q_len, other=float("inf"))
    delta_row = tl.load(delta_at, mask=query < q_len, other=0.0)
    dq_sum = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)

    # Gather
    last_row = tl.minimum(start_m + BLOCK_M, q_len) - 1
    first, plain_first, plain_last, last = band_blocks(
        start_m, last_row, offset, left, right, kv_len, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if FREE:
        first, last = key_blocks(first, last, start_m, last_row, variant, batch, offset, kv_len, BLOCK_N)
        plain_first = first
        plain_last = first
    for block in tl.range(plain_first, plain_last, num_stages=STAGES):
        dq_sum = _gather_dq(
            q_tile, do_tile, lse_row, delta_row, dq_sum, k_at, v_at, block * BLOCK_N, query, scale, q_len, kv_len,
            offset, left, right, stride_k_row, stride_v_row, variant, batch, head, q_first, kv_first, SCORE, SLOPE,
            ALLOWED, CHANGED, FREE, HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False, HAS_LEFT, HAS_RIGHT,
            EVEN, TMA,
        )  # fmt: skip
    if HAS_LEFT or HAS_RIGHT or FREE or not EVEN:
        for i in tl.range(0, plain_first - first + last - plain_last, num_stages=STAGES):
            block = masked_block(i, first, plain_first, plain_last, HAS_LEFT)
            dq_sum = _gather_dq(
                q_tile, do_tile, lse_row, delta_row, dq_sum, k_at, v_at, block * BLOCK_N, query, scale, q_len, kv_len,
                offset, left, right, stride_k_row, stride_v_row, variant, batch, head, q_first, kv_first, SCORE,
                SLOPE, ALLOWED, CHANGED, FREE, HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_LEFT,
                HAS_RIGHT, EVEN, TMA,
            )  # fmt: skip

    # Store
    dq_base = dq + batch * stride_dq_batch + head * stride_dq_head + tl.cast(q_first, tl.int64) * stride_dq_row
    dq_sum = dq_sum * natural_scale
    store_tile(dq_sum, dq_base, start_m, q_len, stride_dq_row, stride_dq_col, HEAD_DIM, BLOCK_M, BLOCK_D, WIDE)


@triton.jit(do_not_specialize=["q_len", "kv_len", "offset", "left", "right", "rows", "q_heads"])
def flash_bwd_dq_kernel(
    q, k, v, lse_two, dout, delta, dq,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row,
    stride_dout_batch, stride_dout_head, stride_dout_row, stride_dout_col,
    stride_delta_batch, stride_delta_head, stride_delta_row,
    stride_dq_batch, stride_dq_head, stride_dq_row, stride_dq_col,
    scale, natural_scale, q_len, kv_len, offset, left, right, q_heads, group, rows, variant,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, REVERSED: tl.constexpr, FOLDED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of queries for each program."""
    _dq_tile(
        tl.program_id(0), tl.num_programs(0), program_row(rows, FOLDED),
        q, k, v, lse_two, dout, delta, dq, stride_q_batch, stride_q_head, stride_q_row, stride_q_col, stride_k_batch,
        stride_k_head, stride_k_row, stride_k_col, stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
        stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row, stride_dout_batch, stride_dout_head,
        stride_dout_row, stride_dout_col, stride_delta_batch, stride_delta_head, stride_delta_row, stride_dq_batch,
        stride_dq_head, stride_dq_row, stride_dq_col, scale, natural_scale, q_len, kv_len, offset, left, right,
        q_heads, group, variant, SCORE, SLOPE, ALLOWED, CHANGED, FREE, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV,
        BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, EVEN, REVERSED, TMA, WIDE, STAGES, ACC,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["q_len", "kv_len", "offset", "left", "right", "rows", "kv_heads", "key_blocks", "query_blocks"]
)
def flash_bwd_fused_kernel(
    q, k, v, lse_two, dout, delta, dk, dv, dq,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row,
    stride_dout_batch, stride_dout_head, stride_dout_row, stride_dout_col,
    stride_delta_batch, stride_delta_head, stride_delta_row,
    stride_dk_batch, stride_dk_head, stride_dk_row, stride_dk_col,
    stride_dv_batch, stride_dv_head, stride_dv_row, stride_dv_col,
    stride_dq_batch, stride_dq_head, stride_dq_row, stride_dq_col,
    scale, natural_scale, q_len, kv_len, offset, left, right, kv_heads, group, rows, key_blocks, query_blocks, variant,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, FOLDED: tl.constexpr, GROUPED: tl.constexpr,
    KEYS_BLOCK_M: tl.constexpr, KEYS_BLOCK_N: tl.constexpr, EVEN_QUERIES: tl.constexpr, KEYS_TMA: tl.constexpr,
    KEYS_STAGES: tl.constexpr, QUERIES_BLOCK_M: tl.constexpr, QUERIES_BLOCK_N: tl.constexpr, EVEN_KEYS: tl.constexpr,
    QUERIES_TMA: tl.constexpr, QUERIES_STAGES: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of keys for each of the first `key_blocks` programs of a row, which is a key/value head, and a tile of queries for
    the others: `query_blocks` for each head of the group. The band is that of queries (rows) and keys (columns)."""
    head_row = program_row(rows, FOLDED)
    position = tl.program_id(0)
    if position < key_blocks:
        _dkdv_tile(
            position, key_blocks, head_row,
            q, k, v, lse_two, dout, delta, dk, dv, stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
            stride_k_batch, stride_k_head, stride_k_row, stride_k_col, stride_v_batch, stride_v_head, stride_v_row,
            stride_v_col, stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row, stride_dout_batch,
            stride_dout_head, stride_dout_row, stride_dout_col, stride_delta_batch, stride_delta_head,
            stride_delta_row, stride_dk_batch, stride_dk_head, stride_dk_row, stride_dk_col, stride_dv_batch,
            stride_dv_head, stride_dv_row, stride_dv_col, scale, natural_scale, q_len, kv_len, -offset, right, left,
            kv_heads, group, variant, SCORE, SLOPE, ALLOWED, CHANGED, FREE, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV,
            KEYS_BLOCK_M, KEYS_BLOCK_N, HAS_RIGHT, HAS_LEFT, EVEN_QUERIES, HAS_LEFT, GROUPED, KEYS_TMA, WIDE,
            KEYS_STAGES, ACC,
        )  # fmt: skip
    else:
        position = position - key_blocks
        member = position // query_blocks
        _dq_tile(
            position - member * query_blocks, query_blocks, head_row * group + member,
            q, k, v, lse_two, dout, delta, dq, stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
            stride_k_batch, stride_k_head, stride_k_row, stride_k_col, stride_v_batch, stride_v_head, stride_v_row,
            stride_v_col, stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row, stride_dout_batch,
            stride_dout_head, stride_dout_row, stride_dout_col, stride_delta_batch, stride_delta_head,
            stride_delta_row, stride_dq_batch, stride_dq_head, stride_dq_row, stride_dq_col, scale, natural_scale,
            q_len, kv_len, offset, left, right, kv_heads * group, group, variant, SCORE, SLOPE, ALLOWED, CHANGED, FREE,
            HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, QUERIES_BLOCK_M, QUERIES_BLOCK_N, HAS_LEFT, HAS_RIGHT, EVEN_KEYS,
            HAS_RIGHT, QUERIES_TMA, WIDE, QUERIES_STAGES, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "kv_len", "offset", "left", "right", "rows", "q_heads", "batches"])
def flash_bwd_dbias_kernel(
    q, k, v, lse_two, dout, delta, dbias,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row,
    stride_dout_batch, stride_dout_head, stride_dout_row, stride_dout_col,
    stride_delta_batch, stride_delta_head, stride_delta_row,
    stride_dbias_batch, stride_dbias_head, stride_dbias_row, stride_dbias_col,
    scale, q_len, kv_len, offset, left, right, batches, q_heads, group, rows, variant,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BY_BATCH: tl.constexpr, BY_HEAD: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr,
    FOLDED: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of dbias: a sum over the batches, heads, queries and keys along which the bias has one element. Every pair is
    masked, and those that no one sees give 0."""
    # Position
    row_tiles = tl.cdiv(q_len, BLOCK_M)
    col_tiles = tl.cdiv(kv_len, BLOCK_N)
    tile = tl.program_id(0)
    own_row = 0
    own_col = 0
    if BY_ROW and BY_COL:
        own_row = tile // col_tiles
        own_col = tile % col_tiles
    elif BY_ROW:
        own_row = tile
    elif BY_COL:
        own_col = tile
    owner = program_row(rows, FOLDED)
    own_batch = 0
    own_head = 0
    if BY_BATCH and BY_HEAD:
        own_batch = owner // q_heads
        own_head = owner % q_heads
    elif BY_BATCH:
        own_batch = owner
    elif BY_HEAD:
        own_head = owner
    inner_batches = 1 if BY_BATCH else batches
    inner_heads = 1 if BY_HEAD else q_heads
    inner_rows = 1 if BY_ROW else row_tiles
    inner_cols = 1 if BY_COL else col_tiles
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)

    # Gather
    for i in tl.range(0, inner_batches * inner_heads * inner_rows * inner_cols):
        start_n = (own_col + i % inner_cols) * BLOCK_N
        j = i // inner_cols
        start_m = (own_row + j % inner_rows) * BLOCK_M
        j = j // inner_rows
        head = own_head + j % inner_heads
        batch = tl.cast(own_batch + j // inner_heads, tl.int64)
        kv_head = tl.cast(head // group, tl.int64)
        head = tl.cast(head, tl.int64)
        query = start_m + tl.arange(0, BLOCK_M)
        key = start_n + tl.arange(0, BLOCK_N)
        q_base = q + batch * stride_q_batch + head * stride_q_head
        do_base = dout + batch * stride_dout_batch + head * stride_dout_head
        k_base = k + batch * stride_k_batch + kv_head * stride_k_head
        v_base = v + batch * stride_v_batch + kv_head * stride_v_head
        q_at = tile_at_zero(q_base, q_len, stride_q_row, stride_q_col, HEAD_DIM, BLOCK_M, BLOCK_D, False, WIDE)
        do_at = tile_at_zero(do_base, q_len, stride_dout_row, stride_dout_col, V_HEAD_DIM, BLOCK_M, BLOCK_DV, False, WIDE)
        k_at = tile_at_zero(k_base, kv_len, stride_k_row, stride_k_col, HEAD_DIM, BLOCK_N, BLOCK_D, False, WIDE)
        v_at = tile_at_zero(v_base, kv_len, stride_v_row, stride_v_col, V_HEAD_DIM, BLOCK_N, BLOCK_DV, False, WIDE)
        q_tile = load_tile(q_at, start_m, q_len, stride_q_row, HEAD_DIM, BLOCK_M, BLOCK_D, True, False)
        do_tile = load_tile(do_at, start_m, q_len, stride_dout_row, V_HEAD_DIM, BLOCK_M, BLOCK_DV, True, False)
        k_tile = load_tile(k_at, start_n, kv_len, stride_k_row, HEAD_DIM, BLOCK_N, BLOCK_D, True, False)
        v_tile = load_tile(v_at, start_n, kv_len, stride_v_row, V_HEAD_DIM, BLOCK_N, BLOCK_DV, True, False)
        row = query.to(tl.int64)
        lse_at = lse_two + batch * stride_lse_two_batch + head * stride_lse_two_head + row * stride_lse_two_row
        delta_at = delta + batch * stride_delta_batch + head * stride_delta_head + row * stride_delta_row
        lse_row = tl.load(lse_at, mask=query < q_len, other=float("inf"))
        delta_row = tl.load(delta_at, mask=query < q_len, other=0.0)
        added, _ = _score_slopes(
            q_tile, k_tile, v_tile, do_tile, lse_row, delta_row, query, key, scale, q_len, kv_len, offset, left, right,
            variant, batch, head, 0, 0, SCORE, SLOPE, ALLOWED, CHANGED, FREE, True, HAS_LEFT, HAS_RIGHT, False,
        )  # fmt: skip
        total += added

    # Store
    row = own_row * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = own_col * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < q_len) & (col < kv_len)
    if not BY_ROW:
        total = tl.sum(total, 0)[None, :]
        row = tl.zeros([1, 1], dtype=tl.int32)
        inside = col < kv_len
    if not BY_COL:
        total = tl.sum(total, 1)[:, None]
        col = tl.zeros([1, 1], dtype=tl.int32)
        inside = row < q_len
    if not BY_ROW and not BY_COL:
        inside = row == 0
    base = dbias + tl.cast(own_batch, tl.int64) * stride_dbias_batch + tl.cast(own_head, tl.int64) * stride_dbias_head
    at = base + (row.to(tl.int64) * stride_dbias_row + col.to(tl.int64) * stride_dbias_col)
    tl.store(at, rounded(total, dbias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["q_len", "batches"])
def flash_bwd_dsinks_kernel(
    lse_two, delta, dsinks,
    stride_lse_two_batch, stride_lse_two_head, stride_lse_two_row,
    stride_delta_batch, stride_delta_head, stride_delta_row,
    stride_dsinks_head, q_len, batches, variant, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of one head's sink, -sum of its weight times delta over all rows."""
    # Position
    head = tl.cast(tl.program_id(0), tl.int64)
    sink = sink_of(variant, head, ACC) * _LOG2_E
    total = tl.zeros([BLOCK_M], dtype=ACC)

    # Gather
    blocks = tl.cdiv(q_len, BLOCK_M)
    for i in tl.range(0, batches * blocks):
        batch = tl.cast(i // blocks, tl.int64)
        row = (i % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        lse_at = lse_two + batch * stride_lse_two_batch + head * stride_lse_two_head + row.to(tl.int64) * stride_lse_two_row
        delta_at = delta + batch * stride_delta_batch + head * stride_delta_head + row.to(tl.int64) * stride_delta_row
        lse = tl.load(lse_at, mask=row < q_len, other=float("inf"))
        total -= tl.exp2(sink - lse) * tl.load(delta_at, mask=row < q_len, other=0.0)

    # Store
    tl.store(dsinks + head * stride_dsinks_head, tl.sum(total, 0).to(dsinks.dtype.element_ty))


def launches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    delta: torch.Tensor,
    lse_two: torch.Tensor,
    slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    q_documents: torch.Tensor | None = None,
    kv_documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    q_starts: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
    dsinks: torch.Tensor | None = None,
    dq_sum: torch.Tensor | None = None,
    *,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    top_left: bool,
    softcap: float | None = None,
    chunk: int | None = None,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    nondeterministic: bool = False,
    functions: Functions | None = None,
    dkdv_block_m: int,
    dkdv_block_n: int,
    dkdv_warps: int,
    dkdv_stages: int,
    dkdv_load: str,
    dq_block_m: int,
    dq_block_n: int,
    dq_warps: int,
    dq_stages: int,
    dq_load: str,
    waves_per_eu: int,
    structure: str = "separate",
    mfma_side: int = 0,
    kpack: int = 1,
) -> list[Launch]:
    """Three launches, in this order: `delta` and `lse_two`; `dk` and `dv`; `dq`; and one each for `dbias` and `dsinks` where
    they are given. Where `structure` is "fused" and not "separate", the second and the third are one, of programs that do what
    either does; they have as many warps. Where it is "atomic", the second adds dq up in `dq_sum` too, and the third rounds that:
    the order of these sums, and with it the last bits of dq, differ from run to run, which `nondeterministic` must allow. Tiles
    of dq are then those of dbias only. Shapes as in the package docstring and in `variants`.

    `out` and `lse` are those of the forward pass; `delta`, `lse_two` and `dq_sum` are scratch, see `workspaces`. `..._block_m`
    counts queries and `..._block_n` keys; `..._load` is "pointer" or "tma". `mfma_side` and `kpack` are as in `flash_fwd`.
    Raises `ValueError` for tensors or tunables that do not go together, and for heads that do not fit the device.
    """
    _require_tensors(q, k, v, out, lse, dout, dq, dk, dv, delta, lse_two)
    _require_room(q)
    dkdv = _Tile(dkdv_block_m, dkdv_block_n, dkdv_load, dkdv_stages, dkdv_warps, waves_per_eu, mfma_side, kpack)
    dq_tile = _Tile(dq_block_m, dq_block_n, dq_load, dq_stages, dq_warps, waves_per_eu, mfma_side, kpack)
    primitives.require_choice(structure=(structure, ("separate", "fused", "atomic")))
    _require_sums(q, dq_sum, structure, nondeterministic)
    if structure == "fused" and dkdv_warps != dq_warps:
        raise ValueError(f"structure='fused' needs as many dkdv_warps as dq_warps, found {dkdv_warps} and {dq_warps}")
    for name, tile in {"dkdv": dkdv, "dq": dq_tile}.items():
        primitives.require_blocks(**{f"{name}_block_m": tile.block_m, f"{name}_block_n": tile.block_n})
        primitives.require_choice(**{f"{name}_load": (tile.load, ("pointer", "tma"))})
        if tile.load == "tma":
            primitives.require_tma(q=q, k=k, v=v, dout=dout)
    if dkdv.load == "tma" and q.shape[1] > k.shape[1]:
        # One descriptor spans the heads of a group.
        for name, tensor in {"q": q, "dout": dout}.items():
            if tensor.stride(1) <= 0:
                raise ValueError(f"dkdv_load='tma' needs heads apart from each other, but {name} has head stride 0")
    band = primitives.band_of(
        q.shape[2], k.shape[2], window_left=window_left, window_right=window_right, top_left=top_left
    )
    tensors = {"q": q, "k": k, "v": v, "lse_two": lse_two, "dout": dout, "delta": delta}
    variant = variants.variant_of(
        q, k, softcap=softcap, chunk=chunk, dropout=dropout, dropout_seed=dropout_seed, slopes=slopes, bias=bias,
        sinks=sinks, prefix=prefix, q_documents=q_documents, kv_documents=kv_documents, mask=mask,
        q_starts=q_starts, kv_starts=kv_starts, top_left=top_left, functions=functions,
    )  # fmt: skip
    if functions is not None and functions.score is not None and functions.slope is None:
        raise ValueError("a backward pass needs the slope of the caller's score function: give Functions(slope=...)")
    asked = _Asked(band, scale, variant, functions)
    found = [
        _rows_launch(out, dout, lse, delta, lse_two, dlse, dq_sum),
        _dkdv_launch(tensors, {"dk": dk, "dv": dv}, asked, dkdv, dq_sum),
        _dq_launch(tensors, {"dq": dq}, asked, dq_tile),
    ]
    if dq_sum is not None:
        found[2:] = [_cast_launch(dq_sum, dq, scale)]
    if structure == "fused":
        found[1:] = [_fused_launch(*found[1:])]
    if dbias is not None:
        if bias is None or tuple(dbias.shape) != tuple(bias.shape):
            wanted = "no bias" if bias is None else tuple(bias.shape)
            raise ValueError(f"dbias must have the shape of bias ({wanted}), found {tuple(dbias.shape)}")
        found.append(_dbias_launch(tensors, dbias, asked, dq_tile))
    if dsinks is not None:
        if sinks is None:
            raise ValueError("dsinks was given without sinks")
        found.append(_dsinks_launch(tensors, dsinks, variant))
    return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """What all launches are told of the problem."""

    band: Band
    scale: float
    variant: Variant
    functions: Functions | None

    @property
    def constants(self) -> dict[str, Any]:
        slope = self.functions.slope if self.functions else None
        return {**variants.constants(self.variant, self.functions), **variants.ragged(self.variant), "SLOPE": slope}


@dataclass(frozen=True, slots=True)
class _Tile:
    """The tunables of one launch."""

    block_m: int
    block_n: int
    load: str
    stages: int
    warps: int
    waves_per_eu: int
    mfma_side: int
    kpack: int

    @property
    def options(self) -> dict[str, Any]:
        return primitives.options(
            num_warps=self.warps, num_stages=self.stages, waves_per_eu=self.waves_per_eu, mfma_side=self.mfma_side,
            kpack=self.kpack,
        )  # fmt: skip


def _rows_launch(
    out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, lse_two: torch.Tensor,
    dlse: torch.Tensor | None, dq_sum: torch.Tensor | None,
) -> Launch:  # fmt: skip
    batch, q_heads, q_len, v_head_dim = out.shape
    head_dim = v_head_dim if dq_sum is None else dq_sum.shape[3]
    if dlse is not None:
        primitives.require_shapes({"dlse": (dlse, lse.shape)})
    strides = dlse.stride() if dlse is not None else (None, None, None)
    grid = primitives.folded_grid(-(-q_len // _STREAMED_ROWS), batch * q_heads)
    arguments = {
        "out": out, "dout": dout, "lse": lse, "delta": delta, "lse_two": lse_two,
        **primitives.strides(out=out, dout=dout, lse=lse, delta=delta, lse_two=lse_two), "dlse": dlse,
        **dict(zip(("stride_dlse_batch", "stride_dlse_head", "stride_dlse_row"), strides, strict=True)), **_sums(dq_sum),
        "q_len": q_len, "q_heads": q_heads, "rows": batch * q_heads,
    }  # fmt: skip
    constants = {
        "V_HEAD_DIM": v_head_dim, "BLOCK_DV": primitives.padded(v_head_dim), "BLOCK_M": _STREAMED_ROWS,
        "FOLDED": grid[2] > 1, "WIDE": primitives.needs_wide(_STREAMED_ROWS, out, dout),
        "ACC": primitives.accumulator(out.dtype), "HEAD_DIM": head_dim, "BLOCK_D": primitives.padded(head_dim),
    }  # fmt: skip
    return Launch(
        kernel=flash_bwd_rows_kernel, grid=grid, args=arguments, constants=constants, options=primitives.options(num_warps=4)
    )


def _sums(dq_sum: torch.Tensor | None) -> dict[str, Any]:
    """The sums of dq and their strides, as a kernel takes them; nothing of it where there are none."""
    strides = (None, None, None) if dq_sum is None else dq_sum.stride()[:3]
    return {"dq_sum": dq_sum} | dict(zip(_SUM_STRIDES, strides, strict=True))


def _cast_launch(dq_sum: torch.Tensor, dq: torch.Tensor, scale: float) -> Launch:
    batch, q_heads, q_len, head_dim = dq.shape
    grid = primitives.folded_grid(triton.cdiv(q_len, _STREAMED_ROWS), batch * q_heads)
    arguments = {
        **_sums(dq_sum), "dq": dq, **primitives.strides(dq=dq), "natural_scale": scale, "q_len": q_len, "q_heads": q_heads,
        "rows": batch * q_heads,
    }  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": primitives.padded(head_dim), "BLOCK_M": _STREAMED_ROWS, "FOLDED": grid[2] > 1,
        "WIDE": primitives.needs_wide(_STREAMED_ROWS, dq, dq_sum),
    }  # fmt: skip
    return Launch(
        kernel=flash_bwd_dq_cast_kernel, grid=grid, args=arguments, constants=constants, options=primitives.options(num_warps=4)
    )


def _dkdv_launch(
    tensors: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], asked: _Asked, tile: _Tile,
    dq_sum: torch.Tensor | None,
) -> Launch:  # fmt: skip
    """Rows are keys and columns queries, so the band is read the other way round."""
    band = asked.band.transposed
    q, k = tensors["q"], tensors["k"]
    batch, kv_heads = k.shape[:2]
    group = q.shape[1] // kv_heads
    plain, masked = _steps(asked, band, tile.block_n, tile.block_m)
    grid = primitives.folded_grid(len(plain), batch * kv_heads)
    constants = _constants(tensors, outputs, band, tile, tile.block_m) | {"FOLDED": grid[2] > 1, "GROUPED": group > 1}
    constants |= asked.constants
    arguments = _arguments(tensors, outputs, asked) | band.arguments()
    arguments |= {"kv_heads": kv_heads, "group": group, "rows": batch * kv_heads}
    arguments |= {} if dq_sum is None else _sums(dq_sum)
    shares = 0 if dq_sum is None else 2 * tile.block_m * tile.block_n * constants["BLOCK_D"]
    steps = Steps(
        plain=tuple(group * count for count in plain),
        masked=tuple(group * count for count in masked),
        flops_per_step=4 * tile.block_m * tile.block_n * (constants["BLOCK_D"] + constants["BLOCK_DV"]) + shares,
    )
    return Launch(
        kernel=flash_bwd_dkdv_kernel, grid=grid, args=arguments, constants=constants, options=tile.options,
        steps=steps, scratch=constants["TMA"],
    )  # fmt: skip


def _dq_launch(
    tensors: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], asked: _Asked, tile: _Tile
) -> Launch:
    """Rows are queries and columns keys, as in the forward pass."""
    band = asked.band
    batch, q_heads = tensors["q"].shape[:2]
    plain, masked = _steps(asked, band, tile.block_m, tile.block_n)
    grid = primitives.folded_grid(len(plain), batch * q_heads)
    constants = _constants(tensors, outputs, band, tile, tile.block_n) | {"FOLDED": grid[2] > 1} | asked.constants
    arguments = _arguments(tensors, outputs, asked)
    arguments |= {"q_heads": q_heads, "group": q_heads // tensors["k"].shape[1], "rows": batch * q_heads}
    flops = 2 * tile.block_m * tile.block_n * (2 * constants["BLOCK_D"] + constants["BLOCK_DV"])
    return Launch(
        kernel=flash_bwd_dq_kernel, grid=grid, args=arguments, constants=constants, options=tile.options,
        steps=Steps(plain=plain, masked=masked, flops_per_step=flops), scratch=constants["TMA"],
    )  # fmt: skip


def _fused_launch(keys: Launch, queries: Launch) -> Launch:
    """The launches of dk and dv and of dq as one. A row of its grid is a key/value head, so that programs which read the same
    keys are neighbours. Its constants are theirs; a step of dq is counted as what it is of one of dk and dv."""
    group, rows = int(keys.args["group"]), int(keys.args["rows"])
    grid = primitives.folded_grid(keys.grid[0] + group * queries.grid[0], rows)
    own = {
        "KEYS_BLOCK_M": keys.constants["BLOCK_M"], "KEYS_BLOCK_N": keys.constants["BLOCK_N"],
        "EVEN_QUERIES": keys.constants["EVEN"], "KEYS_TMA": keys.constants["TMA"],
        "KEYS_STAGES": keys.constants["STAGES"], "QUERIES_BLOCK_M": queries.constants["BLOCK_M"],
        "QUERIES_BLOCK_N": queries.constants["BLOCK_N"], "EVEN_KEYS": queries.constants["EVEN"],
        "QUERIES_TMA": queries.constants["TMA"], "QUERIES_STAGES": queries.constants["STAGES"],
        "FOLDED": grid[2] > 1, "WIDE": keys.constants["WIDE"] or queries.constants["WIDE"],
        "GROUPED": keys.constants["GROUPED"],
    }  # fmt: skip
    apart = {"BLOCK_M", "BLOCK_N", "EVEN", "TMA", "STAGES", "REVERSED", *own}
    common = {name: value for name, value in queries.constants.items() if name not in apart}
    blocks = {"key_blocks": keys.grid[0], "query_blocks": queries.grid[0]}
    arguments = {**keys.args, **queries.args, "kv_heads": keys.args["kv_heads"], "rows": rows, **blocks}
    del arguments["q_heads"]
    return Launch(
        kernel=flash_bwd_fused_kernel, grid=grid, args=arguments, constants=common | own, options=keys.options,
        steps=_fused_steps(keys.steps, queries.steps, group), scratch=keys.scratch or queries.scratch,
    )  # fmt: skip


def _fused_steps(keys: Steps | None, queries: Steps | None, group: int) -> Steps | None:
    if keys is None or queries is None:
        return None
    share = queries.flops_per_step / keys.flops_per_step
    plain, masked = (tuple(math.ceil(share * count) for count in counts) * group for counts in (queries.plain, queries.masked))
    return Steps(plain=keys.plain + plain, masked=keys.masked + masked, flops_per_step=keys.flops_per_step)


def _dbias_launch(tensors: Mapping[str, torch.Tensor], dbias: torch.Tensor, asked: _Asked, tile: _Tile) -> Launch:
    """A program per tile of dbias, with the tiles of dq."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    batch, q_heads, q_len, _ = q.shape
    sizes = (batch, q_heads, q_len, k.shape[2])
    by = [size == wanted for size, wanted in zip(dbias.shape, sizes, strict=True)]
    tiles = [-(-q_len // tile.block_m) if by[2] else 1, -(-k.shape[2] // tile.block_n) if by[3] else 1]
    grid = primitives.folded_grid(math.prod(tiles), math.prod(dbias.shape[:2]))
    arguments = _arguments(tensors, {"dbias": dbias}, asked)
    arguments |= {"batches": batch, "q_heads": q_heads, "group": q_heads // k.shape[1], "rows": math.prod(dbias.shape[:2])}
    del arguments["natural_scale"]
    known = {name: value for name, value in asked.constants.items() if name != "EVEN"}
    constants = {
        **known, "HEAD_DIM": q.shape[3], "V_HEAD_DIM": v.shape[3], "BLOCK_D": primitives.padded(q.shape[3]),
        "BLOCK_DV": primitives.padded(v.shape[3]), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "HAS_LEFT": asked.band.left is not None, "HAS_RIGHT": asked.band.right is not None,
        "BY_BATCH": by[0], "BY_HEAD": by[1], "BY_ROW": by[2], "BY_COL": by[3], "FOLDED": grid[2] > 1,
        "WIDE": primitives.needs_wide(max(tile.block_m, tile.block_n), q, k, v, tensors["dout"]),
        "ACC": primitives.accumulator(q.dtype),
    }  # fmt: skip
    return Launch(
        kernel=flash_bwd_dbias_kernel, grid=grid, args=arguments, constants=constants,
        options=primitives.options(num_warps=tile.warps),
    )  # fmt: skip


def _dsinks_launch(tensors: Mapping[str, torch.Tensor], dsinks: torch.Tensor, variant: Variant) -> Launch:
    batch, q_heads, q_len, _ = tensors["q"].shape
    primitives.require_shapes({"dsinks": (dsinks, (q_heads,))})
    rows = {name: tensors[name] for name in ("lse_two", "delta")}
    arguments = {
        **rows, **primitives.strides(**rows), "dsinks": dsinks, "stride_dsinks_head": dsinks.stride(0), "q_len": q_len,
        "batches": batch, "variant": variant,
    }  # fmt: skip
    constants = {"BLOCK_M": _SINK_ROWS, "ACC": primitives.accumulator(tensors["q"].dtype)}
    return Launch(
        kernel=flash_bwd_dsinks_kernel, grid=(q_heads, 1, 1), args=arguments, constants=constants,
        options=primitives.options(num_warps=4),
    )  # fmt: skip


def _steps(asked: _Asked, band: Band, block_rows: int, block_columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Plain and masked steps; where more than the band hides, all are masked, and no more than those of the band counted."""
    plain, masked = variants.packed_steps(asked.variant, band, block_rows, block_columns)
    if not asked.constants["FREE"]:
        return plain, masked
    return (0,) * len(plain), tuple(map(sum, zip(plain, masked, strict=True)))


def _arguments(
    tensors: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], asked: _Asked
) -> dict[str, Any]:
    return {
        **tensors, **outputs, **primitives.strides(**tensors, **outputs), **asked.band.arguments(),
        "scale": asked.scale if asked.constants["CHANGED"] else asked.scale * primitives.LOG2_E, "natural_scale": asked.scale,
        "q_len": tensors["q"].shape[2], "kv_len": tensors["k"].shape[2], "variant": asked.variant,
    }  # fmt: skip


def _constants(
    tensors: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], band: Band, tile: _Tile, block_columns: int
) -> dict[str, Any]:
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    matrices = (q, k, v, tensors["dout"], *outputs.values())
    return {
        "HEAD_DIM": q.shape[3], "V_HEAD_DIM": v.shape[3],
        "BLOCK_D": primitives.padded(q.shape[3]), "BLOCK_DV": primitives.padded(v.shape[3]),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **band.constants(block_columns),
        "REVERSED": primitives.longest_last(band), "TMA": tile.load == "tma" and q.shape[2] > 0 and k.shape[2] > 0,
        "WIDE": primitives.needs_wide(max(tile.block_m, tile.block_n), *matrices),
        "STAGES": tile.stages, "ACC": primitives.accumulator(q.dtype),
    }  # fmt: skip


def _require_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, delta: torch.Tensor, lse_two: torch.Tensor,
) -> None:  # fmt: skip
    primitives.require_inputs(q, k, v, out=out, dout=dout, dq=dq, dk=dk, dv=dv)
    rows, out_shape = q.shape[:3], (*q.shape[:3], v.shape[3])
    primitives.require_shapes({
        "out": (out, out_shape), "dout": (dout, out_shape), "lse": (lse, rows), "delta": (delta, rows),
        "lse_two": (lse_two, rows), "dq": (dq, q.shape), "dk": (dk, k.shape), "dv": (dv, v.shape),
    })  # fmt: skip


def _require_room(q: torch.Tensor) -> None:
    """Raise `ValueError` for heads of more than 512 where not even the smallest tiles of two tensors of them fit a block."""
    room = primitives.shared_bytes(q.device)
    if q.shape[3] > 512 and room is not None and room < WIDEST_BYTES:
        raise ValueError(
            f"the gradients of heads of {q.shape[3]} need {WIDEST_BYTES >> 10} KiB of shared memory for a block, and this device"
            f" gives {room >> 10}: take narrower heads, or a device of compute capability 8.0 or from 9.0 on"
        )


def _require_sums(q: torch.Tensor, dq_sum: torch.Tensor | None, structure: str, nondeterministic: bool) -> None:
    """Raise `ValueError` for atomic additions that nobody allowed, and for sums of dq that nobody makes, or that are missing."""
    if structure == "atomic" and not nondeterministic:
        raise ValueError("structure='atomic' gives other bits in every run: say nondeterministic=True, or take 'separate'")
    if (structure == "atomic") != (dq_sum is not None):
        raise ValueError(f"dq_sum is for structure='atomic', found {'none' if dq_sum is None else 'one'} beside {structure!r}")
    if dq_sum is not None:
        primitives.require_shapes({"dq_sum": (dq_sum, q.shape)})
        if dq_sum.stride(3) != 1 and dq_sum.numel():
            raise ValueError(f"dq_sum must have a last stride of 1, found {dq_sum.stride(3)}")


def workspaces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor,
    *, structure: str = "separate", **variant: torch.Tensor,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:  # fmt: skip
    """Scratch tensors (batch, q_heads, q_len) in the type of sums: `delta` and `lse_two`, the log-sum-exp to base 2; and
    `dq_sum` in the shape of q where `structure` is "atomic"."""
    rows = (tuple(q.shape[:3]), primitives.statistics_as(q.dtype))
    found = {"delta": rows, "lse_two": rows}
    return found | ({"dq_sum": (tuple(q.shape), rows[1])} if structure == "atomic" else {})


def flash_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    *,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    top_left: bool = False,
    config: Mapping[str, Any] | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    **variant: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, shaped like them, from `out` and `lse` of the forward pass and `dout` shaped like `out`.

    `scale` None means 1/sqrt(head_dim); causal is `window_right=0`. `config` None takes one that compiles everywhere and is
    not tuned. `variant` is what `variants.variant_of` takes, and dlse, dbias, dsinks, nondeterministic. Raises `ValueError` for
    tensors or tunables that do not go together.
    """
    dq = q.new_empty(q.shape) if dq is None else dq
    dk = k.new_empty(k.shape) if dk is None else dk
    dv = v.new_empty(v.shape) if dv is None else dv
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    if config is None:
        config = safe_config(q, v)
    wanted = workspaces(q, k, v, out, lse, dout, structure=config.get("structure", "separate"))
    scratch = {name: q.new_empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
    found = launches(
        q, k, v, out, lse, dout, dq, dk, dv, **scratch, scale=scale, window_left=window_left, window_right=window_right,
        top_left=top_left, **variant, **config,
    )  # fmt: skip
    for launch in found:
        launch.run()
    return dq, dk, dv


def safe_config(q: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """A small configuration that fits any GPU Triton knows."""
    widest = max(primitives.padded(q.shape[3]), primitives.padded(v.shape[3]))
    block = 32 if widest <= 128 and q.element_size() <= 2 else 16
    return {
        "dkdv_block_m": block, "dkdv_block_n": block, "dkdv_warps": 4, "dkdv_stages": 1, "dkdv_load": "pointer",
        "dq_block_m": block, "dq_block_n": block, "dq_warps": 4, "dq_stages": 1, "dq_load": "pointer",
        "waves_per_eu": 0, "structure": "separate", "mfma_side": 0, "kpack": 1,
    }  # fmt: skip
