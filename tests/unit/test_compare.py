"""What passes, what fails, and what cannot be told; and the bounds against figures worked out by hand."""

import math
import subprocess
import sys

import pytest
import torch

from harness import bounds, compare, inputs, oracle
from harness.bounds import Expectation
from harness.compare import OutputCheck, Verdict
from harness.errors import BugError
from harness.problem import parse_problem

HALF = 65504.0


def expectation(truth, bound):
    truth = torch.tensor(truth, dtype=torch.float64)
    return Expectation(truth={"out": truth}, bounds={"out": torch.full_like(truth, bound)}, largest=HALF)


def check(found, truth, bound, dtype=torch.float32):
    checks = compare.judge({"out": torch.tensor(found, dtype=dtype)}, expectation(truth, bound), case="c")
    return checks[0]


def test_the_worst_element_is_reported_with_its_index_error_and_bound():
    found = check([[1.0, 2.5], [3.0, 4.25]], [[1.0, 2.0], [3.0, 4.0]], 0.25)
    assert (found.index, found.error, found.bound, found.ratio, found.elements) == ((0, 1), 0.5, 0.25, 2.0, 4)
    assert compare.sentence(found) == "out[0, 1] of `c` is off by 0.5, 2 times its bound of 0.25"
    assert compare.status_of([found]) == "wrong"


def test_an_error_of_the_bound_passes_and_the_next_larger_one_does_not():
    assert compare.status_of([check([1.25], [1.0], 0.25)]) == "passed"
    assert compare.status_of([check([math.nextafter(1.25, 2)], [1.0], 0.25, torch.float64)]) == "wrong"


@pytest.mark.parametrize("truth", [0.0, math.inf, -math.inf])
def test_nan_never_passes(truth):
    found = check([0.0, math.nan], [0.0, truth], 1e300)
    assert math.isnan(found.ratio) and "is NaN" in compare.sentence(found)
    assert compare.status_of([found]) == "wrong"


@pytest.mark.parametrize(
    ("found", "truth", "status"),
    [
        (-math.inf, -math.inf, "passed"),
        (math.inf, -math.inf, "wrong"),
        (-1e30, -math.inf, "wrong"),
        (-math.inf, -1e30, "wrong"),
        (math.inf, 3.0, "wrong"),
    ],
)
def test_infinities_match_exactly(found, truth, status):
    assert compare.status_of([check([0.0, found], [0.0, truth], 1.0)]) == status


def test_beyond_the_largest_number_of_the_output_its_infinity_is_right():
    assert check([math.inf], [65519.0], 20.0, torch.float16).ratio == 0
    assert check([-math.inf], [65519.0], 20.0, torch.float16).ratio == math.inf
    assert check([math.inf], [65000.0], 20.0, torch.float16).ratio == math.inf


def test_a_bound_of_zero_asks_for_the_same_number():
    assert compare.status_of([check([0.5, -0.0], [0.5, 0.0], 0.0)]) == "passed"
    found = check([0.5, 0.25], [0.5, 0.0], 0.0)
    assert found.ratio == math.inf and "must be exact" in compare.sentence(found)


@pytest.mark.parametrize("bound", [math.inf, math.nan, -1.0])
def test_a_bound_that_says_nothing_makes_no_pass(bound):
    found = check([1.0], [1.0], bound)
    assert compare.status_of([found]) == "unknown" and "cannot be judged" in compare.sentence(found)
    assert compare.status_of([found, check([9.0], [1.0], 1.0)]) == "wrong"


def test_nothing_compared_is_nothing_passed():
    assert compare.judge({"out": torch.zeros(0, 3)}, expectation(torch.zeros(0, 3).tolist(), 1.0), case="c") == ()
    assert compare.status_of([]) == "unknown"
    with pytest.raises(ValueError, match="compared nothing"):
        Verdict(status="passed", where="device", oracle="", cases=("c",), seed=0, checks=())


def test_a_passing_verdict_cannot_hold_a_failed_check():
    values = {"status": "passed", "where": "device", "oracle": "", "cases": ("c",), "seed": 0}
    good = check([1.0], [1.0], 1.0)
    assert Verdict(**values, checks=(good,)).passed
    for ratio, elements in ((math.nan, 1), (1.5, 1), (0.0, 0)):
        bad = OutputCheck(output="o", case="c", ratio=ratio, error=0, bound=1, index=(), elements=elements)
        with pytest.raises(ValueError, match="failed or empty"):
            Verdict(**values, checks=(good, bad))


def test_a_tensor_is_not_compared_with_itself():
    expected = expectation([1.0, 2.0], 1.0)
    for alias in (expected.truth["out"], expected.truth["out"][:], expected.bounds["out"]):
        with pytest.raises(BugError, match="with itself"):
            compare.judge({"out": alias}, expected, case="c")


