"""The plain algorithms against the fp64 oracle, and their counts of bytes against formulas. No Triton is needed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import bounds, compare
from harness.noise import RoundingContract
from harness.problem import Problem, parse_problem
from kernels import baselines

TYPES = {"fp64": torch.float64, "fp32": torch.float32}
FORWARD: dict[str, tuple[Callable[..., baselines.Forward], int]] = {
    "safe": (baselines.standard_attention, 1),
    "online": (partial(baselines.standard_attention, softmax=baselines.online_softmax), 1),
    "blockwise": (partial(baselines.blockwise_attention, block_m=4, block_n=5), 5),
    "one block": (baselines.blockwise_attention, 64),
}
PROBLEMS = (
    "b2 h4/2 q9 k13 d8/5 fp32",
    "b1 h3/1 q13 k9 d8/5 fp32 causal",
    "b1 h2 q13 k9 d4 fp32 causal top-left scale=-2.0",
    "b1 h4/2 q12 k17 d8 fp32 window=3:2 scale=30.0",
    "b1 h2/1 q17 k12 d3/7 fp32 causal window=4",
    "b1 h2 q7 k20 d4 fp32 window=2:inf top-left",
    "b1 h1 q3 k0 d4 fp32",
    "b1 h1 q0 k3 d4 fp32",
)
# fp64 shows mistakes of 1e-15; fp32 shows where a type is forgotten.
ASKED = [(notation, "fp64") for notation in PROBLEMS] + [(PROBLEMS[1], "fp32"), (PROBLEMS[4], "fp32")]


def drawn(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    queries, keys = (problem.batch, problem.q_heads, problem.q_len), (problem.batch, problem.kv_heads, problem.kv_len)
    shapes = {
        "q": (*queries, problem.head_dim), "k": (*keys, problem.head_dim), "v": (*keys, problem.v_head_dim),
        "dout": (*queries, problem.v_head_dim),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def band(problem: Problem) -> dict[str, Any]:
    return {"window_left": problem.window_left, "window_right": problem.right, "top_left": problem.top_left}


def contract(dtype: str, key_block: int, **more: Any) -> RoundingContract:
    """Of the kernels, but for constants: these are in the type of the inputs."""
    return replace(bounds.contract_for(dtype, key_block=key_block, chained=True), constant=0.0, **more)


def judge(found: dict[str, Tensor], expected: bounds.Expectation, problem: Problem) -> None:
    checks = compare.judge(found, expected, case=str(problem))
    if any(output.numel() for output in found.values()):
        assert compare.status_of(checks) == "passed", compare.sentence(compare.worst(checks))


@pytest.mark.parametrize(("notation", "dtype"), ASKED)
@pytest.mark.parametrize("algorithm", FORWARD)
def test_forward(algorithm: str, notation: str, dtype: str) -> None:
    problem = parse_problem(notation)
    values = drawn(problem, TYPES[dtype])
    attend, key_block = FORWARD[algorithm]
    made = attend(values["q"], values["k"], values["v"], scale=problem.scale, **band(problem))
    expected = bounds.expect_forward(problem, values, contract(dtype, key_block), structured=False)
    judge({"out": made.out, "lse": made.lse}, expected, problem)


@pytest.mark.parametrize(("notation", "dtype"), ASKED)
def test_backward_of_standard_attention(notation: str, dtype: str) -> None:
    problem = parse_problem(f"{notation} bwd")
    values = drawn(problem, TYPES[dtype])
    q, k, v, dout = values.values()
    weights = baselines.standard_attention(q, k, v, scale=problem.scale, **band(problem)).weights
    made = baselines.standard_attention_backward(q, k, v, weights, dout, scale=problem.scale)
    expected = bounds.expect_backward(problem, values, contract(dtype, 1, summed_delta=True), structured=False)
    judge({"dq": made.dq, "dk": made.dk, "dv": made.dv}, expected, problem)


@pytest.mark.parametrize(("notation", "dtype"), ASKED)
def test_backward_of_blockwise_attention(notation: str, dtype: str) -> None:
    problem = parse_problem(f"{notation} bwd")
    values = drawn(problem, TYPES[dtype])
    q, k, v, dout = values.values()
    asked = {"scale": problem.scale, **band(problem), "block_m": 4, "block_n": 5}
    forward = baselines.blockwise_attention(q, k, v, **asked)
    made = baselines.blockwise_attention_backward(q, k, v, forward.out, forward.lse, dout, **asked)
    expected = bounds.expect_backward(problem, values, contract(dtype, 5), structured=False)
    judge({"dq": made.dq, "dk": made.dk, "dv": made.dv}, expected, problem)


def test_rows_that_see_nothing() -> None:
    q, k, v, dout = drawn(parse_problem("b1 h1 q5 k3 d4 fp32"), torch.float64).values()
    stored = baselines.standard_attention(q, k, v, window_right=0)
    blocks = baselines.blockwise_attention(q, k, v, window_right=0, block_m=4, block_n=2)
    plain = baselines.standard_attention_backward(q, k, v, stored.weights, dout)
    tiled = baselines.blockwise_attention_backward(
        q, k, v, blocks.out, blocks.lse, dout, window_right=0, block_m=4, block_n=2
    )
    for forward, backward in ((stored, plain), (blocks, tiled)):
        assert (forward.out[:, :, :2] == 0).all() and (forward.lse[:, :, :2] == -torch.inf).all()
        assert (backward.dq[:, :, :2] == 0).all() and (backward.dq[:, :, 3:] != 0).all()
    assert (stored.weights[:, :, :2] == 0).all()


@pytest.mark.parametrize("softmax", [baselines.safe_softmax, baselines.online_softmax])
def test_a_softmax_of_large_scores_does_not_overflow(softmax: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    weights, lse = softmax(torch.tensor([[-1e5, 1e5, 1e5], [-1e30, -1e30, -torch.inf], [-torch.inf] * 3]))
    assert weights.tolist() == [[0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert lse.isfinite().tolist() == [True, True, False] and lse[2] == -torch.inf
    assert softmax(torch.empty(2, 0))[1].tolist() == [-torch.inf] * 2


def test_blocks_may_be_merged_in_any_order() -> None:
    """Exactly where exactness is meant: exchanged operands, and a block in which nothing is seen."""
    scores, v = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 6, 2, dtype=torch.float64)
    left, right = (baselines.partial(scores[..., keys], v[:, keys]) for keys in (slice(0, 2), slice(2, 6)))
    nothing = baselines.partial(torch.full((3, 4, 2), -torch.inf, dtype=torch.float64), v[:, :2])
    for one, other in (
        (baselines.merge(left, right), baselines.merge(right, left)),
        (baselines.merge(nothing, left), left),
        (baselines.merge(nothing, nothing), nothing),
    ):
        assert torch.equal(one.maximum, other.maximum) and torch.equal(one.total, other.total)
        assert torch.equal(one.summed, other.summed)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


def meta(problem: Problem) -> list[Tensor]:
    types = {"fp16": torch.float16, "fp32": torch.float32}
    return [tensor.to("meta", types[problem.dtype]) for tensor in drawn(problem, torch.float32).values()]


@pytest.mark.parametrize("notation", ["b2 h4/2 q8 k16 d8/4 fp16", "b1 h3 s5 d8 fp32"])
def test_bytes_of_standard_attention(notation: str) -> None:
    """Algorithms 0 and 3 of the paper, line by line."""
    problem = parse_problem(notation)
    q, k, v, dout = meta(problem)
    forward = baselines.standard_attention(q, k, v)
    backward = baselines.standard_attention_backward(q, k, v, forward.weights, dout)
    matrix, *others = (tensor.numel() * tensor.element_size() for tensor in (forward.weights, q, k, v, dout))
    of_q, of_k, of_v, of_out = others
    assert forward.memory.bytes_read == of_q + of_k + matrix + matrix + of_v
    assert forward.memory.bytes_written == matrix + matrix + of_out
    first, second, third = matrix + of_out, of_out + of_v, matrix + matrix
    assert backward.memory.bytes_read == first + second + third + (matrix + of_k) + (matrix + of_q)
    assert backward.memory.bytes_written == of_v + matrix + matrix + of_q + of_k


@pytest.mark.parametrize("notation", ["b2 h4/2 q8 k16 d8/4 fp16", "b1 h3 s5 d8 fp32 causal"])
def test_the_least_bytes_are_those_of_the_problem(notation: str) -> None:
    for least, pass_ in zip(baselines.least_traffic(*meta(parse_problem(notation))[:3]), ("fwd", "bwd"), strict=True):
        assert least.bytes == parse_problem(f"{notation} {pass_}").least_bytes


def test_bytes_of_blockwise_attention() -> None:
    """One tile reads everything once; smaller ones read keys and values once for each block of queries that may see them."""
    q, k, v, dout = meta(parse_problem("b2 h4/2 q16 k16 d8 fp16"))
    least, _ = baselines.least_traffic(q, k, v)
    assert baselines.blockwise_attention(q, k, v, block_m=16, block_n=16).memory == least
    once = 2 * k.numel() * k.element_size()
    for asked, times in (
        ({}, 4.0),
        ({"window_right": 0}, (1 + 2 + 3 + 4) / 4),
        ({"window_left": 0, "window_right": 0}, 1.0),
    ):
        made = baselines.blockwise_attention(q, k, v, block_m=4, block_n=4, **asked)
        assert made.memory.bytes_written == least.bytes_written
        assert made.memory.bytes_read == least.bytes_read - once + times * once
        gradients = baselines.blockwise_attention_backward(
            q, k, v, made.out, made.lse, dout, block_m=4, block_n=4, **asked
        )
        rows = 2 * q.numel() * q.element_size() + 2 * made.lse.numel() * 4
        delta = 2 * q.numel() * q.element_size()
        assert gradients.memory.bytes_read == delta + once + times * rows + rows + times * once
        assert gradients.memory.bytes_written == made.lse.numel() * 4 + (q.numel() + 2 * k.numel()) * 2


def test_counting_needs_no_numbers() -> None:
    problem = parse_problem("b1 h2/1 q9 k13 d4 fp32 causal")
    values = drawn(problem, torch.float32)
    for attend, _ in FORWARD.values():
        real, counted = (
            attend(*tensors, **band(problem)) for tensors in (list(values.values())[:3], meta(problem)[:3])
        )
        assert real.memory == counted.memory and counted.out.device.type == "meta"


def test_sixteen_bits_stay_sixteen_bits() -> None:
    q, k, v, dout = (
        tensor.to(torch.bfloat16) for tensor in drawn(parse_problem("b1 h2/1 q9 k13 d4 bf16"), torch.float32).values()
    )
    stored, blocks = baselines.standard_attention(q, k, v), baselines.blockwise_attention(q, k, v, block_n=4)
    plain = baselines.standard_attention_backward(q, k, v, stored.weights, dout)
    tiled = baselines.blockwise_attention_backward(q, k, v, blocks.out, blocks.lse, dout)
    for made in (stored.out, blocks.out, plain.dq, plain.dk, plain.dv, tiled.dq, tiled.dk, tiled.dv):
        assert made.dtype == torch.bfloat16 and made.isfinite().all()


def test_the_table_says_what_it_is() -> None:
    table = baselines.traffic_table()
    problem = parse_problem("b64 h16 s1024 d64 fp16")
    least = [problem.replace(pass_=pass_).least_bytes / 1e9 for pass_ in ("fwd", "bwd")]
    *_, standard, _, _, last, reported = table.splitlines()
    assert "counted, not measured" in table and "40.3" in reported and "4.4" in reported
    assert last.split()[-3:] == [f"{number:.2f}" for number in (*least, sum(least))]
    matrix, tensor = 64 * 16 * 1024 * 1024 * 2 / 1e9, 64 * 16 * 1024 * 64 * 2 / 1e9
    counts = 4 * matrix + 4 * tensor, 7 * matrix + 8 * tensor
    assert standard.split()[-3:] == [f"{number:.2f}" for number in (*counts, sum(counts))]
