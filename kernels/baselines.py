"""Attention written plainly, to be read beside the kernels and to be compared with them: pure PyTorch, without autograd.

`standard_attention` stores the matrix of scores, `blockwise_attention` never has more of it than a tile; both come with their
gradients, and both count the bytes that pass between memory and chip, where they are read and written in the code. On meta
tensors they count without computing. `python -m kernels.baselines` prints the counts of a known example.
Refuses to be fast, and to be more exact than its inputs: everything is computed in their type, scores included.

Tensors are (batch, heads, length, head_dim); query head h reads key head h // (q_heads / kv_heads). Query i sees key j iff
i + offset - window_left <= j <= i + offset + window_right, None being no bound, with offset = kv_len - q_len, or 0 if
`top_left`. `scale` None means 1/sqrt(head_dim). A row that sees nothing has output 0, log-sum-exp -inf and zero gradients.

Sources: Milakov and Gimelshein 2018 (arXiv 1805.02867); FlashAttention, Dao et al. 2022 (arXiv 2205.14135);
FlashAttention-2, Dao 2023 (arXiv 2307.08691).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Memory:
    """What passed between memory and chip: `read` and `write` count a tensor, in bytes, and give it back."""

    bytes_read: int = 0
    bytes_written: int = 0

    def read(self, tensor: Tensor) -> Tensor:
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def write(self, tensor: Tensor) -> Tensor:
        self.bytes_written += tensor.numel() * tensor.element_size()
        return tensor

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """out (batch, q_heads, q_len, v_head_dim), lse (batch, q_heads, q_len), and the weights (batch, q_heads, q_len, kv_len)
    where they were stored."""

    out: Tensor
    lse: Tensor
    weights: Tensor | None
    memory: Memory


@dataclass(frozen=True, slots=True, eq=False)
class Backward:
    """Gradients in the shapes of q, k and v."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    memory: Memory


# ---------------------------------------------------------------------------------------------------------------------
# The softmax of rows
# ---------------------------------------------------------------------------------------------------------------------


def safe_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (..., n) and log-sum-exp (...) of scores (..., n), n at least 0, in three passes over a row.

    Milakov and Gimelshein 2018, equation 2 and algorithm 2: the maximum m, then z = sum_j exp(s_j - m), then
    exp(s_j - m) / z. No argument of exp is positive, so nothing overflows. Four memory accesses per score where a row does not
    stay on chip: three reads and a write.
    """
    m = torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), -math.inf)], -1).amax(-1)
    z = torch.exp(scores - _finite(m)[..., None]).sum(-1)
    return torch.exp(scores - _finite(m)[..., None]) / _positive(z)[..., None], m + z.log()


def online_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The same, in two passes: one for the maximum and the normaliser together, one for the weights.

    Milakov and Gimelshein 2018, algorithm 3: when score s_j raises the maximum from m to m', what was summed so far is
    multiplied by exp(m - m'), z' = z exp(m - m') + exp(s_j - m'). Three memory accesses per score instead of four.
    """
    m = scores.new_full(scores.shape[:-1], -math.inf)
    z = torch.zeros_like(m)
    for s in scores.unbind(-1):
        higher = torch.maximum(m, s)
        z = z * torch.exp(m - _finite(higher)) + torch.exp(s - _finite(higher))
        m = higher
    return torch.exp(scores - _finite(m)[..., None]) / _positive(z)[..., None], m + z.log()


