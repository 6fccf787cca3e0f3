"""Partial attention over disjoint sets of keys, made whole.

A row of attention over some keys is known by a state: its maximum m, its sum z of exponentials below m, and its unnormalised
output acc. States of disjoint sets add up: with M the largest m, z = sum z_i exp(m_i - M), acc = sum acc_i exp(m_i - M). A
finished partial result is a state as well, (lse, 1, out). Exact but for rounding, and the same bits in every run. Refuses to
attend to anything.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import primitives
from .launch import Launch
from .primitives import log_sum_exp, program_row, rounded, widened

_LOG2_E = tl.constexpr(primitives.LOG2_E)
_LOG_2 = tl.constexpr(math.log(2.0))

# Elements, parts and rows that a program holds at once, and its warps: it only streams, so this is not worth a search.
_HELD = 2048
_PARTS = 16
_ROWS = 16
_WARPS = 4


@triton.jit
def finished(m, z, acc):
    """(out, lse) of rows from their states, m being to base 2: 0 and -inf where nothing was seen, NaN where z is NaN."""
    out = acc / tl.where(z == 0, 1.0, z)[:, None]
    lse = tl.where(z != z, z, log_sum_exp(m, z))
    return out, lse


@triton.jit(do_not_specialize=["parts", "rows", "heads", "length"])
def merge_kernel(
    outs, lses, totals, out, lse,
    stride_outs_part, stride_outs_batch, stride_outs_head, stride_outs_row, stride_outs_col,
    stride_lses_part, stride_lses_batch, stride_lses_head, stride_lses_row,
    stride_totals_part, stride_totals_batch, stride_totals_head, stride_totals_row,
    stride_out_batch, stride_out_head, stride_out_row, stride_out_col,
    stride_lse_batch, stride_lse_head, stride_lse_row,
    parts, rows, heads, length,
    COLS: tl.constexpr, BLOCK_COLS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, FINISHED: tl.constexpr,
    FOLDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All parts of ROWS queries of one head. FINISHED parts are (lse, 1, out) with a natural lse; others are states
    (m, z, acc), m to base 2."""
    # Position: every offset has 64 bits, for parts may lie anywhere.
    head_row = program_row(rows, FOLDED)
    batch = (head_row // heads).to(tl.int64)
    head = (head_row % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < length
    query = row.to(tl.int64)
    col = tl.arange(0, BLOCK_COLS).to(tl.int64)
    lses_at = lses + batch * stride_lses_batch + head * stride_lses_head + query * stride_lses_row
    totals_at = totals + batch * stride_totals_batch + head * stride_totals_head + query * stride_totals_row
    outs_at = outs + batch * stride_outs_batch + head * stride_outs_head + query * stride_outs_row

    # Maximum. NaN may be lost here, and comes back with the weights.
    top = tl.full([ROWS], float("-inf"), dtype=ACC)
    for start in tl.range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS)).to(tl.int64)
        there = inside[:, None] & (part < parts)[None, :]
        m = tl.load(lses_at[:, None] + (part * stride_lses_part)[None, :], mask=there, other=float("-inf"))
        top = tl.maximum(top, tl.max(m.to(ACC), 1))
    shift = tl.where(top == float("-inf"), 0.0, top)

    # Accumulate
    z = tl.zeros([ROWS], dtype=ACC)
    acc = tl.zeros([ROWS, BLOCK_COLS], dtype=ACC)
    for start in tl.range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS)).to(tl.int64)
        there = inside[:, None] & (part < parts)[None, :]
        m = tl.load(lses_at[:, None] + (part * stride_lses_part)[None, :], mask=there, other=float("-inf"))
        distance = m.to(ACC) - shift[:, None]
        if FINISHED:
            weight = tl.exp2(distance * _LOG2_E)
            z += tl.sum(weight, 1)
        else:
            weight = tl.exp2(distance)
            total = tl.load(totals_at[:, None] + (part * stride_totals_part)[None, :], mask=there, other=0.0)
            z += tl.sum(weight * total.to(ACC), 1)
        tile_at = outs_at[:, None, None] + (part * stride_outs_part)[None, :, None] + (col * stride_outs_col)[None, None, :]
        tile = tl.load(tile_at, mask=there[:, :, None] & (col < COLS)[None, None, :], other=0.0)
        acc += tl.sum(weight[:, :, None] * widened(tile, ACC), 1)

    # Store
    if FINISHED:
        o, _ = finished(shift, z, acc)
        natural = tl.where(z == 0, float("-inf"), shift + tl.log2(tl.where(z == 0, 1.0, z)) * _LOG_2)
    else:
        o, natural = finished(shift, z, acc)
    out_at = out + batch * stride_out_batch + head * stride_out_head + query * stride_out_row
    lse_at = lse + batch * stride_lse_batch + head * stride_lse_head + query * stride_lse_row
    o_at = out_at[:, None] + (col * stride_out_col)[None, :]
    tl.store(o_at, rounded(o, out.dtype.element_ty), mask=inside[:, None] & (col < COLS)[None, :])
    tl.store(lse_at, natural.to(lse.dtype.element_ty), mask=inside)


