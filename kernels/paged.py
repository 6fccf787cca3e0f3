"""Keys and values in pages of a pool that many sequences share, as serving systems keep them.

A pool is (pages, kv_heads, rows, head_dim) with any strides. Row j of sequence b is row j % rows of page table[b, j // rows], for
j below the length of the sequence; a page may belong to several sequences, and pages lie in any order. Rows behind the end of
a sequence, and the entries of the table that would name their pages, hold anything and are never read. Rows per page are a
compile-time number, any from 1 on.

Where a page holds a whole block of keys, a block is a tile of one page, found by one look into the table; elsewhere every row of
a tile looks its page up. Descriptors read whole blocks, so that only blocks inside a sequence and a page are read by them.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import primitives
from .primitives import load_tile, tile_at_zero


class Pages(NamedTuple):
    """What a kernel is told: table (batch, columns) and lengths (batch), int32, with their strides; `count` is the number of
    pages in the pools, `bottom_right` 1 unless bands are aligned top-left. All None where keys are not paged."""

    table: Any = None
    stride_table_batch: Any = None
    stride_table_col: Any = None
    lengths: Any = None
    stride_lengths_batch: Any = None
    count: Any = None
    bottom_right: Any = None


# ---------------------------------------------------------------------------------------------------------------------
# Device
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def length_of(pages, batch):
    """The number of keys of a sequence."""
    return tl.load(pages.lengths + batch * pages.stride_lengths_batch)


@triton.jit
def page_of(pages, batch, column):
    """The page in a column of a sequence's row of the table, in 64 bits."""
    table_at = pages.table + batch * pages.stride_table_batch
    return tl.load(table_at + tl.cast(column, tl.int64) * pages.stride_table_col).to(tl.int64)


@triton.jit
def pages_at_zero(
    base, pages, stride_page, stride_row, stride_col, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, PAGE: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the tiles of a head of a pool are found: a descriptor, the pointers of the first tile of a page, or where every row
    has a page of its own, those of the first row of the pool."""
    if TMA:
        strides = [tl.cast(stride_page, tl.int64), tl.cast(stride_row, tl.int64), 1]
        at_zero = tl.make_tensor_descriptor(base, [pages.count, PAGE, COLS], strides, [1, BLOCK_ROWS, BLOCK_COLS])
    elif PAGE % BLOCK_ROWS == 0:
        at_zero = tile_at_zero(base, PAGE, stride_row, stride_col, COLS, BLOCK_ROWS, BLOCK_COLS, False, WIDE)
    else:
        at_zero = base + (tl.arange(0, BLOCK_COLS).to(tl.int64) * stride_col)[None, :]
    return at_zero


@triton.jit
def load_paged(
    at_zero, pages, batch, start, length, stride_page, stride_row, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, CHECK_ROWS: tl.constexpr, TMA: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Rows start... of a sequence as a tile, zero behind its end; `start` lies before that, and divides into BLOCK_ROWS."""
    if TMA:
        found = at_zero.load([page_of(pages, batch, start // PAGE).to(tl.int32), start % PAGE, 0])
        tile = found.reshape([BLOCK_ROWS, BLOCK_COLS])
    elif PAGE % BLOCK_ROWS == 0:
        first = at_zero + page_of(pages, batch, start // PAGE) * stride_page
        # The rows of the page before this block are added, and those of the pages before it are not.
        skipped = start // PAGE * PAGE
        tile = load_tile(
            first, start - skipped, length - skipped, stride_row, COLS, BLOCK_ROWS, BLOCK_COLS, CHECK_ROWS, False
        )
    else:
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = row < length
        table_at = pages.table + batch * pages.stride_table_batch
        page = tl.load(table_at + (row // PAGE).to(tl.int64) * pages.stride_table_col, mask=inside, other=0)
        row_at = page.to(tl.int64) * stride_page + (row % PAGE).to(tl.int64) * stride_row
        there = inside[:, None] & (tl.arange(0, BLOCK_COLS) < COLS)[None, :]
        tile = tl.load(at_zero + row_at[:, None], mask=there, other=0.0)
    return tile


# ---------------------------------------------------------------------------------------------------------------------
# Host
# ---------------------------------------------------------------------------------------------------------------------


def pages_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    *,
    top_left: bool,
) -> Pages:
    """The description of a call. Raises `ValueError` for tensors that do not go together.

    What the table and the lengths hold is not checked, because they lie on the device: each length must be at least 0 and at
    most columns times rows of a page, and the pages that it needs must exist.
    """
    if block_table is None and kv_lengths is None:
        return Pages()
    if block_table is None or kv_lengths is None:
        raise ValueError("paged keys need both a block_table and kv_lengths, found one of them")
    primitives.require_inputs(q, k, v, paged=True)
    for name, tensor, axes in (("block_table", block_table, 2), ("kv_lengths", kv_lengths, 1)):
        if tensor.dtype != torch.int32 or tensor.ndim != axes or tensor.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} must be int32 with {axes} axes, the first of {q.shape[0]} sequences, found {tensor.dtype} and the shape"
                f" {tuple(tensor.shape)}"
            )
    if k.shape[2] < 1:
        raise ValueError("a page must hold at least one row, found pages of none")
    return Pages(
        table=block_table, stride_table_batch=block_table.stride(0), stride_table_col=block_table.stride(1),
        lengths=kv_lengths, stride_lengths_batch=kv_lengths.stride(0), count=k.shape[0], bottom_right=0 if top_left else 1,
    )  # fmt: skip


def most_keys(k: torch.Tensor, pages: Pages) -> int:
    """How long a sequence can be: what the table has room for, or the length of k."""
    return int(k.shape[2]) if pages.table is None else int(pages.table.shape[1]) * int(k.shape[2])
