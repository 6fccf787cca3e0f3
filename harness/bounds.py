"""How far from the exact answer a correct kernel may be: elementwise bounds, derived from what it is allowed to round.

Refuses to compare: it is given inputs, never results of a kernel. Nothing here is fitted; every constant is a unit
roundoff, an operation count, or the number of deviations of the probabilistic bound.

Theory: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3 (sums); Higham and Mary 2019 and Ipsen and Zhou
2020 (probabilistic sums); Blanchard, Higham and Higham 2021 (softmax and log-sum-exp). First order throughout, with
`_SLACK` for the rest. Where a mask or a score modification is added: the mask enters only through `oracle.Rows.visible`;
a change of the score adds its sensitivity times the old error, and its own rounding, to `_score_error`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness import oracle
from harness.problem import Problem

# Deviations of Hoeffding's inequality: a sum of independent roundings exceeds it with probability <= 2 exp(-32) ...
_DEVIATIONS = 8.0
# ... and what the first-order terms leave out: products of two relative errors, each below a few percent.
_SLACK = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingContract:
    """What a kernel may round, and how coarsely. Everything not listed is fp32 or exact.

    `storage` is the unit roundoff of inputs and outputs, `tiny` the largest error of a number that is subnormal or flushed
    to zero in their format, `largest` the largest finite one. `operand` is the unit roundoff with which P and dS enter a
    second matrix product (0: they stay fp32). `product` is the relative error of one product inside a matrix product
    (tf32), `accumulate` the unit roundoff of sums, `truncation` the part of their roundings that has one direction (matrix
    units truncate once in 8 to 16 products: Fasi et al. 2021, Khattak and Mikaitis 2025), `exponential` the relative error
    of exp2 with its argument exact, `constant` the relative error that a scale, log2(e) or ln(2) has beside its roundings
    (fp64 arithmetic with fp32 constants). `key_block` is the number of keys between two rescalings of the accumulator.
    `chained`: a backward pass was given the out and lse of a forward kernel under the same contract; otherwise the exact
    ones, rounded to storage and to fp32. `reproducible`: equal numbers give equal bits wherever they lie (in another head
    or batch, with other strides), which a library that leaves sums to BLAS cannot promise. `summed_delta`: delta is
    the sum of P dP over the keys, as a softmax that stores P computes it, and not of out dout.
    """

    storage: float
    tiny: float
    largest: float
    operand: float
    product: float = 0.0
    accumulate: float = 2.0**-24
    truncation: float = 0.125
    exponential: float = 2.0**-22
    constant: float = 0.0
    key_block: int = 16
    chained: bool = False
    reproducible: bool = True
    summed_delta: bool = False


# Roundoff, underflow, largest finite. Hardware exp2 and fp32 arithmetic may flush subnormal results to zero.
_FORMATS: Mapping[str, tuple[float, float, float]] = {
    "fp16": (2.0**-11, 2.0**-25, torch.finfo(torch.float16).max),
    "bf16": (2.0**-8, 2.0**-126, torch.finfo(torch.bfloat16).max),
    "fp32": (2.0**-24, 2.0**-126, torch.finfo(torch.float32).max),
}
_SMALLEST = 2.0**-1022


def contract_for(
    dtype: str, *, key_block: int = 16, fp32_products: Literal["ieee", "tf32"] = "ieee", chained: bool = False
) -> RoundingContract:
    """The contract of a FlashAttention-2 style kernel on tensors of `dtype` ("fp16", "bf16", "fp32").

    Tensor cores truncate tf32 operands to 11 significant bits, so a product of two is off by at most 2 * 2^-10.

    "fp64" is that of a kernel whose source computes in fp64 (in Triton's interpreter): its constants stay fp32, and every
    unit roundoff is doubled, because the reference rounds as coarsely.
    """
    if dtype == "fp64":
        return RoundingContract(
            storage=2.0**-52, tiny=_SMALLEST, largest=torch.finfo(torch.float64).max, operand=0.0, accumulate=2.0**-52,
            truncation=0.0, exponential=2.0**-50, constant=2.0**-24, key_block=key_block, chained=chained,
        )  # fmt: skip
    storage, tiny, largest = _FORMATS[dtype]
    single = dtype == "fp32"
    return RoundingContract(
        storage=storage,
        tiny=tiny,
        largest=largest,
        operand=0.0 if single else storage,
        product=2.0**-9 if single and fp32_products == "tf32" else 0.0,
        truncation=0.0 if single and fp32_products == "ieee" else 0.125,
        key_block=key_block,
        chained=chained,
    )


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
    terms = _Terms(contract, math.inf if structured else _DEVIATIONS)
    truth, bounds = (oracle.empty_results(problem, ("out", "lse"), device=tensors["q"].device) for _ in range(2))
    for block in oracle.rows(problem, tensors):
        out, lse = (terms.value(noise) for noise in _forward_noise(block, terms))
        found = {"out": (block.out, terms.stored(block.out, out)), "lse": (block.lse, _SLACK * lse)}
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
    terms = _Terms(contract, math.inf if structured else _DEVIATIONS)
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
        bounds["dq"].flatten(0, 1)[block.heads, block.queries] = _dq_error(block, noise, terms)
        sums.add(block, slope, noise, terms)
    bounds["dk"] = abs(problem.softmax_scale) * sums.error("dk", terms)
    bounds["dv"] = sums.error("dv", terms)
    return Expectation(
        truth=truth, bounds={name: terms.stored(truth[name], bounds[name]) for name in names}, largest=contract.largest
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Noise:
    """Error of the elements of a tensor: a part that may be systematic, and independent roundings.

    `steady` bounds the first. Of the second, `worst` is the sum of their bounds and `squares` the sum of their squares,
    so that it is at most min(worst, lambda sqrt(squares)). Tensors that broadcast with each other.
    """

    steady: Tensor
    worst: Tensor
    squares: Tensor

    def __add__(self, other: "_Noise") -> "_Noise":
        return _Noise(
            steady=self.steady + other.steady, worst=self.worst + other.worst, squares=self.squares + other.squares
        )

    def scaled(self, factor: Tensor) -> "_Noise":
        """Of x * factor, elementwise, for the factor's absolute value."""
        size = factor.abs()
        return _Noise(steady=self.steady * size, worst=self.worst * size, squares=self.squares * size.square())

    def through(self, right: Tensor) -> "_Noise":
        """Of the matrix product x @ right, for an exact product."""
        size = right.abs()
        return _Noise(steady=self.steady @ size, worst=self.worst @ size, squares=self.squares @ size.square())

    def total(self) -> "_Noise":
        """Of the sum over the last axis."""
        return _Noise(steady=self.steady.sum(-1), worst=self.worst.sum(-1), squares=self.squares.sum(-1))

    @property
    def columns(self) -> "_Noise":
        """With a last axis of one element added."""
        return _Noise(
            steady=self.steady.unsqueeze(-1), worst=self.worst.unsqueeze(-1), squares=self.squares.unsqueeze(-1)
        )

    @property
    def mT(self) -> "_Noise":  # noqa: N802  (the name that torch gives it)
        return _Noise(steady=self.steady.mT, worst=self.worst.mT, squares=self.squares.mT)


def _single(bound: Tensor) -> _Noise:
    """One independent rounding in every element (or a few, whose bounds were added)."""
    return _Noise(steady=torch.zeros_like(bound), worst=bound, squares=bound.square())


def _steady(bound: Tensor) -> _Noise:
    """An error that may be the same in all elements."""
    return _Noise(steady=bound, worst=torch.zeros_like(bound), squares=torch.zeros_like(bound))


@dataclass(frozen=True, slots=True)
class _Terms:
    """The contract, and the lambda of the probabilistic bound: infinite for worst cases."""

    contract: RoundingContract
    deviations: float

    def value(self, noise: _Noise) -> Tensor:
        if math.isinf(self.deviations):
            return noise.steady + noise.worst
        return noise.steady + torch.minimum(noise.worst, self.deviations * noise.squares.sqrt())

    def sum(self, count: Tensor | int, absolute: Tensor) -> _Noise:
        """Of a sum of `count` products, in any order, whose absolute values add up to `absolute`."""
        contract = self.contract
        roundings = torch.as_tensor(count, dtype=absolute.dtype, device=absolute.device) + 2
        return _Noise(
            steady=(contract.accumulate * contract.truncation * roundings + contract.product) * absolute,
            worst=contract.accumulate * roundings * absolute,
            squares=roundings * (contract.accumulate * absolute).square(),
        )

    def stored(self, value: Tensor, error: Tensor) -> Tensor:
        """The bound of a result with computing error `error`, after its rounding to storage."""
        return _SLACK * (error + self.contract.storage * (value.abs() + error) + self.contract.tiny)

    def relative(self, exponent: _Noise) -> Tensor:
        """What turns a bound of an exponent's error into one of the exponential's: (e^d - 1) / d at the worst d."""
        worst = (exponent.steady + exponent.worst).clamp(min=2.0**-60)
        return torch.expm1(worst) / worst


def _finite(values: Tensor) -> Tensor:
    """Absolute values, 0 where infinite: an invisible pair or an empty row has no error."""
    return values.abs().nan_to_num(posinf=0.0)


def _score_error(block: oracle.Rows, terms: _Terms) -> _Noise:
    """Of each scaled score (n, r, Skv): its dot product, and the scale, log2(e) and their product."""
    dots = abs(block.scale) * block.q.abs() @ block.k.abs().mT
    scores = _finite(block.scores)
    constants = _steady(terms.contract.constant * scores)
    return terms.sum(block.q.shape[-1], dots) + _single(3 * terms.contract.accumulate * scores) + constants


def _forward_noise(block: oracle.Rows, terms: _Terms) -> tuple[_Noise, _Noise]:
    """Of out (n, r, Dv) before it is stored, and of lse (n, r)."""
    contract = terms.contract
    unit = contract.accumulate
    rescalings = -(-block.scores.shape[-1] // contract.key_block) + 1
    added = (block.visible.sum(-1) + rescalings).unsqueeze(-1)
    maximum = block.maximum.abs()
    exponent = (
        _score_error(block, terms)
        + _single(unit * _finite(block.scores - block.maximum.unsqueeze(-1)) + contract.exponential)
        + _steady(
            (2 * unit + contract.constant) * maximum.unsqueeze(-1) + rescalings * (contract.exponential + 2 * unit)
        )
    )
    shifted = exponent.scaled(block.weights * terms.relative(exponent))
    normaliser = shifted.total().columns + terms.sum(added, torch.ones_like(block.out[..., :1]))
    normaliser += _single(torch.full_like(block.out[..., :1], 3 * unit))
    underflow = (contract.tiny / block.total.clamp(min=1.0)).unsqueeze(-1) * (block.visible.double() @ block.v.abs())
    out = (
        (shifted + _single(contract.operand * block.weights)).through(block.v)
        + normaliser.scaled(block.out)
        + terms.sum(added, block.weights @ block.v.abs())
        + _steady(underflow)
    )
    logarithm = _finite(block.lse)
    lse = normaliser + _single(unit * (4 * logarithm + 2 * maximum)).columns
    lse += _steady(contract.constant * (logarithm + maximum)).columns
    return out, _Noise(steady=lse.steady[..., 0], worst=lse.worst[..., 0], squares=lse.squares[..., 0])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _SlopeNoise:
    """Of the backward quantities of the same rows: `weights` (n, r, Skv) of P as recomputed and cast, `delta` (n, r),
    `scores` (n, r, Skv) of dS as cast, for an exact delta. `size` (n, r, Skv) is what |dS| may be."""

    weights: _Noise
    delta: _Noise
    scores: _Noise
    size: Tensor


def _slope_noise(block: oracle.Rows, slope: oracle.Slopes, terms: _Terms) -> _SlopeNoise:
    contract = terms.contract
    unit = contract.accumulate
    upstream = slope.dout.abs()
    products = (block.out * slope.dout).abs()
    delta = (
        _single(contract.storage * products).total()
        + terms.sum(products.shape[-1], products.sum(-1))
        + _steady(contract.tiny * upstream.sum(-1))
    )
    logarithm = (unit + contract.constant) * _finite(block.lse)
    if contract.chained:
        out, lse = _forward_noise(block, terms)
        delta += out.scaled(slope.dout).total()
        logarithm += _SLACK * terms.value(lse)
    exponent = (
        _score_error(block, terms)
        + _single(unit * _finite(block.scores - block.lse.unsqueeze(-1)) + contract.exponential)
        + _steady((2 * unit * _finite(block.lse) + logarithm).unsqueeze(-1))
    )
    weights = exponent.scaled(block.weights * terms.relative(exponent))
    difference = (slope.d_weights - slope.delta.unsqueeze(-1)).abs()
    dots = terms.sum(block.v.shape[-1], upstream @ block.v.abs().mT)
    if contract.summed_delta:
        size = block.weights * slope.d_weights.abs()
        delta += (weights.scaled(slope.d_weights) + dots.scaled(block.weights)).total()
        delta += _single(contract.operand * size).total() + terms.sum(block.visible.sum(-1), size.sum(-1))
    local = weights.scaled(difference) + (dots + _single(3 * unit * difference)).scaled(block.weights)
    size = slope.d_scores.abs() + terms.value(local) + block.weights * terms.value(delta).unsqueeze(-1)
    return _SlopeNoise(
        weights=weights + _single(contract.operand * block.weights),
        delta=delta,
        scores=local + _single(contract.operand * size),
        size=size,
    )


def _underflow(terms: _Terms, scale: float) -> float:
    """The underflow of one dS, before the scale; a kernel may round dS before or after scaling it."""
    return terms.contract.tiny * max(1.0, 1.0 / abs(scale)) if scale else 0.0


def _dq_error(block: oracle.Rows, noise: _SlopeNoise, terms: _Terms) -> Tensor:
    """An error of delta is common to a row: it meets the signed sum of P K, which is far below that of P |K|."""
    absolute = noise.size @ block.k.abs()
    inner = (
        noise.scores.through(block.k)
        + noise.delta.columns.scaled(block.weights @ block.k)
        + terms.sum(block.visible.sum(-1, keepdim=True), absolute)
        + _single(3 * terms.contract.accumulate * absolute)
        + _steady(terms.contract.constant * absolute)
        + _steady(_underflow(terms, block.scale) * (block.visible.double() @ block.k.abs()))
    )
    return abs(block.scale) * terms.value(inner)


class _KeySums:
    """Noise of dk and dv (heads, Skv, D), added up over the queries of all heads of a group and over blocks of rows.

    The mutable part of a bound: the roundings of different queries are independent, so their squares must be added up
    before a root is taken. `absolute` is the sum of the absolute products, `count` (heads, Skv) their number.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._results = oracle.empty_results(problem, ("dk", "dv"), device=device)
        self._parts: dict[str, Tensor] = {}

    def add(self, block: oracle.Rows, slope: oracle.Slopes, noise: _SlopeNoise, terms: _Terms) -> None:
        seen = block.visible.double().T
        upstream, queries = slope.dout.abs(), block.q.abs()
        self._add("count", block.kv, seen.sum(-1).expand(len(block.kv), -1))
        dv = noise.weights.mT.through(slope.dout) + _steady(terms.contract.tiny * (seen @ upstream))
        self._add_noise("dv", block.kv, dv, block.weights.mT @ upstream)
        scores = noise.scores + noise.delta.columns.scaled(block.weights)
        dk = scores.mT.through(block.q) + _steady(_underflow(terms, block.scale) * (seen @ queries))
        self._add_noise("dk", block.kv, dk, noise.size.mT @ queries)

    def error(self, name: str, terms: _Terms) -> Tensor:
        """The bound of dv or, before the scale, of dk, in its shape."""
        if not self._parts:
            return self._results[name]
        parts = {part: self._parts[f"{name}.{part}"] for part in ("steady", "worst", "squares", "absolute")}
        absolute = parts.pop("absolute")
        noise = _Noise(**parts) + terms.sum(self._parts["count"].unsqueeze(-1), absolute)
        noise += _single(3 * terms.contract.accumulate * absolute) + _steady(terms.contract.constant * absolute)
        return terms.value(noise).view_as(self._results[name])

    def _add_noise(self, name: str, kv: Tensor, noise: _Noise, absolute: Tensor) -> None:
        parts = {"steady": noise.steady, "worst": noise.worst, "squares": noise.squares, "absolute": absolute}
        for part, addend in parts.items():
            self._add(f"{name}.{part}", kv, addend)

    def _add(self, name: str, kv: Tensor, addend: Tensor) -> None:
        if name not in self._parts:
            heads = self._results["dk"].shape[0] * self._results["dk"].shape[1]
            self._parts[name] = addend.new_zeros(heads, *addend.shape[1:])
        self._parts[name].index_add_(0, kv, addend)
