"""How far an attention is from a reference, in units of the error that its roundings may make."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import triton
from torch import Tensor

from harness import bounds, compare
from harness.problem import Problem

# (q, k, v) -> (out, lse)
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def report(problem: Problem, tensors: Mapping[str, Tensor], ours: Attention, reference: Attention) -> None:
    """Print the largest error over its bound among out, lse, dq, dk and dv; exit with 1 if it is not within it.

    `problem` says in built-in words what `ours` computes, and `tensors` (q, k, v, dout, and what these words add) hold the
    same: from them follow the bounds. What is compared with is `reference`, differentiated by autograd in fp64.
    """
    # Triton's interpreter works on the CPU.
    interpreted = triton.knobs.runtime.interpret
    if not interpreted and not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here\n\nhint: set TRITON_INTERPRET=1")
    tensors = {name: tensor.to("cpu" if interpreted else "cuda") for name, tensor in tensors.items()}
    found = forward_and_backward(ours, tensors, tensors["q"].dtype)
    truth = forward_and_backward(reference, tensors, torch.float64)
    contract = bounds.contract_for(problem.dtype, chained=True)
    checks = []
    for expect, names in ((bounds.expect_forward, ("out", "lse")), (bounds.expect_backward, ("dq", "dk", "dv"))):
        expected = expect(problem, tensors, contract, structured=False)
        limits = {name: expected.bounds[name] for name in names}
        expected = replace(expected, truth={name: truth[name] for name in names}, bounds=limits)
        checks += compare.judge({name: found[name] for name in names}, expected, case=str(problem))
    worst = compare.worst(checks)
    sys.stdout.write(f"The largest error is {worst.ratio:.2f} of its derived bound ({worst.output}, `{problem}`).\n")
    if compare.status_of(checks) != "passed":
        raise SystemExit(compare.sentence(worst))


def forward_and_backward(attention: Attention, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv of an attention that computes in `dtype`."""
    leaves = [tensors[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v")]
    out, lse = attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, tensors["dout"].to(dtype))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
