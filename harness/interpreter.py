"""What FlashTune knows of Triton's interpreter: how to look over its shoulder, and what it is known to get wrong.

Everything that reaches into Triton's internals for this is here, for Triton 3.6 to 3.9. Refuses to judge what it sees, and
to mend the interpreter's arithmetic.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as _interpreter

from harness.errors import MachineError

Array = NDArray[Any]


class Observer(Protocol):
    """Who stands in for the interpreter's memory operations. Addresses and masks are arrays of one shape; a mask may also
    be a buffer of bytes; `atomic` marks the atomic loads and stores of Triton 3.9."""

    def launch_begins(self, kernel: str, arguments: Mapping[str, Any]) -> None: ...

    def program_begins(self) -> None: ...

    def address(self, tensor: Tensor) -> int: ...

    def asserted(self, message: str) -> None: ...

    def load(self, addresses: Array, mask: Any, other: Array, dtype: Any, *, atomic: bool = False) -> Array: ...

    def store(self, addresses: Array, values: Array, mask: Any, *, atomic: bool = False) -> None: ...

    def atomic_rmw(self, operation: Any, addresses: Array, values: Array, mask: Any, order: Any) -> Array: ...

    def atomic_cas(self, addresses: Array, expected: Array, values: Array, order: Any) -> Array: ...


@dataclass(frozen=True, slots=True)
class Operations:
    """The interpreter's own memory operations; `exchange` is the atomic operation that reads nothing; `builder` knows
    `grid_idx` and `grid_dim` of the running program."""

    load: Callable[..., Array]
    store: Callable[..., None]
    atomic_rmw: Callable[..., Array]
    atomic_cas: Callable[..., Array]
    exchange: Any
    builder: Any


def operations() -> Operations:
    """The operations as they are now."""
    memory = _interpreter._interpreter
    return Operations(
        load=memory.load,
        store=memory.store,
        atomic_rmw=memory.atomic_rmw,
        atomic_cas=memory.atomic_cas,
        exchange=memory.RMW_OP.XCHG,
        builder=_interpreter.interpreter_builder,
    )


def require() -> None:
    """Raise `MachineError` unless kernels are interpreted in this process and nobody observes them yet."""
    if not triton.knobs.runtime.interpret:
        raise MachineError(
            "kernels are compiled in this process, and compiled kernels cannot be watched",
            hint="set TRITON_INTERPRET=1 before triton and the kernels are imported",
        )
    if hasattr(_interpreter._interpreter.load, "observer"):
        raise MachineError("the interpreter is being watched already", hint="close the other watch first")


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Put `observer` in the place of the interpreter's memory operations and assertions until the context closes.

    Device assertions and checks of integer arithmetic, which the interpreter leaves out, are made; where one fails,
    `observer` is told and the kernel goes on.
    """
    builder, memory = _interpreter.InterpreterBuilder, _interpreter._interpreter
    options = dataclasses.replace(_interpreter.interpreter_builder.options, debug=True, sanitize_overflow=True)
    atomic = _Flag()
    with ExitStack() as restored:
        _replace(restored, _interpreter.interpreter_builder, "options", options)
        _replace(restored, memory, "load", _loading(observer, atomic))
        _replace(restored, memory, "store", _storing(observer, atomic))
        _replace(restored, memory, "atomic_rmw", observer.atomic_rmw)
        _replace(restored, memory, "atomic_cas", observer.atomic_cas)
        for name in ("create_atomic_load", "create_atomic_store", "create_atomic_poll"):
            if hasattr(builder, name):
                _replace(restored, builder, name, _marked(getattr(builder, name), atomic))
        _replace(restored, builder, "set_grid_idx", _stepping(builder.set_grid_idx, observer))
        _replace(restored, builder, "create_assert", _asserting(observer))
        _replace(restored, builder, "create_assume", _assuming(observer))
        _replace(restored, _interpreter, "_implicit_cvt", _converting(_interpreter._implicit_cvt, observer))
        executor = _interpreter.GridExecutor
        _replace(restored, executor, "__call__", _launching(executor.__call__, observer))
        name = "binary_op_sanitize_overflow_impl"
        _replace(restored, TritonSemantic, name, _checked_quickly(getattr(TritonSemantic, name)))
        yield


@dataclass(slots=True)
class _Flag:
    on: bool = False


