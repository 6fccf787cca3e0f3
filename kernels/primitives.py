"""Pieces that every attention kernel shares: tiles, the visible band, rounding, the matrix product; and the host's view of it.

The `@triton.jit` functions are used unchanged by the forward and the backward pass; the host part describes the same band in
Python, so that a launch can say how many steps it makes. Refuses to launch anything and to know a pass.

The band: row i sees column j  iff  i + offset - left <= j <= i + offset + right. Read the other way round, column j is seen by
row i  iff  j - offset - right <= i <= j - offset + left: again a band, with `-offset` and the two sides exchanged. So the same
code finds the key blocks of a query block and the query blocks of a key block.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)

# Read once: Triton itself fixes the mode when it is imported.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Triton does not take a plain string as the default of a function that another one calls.
_IEEE = tl.constexpr("ieee")
_NO_HINT = tl.constexpr("")
_LOG_2 = tl.constexpr(math.log(2.0))
_LOG2_E = tl.constexpr(LOG2_E)

# ---------------------------------------------------------------------------------------------------------------------
# Device: arithmetic
# ---------------------------------------------------------------------------------------------------------------------


# No function here returns from inside an `if`: Triton compiles what follows such a return even where the condition is a
# constant, so that a branch left out would still have to fit.


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x to dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter would truncate; compiled code never comes here.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(x != x, 0x7FC0, nearest)
        result = nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif INTERPRETED and dtype == tl.float8e4nv:
        result = _eight_bits(x, 3, 7, 0x7E).to(dtype, bitcast=True)
    elif INTERPRETED and dtype == tl.float8e5:
        result = _eight_bits(x, 2, 15, 0x7B).to(dtype, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def _eight_bits(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """The bits of x in a format of 8 bits, to nearest even and no further than its largest number, as devices do
    (PTX ISA, cvt.rn.satfinite). For the interpreter, which carries no digit over and cuts subnormal numbers off."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    # Beside this number the last digit of fp32 is that of the subnormal numbers.
    ANCHOR: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    size = (bits & 0x7FFFFFFF).to(tl.int32)
    normal = ((size + ((1 << (SHIFT - 1)) - 1) + ((size >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    anchored = size.to(tl.float32, bitcast=True) + ANCHOR
    anchor = (tl.zeros_like(anchored) + ANCHOR).to(tl.int32, bitcast=True)
    subnormal = anchored.to(tl.int32, bitcast=True) - anchor
    nearest = tl.where(size < ((128 - BIAS) << 23), subnormal, tl.minimum(normal, LARGEST))
    nearest = tl.where(x != x, 0x7F, nearest)
    return (nearest.to(tl.uint32) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def widened(x, dtype: tl.constexpr):
    """x to a wider dtype, where it is exact."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter gives subnormal numbers another value; compiled code never comes here.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        result = bits.to(tl.float32, bitcast=True).to(dtype)
    elif INTERPRETED and x.dtype == tl.float8e4nv:
        bits = x.to(tl.uint8, bitcast=True).to(tl.uint32)
        size = bits & 0x7F
        # Eight subnormal numbers, and the one NaN of either sign.
        whole = tl.where(size < 8, (size.to(tl.float32) * 0.001953125).to(tl.uint32, bitcast=True), (size + 960) << 20)
        whole = tl.where(size == 0x7F, 0x7FC00000, whole) | ((bits & 0x80) << 24)
        result = whole.to(tl.float32, bitcast=True).to(dtype)
    elif INTERPRETED and x.dtype == tl.float8e5:
        # The upper half of an fp16.
        bits = x.to(tl.uint8, bitcast=True).to(tl.uint16) << 8
        result = bits.to(tl.float16, bitcast=True).to(dtype)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr = _IEEE):
    """acc + a b, summed in the type of acc; fp32 operands are cut down to tf32 only where PRECISION says so."""
    if INTERPRETED:
        # The interpreter multiplies bf16 as bit patterns; in the type of acc the product of 16-bit numbers is as exact.
        a = widened(a, acc.dtype)
        b = widened(b, acc.dtype)
    if (a.dtype == tl.float8e4nv or a.dtype == tl.float8e5) and b.shape[1] <= 256:
        # Hopper adds products of 8 bits up with 14 digits: those of one tile, and no more. Their sum meets acc in its own type,
        # unless there are so many columns that no registers are left for both.
        result = tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1], out_dtype=acc.dtype)
    else:
        result = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return result


@triton.jit
def log_sum_exp(m, z):
    """Natural log-sum-exp of a row from its maximum m (base 2) and its sum z of exp2(. - m); -inf where nothing was summed."""
    return tl.where(z > 0, (m + tl.log2(tl.where(z > 0, z, 1.0))) * _LOG_2, float("-inf"))


@triton.jit
def base_two(lse):
    """Natural log-sum-exp to base 2; +inf for an empty row, so that exp2(s - result) is 0 there and never NaN."""
    return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)


# ---------------------------------------------------------------------------------------------------------------------
# Device: tiles
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_at_zero(
    base, length, stride_row, stride_col, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the tiles of a (length, COLS) matrix are found: a descriptor, or the pointers of its first tile."""
    if TMA:
        at_zero = tl.make_tensor_descriptor(base, [length, COLS], [stride_row, 1], [BLOCK_ROWS, BLOCK_COLS])
    else:
        row = tl.arange(0, BLOCK_ROWS)
        col = tl.arange(0, BLOCK_COLS)
        if WIDE:
            row = row.to(tl.int64)
            col = col.to(tl.int64)
        at_zero = base + row[:, None] * stride_row + col[None, :] * stride_col
    return at_zero


@triton.jit
def load_tile(
    at_zero, start, length, stride_row, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    CHECK_ROWS: tl.constexpr, TMA: tl.constexpr, EVICT: tl.constexpr = _NO_HINT,
):  # fmt: skip
    """Rows start... of a (length, COLS) matrix as a tile, zero outside it. Rows are only checked if CHECK_ROWS; EVICT is a hint
    for the cache that only pointers can give."""
    if TMA:
        tile = at_zero.load([start, 0])
    else:
        pointers = at_zero + tl.cast(start, tl.int64) * stride_row
        row_inside = start + tl.arange(0, BLOCK_ROWS) < length
        col_inside = tl.arange(0, BLOCK_COLS) < COLS
        if CHECK_ROWS and COLS != BLOCK_COLS:
            inside = row_inside[:, None] & col_inside[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICT)
        elif CHECK_ROWS:
            tile = tl.load(pointers, mask=row_inside[:, None], other=0.0, eviction_policy=EVICT)
        elif COLS != BLOCK_COLS:
            tile = tl.load(pointers, mask=col_inside[None, :], other=0.0, eviction_policy=EVICT)
        else:
            tile = tl.load(pointers, eviction_policy=EVICT)
    return tile


@triton.jit
def store_tile(
    tile, base, start, length, stride_row, stride_col, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write a tile to rows start... of a (length, COLS) matrix, rounded to its type; what lies outside is left alone."""
    row = tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    inside = (start + row < length)[:, None] & (col < COLS)[None, :]
    if WIDE:
        row = row.to(tl.int64)
        col = col.to(tl.int64)
    pointers = base + tl.cast(start, tl.int64) * stride_row + row[:, None] * stride_row + col[None, :] * stride_col
    tl.store(pointers, rounded(tile, base.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Device: the band
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def band_blocks(
    first_row, last_row, offset, left, right, columns, BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Column blocks that rows first_row..last_row see: some of [first, last), and all of [plain_first, plain_last).

    Numbers are clamped at 0 before they are divided, because division of negative integers rounds towards zero here.
    """
    first = 0
    plain_first = 0
    last = tl.cdiv(columns, BLOCK)
    plain_last = columns // BLOCK
    if HAS_RIGHT:
        last = tl.minimum(last, tl.cdiv(tl.maximum(last_row + offset + right + 1, 0), BLOCK))
        plain_last = tl.minimum(plain_last, tl.maximum(first_row + offset + right + 1, 0) // BLOCK)
    if HAS_LEFT:
        lowest = tl.maximum(first_row + offset - left, 0)
        first = tl.where(lowest < columns, tl.minimum(lowest // BLOCK, last), last)
        plain_first = tl.cdiv(tl.maximum(last_row + offset - left, 0), BLOCK)
        plain_first = tl.minimum(tl.maximum(plain_first, first), last)
        plain_last = tl.maximum(plain_last, plain_first)
    return first, plain_first, plain_last, last


@triton.jit
def masked_block(i, first, plain_first, plain_last, HAS_LEFT: tl.constexpr):
    """The i-th block of [first, plain_first) followed by [plain_last, last)."""
    block = plain_last + i
    if HAS_LEFT:
        block = first + i + tl.where(i >= plain_first - first, plain_last - plain_first, 0)
    return block


@triton.jit
def visible(
    row, col, offset, left, right, columns, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Whether row (a tile axis) sees column (the other one). EVEN says that no tile reaches beyond the last column.

    At least one of the three conditions holds wherever this is called, so that nothing needless is compared.
    """
    if HAS_RIGHT:
        seen = col <= row + (offset + right)
        if HAS_LEFT:
            seen = seen & (col >= row + (offset - left))
        if not EVEN:
            seen = seen & (col < columns)
    elif HAS_LEFT:
        seen = col >= row + (offset - left)
        if not EVEN:
            seen = seen & (col < columns)
    else:
        seen = col < columns
    return seen


@triton.jit
def program_row(rows, FOLDED: tl.constexpr):
    """Which (batch, head) this program works on. A folded grid may be too large: what is left over repeats the last one,
    which writes the same numbers again."""
    row = tl.program_id(1)
    if FOLDED:
        row = tl.minimum(row + tl.program_id(2) * tl.num_programs(1), rows - 1)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Host: the same band in Python
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Band:
    """Which of `columns` columns each of `rows` rows sees. A side that hides nothing from any row is None."""

    rows: int
    columns: int
    offset: int
    left: int | None
    right: int | None

    @property
    def transposed(self) -> "Band":
        """The same band read by columns."""
        return Band(self.columns, self.rows, -self.offset, self.right, self.left)

    def blocks(self, position: int, block_rows: int, block_columns: int) -> tuple[int, int, int, int]:
        """What `band_blocks` gives for the row block at `position`: first, plain_first, plain_last, last."""
        first_row = position * block_rows
        last_row = min(first_row + block_rows, self.rows) - 1
        first = plain_first = 0
        last, plain_last = -(-self.columns // block_columns), self.columns // block_columns
        if self.right is not None:
            last = min(last, -(-max(last_row + self.offset + self.right + 1, 0) // block_columns))
            plain_last = min(plain_last, max(first_row + self.offset + self.right + 1, 0) // block_columns)
        if self.left is not None:
            lowest = max(first_row + self.offset - self.left, 0)
            first = min(lowest // block_columns, last) if lowest < self.columns else last
            plain_first = -(-max(last_row + self.offset - self.left, 0) // block_columns)
            plain_first = min(max(plain_first, first), last)
            plain_last = max(plain_last, plain_first)
        return first, plain_first, plain_last, last

    def constants(self, block_columns: int) -> dict[str, bool]:
        """The compile-time facts about the band."""
        return {
            "HAS_LEFT": self.left is not None,
            "HAS_RIGHT": self.right is not None,
            "EVEN": self.columns % block_columns == 0,
        }

    def arguments(self) -> dict[str, int]:
        """The run-time numbers of the band; a side that is not there is 0."""
        return {"offset": self.offset, "left": self.left or 0, "right": self.right or 0}


def band_of(
    q_len: int, kv_len: int, *, window_left: int | None, window_right: int | None, top_left: bool
) -> Band:
    """The band of queries (rows) and keys (columns). Raises `ValueError` for a negative window."""
    for name, bound in (("window_left", window_left), ("window_right", window_right)):
        if bound is not None and bound < 0:
            raise ValueError(f"{name} must be None or at least 0, found {bound}")
    offset = 0 if top_left else kv_len - q_len
    left, right = window_left, window_right
    if left is not None and q_len - 1 + offset - left <= 0:
        left = None
    if right is not None and offset + right >= kv_len - 1:
        right = None
    return Band(q_len, kv_len, offset, left, right)


@functools.lru_cache(maxsize=256)
def band_steps(band: Band, block_rows: int, block_columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Plain and masked column blocks of every row block, in the order in which `launch_position` hands them out."""
    count = -(-band.rows // block_rows)
    limits = [band.blocks(position, block_rows, block_columns) for position in range(count)]
    if longest_last(band):
        limits.reverse()
    plain = tuple(plain_last - plain_first for _, plain_first, plain_last, _ in limits)
    whole = tuple(last - first for first, _, _, last in limits)
    return plain, tuple(every - some for every, some in zip(whole, plain, strict=True))


@functools.lru_cache(maxsize=256)
def dealt_steps(
    plain: tuple[int, ...], masked: tuple[int, ...], rows: int, programs: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Plain steps, masked steps and tiles of each of `programs` programs that share `rows` rows of tiles, dealt out round by
    round, every other round backwards; a tile at position i of its row has plain[i] and masked[i] steps."""
    width = len(plain)
    found = []
    for program in range(programs):
        there, back = program, 2 * programs - 1 - program
        mine = [*range(there, width * rows, 2 * programs), *range(back, width * rows, 2 * programs)]
        found.append((sum(plain[tile % width] for tile in mine), sum(masked[tile % width] for tile in mine), len(mine)))
    first, second, third = zip(*found, strict=True) if found else ((), (), ())
    return first, second, third


def longest_last(band: Band) -> bool:
    """Whether later row blocks have more to do, so that they had better start first."""
    return band.right is not None


# ---------------------------------------------------------------------------------------------------------------------
# Host: what the launches need to know of their tensors
# ---------------------------------------------------------------------------------------------------------------------

_GRID_LIMIT = 65535


@functools.lru_cache(maxsize=16)
def shared_bytes(device: torch.device) -> int | None:
    """Shared memory that a block may have on a GPU of NVIDIA; None where there is none of these, or nobody tells."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


@functools.lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 where programs are interpreted, one after the other, or only described."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# By how many powers of two weights may lie above 1 in types of 8 bits: their largest power of two.
HEADROOM = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}


def least_side(dtype: torch.dtype) -> int:
    """What a matrix instruction takes at least of the side along which it sums: 16 numbers, 32 of 8 bits."""
    return 32 if dtype in HEADROOM else 16


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """The type of results for inputs of a type, where nobody asks for another one: their own, bf16 for those of 8 bits."""
    return torch.bfloat16 if dtype in HEADROOM else dtype


def statistics_as(dtype: torch.dtype) -> torch.dtype:
    """The type of log-sum-exps for inputs of a type: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(head_dim: int, least: int = 16) -> int:
    """The tile width that holds a head: a power of two, and at least what a matrix instruction takes."""
    return max(least, triton.next_power_of_2(head_dim))


def folded_grid(positions: int, rows: int) -> tuple[int, int, int]:
    """A grid with `positions` on the first axis and at least `rows` on the other two, which hold at most 65535 each."""
    folds = max(1, -(-rows // _GRID_LIMIT))
    return positions, -(-rows // folds), folds


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Run-time arguments `stride_<tensor>_<axis>` for the axes batch, head, row and column."""
    return {
        f"stride_{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(("batch", "head", "row", "col"), tensor.stride(), strict=False)
    }


def needs_wide(block_rows: int, *tensors: torch.Tensor) -> bool:
    """Whether an offset inside a tile of `block_rows` rows, padded ones included, can leave 32 bits."""
    return any(
        (block_rows - 1) * abs(tensor.stride(2)) + (padded(tensor.shape[3]) - 1) * abs(tensor.stride(3)) >= 1 << 31
        for tensor in tensors
    )


def require_tma(**tensors: torch.Tensor) -> None:
    """Raise `ValueError` if tensor descriptors cannot describe the (length, head_dim) matrices of a tensor.

    Needed: 16-byte aligned matrices and rows, and a last stride of 1 (PTX ISA, tensor maps).
    """
    for name, tensor in tensors.items():
        size = tensor.element_size()
        if tensor.stride(3) != 1:
            raise ValueError(f"load='tma' needs a last stride of 1, but {name} has {tensor.stride(3)}")
        if tensor.stride(2) <= 0:
            raise ValueError(f"load='tma' needs rows apart from each other, but {name} has row stride {tensor.stride(2)}")
        for axis, stride in zip(("batch", "head", "row"), tensor.stride(), strict=False):
            if stride * size % 16:
                raise ValueError(
                    f"load='tma' needs strides of whole 16 bytes, but the {axis} stride of {name} is {stride * size} bytes"
                )
        if tensor.device.type != "meta" and tensor.data_ptr() % 16:
            raise ValueError(f"load='tma' needs 16-byte aligned tensors, but {name} begins at {tensor.data_ptr() % 16} mod 16")


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type of sums: fp32, or fp64 for fp64 inputs (interpreter only)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def require_blocks(**blocks: int) -> None:
    """Raise `ValueError` for a tile side that is no power of two of at least 16."""
    for name, block in blocks.items():
        if block < 16 or block & (block - 1):
            raise ValueError(f"{name} must be a power of two of at least 16, found {block}")


def require_choice(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Raise `ValueError` for a word that is none of those allowed."""
    for name, (chosen, allowed) in choices.items():
        if chosen not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, found {chosen!r}")


def scales_exactly(dtype: torch.dtype, scale: float) -> bool:
    """Whether numbers of a type times `scale` are exact: a power of two of at most 1, and a type whose exponents reach as far
    down as those of fp32. (fp16 would lose small numbers; any other scale rounds once more, which no bound here allows.)"""
    far = dtype in (torch.bfloat16, torch.float32, torch.float64)
    return far and 2.0**-64 <= abs(scale) <= 1 and abs(math.frexp(scale)[0]) == 0.5


def is_rising(scale: float) -> bool:
    """Whether `scale` is positive as the kernel sees it (fp32, subnormal numbers flushed), so that -inf * scale is -inf."""
    return scale >= torch.finfo(torch.float32).tiny


def require_shapes(expected: Mapping[str, tuple[torch.Tensor, Sequence[int]]]) -> None:
    """Raise `ValueError` naming the first tensor that has not the shape it should have."""
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must have the shape {tuple(shape)}, found {tuple(tensor.shape)}")


def require_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, paged: bool = False, eight_bits: bool = False,
    **same_type: torch.Tensor,
) -> None:  # fmt: skip
    """Raise `ValueError` unless q, k and v belong together and share their type with `same_type`. `paged`: the first axis of k
    and v has pages, any number of them, instead of sequences. `eight_bits` types are taken too."""
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have four axes, found {q.ndim}, {k.ndim} and {v.ndim}")
    if q.dtype in HEADROOM:
        require_eight_bits(q, eight_bits)
    batch, q_heads, _, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    batch = k.shape[0] if paged else batch
    require_shapes({"k": (k, (batch, kv_heads, kv_len, head_dim)), "v": (v, (batch, kv_heads, kv_len, v.shape[3]))})
    if not kv_heads or q_heads % kv_heads:
        raise ValueError(f"query heads ({q_heads}) must be a multiple of key/value heads ({kv_heads})")
    for name, tensor in {"k": k, "v": v, **same_type}.items():
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have the type of q ({q.dtype}), found {tensor.dtype}")
    allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if q.dtype not in (*allowed[: 4 if INTERPRETED.value else 3], *HEADROOM):
        raise ValueError(f"q must be fp16, bf16 or fp32 (or fp64 in the interpreter), found {q.dtype}")


def require_eight_bits(q: torch.Tensor, taken: bool) -> None:
    """Raise `ValueError` where a kernel, or the device of q, does not multiply numbers of 8 bits."""
    if not taken:
        raise ValueError(f"q is {q.dtype}, and only flash_fwd, forward without pages, takes types of 8 bits: convert q, k and v")
    if q.device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(q.device) < (8, 9)):
        raise ValueError(f"q is {q.dtype}, which matrix units multiply from sm_89 on, and none of CDNA 3: convert q, k and v")


def options(
    *, num_warps: int, num_stages: int = 0, waves_per_eu: int = 0, maxnreg: int = 0, mfma_side: int = 0, kpack: int = 1
) -> dict[str, Any]:
    """Compiler options; 0 leaves a number to the compiler. `waves_per_eu`, `mfma_side` and `kpack` exist on AMD only, `maxnreg`
    on NVIDIA only. Products and sums are fused where they meet, as scores need it; not to say so is a warning in Triton 3.9."""
    chosen = {"num_warps": num_warps, "enable_fp_fusion": True} | ({"kpack": kpack} if kpack != 1 else {})
    limits = {"num_stages": num_stages, "waves_per_eu": waves_per_eu, "maxnreg": maxnreg, "matrix_instr_nonkdim": mfma_side}
    return chosen | {name: limit for name, limit in limits.items() if limit}
