"""What a forward pass loses by rounding, in every row: of its weights, of out and of lse.

Refuses to turn noise into a bound (`harness.bounds` does) and to know a backward pass. Write u for the unit roundoff of sums,
e for that of exp2, P for the weights, O for out, s for the complete scores, m for their maximum.

A kernel computes softmax(s + x) for some errors x of the exponents, so
    dO_d = sum_j P_j x_j (V_jd - O_d),   d lse = sum_j P_j x_j.
- x_j of each key: its dot product; u |s_j| (scaling), u |m - s_j| (shifting), e. The same m is subtracted in every weight and
  added to the logarithm, so its own roundings cancel. Nothing is saved at the key that attains m: fused with the scaling,
  s_j - m is the rounding of m there and not 0, so that its weight is rounded like any other.
- Common: the rounding t of the constant scale * log2(e) is x_j = t s_j, hence the signed |sum_j P_j s_j (V_j - O)| u.
- Rescaling by exp2(m_old - m): exactly 1 where the maximum does not grow, exactly 0 in the first block, so at most
  blocks - 1 of them round. An error t of one is x_j = t for the keys S before it. sum_S P_j (V_j - O) is the covariance of V
  with an indicator, whose deviation is at most 1/2: e spread / 2. Shifts of the arguments add up to m - m_j <= m - s_j.
- A kernel that rescales only once the maximum has risen by more than a lag L shifts by what is up to L below it: one more u L
  of each exponent, and of the shifts; its z is up to e^L times larger, and log(z) rounds like what is L larger.
- The normaliser z, relative to itself: n - 1 additions of n positive numbers and one product for each rescaling.
- The accumulator: a sum of n products and one product for each rescaling. No partial sum, in whatever order, exceeds the
  positive or the negative part of the whole sum: (sum |x| + |sum x|) / 2.
- A softcap passes on what the product lost, times its slope 1 - t^2, and adds the error of t = tanh(x / c), computed as
  (1 - w) / (1 + w) with w = exp2(-2 log2(e) |x| / c). A term that is added (a bias, a slope) costs its own rounding and that
  of the sum. Such scores are scaled by log2(e) at the end, one more product.
- A sink is one more weight, of value 0, and the first block is then rescaled like any other.
- Dropout multiplies P by 0 or a constant where it meets V, which then stands for what is kept of it, and out by it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import oracle
from harness.noise import Noise, Terms, growth, largest_partial, several, single, spread, steady


def signed(values: Tensor) -> Tensor:
    """The values, 0 where infinite: an invisible pair or an empty row has no error."""
    return values.nan_to_num(posinf=0.0, neginf=0.0)


def finite(values: Tensor) -> Tensor:
    """Their absolute values."""
    return signed(values).abs()


def exponent_noise(block: oracle.Rows, shift: Tensor, terms: Terms) -> Noise:
    """Of the logarithm of each weight (n, r, Skv), exp(score - shift): the score, shifting, exp2."""
    unit = terms.contract.accumulate
    scores = finite(block.scores)
    noise = _score_noise(block, terms)
    if block.steps.slope is not None or block.steps.added:
        # Their constants are the scale and log2(e), one after the other.
        products = _seen(block, block.steps.products).abs()
        products = products if block.steps.slope is None else products * block.steps.slope
        noise += single(unit * scores) + steady(terms.contract.constant * scores + unit * products)
    return (
        noise
        + single(unit * finite(block.scores - shift.unsqueeze(-1)))
        + single(torch.full_like(scores, terms.contract.exponential))
    )


def _seen(block: oracle.Rows, values: Tensor) -> Tensor:
    """The values of visible pairs, 0 elsewhere."""
    return values.masked_fill(~block.visible, 0.0)


def _score_noise(block: oracle.Rows, terms: Terms) -> Noise:
    """Of each score (n, r, Skv), complete but for its factor log2(e)."""
    unit = terms.contract.accumulate
    noise = capped_noise(block, terms)
    running = _seen(block, block.steps.capped)
    for term in block.steps.added:
        running = running + _seen(block, term)
        noise += single(unit * finite(_seen(block, term))) + single(unit * finite(running))
    return noise


def capped_noise(block: oracle.Rows, terms: Terms) -> Noise:
    """Of each scaled product (n, r, Skv) behind its softcap, if there is one."""
    contract, steps = terms.contract, block.steps
    unit = contract.accumulate
    products = _seen(block, steps.products)
    size = products.abs()
    dots = abs(block.scale) * block.q.abs() @ block.k.abs().mT
    noise = terms.sum(block.q.shape[-1], dots, products) + steady(contract.constant * size) + single(unit * size)
    if steps.slope is None:
        return noise
    capped, passed = _seen(block, steps.capped).abs(), steps.slope * size
    # tanh is 1 - 2 w / (1 + w): by the logarithm of w it changes by -slope / 2, and that is -2 |x| / c.
    cap = block.steps.cap
    return (
        noise.scaled(steps.slope)
        + steady((unit + contract.constant) * (passed + capped))
        + single(contract.division * passed)
        + several(2.0, unit * passed)
        + single(contract.exponential * cap / 2 * steps.slope)
        + several(3.0, unit * capped)
        + single(contract.division * capped)
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardWeights:
    """Of the same rows: `exponent` (n, r, Skv), the noise of the weights' logarithms; `seen` and `rescaled` (n or 1, r), the
    number of visible keys and of rescalings that can round."""

    exponent: Noise
    seen: Tensor
    rescaled: Tensor


def forward_weights(block: oracle.Rows, terms: Terms) -> ForwardWeights:
    rescaled = rescalings(block.visible, terms.contract.key_block)
    if block.sink is not None:
        rescaled = rescaled + block.visible.any(-1)
    # How far a shift was below the last one: its share of the roundings is common to the keys of a block.
    unit, lag = terms.contract.accumulate, terms.contract.lag
    drift = unit * (finite(block.scores - block.maximum.unsqueeze(-1)) + lag) * (rescaled > 0).unsqueeze(-1)
    exponent = exponent_noise(block, block.maximum, terms) + steady(drift)
    if lag:
        exponent += single(torch.full_like(drift, unit * lag))
    return ForwardWeights(
        exponent=exponent.scaled(growth(exponent)), seen=block.visible.sum(-1).double(), rescaled=rescaled
    )


def rescalings(visible: Tensor, key_block: int) -> Tensor:
    """How often the maximum of each row can grow, (n or 1, r): one less than blocks with visible keys, in any order."""
    seen, keys = visible.sum(-1), visible.shape[-1]
    position = torch.arange(keys, device=visible.device).expand_as(visible)
    last = position.masked_fill(~visible, -1).max(-1).values if keys else seen
    first = position.masked_fill(~visible, keys).min(-1).values if keys else seen
    touched = -((first - last) // key_block) + 1
    blocks = torch.minimum(seen, touched).clamp(max=-(-keys // key_block))
    return (blocks - 1).clamp(min=0).double()


def underflow(block: oracle.Rows, smallest: Tensor) -> Tensor:
    """Of each weight (n, r, Skv), cast while it was at least itself: what is lost is at most the weight, and `smallest`."""
    return torch.minimum(block.weights, smallest.unsqueeze(-1))


def accumulated(block: oracle.Rows, weights: ForwardWeights, terms: Terms) -> Noise:
    """Of out (n, r, Dv): what differs from column to column even if the weights are exact, and a scale of v."""
    absolute = block.values @ block.v.abs()
    largest = largest_partial(absolute, block.out)
    noise = (
        terms.sum(weights.seen.unsqueeze(-1), absolute, block.out)
        + several(weights.rescaled.unsqueeze(-1), terms.contract.accumulate * largest)
        + single(terms.contract.division * block.out.abs())
        + steady(terms.contract.constant * block.out.abs())
    )
    if block.kept is not None:
        # The constant that dropout divides by, and the product with it.
        scaled = terms.contract.accumulate * block.out.abs()
        noise += steady(scaled) + single(scaled)
    return noise


def normaliser(block: oracle.Rows, weights: ForwardWeights, terms: Terms) -> Noise:
    """Of the sum of weights (n, r), relative to it, for exact weights."""
    count = (weights.seen - 1).clamp(min=0) + weights.rescaled
    noise = several(count, torch.full_like(block.lse, terms.contract.accumulate))
    if block.sink is None:
        return noise
    # One more addend, and one more exponent.
    unit, logit = terms.contract.accumulate, block.sink[:, None].nan_to_num(neginf=0.0)
    moved = signed(logit - block.maximum).abs() + 2 * logit.abs()
    share = oracle.sink_weights(block)
    return (
        noise + single(torch.full_like(block.lse, unit)) + single(share * (unit * moved + terms.contract.exponential))
    )


def out_noise(block: oracle.Rows, weights: ForwardWeights, terms: Terms) -> Noise:
    """Of out (n, r, Dv) before it is stored."""
    contract = terms.contract
    scores = block.weights * signed(block.scores)
    apart = spread(block.weights, block.v, block.out, block.kept)
    constant = oracle.kept(block, scores) @ block.v - scores.sum(-1, keepdim=True) * block.out
    lost = oracle.kept(block, underflow(block, contract.underflow / block.total.clamp(min=1.0)))
    return (
        weights.exponent.averaged(block.weights, block.v, block.out, apart, block.kept)
        + several(weights.rescaled.unsqueeze(-1), contract.exponential / 2 * apart)
        + steady(contract.accumulate * constant.abs())
        + single(contract.operand * block.values).through(block.v)
        + steady(lost @ block.v.abs())
        + accumulated(block, weights, terms)
        + normaliser(block, weights, terms).columns.scaled(block.out)
    )


def lse_noise(block: oracle.Rows, weights: ForwardWeights, terms: Terms) -> Noise:
    """Of lse (n, r): its sum with the maximum rounds, ln(2) does, and their product."""
    contract = terms.contract
    size = finite(block.lse)
    logarithm = block.total.clamp(min=1.0).log().clamp(min=math.log(2.0)) + contract.lag
    constant = (block.weights * signed(block.scores)).sum(-1)
    return (
        weights.exponent.scaled(block.weights).total()
        + several(weights.rescaled, torch.full_like(size, contract.exponential))
        + normaliser(block, weights, terms)
        + single(contract.logarithm * logarithm)
        + several(2.0, contract.accumulate * size)
        + steady(contract.accumulate * constant.abs() + (contract.accumulate + contract.constant) * size)
    )
