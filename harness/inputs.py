"""Tensors for a problem: values by recipe and seed, in memory that notices who writes where it should not.

Every tensor is a strided view in the middle of a larger storage. All memory around it and in the gaps between its rows
holds NaNs with a payload of its own, so a stray read shows up in the results and a stray write in the payloads. Outputs
begin as NaNs with another payload. Refuses to know kernels and references, and to draw from any global generator.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness import paging
from harness.errors import UsageError, did_you_mean
from harness.operation import ADDED_INPUTS, SCALES, operation_for, shapes
from harness.problem import Layout, Problem

DTYPES: Mapping[str, torch.dtype] = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool,
    "fp8e4m3": torch.float8_e4m3fn, "fp8e5m2": torch.float8_e5m2,
}  # fmt: skip

_BITS: Mapping[torch.dtype, torch.dtype] = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.int32: torch.int32,
    torch.bool: torch.uint8,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
# Quiet NaNs with payloads: around a tensor, and inside an output that was not written yet. Around integers and truth values,
# which have no NaN: a large number, and true.
_GUARD: Mapping[torch.dtype, int] = {
    torch.float16: 0x7E5A, torch.bfloat16: 0x7FDA, torch.float32: 0x7FC05A5A, torch.float64: 0x7FF85A5A5A5A5A5A,
    torch.int32: 0x5A5A5A5A, torch.bool: 1, torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7E,
}  # fmt: skip
_UNWRITTEN: Mapping[torch.dtype, int] = {
    torch.float16: 0x7E33, torch.bfloat16: 0x7FE3, torch.float32: 0x7FC03333, torch.float64: 0x7FF8333333333333,
}  # fmt: skip
# A large number instead of a NaN: what a maximum or a comparison would swallow as NaN differs from it in a second run.
_UNWRITTEN_LARGE: Mapping[torch.dtype, int] = {
    torch.float16: 0x7833, torch.bfloat16: 0x7133, torch.float32: 0x71333333, torch.float64: 0x7133333333333333,
}  # fmt: skip

# Elements kept free on either side: this many rows of the tensor (a tile that runs over), rounded up to keep alignment.
_GUARD_ROWS = 128
_ALIGNMENT = 64
_GUARD_LIMIT = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the elements of a tensor lie.

    `order` lists its axes from the slowest to the fastest in memory. `row_padding` elements follow every run of the fastest
    axis; `shift` moves the first element off its alignment; `expanded` axes have stride 0, all their elements being one.
    """

    order: tuple[int, ...]
    row_padding: int = 0
    shift: int = 0
    expanded: tuple[int, ...] = ()


_ORDERS: Mapping[Layout, tuple[int, ...]] = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}


def placement_for(layout: Layout, axes: int = 4) -> Placement:
    """The placement of a problem's layout; tensors with fewer axes (lse) are contiguous."""
    return Placement(order=_ORDERS[layout] if axes == 4 else tuple(range(axes)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guarded:
    """A tensor `view` inside a guarded flat `storage` (integers, the bits). `pristine` is a copy of the storage as it was
    before anybody else saw it; None on the meta device, where there are no bits."""

    name: str
    view: Tensor
    storage: Tensor
    pristine: Tensor | None

    @property
    def bits(self) -> Tensor:
        """The elements as integers, in the shape of the view."""
        return self.storage.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())

    def unchanged(self) -> bool:
        """Whether every bit, elements and guards, is what it was."""
        return self.pristine is None or torch.equal(self.storage, self.pristine)

    def stray_write(self) -> int | None:
        """How many elements before (negative) or behind the first element of the view the first damaged guard lies."""
        if self.pristine is None:
            return None
        differing = self.storage != self.pristine
        reachable(differing, self.view).fill_(False)
        found = differing.nonzero()
        return int(found[0]) - int(self.view.storage_offset()) if len(found) else None

    def unwritten(self) -> Tensor:
        """Which elements still hold, bit for bit, what was there before; shape of the view."""
        if self.pristine is None:
            return torch.zeros_like(self.view, dtype=torch.bool)
        return self.bits == self.pristine.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())


def reachable(storage: Tensor, view: Tensor) -> Tensor:
    """The elements of `storage` that `view` can reach, each once: stride-0 axes are taken as one element."""
    shape = [min(size, 1) if stride == 0 else size for size, stride in zip(view.shape, view.stride(), strict=True)]
    return storage.as_strided(shape, view.stride(), view.storage_offset())


def place(name: str, values: Tensor, placement: Placement, *, device: str = "cpu") -> Guarded:
    """An input: `values` laid out by `placement` between guards. Along expanded axes the first value counts."""
    found = _allocate(name, tuple(values.shape), values.dtype, placement)
    first = values
    for axis in placement.expanded:
        first = first.narrow(axis, 0, min(1, first.shape[axis]))
    reachable(found.storage, found.view).copy_(first.contiguous().view(_BITS[values.dtype]))
    return _sealed(found, device)


