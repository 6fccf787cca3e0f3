"""Questions to the operation: small tensors, what a problem says as arguments, and the derived bounds as judge."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from harness import bounds, compare
from harness.operation import ADDED_INPUTS, problem_keywords
from harness.problem import Problem
from kernels.attention import attention


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Normal numbers that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def small(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v: one sequence, two query heads on one key head, 3 queries, 4 keys."""
    return drawn((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 2), dtype=dtype)


def flags(problem: Problem, values: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of `attention` beside q, k and v."""
    window = (problem.window_left, problem.window_right)
    keywords = problem_keywords(problem)
    return {
        "scale": problem.scale, "causal": problem.causal, "window": None if window == (None, None) else window,
        "top_left": problem.top_left,
        **{name: keywords[name] for name in ("softcap", "chunk", "dropout", "dropout_seed") if name in keywords},
        **{name: values[name] for name in ADDED_INPUTS if name in values},
    }  # fmt: skip


def check(problem: Problem, values: dict[str, Tensor], **more: Any) -> None:
    """Fail unless out, lse and all gradients lie within their derived bounds. `more` may say the same in another way."""
    leaves = {
        name: values[name].detach().requires_grad_() for name in ("q", "k", "v", "bias", "sinks") if name in values
    }
    asked = flags(problem, {**values, **leaves}) | more
    leaves = {name: leaf for name, leaf in leaves.items() if name in "qkv" or asked[name] is not None}
    out, lse = attention(leaves["q"], leaves["k"], leaves["v"], **asked, return_lse=True)
    results = {"dout": out} | ({"dlse": lse} if problem.lse_grad else {})
    gradients = grad(list(results.values()), list(leaves.values()), [values[name] for name in results])
    found = dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
    contract = bounds.contract_for(problem.dtype, chained=True)
    forward = bounds.expect_forward(problem, values, contract, structured=False)
    backward = bounds.expect_backward(problem, values, contract, structured=False)
    backward = replace(
        backward,
        truth={name: backward.truth[name] for name in found},
        bounds={name: backward.bounds[name] for name in found},
    )
    checks = compare.judge({"out": out.detach(), "lse": lse.detach()}, forward, case=str(problem))
    checks += compare.judge(found, backward, case=str(problem))
    assert compare.status_of(checks) == "passed", compare.sentence(compare.worst(checks))
