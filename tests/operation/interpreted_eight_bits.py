"""The operation on types of 8 bits, in Triton's interpreter. Run by `test_operation.py`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from harness import bounds, compare, inputs
from harness.problem import parse_problem
from harness.quicken import quicken
from harness.subject import shifted
from kernels import flash_fwd
from kernels.attention import Question, attention, attention_paged
from tests.operation.questions import flags

quicken()

TYPES = {"fp8e4m3": torch.float8_e4m3fn, "fp8e5m2": torch.float8_e5m2}


def drawn(words: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    problem = parse_problem(f"b1 h4/2 q20 k17 d16/8 {words}")
    values = inputs.draw(problem, seed=1)
    return values, flags(problem, values)


@pytest.mark.parametrize(
    "words",
    ["fp8e4m3 causal", "fp8e5m2 window=5:2", "fp8e4m3 packed=3 causal sinks", "fp8e5m2 bias=hqk softcap=2.0 mask=bk"],
)
def test_results_lie_within_their_bounds(words: str) -> None:
    problem = parse_problem(f"b1 h4/2 q20 k17 d16/8 {words}")
    values, asked = drawn(words)
    out, lse = attention(values["q"], values["k"], values["v"], **asked, return_lse=True)
    contract = shifted(bounds.contract_for(problem.dtype), flash_fwd, problem.dtype, {})
    expected = bounds.expect_forward(problem, values, contract, structured=False)
    checks = compare.judge({"out": out, "lse": lse}, expected, case=str(problem))
    assert compare.status_of(checks) == "passed", compare.sentence(compare.worst(checks))


def test_a_scale_may_be_one_number_or_none() -> None:
    values, asked = drawn("fp8e4m3 causal")
    q, k, v = (values[name] for name in "qkv")
    for name in ("q_descale", "k_descale", "v_descale"):
        del asked[name]
    plain = attention(q, k, v, **asked)
    halves = torch.tensor(0.5)
    scaled = attention(q, k, v, q_descale=2.0, k_descale=halves, v_descale=halves, **asked)
    assert isinstance(plain, Tensor) and torch.equal(scaled, plain / 2)


def test_shapes_are_known_and_autocast_leaves_the_numbers_alone() -> None:
    values, asked = drawn("fp8e5m2 causal")
    q, k, v = (values[name] for name in "qkv")
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in asked.items()}
    out, lse = attention(*(x.to("meta") for x in (q, k, v)), **meta, return_lse=True)
    assert (out.shape, out.dtype, lse.dtype) == ((1, 4, 20, 8), torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, **asked), attention(q, k, v, **asked))
    compiled = torch.compile(lambda *tensors: attention(*tensors, **asked), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), attention(q, k, v, **asked))


def test_a_lookup_is_asked() -> None:
    values, asked = drawn("fp8e5m2 causal")
    questions: list[Question] = []

    def lookup(question: Question) -> None:
        questions.append(question)

    attention(*(values[name] for name in "qkv"), **asked, lookup=lookup)
    assert [(one.dtype, one.variants) for one in questions] == [
        (torch.float8_e5m2, ("q_descale", "k_descale", "v_descale"))
    ]


def test_what_does_not_exist_is_refused_by_name() -> None:
    values, asked = drawn("fp8e4m3 causal")
    q, k, v = (values[name] for name in "qkv")
    with pytest.raises(
        NotImplementedError, match=r"q requires a gradient, and attention of torch.float8_e4m3fn has none"
    ):
        attention(q.detach().requires_grad_(), k, v)
    with pytest.raises(NotImplementedError, match=r"v_descale requires a gradient"):
        attention(q, k, v, **asked | {"v_descale": asked["v_descale"].requires_grad_()})
    with pytest.raises(ValueError, match="is for inputs of 8 bits"):
        attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), q_descale=2.0)
    with pytest.raises(ValueError, match="only flash_fwd"):
        table, lengths = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        attention_paged(q, k, v, table, lengths)
