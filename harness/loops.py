"""The second reference: attention and its gradients by loops over single elements, in Python's floats, for tiny problems.

It reads everything off its definition in `harness.problem`, one pair after the other, with correctly rounded sums, and shares no
line with `harness.oracle`, which it guards. Refuses to be fast.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.operation import DROPOUT_SEED
from harness.problem import PAIR_AXES, Problem

# Nested lists of numbers: tensors by name.
Lists = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Pair:
    """One visible pair: its key, its weight, what dropout multiplies that with, and the derivatives of its score, by the
    scaled product and by what was added to it."""

    key: int
    weight: float
    kept: float
    by_product: float


@dataclass(frozen=True, slots=True)
class _Row:
    """One softmax row: its visible pairs, its log-sum-exp and the weight of its sink."""

    batch: int
    head: int
    query: int
    pairs: tuple[_Pair, ...]
    lse: float
    sink: float

    def out(self, values: list[list[float]], column: int) -> float:
        return math.fsum(pair.weight * pair.kept * values[pair.key][column] for pair in self.pairs)


def loop_forward(problem: Problem, lists: Lists) -> dict[str, Any]:
    """{"out", "lse"} as nested lists, from q, k, v and what the problem adds."""
    out: list[Any] = [[[] for _ in range(problem.q_heads)] for _ in range(problem.batch)]
    lse: list[Any] = [[[] for _ in range(problem.q_heads)] for _ in range(problem.batch)]
    for row in _rows(problem, lists):
        values = _column(problem, lists, "v", row.batch, row.head)
        if problem.eight_bits:
            held = [_scale(problem, lists, "v", row.batch, row.head, j) for j in range(len(values))]
            values = [[scale * x for x in value] for scale, value in zip(held, values, strict=True)]
        out[row.batch][row.head].append([row.out(values, d) for d in range(problem.v_head_dim)])
        lse[row.batch][row.head].append(row.lse)
    return {"out": out, "lse": lse}


def loop_backward(problem: Problem, lists: Lists) -> dict[str, Any]:
    """{"dq", "dk", "dv"} and the gradients of what the problem adds, as nested lists: sums over all pairs, pair by pair."""
    q_shape = (problem.batch, problem.q_heads, problem.q_len, problem.head_dim)
    k_shape = (problem.batch, problem.kv_heads, problem.kv_len)
    found = {
        "dq": _zeros(q_shape),
        "dk": _zeros((*k_shape, problem.head_dim)),
        "dv": _zeros((*k_shape, problem.v_head_dim)),
    }
    if problem.bias is not None:
        found["dbias"] = _zeros(tuple(_sizes(problem, problem.bias)))
    if problem.sinks:
        found["dsinks"] = [0.0] * problem.q_heads
    for row in _rows(problem, lists):
        _add_row(problem, lists, row, found)
    return found


def _add_row(problem: Problem, lists: Lists, row: _Row, found: dict[str, Any]) -> None:
    b, h, i = row.batch, row.head, row.query
    g = _kv_head(problem, h)
    upstream, query = lists["dout"][b][h][i], lists["q"][b][h][i]
    slope = {pair.key: pair.kept * _dot(upstream, lists["v"][b][g][pair.key]) for pair in row.pairs}
    mean = math.fsum(pair.weight * slope[pair.key] for pair in row.pairs)
    if problem.lse_grad:
        mean -= lists["dlse"][b][h][i]
    for pair in row.pairs:
        j = pair.key
        changed = pair.weight * (slope[j] - mean)
        product = problem.softmax_scale * changed * pair.by_product
        for d in range(problem.head_dim):
            found["dq"][b][h][i][d] += product * lists["k"][b][g][j][d]
            found["dk"][b][g][j][d] += product * query[d]
        for d in range(problem.v_head_dim):
            found["dv"][b][g][j][d] += pair.weight * pair.kept * upstream[d]
        if problem.bias is not None:
            bb, hh, ii, jj = _place(problem.bias, b, h, i, j)
            found["dbias"][bb][hh][ii][jj] += changed
    if problem.sinks:
        found["dsinks"][h] -= row.sink * mean


def _rows(problem: Problem, lists: Lists) -> Iterator[_Row]:
    for b in range(problem.batch):
        for h in range(problem.q_heads):
            for i in range(problem.q_len):
                yield _row(problem, lists, b, h, i)


def _row(problem: Problem, lists: Lists, b: int, h: int, i: int) -> _Row:
    keys = _column(problem, lists, "k", b, h)
    scores: dict[int, tuple[float, float]] = {}
    for j in range(problem.kv_len):
        if _visible(problem, lists, b, h, i, j):
            scale = problem.softmax_scale
            if problem.eight_bits:
                scale *= _scale(problem, lists, "q", b, h, i) * _scale(problem, lists, "k", b, h, j)
            scores[j] = _score(problem, lists, (b, h, i, j), scale * _dot(lists["q"][b][h][i], keys[j]))
    sinks = [lists["sinks"][h]] if problem.sinks else []
    highest = max([score for score, _ in scores.values()] + sinks, default=-math.inf)
    if highest == -math.inf:
        return _Row(b, h, i, (), -math.inf, 0.0)
    total = math.fsum(
        [math.exp(score - highest) for score, _ in scores.values()] + [math.exp(s - highest) for s in sinks]
    )
    pairs = tuple(
        _Pair(j, math.exp(score - highest) / total, _kept(problem, b, h, i, j), by_product)
        for j, (score, by_product) in scores.items()
    )
    return _Row(b, h, i, pairs, highest + math.log(total), math.fsum(math.exp(s - highest) for s in sinks) / total)


def _located(problem: Problem, lists: Lists, b: int, i: int, j: int) -> tuple[int, int] | None:
    """The key position of the diagonal of query i, and that of key j, within their sequence; None if they share none."""
    if problem.paged is not None:
        length = lists["kv_lengths"][b]
        return ((i if problem.top_left else int(i + length - problem.q_len)), j) if j < length else None
    if problem.packed is None:
        return (i if problem.top_left else i + problem.kv_len - problem.q_len), j
    q_starts, kv_starts = lists["q_starts"], lists["kv_starts"]
    for s in range(problem.packed):
        if q_starts[s] <= i < q_starts[s + 1] and kv_starts[s] <= j < kv_starts[s + 1]:
            longer = (kv_starts[s + 1] - kv_starts[s]) - (q_starts[s + 1] - q_starts[s])
            return int(i - q_starts[s] + (0 if problem.top_left else longer)), int(j - kv_starts[s])
    return None


def _visible(problem: Problem, lists: Lists, b: int, h: int, i: int, j: int) -> bool:
    located = _located(problem, lists, b, i, j)
    if located is None:
        return False
    diagonal, position = located
    low = -math.inf if problem.window_left is None else diagonal - problem.window_left
    right = 0 if problem.causal else problem.window_right
    high = math.inf if right is None else diagonal + right
    if not low <= position <= high and not (problem.prefix and position < lists["prefix"][b]):
        return False
    if problem.chunk is not None and diagonal // problem.chunk != position // problem.chunk:
        return False
    if problem.documents and lists["q_documents"][b][i] != lists["kv_documents"][b][j]:
        return False
    return problem.mask is None or bool(_of_pair(lists["mask"], problem.mask, b, h, i, j))


def _score(problem: Problem, lists: Lists, pair: tuple[int, int, int, int], product: float) -> tuple[float, float]:
    """The complete score and its derivative by the scaled product."""
    b, h, i, j = pair
    score, slope = product, 1.0
    if problem.softcap is not None:
        score = problem.softcap * math.tanh(product / problem.softcap)
        slope = 1.0 / math.cosh(min(abs(product / problem.softcap), 300.0)) ** 2
    if problem.alibi:
        located = _located(problem, lists, b, i, j)
        assert located is not None
        score -= lists["slopes"][b][h] * abs(located[1] - located[0])
    if problem.bias is not None:
        score += _of_pair(lists["bias"], problem.bias, b, h, i, j)
    return score, slope


def _column(problem: Problem, lists: Lists, name: str, b: int, h: int) -> list[list[float]]:
    """The keys or values that head h reads, one behind the other; up to the length of the sequence where they are paged."""
    g = _kv_head(problem, h)
    if problem.paged is None:
        whole: list[list[float]] = lists[name][b][g]
        return whole
    table, size = lists["block_table"][b], problem.paged
    return [lists[name][int(table[j // size])][g][j % size] for j in range(int(lists["kv_lengths"][b]))]


def _scale(problem: Problem, lists: Lists, name: str, b: int, h: int, row: int) -> float:
    """What a row of q, k or v is multiplied with, for query head h."""
    entry = b
    if problem.packed is not None:
        starts = lists["q_starts" if name == "q" else "kv_starts"]
        entry = next(s for s in range(problem.packed) if starts[s] <= row < starts[s + 1])
    return float(lists[f"{name}_descale"][entry][_kv_head(problem, h)])


def _kept(problem: Problem, b: int, h: int, i: int, j: int) -> float:
    if not problem.dropout:
        return 1.0
    return 1.0 / (1.0 - problem.dropout) if _philox([j, i, h, b]) >= round(problem.dropout * 2**32) else 0.0


def _philox(counter: list[int]) -> int:
    """Philox 4x32-10 of Salmon et al. 2011, its first word."""
    word = 1 << 32
    key = [DROPOUT_SEED % word, DROPOUT_SEED // word % word]
    for turn in range(10):
        high_a, low_a = divmod(0xD2511F53 * counter[0], word)
        high_b, low_b = divmod(0xCD9E8D57 * counter[2], word)
        turned = [(key[0] + turn * 0x9E3779B9) % word, (key[1] + turn * 0xBB67AE85) % word]
        counter = [high_b ^ counter[1] ^ turned[0], low_b, high_a ^ counter[3] ^ turned[1], low_a]
    return counter[0]


def _of_pair(nested: Any, letters: str, b: int, h: int, i: int, j: int) -> Any:
    bb, hh, ii, jj = _place(letters, b, h, i, j)
    return nested[bb][hh][ii][jj]


def _place(letters: str, *indices: int) -> tuple[int, ...]:
    return tuple(index if axis in letters else 0 for axis, index in zip(PAIR_AXES, indices, strict=True))


def _sizes(problem: Problem, letters: str) -> Iterator[int]:
    sizes = (problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
    return (size if axis in letters else 1 for axis, size in zip(PAIR_AXES, sizes, strict=True))


def _zeros(shape: tuple[int, ...]) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0


def _kv_head(problem: Problem, head: int) -> int:
    return head // (problem.q_heads // problem.kv_heads)


def _dot(left: list[float], right: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(left, right, strict=True))