def place_as(name: str, given: Tensor, *, device: str = "cpu") -> Guarded:
    """An input: a copy of `given` between guards, with its strides, its alignment and what its stride-0 axes share.

    Strides must not let two elements overlap otherwise.
    """
    found = _between_guards(
        name, tuple(given.shape), given.dtype, given.stride(), shift=int(given.storage_offset()) % _ALIGNMENT
    )
    reachable(found.storage, found.view).copy_(reachable(given, given).to("cpu").contiguous().view(_BITS[given.dtype]))
    return _sealed(found, device)


def unwritten(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    placement: Placement,
    *,
    device: str = "cpu",
    large: bool = False,
) -> Guarded:
    """An output or workspace between guards, filled with NaN, or with a large number if `large`."""
    found = _allocate(name, shape, dtype, placement)
    reachable(found.storage, found.view).fill_((_UNWRITTEN_LARGE if large else _UNWRITTEN)[dtype])
    return _sealed(found, device)


def _allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype, placement: Placement) -> Guarded:
    strides = [0] * len(shape)
    step = 1
    for axis in reversed(placement.order):
        if axis in placement.expanded:
            continue
        strides[axis] = step
        step *= max(shape[axis], 1)
        if axis == placement.order[-1]:
            step += placement.row_padding
    return _between_guards(name, shape, dtype, tuple(strides), shift=placement.shift)


