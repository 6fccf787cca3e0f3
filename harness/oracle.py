"""What attention is: the exact answer in fp64, forward and backward, and the quantities that error bounds are made of.

Refuses to import or to know any kernel, and refuses to judge: closeness is decided in `harness.compare`. There are two
unrelated references: a batched one in torch, and loops over single elements (`loop_forward`, `loop_backward`) that read
the mask off its definition and guard the first one in the tests.

Tensors are (batch, heads, length, head_dim), any dtype, any strides, on any device; results are fp64 on that device.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.problem import Problem

# Score elements held at once: each fp64 matrix of a block then takes at most 64 MiB.
_BLOCK_ELEMENTS = 1 << 23

Rows3 = list[list[list[float]]]
Rows4 = list[Rows3]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Complete softmax rows of a few query heads. n heads, r queries, Skv keys; everything fp64.

    `heads` and `queries` say which (heads are counted over batch and head together), `kv` which key/value head each reads.
    q (n, r, D), k (n, Skv, D), v (n, Skv, Dv), visible (r, Skv). scores (n, r, Skv) are scaled, -inf where invisible.
    maximum, total and lse are (n, r): the row maximum (0 in an empty row), the sum of exp(score - maximum), the
    log-sum-exp (-inf in an empty row). weights (n, r, Skv) are the probabilities, out (n, r, Dv) the result.
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slopes:
    """The backward quantities of the same rows: dout (n, r, Dv), d_weights = dout v^T and d_scores (n, r, Skv), and
    delta (n, r) = sum_d out dout (FlashAttention-2, section 3.1.2)."""

    dout: Tensor
    d_weights: Tensor
    delta: Tensor
    d_scores: Tensor


def visible_keys(problem: Problem, queries: slice, *, device: torch.device | str = "cpu") -> Tensor:
    """The mask of the queries in `queries`: (r, kv_len) bool, true where query sees key."""
    first, last, _ = queries.indices(problem.q_len)
    diagonal = torch.arange(first, last, device=device)[:, None] + problem.offset
    key = torch.arange(problem.kv_len, device=device)[None, :]
    seen = torch.ones(last - first, problem.kv_len, dtype=torch.bool, device=device)
    if problem.window_left is not None:
        seen &= key >= diagonal - problem.window_left
    if problem.right is not None:
        seen &= key <= diagonal + problem.right
    return seen


def rows(problem: Problem, tensors: Mapping[str, Tensor], *, limit: int = _BLOCK_ELEMENTS) -> Iterator[Rows]:
    """Walk over all softmax rows of `problem`, at most `limit` scores (or one row) at a time. Needs q, k and v."""
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
            yield _rows(problem, flat, heads, queries, kv[heads])


def slopes(block: Rows, dout: Tensor) -> Slopes:
    """The backward quantities of `block`; `dout` is the whole (batch, q_heads, q_len, v_head_dim) tensor."""
    dout = dout.flatten(0, 1)[block.heads, block.queries].double()
    d_weights = dout @ block.v.mT
    delta = (block.out * dout).sum(-1)
    return Slopes(
        dout=dout, d_weights=d_weights, delta=delta, d_scores=block.weights * (d_weights - delta.unsqueeze(-1))
    )


def forward(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """out (batch, q_heads, q_len, v_head_dim) and lse (batch, q_heads, q_len) from q, k, v; fp64, natural logarithm."""
    out, lse = empty_results(problem, ("out", "lse"), device=tensors["q"].device).values()
    for block in rows(problem, tensors):
        out.flatten(0, 1)[block.heads, block.queries] = block.out
        lse.flatten(0, 1)[block.heads, block.queries] = block.lse
    return {"out": out, "lse": lse}


def backward(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exact dq, dk, dv (shapes of q, k, v; fp64) from q, k, v and dout; any given out and lse are not used."""
    results = empty_results(problem, ("dq", "dk", "dv"), device=tensors["q"].device)
    dq, dk, dv = (result.flatten(0, 1) for result in results.values())
    for block in rows(problem, tensors):
        slope = slopes(block, tensors["dout"])
        dq[block.heads, block.queries] = block.scale * slope.d_scores @ block.k
        dk.index_add_(0, block.kv, block.scale * slope.d_scores.mT @ block.q)
        dv.index_add_(0, block.kv, block.weights.mT @ slope.dout)
    return results


