"""Forward attention: out = softmax(scale * q k^T inside the band) v, and the log-sum-exp of every row.

FlashAttention-2 (Dao 2023, algorithm 1) with the loop over key blocks split in two: blocks that every row of the tile sees
whole run without any mask, the others (window edge, diagonal, ragged tail) with one; blocks outside the band are not visited.
Refuses to differentiate (`flash_bwd` does) and to choose a good configuration (a tuner does).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from . import primitives, variants
from .launch import Launch, Steps
from .primitives import (
    band_blocks,
    load_tile,
    log_sum_exp,
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
    bounds_of,
    changed_scores,
    descaled,
    kept,
    key_blocks,
    narrowed,
    sequence_of,
    sink_of,
    value_scale,
)

PASS = "fwd"
HEADROOM = primitives.HEADROOM

_LOG2_E = tl.constexpr(primitives.LOG2_E)

# So many tiles and more have programs of their own, where numbers of tiles could leave 32 bits.
_MOST_TILES = 1 << 30
# Weights of up to 2^8 lose nothing beside smaller ones in fp16, and their sum is far from the end of fp32.
_MOST_LAG = 8
_LEAST_FACTOR = tl.constexpr(2.0**-126)


@triton.jit
def _attend(
    q, k_at, v_at, q_rest, k_rest_at, v_rest_at, start, m, z, acc, acc_rest, row, scale, q_len, kv_len, offset, left,
    right, stride_k_row, stride_v_row, variant, batch, head, q_first, kv_first, SCORE: tl.constexpr,
    ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, EVEN: tl.constexpr, RISING: tl.constexpr, TMA: tl.constexpr, EARLY: tl.constexpr,
    HINTS: tl.constexpr, PRECISION: tl.constexpr, LAG: tl.constexpr, REST: tl.constexpr, V_REST: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_V_REST: tl.constexpr,
):  # fmt: skip
    """One key block: (m, z, acc, acc_rest) of the online softmax (Milakov and Gimelshein 2018) after keys start... start +
    BLOCK_N. Columns of a head beyond the first HEAD_DIM are a tile of their own if there is a REST; so are those of values."""
    CHECK: tl.constexpr = MASKED and not EVEN
    # Many programs read keys and values, one reads its queries.
    KEEP: tl.constexpr = "evict_last" if HINTS else ""

    # Load
    k = load_tile(k_at, start, kv_len, stride_k_row, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK, TMA, KEEP)
    if EARLY:
        v = load_tile(v_at, start, kv_len, stride_v_row, V_HEAD_DIM, BLOCK_N, BLOCK_DV, CHECK, TMA, KEEP)

    # Score
    s = product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], dtype=acc.dtype), PRECISION)

    if REST:
        k_rest = load_tile(k_rest_at, start, kv_len, stride_k_row, REST, BLOCK_N, BLOCK_REST, CHECK, TMA, KEEP)
        s = product(q_rest, tl.trans(k_rest), s, PRECISION)

    # Mask. Where scale > 0 the maximum may be taken before scaling, and scaling and shifting are one fused operation:
    # whatever rounding m has, it is the same m in p, z and the log-sum-exp. Else s must be scaled before -inf comes in.
    factor = scale
    col = start + tl.arange(0, BLOCK_N)
    if CHANGED:
        s, _, _ = changed_scores(
            s * scale, variant, batch, head, row[:, None], col[None, :], offset, q_len, kv_len, SCORE
        )  # fmt: skip
        s = s * _LOG2_E
        factor = 1.0
    elif not RISING:
        s = s * scale
        factor = 1.0
    if MASKED:
        seen = visible(row[:, None], col[None, :], offset, left, right, kv_len, HAS_LEFT, HAS_RIGHT, EVEN)
        if FREE:
            seen = narrowed(
                seen, variant, batch, head, row[:, None], col[None, :], offset, q_len, kv_len, q_first, kv_first, ALLOWED
            )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))

    # Softmax. Weights that are cut down to 8 bits begin near the top of what these hold: the smallest that is not lost there is
    # then 2^-18 of the largest (e4m3), not 2^-10. Whatever m is taken for, z and the log-sum-exp are of the same one.
    m_next = tl.max(s, 1) * factor
    if variant.lift is not None:
        m_next -= variant.lift
    m_next = tl.maximum(m, m_next)
    if LAG > 0:
        # Any number near the maximum does in its place, as out is a quotient: weights may then be as large as 2^LAG. A row
        # decides for itself, so that no other row has an influence on its bits.
        m_next = tl.where(m_next > m + LAG, m_next, m)
    shift = m_next
    if MASKED or CHANGED:
        # A row that saw nothing yet: -inf - -inf is NaN, -inf - 0 is -inf.
        shift = tl.where(m_next == float("-inf"), 0.0, m_next)
    p = tl.exp2(s * factor - shift[:, None])
    shrink = tl.exp2(m - shift)

    # Accumulate. A lag spares the accumulator the product, not z, which is small.
    if not EARLY:
        v = load_tile(v_at, start, kv_len, stride_v_row, V_HEAD_DIM, BLOCK_N, BLOCK_DV, CHECK, TMA, KEEP)
    z = z * shrink + tl.sum(p, 1)
    if variant.seed is not None:
        p = tl.where(kept(variant, batch, head, row[:, None] + q_first, col[None, :] + kv_first), p, 0.0)
    if LAG > 0:
        # Rows that stay where they are would be multiplied by exactly 1.
        if tl.max((m_next > m).to(tl.int32), 0) > 0:
            acc *= shrink[:, None]
            if V_REST:
                acc_rest *= shrink[:, None]
        acc = product(rounded(p, v.dtype), v, acc, PRECISION)
    else:
        acc = product(rounded(p, v.dtype), v, acc * shrink[:, None], PRECISION)
        if V_REST:
            acc_rest *= shrink[:, None]
    if V_REST:
        v_rest = load_tile(v_rest_at, start, kv_len, stride_v_row, V_REST, BLOCK_N, BLOCK_V_REST, CHECK, TMA, KEEP)
        acc_rest = product(rounded(p, v_rest.dtype), v_rest, acc_rest, PRECISION)
    return m_next, z, acc, acc_rest


@triton.jit
def _attend_tile(
    position, blocks, head_row,
    q, k, v, out, lse,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_out_batch, stride_out_head, stride_out_row, stride_out_col,
    stride_lse_batch, stride_lse_head, stride_lse_row,
    scale, q_len, kv_len, offset, left, right, q_heads, group, together, variant,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, RISING: tl.constexpr, REVERSED: tl.constexpr, GROUPED: tl.constexpr,
    TMA_Q: tl.constexpr, TMA_KV: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SPECIALIZED: tl.constexpr,
    STAGES: tl.constexpr, MASKED_STAGES: tl.constexpr, ACC: tl.constexpr, EARLY: tl.constexpr, HINTS: tl.constexpr,
    PRECISION: tl.constexpr, LONE: tl.constexpr, LAG: tl.constexpr, REST: tl.constexpr, V_REST: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_V_REST: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against all keys that they see: the tile at `position` of `blocks` in `head_row`."""
    # Position: heavy blocks first; heads that take turns are neighbours, so that they find their keys in the cache.
    if GROUPED:
        heads = group
        if together is not None:
            heads = together
        head_row = head_row * heads + position % heads
        position = position // heads
        blocks = blocks // heads
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
    row = start_m + tl.arange(0, BLOCK_M)
    owner = batch
    if variant.q_starts is not None:
        owner = sequence
    scale = descaled(scale, variant, owner, kv_head, _LEAST_FACTOR if RISING else 0)

    # Load
    q_base = q + batch * stride_q_batch + head * stride_q_head + tl.cast(q_first, tl.int64) * stride_q_row
    k_base = k + batch * stride_k_batch + kv_head * stride_k_head + tl.cast(kv_first, tl.int64) * stride_k_row
    v_base = v + batch * stride_v_batch + kv_head * stride_v_head + tl.cast(kv_first, tl.int64) * stride_v_row
    q_at = tile_at_zero(q_base, q_len, stride_q_row, stride_q_col, HEAD_DIM, BLOCK_M, BLOCK_D, TMA_Q, WIDE)
    k_at = tile_at_zero(k_base, kv_len, stride_k_row, stride_k_col, HEAD_DIM, BLOCK_N, BLOCK_D, TMA_KV, WIDE)
    v_at = tile_at_zero(v_base, kv_len, stride_v_row, stride_v_col, V_HEAD_DIM, BLOCK_N, BLOCK_DV, TMA_KV, WIDE)
    ONCE: tl.constexpr = "evict_first" if HINTS else ""
    q_tile = load_tile(q_at, start_m, q_len, stride_q_row, HEAD_DIM, BLOCK_M, BLOCK_D, True, TMA_Q, ONCE)
    q_rest = q_tile
    k_rest_at = k_at
    v_rest_at = v_at
    if REST:
        q_rest_base = q_base + tl.cast(stride_q_col, tl.int64) * HEAD_DIM
        k_rest_base = k_base + tl.cast(stride_k_col, tl.int64) * HEAD_DIM
        q_rest_at = tile_at_zero(q_rest_base, q_len, stride_q_row, stride_q_col, REST, BLOCK_M, BLOCK_REST, TMA_Q, WIDE)
        k_rest_at = tile_at_zero(k_rest_base, kv_len, stride_k_row, stride_k_col, REST, BLOCK_N, BLOCK_REST, TMA_KV, WIDE)
        q_rest = load_tile(q_rest_at, start_m, q_len, stride_q_row, REST, BLOCK_M, BLOCK_REST, True, TMA_Q, ONCE)
    if SCALED:
        # By a power of two, which is exact: no product of a score with it is left in the loops.
        q_tile = rounded(widened(q_tile, ACC) * scale, q_tile.dtype)
        if REST:
            q_rest = rounded(widened(q_rest, ACC) * scale, q_rest.dtype)
        scale = 1.0
    if V_REST:
        v_rest_base = v_base + tl.cast(stride_v_col, tl.int64) * V_HEAD_DIM
        v_rest_at = tile_at_zero(
            v_rest_base, kv_len, stride_v_row, stride_v_col, V_REST, BLOCK_N, BLOCK_V_REST, TMA_KV, WIDE
        )  # fmt: skip
    m = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    z = tl.zeros([BLOCK_M], dtype=ACC)
    if variant.sinks is not None:
        # A key whose value is 0, seen before all others. One of -inf weighs nothing once another key is seen, and nothing else
        # is asked of z where none is.
        m = tl.zeros([BLOCK_M], dtype=ACC) + sink_of(variant, head, ACC) * _LOG2_E
        if variant.lift is not None:
            m -= variant.lift
            z = z + variant.lifted
        else:
            z = z + 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=ACC)
    # Without a rest nothing is ever added to it, and no code is left of it.
    acc_rest = tl.zeros([BLOCK_M, BLOCK_V_REST], dtype=ACC)

    # Attend
    last_row = tl.minimum(start_m + BLOCK_M, q_len) - 1
    first, plain_first, plain_last, last = band_blocks(
        start_m, last_row, offset, left, right, kv_len, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if FREE:
        first, last = key_blocks(first, last, start_m, last_row, variant, batch, offset, kv_len, BLOCK_N)
    ANY_MASK: tl.constexpr = HAS_LEFT or HAS_RIGHT or not EVEN
    if not FREE and (SPLIT or not ANY_MASK):
        for block in tl.range(
            plain_first, plain_last, num_stages=STAGES, warp_specialize=SPECIALIZED, disallow_acc_multi_buffer=LONE
        ):  # fmt: skip
            m, z, acc, acc_rest = _attend(
                q_tile, k_at, v_at, q_rest, k_rest_at, v_rest_at, block * BLOCK_N, m, z, acc, acc_rest, row, scale, q_len,
                kv_len, offset, left, right,
                stride_k_row, stride_v_row, variant, batch, head, q_first, kv_first, SCORE, ALLOWED, CHANGED, FREE,
                HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False, HAS_LEFT, HAS_RIGHT, EVEN, RISING,
                TMA_KV, EARLY, HINTS, PRECISION, LAG, REST, V_REST, BLOCK_REST, BLOCK_V_REST,
            )  # fmt: skip
        if ANY_MASK:
            for i in tl.range(
                0, plain_first - first + last - plain_last, num_stages=MASKED_STAGES, disallow_acc_multi_buffer=LONE
            ):  # fmt: skip
                block = masked_block(i, first, plain_first, plain_last, HAS_LEFT)
                m, z, acc, acc_rest = _attend(
                    q_tile, k_at, v_at, q_rest, k_rest_at, v_rest_at, block * BLOCK_N, m, z, acc, acc_rest, row, scale, q_len,
                kv_len, offset, left, right,
                    stride_k_row, stride_v_row, variant, batch, head, q_first, kv_first, SCORE, ALLOWED, CHANGED,
                    FREE, HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_LEFT, HAS_RIGHT, EVEN, RISING,
                    TMA_KV, EARLY, HINTS, PRECISION, LAG, REST, V_REST, BLOCK_REST, BLOCK_V_REST,
                )  # fmt: skip
    else:
        for block in tl.range(
            first, last, num_stages=STAGES, warp_specialize=SPECIALIZED, disallow_acc_multi_buffer=LONE
        ):  # fmt: skip
            m, z, acc, acc_rest = _attend(
                q_tile, k_at, v_at, q_rest, k_rest_at, v_rest_at, block * BLOCK_N, m, z, acc, acc_rest, row, scale, q_len,
                kv_len, offset, left, right,
                stride_k_row, stride_v_row, variant, batch, head, q_first, kv_first, SCORE, ALLOWED, CHANGED, FREE,
                HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_LEFT, HAS_RIGHT, EVEN, RISING,
                TMA_KV, EARLY, HINTS, PRECISION, LAG, REST, V_REST, BLOCK_REST, BLOCK_V_REST,
            )  # fmt: skip

    # Store. A row that saw nothing has z = 0 and acc = 0.
    out_base = out + batch * stride_out_batch + head * stride_out_head + tl.cast(q_first, tl.int64) * stride_out_row
    o = acc / tl.where(z > 0, z, 1.0)[:, None]
    if variant.seed is not None:
        o = o * variant.kept_scale
    if variant.v_descale is not None:
        o = o * value_scale(variant, owner, kv_head)
    store_tile(o, out_base, start_m, q_len, stride_out_row, stride_out_col, V_HEAD_DIM, BLOCK_M, BLOCK_DV, WIDE)
    if V_REST:
        rest = acc_rest / tl.expand_dims(tl.where(z > 0, z, 1.0), 1)
        if variant.seed is not None:
            rest = rest * variant.kept_scale
        if variant.v_descale is not None:
            rest = rest * value_scale(variant, owner, kv_head)
        rest_base = out_base + tl.cast(stride_out_col, tl.int64) * V_HEAD_DIM
        store_tile(
            rest, rest_base, start_m, q_len, stride_out_row, stride_out_col, V_REST, BLOCK_M, BLOCK_V_REST, WIDE
        )  # fmt: skip
    lse_at = lse + batch * stride_lse_batch + head * stride_lse_head + (row + q_first).to(tl.int64) * stride_lse_row
    tl.store(lse_at, log_sum_exp(m, z).to(lse.dtype.element_ty), mask=row < q_len)


@triton.jit(do_not_specialize=["q_len", "kv_len", "offset", "left", "right", "rows", "q_heads", "width", "together"])
def flash_fwd_kernel(
    q, k, v, out, lse,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_out_batch, stride_out_head, stride_out_row, stride_out_col,
    stride_lse_batch, stride_lse_head, stride_lse_row,
    scale, q_len, kv_len, offset, left, right, q_heads, group, rows, width, together, variant,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, CHANGED: tl.constexpr, FREE: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, RISING: tl.constexpr, REVERSED: tl.constexpr, GROUPED: tl.constexpr, FOLDED: tl.constexpr,
    TMA_Q: tl.constexpr, TMA_KV: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SPECIALIZED: tl.constexpr,
    STAGES: tl.constexpr, MASKED_STAGES: tl.constexpr, ACC: tl.constexpr, EARLY: tl.constexpr, HINTS: tl.constexpr,
    PRECISION: tl.constexpr, LONE: tl.constexpr, FLAT: tl.constexpr, LAG: tl.constexpr, REST: tl.constexpr,
    V_REST: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V_REST: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A tile of queries for each program; or, if there is a `width`, all tiles in turn, of which that many lie along the first
    axis. `scale` is to base 2, or natural if scores are CHANGED; the mask is FREE if more than the band hides keys."""
    if width is not None:
        # Every other round deals backwards, so that who got much in one gets little in the next.
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        rounds = width * rows // programs
        place = tl.where(rounds % 2 == 0, program, programs - 1 - program)
        rounds = rounds + tl.where(place < width * rows - rounds * programs, 1, 0)
        # What could be hoisted out of this loop would take registers from the inner ones.
        for i in tl.range(0, rounds, flatten=FLAT, disable_licm=True):
            tile = i * programs + tl.where(i % 2 == 0, program, programs - 1 - program)
            _attend_tile(
                tile % width, width, tile // width,
                q, k, v, out, lse,
                stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
                stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
                stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
                stride_out_batch, stride_out_head, stride_out_row, stride_out_col,
                stride_lse_batch, stride_lse_head, stride_lse_row,
                scale, q_len, kv_len, offset, left, right, q_heads, group, together, variant,
                SCORE, ALLOWED, CHANGED, FREE, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT,
                EVEN, RISING, REVERSED, GROUPED, TMA_Q, TMA_KV, WIDE, SPLIT, SPECIALIZED, STAGES, MASKED_STAGES, ACC, EARLY,
                HINTS, PRECISION, LONE, LAG, REST, V_REST, BLOCK_REST, BLOCK_V_REST, SCALED,
            )  # fmt: skip
    else:
        _attend_tile(
            tl.program_id(0), tl.num_programs(0), program_row(rows, FOLDED),
            q, k, v, out, lse,
            stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
            stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
            stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
            stride_out_batch, stride_out_head, stride_out_row, stride_out_col,
            stride_lse_batch, stride_lse_head, stride_lse_row,
            scale, q_len, kv_len, offset, left, right, q_heads, group, together, variant,
            SCORE, ALLOWED, CHANGED, FREE, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT,
            EVEN, RISING, REVERSED, GROUPED, TMA_Q, TMA_KV, WIDE, SPLIT, SPECIALIZED, STAGES, MASKED_STAGES, ACC, EARLY,
            HINTS, PRECISION, LONE, LAG, REST, V_REST, BLOCK_REST, BLOCK_V_REST, SCALED,
        )  # fmt: skip


def launches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    q_documents: torch.Tensor | None = None,
    kv_documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    q_starts: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    *,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    top_left: bool,
    softcap: float | None = None,
    chunk: int | None = None,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    functions: Functions | None = None,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    load: str,
    loops: str,
    masked_stages: int,
    head_order: str,
    warp_specialize: bool,
    waves_per_eu: int,
    maxnreg: int = 0,
    groups_together: int = 1,
    programs_per_sm: int = 0,
    flatten: bool = False,
    lone_accumulator: bool = False,
    v_load: str = "late",
    cache_hints: bool = False,
    precision: str = "ieee",
    lag: int = 0,
    head_chunks: bool = False,
    scaled_queries: bool = False,
    mfma_side: int = 0,
    kpack: int = 1,
    multiprocessors: int | None = None,
) -> list[Launch]:
    """One launch that fills `out` and `lse`. Shapes and conventions as in the package docstring and in `variants`.

    `load` is "pointer", "tma" or "tma_kv" (descriptors for K and V only); `loops` is "split" (unmasked and masked key blocks
    apart) or "single"; `head_order` is "outer" (a head's blocks follow each other) or "inner" (the heads of a group, and of
    `groups_together` groups, take turns block by block). With `programs_per_sm` programs for each multiprocessor, they share
    all tiles; 0 makes one for each tile. `flatten` then lets the next tile's loads begin before a tile has ended. `maxnreg` is
    a limit of registers, 0 the compiler's. `v_load` is "late", behind the softmax, or "early". `cache_hints` keep K and V
    in L1, `lone_accumulator` keeps one in tensor memory. `precision` of products of fp32 is "ieee", "tf32" or "tf32x3".
    `head_chunks` make two tiles of a head that is no power of two wide, where these are narrower than one that is padded.
    `scaled_queries` are multiplied with the scale before the loops where that is exact, see `primitives.scales_exactly`.
    Sums are rescaled where the maximum of a row has risen by more than `lag` powers of two: 0 at every step.
    `multiprocessors` is how many the device has, where that cannot be asked (tensors on "meta"). `mfma_side` and `kpack` are for
    AMD: rows of a matrix instruction, 0 for the compiler's choice, and how many operands of it are fetched at once.
    Inputs of 8 bits stand for what their `descale`s multiply them with. Their weights are rounded to their type, lifted by as
    many powers of two as it has headroom, less `lag`; scores and sums are fp32 (but see `primitives.product`), and `out` is bf16,
    fp16 or fp32.
    Raises `ValueError` for tensors or tunables that do not go together.
    """
    eight = q.dtype in primitives.HEADROOM
    primitives.require_inputs(q, k, v, eight_bits=True, **({} if eight else {"out": out}))
    if eight and out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"out must be bf16, fp16 or fp32 for inputs of 8 bits, found {out.dtype}")
    primitives.require_shapes({"out": (out, (*q.shape[:3], v.shape[3])), "lse": (lse, q.shape[:3])})
    primitives.require_blocks(block_m=block_m, block_n=block_n)
    primitives.require_choice(load=(load, ("pointer", "tma", "tma_kv")), loops=(loops, ("split", "single")))
    primitives.require_choice(v_load=(v_load, ("late", "early")), precision=(precision, ("ieee", "tf32", "tf32x3")))
    primitives.require_choice(head_order=(head_order, ("outer", "inner")))
    if groups_together < 1 or programs_per_sm < 0:
        raise ValueError(
            f"at least 1 of groups_together and 0 of programs_per_sm, found {groups_together} and {programs_per_sm}"
        )
    if not 0 <= lag <= _MOST_LAG:
        raise ValueError(f"lag must be at least 0 and at most {_MOST_LAG}, found {lag}")
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group = q_heads // kv_heads
    band = primitives.band_of(
        q_len, kv_len, window_left=window_left, window_right=window_right, top_left=top_left
    )
    if load != "pointer":
        primitives.require_tma(k=k, v=v, **({"q": q} if load == "tma" else {}))
    together = group * math.gcd(groups_together, batch * kv_heads) if head_order == "inner" else 1
    least = primitives.least_side(q.dtype)
    if block_n < least:
        raise ValueError(f"block_n must be at least {least} for {q.dtype}, found {block_n}")
    columns, rest = _chunks(head_dim, head_chunks, least)
    v_columns, v_rest = _chunks(v.shape[3], head_chunks, least)
    block_d, block_dv = primitives.padded(columns, least), primitives.padded(v_columns, least)
    block_rest, block_v_rest = primitives.padded(rest, least), primitives.padded(v_rest, least)
    wide = block_d + block_dv + (block_rest if rest else 0) + (block_v_rest if v_rest else 0)
    variant = variants.variant_of(
        q, k, softcap=softcap, chunk=chunk, dropout=dropout, dropout_seed=dropout_seed, slopes=slopes, bias=bias,
        sinks=sinks, prefix=prefix, q_documents=q_documents, kv_documents=kv_documents, mask=mask,
        q_starts=q_starts, kv_starts=kv_starts, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        top_left=top_left, functions=functions,
    )  # fmt: skip
    if eight:
        lift = primitives.HEADROOM[q.dtype] - lag
        variant = variant._replace(lift=float(lift), lifted=2.0**lift)
    known = variants.constants(variant, functions)
    plain, masked = variants.packed_steps(variant, band, block_m, block_n)
    if known["FREE"] or (loops == "single" and any(masked)):
        plain, masked = (0,) * len(plain), tuple(map(sum, zip(plain, masked, strict=True)))
    rows, width = batch * q_heads // together, len(plain) * together
    grid = primitives.folded_grid(width, rows)
    plain, masked = (tuple(count for count in counts for _ in range(together)) for counts in (plain, masked))
    tiles = None
    persistent = programs_per_sm > 0 and width * rows < _MOST_TILES
    if persistent:
        grid = (min(width * rows, programs_per_sm * (multiprocessors or primitives.multiprocessors(q.device))), 1, 1)
        plain, masked, tiles = primitives.dealt_steps(plain, masked, rows, grid[0])
    # There is no descriptor of nothing.
    described = load != "pointer" and q_len > 0 and kv_len > 0
    factor = scale if known["CHANGED"] else scale * primitives.LOG2_E
    scaled = scaled_queries and primitives.scales_exactly(q.dtype, factor)
    steps = Steps(
        plain=plain, masked=masked, tiles=tiles,
        flops_per_step=2 * block_m * block_n * wide,
    )
    arguments = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse,
        **primitives.strides(q=q, k=k, v=v, out=out, lse=lse),
        "scale": factor, "q_len": q_len, "kv_len": kv_len, **band.arguments(),
        "q_heads": q_heads, "group": group, "rows": rows, "width": width if persistent else None,
        "together": together if together != group else None, "variant": variant,
    }  # fmt: skip
    constants = {
        **known, "HEAD_DIM": columns, "V_HEAD_DIM": v_columns, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "BLOCK_M": block_m, "BLOCK_N": block_n, **band.constants(block_n), **variants.ragged(variant),
        "RISING": scaled or primitives.is_rising(factor), "REVERSED": primitives.longest_last(band), "GROUPED": together > 1,
        "FOLDED": grid[2] > 1, "TMA_Q": described and load == "tma", "TMA_KV": described,
        "WIDE": primitives.needs_wide(max(block_m, block_n), q, k, v, out), "SPLIT": loops == "split",
        "SPECIALIZED": warp_specialize, "STAGES": num_stages, "MASKED_STAGES": masked_stages,
        "ACC": primitives.accumulator(q.dtype), "EARLY": v_load == "early",
        "HINTS": cache_hints, "PRECISION": precision, "LONE": lone_accumulator, "FLAT": flatten,
        "LAG": lag, "REST": rest, "V_REST": v_rest, "BLOCK_REST": block_rest, "BLOCK_V_REST": block_v_rest,
        "SCALED": scaled,
    }  # fmt: skip
    launch = Launch(
        kernel=flash_fwd_kernel, grid=grid, args=arguments, constants=constants, steps=steps, scratch=described,
        options=primitives.options(
            num_warps=num_warps, num_stages=num_stages, waves_per_eu=waves_per_eu, maxnreg=maxnreg, mfma_side=mfma_side,
            kpack=kpack,
        ),
    )  # fmt: skip
    return [launch]


def _chunks(head_dim: int, chunked: bool, least: int) -> tuple[int, int]:
    """Columns of a head in its first tile and in a second one: the largest power of two and the rest, unless padding the rest as
    well would make both as wide as one tile for all."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    narrower = rest > 0 and first >= least and first + primitives.padded(rest, least) < primitives.padded(head_dim)
    return (first, rest) if chunked and narrower else (head_dim, 0)


def workspaces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **variant: torch.Tensor
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Scratch tensors: none."""
    return {}


def flash_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    top_left: bool = False,
    config: Mapping[str, Any] | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    **variant: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output (batch, q_heads, q_len, v_head_dim) and natural log-sum-exp (batch, q_heads, q_len), fp32.

    `scale` None means 1/sqrt(head_dim); causal is `window_right=0`. `config` None takes one that compiles everywhere and is
    not tuned. `variant` is what `variants.variant_of` takes. Raises `ValueError` for tensors or tunables that do not go together.
    """
    if out is None:
        out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=primitives.stored_as(q.dtype))
    if lse is None:
        lse = q.new_empty(q.shape[:3], dtype=primitives.statistics_as(q.dtype))
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    if config is None:
        config = safe_config(q, v)
    found = launches(
        q, k, v, out, lse, scale=scale, window_left=window_left, window_right=window_right, top_left=top_left, **variant,
        **config,
    )  # fmt: skip
    for launch in found:
        launch.run()
    return out, lse


def safe_config(q: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """A small configuration that fits any GPU Triton knows."""
    widest = max(primitives.padded(q.shape[3]), primitives.padded(v.shape[3]))
    eight = q.dtype in primitives.HEADROOM
    narrow = q.element_size() > 2 or (widest > 128 and not eight)
    return {
        "block_m": 32 if narrow else 64, "block_n": 32 if widest <= 128 or eight else 16,
        "num_warps": 8 if eight and widest > 128 else 4, "num_stages": 1,
        "load": "pointer", "loops": "split", "masked_stages": 1, "head_order": "outer", "warp_specialize": False,
        "waves_per_eu": 0, "maxnreg": 0, "groups_together": 1, "programs_per_sm": 0,
        "flatten": False, "lone_accumulator": False, "v_load": "late", "cache_hints": False, "precision": "ieee", "lag": 0,
        "head_chunks": False, "scaled_queries": False, "mfma_side": 0, "kpack": 1,
    }  # fmt: skip
