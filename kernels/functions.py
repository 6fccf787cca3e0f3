"""Score and mask functions of the caller, by name.

A PyTorch operator carries tensors, numbers and text, and no `@triton.jit` functions. So those are registered once under a name,
which travels as text, and what they are given at a call travels beside it: tensors, whole numbers and floating-point numbers.
Refuses to let a name mean something else later, because the backward pass of an old call would then take the new functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.runtime.jit import KernelInterface

from .variants import Functions

# How many tensors the operators have room for.
MOST_TENSORS = 4

_SCORE_PARAMETERS = 6
_ALLOWED_PARAMETERS = 5

_REGISTERED: dict[str, Functions] = {}


def register_functions(name: str, *, score: Any = None, slope: Any = None, allowed: Any = None) -> str:
    """Make `attention(..., functions=name, given=(...))` inline these `@triton.jit` functions into its kernels; returns `name`.

    score(x, batch, head, query, key, given) -> the changed score of x: fp32 in natural units (scaled, and behind softcap, slopes
    and bias). slope(x, batch, head, query, key, given) -> its derivative by x at the same x; only a backward pass needs it.
    allowed(batch, head, query, key, given) -> whether a pair may be visible, beside what band, mask, ... say.

    x is a tile. batch and head are numbers; query and key are int32 positions that broadcast to the tile, in either order of its
    axes, and may lie beyond the lengths: a load that depends on them must be masked. given[i] is what the call gave: a number
    (floating-point ones as fp32), or a pointer to the first element of a tensor, whose strides the functions must know.

    Raises `ValueError` for a name that means other functions already, and for functions that cannot be called so.
    """
    found = Functions(score=score, slope=slope, allowed=allowed)
    _require_callable("score", score, _SCORE_PARAMETERS)
    _require_callable("slope", slope, _SCORE_PARAMETERS)
    _require_callable("allowed", allowed, _ALLOWED_PARAMETERS)
    if not name or (score is None and allowed is None):
        raise ValueError("register_functions needs a name, and a score or allowed function")
    if slope is not None and score is None:
        raise ValueError(f"`{name}` has a slope without the score that it is the derivative of")
    known = _REGISTERED.setdefault(name, found)
    if any(old is not new for old, new in zip(known, found, strict=True)):
        raise ValueError(f"`{name}` is the name of other functions already: take another one")
    return name


def _require_callable(word: str, function: Any, parameters: int) -> None:
    if function is None:
        return
    if not isinstance(function, KernelInterface):
        raise ValueError(f"{word} must be a `@triton.jit` function, found {function!r}")
    if len(function.arg_names) != parameters:
        raise ValueError(f"{word} must have {parameters} parameters, found ({', '.join(function.arg_names)})")
    if not any(value is triton.language for value in function.fn.__globals__.values()):
        raise ValueError(f"the module of {word} must import triton.language, where Triton's interpreter looks for it")


@dataclass(frozen=True, slots=True)
class Given:
    """What functions are given at a call, apart by type; `kinds` is its order, a letter each: t tensor, i whole number, f
    floating-point number."""

    kinds: str
    tensors: list[Tensor]
    floats: list[float]
    ints: list[int]


def apart(given: Sequence[Any]) -> Given:
    """Raises `TypeError` for what is neither a tensor nor a number, `ValueError` for too many tensors."""
    found = Given("".join(_kind_of(value) for value in given), [], [], [])
    for kind, value in zip(found.kinds, given, strict=True):
        {"t": found.tensors, "f": found.floats, "i": found.ints}[kind].append(value)
    if len(found.tensors) > MOST_TENSORS:
        raise ValueError(f"given holds at most {MOST_TENSORS} tensors, found {len(found.tensors)}: join some of them")
    return found


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "t"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"given holds tensors, whole numbers and floating-point numbers, found {value!r}")
    return "i" if isinstance(value, int) else "f"


def together(name: str, given: Given) -> Functions:
    """The functions of that name with what they are given, in its order. Raises `ValueError` for an unknown name."""
    waiting = {"t": iter(given.tensors), "f": iter(given.floats), "i": iter(given.ints)}
    values = tuple(next(waiting[kind]) for kind in given.kinds)
    return _functions_of(name)._replace(given=values or None)


def require_slope(name: str) -> None:
    """Raise `ValueError` if the functions of that name have no derivative."""
    found = _functions_of(name)
    if found.score is not None and found.slope is None:
        raise ValueError(
            f"the functions `{name}` have no backward pass: register the derivative of their score as `slope`, or call "
            "attention under torch.no_grad()"
        )


def _functions_of(name: str) -> Functions:
    if name not in _REGISTERED:
        known = ", ".join(sorted(_REGISTERED)) or "none"
        raise ValueError(f"no functions are registered as `{name}` (known: {known}): call register_functions first")
    return _REGISTERED[name]
