"""What attention is: the exact answer in fp64, forward and backward, and the quantities that error bounds are made of.

Refuses to import or to know any kernel, and refuses to judge: closeness is decided in `harness.compare`. There are two
unrelated references: this one, in batches, and loops over single elements (`harness.loops`) that guard it in the tests.

Tensors are (batch, heads, length, head_dim), any dtype, any strides, on any device; results are fp64 on that device.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness import paging, scales
from harness.operation import DROPOUT_SEED, shapes
from harness.problem import Problem

# Score elements held at once: each fp64 matrix of a block then takes at most 64 MiB.
_BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steps:
    """How scores (n, r, Skv) came about: `products` are the scaled products, `capped` what a softcap `cap` makes of them, `slope`
    the derivative of that, and `added` the terms that were added one after the other. Without a softcap `capped` is
    `products`, `slope` None and `cap` infinite."""

    products: Tensor
    capped: Tensor
    slope: Tensor | None
    added: tuple[Tensor, ...]
    cap: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Complete softmax rows of a few query heads. n heads, r queries, Skv keys; everything fp64.

    `heads` and `queries` say which (heads are counted over batch and head together), `kv` which key/value head each reads.
    q (n, r, D), k (n, Skv, D), v (n, Skv, Dv), visible (n or 1, r, Skv). scores (n, r, Skv) are complete, -inf where
    invisible; `steps` says how they came about. maximum, total and lse are (n, r): the row maximum (0 in an empty row), the sum
    of exp(score - maximum), the log-sum-exp (-inf in an empty row); `sink` (n) takes part in them, and is None where there is
    none. weights (n, r, Skv) are the probabilities. `kept` (n, r, Skv) is what dropout multiplies them with, or None.
    out (n, r, Dv) is the result.
    """

    heads: slice
    queries: slice
    kv: Tensor
    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    scores: Tensor
    maximum: Tensor
    total: Tensor
    lse: Tensor
    weights: Tensor
    out: Tensor
    steps: Steps
    sink: Tensor | None
    kept: Tensor | None

    @property
    def values(self) -> Tensor:
        """The weights as they meet v: (n, r, Skv)."""
        return kept(self, self.weights)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slopes:
    """The backward quantities of the same rows: dout (n, r, Dv), d_weights = dout v^T (as dropout leaves it), d_changed and
    d_scores (n, r, Skv), the gradients of the complete scores and of the scaled products they came from, mean (n, r) =
    sum_d out dout (FlashAttention-2, section 3.1.2), and delta, which is that less the gradient of the log-sum-exp, if any."""

    dout: Tensor
    d_weights: Tensor
    mean: Tensor
    delta: Tensor
    d_changed: Tensor
    d_scores: Tensor


def visible_keys(problem: Problem, queries: slice, *, device: torch.device | str = "cpu") -> Tensor:
    """The band of the queries in `queries`: (r, kv_len) bool, true where query sees key."""
    first, last, _ = queries.indices(problem.q_len)
    diagonal = torch.arange(first, last, device=device) + problem.offset
    return _in_band(problem, diagonal, torch.arange(problem.kv_len, device=device))


def _in_band(problem: Problem, diagonal: Tensor, key: Tensor) -> Tensor:
    diagonal = diagonal[..., None]
    seen = torch.ones(*diagonal.shape[:-1], len(key), dtype=torch.bool, device=key.device)
    if problem.window_left is not None:
        seen &= key >= diagonal - problem.window_left
    if problem.right is not None:
        seen &= key <= diagonal + problem.right
    return seen


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """Of some queries, the key position of their diagonal (n, r), or (1, r) where it is the same in all heads; of all keys, their
    position (Skv); counted within their sequences, which `query_sequence` (r) and `key_sequence` (Skv) say."""

    diagonal: Tensor
    key: Tensor
    query_sequence: Tensor
    key_sequence: Tensor


