"""The decoding kernel against the oracle, in Triton's interpreter. Run by `test_kernels.py` in a process of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import bounds, inputs, oracle
from harness.inputs import Placement
from harness.problem import Problem
from harness.quicken import quicken
from kernels import flash_decode, primitives
from tests.kernels.cases import DECODE, Answer, check
from tests.kernels.cases import ask as ask_any
from tests.kernels.interpreted_forward import PLACEMENTS, _sparse, problems

quicken()

MASKS = ("", "causal", "causal top-left", "window=3:5")


def ask(notation: str | Problem, config: dict[str, object] | None = None, **options: object) -> Answer:
    return ask_any(notation, config, kernel=flash_decode, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_len", [0, 1, 17, 48])
def test_lengths_at_the_edges_of_a_block_and_of_a_split(kv_len: int, mask: str) -> None:
    for position, (q_len, splits) in enumerate(((0, 2), (1, 3), (5, 2))):
        dtype = ("bf16", "fp16", "fp32")[(position + kv_len) % 3]
        answer = ask(f"b1 h4/2 q{q_len} k{kv_len} d16 {dtype} {mask}", {"num_splits": splits})
        if q_len:
            check(answer)


@pytest.mark.parametrize("heads", ["h2", "h3/1", "h16/2", "h15/1"])
@pytest.mark.parametrize("q_len", [1, 5])
def test_query_heads_of_a_group_are_rows_of_their_key_head(heads: str, q_len: int) -> None:
    batch, splits, block_m = (1, 1, 16) if q_len == 1 else (2, 2, 32)
    check(ask(f"b{batch} {heads} q{q_len} k35 d16/8 bf16 causal", {"num_splits": splits, "block_m": block_m}))


@pytest.mark.parametrize("left", [None, 0, 20])
@pytest.mark.parametrize("right", [None, 0, 15])
def test_the_output_counts_exactly_the_keys_of_the_band(left: int | None, right: int | None) -> None:
    """With scores 0 and one-hot values, 16-bit outputs are counts divided by counts: there is nothing to tolerate, and no
    split may drop a key or count one twice."""
    sides = ((1, 100, False), (5, 60, False), (5, 60, True), (30, 33, False))
    for (q_len, kv_len, top_left), splits in zip(sides, (5, 2, 3, 2), strict=True):
        problem = Problem(
            batch=1, q_heads=3, kv_heads=1, q_len=q_len, kv_len=kv_len, head_dim=16, v_head_dim=16, dtype="fp16",
            window_left=left, window_right=right, top_left=top_left,
        )  # fmt: skip
        loops = "single" if q_len == 5 else "split"
        answer = ask(problem, {"num_splits": splits, "loops": loops}, recipe="counting")
        assert torch.equal(answer.outputs["out"], oracle.forward(problem, answer.values)["out"].half())
        check(answer, structured=True)


def test_all_splits_and_tiles_agree_bit_by_bit_where_sums_are_exact() -> None:
    for problem in ("b1 h3/1 q3 k90 d16 bf16 causal", "b1 h4/1 q9 k90 d16 bf16 causal window=30"):
        ways = ((1, 16, 16), (2, 64, 16), (3, 16, 32), (7, 16, 16))
        first, *others = (
            ask(problem, {"num_splits": splits, "block_m": m, "block_n": n}, recipe="counting").outputs["out"]
            for splits, m, n in ways
        )
        assert all(torch.equal(first, other) for other in others)


def test_one_split_is_one_launch_without_scratch() -> None:
    q, k = torch.zeros((1, 4, 1, 16)), torch.zeros((1, 2, 64, 16))
    assert flash_decode.workspaces(q, k, k, num_splits=1) == {}
    keywords = {"scale": 1.0, "window_left": None, "window_right": None, "top_left": False}
    out, lse = torch.empty_like(q), torch.empty((1, 4, 1))
    (launch,) = flash_decode.launches(q, k, k, out, lse, **keywords, **{**DECODE, "num_splits": 1})
    assert launch.constants["SPLITS"] == 1
    with pytest.raises(ValueError, match=r"num_splits=4 needs sums of shape \(4, 1, 4, 1, 16\), .* found nothing"):
        flash_decode.launches(q, k, k, out, lse, **keywords, **DECODE)


@pytest.mark.parametrize("head_dim", ["1", "40", "80", "192/128", "3/17", "576/512"])
def test_head_dims(head_dim: str) -> None:
    for dtype in ("bf16", "fp32"):
        check(ask(f"b1 h2/1 q2 k40 d{head_dim} {dtype} causal"))


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-45, -3.0])
def test_any_scale(scale: float) -> None:
    for dtype, mask in (("fp16", "window=20:3"), ("fp32", "causal")):
        check(ask(f"b1 h2/1 q5 k50 d16 {dtype} {mask} scale={scale}"))


@pytest.mark.parametrize("recipe", ["large", "outliers", "constant_rows", "integers"])
def test_other_distributions_of_inputs(recipe: str) -> None:
    for dtype in ("bf16", "fp32"):
        answer = ask(f"b1 h3/1 q3 k66 d32 {dtype} causal", {"num_splits": 3}, recipe=recipe)
        check(answer, structured=inputs.recipe_for(recipe).structured)


def test_descriptors_and_pointers_give_equal_bits() -> None:
    for problem in ("b2 h4/2 q3 k50 d40/24 bf16 causal", "b1 h1 q5 k0 d8 fp16", "b1 h1 q0 k4 d8 fp16"):
        assert ask(problem, {"load": "tma"}).same_bits(ask(problem, {"load": "pointer"}))


@pytest.mark.parametrize("turn", range(len(PLACEMENTS)))
def test_every_tensor_has_strides_of_its_own(turn: int) -> None:
    ways = list(PLACEMENTS.values())
    chosen = {name: ways[(turn + 2 * place) % len(ways)] for place, name in enumerate(("q", "k", "v", "out"))}
    chosen = {name: way for name, way in chosen.items() if name != "out" or not way.expanded}
    chosen["lse"] = Placement(order=(2, 0, 1), shift=3)
    check(ask("b2 h2/1 q3 k33 d16/24 bf16 causal", {"num_splits": 1 + turn % 3}, placements=chosen))


def test_rows_that_see_nothing_are_exactly_empty() -> None:
    """In `check`; also rows of a tile in which others see something, in every split."""
    answer = ask("b1 h3/1 q20 k17 d16 bf16 causal", {"num_splits": 2})
    check(answer)
    assert (answer.outputs["lse"][0, :, :3] == -torch.inf).all() and answer.outputs["lse"][0, 0, 3] > -torch.inf


@pytest.mark.parametrize("splits", [1, 3])
def test_nan_is_not_swallowed(splits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((1, 2, length, 16), generator=generator) for length in (2, 60, 60))
    k[0, 1, 40, 3] = torch.nan
    out, lse = flash_decode.flash_decode(q, k, v, config={**DECODE, "num_splits": splits})
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
    assert not out[0, 0].isnan().any() and not lse[0, 0].isnan().any()


@pytest.mark.parametrize("far", ["q", "k", "v", "out"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """The third row lies 2^31 elements behind the first. In 32 bits the address wraps, and the process dies."""
    generator = torch.Generator().manual_seed(7)
    problem = Problem(batch=1, q_heads=1, kv_heads=1, q_len=3, kv_len=3, head_dim=16, v_head_dim=16, dtype="fp16")
    tensors = {name: _sparse(3, 1 << 30 if name == far else 16, generator) for name in ("q", "k", "v", "out")}
    values = {name: tensors[name] for name in ("q", "k", "v")}
    for splits in (1, 2):
        config = {**DECODE, "num_splits": splits}
        _, lse = flash_decode.flash_decode(**values, out=tensors["out"], config=config)
        expected = bounds.expect_forward(problem, values, bounds.contract_for("fp16"), structured=False)
        for name, found in {"out": tensors["out"], "lse": lse}.items():
            assert ((found.double() - expected.truth[name]).abs() <= expected.bounds[name]).all()


def test_more_heads_than_a_grid_axis_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "_GRID_LIMIT", 2)
    check(ask("b3 h4/2 q2 k40 d16 bf16 causal", {"num_splits": 2}))


def test_fp64_inputs_are_summed_in_fp64() -> None:
    q = torch.zeros((1, 1, 1, 16), dtype=torch.float64)
    v = torch.ones((1, 1, 64, 16), dtype=torch.float64)
    v[0, 0, 0] += 2.0**-40
    out, lse = flash_decode.flash_decode(q, torch.zeros_like(v), v, config=DECODE)
    assert lse.dtype == torch.float64
    assert torch.equal(out, torch.full_like(out, 1 + 2.0**-46))


@pytest.mark.parametrize(
    "tunable, message",
    [
        ({"block_m": 24}, "power of two"), ({"block_n": 8}, "at least 16"), ({"load": "TMA"}, "pointer, tma"),
        ({"loops": "one"}, "split, single"), ({"num_splits": 0}, "at least 1, found 0"),
    ],
)  # fmt: skip
def test_impossible_tunables_are_refused(tunable: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask("b1 h1 s17 d16 bf16", tunable)


def test_descriptors_are_refused_where_the_hardware_has_none() -> None:
    with pytest.raises(ValueError, match="16-byte aligned"):
        ask("b1 h1 s17 d16 bf16", {"load": "tma"}, placements={"k": Placement(order=(0, 1, 2, 3), shift=1)})
    check(ask("b1 h1 s17 d16 bf16", {"load": "tma"}, placements={"q": Placement(order=(0, 1, 2, 3), shift=1)}))


def test_the_plain_call_needs_no_choices() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn((1, 2, 2, 16), generator=generator)
    k, v = (torch.randn((1, 1, 1030, 16), generator=generator) for _ in range(2))
    out, lse = flash_decode.flash_decode(q, k, v, window_right=0)
    problem = Problem(
        batch=1, q_heads=2, kv_heads=1, q_len=2, kv_len=1030, head_dim=16, v_head_dim=16, dtype="fp32", causal=True
    )
    expected = bounds.expect_forward(problem, {"q": q, "k": k, "v": v}, bounds.contract_for("fp32"), structured=False)
    for name, found in {"out": out, "lse": lse}.items():
        assert ((found.double() - expected.truth[name]).abs() <= expected.bounds[name]).all()


def test_equal_questions_get_equal_bits() -> None:
    for problem in ("b1 h3/1 q3 k60 d16 bf16 window=9:9", "b1 h2 q1 k60 d16 fp32 causal"):
        assert ask(problem).same_bits(ask(problem))


@settings(max_examples=12)
@given(problem=problems(), splits=st.integers(1, 6), block_m=st.sampled_from([16, 32]), seed=st.integers(0, 99))
def test_random_problems(problem: Problem, splits: int, block_m: int, seed: int) -> None:
    answer = ask(problem, {"block_m": block_m, "num_splits": splits}, seed=seed)
    if problem.q_len:
        check(answer)
