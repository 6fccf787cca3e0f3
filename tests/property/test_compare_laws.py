"""Laws of the oracle, the bounds and the judge that hold for every problem."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import bounds, compare, inputs, oracle
from harness.bounds import Expectation
from harness.problem import Problem

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
anything = st.floats(allow_nan=True, allow_infinity=True)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def problems(draw) -> Problem:
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    causal = draw(st.booleans())
    window = st.none() | st.integers(0, 9)
    return Problem(
        batch=draw(st.integers(1, 2)),
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=draw(st.integers(1, 12)),
        kv_len=draw(st.integers(0, 12)),
        head_dim=draw(st.integers(1, 9)),
        v_head_dim=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(["fp16", "bf16", "fp32"])),
        causal=causal,
        window_left=draw(window),
        window_right=None if causal else draw(window),
        top_left=draw(st.booleans()),
        pass_="bwd",
    )


def one(truth: float, bound: float) -> Expectation:
    return Expectation(
        truth={"out": torch.tensor([truth], dtype=torch.float64)},
        bounds={"out": torch.tensor([bound], dtype=torch.float64)},
        largest=65504.0,
    )


@few
@given(anything, anything, anything)
def test_a_pass_means_an_error_within_a_finite_bound(found, truth, bound):
    output = torch.tensor([found], dtype=torch.float64)
    status = compare.status_of(compare.judge({"out": output}, one(truth, bound), case="c"))
    within = abs(found - truth) <= bound if math.isfinite(found) and math.isfinite(truth) else found == truth
    assert status != "passed" or (within and math.isfinite(bound))
    if math.isnan(found) and math.isfinite(bound) and bound >= 0:
        assert status == "wrong"


@few
@given(numbers, st.floats(1e-6, 1e3), st.floats(-1, 1))
def test_what_lies_within_the_bound_passes(truth, bound, part):
    output = torch.tensor([truth + 0.999 * part * bound], dtype=torch.float64)
    close = abs(float(output) - truth) <= bound
    assert not close or compare.status_of(compare.judge({"out": output}, one(truth, bound), case="c")) == "passed"


@few
@given(problems(), st.integers(0, 2**32), st.sampled_from(sorted(inputs.RECIPES)))
def test_rounding_the_truth_is_always_within_bounds(problem, seed, recipe):
    """The best that a kernel can do must pass, for every problem and recipe."""
    tensors = inputs.draw(problem, seed=seed, recipe=recipe)
    contract = bounds.contract_for(problem.dtype)
    for expect in (bounds.expect_forward, bounds.expect_backward):
        expected = expect(problem, tensors, contract, structured=inputs.recipe_for(recipe).structured)
        rounded = {
            name: truth.to(torch.float32 if name == "lse" else inputs.DTYPES[problem.dtype])
            for name, truth in expected.truth.items()
        }
        checks = compare.judge(rounded, expected, case=str(problem))
        assert compare.status_of(checks) == ("passed" if checks else "unknown")


@few
@given(problems(), st.integers(0, 2**32))
def test_gradients_obey_eulers_identities(problem, seed):
    """<V, dV> = <O, dO> and <Q, dQ> = <K, dK> in every key head: out is linear in v, scores are bilinear in q and k."""
    tensors = {name: tensor.double() for name, tensor in inputs.draw(problem, seed=seed).items()}
    out, slopes = oracle.forward(problem, tensors)["out"], oracle.backward(problem, tensors)

    def by_key_head(left, right):
        return (left * right).reshape(problem.batch, problem.kv_heads, -1).sum(-1)

    pairs = (("v", "dv", "dout", out), ("q", "dq", "k", slopes["dk"]))
    for name, slope, other, value in pairs:
        left, right = by_key_head(tensors[name], slopes[slope]), by_key_head(tensors[other], value)
        size = by_key_head(tensors[name].abs(), slopes[slope].abs()) + 1
        assert ((left - right).abs() <= 2.0**-40 * size).all()