def positions(problem: Problem, tensors: Mapping[str, Tensor], heads: slice, queries: slice) -> Positions:
    """Where some queries of some heads, and all keys, stand in their sequences."""
    device = tensors["q"].device
    query = torch.arange(queries.start, queries.stop, device=device)
    key = torch.arange(problem.kv_len, device=device)
    if problem.packed is None:
        nothing, diagonal = torch.zeros_like, (query + problem.offset)[None]
        if problem.paged is not None and not problem.top_left:
            batch = torch.arange(heads.start, heads.stop, device=device) // problem.q_heads
            diagonal = query + tensors["kv_lengths"].long()[batch, None] - problem.q_len
        return Positions(diagonal=diagonal, key=key, query_sequence=nothing(query), key_sequence=nothing(key))
    q_starts, kv_starts = (tensors[name].long().contiguous() for name in ("q_starts", "kv_starts"))
    # Of sequences that begin at one place, all but the last are empty.
    ours, theirs = (
        torch.searchsorted(starts, place, right=True) - 1 for starts, place in ((q_starts, query), (kv_starts, key))
    )
    offset = 0 if problem.top_left else (kv_starts.diff() - q_starts.diff())[ours]
    return Positions(
        diagonal=(query - q_starts[ours] + offset)[None],
        key=key - kv_starts[theirs],
        query_sequence=ours,
        key_sequence=theirs,
    )


