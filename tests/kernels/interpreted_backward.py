"""The backward kernels against the oracle, in Triton's interpreter. Run by `test_kernels.py` in a process of its own."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from harness import bounds, inputs, oracle
from harness.inputs import Placement
from harness.problem import Problem
from harness.quicken import quicken
from kernels import flash_bwd, flash_fwd, primitives
from tests.kernels.cases import BACKWARD, FORWARD, ask, check

quicken()

MASKS = ("", "causal", "causal top-left", "window=3:5")


def tiles(block_m: int, block_n: int, load: str = "pointer") -> dict[str, object]:
    """The same tile for dkdv and dq."""
    sides = {
        f"{name}_block_{side}": block for name in ("dkdv", "dq") for side, block in (("m", block_m), ("n", block_n))
    }
    return {**sides, "dkdv_load": load, "dq_load": load}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_len", [0, 1, 31, 33])
def test_lengths_at_the_edges_of_a_block(kv_len: int, mask: str) -> None:
    for position, q_len in enumerate((0, 1, 15, 16, 17)):
        dtype = ("bf16", "fp16", "fp32")[(position + kv_len) % 3]
        answer = ask(f"b1 h1 q{q_len} k{kv_len} d16 {dtype} {mask} bwd")
        if q_len or kv_len:
            check(answer)


@pytest.mark.parametrize("left", [None, 0, 16])
@pytest.mark.parametrize("right", [None, 0, 15, 200])
def test_windows(left: int | None, right: int | None) -> None:
    for q_len, kv_len, top_left, block_m, block_n in ((20, 50, False, 16, 32), (50, 20, True, 32, 16)):
        problem = Problem(
            batch=1, q_heads=1, kv_heads=1, q_len=q_len, kv_len=kv_len, head_dim=16, v_head_dim=16, dtype="fp16",
            window_left=left, window_right=right, top_left=top_left, pass_="bwd",
        )  # fmt: skip
        check(ask(problem, tiles(block_m, block_n)))


@pytest.mark.parametrize("heads", ["h3", "h6/2", "h8/1"])
def test_gradients_of_keys_sum_over_their_group(heads: str) -> None:
    check(ask(f"b2 {heads} q18 k20 d16 bf16 causal bwd"))


@pytest.mark.parametrize("head_dim", ["1", "8", "40", "80", "128", "192/128", "3/17"])
def test_head_dims(head_dim: str) -> None:
    for dtype in ("bf16", "fp32"):
        check(ask(f"b1 h1 q17 k33 d{head_dim} {dtype} causal bwd"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-45, 1.5, -3.0])
def test_any_scale(dtype: str, scale: float) -> None:
    check(ask(f"b1 h1 q33 k40 d16 {dtype} window=20:3 scale={scale} bwd"))


@pytest.mark.parametrize("recipe", ["large", "outliers", "constant_rows", "integers"])
def test_other_distributions_of_inputs(recipe: str) -> None:
    answer = ask("b1 h1 q33 k66 d32 bf16 causal bwd", recipe=recipe)
    check(answer, structured=inputs.recipe_for(recipe).structured)


@pytest.mark.parametrize("block_n", [16, 32, 128])
def test_every_tile_is_right(block_n: int) -> None:
    for block_m, load in ((16, "tma"), (32, "pointer"), (128, "tma")):
        check(ask("b1 h2/1 q40 k70 d16 bf16 causal window=30 bwd", tiles(block_m, block_n, load)), key_block=block_n)


def test_descriptors_and_pointers_give_equal_bits() -> None:
    for problem in ("b2 h4/2 q33 k20 d40/24 bf16 causal bwd", "b1 h1 q5 k0 d8 fp16 bwd", "b1 h1 q0 k4 d8 fp16 bwd"):
        assert ask(problem, tiles(16, 32, "tma")).same_bits(ask(problem, tiles(16, 32)))


PLACEMENTS = {
    "bshd": Placement(order=(0, 2, 1, 3)),
    "sbhd, padded, unaligned": Placement(order=(2, 0, 1, 3), row_padding=3, shift=1),
    "transposed": Placement(order=(3, 0, 2, 1), shift=2),
    "expanded everywhere": Placement(order=(0, 1, 2, 3), expanded=(0, 1, 2, 3)),
    "expanded rows": Placement(order=(0, 1, 2, 3), expanded=(2,)),
}


@pytest.mark.parametrize("turn", range(len(PLACEMENTS)))
def test_every_tensor_has_strides_of_its_own(turn: int) -> None:
    """Each tensor lies in another way than the others, and in every way once."""
    ways = list(PLACEMENTS.values())
    chosen = {
        name: ways[(turn + place) % len(ways)]
        for place, name in enumerate(("q", "k", "v", "dout", "out", "dq", "dk", "dv"))
    }
    made = ("out", "dq", "dk", "dv")  # by a kernel, so their elements differ
    chosen = {name: way for name, way in chosen.items() if name not in made or not way.expanded}
    check(ask("b2 h2/1 q17 k20 d16/24 bf16 causal bwd", placements=chosen))


def test_lse_may_be_strided() -> None:
    check(ask("b2 h2 q17 k5 d16 fp16 causal bwd", placements={"lse": Placement(order=(2, 0, 1), shift=3)}))


def test_rows_and_keys_that_nobody_sees_have_no_gradient() -> None:
    """In `check`: exactly 0 for the first queries of one problem, and for the last keys of the other."""
    check(ask("b1 h1 q40 k7 d16 bf16 causal bwd"))
    check(ask("b1 h1 q7 k40 d16 bf16 causal top-left bwd"))


def test_gradients_are_written_even_where_there_is_nothing_on_the_other_side() -> None:
    alone = ask("b1 h2/1 q0 k9 d16 bf16 causal bwd").outputs
    assert not alone["dk"].any() and not alone["dv"].any() and alone["dk"].shape[2] == 9
    alone = ask("b1 h2/1 q9 k0 d16 bf16 bwd").outputs
    assert not alone["dq"].any() and alone["dk"].shape[2] == 0
    ask("b0 h2 s16 d16 bf16 bwd")


def _sparse(rows: int, stride: int, generator: torch.Generator) -> torch.Tensor:
    """(1, 1, rows, 16) with rows `stride` elements apart; only the pages that are touched exist."""
    storage = torch.empty((rows - 1) * stride + 16, dtype=torch.float16)
    tensor = storage.as_strided((1, 1, rows, 16), (stride, stride, stride, 1))
    return tensor.copy_(torch.randn((1, 1, rows, 16), generator=generator))


@pytest.mark.parametrize("far", ["q", "k", "v", "dout", "dq", "dk", "dv"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """The third row lies 2^31 elements behind the first. In 32 bits the address wraps, and the process dies."""
    generator = torch.Generator().manual_seed(7)
    problem = Problem(
        batch=1, q_heads=1, kv_heads=1, q_len=3, kv_len=3, head_dim=16, v_head_dim=16, dtype="fp16", pass_="bwd"
    )
    names = ("q", "k", "v", "dout", "dq", "dk", "dv")
    tensors = {name: _sparse(3, 1 << 30 if name == far else 16, generator) for name in names}
    values = {name: tensors[name] for name in names[:4]}
    made = oracle.forward(problem, values)
    results = {name: tensors[name] for name in names[4:]}
    flash_bwd.flash_bwd(
        tensors["q"], tensors["k"], tensors["v"], made["out"].half(), made["lse"].float(), tensors["dout"],
        config=BACKWARD, **results,
    )  # fmt: skip
    expected = bounds.expect_backward(problem, values, bounds.contract_for("fp16"), structured=False)
    for name, found in results.items():
        assert ((found.double() - expected.truth[name]).abs() <= expected.bounds[name]).all()


def test_more_heads_than_a_grid_axis_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "_GRID_LIMIT", 2)
    check(ask("b1 h5 q17 k9 d16 bf16 causal bwd"))


def test_equal_questions_get_equal_bits() -> None:
    for problem in ("b1 h3/1 q33 k40 d16 bf16 window=9:9 bwd", "b1 h2 q17 k20 d16 fp32 causal bwd"):
        assert ask(problem).same_bits(ask(problem))


FUSED = {"structure": "fused", "dq_block_m": 32, "dq_block_n": 16}


@pytest.mark.parametrize(
    "problem",
    [
        "b1 h4/2 q17 k35 d16/24 bf16 causal bwd",
        "b1 h2/1 q40 k37 d24 fp16 causal top-left window=9 bshd bwd",
        "b1 h2 q31 k64 d16 fp32 window=20:3 bwd",
        "b1 h1 s64 d16 fp16 bwd",
        "b2 h2/1 q0 k9 d16 bf16 bwd",
        "b2 h2/1 q9 k0 d16 bf16 causal bwd",
        "b1 h2/1 q17 k35 d16 fp16 causal softcap=4.0 bias=hqk dropout=0.3 sinks lse-grad bwd",
        "b1 h2/1 q40 k50 d16 fp16 causal packed=3 bwd",
        "b2 h2/1 q17 k35 d16 fp16 prefix chunk=17 documents bwd",
    ],
)
def test_one_launch_gives_the_bits_of_two(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apart, fused = ask(problem, {**FUSED, "structure": "separate"}), ask(problem, FUSED)
    assert fused.same_bits(apart)
    monkeypatch.setattr(primitives, "_GRID_LIMIT", 2)
    assert ask(problem, FUSED).same_bits(apart)


def test_one_launch_loads_by_descriptors_and_lies_anywhere() -> None:
    problem = "b1 h2/1 q33 k20 d40/24 bf16 causal bwd"
    loads = {"dkdv_load": "tma", "dq_load": "tma"}
    assert ask(problem, FUSED | loads).same_bits(ask(problem, FUSED))
    chosen = dict(zip(("q", "k", "v", "dout", "dq", "dk", "dv"), itertools.cycle(PLACEMENTS.values()), strict=False))
    chosen = {name: way for name, way in chosen.items() if not name.startswith("d") or not way.expanded}
    check(ask("b2 h2/1 q17 k20 d16/24 bf16 causal bwd", FUSED, placements=chosen))


def test_one_launch_needs_as_many_warps_for_both() -> None:
    with pytest.raises(ValueError, match="as many dkdv_warps as dq_warps, found 8 and 4"):
        ask("b1 h1 s17 d16 bf16 bwd", FUSED | {"dkdv_warps": 8})
    with pytest.raises(ValueError, match="structure must be one of"):
        ask("b1 h1 s17 d16 bf16 bwd", {"structure": "joined"})


def test_descriptors_are_refused_where_the_hardware_has_none() -> None:
    with pytest.raises(ValueError, match="dout has row stride 0"):
        ask("b1 h1 s17 d16 bf16 bwd", tiles(16, 32, "tma"), placements={"dout": PLACEMENTS["expanded rows"]})
    heads = Placement(order=(0, 1, 2, 3), expanded=(1,))
    with pytest.raises(ValueError, match="q has head stride 0"):
        ask("b1 h2/1 s17 d16 bf16 bwd", tiles(16, 32, "tma"), placements={"q": heads})
    check(ask("b1 h2 s17 d16 bf16 bwd", tiles(16, 32, "tma"), placements={"q": heads}))
    with pytest.raises(ValueError, match="dq_block_n must be a power of two"):
        ask("b1 h1 s17 d16 bf16 bwd", {"dq_block_n": 20})
    with pytest.raises(ValueError, match="dkdv_load must be one of"):
        ask("b1 h1 s17 d16 bf16 bwd", {"dkdv_load": "TMA"})


def test_the_plain_calls_chain() -> None:
    """Forward and backward with no choices made, judged as a chain of two kernels."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn((1, 2, 20, 16), generator=generator).bfloat16() for _ in range(4))
    out, lse = flash_fwd.flash_fwd(q, k, v, window_right=0)
    found = dict(zip(("dq", "dk", "dv"), flash_bwd.flash_bwd(q, k, v, out, lse, dout, window_right=0), strict=True))
    problem = Problem(
        batch=1, q_heads=2, kv_heads=2, q_len=20, kv_len=20, head_dim=16, v_head_dim=16, causal=True, pass_="bwd"
    )
    values = {"q": q, "k": k, "v": v, "dout": dout}
    contract = bounds.contract_for("bf16", chained=True)
    expected = bounds.expect_backward(problem, values, contract, structured=False)
    for name, gradient in found.items():
        assert ((gradient.double() - expected.truth[name]).abs() <= expected.bounds[name]).all()


