"""Functions of the caller in Triton's interpreter. Run by `test_operation.py`."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import grad, gradcheck

from examples import dilated_window, judging, relative_bias, tanh_softcap
from harness import inputs
from harness.problem import parse_problem
from harness.quicken import quicken
from kernels import functions
from kernels.attention import Question, attention
from kernels.functions import register_functions
from kernels.operators import SLOTS, VARIANTS
from tests.operation.questions import check, small

quicken()


@triton.jit
def mixed(x, batch, head, query, key, given):
    """given: a number per key, a factor, a number per query, a distance."""
    per_key, factor, per_query, least = given
    added = tl.load(per_key + tl.minimum(key, 3)) * factor + tl.load(per_query + tl.minimum(query, 2))
    return x + tl.where(tl.abs(key - query) < least, 0.0, added)


@triton.jit
def slope_of_mixed(x, batch, head, query, key, given):
    return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def not_itself(batch, head, query, key, given):
    return tl.abs(query - key) != 0


@triton.jit
def none_of_the_first(batch, head, query, key, given):
    return (query > 0) & (key >= 0)


register_functions("mixed", score=mixed, slope=slope_of_mixed, allowed=not_itself)
register_functions("slopeless", score=mixed)
register_functions("none of the first", allowed=none_of_the_first)


def asked() -> dict[str, Any]:
    """For `small`."""
    per_key, per_query = torch.tensor([0.5, -1.0, 2.0, 0.25]), torch.tensor([1.0, 0.0, -0.5])
    return {"functions": "mixed", "given": (per_key, 0.5, per_query, 2)}


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["fp16 causal", "bf16 top-left window=5:2 lse-grad", "fp32"])
def test_a_function_equals_the_built_in_variant(words: str) -> None:
    problem = parse_problem(f"b2 h4/2 q17 k20 d16/8 {words} softcap=1.5 bwd")
    check(problem, inputs.draw(problem, seed=1), softcap=None, functions="tanh softcap", given=(1.5,))
    problem = parse_problem(f"b2 h4/2 q17 k20 d16/8 {words} bias=hqk bwd")
    table = torch.randn(4, 2 * relative_bias.REACH + 1, generator=torch.Generator().manual_seed(1))
    values = inputs.draw(problem, seed=1) | {"bias": relative_bias.spread(table, problem)}
    check(problem, values, bias=None, functions="relative bias", given=(table, relative_bias.REACH))


def test_a_function_comes_behind_the_variants() -> None:
    problem = parse_problem("b2 h2 q17 k20 d16 fp32 softcap=1.5 alibi bias=hqk sinks prefix causal dropout=0.2 bwd")
    table = torch.randn(2, 2 * relative_bias.REACH + 1, generator=torch.Generator().manual_seed(1))
    values = inputs.draw(problem, seed=1) | {"bias": relative_bias.spread(table, problem)}
    check(problem, values, bias=None, functions="relative bias", given=(table, relative_bias.REACH))


def test_what_functions_are_given_arrives_in_its_order() -> None:
    """Its sums are exact, so that it is a bias and a mask."""
    problem = parse_problem("b2 h2/1 q3 k4 d8 fp32 bias=qk mask=qk bwd")
    per_key, factor, per_query, least = asked()["given"]
    back = torch.arange(4) - torch.arange(3)[:, None]
    bias = torch.where(back.abs() < least, 0.0, per_key * factor + per_query[:, None])
    values = inputs.draw(problem, seed=1) | {"bias": bias[None, None], "mask": (back != 0)[None, None]}
    check(problem, values, bias=None, mask=None, **asked())


def test_gradients_are_those_of_finite_differences() -> None:
    """A row that the functions let see nothing is empty."""
    assert gradcheck(lambda *qkv: attention(*qkv, **asked(), return_lse=True), small(torch.float64), fast_mode=True)
    bent = {"functions": "tanh softcap", "given": (0.75,)}
    assert gradcheck(lambda *qkv: attention(*qkv, **bent, return_lse=True), small(torch.float64), fast_mode=True)
    q, k, v = small()
    out, lse = attention(q, k, v, functions="none of the first", return_lse=True)
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -torch.inf).all() and lse[:, :, 1:].isfinite().all()
    assert (grad(out.sum(), q)[0][:, :, 0] == 0).all()


def test_a_backward_pass_without_a_slope_is_refused() -> None:
    q, k, v = small()
    out = attention(q, k, v, **asked() | {"functions": "slopeless"})
    with pytest.raises(ValueError, match="`slopeless` have no backward pass: register the derivative of their score"):
        out.sum().backward()
    with torch.no_grad():
        assert attention(q, k, v, **asked() | {"functions": "slopeless"}).shape == out.shape


# ---------------------------------------------------------------------------------------------------------------------
# What PyTorch asks of an operator
# ---------------------------------------------------------------------------------------------------------------------


def test_opcheck_of_the_operator() -> None:
    per_key, factor, per_query, least = asked()["given"]
    named = dict.fromkeys(("window_left", "window_right", "scale", "softcap", "chunk", "dropout", "dropout_seed"))
    named |= {"functions": "mixed", "given_kinds": "tfti", "given_floats": [factor], "given_ints": [least]}
    tensors = [
        *small(),
        *[None] * sum(each.kind == "Tensor" for each in VARIANTS),
        per_key,
        per_query,
        *[None] * (len(SLOTS) - 2),
    ]
    torch.library.opcheck(
        torch.ops.flashtune.attention_varied_fwd.default, tensors,
        named | {"top_left": False, "config": "", "backward_config": ""},
    )  # fmt: skip


def test_it_compiles_into_one_graph_and_not_for_every_number() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    tensors = small()
    per_key, factor, per_query, _ = asked()["given"]

    def call(least: int) -> tuple[Tensor, ...]:
        out = attention(*tensors, functions="mixed", given=(per_key, factor, per_query, least))
        return (out, *grad(out.sum(), tensors))

    compiled = torch.compile(
        lambda least: attention(*tensors, functions="mixed", given=(per_key, factor, per_query, least)),
        fullgraph=True, backend=counter,
    )  # fmt: skip
    for least in (2, 3, 4, 0):
        out = compiled(least)
        assert all(map(torch.equal, (out, *grad(out.sum(), tensors)), call(least)))
    assert counter.frame_count <= 3  # 0 and 1 are always compiled for


def test_meta_tensors_have_shapes_and_gradients() -> None:
    per_key, factor, per_query, least = asked()["given"]
    q, k, v = (tensor.detach().to("meta").requires_grad_() for tensor in small())
    given = (per_key.to("meta"), factor, per_query.to("meta"), least)
    out = attention(q, k, v, functions="mixed", given=given)
    assert out.shape == (1, 2, 3, 2) and grad(out.sum(), k)[0].shape == k.shape
    with pytest.raises(ValueError, match="`slopeless` have no backward pass"):
        attention(q, k, v, functions="slopeless", given=given).sum().backward()


def test_a_lookup_is_told_of_functions() -> None:
    questions: list[Question] = []
    attention(*small(), **asked(), softcap=1.0, lookup=questions.append)
    assert [question.variants for question in questions] == [("softcap", "functions")] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Names and refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_a_name_never_means_something_else() -> None:
    assert register_functions("mixed", score=mixed, slope=slope_of_mixed, allowed=not_itself) == "mixed"
    for others in ({"score": mixed}, {"allowed": not_itself}, {"score": mixed, "slope": mixed, "allowed": not_itself}):
        with pytest.raises(ValueError, match="`mixed` is the name of other functions already"):
            register_functions("mixed", **others)


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"score": lambda x: x}, "score must be a `@triton.jit` function, found <function"),
        ({"score": not_itself}, r"score must have 6 parameters, found \(batch, head, query, key, given\)"),
        ({"allowed": mixed}, "allowed must have 5 parameters"),
        ({"allowed": not_itself, "slope": mixed}, "has a slope without the score"),
        ({}, "needs a name, and a score or allowed function"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(named: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        register_functions("wrong", **named)
    assert "wrong" not in functions._REGISTERED


def test_the_interpreter_must_find_its_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(globals(), "tl")
    with pytest.raises(ValueError, match="the module of allowed must import triton.language"):
        register_functions("wrong", allowed=not_itself)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_unknown_name_is_refused(device: str) -> None:
    with pytest.raises(
        ValueError, match=r"no functions are registered as `mixt` \(known: dilated, mixed, .*tanh softcap\)"
    ):
        attention(*(tensor.to(device) for tensor in small()), functions="mixt")


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (("a",), TypeError, "tensors, whole numbers and floating-point numbers, found 'a'"),
        ((True,), TypeError, "found True"),
        ((torch.zeros(1),) * 5, ValueError, "given holds at most 4 tensors, found 5"),
        ((torch.zeros(1, device="meta"), 0.5, torch.zeros(3), 1), ValueError, r"q on cpu and given\[0\] on meta"),
    ],
)
def test_what_functions_cannot_be_given_is_refused(given: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        attention(*small(), functions="mixed", given=given)


def test_an_example_that_is_wrong_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    problem = parse_problem("b1 h1 s9 d8 fp32 causal softcap=2.0 bwd")
    with pytest.raises(SystemExit, match="times its bound"):
        judging.report(problem, inputs.draw(problem, seed=1), tanh_softcap.ours, dilated_window.reference)
    assert "The largest error is" in capsys.readouterr().out
