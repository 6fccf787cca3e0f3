"""What a call may add to plain attention: changes of the scores, masks beyond the band, sinks, dropout, functions of the caller.

One description, `Variant`, travels from the host into every kernel as a tuple whose absent parts are None, so that a kernel
holds the code of nothing but what is asked for. The `@triton.jit` functions are shared by the forward and the backward pass and
do not care whether scores lie queries by keys or keys by queries: `query` and `key` are positions that broadcast to the tile.

A score is x3 of: x1 = softcap * tanh(x0 / softcap) of the scaled product x0, x2 = x1 - slope |key - diagonal| + bias,
x3 = score(x2). A pair is visible if (it lies inside the band, or key < prefix), and query and key belong to the same chunk of
positions and to the same document, and the mask and the caller's function allow it.

Packed sequences lie one behind the other along the length of a batch of one. Positions, and with them the band, chunks, prefixes
and distances, are counted within a sequence; documents and the random numbers of dropout by rows of the whole.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import primitives
from .primitives import Band, widened

_LOG2_E = tl.constexpr(primitives.LOG2_E)

# ---------------------------------------------------------------------------------------------------------------------
# The description
# ---------------------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """Tensors, strides and numbers by name; what a call does not ask for is None.

    slopes (batch, q_heads), bias and mask (batch, q_heads, q_len, kv_len) with stride 0 where they have one element for all,
    mask of bytes; prefix (batch), q_documents (batch, q_len), kv_documents (batch, kv_len), sinks (q_heads).
    q_starts and kv_starts (sequences + 1) say where packed sequences begin and end, `search_steps` bounds the search for one;
    `bottom_right` is 1 unless their bands are aligned top-left. `kept_above` is the smallest of 2^32 random numbers for which
    dropout keeps a pair, `kept_scale` what it is multiplied with. `given` is the caller's tuple for functions of its own.
    q_descale, k_descale and v_descale (batch, kv_heads), of packed sequences (sequences, kv_heads), are what the numbers of q, k
    and v are multiplied with, stride 0 as above. Weights are `lifted` times as large, which is 2^`lift`, where they are cut down
    to 8 bits.
    """

    softcap: Any = None
    slopes: Any = None
    stride_slopes_batch: Any = None
    stride_slopes_head: Any = None
    bias: Any = None
    stride_bias_batch: Any = None
    stride_bias_head: Any = None
    stride_bias_row: Any = None
    stride_bias_col: Any = None
    mask: Any = None
    stride_mask_batch: Any = None
    stride_mask_head: Any = None
    stride_mask_row: Any = None
    stride_mask_col: Any = None
    prefix: Any = None
    stride_prefix_batch: Any = None
    q_documents: Any = None
    stride_q_documents_batch: Any = None
    stride_q_documents_row: Any = None
    kv_documents: Any = None
    stride_kv_documents_batch: Any = None
    stride_kv_documents_row: Any = None
    chunk: Any = None
    sinks: Any = None
    stride_sinks_head: Any = None
    seed: Any = None
    kept_above: Any = None
    kept_scale: Any = None
    given: Any = None
    q_starts: Any = None
    kv_starts: Any = None
    sequences: Any = None
    search_steps: Any = None
    bottom_right: Any = None
    q_descale: Any = None
    stride_q_descale_batch: Any = None
    stride_q_descale_head: Any = None
    k_descale: Any = None
    stride_k_descale_batch: Any = None
    stride_k_descale_head: Any = None
    v_descale: Any = None
    stride_v_descale_batch: Any = None
    stride_v_descale_head: Any = None
    lift: Any = None
    lifted: Any = None


# ---------------------------------------------------------------------------------------------------------------------
# Device: packed sequences
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def sequence_of(starts, sequences, search_steps, position, BLOCK: tl.constexpr):
    """(sequence, block within it) of the block at `position` of a grid of total // BLOCK + sequences blocks.

    Sequence s is given the blocks from starts[s] // BLOCK + s on: at least as many as it needs, and none before it ends.
    """
    low = position * 0
    high = low + sequences
    for _ in tl.range(0, search_steps):
        middle = (low + high) // 2
        before = tl.load(starts + middle) // BLOCK + middle <= position
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, position - (tl.load(starts + low) // BLOCK + low)


@triton.jit
def bounds_of(starts, sequence):
    """(first row, number of rows) of a sequence."""
    first = tl.load(starts + sequence)
    return first, tl.load(starts + sequence + 1) - first


# ---------------------------------------------------------------------------------------------------------------------
# Device: scores
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """tanh, whose absolute error is that of one exponential and one quotient."""
    shrunk = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
    magnitude = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _pair_at(base, stride_batch, stride_head, stride_row, stride_col, batch, head, query, key):
    """Pointers of the elements of a (batch, q_heads, q_len, kv_len) tensor."""
    first = base + tl.cast(batch, tl.int64) * stride_batch + tl.cast(head, tl.int64) * stride_head
    return first + (query.to(tl.int64) * stride_row + key.to(tl.int64) * stride_col)


@triton.jit
def changed_scores(x, variant, batch, head, query, key, offset, q_len, kv_len, SCORE: tl.constexpr):
    """(x3, x2, t) from the scaled products x = x0 in natural units: t is tanh(x0 / softcap), 0 without a softcap."""
    t = tl.zeros_like(x)
    if variant.softcap is not None:
        t = _tanh(x / variant.softcap)
        x = t * variant.softcap
    if variant.slopes is not None:
        slope_at = variant.slopes + tl.cast(batch, tl.int64) * variant.stride_slopes_batch
        slope = tl.load(slope_at + tl.cast(head, tl.int64) * variant.stride_slopes_head).to(x.dtype)
        x = x - slope * tl.abs(key - query - offset).to(x.dtype)
    if variant.bias is not None:
        bias_at = _pair_at(
            variant.bias, variant.stride_bias_batch, variant.stride_bias_head, variant.stride_bias_row,
            variant.stride_bias_col, batch, head, query, key,
        )  # fmt: skip
        inside = (query < q_len) & (key < kv_len)
        x = x + widened(tl.load(bias_at, mask=inside, other=0.0), x.dtype)
    before = x
    if SCORE is not None:
        x = SCORE(x, batch, head, query, key, variant.given)
    return x, before, t


@triton.jit
def through_scores(dx, before, t, variant, batch, head, query, key, SLOPE: tl.constexpr):
    """(gradient of x2, gradient of x0) from that of x3; `before` and `t` as `changed_scores` gave them."""
    if SLOPE is not None:
        dx = dx * SLOPE(before, batch, head, query, key, variant.given)
    inner = dx
    if variant.softcap is not None:
        inner = dx * (1.0 - t * t)
    return dx, inner


# ---------------------------------------------------------------------------------------------------------------------
# Device: masks
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _chunk_of(position, chunk):
    """The chunk of a position; positions before the first key belong to none."""
    return tl.where(position < 0, -1, position // chunk)


@triton.jit
def narrowed(seen, variant, batch, head, query, key, offset, q_len, kv_len, query_shift, key_shift, ALLOWED: tl.constexpr):
    """Which pairs are visible, from those that the band leaves; the shifts turn positions of a sequence into rows of the
    whole."""
    inside = (query < q_len) & (key < kv_len)
    if variant.prefix is not None:
        prefix = tl.load(variant.prefix + tl.cast(batch, tl.int64) * variant.stride_prefix_batch)
        seen = seen | ((key < prefix) & inside)
    if variant.chunk is not None:
        seen = seen & (_chunk_of(query + offset, variant.chunk) == _chunk_of(key, variant.chunk))
    if variant.q_documents is not None:
        query_at = variant.q_documents + tl.cast(batch, tl.int64) * variant.stride_q_documents_batch
        key_at = variant.kv_documents + tl.cast(batch, tl.int64) * variant.stride_kv_documents_batch
        query_at = query_at + (query + query_shift).to(tl.int64) * variant.stride_q_documents_row
        key_at = key_at + (key + key_shift).to(tl.int64) * variant.stride_kv_documents_row
        seen = seen & (tl.load(query_at, mask=query < q_len, other=0) == tl.load(key_at, mask=key < kv_len, other=0))
    if variant.mask is not None:
        mask_at = _pair_at(
            variant.mask, variant.stride_mask_batch, variant.stride_mask_head, variant.stride_mask_row,
            variant.stride_mask_col, batch, head, query, key,
        )  # fmt: skip
        seen = seen & (tl.load(mask_at, mask=inside, other=0) != 0)
    if ALLOWED is not None:
        seen = seen & ALLOWED(batch, head, query, key, variant.given)
    return seen


@triton.jit
def key_blocks(first, last, first_query, last_query, variant, batch, offset, kv_len, BLOCK: tl.constexpr):
    """The key blocks [first, last) of queries first_query..last_query, from those that the band leaves."""
    if variant.prefix is not None:
        prefix = tl.load(variant.prefix + tl.cast(batch, tl.int64) * variant.stride_prefix_batch)
        prefix = tl.minimum(tl.maximum(prefix, 0), kv_len).to(tl.int32)
        first = tl.where(prefix > 0, 0, first)
        last = tl.maximum(last, tl.cdiv(prefix, BLOCK))
    if variant.chunk is not None:
        lowest = tl.maximum(first_query + offset, 0) // variant.chunk * variant.chunk
        beyond = (tl.maximum(last_query + offset, 0) // variant.chunk + 1) * variant.chunk
        last = tl.where(last_query + offset < 0, 0, tl.minimum(last, tl.cdiv(beyond, BLOCK)))
        first = tl.minimum(tl.maximum(first, lowest // BLOCK), last)
    return first, last


@triton.jit
def query_blocks(first, last, first_key, last_key, variant, batch, offset, q_len, BLOCK: tl.constexpr):
    """The query blocks [first, last) of keys first_key..last_key, from those that the band leaves."""
    if variant.prefix is not None:
        prefix = tl.load(variant.prefix + tl.cast(batch, tl.int64) * variant.stride_prefix_batch)
        reached = first_key < prefix
        first = tl.where(reached, 0, first)
        last = tl.where(reached, tl.cdiv(q_len, BLOCK), last)
    if variant.chunk is not None:
        lowest = tl.maximum(first_key // variant.chunk * variant.chunk - offset, 0)
        beyond = tl.maximum((last_key // variant.chunk + 1) * variant.chunk - offset, 0)
        last = tl.minimum(last, tl.cdiv(beyond, BLOCK))
        first = tl.minimum(tl.maximum(first, lowest // BLOCK), last)
    return first, last


# ---------------------------------------------------------------------------------------------------------------------
# Device: scales of tensors, sinks and dropout
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def descaled(factor, variant, sequence, kv_head, LEAST: tl.constexpr):
    """The factor of scores, times what numbers of q and k stand for. Where it must stay positive it is at least LEAST, for scales
    of 0, which tensors of nothing but 0 have: so small a factor makes every score 0 as well."""
    if variant.q_descale is not None:
        at = variant.q_descale + tl.cast(sequence, tl.int64) * variant.stride_q_descale_batch
        factor = factor * tl.load(at + tl.cast(kv_head, tl.int64) * variant.stride_q_descale_head)
    if variant.k_descale is not None:
        at = variant.k_descale + tl.cast(sequence, tl.int64) * variant.stride_k_descale_batch
        factor = factor * tl.load(at + tl.cast(kv_head, tl.int64) * variant.stride_k_descale_head)
    if LEAST > 0 and (variant.q_descale is not None or variant.k_descale is not None):
        factor = tl.maximum(factor, LEAST)
    return factor


@triton.jit
def value_scale(variant, sequence, kv_head):
    """What the numbers of v stand for."""
    at = variant.v_descale + tl.cast(sequence, tl.int64) * variant.stride_v_descale_batch
    return tl.load(at + tl.cast(kv_head, tl.int64) * variant.stride_v_descale_head)


@triton.jit
def sink_of(variant, head, ACC: tl.constexpr):
    """The logit of a head's sink, natural units."""
    return tl.load(variant.sinks + tl.cast(head, tl.int64) * variant.stride_sinks_head).to(ACC)


