"""The variants of the operation in Triton's interpreter. Run by `test_operation.py`."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import grad, gradcheck

from harness import inputs, oracle, problem
from harness.operation import supported
from harness.problem import parse_problem
from harness.quicken import quicken
from kernels import flash_bwd, flash_fwd, functions
from kernels.attention import Question, attention
from kernels.operators import VARIANTS
from tests.kernels.cases import FORWARD
from tests.operation.questions import check, drawn, small

quicken()

ALONE = (
    "softcap=1.5 fp16", "softcap=0.5 causal fp32", "alibi causal bf16", "alibi top-left window=4:6 fp32", "bias=bhqk bf16",
    "bias=hk causal fp16", "bias=1 fp32", "sinks causal bf16", "sinks fp32", "dropout=0.3 bf16", "prefix causal fp16",
    "chunk=6 bf16", "documents causal fp32", "mask=bk bf16", "mask=bhqk causal fp32", "lse-grad causal fp32", "lse-grad bf16",
    "packed=3 causal bf16", "packed=2 window=3:5 top-left fp32", "nondeterministic causal bf16",
)  # fmt: skip
TOGETHER = (
    "softcap=1.0 alibi bias=hqk sinks dropout=0.5 prefix chunk=7 documents mask=bqk lse-grad bf16",
    "packed=3 causal softcap=1.0 alibi sinks dropout=0.2 prefix chunk=5 documents lse-grad fp16",
    "causal prefix documents sinks lse-grad fp32", "causal window=9 softcap=2.0 dropout=0.2 bias=bq fp16",
)  # fmt: skip


def described(words: str) -> problem.Problem:
    """More queries than keys: where the band is narrow, some rows see nothing."""
    return parse_problem(f"{'b1' if 'packed' in words else 'b2'} h4/2 q20 k17 d16/8 {words} bwd")


@pytest.mark.parametrize("words", [*ALONE, *TOGETHER])
def test_results_lie_within_their_bounds(words: str) -> None:
    check(described(words), inputs.draw(described(words), seed=1))


def test_there_is_a_problem_for_everything_that_the_kernels_take() -> None:
    """And `attention` takes everything that both kernels take, under its name."""
    taken = [
        set(supported(inspect.signature(kernel.launches).parameters, kernel.PASS)) for kernel in (flash_fwd, flash_bwd)
    ]
    assert {name for words in ALONE for name in described(words).variants} == taken[0] | taken[1]
    parameters = set(inspect.signature(attention).parameters)
    assert {"lse_grad", "nondeterministic", *supported(parameters, "fwd")} == taken[0] | taken[1]
    assert {each.name for each in VARIANTS} < parameters


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------------------------------


def added(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every variant for `small`: all rows see something."""
    bias, sinks = drawn((1, 2, 1, 4), (2,), dtype=dtype, seed=3)
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask[0, 0, 1, 2] = False
    return {
        "softcap": 1.5, "bias": bias, "sinks": sinks, "slopes": torch.tensor([0.5, 0.25]), "mask": mask,
        "prefix": torch.tensor([2]), "q_documents": torch.tensor([[1, 2, 1]]), "kv_documents": torch.tensor([[1, 1, 2, 2]]),
        "chunk": 3, "dropout": 0.4, "dropout_seed": 5,
    }  # fmt: skip


SHARES: tuple[tuple[str, ...], ...] = (
    ("softcap", "sinks"), ("slopes", "mask"), ("bias", "dropout", "dropout_seed"), ("prefix", "chunk"), tuple(added()),
)  # fmt: skip


def leaves_of(asked: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in asked.items() if isinstance(value, Tensor) and value.requires_grad}


