"""What launches say of themselves: steps, grids and flags against a brute-force count. Run by `test_kernels.py`."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from harness import oracle
from harness.operation import operation_for, problem_keywords, shapes
from harness.problem import Problem, parse_problem
from harness.quicken import quicken
from harness.subject import workspaces_of
from kernels import flash_decode, primitives
from kernels.launch import Launch
from tests.kernels.cases import BACKWARD, DECODE, FORWARD, KERNELS

quicken()


def launches(problem: Problem, config: Mapping[str, Any], kernel: ModuleType | None = None) -> dict[str, Launch]:
    """By name, on the meta device."""
    tensors = {
        name: torch.empty(shape, dtype=torch.float16, device="meta") for name, (shape, _) in shapes(problem).items()
    }
    kernel = kernel or KERNELS[problem.pass_]
    wanted = workspaces_of(kernel, {name: tensors[name] for name in operation_for(problem).inputs}, config)
    scratch = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in wanted.items()}
    found = kernel.launches(**tensors, **scratch, **problem_keywords(problem), **config)
    return {launch.name: launch for launch in found}


def counted(seen: torch.Tensor, block_rows: int, block_columns: int) -> list[tuple[int, int]]:
    """(plain, masked) column blocks of every row block: visible to all rows that exist, or only somewhere."""
    found = []
    for rows in seen.split(block_rows) if len(seen) else ():
        blocks = rows.split(block_columns, dim=1) if seen.shape[1] else ()
        plain = sum(bool(block.all()) and block.shape[1] == block_columns for block in blocks)
        found.append((plain, sum(bool(block.any()) for block in blocks) - plain))
    return found


def assert_steps(launch: Launch, expected: list[tuple[int, int]], repeats: int) -> None:
    assert launch.steps is not None
    found = list(zip(launch.steps.plain, launch.steps.masked, strict=True))
    assert len(found) == launch.grid[0]
    ordered = expected[::-1] if launch.constants["REVERSED"] else expected
    assert found == [pair for pair in ordered for _ in range(repeats)]


sides = st.one_of(st.none(), st.integers(0, 150))


@settings(max_examples=300)
@given(
    lengths=st.tuples(st.integers(0, 140), st.integers(0, 140)),
    window=st.tuples(sides, sides),
    top_left=st.booleans(),
    blocks=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])),
)
def test_steps_are_the_blocks_of_the_band(
    lengths: tuple[int, int], window: tuple[int | None, int | None], top_left: bool, blocks: tuple[int, int]
) -> None:
    problem = Problem(
        batch=2, q_heads=6, kv_heads=2, q_len=lengths[0], kv_len=lengths[1], head_dim=40, v_head_dim=64, dtype="fp16",
        window_left=window[0], window_right=window[1], top_left=top_left,
    )  # fmt: skip
    block_m, block_n = blocks
    seen = oracle.visible_keys(problem, slice(0, problem.q_len))
    by_query, by_key = counted(seen, block_m, block_n), counted(seen.mT, block_n, block_m)
    forward = FORWARD | {"block_m": block_m, "block_n": block_n}
    for order, repeats in (("outer", 1), ("inner", 3)):
        (launch,) = launches(problem, forward | {"head_order": order}).values()
        assert_steps(launch, by_query, repeats)
        assert launch.grid[1] * launch.grid[2] * repeats == 12
        assert launch.steps.flops_per_step == 2 * block_m * block_n * (64 + 64)
    backward = BACKWARD | {
        f"{name}_block_{side}": block for name in ("dkdv", "dq") for side, block in zip("mn", blocks, strict=True)
    }
    found = launches(problem.replace(pass_="bwd"), backward)
    assert_steps(found["flash_bwd_dq_kernel"], by_query, 1)
    assert_steps(found["flash_bwd_dkdv_kernel"], [(3 * plain, 3 * masked) for plain, masked in by_key], 1)
    assert found["flash_bwd_dq_kernel"].steps.flops_per_step == 2 * block_m * block_n * (64 + 64 + 64)
    assert found["flash_bwd_dkdv_kernel"].steps.flops_per_step == 2 * block_m * block_n * (2 * 64 + 2 * 64)
    assert found["flash_bwd_rows_kernel"].steps is None


@settings(max_examples=200)
@given(
    lengths=st.tuples(st.integers(0, 9), st.integers(0, 140)),
    window=st.tuples(sides, sides),
    top_left=st.booleans(),
    shape=st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([16, 32]), st.sampled_from([1, 2, 3, 7])),
    loops=st.sampled_from(["split", "single"]),
)
def test_steps_of_splits_are_their_shares_of_the_blocks(
    lengths: tuple[int, int],
    window: tuple[int | None, int | None],
    top_left: bool,
    shape: tuple[int, int, int],
    loops: str,
) -> None:
    group, block_n, splits = shape
    problem = Problem(
        batch=2, q_heads=2 * group, kv_heads=2, q_len=lengths[0], kv_len=lengths[1], head_dim=40, v_head_dim=64,
        dtype="fp16", window_left=window[0], window_right=window[1], top_left=top_left,
    )  # fmt: skip
    launch = launches(problem, DECODE | {"block_n": block_n, "num_splits": splits, "loops": loops}, flash_decode)[
        "flash_decode_kernel"
    ]
    seen = oracle.visible_keys(problem, slice(0, problem.q_len)).repeat_interleave(group, 0)
    tiles = [rows.split(block_n, 1) for rows in seen.split(16)] if seen.numel() else []
    blocks = -(-problem.kv_len // block_n)
    anywhere = [block for block in range(blocks) if any(tile[block].any() for tile in tiles)]
    one_loop = launch.constants["HAS_LEFT"] or (
        loops == "single" and (launch.constants["HAS_RIGHT"] or not launch.constants["EVEN"])
    )
    expected = []
    for split in range(splits):
        each, more = divmod(len(anywhere), splits)
        start = split * each + min(split, more)
        mine = anywhere[start : start + each + (split < more)]
        for tile in tiles:
            visited = [tile[block] for block in mine if tile[block].any()]
            plain = sum(bool(block.all()) and block.shape[1] == block_n for block in visited)
            expected.append((0, len(visited)) if one_loop else (plain, len(visited) - plain))
    assert launch.steps is not None
    found = list(zip(launch.steps.plain, launch.steps.masked, strict=True))
    assert found == (expected if tiles else [(0, 0)] * len(found))
    assert launch.grid == (splits * -(-problem.q_len * group // 16), 4, 1)


@settings(max_examples=100)
@given(
    lengths=st.tuples(st.integers(0, 200), st.integers(0, 100)), heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 6)]),
    batch=st.integers(1, 3), programs=st.integers(1, 9), multiprocessors=st.integers(1, 5),
    together=st.sampled_from([0, 1, 2, 8]), causal=st.booleans(),
)  # fmt: skip
def test_programs_that_stay_share_out_all_steps(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    batch: int,
    programs: int,
    multiprocessors: int,
    together: int,
    causal: bool,
) -> None:
    """As many programs as asked for, or as tiles; none has two tiles more than another; and together they have all steps."""
    problem = Problem(
        batch=batch, q_heads=heads[0], kv_heads=heads[1], q_len=lengths[0], kv_len=lengths[1], head_dim=16, v_head_dim=16,
        dtype="fp16", causal=causal,
    )  # fmt: skip
    order = {"head_order": "inner", "groups_together": together} if together else {}
    (plain,) = launches(problem, FORWARD | order).values()
    staying = FORWARD | order | {"programs_per_sm": programs, "multiprocessors": multiprocessors}
    (launch,) = launches(problem, staying).values()
    count = plain.grid[0] * plain.grid[1] * plain.grid[2]
    assert launch.grid == (min(count, programs * multiprocessors), 1, 1)
    assert plain.steps is not None and plain.steps.tiles is None
    assert launch.steps is not None and launch.steps.tiles is not None
    assert (
        sum(launch.steps.tiles) == count
        and max(launch.steps.tiles, default=0) - min(launch.steps.tiles, default=0) <= 1
    )
    for found, expected in ((launch.steps.plain, plain.steps.plain), (launch.steps.masked, plain.steps.masked)):
        assert sum(found) == sum(expected) * plain.grid[1] * plain.grid[2]
        assert len(found) == launch.grid[0]


def test_rounds_that_go_backwards_even_out_what_programs_have_to_do() -> None:
    """Tiles of 16 heads have 8 steps to 1; dealt out always the same way, one program would have all the long ones."""
    assert primitives.dealt_steps((8, 7, 6, 5, 4, 3, 2, 1), (1,) * 8, 16, 8) == ((72,) * 8, (16,) * 8, (16,) * 8)
    assert primitives.dealt_steps((3, 2, 1), (0, 0, 1), 1, 2) == ((3, 3), (0, 1), (1, 2))
    assert primitives.dealt_steps((), (), 0, 0) == ((), (), ())


def test_a_device_that_cannot_be_asked_has_one_multiprocessor() -> None:
    (launch,) = launches(parse_problem("b2 h8 s64 d64 fp16"), FORWARD | {"programs_per_sm": 3}).values()
    assert launch.grid == (3, 1, 1)


def test_one_loop_masks_every_step() -> None:
    problem = parse_problem("b1 h1 s128 d64 fp16 causal")
    split, single = (
        next(iter(launches(problem, FORWARD | {"loops": loops}).values())) for loops in ("split", "single")
    )
    assert split.steps is not None and single.steps is not None
    assert not any(single.steps.plain)
    assert list(single.steps.masked) == [sum(pair) for pair in zip(split.steps.plain, split.steps.masked, strict=True)]


@pytest.mark.parametrize(
    "notation, flags",
    [
        ("b1 h1 s64 d64 fp16", {"HAS_LEFT": False, "HAS_RIGHT": False, "EVEN": True}),
        ("b1 h1 q64 k65 d64 fp16", {"HAS_LEFT": False, "HAS_RIGHT": False, "EVEN": False}),
        ("b1 h1 s64 d64 fp16 causal", {"HAS_LEFT": False, "HAS_RIGHT": True, "EVEN": True, "REVERSED": True}),
        ("b1 h1 q1 k64 d64 fp16 causal", {"HAS_RIGHT": False}),
        ("b1 h1 q2 k64 d64 fp16 causal", {"HAS_RIGHT": True}),
        ("b1 h1 s64 d64 fp16 causal window=63", {"HAS_LEFT": False}),
        ("b1 h1 s64 d64 fp16 causal window=62", {"HAS_LEFT": True}),
        ("b1 h1 q64 k8 d64 fp16 top-left window=56:7", {"HAS_LEFT": True, "HAS_RIGHT": False}),
    ],
)
def test_sides_that_hide_nothing_are_compiled_away(notation: str, flags: dict[str, bool]) -> None:
    (launch,) = launches(parse_problem(notation), FORWARD).values()
    assert {name: launch.constants[name] for name in flags} == flags


def test_a_grid_never_exceeds_what_an_axis_holds() -> None:
    for rows in (0, 1, 65535, 65536, 65537, 3 * 65535 + 1, 1 << 24):
        x, y, z = primitives.folded_grid(7, rows)
        assert x == 7 and max(y, z) <= 65535 and 0 <= y * z - rows < max(z, 1)


def test_heads_that_take_turns_lie_side_by_side() -> None:
    (launch,) = launches(parse_problem("b2 h8/2 s64 d64 fp16"), FORWARD | {"head_order": "inner"}).values()
    assert launch.grid == (4 * 4, 4, 1) and launch.constants["GROUPED"]


def test_scratch_memory_is_asked_for_only_by_descriptors() -> None:
    for load, asked in (("pointer", False), ("tma", True)):
        (launch,) = launches(parse_problem("b1 h1 s64 d64 fp16"), FORWARD | {"load": load}).values()
        assert launch.scratch is asked