@triton.jit
def kept(variant, batch, head, query, key):
    """Which pairs dropout keeps: Philox 4x32-10 (Salmon et al. 2011) of (key, query, head, batch) under the seed, so that no
    pass, tile or launch has an influence. Here query and key are rows of the whole."""
    nothing = tl.zeros_like(query + key)
    random, _, _, _ = tl.philox(
        variant.seed, (nothing + key).to(tl.uint32), (nothing + query).to(tl.uint32), (nothing + head).to(tl.uint32),
        (nothing + batch).to(tl.uint32),
    )  # fmt: skip
    return random.to(tl.int64) >= variant.kept_above


# ---------------------------------------------------------------------------------------------------------------------
# Host
# ---------------------------------------------------------------------------------------------------------------------

_WORD = 1 << 32


class Functions(NamedTuple):
    """`@triton.jit` functions of the caller, inlined into the kernels. `given` is a tuple of tensors and numbers for them.

    score(x, batch, head, query, key, given) -> the changed score of x, natural units; slope(x, ...), with the same parameters, is
    its derivative by x, which a backward pass needs. allowed(batch, head, query, key, given) -> whether a pair may be visible.
    Positions are int32 tiles that broadcast to the tile of scores, and may lie beyond the lengths: loads must be masked.
    """

    score: Any = None
    slope: Any = None
    allowed: Any = None
    given: Any = None