def test_other_names_and_shapes_are_bugs():
    with pytest.raises(BugError, match="only one `lse`"):
        compare.judge({"out": torch.zeros(1), "lse": torch.zeros(1)}, expectation([1.0], 1.0), case="c")
    with pytest.raises(BugError, match="shape"):
        compare.judge({"out": torch.zeros(2)}, expectation([1.0], 1.0), case="c")


def test_the_worst_check_is_nan_before_infinite_before_large():
    ranked = [check([value], [0.0], 1.0) for value in (0.5, 7.0, math.inf, math.nan)]
    for last in range(1, 5):
        assert compare.worst(ranked[:last]) is ranked[last - 1]
    assert math.isnan(compare.worst(list(reversed(ranked))).ratio)


def test_importing_verdicts_does_not_import_torch():
    code = "import sys, harness.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bounds
# ---------------------------------------------------------------------------------------------------------------------


def forward_bounds(text, recipe="normal", **changes):
    problem = parse_problem(text)
    structured = changes.pop("structured", False)
    contract = bounds.contract_for(problem.dtype, **changes)
    tensors = inputs.draw(problem, seed=1, recipe=recipe)
    return bounds.expect_forward(problem, tensors, contract, structured=structured), tensors


def test_a_single_key_leaves_the_rounding_of_one_weight_and_of_the_result():
    """With one key P is 1 and out is v: one rounding of P, one of out; the rest is fp32 and far smaller."""
    expected, tensors = forward_bounds("b1 h1 q1 k1 d16 fp16")
    relative = expected.bounds["out"] / tensors["v"].double().abs()
    assert 2 * 2.0**-11 < relative.max() < 2.25 * 2.0**-11


def test_bounds_do_not_depend_on_what_a_row_cannot_see():
    problem = parse_problem("b1 h2 s12 d8 fp16 causal bwd")
    tensors = inputs.draw(problem, seed=1)
    contract = bounds.contract_for("fp16")
    loud = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("k", "v"):
        loud[name][:, :, 8:] *= 50
    for expect in (bounds.expect_forward, bounds.expect_backward):
        quiet, other = (expect(problem, each, contract, structured=False) for each in (tensors, loud))
        for name in set(quiet.bounds) & {"out", "lse", "dq"}:
            assert torch.equal(quiet.bounds[name][:, :, :8], other.bounds[name][:, :, :8])


def test_worst_case_bounds_are_wider_and_coarser_contracts_too():
    text = "b1 h2 s200 d64 fp32"
    usual, _ = forward_bounds(text)
    for changes in ({"structured": True}, {"fp32_products": "tf32"}, {"key_block": 1}):
        wider, _ = forward_bounds(text, **changes)
        assert all((wider.bounds[name] > usual.bounds[name]).all() for name in ("out", "lse"))


def test_an_error_of_the_forward_pass_widens_the_gradients_of_a_chain():
    problem = parse_problem("b1 h2 s40 d16 fp16 bwd")
    tensors = inputs.draw(problem, seed=1)
    alone, chained = (
        bounds.expect_backward(problem, tensors, bounds.contract_for("fp16", chained=chain), structured=False).bounds
        for chain in (False, True)
    )
    assert all((chained[name] >= alone[name]).all() for name in alone)
    assert all((chained[name] > alone[name]).any() for name in alone)


def test_the_truth_is_that_of_the_oracle():
    problem = parse_problem("b2 h4/2 q9 k14 d8/6 bf16 causal window=5 bwd")
    tensors = inputs.draw(problem, seed=2)
    contract = bounds.contract_for("bf16")
    pairs = (
        (bounds.expect_forward(problem, tensors, contract, structured=False), oracle.forward(problem, tensors)),
        (bounds.expect_backward(problem, tensors, contract, structured=False), oracle.backward(problem, tensors)),
    )
    for expected, truth in pairs:
        assert expected.truth.keys() == truth.keys() == expected.bounds.keys()
        for name, wanted in truth.items():
            assert torch.equal(expected.truth[name], wanted)
            assert expected.bounds[name].shape == wanted.shape and expected.bounds[name].isfinite().all()
            assert (expected.bounds[name] > 0).all() or name == "lse"


def test_dead_keys_and_empty_rows_have_no_room_for_errors():
    problem = parse_problem("b1 h1 q3 k6 d4 fp16 causal top-left bwd")
    tensors = inputs.draw(problem, seed=3)
    expected = bounds.expect_backward(problem, tensors, bounds.contract_for("fp16"), structured=False)
    for name in ("dk", "dv"):
        assert not expected.truth[name][:, :, 3:].any()
        assert (expected.bounds[name][:, :, 3:] < 2.0**-24).all()  # below the smallest fp16 number


def test_exact_expectations_round_the_truth_once():
    expected, _ = forward_bounds("b1 h1 q4 k7 d3 fp16", recipe="counting")
    exact = expected.exact("out", torch.float16)
    assert torch.equal(exact.truth["out"], expected.truth["out"].half().double())
    assert not exact.bounds["out"].any() and torch.equal(exact.bounds["lse"], expected.bounds["lse"])
