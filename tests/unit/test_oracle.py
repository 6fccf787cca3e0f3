"""The two references against each other, against automatic differentiation, finite differences and hand-made cases."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from harness import bounds, inputs, loops, oracle, paging
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
        "b2 h4/2 q5 k7 d3 fp32 softcap=1.5",
        "b2 h4/2 q7 k5 d3 fp32 alibi causal",
        "b2 h2/1 q7 k5 d3 fp32 alibi top-left window=3:2",
        "b2 h4/2 q5 k7 d3 fp32 bias=bhqk causal",
        "b2 h4/2 q5 k7 d3 fp32 bias=hk softcap=2.0",
        "b2 h2/1 q5 k7 d3 fp32 bias=q",
        "b2 h2/1 q5 k7 d3 fp32 bias=1",
        "b2 h4/2 q5 k7 d3 fp32 sinks causal",
        "b2 h3/1 q7 k4 d3 fp32 sinks causal lse-grad",
        "b2 h4/2 q5 k7 d3 fp32 dropout=0.3 sinks",
        "b2 h2/1 q9 k9 d3 fp32 prefix causal",
        "b2 h2/1 q9 k7 d3 fp32 chunk=3",
        "b2 h2/1 q7 k9 d3 fp32 chunk=4 causal top-left",
        "b2 h2/1 q9 k11 d3 fp32 documents window=4:1",
        "b2 h2/1 q9 k11 d3 fp32 mask=bk",
        "b2 h2/1 q9 k11 d3 fp32 mask=bhqk causal lse-grad",
        "b1 h2/1 q13 k17 d3 fp32 packed=4 causal",
        "b1 h2/1 q17 k13 d3 fp32 packed=3 window=3:1 top-left alibi sinks lse-grad",
        "b1 h2/1 q17 k13 d3 fp32 packed=2 chunk=3 prefix documents dropout=0.2 softcap=2.0",
        "b2 h4/2 q9 k8 d3 fp32 softcap=1.0 alibi bias=hqk sinks dropout=0.5 prefix chunk=5 documents mask=qk lse-grad",
    )
]


# Those have no backward pass.
PAGED = [
    parse_problem(text)
    for text in (
        "b3 h4/2 q2 k17 d3 fp32 causal paged=4",
        "b3 h2/1 q5 k9 d3/4 fp32 window=2:1 paged=1",
        "b2 h2 q4 k11 d3 fp32 causal top-left paged=16 window=3",
        "b2 h2/1 q3 k0 d3 fp32 paged=2",
        "b4 h2/1 q3 k13 d3 fp32 paged=3 softcap=1.0 alibi bias=hqk sinks dropout=0.5 prefix chunk=5 documents mask=bk causal",
    )
]


# Nor have those.
EIGHT_BITS = [
    parse_problem(text)
    for text in (
        "b2 h4/2 q5 k7 d3 fp8e4m3 causal",
        "b1 h6/3 q7 k5 d4/3 fp8e5m2 softcap=1.5 sinks dropout=0.3",
        "b1 h4/2 q13 k17 d3 fp8e4m3 packed=4 causal alibi",
    )
]


def listed(tensors):
    return {name: tensor.double().tolist() for name, tensor in tensors.items()}


def allowed(problem, tensors, name):
    """How far two ways to compute an output in fp64 may be apart, elementwise: what both may round, in the worst case.

    The contract of fp64 counts every rounding twice, once for each of them. In its terms: no constant is fp32; the scale is
    multiplied into q, one more rounding of each product; weights are divided by a sum, as in a `chained` pass; delta is
    taken from out or from the weights.
    """
    contract = bounds.contract_for("fp64", chained=True, key_block=max(problem.kv_len, 1))
    contract = replace(contract, constant=0.0, product=2.0**-52, summed_delta=True)
    expect = bounds.expect_forward if name in ("out", "lse") else bounds.expect_backward
    return expect(problem, tensors, contract, structured=True).bounds[name]


def assert_same(found, wanted, bound):
    wanted = wanted.reshape(found.shape)
    error = (found - wanted).abs().masked_fill(found == wanted, 0.0)
    assert (error <= bound).all(), (error / bound).nan_to_num().max()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_loops_over_single_elements_agree(problem):
    tensors = inputs.draw(problem, seed=1)
    for name, loop in loops.loop_forward(problem, listed(tensors)).items():
        bound = allowed(problem, tensors, name)
        assert_same(oracle.forward(problem, tensors)[name], torch.tensor(loop, dtype=torch.float64), bound)
    gradients = loops.loop_backward(problem, listed(tensors))
    assert list(gradients) == list(oracle.gradient_names(problem))
    for name, loop in gradients.items():
        bound = allowed(problem, tensors, name)
        assert_same(oracle.backward(problem, tensors)[name], torch.tensor(loop, dtype=torch.float64), bound)


@pytest.mark.parametrize("problem", PAGED, ids=str)
def test_loops_and_the_oracle_find_the_same_rows_in_pages(problem):
    for seed in range(3):
        tensors = inputs.draw(problem, seed=seed)
        for name, loop in loops.loop_forward(problem, listed(tensors)).items():
            found = oracle.forward(problem, tensors)[name]
            assert_same(found, torch.tensor(loop, dtype=torch.float64), allowed(problem, tensors, name))


@pytest.mark.parametrize("problem", EIGHT_BITS, ids=str)
def test_loops_and_the_oracle_multiply_with_the_same_scales(problem):
    for seed in range(3):
        tensors = inputs.draw(problem, seed=seed)
        for name, loop in loops.loop_forward(problem, listed(tensors)).items():
            found = oracle.forward(problem, tensors)[name]
            assert_same(found, torch.tensor(loop, dtype=torch.float64), allowed(problem, tensors, name))


def test_a_scale_multiplies_numbers_of_its_own_head():
    problem = parse_problem("b2 h4/2 q5 k7 d3 fp8e4m3")
    tensors = inputs.draw(problem, seed=1)
    moved = {**tensors, "v_descale": tensors["v_descale"].clone(), "q_descale": tensors["q_descale"].clone()}
    moved["v_descale"][1, 0] *= 4
    found, other = oracle.forward(problem, tensors), oracle.forward(problem, moved)
    assert torch.equal(other["out"][1, :2], 4 * found["out"][1, :2])
    moved["q_descale"][0, 1] += 1
    other = oracle.forward(problem, moved)
    assert torch.equal(other["lse"][1], found["lse"][1]) and torch.equal(other["lse"][0, :2], found["lse"][0, :2])
    assert (other["lse"][0, 2:] != found["lse"][0, 2:]).all()


def test_a_sequence_in_pages_is_the_same_sequence_alone():
    problem = PAGED[0]
    tensors = inputs.draw(problem, seed=5)
    out = oracle.forward(problem, tensors)["out"]
    dense = paging.dense(problem, tensors)
    for sequence, length in enumerate(tensors["kv_lengths"].tolist()):
        alone = {name: dense[name][sequence : sequence + 1] for name in ("q", "k", "v")}
        alone |= {name: alone[name][:, :, :length] for name in ("k", "v")}
        one = problem.replace(paged=None, batch=1, kv_len=length)
        assert_same(out[sequence : sequence + 1], oracle.forward(one, alone)["out"], allowed(one, alone, "out"))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_visible_pairs_are_those_the_problem_counts(problem):
    if problem.packed is None:
        mask = oracle.visible_keys(problem, slice(None))
        assert int(mask.sum()) == problem.visible_pairs


def differentiable(problem, tensors):
    """The loss sum out dout + sum lse dlse of attention in plain torch; rows without keys are 0 and have no gradient."""
    shape = (problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
    keys, values = (tensors[name].repeat_interleave(problem.group, 1) for name in ("k", "v"))
    mask = torch.stack([
        oracle.visible_pairs(problem, tensors, slice(first, first + problem.q_heads), slice(0, problem.q_len)).expand(shape[1:])
        for first in range(0, problem.batch * problem.q_heads, problem.q_heads)
    ])  # fmt: skip
    scores = problem.softmax_scale * tensors["q"] @ keys.mT
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.alibi:
        at = oracle.positions(problem, tensors, slice(0, 1), slice(0, problem.q_len))
        distance = at.key - at.diagonal[0, :, None]
        scores = scores - tensors["slopes"][:, :, None, None] * distance.abs()
    if problem.bias is not None:
        scores = scores + tensors["bias"]
    sink = torch.full((problem.q_heads,), -1e300, dtype=torch.float64)
    sink = tensors["sinks"] if problem.sinks else sink
    scores = torch.cat([scores.masked_fill(~mask, -1e300), sink[:, None, None].expand(*shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1)[..., :-1] * mask
    if problem.dropout:
        every = slice(0, problem.batch * problem.q_heads)
        weights = weights * oracle.dropout_kept(problem, every, slice(0, problem.q_len)).view(shape)
    loss = ((weights @ values) * tensors["dout"]).sum()
    if problem.lse_grad:
        seeing = mask.any(-1) | problem.sinks
        loss = loss + (torch.logsumexp(scores, -1) * tensors["dlse"] * seeing).sum()
    return loss


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.kv_len and p.batch], ids=str)
def test_backward_is_the_derivative_that_autograd_finds(problem):
    tensors = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.draw(problem, seed=2).items()
    }
    names = [name[1:] for name in oracle.gradient_names(problem)]
    leaves = [tensors[name].requires_grad_() for name in names]
    gradients = torch.autograd.grad(differentiable(problem, tensors), leaves)
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    for (name, found), wanted in zip(oracle.backward(problem, detached).items(), gradients, strict=True):
        assert_same(found, wanted, allowed(problem, detached, name))


def test_the_allowed_difference_is_small_and_a_wrong_reference_exceeds_it():
    problem = PROBLEMS[0]
    tensors = inputs.draw(problem, seed=1)
    for name, value in (oracle.forward(problem, tensors) | oracle.backward(problem, tensors)).items():
        bound = allowed(problem, tensors, name)
        finite = value.isfinite()
        assert bound.max() < 2.0**-42  # some hundred roundings of numbers of order one
        with pytest.raises(AssertionError):
            assert_same((value * (1 + 2.0**-35))[finite], value[finite], bound[finite])


# Where the two errors of a central difference, of the order of step^2 and of 2^-53 / step, are alike.
STEP = 2.0**-17


PLAIN = [p for p in PROBLEMS if p.kv_len and p.q_len and p.batch and not p.variants]


@pytest.mark.parametrize("problem", PLAIN, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_backward_is_what_central_differences_show(problem, name):
    """Of the loss L = sum out dout, for every single element of q, k and v.

    A central difference of step h is off by at most h^2 / 6 times the largest third derivative of L, and by the error of L
    over h. Along one element of q or k the scores change by a_j, at most scale max|k| or scale max|q|, and the third
    derivative of a softmax mean of v is a fourth joint cumulant, at most 4 (2 max|a|)^3 (2 max|v|). Along v, L is linear.
    """
    tensors = {key: value.double() for key, value in inputs.draw(problem, seed=3).items()}
    largest = {key: float(value.abs().max()) for key, value in tensors.items()}
    change = abs(problem.softmax_scale) * {"q": largest["k"], "k": largest["q"], "v": 0.0}[name]
    weight = float(tensors["dout"].abs().sum())
    truncated = STEP**2 / 6 * 4 * (2 * change) ** 3 * 2 * largest["v"] * weight
    rounded = float((allowed(problem, tensors, "out") * tensors["dout"].abs()).sum()) / STEP
    slopes = oracle.backward(problem, tensors)[f"d{name}"]
    moved = tensors[name]
    for index in torch.cartesian_prod(*(torch.arange(size) for size in moved.shape)).tolist():
        place, was = tuple(index), float(moved[tuple(index)])
        losses = []
        for step in (STEP, -STEP):
            moved[place] = was + step
            losses.append(float((oracle.forward(problem, tensors)["out"] * tensors["dout"]).sum()))
        moved[place] = was
        assert abs((losses[0] - losses[1]) / (2 * STEP) - float(slopes[place])) <= truncated + rounded, place
    # Which is far less than the slopes are, so that a wrong one would have been seen.
    assert truncated + rounded < 2.0**-12 * float(slopes.abs().max())


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
        assert_same(pieces, whole, allowed(problem, tensors, "out").flatten(0, 1))


def test_scores_beyond_the_range_of_exp_are_exact_too():
    problem = parse_problem("b1 h1 q2 k3 d2 fp32 scale=200000.0")
    tensors = inputs.draw(problem, seed=6)
    out, lse = oracle.forward(problem, tensors).values()
    best = (200000 * tensors["q"].double() @ tensors["k"].double().mT).amax(-1)
    assert out.isfinite().all()
    assert_same(lse, best, allowed(problem, tensors, "lse"))


def test_the_oracle_needs_no_kernel():
    code = "import sys, harness.bounds; sys.exit(any(m.split('.')[0] in ('triton', 'kernels') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
