"""Types of 8 bits in Triton's interpreter. Run by `test_kernels.py` in a process of its own."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from harness import inputs, oracle
from harness.inputs import Placement
from harness.operation import SCALES
from harness.problem import parse_problem
from harness.quicken import quicken
from kernels import flash_bwd, flash_decode, flash_fwd
from kernels.primitives import rounded, widened
from tests.kernels.cases import ask, check

quicken()

TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def widen(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(y + at, widened(tl.load(x + at), tl.float32))


@triton.jit
def narrow(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(y + at, rounded(tl.load(x + at), y.dtype.element_ty))


def every(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype)


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bits, of any NaN those of one."""
    whole = values.view({1: torch.uint8, 4: torch.int32}[values.element_size()])
    return whole.masked_fill(values.float().isnan(), 0x7F)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_is_widened_as_torch_does(dtype: torch.dtype) -> None:
    wide = torch.empty(256)
    widen[(1,)](every(dtype), wide, 256)
    assert torch.equal(bits(wide), bits(every(dtype).float()))


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_are_rounded_as_torch_does_and_saturate_as_devices_do(dtype: torch.dtype) -> None:
    """Every number, every tie between two of them, their neighbours in fp32, and what is next to nothing."""
    numbers = every(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    largest = torch.finfo(dtype).max
    asked = torch.cat([numbers, ties, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, float("nan")])])
    around = torch.tensor([torch.inf])
    asked = torch.cat([asked, torch.nextafter(asked, around), torch.nextafter(asked, -around)])
    asked = torch.cat([asked, torch.randn(4096 - len(asked), generator=torch.Generator().manual_seed(3)) * 10])
    found = torch.empty(len(asked), dtype=dtype)
    narrow[(1,)](asked, found, len(asked))
    assert torch.equal(bits(found), bits(asked.clamp(-largest, largest).to(dtype)))
    beyond = torch.tensor([largest * 1.2, -largest * 64, torch.inf, -torch.inf])
    found = torch.empty(4, dtype=dtype)
    narrow[(1,)](beyond, found, 4)
    assert found.float().tolist() == [largest, -largest, largest, -largest]


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass
# ---------------------------------------------------------------------------------------------------------------------

NAMES = {torch.float8_e4m3fn: "fp8e4m3", torch.float8_e5m2: "fp8e5m2"}
QUESTIONS = (
    "b2 h4/2 q33 k70 d40/24 causal", "b1 h2 q17 k33 d16 window=9:3", "b1 h3/1 q20 k1 d64 scale=-0.3", "b1 h2 q3 k0 d32",
    "b2 h4/2 q20 k40 d32/8 sinks softcap=2.0 bias=hqk alibi dropout=0.3", "b1 h1 q33 k31 d256 causal top-left sinks",
    "b1 h4/2 q30 k50 d32 packed=4 causal sinks chunk=9", "b2 h2/1 q9 k40 d8 prefix documents mask=bk causal scale=0.0",
)  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_results_lie_within_their_bounds(dtype: torch.dtype, question: str) -> None:
    lag = 8 if "softcap" in question else 0
    check(ask(f"{question} {NAMES[dtype]}", {"lag": lag}))


@pytest.mark.parametrize("changes", [{"load": "tma"}, {"loops": "single", "programs_per_sm": 1}, {"head_chunks": True}])
def test_what_changes_no_number_changes_no_bit(changes: dict[str, Any]) -> None:
    problem = "b1 h4/2 q33 k70 d96 fp8e4m3 causal"
    plain = ask(problem)
    check(found := ask(problem, changes))
    assert "head_chunks" in changes or found.same_bits(plain)


@pytest.mark.parametrize("recipe", ["large", "outliers", "constant_rows", "integers", "counting"])
def test_other_distributions_of_inputs(recipe: str) -> None:
    """Where all scores are equal, weights are powers of two, and the output counts keys exactly."""
    answer = ask("b1 h2 q33 k66 d32 fp8e4m3 causal", recipe=recipe)
    check(answer, structured=inputs.recipe_for(recipe).structured)
    if recipe == "counting":
        truth = oracle.forward(answer.problem, answer.values)["out"]
        assert torch.equal(answer.outputs["out"], truth.to(torch.bfloat16))


@pytest.mark.parametrize("lie", [Placement(order=(1, 0)), Placement(order=(0, 1), row_padding=3, shift=1)])
@pytest.mark.parametrize("expanded", [(), (0,), (1,)])
def test_scales_lie_in_any_way(lie: Placement, expanded: tuple[int, ...]) -> None:
    lies = {name: replace(lie, expanded=expanded if name != "k_descale" else ()) for name in SCALES}
    check(ask("b2 h6/3 q17 k20 d16 fp8e5m2", placements=lies), structured=True)


