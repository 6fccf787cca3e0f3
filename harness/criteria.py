"""How other projects decide that an attention is right: their criteria and their shapes, as judges beside our own.

Every tolerance here is theirs, written from its published definition, and is used for one purpose: to measure what their
suites would have seen of the mutants (`harness.mutate`). Nothing of ours is ever accepted by one of them. Where a project
runs on long sequences, lengths are scaled down to the interpreter, with their remainders kept odd or even as they were.

A backward kernel is handed the out and lse of an exact forward pass, where these projects chain their own two passes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness import oracle
from harness.cases import Case
from harness.compare import OutputCheck
from harness.inputs import DTYPES
from harness.judges import Judge
from harness.problem import Pass, Problem, parse_problem
from harness.subject import Subject

Values = Mapping[str, Tensor]
Config = Mapping[str, int | str | bool]
Asked = tuple[tuple[OutputCheck, ...], tuple[str, ...]]

_OUTPUTS: Mapping[Pass, tuple[str, ...]] = {"fwd": ("out",), "bwd": ("dq", "dk", "dv")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A project's way to test attention. `problems` in notation, scaled down; `passes` says which results are looked at.

    `allowed(problem, values)` gives for each output what it is compared with, and elementwise or as one number
    how far it may be off, in the norm that `deviation` computes.
    """

    name: str
    source: str
    passes: tuple[Pass, ...]
    problems: tuple[str, ...]
    positive: bool = False
    allowed: Callable[[Problem, Values], Mapping[str, tuple[Tensor, Tensor]]]
    deviation: Callable[[Tensor], Tensor] = torch.abs

    def cases(self, kernel: str, pass_: Pass, configs: Sequence[Config]) -> tuple[Case, ...]:
        """Its own shapes, each under one of `configs` in turn; none for a pass that it does not look at."""
        if pass_ not in self.passes:
            return ()
        return tuple(
            Case(
                kernel=kernel, problem=str(parse_problem(text).replace(pass_=pass_)), config=dict(configs[turn % len(configs)]),
                recipe="normal", seed=turn, lies={},
            )
            for turn, text in enumerate(self.problems)
        )  # fmt: skip

    def ask(self, subject: Subject, case: Case) -> Asked:
        """Their verdict on one case: a ratio of at most 1 for each output passes, as it would there."""
        problem = case.asked
        values = _draw(problem, case.seed, positive=self.positive)
        if problem.pass_ == "bwd":
            made = oracle.forward(problem, values)
            values |= {"out": made["out"].to(DTYPES[problem.dtype]), "lse": made["lse"].float()}
        outputs = subject.run(problem, values).outputs
        found = []
        for name, (truth, allowed) in self.allowed(problem, values).items():
            found.append(
                _check(name, case.problem, self.deviation(outputs[name].double() - truth.double()), allowed.double())
            )
        return tuple(found), ()


def _check(name: str, case: str, error: Tensor, allowed: Tensor) -> OutputCheck:
    # Not greater fails nothing, as in their assertions; NaN fails.
    excess = torch.where(
        error <= allowed, (error / allowed).nan_to_num(0.0), (error / allowed).nan_to_num(math.inf).clamp(min=2)
    )
    worst = float(excess.max()) if excess.numel() else 0.0
    return OutputCheck(
        output=name, case=case, ratio=worst, error=float(error.max()), bound=float(allowed.max()), index=(),
        elements=max(error.numel(), 1), detail="" if worst <= 1 else "is not close",
    )  # fmt: skip


