"""The two references against each other, against automatic differentiation, finite differences and hand-made cases."""

import math
import subprocess
import sys

import pytest
import torch

from harness import inputs, oracle
from harness.problem import parse_problem

PROBLEMS = [
    parse_problem(text + " bwd")
    for text in (
        "b2 h4/2 q5 k7 d3 fp32 causal",
        "b1 h2 q7 k5 d4/3 fp32 causal",
        "b1 h3/1 q6 k9 d2 fp32 causal top-left",
        "b1 h2/1 q8 k8 d3 fp32 window=2:1",
        "b1 h2 q4 k9 d3 fp32 causal window=2 scale=0.7",
        "b1 h2 q9 k4 d3 fp32 window=inf:2 top-left",
        "b1 h2 q6 k6 d3 fp32 window=1:inf scale=-1.5",
        "b1 h2 q3 k0 d3 fp32",
        "b1 h2 q0 k3 d3 fp32 causal",
        "b0 h2 s3 d3 fp32",
    )
]


def listed(tensors, *names):
    return [tensors[name].double().tolist() for name in names]


def assert_same(found, wanted):
    """Equal up to the rounding of fp64 sums of a few dozen terms of order one."""
    torch.testing.assert_close(found, wanted.reshape(found.shape), rtol=0, atol=64 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_loops_over_single_elements_agree(problem):
    tensors = inputs.draw(problem, seed=1)
    for name, loop in zip(("out", "lse"), oracle.loop_forward(problem, *listed(tensors, "q", "k", "v")), strict=True):
        assert_same(oracle.forward(problem, tensors)[name], torch.tensor(loop, dtype=torch.float64))
    loops = oracle.loop_backward(problem, *listed(tensors, "q", "k", "v", "dout"))
    for name, loop in zip(("dq", "dk", "dv"), loops, strict=True):
        assert_same(oracle.backward(problem, tensors)[name], torch.tensor(loop, dtype=torch.float64))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_visible_pairs_are_those_the_problem_counts(problem):
    mask = oracle.visible_keys(problem, slice(None))
    assert int(mask.sum()) == problem.visible_pairs


def differentiable(problem, q, k, v):
    """Attention in plain torch; rows without keys are 0 and have no gradient."""
    keys, values = (x.repeat_interleave(problem.group, 1) for x in (k, v))
    mask = oracle.visible_keys(problem, slice(None))
    scores = problem.softmax_scale * q @ keys.mT
    weights = torch.softmax(scores.masked_fill(~mask, -1e300), -1) * mask
    return weights @ values


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.kv_len], ids=str)
def test_backward_is_the_derivative_that_autograd_finds(problem):
    tensors = inputs.draw(problem, seed=2)
    leaves = [tensors[name].double().requires_grad_() for name in ("q", "k", "v")]
    gradients = torch.autograd.grad(differentiable(problem, *leaves), leaves, tensors["dout"].double())
    for found, wanted in zip(oracle.backward(problem, tensors).values(), gradients, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_backward_predicts_what_a_small_step_changes(name):
    problem = PROBLEMS[0]
    tensors = {key: value.double() for key, value in inputs.draw(problem, seed=3).items()}
    step = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-5

    def loss(sign):
        return (oracle.forward(problem, tensors | {name: tensors[name] + sign * step})["out"] * tensors["dout"]).sum()

    predicted = (oracle.backward(problem, tensors)[f"d{name}"] * step).sum()
    assert (loss(1) - loss(-1)) / 2 == pytest.approx(float(predicted), rel=1e-7)


def test_rows_without_keys_are_zero_with_infinite_logarithm_and_no_gradient():
    problem = parse_problem("b1 h1 q5 k3 d2 fp32 causal bwd")
    tensors = inputs.draw(problem, seed=4)
    made, slopes = oracle.forward(problem, tensors), oracle.backward(problem, tensors)
    assert made["lse"][0, 0, :2].tolist() == [-math.inf, -math.inf]
    assert not made["out"][0, 0, :2].any() and not slopes["dq"][0, 0, :2].any()
    assert made["out"][0, 0, 2:].all() and made["lse"][0, 0, 2:].isfinite().all()


def test_blocks_of_rows_and_heads_change_nothing():
    problem = parse_problem("b2 h6/3 q11 k7 d3 fp32 causal window=3")
    tensors = inputs.draw(problem, seed=5)
    whole = oracle.forward(problem, tensors)["out"]
    for limit in (1, 20, 100):
        pieces = torch.zeros_like(whole).flatten(0, 1)
        for block in oracle.rows(problem, tensors, limit=limit):
            assert block.scores.numel() <= max(limit, problem.kv_len)
            pieces[block.heads, block.queries] = block.out
        assert_same(pieces, whole)


def test_scores_beyond_the_range_of_exp_are_exact_too():
    problem = parse_problem("b1 h1 q2 k3 d2 fp32 scale=200000.0")
    tensors = inputs.draw(problem, seed=6)
    out, lse = oracle.forward(problem, tensors).values()
    best = (200000 * tensors["q"].double() @ tensors["k"].double().mT).amax(-1)
    assert out.isfinite().all() and lse.sub(best).abs().max() < 1e-9


def test_the_oracle_needs_no_kernel():
    code = "import sys, harness.bounds; sys.exit(any(m.split('.')[0] in ('triton', 'kernels') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