def part_strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Run-time arguments `stride_<tensor>_<axis>` for the axes part, batch, head, row and column."""
    return {
        f"stride_{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(("part", "batch", "head", "row", "col"), tensor.stride(), strict=False)
    }


def merge_launch(
    outs: torch.Tensor, lses: torch.Tensor, totals: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
) -> Launch:
    """The launch that fills `out` (batch, heads, q_len, v_head_dim) and `lse` (batch, heads, q_len), with any strides.

    `outs` is (parts, *out.shape), `lses` and `totals` are (parts, *lse.shape): states, or finished parts if `totals` is None.
    """
    primitives.require_shapes({"lses": (lses, outs.shape[:4]), "out": (out, outs.shape[1:]), "lse": (lse, outs.shape[1:4])})
    parts, batch, heads, length, columns = outs.shape
    if totals is not None:
        primitives.require_shapes({"totals": (totals, outs.shape[:4])})
    block = primitives.padded(columns)
    at_once = min(triton.next_power_of_2(max(parts, 1)), _PARTS, max(1, _HELD // block))
    rows_at_once = max(1, min(_ROWS, _HELD // (at_once * block), triton.next_power_of_2(max(length, 1))))
    grid = primitives.folded_grid(-(-length // rows_at_once), batch * heads)
    arguments = {
        "outs": outs, "lses": lses, "totals": lses if totals is None else totals, "out": out, "lse": lse,
        **part_strides(outs=outs, lses=lses, totals=lses if totals is None else totals),
        **primitives.strides(out=out, lse=lse),
        "parts": parts, "rows": batch * heads, "heads": heads, "length": length,
    }  # fmt: skip
    constants = {
        "COLS": columns, "BLOCK_COLS": block, "ROWS": rows_at_once, "PARTS": at_once, "FINISHED": totals is None,
        "FOLDED": grid[2] > 1, "ACC": primitives.accumulator(outs.dtype),
    }  # fmt: skip
    return Launch(
        kernel=merge_kernel, grid=grid, args=arguments, constants=constants, options=primitives.options(num_warps=_WARPS)
    )


def merge(
    outs: torch.Tensor | Sequence[torch.Tensor],
    lses: torch.Tensor | Sequence[torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from attention over disjoint parts of them: (out, lse), as if it had been computed at once.

    `outs` is (parts, batch, heads, q_len, v_head_dim), fp32 or 16-bit, and `lses` (parts, batch, heads, q_len) their natural
    log-sum-exps, fp32, -inf in rows that saw no key of a part; both with any strides, or sequences of one tensor per part
    (which are copied side by side). fp64 in the interpreter only. A row that is empty in all parts gives 0 and -inf. NaN in a
    part reaches the result. out has `dtype`, or that of `outs`; lse is fp32 (fp64 for fp64). Raises `ValueError` for tensors
    that do not go together.
    """
    outs = _stacked("outs", outs, 5)
    lses = _stacked("lses", lses, 4)
    wide = torch.promote_types(outs.dtype, torch.float32)
    if lses.dtype != wide:
        raise ValueError(f"lses of outs of {outs.dtype} must be {wide}, found {lses.dtype}")
    if outs.dtype == torch.float64 and not primitives.INTERPRETED.value:
        raise ValueError("outs must be fp16, bf16 or fp32 (or fp64 in the interpreter), found torch.float64")
    if out is None:
        out = outs.new_empty(outs.shape[1:], dtype=dtype or outs.dtype)
    if lse is None:
        lse = outs.new_empty(outs.shape[1:4], dtype=wide)
    merge_launch(outs, lses, None, out, lse).run()
    return out, lse


def _stacked(name: str, parts: torch.Tensor | Sequence[torch.Tensor], axes: int) -> torch.Tensor:
    if not isinstance(parts, torch.Tensor):
        parts = list(parts)
        if not parts or any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
            found = [(tuple(part.shape), part.dtype) for part in parts]
            raise ValueError(f"{name} must be tensors of one shape and type, at least one, found {found}")
        parts = torch.stack(parts)
    if parts.ndim != axes:
        raise ValueError(f"{name} must have {axes} axes, parts first, found the shape {tuple(parts.shape)}")
    return parts
