"""Names, shapes and keywords of the two operations."""

from harness.operation import BACKWARD, FORWARD, operation_for, problem_keywords, shapes, tunables
from harness.problem import parse_problem

PROBLEM = parse_problem("b2 h6/3 q5 k7 d16/8 bf16 causal window=4")


def test_passes_name_their_tensors_in_the_order_of_a_kernel():
    assert operation_for(PROBLEM) is FORWARD and operation_for(PROBLEM.replace(pass_="bwd")) is BACKWARD
    assert FORWARD.tensors == ("q", "k", "v", "out", "lse")
    assert BACKWARD.tensors == ("q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv")


def test_shapes_follow_heads_lengths_and_head_dims():
    assert shapes(PROBLEM) == {
        "q": ((2, 6, 5, 16), "bf16"),
        "k": ((2, 3, 7, 16), "bf16"),
        "v": ((2, 3, 7, 8), "bf16"),
        "out": ((2, 6, 5, 8), "bf16"),
        "lse": ((2, 6, 5), "fp32"),
    }
    backward = shapes(PROBLEM.replace(pass_="bwd"))
    assert list(backward) == list(BACKWARD.tensors)
    for gradient in ("dq", "dk", "dv", "dout"):
        assert backward[gradient] == backward[gradient.removeprefix("d")]


def test_a_causal_problem_is_a_right_window_of_zero():
    assert problem_keywords(PROBLEM) == {"scale": 0.25, "window_left": 4, "window_right": 0, "top_left": False}
    assert problem_keywords(parse_problem("b1 h1 q2 k3 d4 fp16 window=inf:1 top-left scale=3.0")) == {
        "scale": 3.0, "window_left": None, "window_right": 1, "top_left": True,
    }  # fmt: skip


def test_tunables_are_the_keywords_that_describe_no_problem():
    def launches(q, k, *, scale, window_left, window_right, top_left, block_m, num_warps):
        raise NotImplementedError

    assert tunables(launches) == ("block_m", "num_warps")
