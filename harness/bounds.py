"""How far from the exact answer a correct kernel may be: elementwise bounds, derived from what it is allowed to round.

Refuses to compare: it is given inputs, never results of a kernel. Nothing here is fitted; every constant is a unit
roundoff, the documented error of an instruction, an operation count, or the number of deviations of the probabilistic bound.

Theory: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3 (sums); Blanchard, Higham and Higham 2021 (softmax
and log-sum-exp); `harness.noise` (probabilistic sums). First order throughout, with `SLACK` for the rest. Write u for the
unit roundoff of sums, e for that of exp2, P for the weights, O for out, s for the scaled scores, m for their maximum.

Forward. A kernel computes softmax(s + x) for some errors x of the exponents, so
    dO_d = sum_j P_j x_j (V_jd - O_d),   d lse = sum_j P_j x_j.
- x_j of each key: its dot product; u |s_j| (scaling), u |m - s_j| (shifting), e. The same m is subtracted in every weight and
  added to the logarithm, so its own roundings cancel. Nothing is saved at the key that attains m: fused with the scaling,
  s_j - m is the rounding of m there and not 0, so that its weight is rounded like any other.
- Common: the rounding t of the constant scale * log2(e) is x_j = t s_j, hence the signed |sum_j P_j s_j (V_j - O)| u.
- Rescaling by exp2(m_old - m): exactly 1 where the maximum does not grow, exactly 0 in the first block, so at most
  blocks - 1 of them round. An error t of one is x_j = t for the keys S before it. sum_S P_j (V_j - O) is the covariance of V
  with an indicator, whose deviation is at most 1/2: e spread / 2. Shifts of the arguments add up to m - m_j <= m - s_j.
- The normaliser z, relative to itself: n - 1 additions of n positive numbers and one product for each rescaling.
- The accumulator: a sum of n products and one product for each rescaling. No partial sum, in whatever order, exceeds the
  positive or the negative part of the whole sum: (sum |x| + |sum x|) / 2.

Backward. P is made of the lse of its row, so it is off by x_j in each pair, by t s_j as above, and by r_i in all of the row;
with dS = P (dP - delta), and alike for dK and dV,
    error of dQ = sum_j (x_j + t s_j + r_i) dS_j K_j + P_j (y_j - d_i) K_j,
with y_j the error of dP and d_i that of delta. What is common to a row meets a signed sum, which is known.

Where a mask or a score modification is added: the mask enters only through `oracle.Rows.visible`; a change of the score adds
its sensitivity times the old error, and its own rounding, to `_exponent_noise`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness import oracle
from harness.noise import (
    DEVIATIONS,
    SLACK,
    Noise,
    RoundingContract,
    Terms,
    contract_for,
    growth,
    largest_partial,
    several,
    single,
    spread,
    steady,
)
from harness.problem import Problem

__all__ = ["Expectation", "RoundingContract", "contract_for", "expect_backward", "expect_forward"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expectation:
    """By output name, elementwise and in fp64: the exact result, and the largest error that a correct kernel may show.

    `largest` is the largest finite number of the outputs that are stored in the dtype of the inputs.
    """

    truth: Mapping[str, Tensor]
    bounds: Mapping[str, Tensor]
    largest: float

    def exact(self, name: str, dtype: torch.dtype) -> "Expectation":
        """The same, but output `name` must equal the truth rounded to `dtype`, bit for bit but for the sign of zero."""
        truth = self.truth[name].to(dtype).double()
        return replace(self, truth={**self.truth, name: truth}, bounds={**self.bounds, name: torch.zeros_like(truth)})


def expect_forward(
    problem: Problem, tensors: Mapping[str, Tensor], contract: RoundingContract, *, structured: bool
) -> Expectation:
    """Truth and bounds of out and lse, from q, k, v.

    `structured` inputs (constant rows, small integers) may round in one systematic direction, so their bounds are worst
    cases. Otherwise roundings are taken as independent with mean zero, and a sum of them is bounded by Hoeffding's
    inequality at 8 deviations: each such sum of a correct kernel exceeds its bound with probability below 3e-14.
    """
    terms = Terms(contract, math.inf if structured else DEVIATIONS)
    truth, bounds = (oracle.empty_results(problem, ("out", "lse"), device=tensors["q"].device) for _ in range(2))
    for block in oracle.rows(problem, tensors):
        weights = _forward_weights(block, terms)
        out, lse = terms.value(_out_noise(block, weights, terms)), terms.value(_lse_noise(block, weights, terms))
        found = {"out": (block.out, terms.stored(block.out, out)), "lse": (block.lse, SLACK * lse)}
        for name, (value, bound) in found.items():
            truth[name].flatten(0, 1)[block.heads, block.queries] = value
            bounds[name].flatten(0, 1)[block.heads, block.queries] = bound
    return Expectation(truth=truth, bounds=bounds, largest=contract.largest)


def expect_backward(
    problem: Problem, tensors: Mapping[str, Tensor], contract: RoundingContract, *, structured: bool
) -> Expectation:
    """Truth and bounds of dq, dk, dv, from q, k, v, dout; see `expect_forward` for `structured`.

    The truth is the gradient at the exact out and lse. What the kernel loses by recomputing P from a rounded lse, and
    delta from a rounded out, is part of the bound, as `contract.chained` says they were made.
    """
    terms = Terms(contract, math.inf if structured else DEVIATIONS)
    names = ("dq", "dk", "dv")
    truth, bounds = (oracle.empty_results(problem, names, device=tensors["q"].device) for _ in range(2))
    dq, dk, dv = (truth[name].flatten(0, 1) for name in names)
    sums = _KeySums(problem, tensors["q"].device)
    for block in oracle.rows(problem, tensors):
        slope = oracle.slopes(block, tensors["dout"])
        dq[block.heads, block.queries] = block.scale * slope.d_scores @ block.k
        dk.index_add_(0, block.kv, block.scale * slope.d_scores.mT @ block.q)
        dv.index_add_(0, block.kv, block.weights.mT @ slope.dout)
        noise = _slope_noise(block, slope, terms)
        bounds["dq"].flatten(0, 1)[block.heads, block.queries] = _dq_error(block, slope, noise, terms)
        sums.add(block, slope, noise, terms)
    bounds["dk"] = abs(problem.softmax_scale) * sums.error("dk", terms)
    bounds["dv"] = sums.error("dv", terms)
    return Expectation(
        truth=truth, bounds={name: terms.stored(truth[name], bounds[name]) for name in names}, largest=contract.largest
    )


def _signed(values: Tensor) -> Tensor:
    """The values, 0 where infinite: an invisible pair or an empty row has no error."""
    return values.nan_to_num(posinf=0.0, neginf=0.0)


def _finite(values: Tensor) -> Tensor:
    """Their absolute values."""
    return _signed(values).abs()


def _exponent_noise(block: oracle.Rows, shift: Tensor, terms: Terms) -> Noise:
    """Of the logarithm of each weight (n, r, Skv), exp(score - shift): the dot product, scaling, shifting, exp2."""
    unit = terms.contract.accumulate
    scores = _finite(block.scores)
    dots = abs(block.scale) * block.q.abs() @ block.k.abs().mT
    return (
        terms.sum(block.q.shape[-1], dots, scores)
        + steady(terms.contract.constant * scores)
        + single(unit * scores)
        + single(unit * _finite(block.scores - shift.unsqueeze(-1)))
        + single(torch.full_like(scores, terms.contract.exponential))
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ForwardWeights:
    """Of the same rows: `exponent` (n, r, Skv), the noise of the weights' logarithms; `seen` and `rescaled` (r), the number
    of visible keys and of rescalings that can round."""

    exponent: Noise
    seen: Tensor
    rescaled: Tensor


def _forward_weights(block: oracle.Rows, terms: Terms) -> _ForwardWeights:
    rescaled = _rescalings(block.visible, terms.contract.key_block)
    # How far a shift was below the last one: its share of the roundings is common to the keys of a block.
    drift = terms.contract.accumulate * _finite(block.scores - block.maximum.unsqueeze(-1)) * (rescaled > 0)[:, None]
    exponent = _exponent_noise(block, block.maximum, terms) + steady(drift)
    return _ForwardWeights(
        exponent=exponent.scaled(growth(exponent)), seen=block.visible.sum(-1).double(), rescaled=rescaled
    )


def _rescalings(visible: Tensor, key_block: int) -> Tensor:
    """How often the maximum of each row can grow, (r): once less than there are blocks with visible keys, in any order."""
    seen, keys = visible.sum(-1), visible.shape[-1]
    position = torch.arange(keys, device=visible.device).expand_as(visible)
    last = position.masked_fill(~visible, -1).max(-1).values if keys else seen
    first = position.masked_fill(~visible, keys).min(-1).values if keys else seen
    touched = -((first - last) // key_block) + 1
    blocks = torch.minimum(seen, touched).clamp(max=-(-keys // key_block))
    return (blocks - 1).clamp(min=0).double()


def _underflow(block: oracle.Rows, smallest: Tensor) -> Tensor:
    """Of each weight (n, r, Skv), cast while it was at least itself: what is lost is at most the weight, and `smallest`."""
    return torch.minimum(block.weights, smallest.unsqueeze(-1))


def _accumulated(block: oracle.Rows, weights: _ForwardWeights, terms: Terms) -> Noise:
    """Of out (n, r, Dv): what differs from column to column even if the weights are exact, and a scale of v."""
    absolute = block.weights @ block.v.abs()
    largest = largest_partial(absolute, block.out)
    return (
        terms.sum(weights.seen[:, None], absolute, block.out)
        + several(weights.rescaled[:, None], terms.contract.accumulate * largest)
        + single(terms.contract.division * block.out.abs())
        + steady(terms.contract.constant * block.out.abs())
    )


def _normaliser(block: oracle.Rows, weights: _ForwardWeights, terms: Terms) -> Noise:
    """Of the sum of weights (n, r), relative to it, for exact weights."""
    count = (weights.seen - 1).clamp(min=0) + weights.rescaled
    return several(count, torch.full_like(block.lse, terms.contract.accumulate))


def _out_noise(block: oracle.Rows, weights: _ForwardWeights, terms: Terms) -> Noise:
    """Of out (n, r, Dv) before it is stored."""
    contract = terms.contract
    scores = block.weights * _signed(block.scores)
    apart = spread(block.weights, block.v, block.out)
    constant = scores @ block.v - scores.sum(-1, keepdim=True) * block.out
    underflow = _underflow(block, contract.underflow / block.total.clamp(min=1.0))
    return (
        weights.exponent.averaged(block.weights, block.v, block.out, apart)
        + several(weights.rescaled[:, None], contract.exponential / 2 * apart)
        + steady(contract.accumulate * constant.abs())
        + single(contract.operand * block.weights).through(block.v)
        + steady(underflow @ block.v.abs())
        + _accumulated(block, weights, terms)
        + _normaliser(block, weights, terms).columns.scaled(block.out)
    )


def _lse_noise(block: oracle.Rows, weights: _ForwardWeights, terms: Terms) -> Noise:
    """Of lse (n, r): its sum with the maximum rounds, ln(2) does, and their product."""
    contract = terms.contract
    size = _finite(block.lse)
    logarithm = block.total.clamp(min=1.0).log().clamp(min=math.log(2.0))
    constant = (block.weights * _signed(block.scores)).sum(-1)
    return (
        weights.exponent.scaled(block.weights).total()
        + several(weights.rescaled, torch.full_like(size, contract.exponential))
        + _normaliser(block, weights, terms)
        + single(contract.logarithm * logarithm)
        + several(2.0, contract.accumulate * size)
        + steady(contract.accumulate * constant.abs() + (contract.accumulate + contract.constant) * size)
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _SlopeNoise:
    """Of the backward quantities of the same rows: `weights` (n, r, Skv) of P as recomputed and cast, from an exact lse;
    `row` (n, r) of P relative to itself, from lse; `delta` (n, r); `scores` (n, r, Skv) of dS as cast, for an exact lse and
    delta. `size` (n, r, Skv) is what |dS| may be, `underflow` what a cast of P loses."""

    weights: Noise
    row: Noise
    delta: Noise
    scores: Noise
    size: Tensor
    underflow: Tensor


def _slope_noise(block: oracle.Rows, slope: oracle.Slopes, terms: Terms) -> _SlopeNoise:
    contract = terms.contract
    unit = contract.accumulate
    exponent = _exponent_noise(block, block.lse, terms)
    weights = exponent.scaled(block.weights * growth(exponent))
    difference = slope.d_weights - slope.delta.unsqueeze(-1)
    dots = terms.sum(block.v.shape[-1], slope.dout.abs() @ block.v.abs().mT, slope.d_weights)
    row, delta = _row_noise(block, slope, terms)
    if contract.summed_delta:
        summed = block.weights * slope.d_weights
        delta += (weights.scaled(slope.d_weights) + dots.scaled(block.weights)).total() + row.scaled(slope.delta)
        delta += single(contract.operand * summed.abs()).total()
        delta += terms.sum(block.visible.sum(-1), summed.abs().sum(-1), slope.delta, matrix=False)
    # The difference, its product with P, and the scale where it comes before the sums. An error of P meets the difference as
    # it is computed, with an error of delta in it, which is all there is where the exact difference is 0.
    computed = difference.abs() + terms.value(delta).unsqueeze(-1)
    local = weights.scaled(computed) + (dots + several(3.0, unit * difference.abs())).scaled(block.weights)
    common = terms.value(delta).unsqueeze(-1) * block.weights + terms.value(row).unsqueeze(-1) * slope.d_scores.abs()
    size = slope.d_scores.abs() + terms.value(local) + common
    return _SlopeNoise(
        weights=weights + single(contract.operand * block.weights),
        row=row,
        delta=delta,
        scores=local + single(contract.operand * size),
        size=size,
        underflow=_underflow(block, torch.full_like(block.lse, contract.underflow)),
    )


def _row_noise(block: oracle.Rows, slope: oracle.Slopes, terms: Terms) -> tuple[Noise, Noise]:
    """Of P, relative to itself, and of delta: what all keys of a row share. (n, r) each.

    lse was rounded to fp32 and is multiplied by a rounded log2(e); out was rounded to storage. Of a `chained` pass, the
    errors of both are those of the forward pass: out dout is a mean of dP under the weights, as out is one of V.
    """
    contract = terms.contract
    products = block.out * slope.dout
    row = several(2.0, contract.accumulate * _finite(block.lse)) + steady(contract.constant * _finite(block.lse))
    delta = (
        single(contract.storage * products.abs()).total()
        + terms.sum(products.shape[-1], products.abs().sum(-1), slope.delta, matrix=False)
        + steady(contract.tiny * slope.dout.abs().sum(-1))
    )
    if not contract.chained:
        return row, delta
    forward = _forward_weights(block, terms)
    apart = slope.d_weights - slope.delta.unsqueeze(-1)
    deviation = (block.weights * apart.square()).sum(-1).sqrt()
    constant = (block.weights * _signed(block.scores) * apart).sum(-1)
    underflow = _underflow(block, contract.underflow / block.total.clamp(min=1.0))
    delta += (
        forward.exponent.scaled(block.weights * apart).total()
        + several(forward.rescaled, contract.exponential / 2 * deviation)
        + steady(contract.accumulate * constant.abs() + (underflow * slope.d_weights.abs()).sum(-1))
        + single(contract.operand * (block.weights * slope.d_weights).abs()).total()
        + _accumulated(block, forward, terms).scaled(slope.dout).total()
        + _normaliser(block, forward, terms).scaled(slope.delta)
    )
    return row + _lse_noise(block, forward, terms), delta


def _dq_error(block: oracle.Rows, slope: oracle.Slopes, noise: _SlopeNoise, terms: Terms) -> Tensor:
    """What is common to a row meets signed sums: dQ itself, and P K, which is far below P |K|."""
    contract = terms.contract
    value = slope.d_scores @ block.k
    logarithm = contract.accumulate * _finite(block.lse).unsqueeze(-1)
    inner = (
        noise.scores.through(block.k)
        + noise.delta.columns.scaled(block.weights @ block.k)
        + noise.row.columns.scaled(value)
        + steady(
            contract.accumulate * ((_signed(block.scores) * slope.d_scores) @ block.k).abs() + logarithm * value.abs()
        )
        + terms.sum(block.visible.sum(-1, keepdim=True), noise.size @ block.k.abs(), value)
        + single(contract.accumulate * value.abs())
        + steady((contract.accumulate + contract.constant) * value.abs())
        + steady(_slope_underflow(block, noise.size, terms) @ block.k.abs())
    )
    return abs(block.scale) * terms.value(inner)


def _slope_underflow(block: oracle.Rows, size: Tensor, terms: Terms) -> Tensor:
    """Of each dS (n, r, Skv), before the scale; a kernel may round dS before or after scaling it."""
    lost = terms.contract.underflow * max(1.0, 1.0 / abs(block.scale)) if block.scale else 0.0
    return size.clamp(max=lost)


class _KeySums:
    """Noise of dk and dv (heads, Skv, D), added up over the queries of all heads of a group and over blocks of rows.

    The mutable part of a bound: the roundings of different queries are independent, so their squares must be added up
    before a root is taken. `value` is the sum itself, `absolute` that of the absolute products, `count` (heads, Skv) their
    number. `scale` and `logarithm` are signed: what the sum gains by a relative error of the constant in all scores, and of
    the one in all lse.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._results = oracle.empty_results(problem, ("dk", "dv"), device=device)
        self._parts: dict[str, Tensor] = {}
        self._runs = problem.group

    def add(self, block: oracle.Rows, slope: oracle.Slopes, noise: _SlopeNoise, terms: Terms) -> None:
        seen = block.visible.double().T
        self._add("count", block.kv, seen.sum(-1).expand(len(block.kv), -1))
        dv = noise.weights + noise.row.columns.scaled(block.weights) + steady(noise.underflow)
        self._add_products("dv", block, dv, block.weights, block.weights, slope.dout)
        dk = noise.scores + noise.row.columns.scaled(slope.d_scores) + noise.delta.columns.scaled(block.weights)
        dk += steady(_slope_underflow(block, noise.size, terms))
        self._add_products("dk", block, dk, slope.d_scores, noise.size, block.q)

    def error(self, name: str, terms: Terms) -> Tensor:
        """The bound of dv or, before the scale, of dk, in its shape."""
        if not self._parts:
            return self._results[name]
        unit = terms.contract.accumulate
        parts = {part: self._parts[f"{name}.{part}"] for part in ("steady", "worst", "squares")}
        absolute, value, scale, logarithm = (
            self._parts[f"{name}.{part}"] for part in ("absolute", "value", "scale", "logarithm")
        )
        noise = Noise(**parts) + terms.sum(self._parts["count"].unsqueeze(-1), absolute, value, runs=self._runs)
        noise += steady(unit * (scale.abs() + logarithm.abs()))
        if name == "dk":
            noise += single(unit * value.abs()) + steady((unit + terms.contract.constant) * value.abs())
        return terms.value(noise).view_as(self._results[name])

    def _add_products(
        self, name: str, block: oracle.Rows, noise: Noise, left: Tensor, size: Tensor, right: Tensor
    ) -> None:
        """Of left^T right, where left (n, r, Skv) has this noise and is at most `size`."""
        through = noise.mT.through(right)
        addends = {
            "steady": through.steady,
            "worst": through.worst,
            "squares": through.squares,
            "absolute": size.mT @ right.abs(),
            "value": left.mT @ right,
            "scale": (_signed(block.scores) * left).mT @ right,
            "logarithm": (_signed(block.lse).unsqueeze(-1) * left).mT @ right,
        }
        for part, addend in addends.items():
            self._add(f"{name}.{part}", block.kv, addend)

    def _add(self, name: str, kv: Tensor, addend: Tensor) -> None:
        if name not in self._parts:
            heads = self._results["dk"].shape[0] * self._results["dk"].shape[1]
            self._parts[name] = addend.new_zeros(heads, *addend.shape[1:])
        self._parts[name].index_add_(0, kv, addend)