def empty_results(problem: Problem, names: tuple[str, ...], *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Zero fp64 tensors in the shapes of out, lse, dq, dk, dv."""
    queries, keys = (problem.batch, problem.q_heads, problem.q_len), (problem.batch, problem.kv_heads, problem.kv_len)
    shapes = {
        "out": (*queries, problem.v_head_dim),
        "lse": queries,
        "dq": (*queries, problem.head_dim),
        "dk": (*keys, problem.head_dim),
        "dv": (*keys, problem.v_head_dim),
    }
    return {name: torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in names}


def _rows(problem: Problem, flat: Mapping[str, Tensor], heads: slice, queries: slice, kv: Tensor) -> Rows:
    q, k, v = flat["q"][heads, queries].double(), flat["k"][kv].double(), flat["v"][kv].double()
    visible = visible_keys(problem, queries, device=q.device)
    scores = (problem.softmax_scale * q @ k.mT).masked_fill(~visible, -math.inf)
    lowest = scores.new_full((*scores.shape[:2], 1), -math.inf)
    maximum = torch.cat([scores, lowest], dim=-1).amax(-1)
    seeing = maximum > -math.inf
    maximum = maximum.masked_fill(~seeing, 0.0)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = weights.sum(-1)
    weights = weights / total.masked_fill(~seeing, 1.0).unsqueeze(-1)
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
        out=weights @ v,
    )


def loop_forward(problem: Problem, q: Rows4, k: Rows4, v: Rows4) -> tuple[Rows4, Rows3]:
    """(out, lse) of nested lists, one element after the other, sums correctly rounded. For tiny problems."""
    out: Rows4 = []
    lse: Rows3 = []
    for b in range(problem.batch):
        out.append([])
        lse.append([])
        for h in range(problem.q_heads):
            weights, logarithms = _loop_weights(problem, q[b][h], k[b][_kv_head(problem, h)])
            values = v[b][_kv_head(problem, h)]
            out[b].append(
                [
                    [math.fsum(p * values[j][d] for j, p in row.items()) for d in range(problem.v_head_dim)]
                    for row in weights
                ]
            )
            lse[b].append(logarithms)
    return out, lse


def loop_backward(problem: Problem, q: Rows4, k: Rows4, v: Rows4, dout: Rows4) -> tuple[Rows4, Rows4, Rows4]:
    """(dq, dk, dv) of nested lists: the sum over all pairs of their derivative, pair by pair. For tiny problems."""
    dq, dk, dv = (
        [[[[0.0] * dim for _ in range(length)] for _ in range(heads)] for _ in range(problem.batch)]
        for heads, length, dim in (
            (problem.q_heads, problem.q_len, problem.head_dim),
            (problem.kv_heads, problem.kv_len, problem.head_dim),
            (problem.kv_heads, problem.kv_len, problem.v_head_dim),
        )
    )
    for b in range(problem.batch):
        for h in range(problem.q_heads):
            g = _kv_head(problem, h)
            weights, _ = _loop_weights(problem, q[b][h], k[b][g])
            for i, row in enumerate(weights):
                upstream = dout[b][h][i]
                slope = {j: _dot(upstream, v[b][g][j]) for j in row}
                mean = math.fsum(p * slope[j] for j, p in row.items())
                for j, p in row.items():
                    ds = problem.softmax_scale * p * (slope[j] - mean)
                    for d in range(problem.head_dim):
                        dq[b][h][i][d] += ds * k[b][g][j][d]
                        dk[b][g][j][d] += ds * q[b][h][i][d]
                    for d in range(problem.v_head_dim):
                        dv[b][g][j][d] += p * upstream[d]
    return dq, dk, dv


def _kv_head(problem: Problem, head: int) -> int:
    return head // (problem.q_heads // problem.kv_heads)


def _dot(left: list[float], right: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(left, right, strict=True))


def _loop_weights(
    problem: Problem, q: list[list[float]], k: list[list[float]]
) -> tuple[list[dict[int, float]], list[float]]:
    """The probabilities of the visible keys of each query, by key, and the log-sum-exps."""
    weights, logarithms = [], []
    for i in range(problem.q_len):
        diagonal = i if problem.top_left else i + problem.kv_len - problem.q_len
        low = -math.inf if problem.window_left is None else diagonal - problem.window_left
        right = 0 if problem.causal else problem.window_right
        high = math.inf if right is None else diagonal + right
        scores = {j: problem.softmax_scale * _dot(q[i], k[j]) for j in range(problem.kv_len) if low <= j <= high}
        highest = max(scores.values(), default=0.0)
        total = math.fsum(math.exp(score - highest) for score in scores.values())
        weights.append({j: math.exp(score - highest) / total for j, score in scores.items()})
        logarithms.append(highest + math.log(total) if scores else -math.inf)
    return weights, logarithms
