"""The forward kernel against the oracle, in Triton's interpreter. Run by `test_kernels.py` in a process of its own."""

import itertools
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from harness import bounds, compare, inputs, oracle
from harness.compile import meta_launches
from harness.inputs import Placement
from harness.problem import Problem, parse_problem
from harness.quicken import quicken
from harness.space import Config
from kernels import flash_fwd, primitives
from tests.kernels.cases import FORWARD, ask, check

quicken()

MASKS = ("", "causal", "causal top-left", "window=3:5")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_len", [0, 1, 31, 32, 33])
def test_lengths_at_the_edges_of_a_block(kv_len: int, mask: str) -> None:
    for position, q_len in enumerate((0, 1, 15, 16, 17)):
        dtype = ("bf16", "fp16", "fp32")[(position + kv_len) % 3]
        answer = ask(f"b1 h1 q{q_len} k{kv_len} d16 {dtype} {mask}")
        if q_len:
            check(answer)


@pytest.mark.parametrize("left", [None, 0, 16])
@pytest.mark.parametrize("right", [None, 0, 15, 200])
def test_the_output_counts_exactly_the_keys_of_the_band(left: int | None, right: int | None) -> None:
    """With scores 0 and one-hot values, 16-bit outputs are counts divided by counts: there is nothing to tolerate."""
    sides = ((33, 70, False, 16, 32), (33, 70, True, 32, 16), (50, 33, False, 64, 16))
    for q_len, kv_len, top_left, block_m, block_n in sides:
        problem = Problem(
            batch=1, q_heads=1, kv_heads=1, q_len=q_len, kv_len=kv_len, head_dim=16, v_head_dim=16, dtype="fp16",
            window_left=left, window_right=right, top_left=top_left,
        )  # fmt: skip
        answer = ask(problem, {"block_m": block_m, "block_n": block_n}, recipe="counting")
        truth = oracle.forward(problem, answer.values)
        assert torch.equal(answer.outputs["out"], truth["out"].half())
        check(answer, structured=True)


@pytest.mark.parametrize("heads", ["h3", "h6/2", "h8/1", "h5/1"])
@pytest.mark.parametrize("head_order", ["outer", "inner"])
def test_query_heads_read_the_key_head_of_their_group(heads: str, head_order: str) -> None:
    check(ask(f"b2 {heads} q18 k35 d16 bf16 causal", {"head_order": head_order}))


@pytest.mark.parametrize("head_dim", ["1", "8", "40", "64", "80", "128", "192/128", "3/17", "256"])
def test_head_dims(head_dim: str) -> None:
    for dtype in ("bf16", "fp32"):
        check(ask(f"b1 h1 q17 k33 d{head_dim} {dtype} causal"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-45, 1.5, -3.0])
def test_any_scale(dtype: str, scale: float) -> None:
    for mask in ("window=20:3", "top-left causal"):
        check(ask(f"b1 h1 q33 k50 d16 {dtype} {mask} scale={scale}"))


@pytest.mark.parametrize("recipe", ["large", "outliers", "constant_rows", "integers"])
def test_other_distributions_of_inputs(recipe: str) -> None:
    for dtype in ("bf16", "fp16"):
        answer = ask(f"b1 h1 q33 k66 d32 {dtype} causal", recipe=recipe)
        check(answer, structured=inputs.recipe_for(recipe).structured)


@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
def test_every_tile_is_right(block_n: int) -> None:
    for block_m, loops, load in (
        (16, "split", "tma"),
        (32, "single", "pointer"),
        (64, "split", "pointer"),
        (128, "single", "tma"),
    ):
        config = {"block_m": block_m, "block_n": block_n, "load": load, "loops": loops}
        check(ask("b1 h1 q70 k90 d16 bf16 causal window=40", config), key_block=block_n)


def test_all_tiles_agree_bit_by_bit_where_sums_are_exact() -> None:
    problem = "b1 h2/1 q70 k90 d16 bf16 causal window=40"
    tiles = itertools.product((16, 64, 128), (16, 64, 128))
    first, *others = (ask(problem, {"block_m": m, "block_n": n}, recipe="counting").outputs["out"] for m, n in tiles)
    assert all(torch.equal(first, other) for other in others)


def test_descriptors_and_pointers_give_equal_bits() -> None:
    for problem in (
        "b2 h4/2 q33 k50 d40/24 bf16 causal",
        "b1 h1 q17 k1 d8 fp32",
        "b1 h1 q5 k0 d8 fp16",
        "b1 h1 q0 k4 d8 fp16",
    ):
        plain = ask(problem)
        assert all(ask(problem, {"load": load}).same_bits(plain) for load in ("tma", "tma_kv"))