def _replace(restored: ExitStack, owner: Any, name: str, value: Any) -> None:
    restored.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _loading(observer: Observer, atomic: _Flag) -> Callable[..., Array]:
    def load(addresses: Array, mask: Any, other: Array, dtype: Any) -> Array:
        return observer.load(addresses, mask, other, dtype, atomic=atomic.on)

    load.observer = observer  # type: ignore[attr-defined]
    return load


def _storing(observer: Observer, atomic: _Flag) -> Callable[..., None]:
    def store(addresses: Array, values: Array, mask: Any) -> None:
        observer.store(addresses, values, mask, atomic=atomic.on)

    return store


def _marked(operation: Callable[..., Any], atomic: _Flag) -> Callable[..., Any]:
    def marked(*arguments: Any) -> Any:
        atomic.on = True
        try:
            return operation(*arguments)
        finally:
            atomic.on = False

    return marked


def _stepping(step: Callable[..., None], observer: Observer) -> Callable[..., None]:
    def set_grid_idx(builder: Any, x: int, y: int, z: int) -> None:
        step(builder, x, y, z)
        observer.program_begins()

    return set_grid_idx


def _asserting(observer: Observer) -> Callable[..., None]:
    def create_assert(builder: Any, condition: Any, message: str) -> None:
        if not condition:
            observer.asserted(str(message))

    return create_assert


def _assuming(observer: Observer) -> Callable[..., None]:
    def create_assume(builder: Any, condition: Any) -> None:
        if not condition:
            observer.asserted("what `tl.assume` promises does not hold")

    return create_assume


def _converting(convert: Callable[[Any], Any], observer: Observer) -> Callable[[Any], Any]:
    # Tuples and descriptors come here again for what is in them.
    def implicit_cvt(argument: Any) -> Any:
        converted = convert(argument)
        tensor = getattr(argument, "base", argument)
        if hasattr(argument, "data_ptr") and isinstance(tensor, Tensor):
            converted.handle.data = np.array([observer.address(tensor)], dtype=np.uint64)
        return converted

    return implicit_cvt


def _launching(launch: Callable[..., None], observer: Observer) -> Callable[..., None]:
    def call(executor: Any, *arguments: Any, **keywords: Any) -> None:
        named = dict(zip(executor.arg_names, arguments, strict=False)) | keywords
        observer.launch_begins(executor.fn.__name__, named)
        launch(executor, *arguments, **keywords)

    return call


def _checked_quickly(check: Callable[..., None]) -> Callable[..., None]:
    """The check of integer arithmetic, skipped where the extremes of the operands show that nothing can overflow."""

    def sanitize(semantic: Any, left: Any, right: Any, operation: Callable[..., Any]) -> None:
        one, two = left.handle.data, right.handle.data
        kind, name = left.type.scalar, operation.__name__
        if kind.int_bitwidth >= 64:
            return
        if one.size and two.size and kind.int_bitwidth >= 8 and name in _EXTREMES:
            extremes = _EXTREMES[name]((int(one.min()), int(one.max())), (int(two.min()), int(two.max())))
            if kind.get_int_min_value() <= min(extremes) and max(extremes) <= kind.get_int_max_value():
                return
        check(semantic, left, right, operation)

    return sanitize


_Range = tuple[int, int]
_EXTREMES: Mapping[str, Callable[[_Range, _Range], tuple[int, ...]]] = {
    "add": lambda one, two: (one[0] + two[0], one[1] + two[1]),
    "sub": lambda one, two: (one[0] - two[1], one[1] - two[0]),
    "mul": lambda one, two: tuple(a * b for a in one for b in two),
}


# ---------------------------------------------------------------------------------------------------------------------
# Known faults
# ---------------------------------------------------------------------------------------------------------------------


def interpreter_faults() -> tuple[str, ...]:
    """Which known faults the interpreter of the installed Triton has beside the installed numpy, sorted.

    Found by asking, not by version, and in a process in which Triton compiles as well. A probe that raises is a fault: what
    is not shown to be right is not right. "bf16-" and "fp8-" faults are wrong numbers without a word; "fma-rounds-twice",
    "max-keeps-nan" and "bool-addition" differ from the hardware; "runtime-range" refuses loop bounds known at run time only;
    "device-assert" and "overflow-checks" are checks that are not made (a `shadow` makes them).
    """
    return tuple(sorted(name for name, right in _PROBES.items() if not _answers(right)))


