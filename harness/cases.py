"""A fuzz case: everything that decides a question and nothing else, as a value that JSON carries; and how cases are drawn.

A case is a recipe with a seed, not arrays, plus a few single elements that shrinking can isolate. Drawn lengths cluster at
the sides of the tiles, where kernels break. Refuses to run or to judge anything.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from harness import inputs, oracle, paging, scales
from harness.errors import UsageError
from harness.foreign import Foreign
from harness.inputs import Placement
from harness.notation import EIGHT_BITS
from harness.operation import operation_for, permitting, shapes
from harness.problem import LAYOUTS, Dtype, Pass, Problem, parse_problem
from harness.space import Config
from harness.subject import Kernel, KernelSubject, described, least_keys, most_splits

# History of the schema: 1 is the first.
SCHEMA = 1
_VALUE = ConfigDict(extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)

# Head dims from plain to awkward; hypothesis shrinks towards the front.
HEAD_DIMS = (16, 8, 32, 64, 24, 40, 48, 80, 96, 128)
_LIMIT = 130
_PATCH_VALUES = (0.0, 1.0, -1.0, 100.0, -100.0, 1e-7)


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Lie:
    """Where a tensor's elements lie, where that differs from the problem's layout; see `harness.inputs.Placement`.

    `layout` lists its axes from the slowest to the fastest; the transposed "bhds" is none of a problem's layouts.
    """

    layout: Literal["bhsd", "bshd", "sbhd", "bhds"] = "bhsd"
    row_padding: int = 0
    shift: int = 0
    expanded: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Patch:
    """One element set by hand: `position` counts elements in the order of the shape."""

    tensor: str
    position: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Case:
    """A question to a kernel under a config. `problem` is in notation; `lies` are by tensor name.

    `foreign` names an implementation that is not a kernel file; it has no config, and `kernel` is then its target.
    """

    kernel: str
    problem: str
    config: Mapping[str, int | str | bool]
    recipe: str
    seed: int
    lies: Mapping[str, Lie]
    patches: tuple[Patch, ...] = ()
    foreign: Foreign | None = None

    @property
    def asked(self) -> Problem:
        return parse_problem(self.problem)

    @property
    def id(self) -> str:
        """Short digest of the case, which names its corpus file."""
        return hashlib.sha256(CASES.dump_json(self)).hexdigest()[:8]


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Counterexample:
    """A corpus file: a case, which judge it failed and how, and with what it was found."""

    schema: int
    case: Case
    judge: str
    detail: str
    found_with: Mapping[str, str]


CASES: TypeAdapter[Case] = TypeAdapter(Case)
COUNTEREXAMPLES: TypeAdapter[Counterexample] = TypeAdapter(Counterexample)


def tensors_of(case: Case) -> dict[str, Tensor]:
    """The input tensors of a case, on the CPU, as they lie; a backward problem is handed out and lse by the oracle."""
    problem = case.asked
    values = inputs.draw(problem, seed=case.seed, recipe=case.recipe)
    for patch in case.patches:
        if patch.tensor in values and values[patch.tensor].numel():
            values[patch.tensor] = values[patch.tensor].contiguous()
            flat = values[patch.tensor].view(-1)
            flat[patch.position % flat.numel()] = patch.value
    placed = {name: _placed(case, name, tensor) for name, tensor in values.items()}
    if problem.pass_ == "bwd":
        made = oracle.forward(problem, placed)
        placed["out"] = _placed(case, "out", made["out"].to(inputs.DTYPES[problem.dtype]))
        placed["lse"] = _placed(case, "lse", made["lse"].float())
    return {name: placed[name] for name in operation_for(problem).inputs}


def kernel_subject(kernel: Kernel, case: Case, *, device: str = "cpu") -> KernelSubject:
    """The subject that a case asks: `kernel` under its config, with outputs where the case says."""
    outputs = {name: _placement(case, name) for name in operation_for(case.asked).outputs if name in case.lies}
    return KernelSubject(kernel=kernel, config=case.config, device=device, outputs=outputs)


def structured(case: Case) -> bool:
    """Whether roundings may add up, so that only the worst-case bound holds."""
    shared = any(lie.expanded for lie in case.lies.values())
    return inputs.recipe_for(case.recipe).structured or bool(case.patches) or shared


def _placed(case: Case, name: str, values: Tensor) -> Tensor:
    return inputs.place(name, values, _placement(case, name)).view


def _placement(case: Case, name: str) -> Placement:
    axes = len(shapes(case.asked)[name][0])
    lie = case.lies.get(name)
    if lie is None:
        return inputs.placement_for(case.asked.layout, axes)
    # A log-sum-exp has no head dim, sinks have one axis; of two axes one layout exchanges them.
    letters = "hb" if axes == 2 and lie.layout == "sbhd" else lie.layout
    order = tuple("bhsd".index(letter) for letter in letters if "bhsd".index(letter) < axes)
    return Placement(order=order, row_padding=lie.row_padding, shift=lie.shift, expanded=lie.expanded)


def read_counterexample(path: Path) -> Counterexample:
    """Read a corpus file. Raises `UsageError` that says what is wrong with it."""
    try:
        found = COUNTEREXAMPLES.validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path} is no corpus file: {first['msg']} at {'.'.join(map(str, first['loc']))}") from error
    if found.schema != SCHEMA:
        raise UsageError(f"{path} has schema {found.schema}, this version reads {SCHEMA}")
    return found


def write_counterexample(folder: Path, found: Counterexample) -> Path:
    """Write a corpus file into `folder`, named by its case; the same case is written once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found.case.id}.json"
    path.write_bytes(COUNTEREXAMPLES.dump_json(found, indent=1) + b"\n")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