def test_when_and_how_tiles_are_asked_for_changes_no_bit() -> None:
    for problem in ("b1 h2/1 q33 k50 d16/40 bf16 causal window=20", "b1 h1 q17 k40 d16 fp32"):
        plain = ask(problem)
        for changes in (
            {"v_load": "early"}, {"v_load": "early", "load": "tma"}, {"cache_hints": True}, {"maxnreg": 128},
            {"precision": "tf32"}, {"precision": "tf32x3"},
        ):  # fmt: skip
            assert ask(problem, changes).same_bits(plain), changes


@pytest.mark.parametrize("head_dim", ["96", "40", "192/128", "80/72"])
@pytest.mark.parametrize("load", ["pointer", "tma"])
def test_heads_in_two_tiles(head_dim: str, load: str) -> None:
    dtype = "bf16" if load == "tma" else "fp32" if head_dim == "40" else "fp16"
    problem = f"b1 h2/1 q17 k40 d{head_dim} {dtype} causal softcap=4.0 dropout=0.3"
    chunked = {
        "head_chunks": True,
        "lag": 8 if head_dim == "80/72" else 0,
        "v_load": "early" if load == "tma" else "late",
    }
    answer = ask(problem, {**chunked, "load": load})
    check(answer)
    assert load == "pointer" or answer.same_bits(ask(problem, chunked))


def test_heads_in_two_tiles_are_exact_where_sums_are() -> None:
    problem = "b1 h2/1 q33 k50 d48/80 bf16 causal window=20"
    whole, halves = (ask(problem, {"head_chunks": chunked}, recipe="counting") for chunked in (False, True))
    assert torch.equal(whole.outputs["out"], halves.outputs["out"])


def test_heads_in_two_tiles_lie_in_any_way() -> None:
    chosen = dict(zip(("q", "k", "v", "out"), list(PLACEMENTS.values())[:4], strict=True))
    check(ask("b2 h2/1 q17 k33 d40/48 bf16 causal", {"head_chunks": True}, placements=chosen))


def test_heads_are_divided_only_where_that_spares_columns() -> None:
    widths = {dim: flash_fwd._chunks(dim, True, 16) for dim in (8, 16, 24, 40, 64, 96, 100, 576)}
    assert widths == {
        8: (8, 0), 16: (16, 0), 24: (24, 0), 40: (32, 8), 64: (64, 0), 96: (64, 32), 100: (100, 0), 576: (512, 64)
    }  # fmt: skip


@pytest.mark.parametrize(
    "problem",
    [
        "b1 h2/1 q17 k40 d16 bf16 causal softcap=4.0 dropout=0.3", "b1 h2 q33 k50 d64/16 bf16 alibi window=20",
        "b1 h1 q17 k33 d40 bf16 bias=hqk scale=-0.5", "b1 h1 q17 k33 d16 fp32 alibi scale=-1.0 sinks",
        "b1 h1 q5 k0 d16 bf16 softcap=1.0",
    ],
)  # fmt: skip
@pytest.mark.parametrize("recipe", ["normal", "large"])
def test_scaled_queries_change_no_bit(problem: str, recipe: str) -> None:
    """A power of two passes through a product unrounded, in a second tile of a head too."""
    chunked = {"head_chunks": "d40" in problem}
    found, plain = (ask(problem, {**chunked, "scaled_queries": scaled}, recipe=recipe) for scaled in (True, False))
    check(found)
    assert found.same_bits(plain)


def test_queries_are_scaled_where_that_is_exact() -> None:
    def scaled(problem: str, *, asked: bool = True) -> bool:
        (launch,) = meta_launches(flash_fwd, parse_problem(problem), Config({**FORWARD, "scaled_queries": asked}))
        return bool(launch.constants["SCALED"])

    assert scaled("b1 h1 s16 d64 bf16 softcap=4.0") and scaled("b1 h1 s16 d16 fp32 alibi")
    assert not scaled("b1 h1 s16 d64 bf16 softcap=4.0", asked=False)
    assert not scaled("b1 h1 s16 d64 fp16 softcap=4.0"), "small numbers would be lost"
    assert not scaled("b1 h1 s16 d128 bf16 softcap=4.0"), "1 / sqrt(128) is no power of two"
    assert not scaled("b1 h1 s16 d64 bf16"), "log2(e) is part of the factor"
    assert not scaled("b1 h1 s16 d64 bf16 softcap=4.0 scale=2.0"), "large numbers would be lost"
    assert not scaled("b1 h1 s16 d64 bf16 softcap=4.0 scale=0.0")


