"""The operation in Triton's interpreter: values, gradients, and what PyTorch asks of an operator. Run by `test_operation.py`."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, grad, gradcheck

from harness import inputs
from harness.inputs import Placement
from harness.problem import parse_problem
from harness.quicken import quicken
from kernels import flash_bwd, flash_fwd, operators
from kernels.attention import Question, attention, config_text
from tests.kernels.cases import BACKWARD, FORWARD
from tests.operation.questions import check, drawn, small

quicken()

FORWARD_OP = torch.ops.flashtune.attention_fwd.default
BACKWARD_OP = torch.ops.flashtune.attention_bwd.default
SETTINGS: dict[str, Any] = {
    "scale": None, "window_left": None, "window_right": 0, "top_left": False, "config": "", "backward_config": "",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients
# ---------------------------------------------------------------------------------------------------------------------

WORDS = ("", "causal", "causal top-left window=9", "window=3:5 scale=-0.3")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("words", WORDS)
def test_results_lie_within_their_bounds(words: str, dtype: str) -> None:
    problem = parse_problem(f"b2 h4/2 q17 k20 d16/8 {dtype} {words} bwd")
    check(problem, inputs.draw(problem, seed=1))


@pytest.mark.parametrize("lies", ["bshd", "sbhd", "padded", "columns first", "expanded"])
def test_tensors_may_lie_anyhow(lies: str) -> None:
    problem = parse_problem("b2 h2/1 q9 k7 d16 bf16 causal bwd")
    ways = {
        "bshd": Placement(order=(0, 2, 1, 3)), "sbhd": Placement(order=(2, 0, 1, 3)),
        "padded": Placement(order=(0, 1, 2, 3), row_padding=3, shift=1), "columns first": Placement(order=(0, 1, 3, 2)),
        "expanded": Placement(order=(0, 1, 2, 3), expanded=(0, 2)),
    }  # fmt: skip
    drawn_values = inputs.draw(problem, seed=2)
    check(problem, {name: inputs.place(name, tensor, ways[lies]).view for name, tensor in drawn_values.items()})


def test_rows_that_see_nothing_and_lengths_of_nothing() -> None:
    q, k, v = (tensor.detach().requires_grad_() for tensor in drawn((1, 1, 5, 8), (1, 1, 3, 8), (1, 1, 3, 8)))
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    dq, _, _ = grad(out.sum() + lse[..., 2:].sum(), (q, k, v))
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -math.inf).all() and (dq[:, :, :2] == 0).all()
    nothing = torch.empty(1, 1, 0, 8, requires_grad=True)
    out = attention(q, nothing, nothing)
    assert (out == 0).all() and (grad(out.sum(), q)[0] == 0).all()
    assert attention(nothing, k, v).shape == (1, 1, 0, 8)
    assert (grad(attention(nothing, k, v).sum(), k)[0] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------------------------------


def test_gradients_of_out_and_lse_are_those_of_finite_differences() -> None:
    shapes = (1, 1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 1)
    assert gradcheck(lambda *qkv: attention(*qkv, causal=True, return_lse=True), drawn(*shapes, dtype=torch.float64))


@pytest.mark.parametrize(
    "asked",
    [
        {"causal": True},
        {"causal": True, "top_left": True, "return_lse": True},
        {"window": (1, 1), "scale": -0.7},
        {"window": (None, 1), "return_lse": True},
    ],
)
def test_gradients_in_random_directions(asked: dict[str, Any]) -> None:
    """Five queries and three keys: of the problems without lse, some have rows that see nothing, whose lse is infinite."""
    lengths = (2, 3) if "return_lse" in asked else (5, 3)
    shapes = (2, 2, lengths[0], 3), (2, 1, lengths[1], 3), (2, 1, lengths[1], 2)
    assert gradcheck(lambda *qkv: attention(*qkv, **asked), drawn(*shapes, dtype=torch.float64), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradient_of_lse_alone(dtype: torch.dtype) -> None:
    """d sum(lse) / dk = scale P^T q, which is scale times the gradient dv of out under dout = q; to the bit, because the same
    numbers are rounded, if the scale is a power of two and dv is as wide as dk."""
    q, k, v = drawn((1, 2, 17, 16), (1, 1, 20, 16), (1, 1, 20, 16), dtype=dtype)
    out, lse = attention(q, k, v, scale=0.25, causal=True, return_lse=True)
    dq, dk, dv = grad(lse.sum(), (q, k, v), retain_graph=True)
    assert torch.equal(dk, 0.25 * grad(out, v, q)[0]) and dk.abs().max() > 0
    assert (dv == 0).all() and dq.abs().max() > 0


def test_gradients_of_out_and_lse_together_are_their_sum() -> None:
    """Softmax weights of a split attention: merging two halves of the keys gives the gradients of the whole."""
    q, k, v = drawn((1, 1, 3, 2), (1, 1, 4, 2), (1, 1, 4, 2), dtype=torch.float64)

    def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        halves = [attention(q, k[:, :, half], v[:, :, half], return_lse=True) for half in (slice(0, 2), slice(2, 4))]
        weights = torch.softmax(torch.stack([lse for _, lse in halves]), 0)
        return (weights[..., None] * torch.stack([out for out, _ in halves])).sum(0)

    assert gradcheck(merged, (q, k, v), fast_mode=True)


def test_what_comes_back_to_the_lse_of_an_empty_row_is_nothing() -> None:
    q, k, v = drawn((1, 1, 3, 4), (1, 1, 2, 4), (1, 1, 2, 4))
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    upstream = torch.tensor([[[math.nan, 1.0, 1.0]]])
    for gradient in grad((out, lse), (q, k, v), (torch.ones_like(out), upstream)):
        assert gradient.isfinite().all()


def test_only_what_is_needed_is_given() -> None:
    q, k, v = small()
    out = attention(q, k.detach(), v)
    dq, dv = grad(out.sum(), (q, v))
    assert dq.shape == q.shape and dv.shape == v.shape
    assert not attention(q.detach(), k.detach(), v.detach()).requires_grad
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad


def test_second_derivatives_are_refused() -> None:
    q, k, v = small()
    (dq,) = grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad(dq.sum(), q)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning"
)  # PyTorch's own, when it makes a dual number
def test_forward_mode_is_refused() -> None:
    """PyTorch itself would say that the derivative is 0."""
    q, k, v = (tensor.detach() for tensor in small())
    with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        torch.func.jvp(lambda k: attention(q, k, v), (k,), (k,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        attention(forward_ad.make_dual(q, q), k, v)


def test_equal_inputs_give_equal_bits() -> None:
    q, k, v = drawn((1, 4, 40, 16), (1, 2, 40, 16), (1, 2, 40, 16), dtype=torch.float16)
    first, second = (grad(attention(q, k, v, causal=True).sum(), (q, k, v)) for _ in range(2))
    assert all(map(torch.equal, first, second))


# ---------------------------------------------------------------------------------------------------------------------
# What PyTorch asks of an operator
# ---------------------------------------------------------------------------------------------------------------------


def test_opcheck_of_the_forward_operator() -> None:
    torch.library.opcheck(FORWARD_OP, small(), SETTINGS)
    torch.library.opcheck(
        FORWARD_OP, [tensor.detach().transpose(1, 2) for tensor in drawn(*[(1, 3, 1, 4)] * 3)], SETTINGS
    )


def test_opcheck_of_the_backward_operator() -> None:
    q, k, v = (tensor.detach() for tensor in small())
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    settings = {name: value for name, value in SETTINGS.items() if name != "backward_config"} | {"wanted": []}
    torch.library.opcheck(BACKWARD_OP, (q, k, v, out, lse, torch.ones_like(out), None), settings)
    torch.library.opcheck(BACKWARD_OP, (q, k, v, out, lse, torch.ones_like(out), torch.ones_like(lse)), settings)


def look_up(question: Question) -> dict[str, Any] | None:
    return {"fwd": dict(FORWARD), "bwd": dict(BACKWARD)}.get(question.pass_) if question.q_len > 2 else None


CALLS = {
    "flags": lambda q, k, v: attention(q, k, v, scale=0.3, causal=True, window=(2, None), top_left=True),
    "configs": lambda q, k, v: attention(q, k, v, config=FORWARD, backward_config=BACKWARD),
    "lookup": lambda q, k, v: attention(q, k, v, causal=True, lookup=look_up),
    "lse": lambda q, k, v: sum(each.float().sum() for each in attention(q, k, v, return_lse=True)),
    "scaled": lambda q, k, v: attention(q * 2, k, v).relu(),
}


def autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attention(q, k, v)


@pytest.mark.parametrize("name", [*CALLS, "autocast"])
def test_it_compiles_into_one_graph(name: str) -> None:
    torch._dynamo.reset()
    function = CALLS.get(name, autocast)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = small()
    for call in (compiled, function):
        out = call(*tensors)
        found = (out, *grad(out.sum(), tensors))
        if call is compiled:
            expected = found
    assert all(map(torch.equal, found, expected))


def test_it_compiles_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, causal=True), fullgraph=True, dynamic=True, backend=counter
    )
    for length in (3, 5, 9):
        tensors = drawn((2, 2, length, 16), (2, 2, length + 1, 16), (2, 2, length + 1, 16))
        assert torch.equal(compiled(*tensors), attention(*tensors, causal=True))
    assert counter.frame_count == 1


def test_it_can_be_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, causal=True)

    tensors = [tensor.detach() for tensor in small()]
    program = torch.export.export(Model(), tuple(tensors))
    assert "flashtune.attention_fwd" in str(program.graph)
    assert torch.equal(program.module()(*tensors), attention(*tensors, causal=True))


def test_meta_tensors_have_shapes_types_and_gradients() -> None:
    q, k, v = (tensor.detach().to("meta", torch.bfloat16).requires_grad_() for tensor in small())
    out, lse = attention(q, k, v, return_lse=True, lookup=look_up)
    assert (out.shape, out.dtype, out.device.type) == ((1, 2, 3, 2), torch.bfloat16, "meta")
    assert (lse.shape, lse.dtype) == ((1, 2, 3), torch.float32)
    for gradient, tensor in zip(grad(out.sum() + lse.sum(), (q, k, v)), (q, k, v), strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
    with pytest.raises(ValueError, match="must be a multiple of key/value heads"):
        attention(torch.zeros(1, 3, 3, 4, device="meta"), *(torch.zeros(1, 2, 4, 4, device="meta") for _ in "kv"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_to_its_type(dtype: torch.dtype) -> None:
    q, k, v = small()
    with torch.autocast("cpu", dtype):
        out, lse = attention(q, k.to(dtype), v, return_lse=True)
        assert attention(*small(torch.float64)).dtype == torch.float64
    assert out.dtype == dtype and lse.dtype == torch.float32
    cast = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
    same = attention(*cast)
    assert torch.equal(out, same)
    for found, expected in zip(grad(out.sum(), (q, v)), grad(same.sum(), (cast[0], cast[2])), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected.float())
    assert attention(q, k, v).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The configurations that reach the kernels, in the order of the calls."""
    found: list[dict[str, Any]] = []

    def watched(kernel: Any) -> Any:
        def call(*tensors: Tensor, config: Any, **named: Any) -> Any:
            found.append(dict(config))
            return kernel(*tensors, config=config, **named)

        return call

    monkeypatch.setattr(flash_fwd, "flash_fwd", watched(flash_fwd.flash_fwd))
    monkeypatch.setattr(flash_bwd, "flash_bwd", watched(flash_bwd.flash_bwd))
    return found


