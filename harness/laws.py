"""What a property of attention is, and the trial in which one is tested on a subject.

A property needs no reference kernel: it says what any attention must do, bit for bit where arithmetic allows that, and else
within bounds derived in `harness.bounds`. Refuses to choose a tolerance, and to know single properties (`harness.probes`,
`harness.metamorphic` and `harness.identities` do).
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from harness import bounds, compare, inputs, oracle
from harness.bounds import Expectation, RoundingContract
from harness.compare import OutputCheck
from harness.errors import RefusedError
from harness.inputs import DTYPES
from harness.operation import operation_for, shapes
from harness.problem import Pass, Problem
from harness.subject import Subject

Kind = Literal["exact", "tolerance", "inequality"]
Values = Mapping[str, Tensor]

# The `output` of a check that is about memory and not about numbers.
MEMORY = "memory"

BOTH: tuple[Pass, ...] = ("fwd", "bwd")
ALL = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")

STEADY = " Bitwise if equal numbers give equal bits wherever they lie; within two bounds otherwise."


@dataclass(frozen=True, slots=True, kw_only=True)
class Property:
    """Something that holds for every attention.

    `kind` says how it is judged at its strictest: "exact" is bit for bit (but for the sign of zero) under the conditions in
    `why`, and within derived bounds outside them; "tolerance" is within derived bounds; "inequality" is one-sided.
    `why` is the reason that it holds. `free` says that it holds whatever a problem adds to attention inside a band.
    `excludes` gives the reason why a problem cannot show it, or None.
    """

    name: str
    kind: Kind
    passes: tuple[Pass, ...]
    why: str
    excludes: Callable[[Problem, RoundingContract], str | None]
    relation: Callable[["Trial"], None]
    free: bool = False

    def applies(self, problem: Problem, contract: RoundingContract) -> str | None:
        """None if the property can be tested on `problem`, else the reason why not."""
        if problem.pass_ not in self.passes:
            return f"is about the {' and '.join(self.passes)} pass"
        if problem.beyond and not self.free:
            return "is about attention inside a band"
        return self.excludes(problem, contract)

    def judge(self, subject: Subject, problem: Problem, rng: np.random.Generator) -> tuple[OutputCheck, ...]:
        """Test the property. A check with ratio at most 1 passes; no checks means that nothing was compared.

        Where a subject refuses a problem that the property asks (a relative of `problem`) the trial ends there. Faults of a run
        are failed checks of the output "memory". What the subject raises reaches the caller.
        """
        trial = Trial(subject, problem, rng)
        if self.applies(problem, trial.contract) is not None:
            return ()
        with contextlib.suppress(RefusedError):
            self.relation(trial)
        return (*trial.checks, *trial.faults)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A question with its answer: the outputs are copies, which later runs cannot change."""

    problem: Problem
    values: Values
    outputs: Values
    structured: bool


