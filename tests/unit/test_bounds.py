"""The pieces of the bounds: the algebra of noise, the counts, the measured figures, and the contracts of narrow formats."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from harness import bounds, forward_noise, inputs, noise, oracle
from harness.noise import Noise, several, single, steady
from harness.problem import parse_problem


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Algebra
# ---------------------------------------------------------------------------------------------------------------------


def test_independent_roundings_obey_the_smaller_of_the_worst_case_and_hoeffdings_inequality():
    few, many = several(9, torch.tensor(2.0)), several(10000, torch.tensor(2.0))
    assert few.bound(8.0) == 18 and many.bound(8.0) == 8 * 2 * 100
    assert many.bound(math.inf) == 20000
    both = many + steady(torch.tensor(5.0)) + single(torch.tensor(0.0))
    assert both.bound(8.0) == 1605 and both.scaled(torch.tensor(-3.0)).bound(8.0) == 3 * 1605


def test_no_partial_sum_of_any_order_exceeds_the_largest():
    for seed in range(20):
        terms = drawn(6, seed=seed)
        largest = noise.largest_partial(terms.abs().sum(), terms.sum())
        reached = max(
            float(terms[list(chosen)].sum().abs())
            for size in range(1, 7)
            for chosen in itertools.combinations(range(6), size)
        )
        assert reached == pytest.approx(float(largest), rel=1e-14)  # which some order does reach


def test_a_mean_is_as_wrong_as_its_weights_except_for_what_they_share():
    scores, right = drawn(2, 3, 5), drawn(2, 5, 4, seed=1)
    weights = scores.softmax(-1)
    mean = weights @ right
    spread = noise.spread(weights, right, mean)
    apart = right.unsqueeze(1) - mean.unsqueeze(2)
    # Either way of summing n products of squares rounds each term at most n + 6 times, and the mean in it n times.
    sizes = (right.abs().unsqueeze(1) + mean.abs().unsqueeze(2)).square()
    rounding = 4 * (right.shape[1] + 6) * 2.0**-53
    exact = (weights.unsqueeze(-1) * apart.square()).sum(2)
    assert ((spread.square() - exact).abs() <= rounding * (weights.unsqueeze(-1) * sizes).sum(2)).all()
    errors = drawn(2, 3, 5, seed=2).abs()
    found = single(errors).averaged(weights, right, mean, spread)
    terms = (weights * errors).unsqueeze(-1) * apart
    allowed = rounding * ((weights * errors).square().unsqueeze(-1) * sizes).sum(2)
    assert ((found.squares - terms.square().sum(2)).abs() <= allowed).all()
    assert (found.worst >= terms.abs().sum(2)).all()
    assert (found.worst <= 3 * terms.abs().sum(2)).all()  # not much more
    # An error that is the same everywhere is at most the spread, and none at all of a single value.
    shared = steady(torch.ones_like(weights)).averaged(weights, right, mean, spread)
    assert (shared.steady <= spread * (1 + 1e-12)).all()
    one, value = torch.ones(1, 1, 1, dtype=torch.float64), right[:1, :1]
    alone = steady(one).averaged(one, value, value, noise.spread(one, value, value))
    assert not alone.steady.any()


def test_the_exponential_of_a_large_error_is_larger_than_the_first_order_says():
    factor = noise.growth(Noise(steady=torch.tensor(0.5), worst=torch.tensor(0.5), squares=torch.tensor(0.25)))
    assert float(factor) == pytest.approx(math.e - 1)
    assert float(noise.growth(steady(torch.tensor(0.0)))) == pytest.approx(1.0)


@pytest.mark.parametrize("notation", ["q9 k40", "q40 k40 causal", "q7 k33 window=5:9", "q5 k64 window=20:3 top-left"])
@pytest.mark.parametrize("key_block", [1, 3, 16, 64])
def test_a_row_is_rescaled_at_most_once_for_each_block_that_it_sees_after_the_first(notation, key_block):
    problem = parse_problem(f"b1 h1 {notation} d8 fp32")
    mask = oracle.visible_keys(problem, slice(None))
    found = forward_noise.rescalings(mask, key_block)
    for row, most in zip(mask, found.tolist(), strict=True):
        for block in (key_block, 2 * key_block):
            touched = sum(bool(part.any()) for part in row.split(block))
            assert max(touched - 1, 0) <= most
        assert most <= max(int(row.sum()) - 1, 0)


def test_nothing_is_rescaled_in_one_block_nor_without_keys():
    assert not forward_noise.rescalings(torch.ones(3, 16, dtype=torch.bool), 16).any()
    assert not forward_noise.rescalings(torch.zeros(3, 90, dtype=torch.bool), 16).any()
    assert not forward_noise.rescalings(torch.zeros(3, 0, dtype=torch.bool), 16).any()


def test_a_sum_of_one_product_has_no_addition_and_narrow_factors_no_rounding():
    one = torch.tensor([3.0], dtype=torch.float64)
    for dtype, rounds in (("fp16", False), ("bf16", False), ("fp32", True)):
        terms = noise.Terms(bounds.contract_for(dtype), math.inf)
        assert bool(terms.value(terms.sum(1, one, one)) > 0) == rounds
        unit = terms.contract.accumulate
        two = terms.value(terms.sum(2, one, one, matrix=False))
        assert float(two) == unit * 3 * (2 if rounds else 1)


# ---------------------------------------------------------------------------------------------------------------------
# Measured figures
# ---------------------------------------------------------------------------------------------------------------------


def binade(exponent: int, step: int = 1) -> np.ndarray:
    """Every `step`-th fp32 number from 2^exponent on, below the next power of two."""
    return np.arange(1 << 23, 1 << 24, step, dtype=np.uint32).astype(np.float32) * np.float32(2.0 ** (exponent - 23))


def test_exp2_and_log2_of_the_interpreter_are_as_exact_as_its_contract_says():
    """Every mantissa. exp2 depends on the fraction of its argument only, of which numbers beyond 1 have multiples of 2^-23:
    all of them lie in [1, 2). Smaller arguments have finer ones; below 1/4 every 61st is taken."""
    contract = bounds.contract_for("fp32", where="interpreter")
    for exponent in range(-24, 1):
        argument = -binade(exponent, 1 if exponent > -3 else 61)
        exact = np.exp2(argument.astype(np.float64))
        assert np.max(np.abs(np.exp2(argument) - exact) / exact) <= contract.exponential
    for exponent in range(12):
        argument = binade(exponent, 1 if exponent < 2 else 61)
        exact = np.log2(argument.astype(np.float64))
        assert np.max(np.abs(np.log2(argument) - exact) / np.maximum(exact, 1.0)) <= contract.logarithm
    assert np.exp2(np.float32(0.0)) == 1 and np.exp2(np.float32(-np.inf)) == 0 and np.log2(np.float32(1.0)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Contracts
# ---------------------------------------------------------------------------------------------------------------------


def expected(notation: str, **changes):
    problem = parse_problem(notation)
    contract = bounds.contract_for(changes.pop("dtype", problem.dtype), **changes)
    values = inputs.draw(problem, seed=1)
    expect = bounds.expect_forward if problem.pass_ == "fwd" else bounds.expect_backward
    return expect(problem, values, contract, structured=False).bounds


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2"])
def test_the_bounds_of_the_interpreter_lie_within_those_of_a_device(pass_, dtype):
    notation = f"b1 h2 s40 d16 fp32 {pass_}"
    device, interpreter = (expected(notation, dtype=dtype, where=where) for where in ("device", "interpreter"))
    assert all((interpreter[name] <= device[name]).all() for name in device)
    assert all((interpreter[name] < device[name]).any() for name in device)


def test_bounds_worked_out_by_hand():
    """Ten keys with scores 0 and values 1, worst case, in units of 2^-24: exp2, log2 and a division are off by 4, z has 9
    additions, the accumulator 9 and the rounding of its products, out is rounded once, lse in a sum, a product and ln(2)."""
    problem = parse_problem("b1 h1 q1 k10 d8 fp32")
    values = {"q": torch.zeros(1, 1, 1, 8), "k": torch.zeros(1, 1, 10, 8), "v": torch.ones(1, 1, 10, 8)}
    found = bounds.expect_forward(problem, values, bounds.contract_for("fp32"), structured=True).bounds
    lse = math.log(10.0)
    assert float(found["lse"]) == pytest.approx(1.05 * (4 + 9 + 4 * lse + 3 * lse) * 2.0**-24, rel=1e-5)
    assert found["out"].flatten().tolist() == pytest.approx([1.05 * (9 + 1 + 9 + 4 + 1) * 2.0**-24] * 8, rel=1e-5)
    # Five blocks of two: four rescalings, each a product in z, and one in the accumulator; an exp2 in lse, which equal
    # values do not show in out.
    found = bounds.expect_forward(problem, values, bounds.contract_for("fp32", key_block=2), structured=True).bounds
    assert forward_noise.rescalings(torch.ones(1, 10, dtype=torch.bool), 2).item() == 4
    assert float(found["lse"]) == pytest.approx(1.05 * (4 + 13 + 16 + 7 * lse) * 2.0**-24, rel=1e-5)
    assert found["out"].flatten().tolist() == pytest.approx([1.05 * (13 + 1 + 13 + 4 + 1) * 2.0**-24] * 8, rel=1e-5)


def test_narrower_formats_have_wider_bounds():
    chain = [expected("b1 h2 s40 d16 fp32", dtype=dtype)["out"] for dtype in ("fp32", "fp16", "fp8e4m3", "fp8e5m2")]
    assert all((wide > narrow).all() for narrow, wide in itertools.pairwise(chain))


@pytest.mark.parametrize("dtype", ["fp8e4m3", "fp8e5m2"])
def test_the_figures_of_8_bit_formats_are_those_of_torch(dtype):
    kind = {"fp8e4m3": torch.float8_e4m3fn, "fp8e5m2": torch.float8_e5m2}[dtype]
    contract = bounds.contract_for(dtype)
    values = torch.rand(100000, generator=torch.Generator().manual_seed(0)).double()
    values = torch.cat([values * 2.0**power for power in (0, -3, -8, -12)])
    error = (values.to(kind).double() - values).abs()
    assert (error <= torch.maximum(contract.operand * values, torch.tensor(contract.underflow))).all()
    below = 2.0 ** values.clamp(min=1e-9).log2().floor()
    assert (error / below)[values > 0.1].max() > 0.99 * contract.operand
    assert error[values < 2 * contract.underflow].max() > 0.9 * contract.underflow
    # The bound of what is lost by a cast may as well be the number itself.
    assert (error[values < contract.underflow] <= values[values < contract.underflow]).all()


def test_a_contract_can_be_that_of_wider_outputs_only_if_inputs_have_8_bits():
    assert bounds.contract_for("fp8e4m3", stored="fp32").storage == 2.0**-24
    assert bounds.contract_for("fp16", stored="fp32") == bounds.contract_for("fp16")
    with pytest.raises(KeyError):
        bounds.contract_for("fp4")


def test_hoppers_narrow_sums_widen_what_passes_through_matrix_units_only():
    coarse = bounds.contract_for("fp8e4m3")
    fine = replace(coarse, matrix_factor=1.0)
    one = torch.ones(1, dtype=torch.float64)
    for matrix in (True, False):
        wide, narrow = (
            noise.Terms(contract, math.inf).sum(64, one, one, matrix=matrix).worst for contract in (coarse, fine)
        )
        assert bool(wide > 100 * narrow) == matrix