LAGGING = {"lag": 8, "block_n": 16}


@pytest.mark.parametrize(
    "problem",
    [
        "b1 h2/1 q33 k90 d16 bf16 causal window=40", "b1 h1 q17 k70 d8 fp16 top-left causal", "b1 h1 q33 k64 d16 fp32 scale=-0.5",
        "b1 h2 q33 k50 d16 fp16 sinks softcap=4.0 dropout=0.3", "b1 h1 q40 k64 d16 fp32 prefix documents",
        "b1 h1 q40 k7 d16 bf16 causal", "b1 h1 q5 k0 d8 fp16",
    ],
)  # fmt: skip
def test_sums_may_be_rescaled_late(problem: str) -> None:
    for seed, recipe in enumerate(("normal", "large", "integers")):
        answer = ask(problem, LAGGING, recipe=recipe, seed=seed)
        check(answer, structured=inputs.recipe_for(recipe).structured)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("rise", [0.5, 5.0, 40.0])
def test_a_maximum_that_rises_with_every_block_is_followed(dtype: str, rise: float) -> None:
    """Scores of row i rise by rise (i + 1) / 16 with each key: rows of a tile rescale at different blocks, or never."""
    parsed = parse_problem(f"b1 h1 q16 k80 d8 {dtype} scale=1.0")
    generator = torch.Generator().manual_seed(11)
    q, k, v = (torch.zeros((1, 1, rows, 8), dtype=inputs.DTYPES[dtype]) for rows in (16, 80, 80))
    q[..., 0] = torch.arange(1, 17) / 16
    k[..., 0] = torch.arange(80) * (rise / 16)
    v.copy_(torch.randn(v.shape, generator=generator))
    values = {"q": q, "k": k, "v": v}
    contract = bounds.contract_for(dtype, where="interpreter")
    found = {}
    for lag in (0, 8):
        expected = bounds.expect_forward(parsed, values, replace(contract, lag=lag * math.log(2.0)), structured=True)
        out, lse = flash_fwd.flash_fwd(q, k, v, scale=1.0, config={**FORWARD, **LAGGING, "lag": lag})
        for one in compare.judge({"out": out, "lse": lse}, expected, case=f"{dtype} {rise} {lag}"):
            assert one.ratio <= 1, compare.sentence(one)
        found[lag] = out
    # Where nothing rises far, the late sums are others: the first block's maximum stays.
    assert (rise > 1) or not torch.equal(found[0], found[8])


def test_a_lag_is_bounded() -> None:
    for lag in (-1, 9):
        with pytest.raises(ValueError, match="lag must be at least 0 and at most 8"):
            ask("b1 h1 s17 d16 bf16", {"lag": lag})


GRIDS = (
    {"programs_per_sm": 1}, {"programs_per_sm": 2}, {"programs_per_sm": 5}, {"programs_per_sm": 99, "flatten": True},
    {"head_order": "inner", "groups_together": 2}, {"head_order": "inner", "groups_together": 16},
    {"head_order": "inner", "groups_together": 4, "programs_per_sm": 3},
)  # fmt: skip


@pytest.mark.parametrize(
    "problem",
    [
        "b2 h2 q40 k40 d16 bf16", "b3 h2/1 s33 d16 fp16 causal", "b1 h3/1 q40 k20 d8 fp32 window=9:2",
        "b1 h2 q41 k50 d16 fp16 causal packed=3", "b1 h1 q0 k4 d8 fp16", "b0 h2 s16 d16 bf16",
    ],
)  # fmt: skip
def test_every_grid_makes_every_tile(problem: str) -> None:
    plain = ask(problem)
    for grid in GRIDS:
        assert ask(problem, grid).same_bits(plain), grid


def test_queries_may_lie_in_any_way_where_only_keys_and_values_have_descriptors() -> None:
    for name in ("unaligned", "transposed", "expanded columns"):
        check(ask("b1 h2/1 q33 k50 d16 bf16 causal", {"load": "tma_kv"}, placements={"q": PLACEMENTS[name]}))