Shape = Callable[[Problem], Problem]


def case_strategy(
    kernel: str,
    pass_: Pass,
    configs: Mapping[Dtype, Sequence[Config]],
    *,
    variants: Sequence[str] = (),
    shape: Shape = lambda problem: problem,
) -> st.SearchStrategy[Case]:
    """Cases for a kernel, with configs to choose from by dtype. Simple values come first, so shrinking ends at them.

    `shape` turns a problem into one that may be asked; see `like`. `variants` are fields of a problem that are drawn, beside
    those of plain attention.
    """
    return _cases(kernel, configs, None, problem_strategies(pass_, variants), shape)


def foreign_strategy(
    foreign: Foreign, passes: Sequence[Pass], dtypes: Sequence[Dtype], shape: Shape
) -> st.SearchStrategy[Case]:
    """Cases for an implementation that is not a kernel file."""
    configs = {dtype: [Config({})] for dtype in dtypes}
    problems = [problem_strategies(pass_, ()) for pass_ in passes]
    return st.one_of([_cases(foreign.target, configs, foreign, each, shape) for each in problems])


Problems = Callable[[Dtype, Sequence[int]], st.SearchStrategy[Problem]]


def problem_strategies(pass_: Pass, variants: Sequence[str]) -> Problems:
    """By dtype and tile sides, problems of a pass: a third or a half plain, others with up to three of `variants`."""

    def problems(dtype: Dtype, sides: Sequence[int]) -> st.SearchStrategy[Problem]:
        plain = problem_strategy(pass_, dtype, sides)
        return st.one_of(plain, *(_varied(plain, variants, sides) for _ in variants[:2]))

    return problems


