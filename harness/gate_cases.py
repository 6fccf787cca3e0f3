"""The gate's questions: small problems of a candidate's family, with which values, lying how in memory.

The small problems are built so that every kind of tile occurs (untouched by the mask, on the diagonal, on a window's edge,
ragged at the end, without any visible key), so a candidate that is wrong anywhere in the family is wrong there. They were
chosen by planted bugs (`harness.mutate`): only launches cost time, so each question is given the values and the strides that
catch most. Refuses to run or to judge anything.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from harness import inputs
from harness.inputs import Placement
from harness.operation import SCALES, operation_for
from harness.problem import Problem
from harness.space import Value
from harness.subject import described, lag_of, most_splits

Lies = Literal["plain", "unit", "any"]

# Scores this far below 0 (nats) leave the exponents of fp32, so that a maximum that begins at 0 leaves nothing.
_DEPTH = 112.0
# How far ordinary scores may lie above their mean.
_DEVIATIONS = 6.0
# The largest power of two that fp16 holds, and that types of 8 bits do.
_LARGEST, _LARGEST_OF_EIGHT_BITS = 2.0**15, 2.0**8

# By tensor, the order of its axes (slowest first), and how many elements lie behind its fastest axis, which sets its strides
# apart from others'. Rows are never the fastest, so that what runs over the last one meets guards; keys and values have
# wide gaps behind their rows, so that what reads beyond the head dim meets them too.
_ODD: Mapping[str, tuple[tuple[int, ...], int]] = {
    "q": ((0, 2, 3, 1), 1),
    "k": ((2, 1, 0, 3), 80),
    "v": ((2, 0, 1, 3), 112),
    "lse": ((2, 1, 0), 4),
    "out": ((1, 2, 3, 0), 6),
    "dout": ((2, 1, 3, 0), 2),
    "dq": ((2, 0, 3, 1), 9),
    "dk": ((0, 2, 3, 1), 9),
    "dv": ((1, 2, 3, 0), 13),
    "dlse": ((1, 2, 0), 3),
    "slopes": ((1, 0), 2),
    "bias": ((1, 3, 0, 2), 5),
    "dbias": ((0, 3, 2, 1), 7),
    "mask": ((2, 0, 3, 1), 3),
    "sinks": ((0,), 0),
    "dsinks": ((0,), 0),
    "prefix": ((0,), 0),
    "q_documents": ((1, 0), 3),
    "kv_documents": ((1, 0), 1),
    "q_starts": ((0,), 0),
    "kv_starts": ((0,), 0),
    **dict.fromkeys(SCALES, ((1, 0), 3)),
    "block_table": ((1, 0), 3),
    "kv_lengths": ((0,), 0),
}
# Triton compiles other code for strides that 16 does not divide, and descriptors need rows of whole 16 bytes.
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tile sides of a config: the largest over queries and over keys, the least over keys and of all. `span` is a multiple
    of every side, since sides are powers of two. `splits` is the number of parts that the keys are divided into."""

    rows: int
    keys: int
    least_keys: int
    least: int
    splits: int = 1

    @property
    def span(self) -> int:
        return max(self.rows, self.keys)


@dataclass(frozen=True, slots=True)
class GateCase:
    """A question: `recipe` names values of `harness.inputs`, or is "sunk".

    `lies` says how tensors lie: "plain" as the problem's layout says, so that this is the code that will be timed; "any"
    with strides of their own for each, "unit" the same with the last axis fastest.
    """

    problem: Problem
    recipe: str
    lies: Lies

    @property
    def structured(self) -> bool:
        """Whether roundings may add up, so that only the worst-case bound holds."""
        return self.recipe == "sunk" or inputs.recipe_for(self.recipe).structured

    def values(self, seed: int) -> dict[str, Tensor]:
        """q, k, v and dout of the question, as `inputs.draw` gives them."""
        if self.recipe == "sunk":
            return _sunk(self.problem, inputs.draw(self.problem, seed=seed))
        return inputs.draw(self.problem, seed=seed, recipe=self.recipe)

    def placements(self) -> dict[str, Placement]:
        """Where each tensor of the operation lies."""
        return {name: self._placement(name) for name in operation_for(self.problem).tensors}

    def _placement(self, name: str) -> Placement:
        order, padding = _ODD[name]
        if self.lies == "plain":
            return inputs.placement_for(self.problem.layout, len(order))
        if self.lies == "unit" and len(order) == 4:
            padding = padding if order[-1] == 3 else padding * _ALIGNED
            order = (*(axis for axis in order if axis != 3), 3)
        return Placement(order=order, row_padding=padding)


def gate_cases(problem: Problem, config: Mapping[str, Value], *, unit: bool = False) -> tuple[GateCase, ...]:
    """What a candidate is asked, depending on the family and on the config's tile sides only, and whether it uses descriptors or
    a lag.

    Same pass, dtype, head dims, layout, scale, kind of mask and alignment, in four questions, or five:
    - *like*: lengths and windows that the tiles divide just when they divide the real ones, with tiles inside the mask, and
      with two blocks in some parts where keys are divided; the only one whose tensors lie as the real ones do;
    - *ragged*: more queries than keys, so some see nothing in a causal problem, and all heads of a group. Forward, the
      output counts the keys that were seen, which is exact; two sequences where keys are paged, as lengths then differ;
    - *ragged* again, with ordinary values, and windows one key narrower: a kernel that remembers a call is wrong here;
    - *short*: fewer queries than keys, and lengths at which a bound hides a single key; two batches, and two key/value heads
      if there is more than one. Forward, all scores lie far below 0.
    - *like* once more, with scores of some tens, where a config rescales its sums only after a maximum has risen far.

    `unit` keeps the last axis fastest everywhere. Groups keep their size up to 4 query heads in *ragged*, 2 (3 if odd) in
    the others; larger ones become 4 (3 if odd).
    """
    blocks = blocks_of(config)
    lies: Lies = "unit" if unit or described(config, ("k",)) else "any"
    ragged = _ragged(problem, blocks)
    forward = problem.pass_ == "fwd"
    waiting = (GateCase(_similar(problem, blocks), "large", lies),) if lag_of(config) else ()
    return (
        GateCase(_similar(problem, blocks), "normal", "plain"),
        GateCase(ragged, "counting" if forward else "normal", lies),
        GateCase(_narrowed(ragged), "normal", lies),
        GateCase(_short(problem, blocks), "sunk" if forward else "normal", lies),
        *waiting,
    )