def variant_of(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
    dropout: float = 0.0,
    dropout_seed: int = 0,
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
    top_left: bool = False,
    functions: Functions | None = None,
) -> Variant:
    """The description of a call on q (batch, q_heads, q_len, head_dim) and k. Raises `ValueError` for what is impossible.

    slopes are (batch or 1, q_heads), sinks (q_heads), prefix (batch), documents (batch, length), bias and mask (batch or 1,
    q_heads or 1, q_len or 1, kv_len or 1). q_starts and kv_starts (sequences + 1) rise from 0 to q_len and to kv_len, which is
    not checked, because they lie on the device. q_descale, k_descale and v_descale, for inputs of 8 bits only, are fp32 (batch or
    1, kv_heads or 1), of packed sequences (sequences or 1, kv_heads or 1), and at least 0, which is not checked either.
    """
    batch, q_heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    if (q_documents is None) != (kv_documents is None):
        raise ValueError("documents must be given for the queries and for the keys, or for neither")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, found {softcap}")
    if chunk is not None and not 1 <= chunk < 1 << 31:
        raise ValueError(f"chunk must be at least 1, found {chunk}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, found {dropout}")
    pairs = (batch, q_heads, q_len, kv_len)
    found = {
        **_expanded("slopes", slopes, (batch, q_heads), ("batch", "head")),
        **_expanded("bias", bias, pairs, ("batch", "head", "row", "col")),
        **_expanded("mask", mask, pairs, ("batch", "head", "row", "col")),
        **_expanded("sinks", sinks, (q_heads,), ("head",)),
        **_expanded("prefix", prefix, (batch,), ("batch",)),
        **_expanded("q_documents", q_documents, (batch, q_len), ("batch", "row")),
        **_expanded("kv_documents", kv_documents, (batch, kv_len), ("batch", "row")),
    }
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"mask must be boolean, found {mask.dtype}")
        found["mask"] = found["mask"].view(torch.uint8)
    if dropout:
        found |= {"seed": dropout_seed, "kept_above": round(dropout * _WORD), "kept_scale": 1.0 / (1.0 - dropout)}
    if q_starts is not None or kv_starts is not None:
        found |= _packed(q, q_starts, kv_starts, top_left=top_left)
        refused = {"bias": bias, "mask": mask, "functions of the caller": functions}
        for name, part in refused.items():
            if part is not None:
                raise ValueError(f"packed sequences cannot be combined with {name}; use documents, or one batch per sequence")
    sequences = batch if q_starts is None else len(q_starts) - 1
    for name, scale in {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}.items():
        found |= _scale_of(name, scale, (sequences, k.shape[1]), q.dtype)
    return Variant(softcap=softcap, chunk=chunk, given=functions.given if functions else None, **found)


