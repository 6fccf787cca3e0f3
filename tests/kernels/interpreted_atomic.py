"""dq by atomic additions, in Triton's interpreter. Run by `test_kernels.py` in a process of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness import bounds, compare, inputs, oracle
from harness.problem import parse_problem
from harness.quicken import quicken
from harness.subject import KernelSubject
from kernels import flash_bwd
from kernels.attention import attention
from tests.kernels.cases import BACKWARD, ask, check

quicken()

QUESTIONS = (
    "b2 h4/2 q33 k70 d40 bf16 causal", "b1 h2 q17 k100 d16 fp16", "b1 h2/1 q33 k40 d32/8 fp32 sinks softcap=2.0 bias=hqk",
    "b1 h4/2 q33 k40 d32 bf16 packed=3 causal", "b1 h2/1 q33 k40 d16 fp16 scale=-0.3 dropout=0.2 lse-grad",
    "b1 h2/1 q33 k0 d32 bf16", "b1 h2/1 q0 k3 d32 bf16", "b1 h3/1 q20 k13 d24 bf16 window=3:2 top-left sbhd",
    "b2 h2/1 q18 k40 d16 fp32 prefix documents mask=bk causal",
)  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_gradients_lie_within_their_bounds(question: str) -> None:
    for changes in (
        {"dkdv_load": "tma" if "bf16" in question else "pointer"},
        {"dkdv_block_m": 32, "dkdv_block_n": 16},
    ):
        check(ask(f"{question} nondeterministic bwd", {"structure": "atomic", **changes}))


def test_where_no_sum_rounds_its_order_changes_no_bit() -> None:
    """As if there were one program for all keys, or many, or a program for the queries."""
    for question in ("b2 h4/2 q33 k64 d16 bf16", "b1 h3/1 q20 k32 d24 fp16 scale=0.5"):
        problem = parse_problem(f"{question} nondeterministic bwd")
        values = inputs.draw(problem, seed=3, recipe="integers")
        # Equal weights of a power of two, whose log-sum-exp is exact to base 2.
        values["q"].zero_()
        values |= {"out": values["v"].float().mean(2, keepdim=True).repeat_interleave(problem.group, 1)}
        values["out"] = values["out"].expand(-1, -1, problem.q_len, -1).to(values["q"].dtype)
        values["lse"] = torch.full(values["q"].shape[:3], float(problem.kv_len)).log()
        found = [
            KernelSubject(kernel=flash_bwd, config={**BACKWARD, **changes}).run(problem, values).outputs["dq"]
            for changes in (
                {"structure": "separate"}, {"structure": "atomic"}, {"structure": "atomic", "dkdv_block_n": 16},
                {"structure": "atomic", "dkdv_block_n": 64, "dkdv_block_m": 64},
            )
        ]  # fmt: skip
        assert found[0].any() and all(torch.equal(found[0], one) for one in found[1:])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_keys_beyond_the_last_one_have_no_weight() -> None:
    """Where all scores are low, exp(0 - lse) is infinite."""
    problem = parse_problem("b1 h1 q20 k35 d16 fp32 nondeterministic bwd")
    values = inputs.draw(problem, seed=3)
    values["q"][..., 0], values["k"][..., 0] = 100.0, -100.0
    made = oracle.forward(problem, values)
    values |= {"out": made["out"].float(), "lse": made["lse"].float()}
    subject = KernelSubject(kernel=flash_bwd, config={**BACKWARD, "structure": "atomic"})
    expected = bounds.expect_backward(problem, values, subject.contract(problem), structured=True)
    for found in compare.judge(subject.run(problem, values).outputs, expected, case=str(problem)):
        assert found.ratio <= 1, compare.sentence(found)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=".") as refused:
        call()
    return str(refused.value)


def test_nobody_gets_other_bits_unasked() -> None:
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    config = flash_bwd.safe_config(q, v) | {"structure": "atomic"}
    assert "other bits in every run" in refusal(lambda: attention(q, k, v, backward_config=config))
    out = attention(q, k, v, backward_config=config, deterministic=False)
    same = attention(q, k, v, deterministic=False)
    assert isinstance(out, torch.Tensor) and isinstance(same, torch.Tensor)
    for one, two in zip(torch.autograd.grad(out.sum(), (k, v)), torch.autograd.grad(same.sum(), (k, v)), strict=True):
        assert torch.equal(one, two)
    lse = torch.zeros(1, 2, 9)
    given = [x.detach() for x in (q, k, v)]
    call = [*given, given[0], lse, given[0]]
    assert "say nondeterministic=True" in refusal(lambda: flash_bwd.flash_bwd(*call, config=config))
    found = flash_bwd.flash_bwd(*call, config=config, nondeterministic=True)
    assert [one.shape for one in found] == [q.shape] * 3
    plain = flash_bwd.safe_config(q, v)
    sums = torch.zeros(1, 2, 9, 16)
    assert "dq_sum is for structure='atomic'" in refusal(
        lambda: flash_bwd.flash_bwd(*call, config=plain, dq_sum=sums, nondeterministic=True)
    )
