"""Run in the interpreter by `test_shadow.py`: small kernels, each with one fault or none, under a watch; JSON on stdout.

A line that ends in `# HERE` is where the finding of that kernel must be.
"""

import dataclasses
import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from harness.errors import HarnessError
from harness.inputs import Placement, place, unwritten
from harness.shadow import shadow

SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {}
LENGTH, BLOCK = 40, 16


def scenario(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    SCENARIOS[function.__name__] = function
    return function


def given(name: str = "x", length: int = LENGTH, dtype: torch.dtype = torch.float32):
    return place(name, torch.arange(1, length + 1).to(dtype), Placement(order=(0,)))


def made(name: str = "y", length: int = LENGTH, dtype: torch.dtype = torch.float32):
    return unwritten(name, (length,), dtype, Placement(order=(0,)))


def line_of(kernel: Any) -> str:
    lines, first = inspect.getsourcelines(kernel.fn)
    marked = [first + position for position, line in enumerate(lines) if line.rstrip().endswith("# HERE")]
    return f"small.py:{marked[0]}" if marked else ""


def seen(watch: Any, **more: Any) -> dict[str, Any]:
    return {
        "findings": [dataclasses.asdict(finding) | {"text": str(finding)} for finding in watch.findings],
        "unwritten": [dataclasses.asdict(finding) for finding in watch.unwritten()],
        "dropped": watch.dropped,
        **more,
    }


def run(
    kernel: Any,
    programs: int,
    tensors: Mapping[str, torch.Tensor],
    roles: Mapping[str, str],
    *rest: Any,
    zeroed: str = "",
):
    with shadow(tensors, roles) as watch:
        if zeroed:
            tensors[zeroed].zero_()
            watch.host_wrote(zeroed)
        kernel[(programs,)](*tensors.values(), *rest)
    return seen(watch, line=line_of(kernel))


def in_out(
    kernel: Any, *rest: Any, programs: int = 3, zeroed: str = "", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    x, y = given(dtype=dtype), made(dtype=dtype)
    found = run(kernel, programs, {"x": x.view, "y": y.view}, {"x": "input", "y": "output"}, *rest, zeroed=zeroed)
    return found | {
        "intact": x.unchanged() and y.stray_write() is None,
        "y": [None if value != value else value for value in y.view.double().tolist()],
    }


@triton.jit
def copies(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@scenario
def right() -> dict[str, Any]:
    return in_out(copies, LENGTH, BLOCK)


@scenario
def right_bf16() -> dict[str, Any]:
    return in_out(copies, LENGTH, BLOCK, dtype=torch.bfloat16)


@triton.jit
def loads_beyond(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)  # HERE
    tl.store(y + at, value, mask=at < n)


@scenario
def load_beyond_the_end() -> dict[str, Any]:
    return in_out(loads_beyond, LENGTH, BLOCK)


@triton.jit
def loads_before(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at - 1, mask=at < n)  # HERE
    tl.store(y + at, value, mask=at < n)


@scenario
def load_before_the_start() -> dict[str, Any]:
    return in_out(loads_before, LENGTH, BLOCK)


@triton.jit
def stores_beyond(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n))  # HERE


@scenario
def store_beyond_the_end() -> dict[str, Any]:
    return in_out(stores_beyond, LENGTH, BLOCK)


@triton.jit
def far_away(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at.to(tl.int64) * 1000000007, mask=at < n)  # HERE
    tl.store(y + at, value, mask=at < n)


@scenario
def load_gigabytes_away() -> dict[str, Any]:
    return in_out(far_away, LENGTH, BLOCK)


@triton.jit
def two_rows(x, y, stride, COLS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, 2)[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    value = tl.load(x + row * stride + col)  # HERE
    tl.store(y + row * COLS + col, value, mask=col < COLS)


@scenario
def load_between_rows() -> dict[str, Any]:
    x = place("x", torch.ones(2, 6), Placement(order=(0, 1), row_padding=4))
    tensors = {"x": x.view, "y": made(length=12).view}
    return run(two_rows, 1, tensors, {"x": "input", "y": "output"}, x.view.stride(0), 6, 8)


@scenario
def rows_with_padding_are_right() -> dict[str, Any]:
    x = place("x", torch.ones(2, 8), Placement(order=(0, 1), row_padding=4, shift=3))
    tensors = {"x": x.view, "y": made(length=16).view}
    return run(two_rows, 1, tensors, {"x": "input", "y": "output"}, x.view.stride(0), 8, 8)


@scenario
def expanded_rows_are_right() -> dict[str, Any]:
    x = place("x", torch.ones(2, 8), Placement(order=(0, 1), expanded=(0,)))
    tensors = {"x": x.view, "y": made(length=16).view}
    return run(two_rows, 1, tensors, {"x": "input", "y": "output"}, 0, 8, 8)


@scenario
def load_from_the_neighbour() -> dict[str, Any]:
    packed = torch.arange(2 * LENGTH, dtype=torch.float32)
    tensors = {"x": packed[:LENGTH], "y": made().view, "other": packed[LENGTH:]}
    with shadow(tensors, {"x": "input", "y": "output", "other": "input"}) as watch:
        loads_beyond[(3,)](tensors["x"], tensors["y"], LENGTH, BLOCK)
    return seen(watch, line=line_of(loads_beyond))


@triton.jit
def adds(x, y, n, SPREAD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(y + at * SPREAD, tl.load(x + at))  # HERE


@scenario
def atomic_beyond_the_end() -> dict[str, Any]:
    return in_out(adds, LENGTH, 4, BLOCK, zeroed="y")


@scenario
def atomics_of_all_programs_are_right() -> dict[str, Any]:
    return in_out(adds, LENGTH, 1, BLOCK, zeroed="y")


@scenario
def atomic_on_what_was_never_written() -> dict[str, Any]:
    return in_out(adds, LENGTH, 1, BLOCK)


@triton.jit
def swaps(x, y, n, BLOCK: tl.constexpr):
    tl.atomic_cas(y + tl.program_id(0) * 30, 0, 1)  # HERE


@scenario
def compare_and_swap_beyond_the_end() -> dict[str, Any]:
    return in_out(swaps, LENGTH, BLOCK, zeroed="y", dtype=torch.float32)


@triton.jit
def follows(table, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    first = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    value = tl.load(first + at)  # HERE
    tl.store(y + tl.program_id(0) * BLOCK + at, value)


def through_a_table(shift: int) -> dict[str, Any]:
    x = given(length=2 * BLOCK)
    table = torch.tensor([x.view.data_ptr(), x.view.data_ptr() + 4 * (BLOCK + shift)])
    tensors = {"table": table, "y": made(length=2 * BLOCK).view, "x": x.view}
    with shadow(tensors, {"table": "input", "y": "output", "x": "input"}) as watch:
        follows[(2,)](table, tensors["y"], BLOCK)
    return seen(watch, line=line_of(follows))


@scenario
def pointers_in_a_table_are_right() -> dict[str, Any]:
    return through_a_table(0)


@scenario
def a_pointer_in_a_table_is_wrong() -> dict[str, Any]:
    return through_a_table(3)


@triton.jit
def describes(x, y, rows, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, 16], [16, 1], [BLOCK, 16])
    target = tl.make_tensor_descriptor(y, [rows, 16], [16, 1], [BLOCK, 16])
    tile = source.load([tl.program_id(0) * BLOCK, 0])  # HERE
    target.store([tl.program_id(0) * BLOCK, 0], tile)


def described(rows: int) -> dict[str, Any]:
    x = place("x", torch.ones(20, 16), Placement(order=(0, 1)))
    y = unwritten("y", (20, 16), torch.float32, Placement(order=(0, 1)))
    found = run(describes, 3, {"x": x.view, "y": y.view}, {"x": "input", "y": "output"}, rows, 8)
    return found | {"intact": x.unchanged() and y.stray_write() is None}


@scenario
def descriptors_are_right() -> dict[str, Any]:
    return described(20)


@scenario
def a_descriptor_is_too_long() -> dict[str, Any]:
    return described(21)


@triton.jit
def takes_a_descriptor(source, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tile = source.load([tl.program_id(0) * BLOCK])
    tl.store(y + tl.program_id(0) * BLOCK + at, tile)


@scenario
def a_descriptor_of_the_host_is_right() -> dict[str, Any]:
    x, y = given(length=32), made(length=32)
    with shadow({"x": x.view, "y": y.view}, {"x": "input", "y": "output"}) as watch:
        takes_a_descriptor[(2,)](TensorDescriptor(x.view, [32], [1], [BLOCK]), y.view, BLOCK)
    return seen(watch)


@triton.jit
def reads_output(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(y + at, mask=at < n)  # HERE
    tl.store(y + at, value + 1.0, mask=at < n)


@scenario
def output_read_before_it_is_written() -> dict[str, Any]:
    return in_out(reads_output, LENGTH, BLOCK)


@scenario
def output_read_after_the_host_wrote_it_is_right() -> dict[str, Any]:
    return in_out(reads_output, LENGTH, BLOCK, zeroed="y")


@triton.jit
def copies_some(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n - 7)


@scenario
def output_not_all_written() -> dict[str, Any]:
    return in_out(copies_some, LENGTH, BLOCK)


def through_a_workspace(first: Any) -> dict[str, Any]:
    x, work, y = given(), made("work"), made()
    tensors = {"x": x.view, "work": work.view, "y": y.view}
    with shadow(tensors, {"x": "input", "work": "workspace", "y": "output"}) as watch:
        first[(3,)](x.view, work.view, LENGTH, BLOCK)
        copies[(3,)](work.view, y.view, LENGTH, BLOCK)
    return seen(watch)


@scenario
def workspace_of_an_earlier_launch_is_right() -> dict[str, Any]:
    return through_a_workspace(copies)


@scenario
def workspace_not_all_written() -> dict[str, Any]:
    return through_a_workspace(copies_some)


@triton.jit
def writes_input(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    tl.store(y + at, value, mask=at < n)
    tl.store(x + at, value + 1.0, mask=at < n)  # HERE


@scenario
def input_written() -> dict[str, Any]:
    return in_out(writes_input, LENGTH, BLOCK)


@scenario
def input_written_through_an_output() -> dict[str, Any]:
    x = given().view
    tensors = {"x": x, "y": x.view(LENGTH // 2, 2)}
    return run(copies, 3, tensors, {"x": "input", "y": "output"}, LENGTH, BLOCK)


@triton.jit
def hands_over(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(y + at, tl.load(x + at))
    else:
        value = tl.load(y + at)  # HERE
        tl.store(y + tl.program_id(0) * BLOCK + at, value)


@scenario
def read_of_a_foreign_write() -> dict[str, Any]:
    return in_out(hands_over, LENGTH, BLOCK, programs=2, zeroed="y")


@triton.jit
def shifts(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(y + at + 1, mask=at + 1 < n)
    tl.store(y + at, value, mask=at < n)  # HERE


@scenario
def write_after_a_foreign_read() -> dict[str, Any]:
    return in_out(shifts, LENGTH, BLOCK, zeroed="y")


@triton.jit
def all_read_then_first_writes(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(y + at)
    if tl.program_id(0) == 2:
        tl.store(y + at, value + 1.0)  # HERE


@scenario
def write_after_many_reads() -> dict[str, Any]:
    return in_out(all_read_then_first_writes, LENGTH, BLOCK, zeroed="y")


@triton.jit
def overlaps(x, y, n, DIFFERENT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 2) + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    if DIFFERENT:
        value += tl.program_id(0)
    tl.store(y + at, value, mask=at < n)  # HERE


@scenario
def two_programs_write_the_same() -> dict[str, Any]:
    return in_out(overlaps, LENGTH, False, BLOCK)


@scenario
def two_programs_write_different_numbers() -> dict[str, Any]:
    return in_out(overlaps, LENGTH, True, BLOCK)


@triton.jit
def sums_without_atomics(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(y + at) + tl.load(x + tl.program_id(0) * BLOCK + at)  # HERE
    tl.store(y + at, value)


@scenario
def two_programs_add_with_plain_stores() -> dict[str, Any]:
    return in_out(sums_without_atomics, LENGTH, BLOCK, programs=2, zeroed="y")


@triton.jit
def mixes(x, y, n, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    if tl.program_id(0) == FIRST:
        tl.store(y + at, value)
    else:
        tl.atomic_add(y + at, value)


@scenario
def plain_store_before_an_atomic() -> dict[str, Any]:
    return in_out(mixes, LENGTH, 0, BLOCK, zeroed="y")


@scenario
def plain_store_after_atomics() -> dict[str, Any]:
    return in_out(mixes, LENGTH, 2, BLOCK, zeroed="y")


@triton.jit
def reads_atomics(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(y + at, tl.load(x + at))
    tl.load(y + at)  # HERE


@scenario
def plain_load_after_atomics() -> dict[str, Any]:
    return in_out(reads_atomics, LENGTH, BLOCK, zeroed="y")


@scenario
def plain_load_after_own_atomic_is_right() -> dict[str, Any]:
    return in_out(reads_atomics, LENGTH, BLOCK, zeroed="y", programs=1)


@triton.jit
def halves(x, y, n, SAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + (at // 2 if SAME else at))
    tl.store(y + at // 2, value)  # HERE


@scenario
def lanes_store_different_numbers() -> dict[str, Any]:
    return in_out(halves, LENGTH, False, BLOCK, programs=1)


@scenario
def lanes_store_the_same_number() -> dict[str, Any]:
    return in_out(halves, LENGTH, True, BLOCK, programs=1)


@triton.jit
def multiplies(x, y, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    offset = at * stride  # HERE
    tl.store(y + at, offset.to(tl.float32))


@scenario
def offset_overflows() -> dict[str, Any]:
    return in_out(multiplies, 1 << 28, BLOCK, programs=1)


@scenario
def offset_just_fits() -> dict[str, Any]:
    return in_out(multiplies, ((1 << 31) - 1) // 15, BLOCK, programs=1)


@triton.jit
def asserts(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.device_assert(tl.load(x + at) > n, "too small")  # HERE
    tl.store(y + at, tl.load(x + at))


@scenario
def assertion_fails() -> dict[str, Any]:
    return in_out(asserts, 1, BLOCK, programs=1)


@scenario
def assertion_holds() -> dict[str, Any]:
    return in_out(asserts, 0, BLOCK, programs=1)


@triton.jit
def assumes(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.assume(n > 100)  # HERE
    tl.store(y + at, tl.load(x + at))


@scenario
def assumption_is_false() -> dict[str, Any]:
    return in_out(assumes, LENGTH, BLOCK, programs=1)


@triton.jit
def copies_pairs(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = x.to(tl.pointer_type(tl.int32), bitcast=True)
    target = y.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)  # HERE


@scenario
def words_of_two_elements_are_right() -> dict[str, Any]:
    return in_out(copies_pairs, LENGTH // 2, BLOCK, programs=2, dtype=torch.float16)


@scenario
def words_of_two_elements_beyond_the_end() -> dict[str, Any]:
    return in_out(copies_pairs, LENGTH // 2 + 1, BLOCK, programs=2, dtype=torch.float16)


@triton.jit
def takes_turns(x, other, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(tl.where(at % 2 == 0, x + at, other + at), mask=at < n)  # HERE
    tl.store(tl.where(at % 2 == 0, y + at, y + at), value, mask=at < n)


def from_two_tensors(length: int) -> dict[str, Any]:
    x, other, y = given(), place("other", -torch.arange(1.0, length + 1), Placement(order=(0,))), made()
    tensors = {"x": x.view, "other": other.view, "y": y.view}
    found = run(takes_turns, 3, tensors, {"x": "input", "other": "input", "y": "output"}, LENGTH, BLOCK)
    return found | {"y": [None if value != value else value for value in y.view.tolist()]}


@scenario
def one_load_from_two_tensors_is_right() -> dict[str, Any]:
    return from_two_tensors(LENGTH)


@scenario
def one_load_from_two_tensors_beyond_one() -> dict[str, Any]:
    return from_two_tensors(LENGTH - 4)


@triton.jit
def counts(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rounds = tl.load(x + at.to(tl.int64) * 0 + n)  # HERE
    for _ in range(tl.max(rounds, 0)):
        tl.device_assert(n < 0, "a refused load must not make a loop run")
    tl.store(y + at, rounds, mask=at < n)


@scenario
def refused_integers_do_not_run_loops() -> dict[str, Any]:
    return with_integers(counts, 3)


@triton.jit
def draws(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.rand(n, at) + tl.randint(7, at), mask=at < n)


@scenario
def random_numbers_are_right() -> dict[str, Any]:
    return in_out(draws, LENGTH, BLOCK)


@triton.jit
def first_row_only(x, y, stride, COLS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    tl.store(y + at, tl.load(x + at), mask=at < COLS)  # HERE


@scenario
def load_between_rows_only() -> dict[str, Any]:
    x = place("x", torch.ones(2, 6), Placement(order=(0, 1), row_padding=4))
    tensors = {"x": x.view, "y": made(length=6).view}
    return run(first_row_only, 1, tensors, {"x": "input", "y": "output"}, x.view.stride(0), 6, 8)


@scenario
def a_word_reaches_between_rows() -> dict[str, Any]:
    x = place("x", torch.ones(2, 3, dtype=torch.float16), Placement(order=(0, 1), row_padding=1))
    tensors = {"x": x.view, "y": torch.zeros(2, dtype=torch.int32)}
    with shadow(tensors, {"x": "input", "y": "output"}) as watch:
        copies_pairs[(1,)](x.view, tensors["y"], 2, BLOCK)
    return seen(watch)


@scenario
def a_word_reaches_beyond_the_end() -> dict[str, Any]:
    tensors = {"x": given(length=39, dtype=torch.float16).view, "y": made(length=40, dtype=torch.float16).view}
    return run(copies_pairs, 2, tensors, {"x": "input", "y": "output"}, 20, BLOCK)


@triton.jit
def loads_crooked(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    crooked = (x.to(tl.pointer_type(tl.int8), bitcast=True) + 1).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(y + at, tl.load(crooked + at))  # HERE


@scenario
def load_across_elements() -> dict[str, Any]:
    return in_out(loads_crooked, LENGTH, BLOCK, programs=1)


@triton.jit
def words_twice(x, y, step, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    target = y.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(target + at, at + 65536 * (at + 3 + tl.program_id(0) * step))  # HERE


@scenario
def upper_halves_of_words_differ() -> dict[str, Any]:
    return in_out(words_twice, 1, BLOCK, programs=2, dtype=torch.float16)


@scenario
def words_do_not_differ() -> dict[str, Any]:
    return in_out(words_twice, 0, BLOCK, programs=2, dtype=torch.float16)


@scenario
def large_elements_named_before_small_ones() -> dict[str, Any]:
    whole = torch.zeros(2 * LENGTH)
    x, y = whole[:LENGTH], whole[LENGTH:].view(torch.float16)[:LENGTH]
    return run(copies, 3, {"x": x, "y": y}, {"x": "input", "y": "output"}, LENGTH, BLOCK)


@scenario
def a_descriptor_that_is_not_aligned() -> dict[str, Any]:
    x, y = torch.zeros(20 * 16 + 1), torch.zeros(20, 16)
    raised = ""
    with shadow({"x": x, "y": y}, {"x": "input", "y": "output"}) as watch:
        try:
            describes[(1,)](x[1:], y, 20, 8)
        except interpreter.InterpreterError as error:
            raised = str(error)
    return seen(watch, raised=raised)


def with_integers(kernel: Any, programs: int, zeroed: str = "") -> dict[str, Any]:
    tensors = {"x": torch.arange(LENGTH, dtype=torch.int32), "y": torch.zeros(LENGTH, dtype=torch.int32)}
    found = run(kernel, programs, tensors, {"x": "input", "y": "output"}, LENGTH, BLOCK, zeroed=zeroed)
    return found | {"y": tensors["y"].tolist()}


@triton.jit
def exchanges(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_xchg(y + at, tl.load(x + at, mask=at < n), mask=at < n)
    tl.load(y + at, mask=at < n)


@scenario
def exchanging_is_writing() -> dict[str, Any]:
    return with_integers(exchanges, 3)


@triton.jit
def stores_then_exchanges(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(y + at, tl.load(x + at))
    else:
        tl.atomic_xchg(y + at, tl.load(x + at))  # HERE


@scenario
def exchange_after_a_foreign_write() -> dict[str, Any]:
    return with_integers(stores_then_exchanges, 2)


@triton.jit
def loads_then_exchanges(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.load(y + at)
    else:
        tl.atomic_xchg(y + at, tl.load(x + at))  # HERE


@scenario
def exchange_after_a_foreign_read() -> dict[str, Any]:
    return with_integers(loads_then_exchanges, 2, zeroed="y")


@triton.jit
def computes(x, y, one, two, three, four, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    left = tl.where(at % 2 == 0, one, two)
    right = tl.where(at % 4 < 2, three, four)
    if OPERATION == "add":
        result = left + right
    elif OPERATION == "sub":
        result = left - right
    else:
        result = left * right
    tl.store(y + at, result.to(tl.float32))


def computed(operation: str, *numbers: int) -> dict[str, Any]:
    x, y = given(length=BLOCK), made(length=BLOCK)
    with shadow({"x": x.view, "y": y.view}, {"x": "input", "y": "output"}) as watch:
        computes[(1,)](x.view, y.view, *numbers, operation, BLOCK)
    return seen(watch)


LIMIT = (1 << 31) - 1
THIRD = LIMIT // 3
# By the end of the range that is reached: all four pairs of a left and a right number fit, or just one of them does not.
for _name, _operation, _numbers in (
    ("upper sum fits", "add", (LIMIT - 5, -7, 5, -7)),
    ("upper sum overflows", "add", (LIMIT - 5, -7, 6, -7)),
    ("lower sum fits", "add", (5 - LIMIT, 7, -6, 7)),
    ("lower sum overflows", "add", (5 - LIMIT, 7, -7, 7)),
    ("upper difference fits", "sub", (LIMIT - 5, 7, -5, 7)),
    ("upper difference overflows", "sub", (LIMIT - 5, 7, -6, 7)),
    ("lower difference fits", "sub", (5 - LIMIT, 7, 6, -7)),
    ("lower difference overflows", "sub", (5 - LIMIT, 7, 7, -7)),
    ("upper product fits", "mul", (-THIRD, 0, -3, 0)),
    ("upper product overflows", "mul", (-THIRD, 0, -4, 0)),
    ("lower product fits", "mul", (THIRD, 0, -3, 0)),
    ("lower product overflows", "mul", (THIRD, 0, -4, 0)),
):
    SCENARIOS[_name] = functools.partial(computed, _operation, *_numbers)


@scenario
def tensors_nobody_named_are_checked() -> dict[str, Any]:
    x, y = given().view, made().view
    with shadow({}, {}) as watch:
        stores_beyond[(3,)](x, y, LENGTH, BLOCK)
        reads_output[(3,)](x, y, LENGTH, BLOCK)
    return seen(watch, line=line_of(stores_beyond))


@scenario
def part_of_a_tensor_is_given() -> dict[str, Any]:
    whole, y = given(length=2 * LENGTH).view, made().view
    with shadow({"whole": whole, "y": y}, {"whole": "input", "y": "output"}) as watch:
        copies[(3,)](whole[LENGTH:], y, LENGTH, BLOCK)
        writes_input[(3,)](whole[LENGTH:], y, LENGTH, BLOCK)
    return seen(watch, line=line_of(writes_input))


@scenario
def the_limit_holds() -> dict[str, Any]:
    x, y = given().view, made().view
    with shadow({"x": x, "y": y}, {"x": "input", "y": "output"}, limit=1) as watch:
        writes_input[(3,)](x, y, LENGTH, BLOCK)
        reads_output[(3,)](y, x, LENGTH, BLOCK)
    return seen(watch)


@triton.jit
def breaks(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.load(x + at)  # HERE
    tl.static_assert(BLOCK == 1, "broken on purpose")


def state() -> list[Any]:
    builder, memory = interpreter.InterpreterBuilder, interpreter._interpreter
    names = [name for name in dir(builder) if name.startswith("create_") or name == "set_grid_idx"]
    return [
        *(getattr(memory, name) for name in ("load", "store", "atomic_rmw", "atomic_cas")),
        *(getattr(builder, name) for name in names),
        interpreter._implicit_cvt, interpreter.GridExecutor.__call__, interpreter.interpreter_builder.options,
        triton.language.semantic.TritonSemantic.binary_op_sanitize_overflow_impl,
    ]  # fmt: skip


@scenario
def a_kernel_that_raises() -> dict[str, Any]:
    before = state()
    x, y = given().view, made().view
    raised = ""
    with_watch = shadow({"x": x, "y": y}, {"x": "input", "y": "output"})
    try:
        with with_watch as watch:
            changed = state() != before
            breaks[(3,)](x, y, LENGTH, 64)
    except interpreter.InterpreterError as error:
        raised = str(error)
    return seen(watch, line=line_of(breaks), raised=raised, changed=changed, restored=state() == before)


def refusal(*arguments: Any) -> str:
    try:
        with shadow(*arguments):
            return ""
    except HarnessError as error:
        return f"{type(error).__name__}: {error}"


@scenario
def refusals() -> dict[str, Any]:
    x = given().view
    with shadow({}, {}) as watch:
        nested = refusal({}, {})
    return seen(
        watch,
        nested=nested,
        no_role=refusal({"x": x}, {}),
        no_such_role=refusal({"x": x}, {"x": "inputs"}),
        elsewhere=refusal({"x": x.to("meta")}, {"x": "input"}),
    )


@triton.jit
def synchronised(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_store(y + at, tl.load(x + at))
    tl.atomic_load(y + at)
    if tl.program_id(0) == 2:
        tl.load(y + at)  # HERE


@scenario
def plain_load_after_atomic_loads_and_stores() -> dict[str, Any]:
    if not hasattr(tl, "atomic_load"):
        return {"skipped": f"Triton {triton.__version__} has no atomic loads"}
    return in_out(synchronised, LENGTH, BLOCK, zeroed="y")


def main(*names: str) -> None:
    for name, function in SCENARIOS.items():
        if not names or name in names:
            sys.stdout.write(json.dumps({"scenario": name} | function()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