PLACEMENTS = {
    "bshd": Placement(order=(0, 2, 1, 3)),
    "sbhd, padded": Placement(order=(2, 0, 1, 3), row_padding=3),
    "unaligned": Placement(order=(0, 1, 2, 3), shift=1),
    "transposed": Placement(order=(3, 0, 2, 1), shift=2),
    "expanded batch and heads": Placement(order=(0, 1, 2, 3), expanded=(0, 1)),
    "expanded rows": Placement(order=(0, 1, 2, 3), expanded=(2,)),
    "expanded columns": Placement(order=(0, 1, 2, 3), expanded=(3,)),
}


@pytest.mark.parametrize("turn", range(len(PLACEMENTS)))
def test_every_tensor_has_strides_of_its_own(turn: int) -> None:
    """Each tensor lies in another way than the others, and in every way once."""
    ways = list(PLACEMENTS.values())
    chosen = {name: ways[(turn + 2 * place) % len(ways)] for place, name in enumerate(("q", "k", "v", "out"))}
    chosen = {name: way for name, way in chosen.items() if name != "out" or not way.expanded}
    check(ask("b2 h2/1 q17 k33 d16/24 bf16 causal", placements=chosen))


def test_lse_may_be_strided() -> None:
    check(ask("b2 h2 q17 k5 d16 fp16 causal", placements={"lse": Placement(order=(2, 0, 1), shift=3)}))


def test_rows_that_see_nothing_are_exactly_empty() -> None:
    """Bottom-right alignment with more queries than keys hides everything from the first ones; in `check`."""
    answer = ask("b1 h1 q40 k7 d16 bf16 causal")
    check(answer)
    assert (answer.outputs["lse"][0, 0, :33] == -torch.inf).all() and answer.outputs["lse"][0, 0, 33] > -torch.inf


def test_an_empty_batch_is_no_launch() -> None:
    ask("b0 h2 s16 d16 bf16")


def _sparse(rows: int, stride: int, generator: torch.Generator) -> torch.Tensor:
    """(1, 1, rows, 16) with rows `stride` elements apart; only the pages that are touched exist."""
    storage = torch.empty((rows - 1) * stride + 16, dtype=torch.float16)
    tensor = storage.as_strided((1, 1, rows, 16), (stride, stride, stride, 1))
    return tensor.copy_(torch.randn((1, 1, rows, 16), generator=generator))


@pytest.mark.parametrize("far", ["q", "k", "v", "out"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """The third row lies 2^31 elements behind the first. In 32 bits the address wraps, and the process dies."""
    generator = torch.Generator().manual_seed(7)
    problem = Problem(batch=1, q_heads=1, kv_heads=1, q_len=3, kv_len=3, head_dim=16, v_head_dim=16, dtype="fp16")
    tensors = {name: _sparse(3, 1 << 30 if name == far else 16, generator) for name in ("q", "k", "v", "out")}
    values = {name: tensors[name] for name in ("q", "k", "v")}
    _, lse = flash_fwd.flash_fwd(**values, out=tensors["out"], config=FORWARD)
    expected = bounds.expect_forward(problem, values, bounds.contract_for("fp16"), structured=False)
    for name, found in {"out": tensors["out"], "lse": lse}.items():
        assert ((found.double() - expected.truth[name]).abs() <= expected.bounds[name]).all()


def test_huge_strides_of_single_rows_ask_for_wide_offsets() -> None:
    tensors = [torch.zeros(16, dtype=torch.float16).as_strided((1, 1, 1, 16), (1 << 30, 1 << 30, 1 << 30, 1))] * 3
    out, lse = flash_fwd.flash_fwd(*tensors, config=FORWARD)
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.zeros_like(lse))
    keywords = {"scale": 1.0, "window_left": None, "window_right": None, "top_left": False}
    near = [torch.zeros((1, 1, 1, 16), dtype=torch.float16)] * 3
    for three, wide in ((tensors, True), (near, False)):
        (launch,) = flash_fwd.launches(*three, out, lse, **keywords, **FORWARD)
        assert launch.constants["WIDE"] is wide


def test_more_heads_than_a_grid_axis_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "_GRID_LIMIT", 2)
    assert primitives.folded_grid(4, 5) == (4, 2, 3)
    check(ask("b1 h5 q17 k9 d16 bf16 causal"))
    check(ask("b3 h6/2 q17 k9 d16 bf16 causal", {"head_order": "inner"}))