def _between_guards(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...], *, shift: int
) -> Guarded:
    if dtype not in _BITS:
        raise UsageError(f"tensors of {dtype} cannot be guarded", hint=f"known: {', '.join(map(str, _BITS))}")
    footprint = (
        1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    )
    row = strides[-2] if len(shape) > 1 else 1
    guard = -(-min(_GUARD_ROWS * max(row, 1), _GUARD_LIMIT) // _ALIGNMENT) * _ALIGNMENT
    storage = torch.full((guard + shift + footprint + guard,), _GUARD[dtype], dtype=_BITS[dtype])
    view = storage.view(dtype).as_strided(shape, strides, guard + shift)
    return Guarded(name=name, view=view, storage=storage, pristine=None)


def _sealed(found: Guarded, device: str) -> Guarded:
    """Move to `device`, strides and all, and remember the bits."""
    storage = found.storage.to(device)
    view = storage.view(found.view.dtype).as_strided(found.view.shape, found.view.stride(), found.view.storage_offset())
    pristine = None if storage.is_meta else storage.clone()
    return Guarded(name=found.name, view=view, storage=storage, pristine=pristine)


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------

Draw = Callable[[Problem, str, tuple[int, ...], np.random.Generator], np.ndarray]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named distribution of inputs. `structured` values may round in one systematic direction (see `harness.bounds`)."""

    name: str
    why: str
    draw: Draw
    structured: bool = False


def _normal(problem: Problem, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    return generator.standard_normal(shape, dtype=np.float32)


def _large(problem: Problem, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    return _normal(problem, name, shape, generator) * (4.0 if name in ("q", "k") else 1.0)


def _outliers(problem: Problem, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    values = _normal(problem, name, shape, generator)
    rare = generator.random((*shape[:-1], 1)) < 0.02
    return np.where(rare, values * np.float32(10.0), values)


def _constant_rows(problem: Problem, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Every key is the same, so every row is a tie; values are positive, so roundings add up (arXiv 2510.04212)."""
    values = _normal(problem, name, shape, generator)
    if name == "k":
        # Paged, the first axis has pages instead of sequences.
        return np.broadcast_to(values[:, :, :1] if problem.paged is None else values[:1, :, :1], shape)
    return np.abs(values) if name == "v" else values


def _integers(problem: Problem, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    return generator.integers(-2, 3, shape).astype(np.float32)


def _counting(problem: Problem, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Scores all 0, values one-hot: out counts the visible keys of each class, divided by the number of visible keys.

    Key j of head h falls in class (a j + b floor(j / Dv)) mod Dv, with other a and b in every head.
    """
    if name == "q":
        return np.zeros(shape, dtype=np.float32)
    if name != "v":
        return _normal(problem, name, shape, generator)
    batch, heads, length, classes = shape
    # Every page differs from the others; sequences need not.
    key = (
        np.arange(length)[None, None] if problem.paged is None else np.arange(batch * length).reshape(batch, 1, length)
    )
    head = np.arange(heads)[:, None]
    chosen = (key * (2 * head + 1) + (key // classes) * (head + 1)) % classes
    return np.broadcast_to(np.eye(classes, dtype=np.float32)[chosen], shape) if batch and length else np.zeros(shape)


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("normal", "the ordinary case", _normal),
        Recipe("large", "scores of +-50: the running maximum grows often and few keys matter", _large),
        Recipe("outliers", "a few rows are ten times as large as the others", _outliers),
        Recipe("constant_rows", "ties everywhere and values of one sign", _constant_rows, structured=True),
        Recipe("integers", "exact products, many ties", _integers, structured=True),
        Recipe(
            "counting", "reads the mask back: the output counts the keys that were seen", _counting, structured=True
        ),
    )
}

# The position of a name seeds its stream: append only.
_STREAMS = (
    "q", "k", "v", "dout", "slopes", "bias", "sinks", "prefix", "q_documents", "kv_documents", "mask", "dlse", "q_starts",
    "kv_starts", "block_table", "kv_lengths", *SCALES,
)  # fmt: skip
# What lies one behind the other, as a kernel may expect.
LINED = ("q_starts", "kv_starts")
# What must not be changed at will: starts of sequences rise from 0 to a length, tables name pages for every row, scales are not
# negative.
FIXED = (*LINED, "block_table", "kv_lengths", *SCALES)

# Lengths of documents, and shares of a mask that are visible: from next to nothing to all.
_DOCUMENTS = (3, 17, 70)
_VISIBLE = (0.05, 0.5, 0.9, 1.0)
# Share of scales that are 0.
_NOTHING = 0.03


def _drawn_masks(problem: Problem, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Integers and truth values, whatever the recipe.

    Documents are runs of equal numbers, which may come back, as they must for queries and keys to be of one; sometimes each
    position has its own. Masks leave a drawn share visible, and whole rows invisible now and then. Some packed sequences are
    empty.
    """
    if name == "block_table":
        return paging.draw_table(problem, shape, generator)
    if name == "kv_lengths":
        return paging.draw_lengths(problem, generator)
    if name in LINED:
        total = problem.q_len if name == "q_starts" else problem.kv_len
        cuts = np.sort(generator.integers(0, total + 1, shape[0] - 2))
        # One of them empty, if there are several.
        cuts[1:2] = cuts[:1]
        return np.concatenate([[0], cuts, [total]])
    if name == "prefix":
        return generator.integers(0, problem.kv_len + 2, shape)
    if name == "mask":
        seen = generator.random(shape) < generator.choice(_VISIBLE)
        rows = generator.random((*shape[:-1], 1)) < 0.9
        return np.asarray(seen & rows)
    length = int(generator.choice(_DOCUMENTS))
    starts = generator.random(shape) < 1.0 / length
    return np.asarray(np.cumsum(starts, axis=-1) % 3 + 1)


def _drawn_terms(
    problem: Problem, name: str, shape: tuple[int, ...], recipe: Recipe, generator: np.random.Generator
) -> np.ndarray:
    """Slopes, biases, sinks and scales; in a recipe whose scores are all equal, none that changes them.

    Scales are powers of two in recipes whose products are exact, and only there; else 0 now and then, as that of a tensor of
    nothing but 0.
    """
    if name in SCALES:
        if recipe.structured:
            return np.asarray(np.exp2(generator.integers(-1, 2, shape)))
        return np.where(generator.random(shape) < _NOTHING, 0.0, np.exp2(1.5 * generator.random(shape) - 1))
    if recipe.name == "counting":
        return np.full(shape, -np.inf if name == "sinks" else 0.0)
    values = generator.standard_normal(shape)
    if recipe.name == "integers":
        values = np.round(values)
    # As published: 2^-8 to 1/2 (Press, Smith and Lewis 2021, section 3).
    return np.exp2(-8 * generator.random(shape)) if name == "slopes" and recipe.name != "integers" else values


def recipe_for(name: str) -> Recipe:
    """The recipe of that name. Raises `UsageError` naming the nearest one."""
    if name not in RECIPES:
        raise UsageError(f"there is no recipe `{name}`", hint=did_you_mean(name, list(RECIPES)))
    return RECIPES[name]


def draw(problem: Problem, *, seed: int, recipe: str = "normal") -> dict[str, Tensor]:
    """q, k, v, what the problem adds to them, and dout (and dlse) in a backward problem, contiguous on the CPU, in the dtypes of
    the operation.

    Each tensor has a stream of its own, made of the seed and its name. The layout has no influence on the values.
    """
    names = [name for name in operation_for(problem).inputs if name not in ("out", "lse")]
    return _draw(problem, names, seed, recipe_for(recipe))


def draw_added(problem: Problem, *, seed: int) -> dict[str, Tensor]:
    """Only what the problem adds to q, k, v and dout, for timing: paged sequences are all as long as kv_len."""
    names = [name for name in operation_for(problem).inputs if name in ADDED_INPUTS]
    drawn = _draw(problem, names, seed, recipe_for("normal"))
    return drawn if problem.paged is None else drawn | paging.full(problem, np.random.default_rng(seed))


def _draw(problem: Problem, names: Sequence[str], seed: int, chosen: Recipe) -> dict[str, Tensor]:
    every = shapes(problem)
    drawn = {}
    for name in names:
        shape, dtype = every[name]
        stream = np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(name),))
        generator = np.random.Generator(np.random.PCG64(stream))
        if dtype in ("int32", "bool"):
            drawn[name] = torch.from_numpy(np.array(_drawn_masks(problem, name, shape, generator))).to(DTYPES[dtype])
            continue
        if name in ("slopes", "bias", "sinks", *SCALES):
            values = _drawn_terms(problem, name, shape, chosen, generator)
        else:
            values = chosen.draw(problem, name, shape, generator)
        drawn[name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(DTYPES[dtype])
    return paging.spoiled(problem, drawn)