@pytest.mark.parametrize("names", SHARES, ids="+".join)
def test_gradients_are_those_of_finite_differences(names: tuple[str, ...]) -> None:
    """Of out and of lse; q, k, v, bias and sinks move. Five keys of the first group, so that no row is empty."""
    asked = {name: value for name, value in added(torch.float64).items() if name in names}
    leaves = leaves_of(asked)

    def call(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Any:
        found = attention(q, k, v, **asked | dict(zip(leaves, learned, strict=True)), return_lse=True, causal=True)
        assert found[1].isfinite().all()
        return found

    assert gradcheck(call, (*small(torch.float64), *leaves.values()), fast_mode=True)


def test_one_number_may_stand_for_all_heads_and_batches() -> None:
    q, k, v = (tensor.expand(2, -1, -1, -1) for tensor in small())
    slopes, sink = torch.tensor([0.5, 0.25]), torch.tensor([0.3], requires_grad=True)
    short = attention(q, k, v, slopes=slopes, sinks=sink)
    long = attention(
        q, k, v, slopes=slopes.expand(2, 2), sinks=(spread := sink.detach().expand(2).clone().requires_grad_())
    )
    assert torch.equal(short, long)
    assert torch.equal(grad(short.sum(), sink)[0], grad(long.sum(), spread)[0].sum(0, keepdim=True))


def test_nothing_that_comes_back_to_an_empty_row_reaches_a_gradient() -> None:
    q, k, v = drawn((1, 1, 3, 4), (1, 1, 2, 4), (1, 1, 2, 4))
    (bias,) = drawn((1, 1, 1, 2))
    out, lse = attention(
        q, k, v, causal=True, bias=bias, softcap=2.0, mask=torch.ones(1, 1, 1, 2).bool(), return_lse=True
    )
    for upstream in (torch.nan, torch.inf):
        gradients = grad(
            (out, lse),
            (q, k, v, bias),
            (torch.ones_like(out), torch.tensor([[[upstream, 1.0, 1.0]]])),
            retain_graph=True,
        )
        assert all(gradient.isfinite().all() for gradient in gradients)
    out, lse = attention(q, k, v, causal=True, sinks=(sinks := torch.zeros(1, requires_grad=True)), return_lse=True)
    assert lse[0, 0, 0] == 0 and grad(lse[0, 0, 0], sinks)[0] == 1


def test_second_derivatives_are_refused() -> None:
    q, k, v = small()
    asked = added()
    dbias, dsinks = grad(attention(q, k, v, **asked).sum(), (asked["bias"], asked["sinks"]), create_graph=True)
    for gradient in (dbias, dsinks):
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            grad(gradient.sum(), q, retain_graph=True)


def test_no_gradient_of_a_variant_is_computed_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    kernel = flash_bwd.flash_bwd

    def watched(*tensors: Tensor, **named: Any) -> Any:
        asked.append([name for name in ("dbias", "dsinks", "dlse") if named.get(name) is not None])
        return kernel(*tensors, **named)

    monkeypatch.setattr(flash_bwd, "flash_bwd", watched)
    q, k, v = small()
    bias, sinks = (added()[name] for name in ("bias", "sinks"))
    for variants in ({"bias": bias.detach(), "sinks": sinks}, {"bias": bias}, {"bias": bias.detach()}, {}):
        leaves = leaves_of(variants)
        found = grad(attention(q, k, v, **variants).sum(), [q, *leaves.values()])
        assert [each.shape for each in found] == [q.shape, *(each.shape for each in leaves.values())]
    assert asked == [["dsinks"], ["dbias"], [], []]


@pytest.mark.parametrize("name", ["slopes", "given"])
def test_a_gradient_that_does_not_exist_is_refused_and_not_taken_for_zero(name: str) -> None:
    q, k, v = small()
    slopes = torch.ones(2, requires_grad=True)
    asked = {"slopes": slopes} if name == "slopes" else {"functions": "never registered", "given": (slopes,)}
    with pytest.raises(NotImplementedError, match=f"{name}.* requires a gradient, and attention has none of it"):
        attention(q, k, v, **asked)
    with torch.no_grad():
        assert attention(q, k, v, slopes=slopes).shape == (1, 2, 3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


SEEDS = (0, 7, (1 << 32) + 7, (1 << 63) - 1)


def kept(seed: int, **more: Any) -> tuple[Tensor, Tensor]:
    """Which pairs of 9 queries and 16 keys dropout keeps: in the forward pass, and of the last query in the backward pass."""
    q, k = (tensor.detach() for tensor in drawn((2, 2, 9, 16), (2, 2, 16, 16)))
    v = torch.eye(16).expand(2, 2, -1, -1).clone().requires_grad_()
    out = attention(q, k, v, dropout=0.3, dropout_seed=seed, **more)
    return out.detach() != 0, grad(out[:, :, 8].sum(), v)[0][..., 0] != 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_says_which_weights_are_dropped_in_both_passes(seed: int) -> None:
    seen, felt = kept(seed)
    batch, head, query, key = np.meshgrid(*map(np.arange, seen.shape), indexing="ij")
    expected = oracle.philox((key, query, head, batch), seed) >= round(0.3 * 2**32)
    assert np.array_equal(seen, expected) and torch.equal(seen[:, :, 8], felt)


def test_other_tiles_drop_the_same_weights_and_another_seed_others() -> None:
    seen, _ = kept(SEEDS[0])
    assert torch.equal(seen, kept(SEEDS[0], config=FORWARD | {"block_n": 16})[0])
    assert not any(torch.equal(seen, kept(seed)[0]) for seed in SEEDS[1:])


# ---------------------------------------------------------------------------------------------------------------------
# What PyTorch asks of an operator
# ---------------------------------------------------------------------------------------------------------------------

SAID = {
    "scale": None, "window_left": None, "window_right": 0, "top_left": False, "softcap": 1.5, "chunk": 3, "dropout": 0.4,
    "dropout_seed": 5, "functions": "", "given_kinds": "", "given_floats": [], "given_ints": [], "config": "",
}  # fmt: skip


def tensors_of(asked: dict[str, Any]) -> list[Tensor | None]:
    """The optional tensors of the operators, in their order."""
    found = [asked.get(each.name) for each in VARIANTS if each.kind == "Tensor"]
    return [tensor[None] if tensor is asked["slopes"] else tensor for tensor in found] + [None] * functions.MOST_TENSORS


def test_opcheck_of_the_forward_operator() -> None:
    tensors = [*small(), *tensors_of(added())]
    torch.library.opcheck(torch.ops.flashtune.attention_varied_fwd.default, tensors, SAID | {"backward_config": ""})


def test_opcheck_of_the_backward_operator() -> None:
    asked = {name: value.detach() if isinstance(value, Tensor) else value for name, value in added().items()}
    q, k, v = (tensor.detach() for tensor in small())
    out, lse = attention(q, k, v, **asked, causal=True, return_lse=True)
    tensors = (q, k, v, *tensors_of(asked), out, lse, torch.ones_like(out), torch.ones_like(lse))
    torch.library.opcheck(torch.ops.flashtune.attention_varied_bwd.default, tensors, SAID | {"wanted": [False, True]})


def test_it_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    asked, tensors = added(), small()
    leaves = [*tensors, *leaves_of(asked).values()]

    def call(q: Tensor, k: Tensor, v: Tensor, asked: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, **asked, causal=True, return_lse=True)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out, lse = function(*tensors, asked)
        results.append([out, lse, *grad(out.sum() + lse.sum(), leaves)])
    assert all(map(torch.equal, *results))


def test_packed_sequences_compile_into_one_graph() -> None:
    torch._dynamo.reset()
    q_starts, kv_starts = (torch.tensor([0, 1, end], dtype=torch.int32) for end in (3, 4))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, q_starts=q_starts, kv_starts=kv_starts)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(*(tensors := small()))
        results.append([out, *grad(out.sum(), tensors)])
    assert all(map(torch.equal, *results))
    q, k, v = small()
    apart = [attention(q[:, :, a], k[:, :, b], v[:, :, b]) for a, b in ((slice(0, 1),) * 2, (slice(1, 3), slice(1, 4)))]
    assert torch.equal(results[0][0], torch.cat(apart, 2))


def test_it_does_not_compile_for_every_seed() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    tensors = small()
    compiled = torch.compile(
        lambda seed: attention(*tensors, dropout=0.5, dropout_seed=seed), fullgraph=True, backend=counter
    )
    for seed in (7, 1 << 40, 12, (1 << 63) - 1):
        assert torch.equal(compiled(seed), attention(*tensors, dropout=0.5, dropout_seed=seed))
    assert counter.frame_count <= 2


def test_meta_tensors_have_shapes_types_and_gradients() -> None:
    asked = {name: value.detach().to("meta") if isinstance(value, Tensor) else value for name, value in added().items()}
    leaves = {name: asked[name].requires_grad_() for name in ("bias", "sinks")}
    q, k, v = (tensor.detach().to("meta", torch.bfloat16).requires_grad_() for tensor in small())
    out = attention(q, k, v, **asked)
    assert (out.shape, out.dtype, out.device.type) == ((1, 2, 3, 2), torch.bfloat16, "meta")
    for gradient, tensor in zip(grad(out.sum(), (q, *leaves.values())), (q, *leaves.values()), strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)


def test_autocast_casts_a_bias_and_leaves_sinks() -> None:
    q, k, v = small()
    bias, sinks = (added()[name] for name in ("bias", "sinks"))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, bias=bias, sinks=sinks)
    cast = [tensor.detach().bfloat16().requires_grad_() for tensor in (q, k, v, bias)]
    same = attention(*cast[:3], bias=cast[3], sinks=sinks)
    assert out.dtype == torch.bfloat16 and torch.equal(out, same)
    for found, expected in zip(grad(out.sum(), (bias, sinks)), grad(same.sum(), (cast[3], sinks)), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected.float())