def test_a_given_config_comes_before_a_known_one_and_that_before_the_safe_one(taken: list[dict[str, Any]]) -> None:
    q, k, v = small()
    known = {"fwd": FORWARD | {"block_m": 128}, "bwd": BACKWARD | {"dq_block_m": 128}}
    safe = [flash_fwd.safe_config(q, v), flash_bwd.safe_config(q, v)]
    for given, lookup, expected in (
        ((FORWARD, BACKWARD), lambda question: known[question.pass_], [dict(FORWARD), dict(BACKWARD)]),
        ((None, None), lambda question: known[question.pass_], [known["fwd"], known["bwd"]]),
        ((None, BACKWARD), lambda question: known[question.pass_], [known["fwd"], dict(BACKWARD)]),
        ((None, None), lambda question: None, safe),
        ((None, None), None, safe),
    ):
        attention(q, k, v, config=given[0], backward_config=given[1], lookup=lookup).sum().backward()
        assert taken == expected
        taken.clear()


def test_a_lookup_is_told_everything_and_is_not_asked_in_vain() -> None:
    questions: list[Question] = []
    q, k, v = small(torch.float16)
    attention(q, k, v, causal=True, window=(2, None), top_left=True, deterministic=False, lookup=questions.append)
    assert questions[0] == Question(
        pass_="fwd", batch=1, q_heads=2, kv_heads=1, q_len=3, kv_len=4, head_dim=4, v_head_dim=2, dtype=torch.float16,
        device=torch.device("cpu"), window_left=2, window_right=0, top_left=True, deterministic=False, variants=(),
    )  # fmt: skip
    assert [question.pass_ for question in questions] == ["fwd", "bwd"]
    questions.clear()
    attention(q, k, v, config=FORWARD, backward_config=BACKWARD, lookup=questions.append)
    assert not questions
    attention(q.detach(), k.detach(), v.detach(), lookup=questions.append)
    with torch.no_grad():
        attention(q, k, v, lookup=questions.append)
    assert [question.pass_ for question in questions] == ["fwd", "fwd"]