def test_fp64_gradients_agree_with_finite_differences() -> None:
    """`torch.autograd.gradcheck`, with its own tolerances, of the pair of kernels with fp64 sums."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
            out, lse = flash_fwd.flash_fwd(q, k, v, window_left=2, window_right=1, scale=0.5, config=FORWARD)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, dout):  # type: ignore[no-untyped-def]
            return flash_bwd.flash_bwd(
                *ctx.saved_tensors, dout, window_left=2, window_right=1, scale=0.5, config=BACKWARD
            )

    generator = torch.Generator().manual_seed(5)
    q = torch.randn((1, 2, 2, 1), dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (torch.randn((1, 1, 3, 1), dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(Attention.apply, (q, k, v))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small backward problems of every kind, with at least one query and one key."""
    lengths = st.integers(1, 36)
    sides = st.one_of(st.none(), st.integers(0, 40))
    kv_heads = draw(st.integers(1, 2))
    return Problem(
        batch=draw(st.integers(1, 2)),
        q_heads=kv_heads * draw(st.sampled_from([1, 2])),
        kv_heads=kv_heads,
        q_len=draw(lengths),
        kv_len=draw(lengths),
        head_dim=draw(st.sampled_from([1, 8, 16, 24])),
        v_head_dim=draw(st.sampled_from([1, 8, 16, 24])),
        dtype=draw(st.sampled_from(["fp16", "bf16", "fp32"])),
        window_left=draw(sides),
        window_right=draw(sides),
        top_left=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.5, -0.5, 0.0])),
        layout=draw(st.sampled_from(["bhsd", "bshd", "sbhd"])),
        pass_="bwd",
    )


@settings(max_examples=15)
@given(problem=problems(), blocks=st.sampled_from(list(itertools.product((16, 32), (16, 32)))), seed=st.integers(0, 99))
def test_random_problems(problem: Problem, blocks: tuple[int, int], seed: int) -> None:
    check(ask(problem, tiles(*blocks), seed=seed))
