"""Forward attention of few queries and many keys: the keys are split, every part is attended to by a program of its own.

One query per head leaves a GPU idle, however many keys there are. So the key blocks that any query sees are dealt out in
`num_splits` runs of nearly equal length (flash-decoding: Dao et al. 2023), each of which ends in the state of an online
softmax; `merge` adds the states up. The query heads that share a key/value head are rows of one tile, so that keys are read
once for all of them: row r is query r // group of head r % group. What a row gets depends on the lengths, the band, `block_n`
and `num_splits` only, and not on the rows beside it: splits do not depend on the tile, and every row visits its blocks in
ascending order. Any number of queries works; many are attended to faster by `flash_fwd`. Refuses to differentiate.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from . import primitives
from .launch import Launch, Steps
from .merge import finished, merge_launch, part_strides
from .paged import Pages, length_of, load_paged, most_keys, pages_at_zero, pages_of
from .primitives import (
    Band,
    band_blocks,
    load_tile,
    product,
    program_row,
    rounded,
    tile_at_zero,
    visible,
)

PASS = "fwd"
PACKED = True


@triton.jit
def _share(split, first, count, SPLITS: tl.constexpr):
    """Blocks [begin, end) of `count` blocks from `first` on that belong to a split; the first splits take one more."""
    each = count // SPLITS
    more = count - each * SPLITS
    begin = first + split * each + tl.minimum(split, more)
    end = begin + each + tl.where(split < more, 1, 0)
    return begin, end


@triton.jit
def _attend(
    q, k_at, v_at, start, m, z, acc, query, scale, kv_len, offset, left, right, stride_k_row, stride_v_row,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, RISING: tl.constexpr, TMA: tl.constexpr,
    pages, batch, stride_k_page, stride_v_page, PAGE: tl.constexpr,
):  # fmt: skip
    """One key block: (m, z, acc) of the online softmax (Milakov and Gimelshein 2018) after keys start... start + BLOCK_N."""
    CHECK: tl.constexpr = MASKED and not EVEN

    # Load
    if PAGE:
        k = load_paged(
            k_at, pages, batch, start, kv_len, stride_k_page, stride_k_row, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK, TMA and not CHECK,
            PAGE,
        )  # fmt: skip
    else:
        k = load_tile(k_at, start, kv_len, stride_k_row, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK, TMA)

    # Score
    s = product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], dtype=acc.dtype))

    # Mask: before scaling where that keeps -inf what it is, so that scaling and shifting are one fused operation.
    factor = scale
    if not RISING:
        s = s * scale
        factor = 1.0
    if MASKED:
        col = start + tl.arange(0, BLOCK_N)
        seen = visible(query[:, None], col[None, :], offset, left, right, kv_len, HAS_LEFT, HAS_RIGHT, EVEN)
        s = tl.where(seen, s, float("-inf"))

    # Softmax
    m_next = tl.maximum(m, tl.max(s, 1) * factor)
    shift = m_next
    if MASKED:
        # A row that saw nothing yet: -inf - -inf is NaN, -inf - 0 is -inf.
        shift = tl.where(m_next == float("-inf"), 0.0, m_next)
    p = tl.exp2(s * factor - shift[:, None])
    shrink = tl.exp2(m - shift)

    # Accumulate
    if PAGE:
        v = load_paged(
            v_at, pages, batch, start, kv_len, stride_v_page, stride_v_row, V_HEAD_DIM, BLOCK_N, BLOCK_DV, CHECK,
            TMA and not CHECK, PAGE,
        )  # fmt: skip
    else:
        v = load_tile(v_at, start, kv_len, stride_v_row, V_HEAD_DIM, BLOCK_N, BLOCK_DV, CHECK, TMA)
    z = z * shrink + tl.sum(p, 1)
    acc = product(rounded(p, v.dtype), v, acc * shrink[:, None])
    return m_next, z, acc


@triton.jit(do_not_specialize=["q_len", "kv_len", "offset", "left", "right", "first_of_all", "count_of_all", "rows", "kv_heads"])
def flash_decode_kernel(
    q, k, v, out, lse, total,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_out_part, stride_out_batch, stride_out_head, stride_out_row, stride_out_col,
    stride_lse_part, stride_lse_batch, stride_lse_head, stride_lse_row,
    stride_total_part, stride_total_batch, stride_total_head, stride_total_row,
    scale, q_len, kv_len, offset, left, right, first_of_all, count_of_all, kv_heads, group, rows, pages,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, RISING: tl.constexpr, FOLDED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
    SINGLE: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of a group of heads against one split of the keys. With one split `out` and `lse` are the results, else
    the accumulators and, to base 2, the maxima, and `total` the sums. `scale` is to base 2. PAGE is 0 unless keys and values lie
    in `pages` of so many rows; every sequence then has a length, and with it a band and shares of its own."""
    # Position: blocks of rows that read the same keys are neighbours.
    row_blocks = tl.num_programs(0) // SPLITS
    position = tl.program_id(0)
    split = position // row_blocks
    start_m = (position - split * row_blocks) * BLOCK_M
    kv_row = program_row(rows, FOLDED)
    batch = (kv_row // kv_heads).to(tl.int64)
    kv_head = (kv_row % kv_heads).to(tl.int64)
    row = start_m + tl.arange(0, BLOCK_M)
    query = row // group
    inside = query < q_len
    # Rows of a group lie nowhere in line, and are reached once: in 64 bits.
    head_at = kv_head * group + (row - query * group)
    query_at = query.to(tl.int64)
    col = tl.arange(0, BLOCK_D).to(tl.int64)
    col_v = tl.arange(0, BLOCK_DV).to(tl.int64)

    if PAGE:
        kv_len = length_of(pages, batch)
        offset = (kv_len - q_len) * pages.bottom_right
        first_of_all, _, _, last_of_all = band_blocks(
            0, q_len - 1, offset, left, right, kv_len, BLOCK_N, HAS_LEFT, HAS_RIGHT
        )
        count_of_all = last_of_all - first_of_all

    # Share: the blocks that the rows of this tile see, and this split has.
    first_query = start_m // group
    last_query = tl.minimum((start_m + BLOCK_M - 1) // group, q_len - 1)
    first, _, plain_last, last = band_blocks(
        first_query, last_query, offset, left, right, kv_len, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    begin, end = _share(split, first_of_all, count_of_all, SPLITS)
    first = tl.maximum(first, begin)
    last = tl.maximum(tl.minimum(last, end), first)
    plain_last = tl.maximum(tl.minimum(plain_last, last), first)
    m = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    z = tl.zeros([BLOCK_M], dtype=ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=ACC)

    if first < last:
        # Load
        q_base = q + batch * stride_q_batch
        if PAGE:
            k_base = k + kv_head * stride_k_head
            v_base = v + kv_head * stride_v_head
        else:
            k_base = k + batch * stride_k_batch + kv_head * stride_k_head
            v_base = v + batch * stride_v_batch + kv_head * stride_v_head
        q_at = (head_at * stride_q_head + query_at * stride_q_row)[:, None] + (col * stride_q_col)[None, :]
        q_tile = tl.load(q_base + q_at, mask=inside[:, None] & (col < HEAD_DIM)[None, :], other=0.0)
        if PAGE:
            k_at = pages_at_zero(
                k_base, pages, stride_k_batch, stride_k_row, stride_k_col, HEAD_DIM, BLOCK_N, BLOCK_D, PAGE, TMA, WIDE
            )
            v_at = pages_at_zero(
                v_base, pages, stride_v_batch, stride_v_row, stride_v_col, V_HEAD_DIM, BLOCK_N, BLOCK_DV, PAGE, TMA, WIDE
            )
        else:
            k_at = tile_at_zero(k_base, kv_len, stride_k_row, stride_k_col, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, WIDE)
            v_at = tile_at_zero(v_base, kv_len, stride_v_row, stride_v_col, V_HEAD_DIM, BLOCK_N, BLOCK_DV, TMA, WIDE)

        # Attend
        ANY_MASK: tl.constexpr = HAS_LEFT or HAS_RIGHT or not EVEN
        if HAS_LEFT or (SINGLE and ANY_MASK):
            for block in tl.range(first, last, num_stages=STAGES):
                m, z, acc = _attend(
                    q_tile, k_at, v_at, block * BLOCK_N, m, z, acc, query, scale, kv_len, offset, left, right,
                    stride_k_row, stride_v_row, HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True,
                    HAS_LEFT, HAS_RIGHT, EVEN, RISING, TMA,
                    pages, batch, stride_k_batch, stride_v_batch, PAGE,
                )  # fmt: skip
        else:
            for block in tl.range(first, plain_last, num_stages=STAGES):
                m, z, acc = _attend(
                    q_tile, k_at, v_at, block * BLOCK_N, m, z, acc, query, scale, kv_len, offset, left, right,
                    stride_k_row, stride_v_row, HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False,
                    HAS_LEFT, HAS_RIGHT, EVEN, RISING, TMA,
                    pages, batch, stride_k_batch, stride_v_batch, PAGE,
                )  # fmt: skip
            if PAGE and TMA:
                # The last blocks end inside a page, where a descriptor would read on.
                k_at = pages_at_zero(
                    k_base, pages, stride_k_batch, stride_k_row, stride_k_col, HEAD_DIM, BLOCK_N, BLOCK_D, PAGE, False, WIDE
                )
                v_at = pages_at_zero(
                    v_base, pages, stride_v_batch, stride_v_row, stride_v_col, V_HEAD_DIM, BLOCK_N, BLOCK_DV, PAGE, False, WIDE
                )
            if ANY_MASK:
                for block in tl.range(plain_last, last, num_stages=1):
                    m, z, acc = _attend(
                        q_tile, k_at, v_at, block * BLOCK_N, m, z, acc, query, scale, kv_len, offset, left, right,
                        stride_k_row, stride_v_row, HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True,
                        HAS_LEFT, HAS_RIGHT, EVEN, RISING, TMA,
                        pages, batch, stride_k_batch, stride_v_batch, PAGE,
                    )  # fmt: skip

    # Store. A row that saw nothing has m = -inf, z = 0 and acc = 0, also in a split that had nothing for it.
    part = split.to(tl.int64)
    out_base = out + part * stride_out_part + batch * stride_out_batch
    out_at = (head_at * stride_out_head + query_at * stride_out_row)[:, None] + (col_v * stride_out_col)[None, :]
    lse_at = lse + part * stride_lse_part + batch * stride_lse_batch + head_at * stride_lse_head + query_at * stride_lse_row
    if SPLITS == 1:
        o, natural = finished(m, z, acc)
        tl.store(lse_at, natural.to(lse.dtype.element_ty), mask=inside)
    else:
        o = acc
        total_at = total + part * stride_total_part + batch * stride_total_batch
        tl.store(lse_at, m, mask=inside)
        tl.store(total_at + head_at * stride_total_head + query_at * stride_total_row, z, mask=inside)
    o = rounded(o, out.dtype.element_ty)
    tl.store(out_base + out_at, o, mask=inside[:, None] & (col_v < V_HEAD_DIM)[None, :])


def launches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sums: torch.Tensor | None = None,
    maxima: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    *,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    top_left: bool,
    block_m: int,
    block_n: int,
    num_splits: int,
    num_warps: int,
    num_stages: int,
    load: str,
    loops: str,
    waves_per_eu: int,
) -> list[Launch]:
    """Two launches that fill `out` and `lse`, the splits and their merge, or one if `num_splits` is 1, which needs no scratch.

    Shapes and conventions as in the package docstring; `sums`, `maxima` and `totals` are scratch, see `workspaces`. `block_m`
    counts queries of all heads of a group together; `num_splits` is any number, also more than there are key blocks; `load`
    says how keys and values are read, "pointer" or "tma"; `loops` is "split" (unmasked and masked key blocks apart, unless
    there is a left window) or "single". With `block_table` and `kv_lengths` k and v are pools of pages (see `paged`), and the
    band is that of each sequence's own length; "tma" then needs pages of whole key blocks, and a loop for unmasked ones alone.
    Raises `ValueError` for tensors or tunables that do not go together.
    """
    pages = pages_of(q, k, v, block_table, kv_lengths, top_left=top_left)
    primitives.require_inputs(q, k, v, paged=pages.table is not None, out=out)
    primitives.require_shapes({"out": (out, (*q.shape[:3], v.shape[3])), "lse": (lse, q.shape[:3])})
    primitives.require_blocks(block_m=block_m, block_n=block_n)
    primitives.require_choice(load=(load, ("pointer", "tma")), loops=(loops, ("split", "single")))
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, found {num_splits}")
    if load == "tma" and k.shape[2]:
        primitives.require_tma(k=k, v=v)
    found = {"sums": sums, "maxima": maxima, "totals": totals}
    scratch = {}
    for name, (shape, dtype) in workspaces(q, k, v, num_splits=num_splits).items():
        tensor = found[name]
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            what = "nothing" if tensor is None else f"{tuple(tensor.shape)}, {tensor.dtype}"
            raise ValueError(f"num_splits={num_splits} needs {name} of shape {shape}, {dtype}, found {what}")
        scratch[name] = tensor
    # What hides nothing in the longest sequence hides nothing in any.
    band = primitives.band_of(
        q.shape[2], most_keys(k, pages), window_left=window_left, window_right=window_right, top_left=top_left
    )
    if pages.table is not None and load == "tma":
        _require_whole_blocks(k.shape[2], block_n, band, loops)
    # One split is a part of its own, which is finished at once.
    parts = (scratch["sums"], scratch["maxima"], scratch["totals"]) if scratch else (out[None], lse[None], lse[None])
    launch = _launch_splits(
        (q, k, v), pages, parts, band, scale * primitives.LOG2_E, tile=(block_m, block_n, num_splits), load=load, loops=loops,
        stages=num_stages,
        options=primitives.options(num_warps=num_warps, num_stages=num_stages, waves_per_eu=waves_per_eu),
    )  # fmt: skip
    return [launch, merge_launch(*parts, out, lse)] if scratch else [launch]


def _launch_splits(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pages: Pages,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    band: Band,
    factor: float,
    *,
    tile: tuple[int, int, int],
    load: str,
    loops: str,
    stages: int,
    options: Mapping[str, Any],
) -> Launch:
    """The launch that attends to every split; `parts` have the splits on their first axis."""
    (q, k, v), (out, lse, total) = inputs, parts
    block_m, block_n, splits = tile
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], band.columns
    group = q_heads // kv_heads
    block_d, block_dv = primitives.padded(head_dim), primitives.padded(v.shape[3])
    plain, masked = _steps(band, group, block_m, block_n, splits, loops == "single")
    first, _, _, last = _blocks(band, 0, q_len - 1, block_n)
    grid = primitives.folded_grid(len(plain), batch * kv_heads)
    arguments = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse, "total": total,
        **primitives.strides(q=q, k=k, v=v), **part_strides(out=out, lse=lse, total=total),
        "scale": factor, "q_len": q_len, "kv_len": kv_len, **band.arguments(),
        "first_of_all": first, "count_of_all": last - first, "kv_heads": kv_heads, "group": group, "rows": batch * kv_heads,
        "pages": pages,
    }  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "V_HEAD_DIM": v.shape[3], "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "BLOCK_M": block_m, "BLOCK_N": block_n, **band.constants(block_n),
        "RISING": primitives.is_rising(factor), "FOLDED": grid[2] > 1, "TMA": load == "tma" and q_len > 0 and kv_len > 0,
        "WIDE": primitives.needs_wide(block_n, k, v), "SINGLE": loops == "single", "SPLITS": splits, "STAGES": stages,
        "ACC": primitives.accumulator(q.dtype), "PAGE": 0 if pages.table is None else k.shape[2],
    }  # fmt: skip
    if pages.table is not None:
        # Only the device knows where a sequence ends.
        constants["EVEN"] = False
    flops = 2 * block_m * block_n * (block_d + block_dv)
    steps = Steps(plain=plain, masked=masked, flops_per_step=flops, rows=block_m)
    return Launch(
        kernel=flash_decode_kernel, grid=grid, args=arguments, constants=constants, steps=steps, scratch=constants["TMA"],
        options=options,
    )  # fmt: skip


