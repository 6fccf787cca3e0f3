"""PyTorch's scaled_dot_product_attention on the CPU as a subject: foreign code, without log-sum-exp, and with BLAS."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from harness import bounds, oracle
from harness.bounds import RoundingContract
from harness.problem import Problem
from harness.subject import Answer


class MathSubject:
    """fp32, or 16 bits where scores and weights are rounded to 16 bits as well."""

    name = "sdpa math"

    def refuses(self, problem: Problem) -> str | None:
        if problem.dtype != "fp32":
            return "its 16-bit arithmetic has no derived bound"
        if 0 in (problem.batch, problem.q_len, problem.kv_len):
            return "empty tensors are not asked"
        if not oracle.visible_keys(problem, slice(0, problem.q_len)).any(1).all():
            return "rows that see nothing are undefined"
        return None

    def contract(self, problem: Problem) -> RoundingContract:
        """Both operands of a score are multiplied by a rounded square root of the scale; weights are normalised before use:
        a few more roundings of each kind than FlashAttention has."""
        contract = bounds.contract_for(problem.dtype, key_block=max(problem.kv_len, 1))
        return replace(
            contract, product=2.0**-21, accumulate=2.0**-22, exponential=2.0**-21, reproducible=False, summed_delta=True
        )

    def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
        q, k, v = (inputs[name].detach().requires_grad_(problem.pass_ == "bwd") for name in ("q", "k", "v"))
        mask = oracle.visible_keys(problem, slice(0, problem.q_len)) if problem.banded else None
        with sdpa_kernel(SDPBackend.MATH):
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=problem.softmax_scale, enable_gqa=True)
        if problem.pass_ == "fwd":
            return Answer(outputs={"out": out})
        gradients = torch.autograd.grad(out, (q, k, v), inputs["dout"])
        return Answer(outputs=dict(zip(("dq", "dk", "dv"), gradients, strict=True)))
