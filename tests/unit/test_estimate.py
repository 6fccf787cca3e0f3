"""The model: its two rules of arithmetic against slow references, its behaviour against what must hold on any GPU, and its
figures against published ones. Instruction counts were recorded from Triton 3.6.0 binaries."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.device import find_target
from harness.estimate import LAUNCH_MS, PLACED_PROGRAMS, estimate, hidden, makespan
from harness.outcome import Artifact, Binary, Estimate, Loop
from harness.problem import parse_problem

FULL = parse_problem("b2 h16 s8192 d128 bf16")
CAUSAL = parse_problem("b2 h16 s8192 d128 bf16 causal")

# Forward, 128x128 tiles, 8 warps, copies by TMA, sm_90.
LOOP = {
    "barrier": 6, "uniform": 47, "alu": 90, "branch": 7, "wait": 6, "matrix": 16, "shuffle": 8, "fma": 200, "special": 66,
    "convert": 32, "tma": 2, "other": 2,
}  # fmt: skip
OUTSIDE = {"alu": 430, "uniform": 100, "fma": 230, "special": 4, "global_store": 9, "matrix": 0}


def binary(**changes: Any) -> Binary:
    loops = changes.pop("loops", (Loop(instructions=LOOP, matrix_flops=1 << 20),))
    total = dict(OUTSIDE)
    for loop in loops:
        for kind, count in loop.instructions.items():
            total[kind] = total.get(kind, 0) + count
    values: dict[str, Any] = {
        "kernel": "attend", "registers": 188, "spill_bytes": 0, "shared_bytes": 164 << 10, "warps": 8,
        "instructions": total, "loops": loops, "code_hash": "x",
    }  # fmt: skip
    return Binary(**(values | changes))


def launch(
    plain: list[int],
    masked: list[int] | None = None,
    heads: int = 32,
    tile: int = 128 * 128,
    stages: int = 2,
    rows: int = 0,
) -> Any:
    steps = SimpleNamespace(
        plain=tuple(plain),
        masked=tuple(masked or [0] * len(plain)),
        flops_per_step=4 * tile * 128,
        rows=rows,
        tiles=None,
    )
    return SimpleNamespace(grid=(len(plain), heads, 1), args={}, options={"num_stages": stages}, steps=steps)


def predicted(problem: Any = FULL, launches: Any = None, target: str = "h100", **changes: Any) -> Estimate:
    launches = launches or [launch([64] * 64)]
    binaries = tuple(binary(**changes) for _ in launches)
    return estimate(problem, launches, Artifact(binaries=binaries, toolchain="test"), find_target(target))


def tflops(found: Estimate, problem: Any = FULL) -> float:
    return float(problem.flops / found.value_ms / 1e9)


def with_loop(**changes: int) -> tuple[Loop, ...]:
    return (Loop(instructions=LOOP | changes, matrix_flops=1 << 20),)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6), st.floats(1, 64))
def test_hidden_lies_between_the_longest_and_the_sum(parts: list[float], streams: float) -> None:
    found = hidden(parts, streams)
    assert max(parts) <= found <= sum(parts) * (1 + 1e-12)
    assert hidden(parts, 1) == pytest.approx(sum(parts))
    assert hidden(parts, 2 * streams) <= found


def naive_makespan(durations: list[int], repeats: int, slots: int) -> int:
    ends = [0] * slots
    for _ in range(repeats):
        for duration in durations:
            ends[ends.index(min(ends))] += duration
    return max(ends)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 20))
def test_programs_take_the_first_free_slot(durations: list[int], repeats: int, slots: int) -> None:
    assert makespan(durations, repeats, slots) == naive_makespan(durations, repeats, slots)


def test_very_many_programs_are_placed_nearly_as_if_one_by_one() -> None:
    durations = [float(step) for step in range(1, 65)]
    repeats = 4 * PLACED_PROGRAMS // len(durations)
    exact = naive_makespan([int(duration) for duration in durations], repeats, 132)
    assert makespan(durations, repeats, 132) == pytest.approx(exact, rel=0.01)


def test_nothing_to_place_takes_no_time() -> None:
    assert makespan([], 3, 4) == makespan([1.0], 0, 4) == 0


@pytest.mark.parametrize("target", ["h100", "h200", "sm_90"])
def test_plain_triton_on_hopper_lands_where_it_was_published(target: str) -> None:
    # Published for plain Triton kernels on H100 (tritonbench, tutorial 06): 390 to 490 TFLOP/s at 8k, head dim 128.
    assert 380 < tflops(predicted(target=target)) < 490


def test_specialized_warps_gain_what_was_published() -> None:
    loop = LOOP | {"tma": 0}
    one = Loop(instructions=loop, matrix_flops=1 << 20)
    found = tflops(predicted(loops=(one, one), warps=12, registers=168, specialized=True))
    assert 480 < found < 600
    assert found > 1.1 * tflops(predicted())


def test_no_estimate_beats_the_published_matrix_rate() -> None:
    bare = (Loop(instructions={"matrix": 16}, matrix_flops=1 << 20),)
    for target in ("a100", "h100", "b200", "rtx4090", "mi300x"):
        facts = find_target(target)
        assert tflops(predicted(target=target, loops=bare)) < facts.matrix_tflops["bf16"]


def test_tiny_tiles_are_slow() -> None:
    small = {
        "wait": 1, "barrier": 2, "uniform": 12, "alu": 49, "shared_load": 14, "matrix": 16, "other": 4, "shuffle": 8,
        "fma": 72, "special": 10, "convert": 4, "async_copy": 16, "branch": 1,
    }  # fmt: skip
    loops = (Loop(instructions=small, matrix_flops=4 * 16 * 16 * 128),)
    found = predicted(
        launches=[launch([512] * 512, tile=16 * 16)], loops=loops, warps=1, registers=180, shared_bytes=20 << 10
    )
    assert tflops(found) < 0.4 * tflops(predicted())


@pytest.mark.parametrize(
    "slower",
    [
        {"loops": with_loop(local_load=20, local_store=20)},
        {"loops": with_loop(special=260)},
        {"loops": with_loop(alu=900)},
        {"loops": with_loop(barrier=60)},
        {"loops": with_loop(shared_load=200)},
        {"loops": with_loop(tma=0, global_load=16)},
        {"loops": (Loop(instructions=LOOP, matrix_flops=1 << 21),)},
        {"target": "a100"},
        {"launches": [launch([65] * 64)]},
        {"launches": [launch([32] * 64, [33] * 64)]},
        {"launches": [launch([64] * 64), launch([1] * 64)]},
    ],
)
def test_more_work_or_less_machine_takes_longer(slower: dict[str, Any]) -> None:
    assert predicted(**slower).value_ms > predicted().value_ms


def test_spills_cost_more_than_their_issue_slots() -> None:
    spilling = predicted(loops=with_loop(local_load=50, local_store=50)).value_ms
    moving = predicted(loops=with_loop(uniform=LOOP["uniform"] + 100)).value_ms
    assert spilling > 1.1 * moving


def test_two_blocks_on_a_multiprocessor_hide_each_other() -> None:
    halves = [launch([64] * 128, tile=64 * 128)]
    loops = (Loop(instructions=LOOP, matrix_flops=1 << 20),)
    alone = predicted(launches=halves, loops=loops, warps=4, shared_bytes=120 << 10)
    paired = predicted(launches=halves, loops=loops, warps=4, shared_bytes=100 << 10)
    assert paired.value_ms < 0.9 * alone.value_ms


def test_a_causal_mask_costs_its_imbalance() -> None:
    rising = list(range(64))
    light_first = predicted(CAUSAL, [launch(rising, [1] * 64)], loops=with_loop() * 2)
    heavy_first = predicted(CAUSAL, [launch(rising[::-1], [1] * 64)], loops=with_loop() * 2)
    half = predicted(launches=[launch([32] * 64)])
    assert heavy_first.value_ms < light_first.value_ms
    assert heavy_first.terms["tail"] < light_first.terms["tail"]
    assert 0.9 * half.value_ms < heavy_first.value_ms < 1.2 * half.value_ms


def test_programs_that_stay_begin_once_and_end_each_tile() -> None:
    """The same 132 * 16 tiles, by programs that make one or 16 each; then by those that make them without ending any."""
    for length in (4, 64):
        plain = predicted(launches=[launch([length] * 132, heads=16)])
        staying = launch([16 * length] * 132, heads=1)
        unended = predicted(launches=[staying]).value_ms
        staying.steps.tiles = (16,) * 132
        stayed = predicted(launches=[staying]).value_ms
        assert unended < stayed < plain.value_ms
        assert stayed > (0.9 if length == 64 else 0.5) * plain.value_ms


def test_masked_steps_run_through_the_second_loop() -> None:
    dear = Loop(instructions=LOOP | {"alu": 2000}, matrix_flops=1 << 20)
    loops = (*with_loop(), dear)
    plain = predicted(launches=[launch([64] * 64)], loops=loops)
    masked = predicted(launches=[launch([0] * 64, [64] * 64)], loops=loops)
    assert masked.value_ms > 1.5 * plain.value_ms


def test_unrolled_masked_steps_are_not_counted_twice() -> None:
    outside = {"matrix": 16 + LOOP["matrix"]}
    launches = [launch([60] * 64, [4] * 64)]
    instructions = binary().instructions
    unrolled = predicted(launches=launches, instructions={**instructions, **outside})
    merged = predicted(launches=launches)
    assert unrolled.value_ms < merged.value_ms


def test_a_tail_wave_is_paid_in_full() -> None:
    one_wave = predicted(launches=[launch([64] * 12, heads=11)])
    one_more = predicted(launches=[launch([64] * 133, heads=1)])
    assert one_more.value_ms == pytest.approx(2 * one_wave.value_ms, rel=0.01)
    assert one_more.terms["tail"] > 0.4 * one_more.value_ms


def test_fp32_products_run_on_fp32_units() -> None:
    problem = parse_problem("b2 h16 s8192 d64 fp32")
    loop = Loop(
        instructions={"fma": 1080, "shared_load": 168, "alu": 45, "special": 12, "shuffle": 32, "barrier": 3, "wait": 1}
    )
    steps = SimpleNamespace(plain=(256,) * 128, masked=(0,) * 128, flops_per_step=4 * 64 * 32 * 64, rows=0, tiles=None)
    single = SimpleNamespace(grid=(128, 32, 1), args={}, options={"num_stages": 3}, steps=steps)
    found = predicted(problem, [single], loops=(loop,), registers=94, shared_bytes=57600)
    assert found.terms["matrix"] == 0
    assert 5 < tflops(found, problem) < find_target("h100").matrix_tflops["fp32"]


def test_a_launch_without_steps_moves_its_arguments() -> None:
    moved = SimpleNamespace(numel=lambda: 1 << 30, element_size=lambda: 2)
    preprocess = SimpleNamespace(grid=(64, 32, 1), args={"out": moved, "rows": 3}, options={}, steps=None)
    found = predicted(launches=[preprocess], loops=())
    assert found.value_ms == pytest.approx((2 << 30) / (3350e6 * 0.9) + LAUNCH_MS, rel=1e-6)


def test_an_empty_grid_costs_no_more_than_a_launch() -> None:
    nothing = parse_problem("b2 h16 q0 k128 d128 bf16")
    empty = SimpleNamespace(grid=(0, 32, 1), args={}, options={}, steps=None)
    assert predicted(nothing, [empty]).value_ms < 2 * LAUNCH_MS


def test_a_bulk_copy_is_as_large_as_the_rows_that_it_meets_are_few() -> None:
    """Of two steps of as many operations, the one with half of the rows reads twice as many keys."""
    wide, few, fewer = (predicted(launches=[launch([64] * 64, rows=rows)]).value_ms for rows in (128, 16, 8))
    assert predicted().value_ms == pytest.approx(predicted(launches=[launch([64] * 64, rows=256)]).value_ms)
    assert wide < few < fewer == pytest.approx(2 * few, rel=0.01)


def test_memory_bounds_the_estimate() -> None:
    wide = parse_problem("b64 h64 s4096 d128 bf16 window=0")
    found = predicted(wide, [launch([1] * 2, heads=1)])
    assert found.value_ms >= found.terms["dram"]
    assert found.terms["dram"] == pytest.approx(wide.least_bytes / (3350e6 * 0.9))


def test_launches_and_binaries_belong_together() -> None:
    with pytest.raises(ValueError, match="zip"):
        estimate(FULL, [launch([1])], Artifact(binaries=(), toolchain="test"), find_target("h100"))


def test_prefetch_pays_where_steps_are_short() -> None:
    short = (Loop(instructions={"matrix": 4, "special": 16, "tma": 2, "wait": 2}, matrix_flops=1 << 17),)
    launches = {stages: [launch([512] * 64, tile=128 * 16, stages=stages)] for stages in (1, 2, 4)}
    times = [predicted(launches=launches[stages], loops=short).value_ms for stages in (1, 2, 4)]
    assert times[0] > 1.2 * times[1] > times[1] >= times[2]


def test_products_with_few_columns_wait_for_shared_memory() -> None:
    wide = (Loop(instructions={"matrix": 16}, matrix_flops=1 << 20),)
    narrow = (Loop(instructions={"matrix": 128}, matrix_flops=1 << 20),)
    assert predicted(loops=narrow).terms["matrix"] > 1.2 * predicted(loops=wide).terms["matrix"]


def test_tensor_memory_products_take_their_size_from_the_launch_and_run_beside_one_block() -> None:
    loops = (Loop(instructions=LOOP | {"tensor_memory": 8, "special": 400}, matrix_flops=0),)
    found = predicted(target="b200", loops=loops)
    executed = 64 * 64 * 32 * 4 * 128 * 128 * 128
    assert found.terms["matrix"] == pytest.approx(executed / (2250e9 * 0.74), rel=1e-3)
    # A single block does its products and its softmax one after the other.
    assert found.value_ms > found.terms["matrix"] + found.terms["special"] + found.terms["waiting"]


def test_scalar_instructions_of_amd_have_a_unit_of_their_own() -> None:
    few, many = (with_loop(uniform=count) for count in (10, 2000))
    assert predicted(target="mi300x", loops=few).value_ms == predicted(target="mi300x", loops=many).value_ms
    assert predicted(loops=few).value_ms < predicted(loops=many).value_ms


def test_products_outside_loops_belong_to_every_program() -> None:
    more = {**binary().instructions, "matrix": LOOP["matrix"] + 64}
    base, found = predicted(), predicted(instructions=more)
    # 64 instructions of 128 columns for two groups of four warps, by every program of a multiprocessor.
    clocks = 4 * 64 * 32 * (1 << 20) * 8 / 132 / (989.4e6 / 132 / 1830 * 0.75)
    assert found.terms["programs"] - base.terms["programs"] == pytest.approx(clocks / 1830e3, rel=0.05)


def test_mma_sync_on_hopper_is_slower_than_wgmma() -> None:
    one = (Loop(instructions={"matrix": 256}, matrix_flops=1 << 20),)
    many = (Loop(instructions={"matrix": 16}, matrix_flops=1 << 20),)
    assert predicted(loops=one).terms["matrix"] == pytest.approx(predicted(loops=many).terms["matrix"] / 0.63)
    assert predicted(loops=one, target="a100").terms["matrix"] == predicted(loops=many, target="a100").terms["matrix"]