class Trial:
    """One test of one property: asks the subject, and keeps what the comparisons found.

    The mutable part of a property. `rng` is the only source of randomness.
    """

    def __init__(self, subject: Subject, problem: Problem, rng: np.random.Generator) -> None:
        self.subject = subject
        self.problem = problem
        self.rng = rng
        self.contract = subject.contract(problem)
        self.checks: list[OutputCheck] = []
        self.faults: list[OutputCheck] = []

    @property
    def backward(self) -> bool:
        return self.problem.pass_ == "bwd"

    def drawn(self, recipe: str = "normal", problem: Problem | None = None) -> dict[str, Tensor]:
        """Values of a recipe for `problem` (default: the one under test), from the generator."""
        return inputs.draw(problem or self.problem, seed=int(self.rng.integers(1 << 62)), recipe=recipe)

    def ask(self, values: Values, problem: Problem | None = None, *, structured: bool = False) -> Asked:
        """Run the subject. In a backward problem out and lse are added from the oracle unless they are given.

        `structured` says that the values may round in one direction (see `harness.bounds`). Raises `RefusedError` where the
        subject cannot do the problem or returned something that cannot be compared.
        """
        problem = problem or self.problem
        reason = self.subject.refuses(problem)
        if reason is not None:
            raise RefusedError(f"{self.subject.name} does not do `{problem}`: {reason}")
        values = self.completed(problem, values)
        answer = self.subject.run(problem, values)
        outputs = {}
        broken = list(answer.faults)
        for name in operation_for(problem).outputs:
            if name not in answer.outputs:
                broken += [] if name == "lse" else [f"gave no {name} for `{problem}`"]
            elif tuple(answer.outputs[name].shape) != shapes(problem)[name][0]:
                broken.append(f"gave {name} of shape {tuple(answer.outputs[name].shape)} for `{problem}`")
            else:
                outputs[name] = answer.outputs[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        self.faults += [_fault(text, problem) for text in broken]
        if len(outputs) + (problem.pass_ == "fwd" and "lse" not in outputs) < len(operation_for(problem).outputs):
            raise RefusedError(f"{self.subject.name} gave nothing to compare")
        return Asked(problem=problem, values=values, outputs=outputs, structured=structured)

    def completed(self, problem: Problem, values: Values) -> dict[str, Tensor]:
        """`values` with what a perfect forward pass hands over to a backward problem: out in storage precision and lse."""
        completed = dict(values)
        if problem.pass_ == "bwd" and "out" not in values:
            made = oracle.forward(problem, values)
            exact = self.contract.storage < torch.finfo(torch.float32).eps / 2
            completed["out"] = made["out"] if exact else made["out"].to(DTYPES[problem.dtype])
            completed["lse"] = made["lse"] if exact else made["lse"].float()
        return completed

    def expectation(self, asked: Asked) -> Expectation:
        """Truth and bounds of what was asked."""
        contract = self.subject.contract(asked.problem)
        expect = bounds.expect_forward if asked.problem.pass_ == "fwd" else bounds.expect_backward
        return expect(asked.problem, asked.values, contract, structured=asked.structured)

    def matches(
        self, asked: Asked, what: str, *, exact: Mapping[str, Tensor], truths: Mapping[str, Tensor] | None = None
    ) -> None:
        """Compare with the truth, within bounds; `exact` names outputs and says which of their elements must be exact: the
        truth rounded to the dtype of the output. `truths` are better ones than the oracle's, whose roundings show where
        the answer is 0."""
        expected = self.expectation(asked)
        for name, found in asked.outputs.items():
            truth, bound = (truths or {}).get(name, expected.truth[name]), expected.bounds[name]
            if name in exact:
                where = exact[name].expand_as(truth)
                truth = torch.where(where, truth.to(found.dtype).double(), truth)
                bound = bound.masked_fill(where, 0.0)
            self.check(asked, name, found, truth, what, bound=bound)

    def agree(
        self,
        asked: Asked,
        expected: Values,
        what: str,
        *,
        exact: Sequence[str] = (),
        where: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Compare with what another run gave, put in the place of these outputs.

        Outputs in `exact` must have the same bits if the contract is reproducible; all others may differ by two bounds of
        this question: one run may be at either end. `where` selects elements by output name.
        """
        bound_of: Values = {}
        for name, other in expected.items():
            if name not in asked.outputs:
                continue
            found = asked.outputs[name]
            bound = torch.zeros(found.shape, dtype=torch.float64)
            if name not in exact or not self.contract.reproducible:
                bound_of = bound_of or self.expectation(asked).bounds
                bound = 2 * bound_of[name]
            chosen = None if where is None or name not in where else where[name].expand_as(found)
            self.check(asked, name, found, other.double(), what, bound=bound, where=chosen)

    def check(  # noqa: PLR0913  (what is compared, with what, where)
        self,
        asked: Asked,
        name: str,
        found: Tensor,
        truth: Tensor,
        what: str,
        *,
        bound: Tensor | None = None,
        where: Tensor | None = None,
    ) -> None:
        """Compare elementwise, exactly without a `bound`, where `where` is true; shapes are equal."""
        bound = torch.zeros(found.shape, dtype=torch.float64) if bound is None else bound
        count = found.numel()
        if where is not None:
            count = int(where.sum())
            found, truth = found.masked_fill(~where, 0.0), truth.masked_fill(~where, 0.0)
            bound = bound.masked_fill(~where, 0.0)
        if not count:
            return
        expected = Expectation(
            truth={name: truth.to(torch.float64, copy=True)}, bounds={name: bound}, largest=self.contract.largest
        )
        case = f"{asked.problem} [{what}]"
        self.checks += [replace(check, elements=count) for check in compare.judge({name: found}, expected, case=case)]

    def between(
        self, asked: Asked, name: str, found: Tensor, limits: tuple[Tensor, Tensor], what: str, bound: Tensor
    ) -> None:
        """One-sided: `found` must lie between two limits, which it may exceed by `bound`. NaN lies nowhere."""
        low, high = limits
        truth = torch.minimum(torch.maximum(found.double(), low), high)
        # What is NaN must not become its own limit.
        self.check(asked, name, found, torch.where(found.isnan(), low, truth), what, bound=bound)


def snaps(contract: RoundingContract) -> bool:
    """Whether a cast to storage erases the noise of fp32 arithmetic, so that probes have exact answers.

    True for 16-bit tensors with sums in fp32, where P and dS are cast too.
    """
    return contract.operand > 0 and contract.accumulate <= 2.0**-24 and contract.storage >= 2.0**-11


def coarse(
    generator: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, *, spread: float = 1.0
) -> Tensor:
    """Normal numbers of deviation `spread`, cut to multiples of 2^-4 and to at most 4: sums of two of them, and their
    products with small powers of two, are exact in every dtype."""
    values = np.clip(np.round(generator.standard_normal(shape) * spread * 16) / 16, -4, 4)
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


def coarse_values(trial: Trial, problem: Problem | None = None) -> dict[str, Tensor]:
    """q, k, v (and dout) of `coarse` numbers. Scores stay of order 1."""
    problem = problem or trial.problem
    shape_of = shapes(problem)
    size = abs(problem.softmax_scale) * math.sqrt(problem.head_dim)
    spread = min(1.0, 1.0 / math.sqrt(size)) if size else 1.0
    names = ("q", "k", "v", "dout") if problem.pass_ == "bwd" else ("q", "k", "v")
    return {
        name: coarse(trial.rng, shape_of[name][0], DTYPES[problem.dtype], spread=spread if name in ("q", "k") else 1.0)
        for name in names
    }


def filled(problem: Problem, contract: RoundingContract) -> str | None:
    """The condition that there is something to compute."""
    if 0 in (problem.batch, problem.q_len, problem.kv_len):
        return "has no elements"
    return None


def unmasked(problem: Problem, contract: RoundingContract) -> str | None:
    """The condition that every query sees every key, and there are some."""
    return "has a mask" if problem.banded else filled(problem, contract)


def several_heads(problem: Problem, contract: RoundingContract) -> str | None:
    """The condition that there is more than one group of heads."""
    return filled(problem, contract) or (None if problem.batch * problem.kv_heads > 1 else "has one head only")


def group_sum(problem: Problem, per_head: Tensor) -> Tensor:
    """(batch, q_heads, ...) summed over the query heads of every group: (batch, kv_heads, ...)."""
    return per_head.view(problem.batch, problem.kv_heads, problem.group, *per_head.shape[2:]).sum(2)


def repeated(problem: Problem, per_group: Tensor) -> Tensor:
    """(batch, kv_heads, ...) given to every query head: (batch, q_heads, ...)."""
    return per_group.repeat_interleave(problem.group, 1)


def seen(problem: Problem) -> Tensor:
    """The mask (q_len, kv_len)."""
    return oracle.visible_keys(problem, slice(0, problem.q_len))


def _fault(text: str, problem: Problem) -> OutputCheck:
    return OutputCheck(
        output=MEMORY, case=str(problem), ratio=math.inf, error=math.inf, bound=0.0, index=(), elements=1, detail=text
    )