def test_a_lookup_is_told_the_variants() -> None:
    questions: list[Question] = []
    attention(*small(), softcap=2.0, dropout=0.0, sinks=torch.zeros(2), lookup=questions.append)
    assert [question.variants for question in questions] == [("sinks", "softcap")] * 2
    questions.clear()
    with torch.no_grad():
        attention(*small(), bias=added()["bias"], lookup=questions.append)
    learned = {"bias": added()["bias"]}
    attention(*(tensor.detach() for tensor in small()), **learned, lookup=questions.append)
    assert [question.pass_ for question in questions] == ["fwd", "fwd", "bwd"]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"softcap": 0.0}, "softcap must be positive, found 0.0"),
    ({"chunk": 0}, "chunk must be at least 1, found 0"),
    ({"dropout": 1.0, "dropout_seed": 1}, "below 1, found 1.0"),
    ({"dropout": 0.1}, "dropout needs a dropout_seed, another one at every call"),
    ({"dropout": 0.1, "dropout_seed": -1}, "at least 0 and below 2^63, found -1"),
    ({"q_documents": torch.zeros(1, 3)}, "for the queries and for the keys, or for neither"),
    ({"mask": torch.zeros(1, 1, 3, 4)}, "mask must be boolean, found torch.float32"),
    ({"bias": torch.zeros(1, 3, 3, 4)}, "bias must have the shape"),
    ({"bias": torch.zeros(3, 4)}, "bias must have the shape"),
    ({"slopes": torch.zeros(3)}, "slopes must have the shape"),
    ({"sinks": torch.zeros(3)}, "sinks must have the shape"),
    ({"prefix": torch.zeros(2)}, "prefix must have the shape"),
    ({"q_starts": torch.tensor([0, 3], dtype=torch.int32)}, "for the queries and for the keys, or for neither"),
    ({"q_starts": torch.tensor([0, 3]), "kv_starts": torch.tensor([0, 4])}, "q_starts must be int32"),
    ({"given": (1,)}, "given is for functions, and there are none"),
)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("asked", "says"), REFUSED)
def test_what_does_not_go_together_is_refused(asked: dict[str, Any], says: str, device: str) -> None:
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in asked.items()}
    with pytest.raises(ValueError, match=says.replace("^", r"\^")):
        attention(*(tensor.detach().to(device) for tensor in small()), **moved)


def test_a_word_that_means_nothing_is_refused() -> None:
    with pytest.raises(TypeError, match="is_causal"):
        attention(*small(), is_causal=True)  # type: ignore[call-arg]


def test_all_tensors_must_lie_on_one_device() -> None:
    with pytest.raises(ValueError, match="found q on cpu and sinks on meta"):
        attention(*small(), sinks=torch.zeros(2, device="meta"))