def test_fp64_inputs_are_summed_in_fp64() -> None:
    """Judged by the bounds of fp32; that it is fp64 shows in a sum that fp32 cannot hold."""
    q = torch.zeros((1, 1, 1, 16), dtype=torch.float64)
    k = torch.zeros((1, 1, 2, 16), dtype=torch.float64)
    v = torch.ones((1, 1, 2, 16), dtype=torch.float64)
    v[0, 0, 0] += 2.0**-40
    out, lse = flash_fwd.flash_fwd(q, k, v, config=FORWARD)
    assert lse.dtype == torch.float64
    assert torch.equal(out, torch.full_like(out, 1 + 2.0**-41))


BAD_TENSORS = {
    "last stride": (Placement(order=(0, 1, 3, 2)), "last stride of 1"),
    "alignment": (Placement(order=(0, 1, 2, 3), shift=1), "16-byte aligned"),
    "row stride": (Placement(order=(0, 1, 2, 3), row_padding=1), "whole 16 bytes"),
    "expanded": (Placement(order=(0, 1, 2, 3), expanded=(2,)), "apart from each other"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_descriptors_are_refused_where_the_hardware_has_none(name: str) -> None:
    placement, message = BAD_TENSORS[name]
    for load in ("tma", "tma_kv"):
        with pytest.raises(ValueError, match=message):
            ask("b1 h1 s17 d16 bf16", {"load": load}, placements={"k": placement})


@pytest.mark.parametrize(
    "tunable, message",
    [
        ({"block_m": 24}, "power of two"), ({"block_n": 8}, "at least 16"), ({"load": "TMA"}, "pointer, tma"),
        ({"loops": "one"}, "split, single"), ({"head_order": "up"}, "outer, inner"), ({"v_load": "first"}, "late, early"),
        ({"groups_together": 0}, "at least 1 of groups_together"), ({"programs_per_sm": -1}, "found 1 and -1"),
        ({"precision": "fp8"}, "ieee, tf32, tf32x3"),
    ],
)  # fmt: skip
def test_impossible_tunables_are_refused(tunable: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask("b1 h1 s17 d16 bf16", tunable)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    q, k = torch.zeros((1, 3, 4, 8)), torch.zeros((1, 2, 4, 8))
    with pytest.raises(ValueError, match="multiple of key/value heads"):
        flash_fwd.flash_fwd(q, k, k)
    with pytest.raises(ValueError, match="k must have the shape"):
        flash_fwd.flash_fwd(q, torch.zeros((1, 3, 4, 16)), q)
    with pytest.raises(ValueError, match="v must have the type of q"):
        flash_fwd.flash_fwd(q, q, q.half())
    with pytest.raises(ValueError, match="window_left must be None or at least 0"):
        flash_fwd.flash_fwd(q, q, q, window_left=-1)


def test_the_plain_call_needs_no_choices() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((1, 2, 20, 16), generator=generator) for _ in range(3))
    out, lse = flash_fwd.flash_fwd(q, k, v, window_right=0)
    problem = Problem(
        batch=1, q_heads=2, kv_heads=2, q_len=20, kv_len=20, head_dim=16, v_head_dim=16, dtype="fp32", causal=True
    )
    expected = bounds.expect_forward(problem, {"q": q, "k": k, "v": v}, bounds.contract_for("fp32"), structured=False)
    for name, found in {"out": out, "lse": lse}.items():
        assert ((found.double() - expected.truth[name]).abs() <= expected.bounds[name]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_tiles_of_the_same_input_are_deterministic(dtype: torch.dtype) -> None:
    word = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    problem = f"b1 h2/1 q33 k50 d16 {word} window=9:9"
    assert ask(problem).same_bits(ask(problem))


@st.composite
def problems(draw: st.DrawFn, pass_: str = "fwd") -> Problem:
    """Small problems of every kind."""
    lengths = st.integers(0, 40)
    sides = st.one_of(st.none(), st.integers(0, 45))
    kv_heads = draw(st.integers(1, 2))
    return Problem(
        batch=draw(st.integers(1, 2)),
        q_heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
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
        pass_=pass_,  # type: ignore[arg-type]
    )


@settings(max_examples=25)
@given(problem=problems(), blocks=st.sampled_from(list(itertools.product((16, 32), (16, 32)))), seed=st.integers(0, 99))
def test_random_problems(problem: Problem, blocks: tuple[int, int], seed: int) -> None:
    answer = ask(problem, {"block_m": blocks[0], "block_n": blocks[1]}, seed=seed)
    if problem.q_len:
        check(answer)
