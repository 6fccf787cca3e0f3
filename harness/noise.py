"""What a kernel may round, and the algebra of rounding errors: how bounds of single roundings add up, in fp64.

Two kinds are kept apart. What may have the same sign everywhere adds up in absolute value. Independent roundings of mean
zero, r_1 to r_n with |r_k| <= b_k, obey Hoeffding's inequality: P(|sum r_k| > lambda sqrt(sum b_k^2)) <= 2 exp(-lambda^2 / 2)
(Higham and Mary 2019, Ipsen and Zhou 2020). Refuses to know attention: `harness.bounds` says what is rounded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Products = Literal["ieee", "tf32", "tf32x3"]

# Deviations of Hoeffding's inequality: a sum of independent roundings exceeds it with probability <= 2 exp(-32) < 3e-14.
DEVIATIONS = 8.0
# What first-order terms leave out: products of two relative errors, each below a few percent.
SLACK = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingContract:
    """What a kernel may round, and how coarsely. Everything not listed is fp32 or exact.

    `storage` is the unit roundoff of inputs and outputs, `tiny` the largest error of a number that is subnormal or flushed
    to zero in their format, `largest` the largest finite one. `operand` is the unit roundoff with which P and dS enter a
    second matrix product (0: they stay fp32), and `underflow` what `tiny` is for them. `product` is the relative error of
    one product inside a matrix product (tf32), `passes` how many products a matrix unit makes of one, `accumulate` the unit
    roundoff of sums, `matrix_factor` how many times coarser it is inside a matrix product, and `truncation` how often, per
    product, such a sum is truncated as a whole
    (matrix units do once in 4 to 32: Fasi et al. 2021, Khattak and Mikaitis 2025). `exponential` is the relative error of
    exp2 with its argument exact, `logarithm` the error of log2(z) in units of max(1, log2(z)), `division` the relative
    error of a quotient, `constant` the relative error that a scale, log2(e) or ln(2) has beside its rounding (fp64
    arithmetic with fp32 constants, scales of fp8 tensors). `key_block` is the number of keys between two rescalings of the
    accumulator, and `lag` how far a row's maximum may have risen (natural logarithm) before there is one.
    `chained`: a backward pass was given the out and lse of a forward kernel under the same contract;
    otherwise the exact ones, rounded to storage and to fp32. `reproducible`: equal numbers give equal bits wherever
    they lie (in another head or batch, with other strides), which a library that leaves sums to BLAS cannot promise.
    `in_order`: the keys of a row are visited in blocks counted from the first key on, so that more keys behind the
    last one change no rounding; not so where they are divided into parts that are added up at the end. `one_tile`: the
    query heads of a group are rows of one tile, and the products of a tile come from BLAS (in the interpreter), which
    may round a row by its place, so that a head with keys of its own may differ. `summed_delta`: delta is the sum of P
    dP over the keys, as a softmax that stores P computes it, and not of out dout.
    """

    storage: float
    tiny: float
    largest: float
    operand: float
    underflow: float = 2.0**-126
    product: float = 0.0
    passes: int = 1
    accumulate: float = 2.0**-24
    matrix_factor: float = 1.0
    truncation: float = 0.125
    exponential: float = 2.0**-22
    logarithm: float = 2.0**-22
    division: float = 2.0**-22
    constant: float = 0.0
    key_block: int = 16
    lag: float = 0.0
    chained: bool = False
    reproducible: bool = True
    in_order: bool = True
    one_tile: bool = False
    summed_delta: bool = False


# Roundoff, underflow, largest finite. Hardware exp2 and fp32 arithmetic may flush subnormal results to zero.
_FORMATS: Mapping[str, tuple[float, float, float]] = {
    "fp16": (2.0**-11, 2.0**-25, torch.finfo(torch.float16).max),
    "bf16": (2.0**-8, 2.0**-126, torch.finfo(torch.bfloat16).max),
    "fp32": (2.0**-24, 2.0**-126, torch.finfo(torch.float32).max),
}
# Of inputs and of P and dS: four and three significant bits, and half the smallest subnormal number.
_EIGHT_BITS: Mapping[str, tuple[float, float]] = {"fp8e4m3": (2.0**-4, 2.0**-10), "fp8e5m2": (2.0**-3, 2.0**-17)}
_SMALLEST = 2.0**-1022
# How fp32 numbers are multiplied on matrix units: the relative error of one product, and how many are made of it.
_PRODUCTS: Mapping["Products", tuple[float, int]] = {
    "ieee": (0.0, 1),
    "tf32": (2 * 2.0**-10, 1),
    "tf32x3": (5 * 2.0**-22, 3),
}
# numpy's exp2 and log2 of fp32: measured on every mantissa, where the interpreter runs (tests/unit/test_bounds.py).
_NUMPY = 2.0**-23


def contract_for(
    dtype: str,
    *,
    key_block: int = 16,
    fp32_products: Products = "ieee",
    chained: bool = False,
    where: Literal["device", "interpreter"] = "device",
    stored: Literal["fp16", "bf16", "fp32"] = "bf16",
) -> RoundingContract:
    """The contract of a FlashAttention-2 style kernel on tensors of `dtype` ("fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2").

    On a "device" (which covers the interpreter) exp2, log2 and divisions may be off by two units in the last place (PTX
    ISA, `ex2.approx`, `lg2.approx`, `div.full`), and matrix units truncate. The "interpreter" computes with numpy: exact
    roundings, and exp2 and log2 within one unit. Tensor cores truncate tf32 operands to 11 significant bits, so a product
    of two is off by at most 2 * 2^-10, and sum four products at once. "tf32x3" makes three products of one: of a number its
    nearest with 11 bits is taken apart, off by 2^-11, and of that rest too 11 bits are kept, so that each rest loses 2^-21 of
    the number, and the product of the rests, 2^-22, is left out.

    With fp8 inputs, given to the bounds as numbers (multiplied by their scales), P and dS are cast to fp8, outputs are
    `stored` wider, and the scales of q and k, and that of v, are multiplied into constants and results. Hopper's fp8 sums
    keep 13 bits behind the largest of 32 addends (Khattak and Mikaitis 2025); `matrix_factor` 1 is for kernels that add
    them up in fp32 themselves.

    "fp64" is that of a kernel whose source computes in fp64 (in Triton's interpreter): its constants stay fp32, and every
    unit roundoff is doubled, because the reference rounds as coarsely.
    """
    if dtype == "fp64":
        return RoundingContract(
            storage=2.0**-52, tiny=_SMALLEST, largest=torch.finfo(torch.float64).max, operand=0.0, underflow=_SMALLEST,
            accumulate=2.0**-52, truncation=0.0, exponential=2.0**-50, logarithm=2.0**-50, division=2.0**-52,
            constant=2.0**-24, key_block=key_block, chained=chained,
        )  # fmt: skip
    storage, tiny, largest = _FORMATS[stored if dtype in _EIGHT_BITS else dtype]
    found = RoundingContract(
        storage=storage,
        tiny=tiny,
        largest=largest,
        operand=storage,
        underflow=tiny,
        key_block=key_block,
        chained=chained,
    )
    if dtype == "fp32":
        product, passes = _PRODUCTS[fp32_products]
        truncation = 0.25 if product else 0.0
        found = replace(found, operand=0.0, product=product, passes=passes, truncation=truncation)
    if dtype in _EIGHT_BITS:
        operand, underflow = _EIGHT_BITS[dtype]
        # Two more roundings of the constant in a score, and one of it and a product in out.
        found = replace(found, operand=operand, underflow=underflow, constant=2 * 2.0**-24)
        found = replace(found, matrix_factor=2.0**11, truncation=2.0**-5)
    if where == "interpreter":
        found = replace(found, exponential=_NUMPY, logarithm=_NUMPY, division=2.0**-24)
        found = replace(found, truncation=0.0, matrix_factor=1.0)
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noise:
    """Error of the elements of a tensor: a part that may be systematic, and independent roundings.

    `steady` bounds the first. Of the second, `worst` is the sum of their bounds and `squares` the sum of their squares,
    so that it is at most min(worst, lambda sqrt(squares)). Tensors that broadcast with each other.
    """

    steady: Tensor
    worst: Tensor
    squares: Tensor

    def __add__(self, other: "Noise") -> "Noise":
        return Noise(
            steady=self.steady + other.steady, worst=self.worst + other.worst, squares=self.squares + other.squares
        )

    def bound(self, deviations: float) -> Tensor:
        """The largest error, up to `deviations` of Hoeffding's inequality; infinitely many ask for the worst case."""
        if math.isinf(deviations):
            return self.steady + self.worst
        return self.steady + torch.minimum(self.worst, deviations * self.squares.sqrt())

    def scaled(self, factor: Tensor) -> "Noise":
        """Of x * factor, elementwise, for the factor's absolute value."""
        size = factor.abs()
        return Noise(steady=self.steady * size, worst=self.worst * size, squares=self.squares * size.square())

    def through(self, right: Tensor) -> "Noise":
        """Of the matrix product x @ right, for an exact product."""
        size = right.abs()
        return Noise(steady=self.steady @ size, worst=self.worst @ size, squares=self.squares @ size.square())

    def averaged(
        self, weights: Tensor, right: Tensor, mean: Tensor, spread: Tensor, kept: Tensor | None = None
    ) -> "Noise":
        """Of the mean of `right` (n, k, d) under `weights` (n, r, k), whose logarithms have this noise; `kept` (n, r, k)
        multiplies `right` in each row.

        `mean` and `spread` (n, r, d) are that mean, and the standard deviation of `right` under the weights. The first-order
        error is sum_k w_k x_k (right_kd - mean_d), since the weights are normalised: what is common to a row cancels. Its
        squares expand into three matrix products. Its absolute sum does not; it is at most
        sum_k w_k |x_k| (|right_kd| + |mean_d|), and, by Cauchy and Schwarz, sqrt(sum_k w_k x_k^2) times the spread.
        """
        size, squares = right.abs(), self.squares * weights.square()
        factor = torch.ones_like(weights) if kept is None else kept

        def absolute(bounds: Tensor) -> Tensor:
            weighted = weights * bounds
            apart = (weighted * factor) @ size + mean.abs() * weighted.sum(-1, keepdim=True)
            return torch.minimum(apart, (weighted * bounds).sum(-1, keepdim=True).sqrt() * spread)

        expanded = (squares * factor.square()) @ right.square() - 2 * mean * ((squares * factor) @ right)
        expanded += mean.square() * squares.sum(-1, keepdim=True)
        return Noise(steady=absolute(self.steady), worst=absolute(self.worst), squares=expanded.clamp(min=0.0))

    def total(self) -> "Noise":
        """Of the sum over the last axis."""
        return Noise(steady=self.steady.sum(-1), worst=self.worst.sum(-1), squares=self.squares.sum(-1))

    @property
    def columns(self) -> "Noise":
        """With a last axis of one element added."""
        return Noise(
            steady=self.steady.unsqueeze(-1), worst=self.worst.unsqueeze(-1), squares=self.squares.unsqueeze(-1)
        )

    @property
    def mT(self) -> "Noise":  # noqa: N802  (the name that torch gives it)
        return Noise(steady=self.steady.mT, worst=self.worst.mT, squares=self.squares.mT)


def single(bound: Tensor) -> Noise:
    """One independent rounding in every element (or a few, whose bounds were added)."""
    return Noise(steady=torch.zeros_like(bound), worst=bound, squares=bound.square())


def several(count: Tensor | float, bound: Tensor) -> Noise:
    """`count` independent roundings in every element, each of at most `bound`."""
    return Noise(steady=torch.zeros_like(count * bound), worst=count * bound, squares=count * bound.square())


def steady(bound: Tensor) -> Noise:
    """An error that may be the same in all elements."""
    return Noise(steady=bound, worst=torch.zeros_like(bound), squares=torch.zeros_like(bound))


def spread(weights: Tensor, right: Tensor, mean: Tensor, kept: Tensor | None = None) -> Tensor:
    """Standard deviation (n, r, d) of `right` (n, k, d) under `weights` (n, r, k), whose mean is `mean`; `kept` (n, r, k)
    multiplies `right` in each row."""
    weights = weights if kept is None else weights * kept.square()
    return (weights @ right.square() - mean.square()).clamp(min=0.0).sqrt()


def largest_partial(absolute: Tensor, value: Tensor) -> Tensor:
    """What no partial sum exceeds, in any order: the larger of the positive and the negative part of the whole sum."""
    return (absolute + value.abs()) / 2


def growth(noise: Noise) -> Tensor:
    """What turns the bound of an exponent's error into one of the exponential's: (e^x - 1) / x at the worst x."""
    worst = (noise.steady + noise.worst).clamp(min=2.0**-60)
    return torch.expm1(worst) / worst


@dataclass(frozen=True, slots=True)
class Terms:
    """The contract, and the lambda of the probabilistic bound: infinite for worst cases."""

    contract: RoundingContract
    deviations: float

    def value(self, noise: Noise) -> Tensor:
        return noise.bound(self.deviations)

    def sum(self, count: Tensor | int, absolute: Tensor, value: Tensor, *, matrix: bool = True, runs: int = 1) -> Noise:
        """Of a sum of `count` products, in any order, that add up to `value`, and their absolute values to `absolute`.

        Every addition rounds, and so does every product, unless its factors have few enough digits. A matrix unit aligns
        its addends to the largest, which costs each but that one a roundoff, and truncates the result, which has one
        direction; the first step is exact if it has one product. Products come in `runs` of consecutive ones, which may begin
        inside a step.
        """
        contract = self.contract
        unit = contract.accumulate * (contract.matrix_factor if matrix else 1.0)
        largest = largest_partial(absolute, value)
        addends = torch.as_tensor(count, dtype=absolute.dtype, device=absolute.device) * (
            contract.passes if matrix else 1
        )
        additions = (addends - 1).clamp(min=0)
        noise = several(additions, unit * largest)
        if matrix and (contract.truncation or contract.product):
            steps = torch.minimum(additions, (additions * contract.truncation).ceil() + runs)
            noise += steady(contract.product * absolute + 2 * unit * bool(contract.truncation) * steps * largest)
        if contract.storage**2 < contract.accumulate:
            noise += single(contract.accumulate * absolute)
        return noise

    def stored(self, value: Tensor, error: Tensor, *, single: bool = False) -> Tensor:
        """The bound of a result with computing error `error`, after its rounding to storage; `single` says that it is stored
        in the type of sums."""
        unit = self.contract.accumulate if single else self.contract.storage
        return SLACK * (error + unit * (value.abs() + error) + self.contract.tiny)