def _require_whole_blocks(rows: int, block_n: int, band: Band, loops: str) -> None:
    """Raise `ValueError` unless descriptors read nothing but what lies inside a page and a sequence."""
    if rows % block_n:
        raise ValueError(f"load='tma' needs pages of whole key blocks, but pages have {rows} rows and block_n is {block_n}")
    if loops == "single" or band.left is not None:
        raise ValueError("load='tma' of pages needs loops='split' and no left window, so that unmasked blocks have a loop")


def _blocks(band: Band, first_query: int, last_query: int, block_n: int) -> tuple[int, int, int, int]:
    """What `band_blocks` gives for queries first_query..last_query; nothing for no query."""
    count = last_query - first_query + 1
    if not count:
        return 0, 0, 0, 0
    return Band(count, band.columns, band.offset + first_query, band.left, band.right).blocks(0, count, block_n)


@functools.lru_cache(maxsize=256)
def _steps(
    band: Band, group: int, block_m: int, block_n: int, splits: int, single: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Plain and masked key blocks of every program along the first axis: splits, and in each the blocks of rows."""
    first_of_all, _, _, last_of_all = _blocks(band, 0, band.rows - 1, block_n)
    each, more = divmod(last_of_all - first_of_all, splits)
    single = band.left is not None or (single and (band.right is not None or band.columns % block_n != 0))
    starts = range(0, band.rows * group, block_m)
    seen = [_blocks(band, at // group, min((at + block_m - 1) // group, band.rows - 1), block_n) for at in starts]
    plain, masked = [], []
    for split in range(splits):
        begin = first_of_all + split * each + min(split, more)
        end = begin + each + (split < more)
        for first, _, plain_last, last in seen:
            from_, to = max(first, begin), max(min(last, end), first, begin)
            free = 0 if single else max(min(plain_last, to), from_) - from_
            plain.append(free)
            masked.append(to - from_ - free)
    return tuple(plain), tuple(masked)


def workspaces(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    *,
    num_splits: int,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Scratch tensors: accumulators, maxima (to base 2) and sums of every split, in the type of the sums; none for one split."""
    if num_splits == 1:
        return {}
    wide = primitives.statistics_as(q.dtype)
    rows = (num_splits, *q.shape[:3])
    return {"sums": ((*rows, v.shape[3]), wide), "maxima": (rows, wide), "totals": (rows, wide)}


def flash_decode(
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
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output (batch, q_heads, q_len, v_head_dim) and natural log-sum-exp (batch, q_heads, q_len), fp32.

    `scale` None means 1/sqrt(head_dim); causal is `window_right=0`. With `block_table` (batch, columns) and `kv_lengths` (batch),
    int32, k and v are pools of pages, see `paged`. `config` None takes one that compiles everywhere and is not tuned. Raises
    `ValueError` for tensors or tunables that do not go together.
    """
    if out is None:
        out = q.new_empty((*q.shape[:3], v.shape[3]))
    if lse is None:
        lse = q.new_empty(q.shape[:3], dtype=primitives.statistics_as(q.dtype))
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    if config is None:
        config = safe_config(q, k, v, block_table)
    wanted = workspaces(q, k, v, num_splits=config["num_splits"])
    scratch = {name: q.new_empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
    found = launches(
        q, k, v, out, lse, **scratch, block_table=block_table, kv_lengths=kv_lengths, scale=scale, window_left=window_left,
        window_right=window_right, top_left=top_left, **config,
    )  # fmt: skip
    for launch in found:
        launch.run()
    return out, lse


def safe_config(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor | None = None
) -> dict[str, Any]:
    """A small configuration that fits any GPU Triton knows; a split has at least 512 keys, and there are at most 16."""
    widest = max(primitives.padded(q.shape[3]), primitives.padded(v.shape[3]))
    keys = k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]
    return {
        "block_m": 16, "block_n": 32 if widest <= 128 else 16, "num_splits": max(1, min(16, keys // 512)),
        "num_warps": 4, "num_stages": 1, "load": "pointer", "loops": "split", "waves_per_eu": 0,
    }  # fmt: skip
