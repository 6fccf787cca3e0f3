"""A quicker interpreter: what Triton's does again and again with the same outcome, done once. No bit of an answer changes.

It replaces parts of Triton for the rest of a process, each only where the installed Triton has it in the form that is known
(3.6 to 3.9). Refuses to change arithmetic or memory operations.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as _interpreter

_UNDO: list[Callable[[], None]] = []
_PLAIN_NEW = staticmethod(lambda kind, *_: object.__new__(kind))


def quicken() -> None:
    """Make interpreted kernels of this process quicker, until `slow_down`; once is as good as twice."""
    if _UNDO:
        return
    patch = getattr(_interpreter, "_patch_lang", None)
    if patch is not None and _takes(patch, "fn"):
        _replace(_interpreter, "_patch_lang", _Patched(patch))
    options = _interpreter.interpreter_builder.options
    if not options.debug:
        # Without `debug` the assertion that a sum fits is left out, but what it would look at is still computed.
        quiet = dataclasses.replace(options, sanitize_overflow=False)
        _replace(_interpreter.interpreter_builder, "options", quiet)
    if _takes(getattr(_interpreter, "_get_np_dtype", None), "tt_dtype"):
        _replace(_interpreter, "_get_np_dtype", _remembered(_interpreter._get_np_dtype))
    if _takes(tl.block_type.__init__, "self", "element_ty", "shape"):
        kinds = _BlockTypes(tl.block_type.__init__)
        _replace(tl.block_type, "__new__", kinds.new)
        _replace(tl.block_type, "__init__", kinds.initialize)
        if _takes(tl.tensor.__init__, "self", "handle", "type"):
            _replace(tl.tensor, "__init__", _laid_out(tl.tensor.__init__))
    if _takes(TritonSemantic.broadcast_impl_value, "self", "lhs", "rhs"):
        _replace(TritonSemantic, "broadcast_impl_value", _fitting(TritonSemantic.broadcast_impl_value))


def slow_down() -> None:
    """Put everything back."""
    while _UNDO:
        _UNDO.pop()()


def _takes(function: Any, *names: str) -> bool:
    return callable(function) and [*inspect.signature(function).parameters] == [*names]


def _replace(owner: Any, name: str, value: Any) -> None:
    # A class that had a `__new__` of its own once does not find that of `object` again.
    own = vars(owner).get(name, _PLAIN_NEW)
    _UNDO.append(lambda: setattr(owner, name, own))
    setattr(owner, name, value)


class _Patched:
    """Replaces the language once a launch: a call within it whose modules are replaced already returns at once."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self._patch = patch
        self._modules: dict[Any, frozenset[int]] = {}
        self._replaced: set[int] | None = None

    def __call__(self, function: Any) -> Any:
        if function not in self._modules:
            visible = function.__globals__.values()
            self._modules[function] = frozenset(id(one) for one in visible if one is tl or one is tl.core)
        modules = self._modules[function]
        if self._replaced is None:
            self._replaced = set(modules)
            return _Scope(self._patch(function), self)
        if not modules <= self._replaced:
            # A library function's own module: what is replaced for it stays so, as the interpreter leaves it.
            self._patch(function)
            self._replaced |= modules
        return self

    def restore(self) -> None:
        """Nothing: a call within a launch leaves what it replaced to the launch."""

    def end(self) -> None:
        self._replaced = None


@dataclass(frozen=True, slots=True)
class _Scope:
    """What a launch restores at its end."""

    scope: Any
    patched: _Patched

    def restore(self) -> None:
        self.patched.end()
        self.scope.restore()


def _remembered(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """numpy's dtype for a type of Triton, which depends on the name of its elements only."""
    known: dict[str, Any] = {}

    def remembered(tt_dtype: Any) -> Any:
        name = tt_dtype.scalar.name
        if name not in known:
            known[name] = dtype_of(tt_dtype)
        return known[name]

    return remembered


class _BlockTypes:
    """One object for all equal types of blocks, which nothing changes once they are made."""

    def __init__(self, initialize: Callable[..., None]) -> None:
        self._initialize = initialize
        self._made: dict[tuple[Any, ...], Any] = {}
        self.new = staticmethod(self._new)
        # What `_new` hands out is initialized.
        self.initialize = lambda kind, element_ty, shape: None

    def _new(self, cls: Any, element_ty: Any = None, shape: Any = None) -> Any:
        if element_ty is None:
            # A copy, which brings its own values.
            return object.__new__(cls)
        sides = [side.value if isinstance(side, tl.constexpr) else side for side in shape]
        qualities = (getattr(element_ty, "address_space", None), getattr(element_ty, "const", None))
        key = (cls, type(element_ty), element_ty.name, *qualities, *sides)
        found = self._made.get(key)
        if found is None:
            found = object.__new__(cls)
            # A shape that is refused leaves nothing behind.
            self._initialize(found, element_ty, shape)
            self._made[key] = found
        return found


def _laid_out(initialize: Callable[..., None]) -> Callable[..., None]:
    """Shape and number of elements belong to the type of a tensor, and are kept with it."""

    def laid_out(self: Any, handle: Any, type: Any) -> None:
        known = vars(type).get("laid_out")
        if known is None:
            initialize(self, handle, type)
            type.laid_out = self.shape, self.numel, self.dtype
            return
        self.handle = handle
        self.type = type
        self.shape, self.numel, self.dtype = known

    return laid_out


def _fitting(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Two blocks of one shape are what they would be broadcast to."""

    def fitting(self: Any, lhs: Any, rhs: Any) -> Any:
        one, two = lhs.type, rhs.type
        if isinstance(one, tl.block_type) and isinstance(two, tl.block_type) and one.shape.values == two.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return fitting
