"""How far from the exact answer a correct kernel may be: elementwise bounds, derived from what it is allowed to round.

Refuses to compare: it is given inputs, never results of a kernel. Nothing here is fitted; every constant is a unit
roundoff, the documented error of an instruction, an operation count, or the number of deviations of the probabilistic bound.

Theory: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3 (sums); Blanchard, Higham and Higham 2021 (softmax
and log-sum-exp); `harness.noise` (probabilistic sums). First order throughout, with `SLACK` for the rest.

What is rounded where, and why it is bounded so, stands in `harness.forward_noise` and `harness.backward_noise`. Where a mask
or a change of the score is added: the mask enters only through `oracle.Rows.visible`; a change of the score adds its
sensitivity times the old error, and its own rounding, to `forward_noise.capped_noise`, and its slope to
`backward_noise.slope_noise`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness import oracle
from harness.backward_noise import AddedSums, KeySums, dq_error, slope_noise
from harness.forward_noise import forward_weights, lse_noise, out_noise
from harness.noise import DEVIATIONS, SLACK, RoundingContract, Terms, contract_for
from harness.problem import Problem

__all__ = ["Expectation", "RoundingContract", "contract_for", "expect_backward", "expect_forward", "library_contract"]


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
        weights = forward_weights(block, terms)
        out, lse = terms.value(out_noise(block, weights, terms)), terms.value(lse_noise(block, weights, terms))
        found = {"out": (block.out, terms.stored(block.out, out)), "lse": (block.lse, SLACK * lse)}
        for name, (value, bound) in found.items():
            truth[name].flatten(0, 1)[block.heads, block.queries] = value
            bounds[name].flatten(0, 1)[block.heads, block.queries] = bound
    return Expectation(truth=truth, bounds=bounds, largest=contract.largest)


def expect_backward(
    problem: Problem, tensors: Mapping[str, Tensor], contract: RoundingContract, *, structured: bool
) -> Expectation:
    """Truth and bounds of dq, dk, dv and the gradients of what the problem adds, from q, k, v, dout and that; see
    `expect_forward` for `structured`.

    The truth is the gradient at the exact out and lse. What the kernel loses by recomputing P from a rounded lse, and
    delta from a rounded out, is part of the bound, as `contract.chained` says they were made.
    """
    terms = Terms(contract, math.inf if structured else DEVIATIONS)
    device = tensors["q"].device
    truth = oracle.backward(problem, tensors)
    bounds = oracle.empty_results(problem, oracle.gradient_names(problem), device=device)
    sums, added = KeySums(problem, device), AddedSums(problem, device)
    for block in oracle.rows(problem, tensors):
        slope = oracle.slopes(block, tensors)
        noise = slope_noise(block, slope, terms)
        bounds["dq"].flatten(0, 1)[block.heads, block.queries] = dq_error(block, slope, noise, terms)
        sums.add(block, slope, noise, terms)
        added.add(block, slope, noise, terms)
    bounds["dk"] = abs(problem.softmax_scale) * sums.error("dk", terms)
    bounds["dv"] = sums.error("dv", terms)
    bounds |= added.bounds(terms)
    return Expectation(
        truth=truth,
        bounds={name: terms.stored(truth[name], bound, single=name == "dsinks") for name, bound in bounds.items()},
        largest=contract.largest,
    )


# Vectorized exponentials of libraries: PyTorch's fastest (exp_u20 for AVX-512) is within 2^-21.06 of the truth on a seventh
# of all fp32 numbers from -86.98 to 0, and 0 below.
_EXPONENTIAL = 2.0**-21
_FLUSHED = 2.0**-125


def library_contract(problem: Problem, claims: frozenset[str] = frozenset()) -> RoundingContract:
    """What an implementation may round of which nothing is known but that scores and sums are fp32 or better.

    Scores may be made of operands multiplied by a rounded root of the scale (four more roundings of a product); sums may
    have any order, and a second rounding in each step; weights may be normalized before they are rounded to 16 bits, where
    up to kv_len of them lose what one loses otherwise; gradients may come from a stored P or from a recomputed one.
    Rounding scores to 16 bits is outside of it.
    """
    base = contract_for(problem.dtype, key_block=16, fp32_products="tf32" if "tf32" in claims else "ieee", chained=True)
    tiny = max(base.tiny, _FLUSHED)
    return replace(
        base,
        tiny=tiny,
        underflow=tiny * max(problem.kv_len, 1),
        product=max(base.product, 2.0**-22),
        accumulate=2.0**-24 if "casts" in claims else 2.0**-23,
        exponential=_EXPONENTIAL,
        reproducible="bitwise" in claims,
        summed_delta=True,
    )
