"""What a backward pass loses by rounding, in every row and, for what sums over queries, in every key.

Refuses to turn noise into a bound (`harness.bounds` does). Write u for the unit roundoff of sums, s for the complete scores.

P is made of the lse of its row, so it is off by x_j in each pair, by t s_j as above, and by r_i in all of the row;
with dS = P (dP - delta), and alike for dK and dV,
    error of dQ = sum_j (x_j + t s_j + r_i) dS_j K_j + P_j (y_j - d_i) K_j,
with y_j the error of dP and d_i that of delta. What is common to a row meets a signed sum, which is known.

A softcap multiplies dS by its slope 1 - t^2, whose error is 2 |t| times that of t; with the gradient of the log-sum-exp, delta
is what it is less that. Dropout multiplies dP, and P where it meets dout. The gradient of a bias is dS before the slope of a
softcap, summed over the axes along which the bias has one element; that of a sink is -sum P_sink delta.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from harness import oracle
from harness.forward_noise import (
    accumulated,
    capped_noise,
    exponent_noise,
    finite,
    forward_weights,
    lse_noise,
    normaliser,
    signed,
    underflow,
)
from harness.noise import Noise, Terms, growth, several, single, steady
from harness.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlopeNoise:
    """Of the backward quantities of the same rows: `weights` (n, r, Skv) of P as recomputed and cast, from an exact lse;
    `row` (n, r) of P relative to itself, from lse; `delta` (n, r); `changed` and `scores` (n, r, Skv) of dS, for an exact lse
    and delta, before the slope of a softcap, and behind it as cast. `shared` (n, r, Skv) is what dS gains by delta. `size` (n,
    r, Skv) is what |dS| may be, `underflow` what a cast of P loses."""

    weights: Noise
    row: Noise
    delta: Noise
    changed: Noise
    scores: Noise
    shared: Tensor
    size: Tensor
    underflow: Tensor


def slope_noise(block: oracle.Rows, slope: oracle.Slopes, terms: Terms) -> SlopeNoise:
    contract = terms.contract
    unit = contract.accumulate
    exponent = exponent_noise(block, block.lse, terms)
    weights = exponent.scaled(block.weights * growth(exponent))
    difference = slope.d_weights - slope.delta.unsqueeze(-1)
    dots = terms.sum(block.v.shape[-1], slope.dout.abs() @ block.v.abs().mT, slope.dout @ block.v.mT)
    if block.kept is not None:
        dots = dots.scaled(block.kept) + single(unit * slope.d_weights.abs()) + steady(unit * slope.d_weights.abs())
    row, delta = _row_noise(block, slope, terms)
    if contract.summed_delta:
        summed = block.weights * slope.d_weights
        delta += (weights.scaled(slope.d_weights) + dots.scaled(block.weights)).total() + row.scaled(slope.mean)
        delta += single(contract.operand * summed.abs()).total()
        delta += terms.sum(block.visible.sum(-1).expand_as(slope.delta), summed.abs().sum(-1), slope.mean, matrix=False)
    # The difference, its product with P, and the scale where it comes before the sums. An error of P meets the difference as
    # it is computed, with an error of delta in it, which is all there is where the exact difference is 0.
    computed = difference.abs() + terms.value(delta).unsqueeze(-1)
    local = weights.scaled(computed) + (dots + several(3.0, unit * difference.abs())).scaled(block.weights)
    changed, shared = local, block.weights
    if block.steps.slope is not None:
        shared = block.weights * block.steps.slope
        tangent = (block.steps.capped / block.steps.cap).abs()
        turned = capped_noise(block, terms).scaled(2 * tangent / block.steps.cap) + several(
            3.0, torch.full_like(tangent, unit)
        )
        size = slope.d_changed.abs() + terms.value(local)
        local = local.scaled(block.steps.slope) + turned.scaled(size) + single(unit * size * block.steps.slope)
    common = terms.value(delta).unsqueeze(-1) * shared + terms.value(row).unsqueeze(-1) * slope.d_scores.abs()
    size = slope.d_scores.abs() + terms.value(local) + common
    return SlopeNoise(
        weights=_kept(block, weights + single(contract.operand * block.weights), terms),
        row=row,
        delta=delta,
        changed=changed,
        shared=shared,
        scores=local + single(contract.operand * size),
        size=size,
        underflow=oracle.kept(block, underflow(block, torch.full_like(block.lse, contract.underflow))),
    )


def _kept(block: oracle.Rows, weights: Noise, terms: Terms) -> Noise:
    """Of the weights as dropout hands them on."""
    if block.kept is None:
        return weights
    unit = terms.contract.accumulate
    return weights.scaled(block.kept) + single(unit * block.values) + steady(unit * block.values)


def _row_noise(block: oracle.Rows, slope: oracle.Slopes, terms: Terms) -> tuple[Noise, Noise]:
    """Of P, relative to itself, and of delta: what all keys of a row share. (n, r) each.

    lse was rounded to fp32 and is multiplied by a rounded log2(e); out was rounded to storage. Of a `chained` pass, the
    errors of both are those of the forward pass: out dout is a mean of dP under the weights, as out is one of V.
    """
    contract = terms.contract
    products = block.out * slope.dout
    row = several(2.0, contract.accumulate * finite(block.lse)) + steady(contract.constant * finite(block.lse))
    delta = (
        single(contract.storage * products.abs()).total()
        + terms.sum(products.shape[-1], products.abs().sum(-1), slope.mean, matrix=False)
        + single(contract.accumulate * slope.delta.abs() * bool((slope.delta != slope.mean).any()))
        + steady(contract.tiny * slope.dout.abs().sum(-1))
    )
    if not contract.chained:
        return row, delta
    forward = forward_weights(block, terms)
    apart = slope.d_weights - slope.mean.unsqueeze(-1)
    deviation = (block.weights * apart.square()).sum(-1).sqrt()
    constant = (block.weights * signed(block.scores) * apart).sum(-1)
    lost = underflow(block, contract.underflow / block.total.clamp(min=1.0))
    delta += (
        forward.exponent.scaled(block.weights * apart).total()
        + several(forward.rescaled, contract.exponential / 2 * deviation)
        + steady(contract.accumulate * constant.abs() + (lost * slope.d_weights.abs()).sum(-1))
        + single(contract.operand * (block.weights * slope.d_weights).abs()).total()
        + accumulated(block, forward, terms).scaled(slope.dout).total()
        + normaliser(block, forward, terms).scaled(slope.mean)
    )
    return row + lse_noise(block, forward, terms), delta


def dq_error(block: oracle.Rows, slope: oracle.Slopes, noise: SlopeNoise, terms: Terms) -> Tensor:
    """What is common to a row meets signed sums: dQ itself, and P K, which is far below P |K|."""
    contract = terms.contract
    value = slope.d_scores @ block.k
    logarithm = contract.accumulate * finite(block.lse).unsqueeze(-1)
    inner = (
        noise.scores.through(block.k)
        + noise.delta.columns.scaled(noise.shared @ block.k)
        + noise.row.columns.scaled(value)
        + steady(
            contract.accumulate * ((signed(block.scores) * slope.d_scores) @ block.k).abs() + logarithm * value.abs()
        )
        + terms.sum(
            block.visible.sum(-1, keepdim=True).expand(*noise.size.shape[:2], 1), noise.size @ block.k.abs(), value
        )
        + single(contract.accumulate * value.abs())
        + steady((contract.accumulate + contract.constant) * value.abs())
        + steady(_slope_underflow(block, noise.size, terms) @ block.k.abs())
    )
    return abs(block.scale) * terms.value(inner)


def _slope_underflow(block: oracle.Rows, size: Tensor, terms: Terms) -> Tensor:
    """Of each dS (n, r, Skv), before the scale; a kernel may round dS before or after scaling it."""
    lost = terms.contract.underflow * max(1.0, 1.0 / abs(block.scale)) if block.scale else 0.0
    return size.clamp(max=lost)


class KeySums:
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

    def add(self, block: oracle.Rows, slope: oracle.Slopes, noise: SlopeNoise, terms: Terms) -> None:
        self._add("count", block.kv, block.visible.double().sum(-2).expand(len(block.kv), -1))
        dv = noise.weights + noise.row.columns.scaled(block.values) + steady(noise.underflow)
        self._add_products("dv", block, dv, block.values, block.values, slope.dout)
        dk = noise.scores + noise.row.columns.scaled(slope.d_scores) + noise.delta.columns.scaled(noise.shared)
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
            "scale": (signed(block.scores) * left).mT @ right,
            "logarithm": (signed(block.lse).unsqueeze(-1) * left).mT @ right,
        }
        for part, addend in addends.items():
            self._add(f"{name}.{part}", block.kv, addend)

    def _add(self, name: str, kv: Tensor, addend: Tensor) -> None:
        if name not in self._parts:
            heads = self._results["dk"].shape[0] * self._results["dk"].shape[1]
            self._parts[name] = addend.new_zeros(heads, *addend.shape[1:])
        self._parts[name].index_add_(0, kv, addend)


class AddedSums:
    """Noise of the gradients of a bias and of sinks, added up over blocks of rows. What is common to a row is taken as
    systematic, because a sum may run along the row.

    The mutable part of a bound, as `KeySums` is.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._problem = problem
        names = [name for name in oracle.gradient_names(problem) if name in ("dbias", "dsinks")]
        parts = ("steady", "worst", "squares", "absolute", "value", "count")
        self._parts = {
            name: {part: oracle.empty_results(problem, (name,), device=device)[name] for part in parts}
            for name in names
        }

    def add(self, block: oracle.Rows, slope: oracle.Slopes, noise: SlopeNoise, terms: Terms) -> None:
        unit = terms.contract.accumulate
        delta, row = terms.value(noise.delta), terms.value(noise.row)
        if "dbias" in self._parts:
            size = slope.d_changed.abs()
            constants = (finite(block.scores) + finite(block.lse).unsqueeze(-1)) * (unit + terms.contract.constant)
            shared = delta.unsqueeze(-1) * block.weights + (row.unsqueeze(-1) + constants) * size
            seen = block.visible.double().expand_as(size)
            self._add("dbias", block, noise.changed + steady(shared), slope.d_changed, seen)
        if "dsinks" in self._parts:
            assert block.sink is not None
            share = oracle.sink_weights(block)
            moved = 3 * block.sink[:, None].nan_to_num(neginf=0.0).abs() + 3 * finite(block.lse)
            own = single(unit * moved + terms.contract.exponential + unit) + steady(
                row + terms.contract.constant * moved
            )
            total = own.scaled(share * slope.delta) + steady(share * delta)
            self._add("dsinks", block, total, -share * slope.delta, torch.ones_like(share))

    def _add(self, name: str, block: oracle.Rows, noise: Noise, value: Tensor, count: Tensor) -> None:
        addends = {
            "steady": noise.steady, "worst": noise.worst, "squares": noise.squares, "absolute": value.abs(), "value": value,
            "count": count,
        }  # fmt: skip
        for part, addend in addends.items():
            total = self._parts[name][part]
            if name == "dbias":
                oracle.add_pairs(self._problem, total, block, addend)
            else:
                oracle.add_heads(self._problem, total, block, addend.sum(-1))

    def bounds(self, terms: Terms) -> dict[str, Tensor]:
        """By output, before it is stored."""
        found = {}
        for name, parts in self._parts.items():
            noise = Noise(**{part: parts[part] for part in ("steady", "worst", "squares")})
            noise += terms.sum(parts["count"], parts["absolute"], parts["value"], matrix=False)
            found[name] = terms.value(noise)
        return found
