"""Names, shapes and keywords of the two operations."""

import inspect

from harness.operation import BACKWARD, FORWARD, lacks, operation_for, problem_keywords, shapes, supported, tunables
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


def test_a_problem_adds_tensors_gradients_and_keywords():
    problem = parse_problem(
        "b2 h6/3 q5 k7 d16 bf16 softcap=2.0 alibi bias=hk sinks dropout=0.5 documents mask=bk lse-grad bwd"
    )
    operation, shape_of = operation_for(problem), shapes(problem)
    assert operation.inputs == (
        *BACKWARD.inputs,
        "slopes",
        "bias",
        "sinks",
        "q_documents",
        "kv_documents",
        "mask",
        "dlse",
    )
    assert operation.outputs == ("dq", "dk", "dv", "dbias", "dsinks")
    assert shape_of["bias"] == shape_of["dbias"] == ((1, 6, 1, 7), "bf16")
    assert shape_of["mask"] == ((2, 1, 1, 7), "bool") and shape_of["dsinks"] == ((6,), "fp32")
    assert shape_of["kv_documents"] == ((2, 7), "int32")
    assert problem_keywords(problem)["softcap"] == 2.0 and problem_keywords(problem)["dropout_seed"]
    assert operation_for(problem.replace(pass_="fwd", lse_grad=False)).outputs == FORWARD.outputs


def test_pages_take_the_place_of_sequences():
    problem = parse_problem("b2 h6/3 q5 k7 d16/8 bf16 paged=3")
    assert operation_for(problem).inputs == (*FORWARD.inputs, "block_table", "kv_lengths")
    assert shapes(problem)["k"] == ((7, 3, 3, 16), "bf16") and shapes(problem)["v"] == ((7, 3, 3, 8), "bf16")
    assert shapes(problem)["block_table"] == ((2, 3), "int32") and shapes(problem)["kv_lengths"] == ((2,), "int32")


def test_a_kernel_is_asked_only_for_what_its_launches_take():
    def launches(q, k, v, out, lse, bias=None, *, scale, window_left, window_right, top_left, softcap=None):
        raise NotImplementedError

    plain = parse_problem("b1 h1 s8 d16 fp16")
    assert lacks(launches, plain) is None
    assert lacks(launches, plain.replace(softcap=1.0, bias="h")) is None
    assert lacks(launches, plain.replace(sinks=True, chunk=4)) == "has no sinks and no chunk"
    assert supported(inspect.signature(launches).parameters, "fwd") == ("softcap", "bias")
    assert supported(inspect.signature(launches).parameters, "bwd") == ("softcap",)


def test_tunables_are_the_keywords_that_describe_no_problem():
    def launches(q, k, *, scale, window_left, window_right, top_left, block_m, num_warps):
        raise NotImplementedError

    assert tunables(launches) == ("block_m", "num_warps")