def visible_pairs(problem: Problem, tensors: Mapping[str, Tensor], heads: slice, queries: slice) -> Tensor:
    """The mask of some query heads, counted over batch and head together, and queries: (n, r, kv_len) bool, true where query
    sees key; n is 1 where all heads see the same."""
    at = positions(problem, tensors, heads, queries)
    seen = _in_band(problem, at.diagonal, at.key)
    if not problem.freely_masked:
        return seen
    batch = torch.arange(heads.start, heads.stop, device=seen.device) // problem.q_heads
    inside = None if problem.paged is None else (at.key < tensors["kv_lengths"][batch][:, None])[:, None]
    if problem.prefix:
        seen = seen | (at.key < tensors["prefix"][batch][:, None])[:, None]
    if problem.chunk is not None:
        chunk = at.diagonal.div(problem.chunk, rounding_mode="floor")
        seen = seen & (chunk[..., None] == at.key // problem.chunk)
    if problem.packed is not None:
        seen = seen & (at.query_sequence[:, None] == at.key_sequence)
    if problem.documents:
        seen = seen & (tensors["q_documents"][batch][:, queries, None] == tensors["kv_documents"][batch][:, None])
    if problem.mask is not None:
        seen = seen & pairs(problem, tensors["mask"], heads, queries).bool()
    return seen if inside is None else seen & inside


def pairs(problem: Problem, tensor: Tensor, heads: slice, queries: slice) -> Tensor:
    """The part of a tensor of pairs, expanded: (n, r, kv_len)."""
    head = torch.arange(heads.start, heads.stop, device=tensor.device)
    whole = tensor.expand(problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
    return whole[head // problem.q_heads, head % problem.q_heads][:, queries]


def rows(problem: Problem, tensors: Mapping[str, Tensor], *, limit: int = _BLOCK_ELEMENTS) -> Iterator[Rows]:
    """Walk over all softmax rows of `problem`, at most `limit` scores (or one row) at a time. Needs q, k, v, and what the
    problem adds to them."""
    tensors = scales.multiplied(problem, paging.dense(problem, tensors))
    flat = {name: tensors[name].flatten(0, 1) for name in ("q", "k", "v")}
    head = torch.arange(problem.batch * problem.q_heads, device=tensors["q"].device)
    kv = head // problem.q_heads * problem.kv_heads + head % problem.q_heads // problem.group
    row_elements = max(problem.kv_len, 1)
    queries_at_once = max(1, min(problem.q_len, limit // row_elements))
    heads_at_once = max(1, limit // (row_elements * queries_at_once))
    for first_head in range(0, len(head), heads_at_once):
        heads = slice(first_head, min(first_head + heads_at_once, len(head)))
        for first in range(0, problem.q_len, queries_at_once):
            queries = slice(first, min(first + queries_at_once, problem.q_len))
            yield _rows(problem, tensors, flat, heads, queries, kv[heads])


def slopes(block: Rows, tensors: Mapping[str, Tensor]) -> Slopes:
    """The backward quantities of `block`; needs dout, and dlse if the problem is given it."""
    dout = tensors["dout"].flatten(0, 1)[block.heads, block.queries].double()
    d_weights = dout @ block.v.mT
    if block.kept is not None:
        d_weights = d_weights * block.kept
    mean = delta = (block.out * dout).sum(-1)
    if "dlse" in tensors:
        delta = mean - tensors["dlse"].flatten(0, 1)[block.heads, block.queries].double()
    d_changed = block.weights * (d_weights - delta.unsqueeze(-1))
    d_scores = d_changed if block.steps.slope is None else d_changed * block.steps.slope
    return Slopes(dout=dout, d_weights=d_weights, mean=mean, delta=delta, d_changed=d_changed, d_scores=d_scores)


def kept(block: Rows, values: Tensor) -> Tensor:
    """`values` (n, r, Skv) as dropout leaves them."""
    return values if block.kept is None else values * block.kept


def sink_weights(block: Rows) -> Tensor:
    """The probability that goes to the sink, (n, r)."""
    assert block.sink is not None
    return torch.exp(block.sink[:, None] - block.lse).masked_fill(block.lse == -math.inf, 0.0)


def forward(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """out (batch, q_heads, q_len, v_head_dim) and lse (batch, q_heads, q_len) from q, k, v and what the problem adds; fp64,
    natural logarithm."""
    out, lse = empty_results(problem, ("out", "lse"), device=tensors["q"].device).values()
    for block in rows(problem, tensors):
        out.flatten(0, 1)[block.heads, block.queries] = block.out
        lse.flatten(0, 1)[block.heads, block.queries] = block.lse
    return {"out": out, "lse": lse}


def backward(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exact dq, dk, dv (shapes of q, k, v; fp64) from q, k, v, dout and what the problem adds, and the gradients of that;
    any given out and lse are not used."""
    results = empty_results(problem, gradient_names(problem), device=tensors["q"].device)
    dq, dk, dv = (results[name].flatten(0, 1) for name in ("dq", "dk", "dv"))
    for block in rows(problem, tensors):
        slope = slopes(block, tensors)
        dq[block.heads, block.queries] = block.scale * slope.d_scores @ block.k
        dk.index_add_(0, block.kv, block.scale * slope.d_scores.mT @ block.q)
        dv.index_add_(0, block.kv, block.values.mT @ slope.dout)
        if "dbias" in results:
            add_pairs(problem, results["dbias"], block, slope.d_changed)
        if "dsinks" in results:
            add_heads(problem, results["dsinks"], block, -(sink_weights(block) * slope.delta).sum(-1))
    return results


def gradient_names(problem: Problem) -> tuple[str, ...]:
    """dq, dk, dv, and the gradients of what the problem adds."""
    return (
        "dq",
        "dk",
        "dv",
        *(("dbias",) if problem.bias is not None else ()),
        *(("dsinks",) if problem.sinks else ()),
    )


def add_pairs(problem: Problem, total: Tensor, block: Rows, part: Tensor) -> None:
    """Add `part` (n, r, Skv) to a tensor of pairs, summed over its axes of one element."""
    heads = torch.arange(block.heads.start, block.heads.stop, device=total.device)
    batch = heads // problem.q_heads if total.shape[0] > 1 else torch.zeros_like(heads)
    head = heads % problem.q_heads if total.shape[1] > 1 else torch.zeros_like(heads)
    part = part.sum(-1, keepdim=True) if total.shape[3] == 1 else part
    part = part.sum(-2, keepdim=True) if total.shape[2] == 1 else part
    whole = total if total.shape[2] == 1 else total[:, :, block.queries]
    whole.index_put_((batch, head), part, accumulate=True)


def add_heads(problem: Problem, total: Tensor, block: Rows, part: Tensor) -> None:
    """Add `part` (n) to a tensor (q_heads)."""
    heads = torch.arange(block.heads.start, block.heads.stop, device=total.device)
    total.index_add_(0, heads % problem.q_heads, part)


def empty_results(problem: Problem, names: tuple[str, ...], *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Zero fp64 tensors in the shapes of the outputs in `names`."""
    forward_only = problem.paged is not None or problem.eight_bits
    known = shapes(problem if forward_only else problem.replace(pass_="bwd"))
    return {name: torch.zeros(known[name][0], dtype=torch.float64, device=device) for name in names}


def _steps(problem: Problem, tensors: Mapping[str, Tensor], products: Tensor, heads: slice, queries: slice) -> Steps:
    """How the scores come about from the scaled products."""
    capped, slope = products, None
    if problem.softcap is not None:
        tangent = torch.tanh(products / problem.softcap)
        capped, slope = problem.softcap * tangent, 1.0 - tangent.square()
    added = []
    if problem.alibi:
        head = torch.arange(heads.start, heads.stop, device=products.device)
        slopes_ = tensors["slopes"][head // problem.q_heads, head % problem.q_heads].double()
        at = positions(problem, tensors, heads, queries)
        distance = at.key - at.diagonal[..., None]
        added.append(-slopes_[:, None, None] * distance.abs())
    if problem.bias is not None:
        added.append(pairs(problem, tensors["bias"], heads, queries).double())
    return Steps(products=products, capped=capped, slope=slope, added=tuple(added), cap=problem.softcap or math.inf)


def dropout_kept(problem: Problem, heads: slice, queries: slice, *, device: torch.device | str = "cpu") -> Tensor:
    """What dropout multiplies each weight with: (n, r, kv_len), 0 or 1 / (1 - dropout).

    A pair is kept if the first number of Philox 4x32-10 (Salmon et al. 2011), with the counter (key, query, head, batch) and
    the seed as its key, is at least dropout 2^32, rounded to an integer.
    """
    head, query, key = np.meshgrid(
        np.arange(heads.start, heads.stop, dtype=np.uint64), np.arange(queries.start, queries.stop, dtype=np.uint64),
        np.arange(problem.kv_len, dtype=np.uint64), indexing="ij",
    )  # fmt: skip
    random = philox((key, query, head % problem.q_heads, head // problem.q_heads), DROPOUT_SEED)
    scale = 1.0 / (1.0 - problem.dropout)
    return torch.from_numpy(np.where(random >= round(problem.dropout * 2.0**32), scale, 0.0)).to(device)


def philox(counter: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """The first of the four 32-bit numbers of Philox 4x32-10, as uint64, for a counter of four words; `seed` has 64 bits."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    words = [np.asarray(word, dtype=np.uint64) & low for word in counter]
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [(second >> half) ^ words[1] ^ keys[0], second & low, (first >> half) ^ words[3] ^ keys[1], first & low]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return words[0]


def _rows(
    problem: Problem,
    tensors: Mapping[str, Tensor],
    flat: Mapping[str, Tensor],
    heads: slice,
    queries: slice,
    kv: Tensor,
) -> Rows:
    q, k, v = flat["q"][heads, queries].double(), flat["k"][kv].double(), flat["v"][kv].double()
    visible = visible_pairs(problem, tensors, heads, queries)
    steps = _steps(problem, tensors, problem.softmax_scale * q @ k.mT, heads, queries)
    scores = steps.capped
    for term in steps.added:
        scores = scores + term
    scores = scores.masked_fill(~visible, -math.inf)
    sink = None
    lowest = scores.new_full((*scores.shape[:2], 1), -math.inf)
    if problem.sinks:
        sink = tensors["sinks"].double()[torch.arange(heads.start, heads.stop, device=q.device) % problem.q_heads]
        lowest = sink[:, None, None].expand(lowest.shape)
    maximum = torch.cat([scores, lowest], dim=-1).amax(-1)
    seeing = maximum > -math.inf
    maximum = maximum.masked_fill(~seeing, 0.0)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink[:, None] - maximum)
    weights = weights / total.masked_fill(~seeing, 1.0).unsqueeze(-1)
    kept = dropout_kept(problem, heads, queries, device=q.device) if problem.dropout else None
    return Rows(
        heads=heads,
        queries=queries,
        kv=kv,
        scale=problem.softmax_scale,
        q=q,
        k=k,
        v=v,
        visible=visible,
        scores=scores,
        maximum=maximum,
        total=total,
        lse=maximum + total.log(),
        weights=weights,
        out=(weights if kept is None else weights * kept) @ v,
        steps=steps,
        sink=sink,
        kept=kept,
    )