def drawn(dtype: torch.dtype = torch.float8_e4m3fn) -> list[torch.Tensor]:
    return list(inputs.draw(parse_problem(f"b2 h4/2 q9 k20 d16 {NAMES[dtype]}"), seed=5).values())


def test_without_a_scale_numbers_stand_for_themselves() -> None:
    q, k, v, *_ = drawn()
    ones = torch.ones(1, 1)
    plain = flash_fwd.flash_fwd(q, k, v, window_right=0)
    scaled = flash_fwd.flash_fwd(q, k, v, window_right=0, q_descale=ones, k_descale=ones[0, 0], v_descale=ones)
    halved = flash_fwd.flash_fwd(q, k, v, window_right=0, v_descale=ones / 2)
    assert torch.equal(plain[0], scaled[0]) and torch.equal(plain[1], scaled[1])
    assert torch.equal(halved[0], plain[0] / 2) and plain[0].dtype == torch.bfloat16


def test_a_scale_of_nothing_but_zeros_leaves_every_key_the_same_weight() -> None:
    q, k, v, q_scale, k_scale, v_scale = drawn()
    found, lse = flash_fwd.flash_fwd(q, k, v, window_right=0, q_descale=q_scale * 0, k_descale=k_scale)
    even, same = flash_fwd.flash_fwd(q, k, v, window_right=0, scale=0.0)
    assert torch.equal(found, even) and torch.equal(lse, same)
    assert not flash_fwd.flash_fwd(q, k, v, v_descale=v_scale * 0)[0].any()


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_results_of_other_types(stored: torch.dtype) -> None:
    """The sums are the same, and rounded to another type at the end."""
    q, k, v, *_ = drawn()
    exact = flash_fwd.flash_fwd(q, k, v, out=torch.empty(2, 4, 9, 16))[0]
    found = flash_fwd.flash_fwd(q, k, v, out=torch.empty(2, 4, 9, 16, dtype=stored))[0]
    assert torch.equal(found, exact.to(stored)) and torch.equal(flash_fwd.flash_fwd(q, k, v)[0], exact.bfloat16())


def test_small_weights_are_kept() -> None:
    """One key weighs 2^12 times what each of 4,000 others does: without a lift all of these would be lost."""
    q, k, v = (torch.zeros((1, 1, rows, 32)) for rows in (1, 4000, 4000))
    q[..., 0], k[..., 0, 0], v[..., 1:, :] = 1.0, 12.0, 1.0
    out, _ = flash_fwd.flash_fwd(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)), scale=math.log(2.0))
    share = 3999 / (3999 + 2.0**12)
    # A rounding to three digits behind the first, and one to bf16.
    assert abs(float(out[0, 0, 0, 0]) / share - 1) < 2.0**-4 + 2.0**-8


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=".") as refused:
        call()
    return str(refused.value)


def test_what_cannot_be_is_refused_by_name() -> None:
    q, k, v, q_scale, *_ = drawn()
    ones = torch.ones(2, 4, 9, 16, dtype=torch.bfloat16)
    lse = torch.ones(2, 4, 9)
    assert "only flash_fwd" in refusal(lambda: flash_bwd.flash_bwd(q, k, v, ones, lse, ones))
    assert "only flash_fwd" in refusal(lambda: flash_decode.flash_decode(q, k, v))
    config = flash_fwd.safe_config(q, v)
    assert "block_n must be at least 32" in refusal(
        lambda: flash_fwd.flash_fwd(q, k, v, config=config | {"block_n": 16})
    )
    assert "out must be bf16" in refusal(lambda: flash_fwd.flash_fwd(q, k, v, out=ones.double()))
    assert "k must have the type of q" in refusal(lambda: flash_fwd.flash_fwd(q, k.to(torch.float8_e5m2), v))
    wide = [x.bfloat16() for x in (q, k, v)]
    assert "is for inputs of 8 bits" in refusal(lambda: flash_fwd.flash_fwd(*wide, q_descale=q_scale))
    assert "q_descale must have the shape (2, 2)" in refusal(
        lambda: flash_fwd.flash_fwd(q, k, v, q_descale=torch.ones(2, 4))
    )
    assert "torch.float32 and is for" in refusal(lambda: flash_fwd.flash_fwd(q, k, v, v_descale=q_scale.half()))