def _scale_of(name: str, scale: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """The scale of a tensor; one number may come without axes."""
    if scale is None:
        return {}
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype not in (*primitives.HEADROOM, torch.float64) or scale.dtype != wanted:
        raise ValueError(f"{name} must be {wanted} and is for inputs of 8 bits, found {scale.dtype} beside {dtype}")
    return _expanded(name, scale.reshape(1, 1) if scale.ndim == 0 else scale, shape, ("batch", "head"))


def _packed(
    q: torch.Tensor, q_starts: torch.Tensor | None, kv_starts: torch.Tensor | None, *, top_left: bool
) -> dict[str, Any]:
    if q_starts is None or kv_starts is None:
        raise ValueError("starts of sequences must be given for the queries and for the keys, or for neither")
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences lie in a batch of 1, found {q.shape[0]}")
    for name, starts in {"q_starts": q_starts, "kv_starts": kv_starts}.items():
        if starts.ndim != 1 or len(starts) < 2 or len(starts) != len(q_starts) or starts.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 (sequences + 1), found {starts.dtype} {tuple(starts.shape)}")
        if starts.stride(0) != 1:
            raise ValueError(f"{name} must be contiguous, found stride {starts.stride(0)}")
    sequences = len(q_starts) - 1
    return {
        "q_starts": q_starts, "kv_starts": kv_starts, "sequences": sequences, "search_steps": sequences.bit_length(),
        "bottom_right": None if top_left else 1,
    }  # fmt: skip


def ragged(variant: Variant) -> dict[str, bool]:
    """What overrides the compile-time facts of a band: packed sequences end anywhere."""
    return {"EVEN": False} if variant.q_starts is not None else {}


def packed_band(variant: Variant, band: Band) -> Band:
    """The band by which the work of packed sequences is counted: that of one of equally long sequences."""
    if variant.q_starts is None:
        return band
    rows, columns = band.rows // variant.sequences, band.columns // variant.sequences
    return Band(rows, columns, columns - rows if variant.bottom_right else 0, band.left, band.right)


def packed_steps(
    variant: Variant, band: Band, block_rows: int, block_columns: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`primitives.band_steps`, of as many blocks as the grid has; those of packed sequences as if these were equally long."""
    if variant.q_starts is None:
        return primitives.band_steps(band, block_rows, block_columns)
    blocks = band.rows // block_rows + variant.sequences
    plain, masked = primitives.band_steps(packed_band(variant, band), block_rows, block_columns)
    spare = (0,) * max(blocks - variant.sequences * len(plain), 0)
    return tuple((spare + plain * variant.sequences)[:blocks]), tuple((spare + masked * variant.sequences)[:blocks])


def constants(variant: Variant, functions: Functions | None) -> dict[str, Any]:
    """What kernels must know of it when they are compiled, beside which of its parts are None."""
    functions = functions or Functions()
    scored = (variant.softcap, variant.slopes, variant.bias, functions.score)
    masked = (variant.prefix, variant.chunk, variant.q_documents, variant.mask, functions.allowed)
    return {
        "SCORE": functions.score, "ALLOWED": functions.allowed,
        "CHANGED": any(part is not None for part in scored), "FREE": any(part is not None for part in masked),
    }  # fmt: skip


def _expanded(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], axes: tuple[str, ...]
) -> dict[str, Any]:
    """The tensor and its strides, 0 along axes in which it has one element for all."""
    if tensor is None:
        return {}
    fits = len(tensor.shape) == len(shape)
    if not fits or any(size not in (1, wanted) for size, wanted in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} must have the shape {shape}, or 1 along some axes, found {tuple(tensor.shape)}")
    strides = [
        stride if size == wanted else 0
        for stride, size, wanted in zip(tensor.stride(), tensor.shape, shape, strict=True)
    ]
    return {name: tensor, **{f"stride_{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}}