def _draw(problem: Problem, seed: int, *, positive: bool) -> dict[str, Tensor]:
    generator = np.random.default_rng(seed)
    queries, keys = (problem.batch, problem.q_heads, problem.q_len), (problem.batch, problem.kv_heads, problem.kv_len)
    shapes = {
        "q": (*queries, problem.head_dim), "k": (*keys, problem.head_dim), "v": (*keys, problem.v_head_dim),
        "dout": (*queries, problem.v_head_dim),
    }  # fmt: skip
    draw = generator.random if positive else generator.standard_normal
    return {name: torch.from_numpy(draw(shape)).to(DTYPES[problem.dtype]) for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Their references
# ---------------------------------------------------------------------------------------------------------------------

Attention = Callable[[Problem, Tensor, Tensor, Tensor], Tensor]


def _results(attention: Attention, problem: Problem, values: Values, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, or dq, dk and dv, of an attention in `dtype`, through autograd."""
    q, k, v = (values[name].to(dtype).requires_grad_(problem.pass_ == "bwd") for name in ("q", "k", "v"))
    out = attention(problem, q, k, v)
    if problem.pass_ == "fwd":
        return {"out": out.detach()}
    gradients = torch.autograd.grad(out, (q, k, v), values["dout"].to(out.dtype))
    return dict(zip(_OUTPUTS["bwd"], gradients, strict=True))


def _grouped(problem: Problem, tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(problem.group, dim=1)


def _math(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's math attention, as installed."""
    mask = None
    if problem.banded:
        mask = torch.zeros(problem.q_len, problem.kv_len, dtype=q.dtype)
        mask.masked_fill_(~oracle.visible_keys(problem, slice(None)), -math.inf)
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        q, _grouped(problem, k), _grouped(problem, v), mask, scale=problem.softmax_scale
    )[0]
    return out


def _eager(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention without a compiler: products in the type of the inputs, softmax in fp32 or fp64."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ _grouped(problem, k).mT).to(wide) * problem.softmax_scale
    return _softmax(problem, scores).to(q.dtype) @ _grouped(problem, v)


def _naive(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention's reference: everything in the type of the inputs, keys scaled before the product."""
    scores = q @ (_grouped(problem, k) * problem.softmax_scale).mT
    return _softmax(problem, scores).to(v.dtype) @ _grouped(problem, v)


def _softmax(problem: Problem, scores: Tensor) -> Tensor:
    """Rows without keys are 0."""
    if not problem.banded:
        return scores.softmax(-1)
    seen = oracle.visible_keys(problem, slice(None))
    empty = ~seen.any(-1, keepdim=True)
    return scores.masked_fill(~seen & ~empty, -math.inf).softmax(-1).masked_fill(empty, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Their criteria
# ---------------------------------------------------------------------------------------------------------------------

# KernelBench, src/eval.py: atol = rtol = 1e-2 for 16 bit, 1e-4 for fp32; Helion's autotuner takes 1e-2 too.
_KERNELBENCH = {"fp16": 1e-2, "bf16": 1e-2, "fp32": 1e-4}
# PyTorch, test/test_transformers.py: multiples of the low-precision reference's greatest error, and the least tolerance.
_PYTORCH = {"out": 3.0, "dq": 110.0, "dk": 8.0, "dv": 3.0}
_PYTORCH_LEAST = 1e-5
# The same file until 2024: elementwise, with the greatest relative error as a relative tolerance.
_PYTORCH_OLD = {"out": 1.0, "dq": 4.0, "dk": 2.0, "dv": 1.0}
_PYTORCH_ATOL = 1e-3
_PYTORCH_RTOL = {"fp16": 1e-3, "bf16": 1.6e-2, "fp32": 1.3e-6}
# PyTorch, test/inductor/test_flex_attention.py: multiples of the eager result's mean error.
_FLEX = {"fp16": 1.1, "bf16": 1.1, "fp32": 10.0}
# FlashAttention, hopper/test_flash_attn.py: a multiple of the low-precision reference's greatest error, and of what adding
# and subtracting 0.3 loses.
_FLASH = 2.0
_FLASH_NUDGE = 0.3


def _kernelbench(problem: Problem, values: Values) -> dict[str, tuple[Tensor, Tensor]]:
    tolerance = _KERNELBENCH[problem.dtype]
    truth = _results(_math, problem, values, DTYPES[problem.dtype])
    return {name: (there, tolerance + tolerance * there.double().abs()) for name, there in truth.items()}


def _references(
    high: Attention, low: Attention, problem: Problem, values: Values, wide: torch.dtype
) -> Iterator[tuple[str, Tensor, Tensor]]:
    truth = _results(high, problem, values, wide)
    rough = _results(low, problem, values, DTYPES[problem.dtype])
    for name, there in truth.items():
        yield name, there, rough[name]


def _wider(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.dtype == "fp32" else torch.float32


def _pytorch(problem: Problem, values: Values) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, truth, rough in _references(_math, _math, problem, values, _wider(problem)):
        allowed = (truth.double() - rough.double()).abs().max() * _PYTORCH[name]
        found[name] = (truth, allowed.clamp(min=_PYTORCH_LEAST).expand(truth.shape))
    return found


def _pytorch_old(problem: Problem, values: Values) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, truth, rough in _references(_math, _math, problem, values, _wider(problem)):
        off = (truth.double() - rough.double()).abs()
        least = _PYTORCH_RTOL[problem.dtype]
        relative = (off / truth.double().abs()).nan_to_num(nan=least).max().clamp(min=least, max=1e30)
        allowed = _PYTORCH_OLD[name] * (off.max().clamp(min=_PYTORCH_ATOL) + relative * truth.double().abs())
        found[name] = (truth, allowed)
    return found


def _flex(problem: Problem, values: Values) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, truth, rough in _references(_eager, _eager, problem, values, torch.float64):
        found[name] = (truth, (truth - rough.double()).abs().mean() * _FLEX[problem.dtype])
    return found


def _flash(problem: Problem, values: Values) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    dtype = DTYPES[problem.dtype]
    for name, exact, rough in _references(_eager, _naive, problem, values, torch.float32):
        truth = exact.to(dtype)
        nudged = (truth + _FLASH_NUDGE - _FLASH_NUDGE - truth).double().abs().max()
        allowed = _FLASH * (rough.double() - truth.double()).abs().max() + 2 * nudged
        found[name] = (truth, allowed.expand(truth.shape))
    return found


def _mean(difference: Tensor) -> Tensor:
    return difference.abs().mean()


# One aligned shape, causal and not.
_ALIGNED = ("b2 h4 s64 d32 fp16", "b2 h4 s64 d32 fp16 causal")
# Lengths 4, 127, 143, 579 and 2048; causal only where lengths agree.
_PYTORCH_SHAPES = (
    "b1 h4 s4 d8 fp16", "b1 h4 s4 d8 fp16 causal", "b2 h4 q4 k31 d16 bf16", "b1 h4 q35 k31 d32 fp16",
    "b1 h4/2 q35 k72 d40 fp16", "b2 h4 s64 d64 bf16 causal", "b1 h4/2 s64 d16 fp16 causal", "b1 h4 q64 k31 d48 fp16",
    "b1 h4 q4 k64 d24 bf16 scale=0.1", "b1 h4/1 q35 k64 d16 fp16 scale=0.1",
)  # fmt: skip
# Length 2048 and 2047, unequal lengths, groups; causal is a mask mod of its own.
_FLEX_SHAPES = (
    "b2 h2 s64 d16 fp16", "b2 h2 s64 d16 fp16 causal", "b2 h2 s64 d16 bf16 causal", "b2 h2 s64 d16 fp32 causal",
    "b2 h4/2 s64 d16 fp16 causal", "b2 h4/1 s64 d16 fp16", "b2 h2 s63 d16 fp16 causal", "b2 h2 q64 k96 d16 fp16",
    "b2 h2 s64 d16/32 fp16", "b2 h2 s64 d16 fp16 causal window=16",
)  # fmt: skip
# Lengths in pairs from (1, 1) and (799, 3) to (1024, 1023), a quarter as long.
_FLASH_PAIRS = (
    (1, 1), (16, 32), (32, 48), (60, 1), (50, 3), (29, 51), (29, 32), (32, 55), (27, 64), (96, 64), (63, 64), (64, 63),
)  # fmt: skip
_FLASH_SHAPES = tuple(
    f"{heads} q{q_len} k{kv_len} d{head_dim} {dtype} {mask}"
    for turn, (q_len, kv_len) in enumerate(_FLASH_PAIRS)
    for mask in ("", "causal", f"window={(5 * turn) % 17}:{(3 * turn) % 11}")
    for heads, head_dim, dtype in ((("b2 h2", 16, "bf16"), ("b2 h4/2", 24, "fp16"), ("b1 h3/1", 16, "bf16"))[turn % 3],)
)

CRITERIA: Mapping[str, Criterion] = {
    found.name: found
    for found in (
        Criterion(
            name="allclose of out", source="KernelBench src/eval.py; Helion autotuner", passes=("fwd",), problems=_ALIGNED,
            allowed=_kernelbench,
        ),
        Criterion(
            name="allclose of out and gradients", source="the same, asked of gradients too", passes=("fwd", "bwd"),
            problems=_ALIGNED, allowed=_kernelbench,
        ),
        Criterion(
            name="PyTorch SDPA", source="pytorch test/test_transformers.py", passes=("fwd", "bwd"),
            problems=_PYTORCH_SHAPES, positive=True, allowed=_pytorch,
        ),
        Criterion(
            name="PyTorch SDPA until 2024", source="pytorch test/test_transformers.py, get_tolerances",
            passes=("fwd", "bwd"), problems=_PYTORCH_SHAPES, positive=True, allowed=_pytorch_old,
        ),
        Criterion(
            name="FlexAttention", source="pytorch test/inductor/test_flex_attention.py", passes=("fwd", "bwd"),
            problems=_FLEX_SHAPES, allowed=_flex, deviation=_mean,
        ),
        Criterion(
            name="FlashAttention", source="flash-attention hopper/test_flash_attn.py", passes=("fwd", "bwd"),
            problems=_FLASH_SHAPES, allowed=_flash,
        ),
    )
}  # fmt: skip

CRITERIA_JUDGES: Mapping[str, Judge] = {name: Judge(name, found.source, found.ask) for name, found in CRITERIA.items()}
