"""What is seen of foreign code while it runs, and of what it returns: poison, launches, types, and whose memory it is.

Refuses to judge numbers: a fault here is about what an implementation does beside them. Their names are in `FAULTS`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import HarnessError
from harness.inputs import DTYPES
from harness.operation import shapes
from harness.problem import Layout, Problem

# Names of faults, which begin their text.
FAULTS: Mapping[str, str] = {
    "not a tensor": "an output is something else, or nothing",
    "tensor subclass": "an output is of a subclass of torch.Tensor, which may compute later, or never",
    "wrong shape": "an output has another shape than the inputs ask for",
    "wrong dtype": "an output has another dtype than q (a log-sum-exp: than fp32)",
    "wrong device": "an output is on another device than q",
    "mutated input": "an input, or memory beside it, was written to",
    "aliased input": "an output lies in the memory of an input",
    "stale memory": "an output lies in the memory of an earlier output, or changes in a later call",
    "cached answer": "the same answer for other values at the same addresses",
    "uninitialized memory": "NaN only where torch.empty was filled with NaN",
    "no gradient": "out does not depend on an input, by torch.autograd",
    "no log-sum-exp": "it was promised, and not returned",
    "no Triton": "a Triton kernel was promised, and none was launched",
}


class Blaming:
    """Within it, foreign code runs, and any exception is its own: it becomes what `told` makes of it.

    Whoever runs code of others cannot list what it may raise. What is ours already, and what ends the process, passes.
    """

    def __init__(self, told: Callable[[Exception], HarnessError]) -> None:
        self._told = told

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(raised, Exception) and not isinstance(raised, HarnessError):
            raise self._told(raised) from raised


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it torch.empty, in Python and inside torch, gives NaN (integers: their largest number)."""
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        # Only the filling is wanted: operations that cannot be deterministic may stay as they are.
        warnings.filterwarnings("ignore", message="(?s).*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            deterministic.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)


class ZeroEmpty(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it what Python gets from torch.empty and its like is zero."""

    _EMPTY = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found.zero_() if func.overloadpacket in self._EMPTY else found


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Counts, in a list of one number, the launches of Triton kernels within it: compiled ones and interpreted ones."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    count = [0]
    with contextlib.ExitStack() as restored:
        for owner, name in ((JITFunction, "run"), (GridExecutor, "__call__")):
            original = getattr(owner, name)

            def counting(*given: Any, _original: Any = original, **keywords: Any) -> Any:
                count[0] += 1
                return _original(*given, **keywords)

            setattr(owner, name, counting)
            restored.callback(setattr, owner, name, original)
        yield count


def form_faults(problem: Problem, made: Mapping[str, Any], layout: Layout, device: str) -> list[str]:
    """What is wrong with the types, shapes, dtypes and devices of out (its axes as in `layout`) and lse."""
    batch, heads, rows, columns = problem.batch, problem.q_heads, problem.q_len, problem.v_head_dim
    wanted = {"out": (batch, heads, rows, columns), "lse": (batch, heads, rows)}
    if layout == "bshd":
        wanted["out"] = (batch, rows, heads, columns)
    dtypes = {"out": DTYPES[problem.dtype], "lse": torch.float32}
    faults = []
    for name, value in made.items():
        if not isinstance(value, Tensor):
            faults.append(f"not a tensor: {name} is {type(value).__name__}")
            continue
        if type(value) is not Tensor:
            faults.append(f"tensor subclass: {name} is {type(value).__name__}")
        if tuple(value.shape) != wanted[name]:
            faults.append(f"wrong shape: {name} has {tuple(value.shape)}, not {wanted[name]}")
        if value.dtype != dtypes[name]:
            faults.append(f"wrong dtype: {name} has {value.dtype}, not {dtypes[name]}")
        if value.device.type != torch.device(device).type:
            faults.append(f"wrong device: {name} is on {value.device}, not on {device}")
    return faults


def comparable(problem: Problem, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs less what no judge could compare: another shape, or no numbers."""
    wanted = {name: shape for name, (shape, _) in shapes(problem).items()}
    return {
        name: output
        for name, output in outputs.items()
        if tuple(output.shape) == wanted[name] and output.is_floating_point()
    }


def swapped(tensor: Tensor, layout: Layout) -> Tensor:
    """Between axes batch, head, length, dim and the order of a signature, either way."""
    return tensor.transpose(1, 2) if layout == "bshd" and tensor.ndim == 4 else tensor


def kept_copy(output: Tensor) -> Tensor:
    """A contiguous copy on the CPU that no later call can change."""
    return output.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous tensors are equal in every bit."""
    same_form = first.shape == second.shape and first.dtype == second.dtype
    return same_form and torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))


def overlap(first: Any, second: Any) -> bool:
    """Whether the storages of two tensors have memory in common."""
    spans = []
    for tensor in (first, second):
        if type(tensor) is not Tensor or not tensor.numel() or tensor.is_meta:
            return False
        memory = tensor.untyped_storage()
        spans.append((tensor.device, memory.data_ptr(), memory.data_ptr() + memory.nbytes()))
    (device, start, stop), (other, low, high) = spans
    return bool(device == other and start < high and low < stop)