def _finite(maximum: Tensor) -> Tensor:
    """What to subtract: 0 where nothing was seen, because -inf - -inf is NaN and exp(-inf - 0) is 0."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


def _positive(total: Tensor) -> Tensor:
    """What to divide by: 1 where nothing was summed, so that 0 / 1 is 0."""
    return total.masked_fill(total == 0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Standard attention
# ---------------------------------------------------------------------------------------------------------------------


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    top_left: bool = False,
    softmax: Callable[[Tensor], tuple[Tensor, Tensor]] = safe_softmax,
) -> Forward:
    """S = scale Q K^T, P = softmax(S), O = P V, each written to memory (FlashAttention, section 2.2 and algorithm 0).

    Counted as there: scale and mask cost nothing, a row of S stays on chip during its softmax, and lse is not stored.
    """
    memory, band = Memory(), Band(q.shape[2], k.shape[2], window_left, window_right, top_left)
    kv_heads = k.shape[1]
    s = _scale(scale, q) * (_by_group(memory.read(q), kv_heads) @ _shared(memory.read(k)).mT)
    s = memory.write(s.masked_fill(~band.visible(slice(0, q.shape[2]), slice(0, k.shape[2]), q.device), -math.inf))
    p, lse = softmax(memory.read(s))
    memory.write(p)
    out = memory.write(memory.read(p) @ _shared(memory.read(v)))
    return Forward(out.flatten(1, 2), lse.flatten(1, 2), p.flatten(1, 2), memory)


def standard_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, dout: Tensor, *, scale: float | None = None
) -> Backward:
    """The chain rule, matrix by matrix, from the weights of the forward pass (FlashAttention, appendix B.4, algorithm 3).

    dV = P^T dO; dP = dO V^T; dS_ij = P_ij (dP_ij - sum_l P_il dP_il); dQ = scale dS K; dK = scale dS^T Q. The mask needs no
    mention: P is 0 where nothing is seen, and so is dS. Gradients of keys add up over the query heads of their group.
    """
    memory, kv_heads, factor = Memory(), k.shape[1], _scale(scale, q)
    p, do = _by_group(weights, kv_heads), _by_group(dout, kv_heads)
    dv = memory.write((memory.read(p).mT @ memory.read(do)).sum(2))
    dp = memory.write(memory.read(do) @ _shared(memory.read(v)).mT)
    mean = (memory.read(p) * memory.read(dp)).sum(-1, keepdim=True)
    ds = memory.write(p * (dp - mean))
    dq = memory.write(factor * (memory.read(ds) @ _shared(memory.read(k))))
    dk = memory.write(factor * (memory.read(ds).mT @ _by_group(memory.read(q), kv_heads)).sum(2))
    return Backward(dq.flatten(1, 2), dk, dv, memory)


# ---------------------------------------------------------------------------------------------------------------------
# Blockwise attention
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """Attention of some rows to some of their keys, not yet divided: the maximum m (..., r) of the scores, the total
    z = sum_j exp(s_j - m) (..., r), and sum_j exp(s_j - m) v_j (..., r, v_head_dim)."""

    maximum: Tensor
    total: Tensor
    summed: Tensor


def partial(scores: Tensor, v: Tensor) -> Partial:
    """Of scores (..., r, n), n at least 1, and values (..., n, v_head_dim)."""
    m = scores.amax(-1)
    p = torch.exp(scores - _finite(m)[..., None])
    return Partial(m, p.sum(-1), p @ v)


def merge(left: Partial, right: Partial) -> Partial:
    """The same rows and the keys of both: associative, commutative, so that keys may come in any order and in parallel.

    Milakov and Gimelshein 2018, equation 4; with the output carried along, FlashAttention, section 3.1 and algorithm 1.
    """
    m = torch.maximum(left.maximum, right.maximum)
    shrink_left, shrink_right = torch.exp(left.maximum - _finite(m)), torch.exp(right.maximum - _finite(m))
    return Partial(
        m,
        shrink_left * left.total + shrink_right * right.total,
        shrink_left[..., None] * left.summed + shrink_right[..., None] * right.summed,
    )


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    top_left: bool = False,
    block_m: int = 64,
    block_n: int = 64,
) -> Forward:
    """The loops of `flash_fwd`: block_m queries at a time, merging block_n keys at a time, divided once at the end
    (FlashAttention-2, section 3.1.1 and algorithm 1). Key blocks outside the band are not read.

    Counted without any cache: each query block reads its keys and values anew.
    """
    memory, band = Memory(), Band(q.shape[2], k.shape[2], window_left, window_right, top_left)
    kv_heads, factor = k.shape[1], _scale(scale, q)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for queries in _blocks(slice(0, q.shape[2]), block_m):
        q_block = _by_group(memory.read(q[:, :, queries]), kv_heads)
        nothing = q_block.new_zeros(q_block.shape[:-1])
        found = Partial(nothing - math.inf, nothing, q_block.new_zeros((*nothing.shape, v.shape[3])))
        for keys in _blocks(band.keys_of(queries), block_n):
            s = factor * (q_block @ _shared(memory.read(k[:, :, keys])).mT)
            s = s.masked_fill(~band.visible(queries, keys, q.device), -math.inf)
            found = merge(found, partial(s, _shared(memory.read(v[:, :, keys]))))
        o = found.summed / _positive(found.total)[..., None]
        out[:, :, queries] = memory.write(o.flatten(1, 2))
        lse[:, :, queries] = (found.maximum + found.total.log()).flatten(1, 2)
        memory.write(lse[:, :, queries])
    return Forward(out, lse, None, memory)


def blockwise_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    top_left: bool = False,
    block_m: int = 64,
    block_n: int = 64,
) -> Backward:
    """The three launches of `flash_bwd`, which makes each tile of P = exp(S - lse) anew instead of reading it back.

    FlashAttention-2, section 3.1.2 and algorithm 2, whose one loop nest is two here, because dq would have to be added to by
    many: delta = rowsum(dO O), which is the sum over l in dS (FlashAttention, appendix B.2, equation 4); then dk and dv of one
    key block after the other; then dq of one query block after the other.
    """
    memory, band = Memory(), Band(q.shape[2], k.shape[2], window_left, window_right, top_left)
    factor = _scale(scale, q)
    delta = memory.write((memory.read(out) * memory.read(dout)).sum(-1, dtype=lse.dtype))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def rows_of(queries: slice) -> list[Tensor]:
        """q and dout (batch, kv_heads, group, r, ...), lse and delta (batch, kv_heads, group, r, 1) of one query block."""
        parts = (q, dout, lse.unsqueeze(-1), delta.unsqueeze(-1))
        return [_by_group(memory.read(part[:, :, queries]), k.shape[1]) for part in parts]

    def keys_at(keys: slice) -> list[Tensor]:
        return [_shared(memory.read(part[:, :, keys])) for part in (k, v)]

    def tile(rows: list[Tensor], columns: list[Tensor], seen: Tensor) -> tuple[Tensor, Tensor]:
        """P and dS (batch, kv_heads, group, r, n), in the type of q. In an empty row lse is -inf and P shall be 0."""
        (q_block, do, logarithm, mean), (k_block, v_block) = rows, columns
        s = (factor * (q_block @ k_block.mT)).masked_fill(~seen, -math.inf)
        p = torch.exp(s - _finite(logarithm))
        return p.to(q.dtype), (p * (do @ v_block.mT - mean)).to(q.dtype)

    for keys in _blocks(slice(0, k.shape[2]), block_n):
        columns = keys_at(keys)
        for queries in _blocks(band.queries_of(keys), block_m):
            rows = rows_of(queries)
            p, ds = tile(rows, columns, band.visible(queries, keys, q.device))
            dv[:, :, keys] += (p.mT @ rows[1]).sum(2)
            dk[:, :, keys] += (ds.mT @ rows[0]).sum(2)
        memory.write(dv[:, :, keys])
        memory.write(dk[:, :, keys].mul_(factor))
    for queries in _blocks(slice(0, q.shape[2]), block_m):
        rows = rows_of(queries)
        for keys in _blocks(band.keys_of(queries), block_n):
            columns = keys_at(keys)
            _, ds = tile(rows, columns, band.visible(queries, keys, q.device))
            dq[:, :, queries] += (ds @ columns[0]).flatten(1, 2)
        memory.write(dq[:, :, queries].mul_(factor))
    return Backward(dq, dk, dv, memory)


# ---------------------------------------------------------------------------------------------------------------------
# Bands, blocks and groups
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Band:
    """Which keys each query sees."""

    q_len: int
    kv_len: int
    left: int | None
    right: int | None
    top_left: bool

    @property
    def offset(self) -> int:
        """The key on the diagonal of query 0."""
        return 0 if self.top_left else self.kv_len - self.q_len

    def visible(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """(r, n) bool: whether each query of `queries` sees each key of `keys`."""
        diagonal = torch.arange(queries.start, queries.stop, device=device)[:, None] + self.offset
        key = torch.arange(keys.start, keys.stop, device=device)[None, :]
        seen = torch.ones(len(diagonal), key.shape[1], dtype=torch.bool, device=device)
        if self.left is not None:
            seen = seen & (key >= diagonal - self.left)
        if self.right is not None:
            seen = seen & (key <= diagonal + self.right)
        return seen

    def keys_of(self, queries: slice) -> slice:
        """The keys that some of `queries` (at least one) may see; perhaps none."""
        return _between(queries, self.offset, self.left, self.right, self.kv_len)

    def queries_of(self, keys: slice) -> slice:
        """The queries that may see some of `keys` (at least one): the same band, read by columns."""
        return _between(keys, -self.offset, self.right, self.left, self.q_len)


def _between(rows: slice, offset: int, left: int | None, right: int | None, columns: int) -> slice:
    first = 0 if left is None else max(rows.start + offset - left, 0)
    last = columns if right is None else min(rows.stop + offset + right, columns)
    return slice(first, max(first, last))


def _blocks(positions: slice, size: int) -> list[slice]:
    starts = range(positions.start, positions.stop, size)
    return [slice(first, min(first + size, positions.stop)) for first in starts]


def _by_group(tensor: Tensor, kv_heads: int) -> Tensor:
    """(batch, q_heads, ...) as (batch, kv_heads, group, ...)."""
    return tensor.unflatten(1, (kv_heads, tensor.shape[1] // kv_heads))


def _shared(tensor: Tensor) -> Tensor:
    """Keys or values (batch, kv_heads, 1, ...), the same for every query head of a group."""
    return tensor.unsqueeze(2)


def _scale(scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[3]) if scale is None else scale


# ---------------------------------------------------------------------------------------------------------------------
# Memory traffic
# ---------------------------------------------------------------------------------------------------------------------


def least_traffic(q: Tensor, k: Tensor, v: Tensor) -> tuple[Memory, Memory]:
    """Of a forward and of a backward pass that store no matrix, if every input is read once and every result written once.

    No fused kernel can do with less, and one does it only where every tensor that it reads twice stays in a cache.
    """
    forward, backward = Memory(), Memory()
    out = q.new_empty((*q.shape[:3], v.shape[3]), device="meta")
    lse = q.new_empty(q.shape[:3], device="meta", dtype=torch.promote_types(q.dtype, torch.float32))
    for tensor in (q, k, v):
        backward.write(backward.read(forward.read(tensor)))
    for tensor in (out, lse):
        backward.read(forward.write(tensor))
    backward.read(out)  # its gradient
    return forward, backward


def traffic_table() -> str:
    """The bytes of each algorithm for the attention of GPT-2 medium as in FlashAttention, figure 2 (left), as text.

    Everything is counted on meta tensors, nothing is measured. That figure (arXiv version) reports 40.3 GB for a standard
    attention and 4.4 GB for FlashAttention, forward and backward: of programs that ran on an A100, with passes over the
    matrix and with caches of which these counts know nothing.
    """
    q, k, v, dout = torch.empty(4, 64, 16, 1024, 64, dtype=torch.float16, device="meta")
    made = standard_attention(q, k, v)
    gradients = standard_attention_backward(q, k, v, made.weights, dout)
    counted = [("standard: scores and weights stored", made.memory, gradients.memory)]
    for block in (64, 128):
        made = blockwise_attention(q, k, v, block_m=block, block_n=block)
        gradients = blockwise_attention_backward(q, k, v, made.out, made.lse, dout, block_m=block, block_n=block)
        counted.append((f"blockwise: tiles of {block} by {block}, no cache", made.memory, gradients.memory))
    counted.append(("blockwise: each tensor once, the least", *least_traffic(q, k, v)))
    lines = ["GPT-2 medium: batch 64, 16 heads, length 1024, head dim 64, fp16, no mask, no dropout"]
    lines += [f"{'GB read and written: counted, not measured':46}{'forward':>10}{'backward':>10}{'together':>10}"]
    for name, forward, backward in counted:
        numbers = (forward.bytes, backward.bytes, forward.bytes + backward.bytes)
        lines.append(f"{name:46}" + "".join(f"{number / 1e9:10.2f}" for number in numbers))
    return "\n".join([*lines, "reported in FlashAttention, figure 2, of programs on an A100: 40.3 (standard), 4.4 (theirs)"])


if __name__ == "__main__":
    print(traffic_table())  # noqa: T201  (this is the command)