def _ragged(problem: Problem, blocks: Blocks) -> Problem:
    span = blocks.span
    length = (span + blocks.least) // 2 + 5
    return problem.replace(
        batch=1 if problem.paged is None else 2,
        kv_heads=1,
        q_heads=_group(problem, 4),
        q_len=length + 11,
        kv_len=length,
        window_left=_least(problem.window_left, span // 2 + 3),
        window_right=_least(problem.window_right, span // 4 + 1),
        chunk=_least(problem.chunk, span // 2 + 7),
        packed=_least(problem.packed, 3),
    )


def _narrowed(problem: Problem) -> Problem:
    left, right = (
        side if side is None or side < 2 else side - 1 for side in (problem.window_left, problem.window_right)
    )
    return problem.replace(window_left=left, window_right=right)


def _short(problem: Problem, blocks: Blocks) -> Problem:
    """The last key is alone in its block. Where a window is wide enough, it hides one key, from the last query, or (on the
    right) from the first."""
    heads = min(problem.kv_heads, 2)
    q_len, kv_len = blocks.rows // 4 + 1, blocks.keys + 1
    left = _least(problem.window_left, (q_len if problem.top_left else kv_len) - 2)
    right = _least(problem.right, kv_len - 2 if problem.top_left else blocks.span // 4 + 1)
    if right is not None and not problem.top_left:
        q_len = right + 2
    return problem.replace(
        batch=2 if problem.packed is None else 1, packed=_least(problem.packed, 2), kv_heads=heads,
        q_heads=heads * _group(problem, 2), q_len=q_len, kv_len=kv_len, window_left=left,
        window_right=None if problem.causal else right, chunk=_least(problem.chunk, blocks.span // 4 + 3),
    )  # fmt: skip


def _sunk(problem: Problem, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """One feature, constant in Q and in K, moves all scores down by the same number, so that none is above -`_DEPTH`."""
    scale = problem.softmax_scale
    for name in SCALES:
        if name in values:
            values[name].fill_(1.0)
    if scale:
        depth = _DEPTH + _DEVIATIONS * abs(scale) * math.sqrt(problem.head_dim)
        largest = _LARGEST_OF_EIGHT_BITS if problem.eight_bits else _LARGEST
        root = min(2.0 ** math.ceil(math.log2(depth / abs(scale)) / 2), largest)
        values["q"][..., 0] = math.copysign(root, scale)
        values["k"][..., 0] = -root
    return values


def _group(problem: Problem, limit: int) -> int:
    """Query heads for each key/value head: more than `limit` find nothing that `limit`, or 3 if odd, do not."""
    if problem.group <= limit:
        return problem.group
    return 3 if problem.group % 2 else limit


def blocks_of(config: Mapping[str, Value]) -> Blocks:
    """The tile sides that a config names, 16 where it names none, and its splits."""

    def sides(word: str) -> list[int]:
        found = [value for name, value in config.items() if word in name and not isinstance(value, str | bool)]
        return found or [16]

    rows, keys = sides("block_m"), sides("block_n")
    return Blocks(max(rows), max(keys), min(keys), min(rows + keys), most_splits(config))


def _least(bound: int | None, limit: int) -> int | None:
    return None if bound is None else min(bound, limit)


def _similar(problem: Problem, blocks: Blocks) -> Problem:
    """One group of heads, with lengths and windows shortened by whole multiples of the tiles, so that all remainders are kept.

    A window side keeps at least two tiles, so that a tile inside it needs no mask, and lengths reach a tile beyond it. Where
    keys are divided, every part keeps a block, and the first one two.
    """
    span = blocks.span
    deep = max(2, blocks.splits + 1) * span - 1
    left, right = (
        None if side is None else _shortened(side, deep, span) for side in (problem.window_left, problem.right)
    )
    reach = max(left or 0, right or 0)
    least = reach + span if reach else span + 1
    q_len = _shortened(problem.q_len, least if problem.banded else 1, span)
    kv_len = _shortened(problem.kv_len, max(least, blocks.splits * span + 1), span)
    # What is longer stays longer, so that the diagonal begins on the same side.
    if problem.q_len < problem.kv_len and q_len >= kv_len:
        kv_len += span
    if problem.q_len > problem.kv_len and q_len <= kv_len:
        q_len += span
    return problem.replace(
        batch=1, kv_heads=1, q_heads=_group(problem, 2), q_len=q_len, kv_len=kv_len, window_left=left,
        window_right=None if problem.causal else right,
        chunk=None if problem.chunk is None else _shortened(problem.chunk, span, span), packed=_least(problem.packed, 4),
    )  # fmt: skip


def _shortened(length: int, least: int, span: int) -> int:
    """The smallest number of at least `least` that `length` exceeds by a multiple of `span`; `length` if it is smaller."""
    return length if length < least else least + (length - least) % span