def test_a_config_travels_unchanged() -> None:
    for config in (FORWARD, BACKWARD, {}):
        assert operators._read_config(config_text(config)) == config
    assert config_text({"b": True, "a": -1, "c": "x"}) == '{"a":-1,"b":true,"c":"x"}' and config_text(None) == ""
    with pytest.raises(TypeError, match=r"found block_m = 64\.0"):
        config_text({"block_m": 64.0})
    with pytest.raises(TypeError, match="without quotes"):
        config_text({"load": 'p"'})


def test_a_config_of_other_tunables_is_refused() -> None:
    q, k, v = small()
    with pytest.raises(ValueError, match=r"without load and with laod, which it does not have"):
        attention(q, k, v, config={**{name: FORWARD[name] for name in FORWARD if name != "load"}, "laod": "tma"})
    with pytest.raises(ValueError, match="every tunable of flash_bwd"):
        attention(q, k, v, backward_config=FORWARD).sum().backward()


def test_descriptors_get_what_they_can_describe(taken: list[dict[str, Any]]) -> None:
    """A gradient of stride 0, inputs that lie across, heads that are one, under configs tuned for tensors that lie plainly."""
    q, k, v = drawn(*[(1, 2, 20, 16)] * 3)
    q = q.detach().mT.contiguous().mT
    found = []
    for load in ("pointer", "tma", "tma_kv"):
        backward = "tma" if load == "tma_kv" else load
        configs = FORWARD | {"load": load}, BACKWARD | {"dkdv_load": backward, "dq_load": backward}
        results = []
        for across in (q, k[:, :1].expand(-1, 2, -1, -1)):
            out = attention(across, k[:, :1], v[:, :1], config=configs[0], backward_config=configs[1])
            results += [out, *grad(out.sum(), (k, v))]
        found.append(results)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])
    assert taken[-1]["dq_load"] == "tma"


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"window": (-1, None)}, "left side of window must be at least 0, found -1; None is no bound"),
        ({"window": (None, -1)}, "right side of window must be at least 0"),
        ({"window": (3, 1), "causal": True}, "found a right side of 1; leave out causal"),
        ({"scale": math.nan}, "scale must be None or a finite number, found nan"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attention(*small(), **asked)


def test_tensors_that_do_not_go_together_are_refused() -> None:
    q, k, v = (tensor.detach() for tensor in small())
    for tensors, says in (
        ((q, k[0], v), "must have four axes"),
        ((q, k.half(), v), "k must have the type of q"),
        ((q, k, v[:, :, 1:]), "v must have the shape"),
        ((q.long(), k.long(), v.long()), "must be fp16, bf16 or fp32"),
    ):
        for lookup in (None, look_up):
            with pytest.raises(ValueError, match=says):
                attention(*tensors, lookup=lookup)
    with pytest.raises(ValueError, match="on one device, found q on cpu and k on meta"):
        operators.run_forward({"q": q, "k": k.to("meta"), "v": v}, {"scale": None}, "")