def _answers(right: Callable[[], bool]) -> bool:
    # What a probe may raise differs between versions; these are the ones seen.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return right()
        except (ArithmeticError, AssertionError, AttributeError, NotImplementedError, TypeError, ValueError):
            return False


_BUILDER = _interpreter.InterpreterBuilder()
_NEAREST = ir.ROUNDING_MODE.RTNE


def _of(kind: Any, *values: float, bits: bool = False) -> Any:
    """A vector of `values`, or of the bit patterns that they are."""
    if kind == tl.bfloat16 and not bits:
        stored = (np.array(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = np.array(values, dtype=_interpreter._get_np_dtype(kind))
    return _interpreter.TensorHandle(stored, kind)


def _is(handle: Any, *expected: float) -> bool:
    return bool(handle.data.ravel().tolist() == list(expected))


def _brain(handle: Any, *expected: float) -> bool:
    return _is(handle, *_of(tl.bfloat16, *expected).data.tolist())


def _dot() -> bool:
    two, three, zero = _of(tl.bfloat16, 2.0), _of(tl.bfloat16, 3.0), _of(tl.float32, 0.0)
    for matrix in (two, three, zero):
        matrix.data = matrix.data.reshape(1, 1)
    return _is(_BUILDER.create_dot(two, three, zero, None, 0), 6.0)


def _range() -> bool:
    scope = _interpreter._LangPatchScope()
    try:
        _interpreter._patch_lang_tensor(tl.core.tensor, scope)
        return list(range(_scalar(tl.int32, 2))) == [0, 1]
    finally:
        scope.restore()


def _scalar(kind: Any, value: int) -> Any:
    return tl.core.tensor(_of(kind, value), kind)


def _stops(check: Callable[[TritonSemantic], object]) -> bool:
    try:
        check(TritonSemantic(_BUILDER))
    except AssertionError:
        return True
    return False


# What is right, by the name of what is wrong otherwise. The numbers are the smallest that show the difference: 1 + 3/4 of
# the last place rounds up; 1.9375 rounds up to 2 in fp8e5; (1 + u)^2 - (1 + 2u) is u^2 only if the product is not rounded.
_PROBES: Mapping[str, Callable[[], bool]] = {
    "bf16-dot": _dot,
    "bf16-arithmetic": lambda: _brain(_BUILDER.create_fadd(_of(tl.bfloat16, 1.0), _of(tl.bfloat16, 1.0)), 2.0),
    "bf16-comparison": lambda: _is(_BUILDER.create_fcmpOLT(_of(tl.bfloat16, -1.0), _of(tl.bfloat16, 1.0)), True),
    "bf16-from-integer": lambda: _brain(_BUILDER.create_si_to_fp(_of(tl.int32, 1), tl.bfloat16), 1.0),
    "bf16-rounding": lambda: _brain(
        _BUILDER.create_fp_trunc(_of(tl.float32, 1 + 0.75 / 128), tl.bfloat16), 1 + 1 / 128
    ),
    "bf16-subnormals": lambda: _is(_BUILDER.create_fp_ext(_of(tl.bfloat16, 1, bits=True), tl.float32), 2.0**-133),
    "bool-addition": lambda: _is(_BUILDER.create_add(_of(tl.int1, 1), _of(tl.int1, 1)), False),
    "device-assert": lambda: _stops(lambda semantic: semantic.device_assert(_scalar(tl.int1, 0), "", None)),
    "fma-rounds-twice": lambda: _is(
        _BUILDER.create_fma(*(_of(tl.float32, value) for value in (1 + 2**-12, 1 + 2**-12, -1 - 2**-11))), 2.0**-24
    ),
    "fp8-rounding": lambda: _is(_BUILDER.create_fp_to_fp(_of(tl.float16, 1.9375), tl.float8e5, _NEAREST), 0x40),
    "fp8-subnormals": lambda: _is(
        _BUILDER.create_bitcast(_BUILDER.create_fp_to_fp(_of(tl.float8e5, 1), tl.float16, None), tl.float16), 2.0**-16
    ),
    "max-keeps-nan": lambda: _is(_BUILDER.create_maxnumf(_of(tl.float32, np.nan), _of(tl.float32, 1.0)), 1.0),
    "overflow-checks": lambda: _stops(lambda semantic: semantic.mul(*[_scalar(tl.int32, 1 << 30)] * 2, True)),
    "runtime-range": _range,
}
