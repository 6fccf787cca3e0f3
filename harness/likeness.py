"""How alike two problems are, as far as the best config of one may serve the other. Pure functions of problems.

Refuses to know devices, files and configs.
"""

import math
from collections.abc import Hashable

from harness.problem import Problem
from harness.space import padded, power_of_two

# Rows of the tile that counts programs, and lengths beyond which no two buckets are told apart.
_ROWS = 128
_LONGEST = 1 << 20
# What else must be equal in one bucket: sizes, and axes of tensors of pairs. Factors and probabilities change no time.
_SIZES = ("chunk", "packed")
_AXES = ("bias", "mask")
# What another order of the axes in memory counts for: as much as half the length.
_LAYOUT = 1.0


def features(problem: Problem) -> dict[str, Hashable]:
    """What must be equal before two problems can be near: what the code computes, not how much of it."""
    return {
        "pass": problem.pass_, "dtype": problem.dtype, "head dim": (padded(problem.head_dim), padded(problem.v_head_dim)),
        "band": (problem.causal, problem.window_left is None, problem.window_right is None, problem.top_left),
        "variants": problem.variants, "page": problem.paged,
    }  # fmt: skip


def bucket(problem: Problem, multiprocessors: int) -> Hashable:
    """Problems of one bucket are answered alike: equal but for lengths that round up to the same power of two, and for batches
    and heads that make as many waves of programs, to a factor of two."""
    programs = problem.batch * problem.q_heads * -(-problem.q_len // _ROWS)
    waves = max(math.ceil(math.log2(max(programs, 1) / multiprocessors)), 0)
    lengths = tuple(min(power_of_two(length), _LONGEST) for length in (problem.q_len, problem.kv_len))
    exact = (
        problem.head_dim,
        problem.v_head_dim,
        problem.group,
        problem.window_left,
        problem.window_right,
        problem.layout,
    )
    named = tuple(getattr(problem, name) for name in (*_SIZES, *_AXES))
    return tuple(features(problem).values()), exact, named, lengths, waves


def distance(one: Problem, other: Problem) -> float:
    """How far two problems with equal features lie apart, in doublings: lengths and windows count whole, the batch times heads,
    the group and the head dim half each."""
    whole = [(one.q_len, other.q_len), (one.kv_len, other.kv_len)]
    sides = [name for name in ("window_left", "window_right") if getattr(one, name) is not None]
    whole += [(getattr(one, name) + 1, getattr(other, name) + 1) for name in sides]
    whole += [(getattr(one, name), getattr(other, name)) for name in _SIZES if getattr(one, name) is not None]
    half = [
        (one.batch * one.q_heads, other.batch * other.q_heads), (one.group, other.group), (one.head_dim, other.head_dim),
        (one.v_head_dim, other.v_head_dim),
    ]  # fmt: skip
    apart = sum(_doublings(*pair) for pair in whole) + sum(_doublings(*pair) for pair in half) / 2
    return apart + (_LAYOUT if one.layout != other.layout else 0.0)


def _doublings(one: int, other: int) -> float:
    """|log2(one / other)|, the same both ways; a count of 0 is taken for 1."""
    return abs(math.log2(max(one, 1)) - math.log2(max(other, 1)))