@st.composite
def _varied(
    draw: st.DrawFn, plain: st.SearchStrategy[Problem], variants: Sequence[str], sides: Sequence[int]
) -> Problem:
    problem = draw(plain)
    chosen = draw(st.lists(st.sampled_from(variants), min_size=1, max_size=_MOST_VARIANTS, unique=True))
    # A bias is added behind the softcap; rows that a mask leaves empty have a weight only with a sink.
    for one, several in (("softcap", {"bias"}), ("sinks", {"chunk", "documents", "mask"})):
        if one in variants and one not in chosen and several.intersection(chosen) and draw(st.booleans()):
            chosen.append(one)
    if "dropout" in chosen:
        # Random numbers take as long in the interpreter as all the rest.
        heads = min(problem.kv_heads, 2)
        problem = problem.replace(batch=min(problem.batch, 2), kv_heads=heads, q_heads=heads * min(problem.group, 2))
    if "packed" in chosen:
        problem = problem.replace(batch=1)
        if draw(st.booleans()):
            # Sequences end anywhere, also where all of them together fill their tiles.
            problem = problem.replace(kv_len=-(-problem.kv_len // sides[-1]) * sides[-1])
        chosen = [name for name in chosen if name not in ("bias", "mask", "paged")]
    return problem.replace(**{name: draw(_VARIANTS[name](sides)) for name in chosen})


_MOST_VARIANTS = 3
_SOME = ("bhqk", "bk", "hqk", "qk", "hk", "bq", "h", "")
# What a field of a problem may be beyond plain attention, by tile sides: a new one is one more entry.
_VARIANTS: Mapping[str, Callable[[Sequence[int]], st.SearchStrategy[Any]]] = {
    "softcap": lambda sides: st.sampled_from((1.0, 4.0, 0.1)),
    "alibi": lambda sides: st.just(value=True),
    "bias": lambda sides: st.sampled_from(_SOME),
    "sinks": lambda sides: st.just(value=True),
    "dropout": lambda sides: st.sampled_from((0.5, 0.1, 0.9)),
    "prefix": lambda sides: st.just(value=True),
    "chunk": lambda sides: st.integers(1, sides[0]) | _lengths(sides).map(lambda length: max(length, 1)),
    "documents": lambda sides: st.just(value=True),
    "mask": lambda sides: st.sampled_from(_SOME),
    "packed": lambda sides: st.sampled_from((3, 1, 2, 5)),
    "paged": lambda sides: st.sampled_from((16, 3, 1, 32, 5, 64, *sides)),
    **dict.fromkeys(("lse_grad", "nondeterministic"), lambda sides: st.just(value=True)),
}


# Steps of a kernel (a tile of queries against one of keys) that a case with several heads takes, at most: tenths of a second
# in the interpreter.
_MOST_STEPS = 24
# Tile sides of libraries, where nobody says which they are.
_FOREIGN_SIDES = (16, 32, 64, 128)
_RECIPES = sorted(inputs.RECIPES, key=lambda name: name != "normal")
# Batches, key/value heads, query heads to each of them.
_HEADS = (
    (1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2), (1, 1, 3), (2, 2, 1), (1, 3, 1), (3, 1, 1), (2, 1, 2), (1, 2, 3),
    (2, 2, 2), (1, 1, 4), (1, 1, 5), (1, 1, 8), (1, 3, 2), (3, 3, 1), (2, 3, 2), (1, 2, 4), (1, 1, 3), (1, 1, 3),
)  # fmt: skip


@st.composite
def _cases(
    draw: st.DrawFn,
    kernel: str,
    configs: Mapping[Dtype, Sequence[Config]],
    foreign: Foreign | None,
    problems: Problems,
    shape: Shape,
) -> Case:
    eight = [name for name in EIGHT_BITS if name in configs]
    plain = [name for name in ("fp16", "bf16", "fp32") if name in configs]
    dtype: Dtype = draw(st.sampled_from(plain * (2 if eight else 1) + eight))
    config = draw(st.sampled_from(configs[dtype]))
    problem = permitting(shape(draw(problems(dtype, _sides(config)))), config)
    if described(config, ("k",)):
        problem = paging.describable(scales.describable(problem), config)
    operation = operation_for(problem)
    # Descriptors need aligned rows of stride 1, so what a config asks them for lies as the layout says.
    bound = (*described(config, operation.tensors), *inputs.LINED)
    free = tuple(name for name in operation.tensors if name not in bound)
    drawn = tuple(name for name in operation.inputs if name not in ("out", "lse", *inputs.FIXED))
    ranks = {name: len(shape) for name, (shape, _) in shapes(problem).items()}
    shared = {*drawn} - {*(paging.POOLS if problem.paged is not None else ())}  # pages are never all the same
    lies = {name: lie for name in free if (lie := draw(_lies(name, ranks[name], shared=name in shared))) is not None}
    patch = st.builds(
        Patch, tensor=st.sampled_from(drawn), position=st.integers(0, 4096), value=st.sampled_from(_PATCH_VALUES)
    )
    return Case(
        kernel=kernel,
        problem=str(problem),
        config=dict(config),
        recipe=draw(st.sampled_from(_RECIPES)),
        seed=draw(st.integers(0, 255)),
        lies=lies,
        patches=tuple(draw(st.lists(patch, max_size=2))),
        foreign=foreign,
    )


@st.composite
def problem_strategy(draw: st.DrawFn, pass_: Pass, dtype: Dtype, sides: Sequence[int]) -> Problem:
    """A small problem whose lengths and windows lie at and around the tiles' sides."""
    length = _lengths(sides)
    q_len = draw(length)
    kv_len = draw(st.just(q_len) | length | length.map(lambda more: min(q_len + more, _LIMIT)))
    if draw(st.sampled_from((False, False, True))):
        q_len, kv_len = kv_len, q_len
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    # Without a band blocks are visible as a whole, with one few of them are.
    banded = draw(st.sampled_from((False, True, True)))
    wide = st.integers(2 * sides[0] - 1, 3 * sides[0])  # Whole blocks lie between the edges of such a window.
    bound = st.none() | length | st.integers(0, 9) | wide if banded else st.none()
    causal = banded and draw(st.booleans())
    steps = -(-q_len // min(sides)) * -(-kv_len // min(sides))
    batch, kv_heads, group = draw(
        st.sampled_from([heads for heads in _HEADS if math.prod(heads) * steps <= max(_MOST_STEPS, steps)])
    )
    return Problem(
        batch=batch,
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        v_head_dim=draw(st.just(head_dim) | st.sampled_from(HEAD_DIMS)),
        dtype=dtype,
        causal=causal,
        window_left=draw(bound),
        window_right=None if causal else draw(bound),
        top_left=draw(st.booleans()),
        scale=draw(st.sampled_from((None, 0.5, 1.0, -0.25, 0.0, 0.1))),
        layout=draw(st.sampled_from(LAYOUTS)),
        pass_=pass_,
    )


def like(wanted: Problem) -> Shape:
    """Shapes problems like `wanted` in everything but lengths and numbers of heads; a window keeps its length if it has that
    side, and what is drawn beyond that becomes what is wanted."""

    def side(drawn: int | None, asked: int | None) -> int | None:
        return None if asked is None else (asked if drawn is None else drawn)

    def shape(problem: Problem) -> Problem:
        added = {name: getattr(wanted, name) for name in _VARIANTS}
        if wanted.chunk:
            # Lengths are drawn, so this takes several values.
            added["chunk"] = max(1, min(wanted.chunk, problem.kv_len // 2 + 5))
        if wanted.packed:
            added |= {"batch": 1, "packed": min(wanted.packed, 1 + (problem.q_len + problem.kv_len) % 5)}
        return problem.replace(
            head_dim=wanted.head_dim,
            v_head_dim=wanted.v_head_dim,
            causal=wanted.causal,
            window_left=side(problem.window_left, wanted.window_left),
            window_right=None if wanted.causal else side(problem.window_right, wanted.window_right),
            top_left=wanted.top_left,
            scale=wanted.scale,
            layout=wanted.layout,
            **added,
        )

    return shape


def _lengths(sides: Sequence[int]) -> st.SearchStrategy[int]:
    near = sorted({side * times + step for side in sides for times in (1, 2) for step in (-1, 0, 1)} | {0, 1, 2, 3})
    # Nothing at all is drawn now and then; more often it would displace what has elements.
    anywhere = st.integers(1, min(max(sides[-1], 4 * sides[0]) + 8, _LIMIT))
    return st.sampled_from([length for length in near if 0 < length <= _LIMIT] + [0]) | anywhere


@st.composite
def _lies(draw: st.DrawFn, name: str, rank: int, *, shared: bool) -> Lie | None:
    """`shared`: elements may share memory, as they must not where they are written, or follow from other tensors."""
    if draw(st.sampled_from((True, True, True, False))):
        return None
    axes = (0, 1, 2) if name == "dout" else (0, 1)[:rank]
    return Lie(
        layout=draw(st.sampled_from(("bhsd", "bshd", "sbhd", "bhds"))),
        row_padding=draw(st.sampled_from((0, 8, 3))),
        shift=draw(st.sampled_from((0, 1))),
        expanded=tuple(sorted(draw(st.sets(st.sampled_from(axes), max_size=1)))) if shared else (),
    )


def _sides(config: Mapping[str, Any]) -> list[int]:
    """Lengths around which a kernel changes what it does: sides of tiles, and the keys of which each part has one block."""
    sides = {value for name, value in config.items() if "block" in name and isinstance(value, int)}
    shared = least_keys(config) * most_splits(config)
    if sides and shared <= _LIMIT:
        sides.add(shared)
    return sorted(sides) or list(_FOREIGN_SIDES)
