"""An attention under test, ours or anybody's, and how one of our kernels is run where every wrong access leaves a trace.

A subject answers a question (a problem and its input tensors) with outputs by name and with faults in words. Refuses to judge
numbers and to choose inputs. What a subject raises becomes a `SubjectError`, so that it is told apart from what is wrong with
its judges; a crash is the caller's to report.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from harness import bounds, inputs
from harness.bounds import RoundingContract
from harness.errors import RefusedError, SubjectError
from harness.inputs import Guarded, Placement
from harness.noise import Products
from harness.operation import lacks, operation_for, problem_keywords, shapes
from harness.problem import Problem
from harness.space import Value

# What code under test may raise, on the host or in the interpreter.
_RAISED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@contextlib.contextmanager
def blaming(problem: Problem) -> Iterator[None]:
    """Within it, the subject runs: what it raises is its own, and becomes a `SubjectError`; a refusal stays one."""
    # Whoever only reads results needs no Triton.
    from triton.runtime.errors import InterpreterError

    try:
        yield
    except (*_RAISED, InterpreterError) as raised:
        cause = raised.__cause__ or raised
        said = str(cause).strip().splitlines()
        raise SubjectError(f"{type(cause).__name__}: {said[0] if said else ''} in `{problem}`") from raised


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What a subject gave back: out and lse, or dq, dk and dv; a subject that has no lse leaves it out.

    `faults` are in words: unwritten elements, writes to inputs or beside outputs, a wrong shape or dtype, nothing launched.
    """

    outputs: Mapping[str, Tensor]
    faults: tuple[str, ...] = ()


class Subject(Protocol):
    """An implementation of attention. `name` is for reports."""

    @property
    def name(self) -> str: ...

    def refuses(self, problem: Problem) -> str | None:
        """Why it cannot do this problem, in words; None if it can."""
        ...

    def contract(self, problem: Problem) -> RoundingContract:
        """What it may round in this problem."""
        ...

    def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
        """Answer `problem`. `inputs` are q, k, v, and out, lse, dout for a backward problem, with any strides.

        A subject that makes its own out and lse ignores those given.
        """
        ...


class Kernel(Protocol):
    """A loaded kernel file, see `kernels/__init__.py`."""

    PASS: str

    def launches(self, **arguments: Any) -> Any: ...

    def workspaces(self, **arguments: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """The memory that one run of a kernel left behind. `ran` counts the launches."""

    given: tuple[Guarded, ...]
    made: tuple[Guarded, ...]
    scratch: tuple[Guarded, ...]
    ran: int

    def views(self) -> dict[str, Tensor]:
        return {output.name: output.view for output in self.made}

    def faults(self, case: str) -> list[str]:
        """What went wrong beside the numbers, in words; `case` says what was run."""
        found = [f"input {tensor.name} of `{case}` was written to" for tensor in self.given if not tensor.unchanged()]
        for tensor in (*self.made, *self.scratch):
            distance = tensor.stray_write()
            if distance is not None:
                found.append(
                    f"memory {distance:+d} elements from the start of {tensor.name} of `{case}` was written to"
                )
        if not self.ran:
            found.append(f"nothing was launched for `{case}`")
        for output in self.made:
            count = int(output.unwritten().sum())
            if count:
                found.append(f"{count} of {output.view.numel()} elements of {output.name} of `{case}` were not written")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Where a kernel finds its outputs and workspaces: on which device, poisoned with NaN or (`large`) with a large number.

    `outputs` places outputs by name; those not named lie as the problem's layout says.
    """

    device: str = "cpu"
    large: bool = False
    outputs: Mapping[str, Placement] = field(default_factory=dict)


def launch_guarded(
    kernel: Kernel, problem: Problem, given: Sequence[Guarded], config: Mapping[str, Value], memory: Memory
) -> Run:
    """Launch everything that `kernel` wants for `problem` on `given` inputs and on new outputs and workspaces.

    Outputs have the dtype that the operation says, or fp64 where q is fp64.
    """
    made = _outputs(problem, given[0].view.dtype, memory)
    return _launch(kernel, problem, given, made, _workspaces(kernel, given, config, memory), config)


def _outputs(problem: Problem, dtype: torch.dtype, memory: Memory) -> list[Guarded]:
    made = []
    for name in operation_for(problem).outputs:
        shape, stored = shapes(problem)[name]
        placement = memory.outputs.get(name, inputs.placement_for(problem.layout, len(shape)))
        wanted = dtype if dtype == torch.float64 else inputs.DTYPES[stored]
        made.append(inputs.unwritten(name, shape, wanted, placement, device=memory.device, large=memory.large))
    return made


def _workspaces(kernel: Kernel, given: Sequence[Guarded], config: Mapping[str, Value], memory: Memory) -> list[Guarded]:
    wanted = workspaces_of(kernel, {tensor.name: tensor.view for tensor in given}, config)
    return [
        inputs.unwritten(
            name, shape, dtype, Placement(order=tuple(range(len(shape)))), device=memory.device, large=memory.large
        )
        for name, (shape, dtype) in wanted.items()
    ]


def _launch(
    kernel: Kernel,
    problem: Problem,
    given: Sequence[Guarded],
    made: Sequence[Guarded],
    scratch: Sequence[Guarded],
    config: Mapping[str, Value],
) -> Run:
    launches = launches_of(kernel, problem, {tensor.name: tensor.view for tensor in (*given, *made, *scratch)}, config)
    for launch in launches:
        launch.run()
    if given[0].storage.is_cuda:
        torch.cuda.synchronize()
    return Run(given=tuple(given), made=tuple(made), scratch=tuple(scratch), ran=len(launches))


def launches_of(kernel: Kernel, problem: Problem, tensors: Mapping[str, Tensor], config: Mapping[str, Value]) -> Any:
    """What `kernel` would launch on all its tensors. Raises `RefusedError` where it refuses with a `ValueError`, or lacks a
    parameter."""
    missing = lacks(kernel.launches, problem)
    if missing is not None:
        raise RefusedError(f"the kernel does not do `{problem}`: its launches {missing}")
    try:
        return kernel.launches(**tensors, **problem_keywords(problem), **config)
    except ValueError as refusal:
        raise RefusedError(f"the kernel refuses `{problem}`: {refusal}") from refusal


def workspaces_of(
    kernel: Any, given: Mapping[str, Tensor], config: Mapping[str, Value]
) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes, by name, of the scratch tensors that `kernel` wants under `config` for the inputs in `given`.

    `workspaces` is told those tunables that it names as keyword-only parameters and that the config gives.
    """
    parameters = inspect.signature(kernel.workspaces).parameters.values()
    named = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    found: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = kernel.workspaces(
        **given, **{name: config[name] for name in named if name in config}
    )
    return found


def calls_pytorch(kernel: Any) -> bool:
    """Whether a kernel file launches nothing itself, but has PyTorch compile a function; `UNSEEN` is what a CPU does not show
    of it."""
    return bool(getattr(kernel, "UNSEEN", ()))


def contract_for(
    kernel: Any, problem: Problem, config: Mapping[str, Value], where: Literal["device", "interpreter"], dtype: str = ""
) -> RoundingContract:
    """What a kernel may round under a config; PyTorch's templates are not ours, so more is allowed to them."""
    if calls_pytorch(kernel):
        return bounds.library_contract(problem)
    stored = dtype or problem.dtype
    products = products_of(config, where)
    contract = bounds.contract_for(stored, key_block=least_keys(config), where=where, fp32_products=products)
    return shifted(contract, kernel, stored, config)


def least_keys(config: Mapping[str, Value]) -> int:
    """The fewest keys that a config attends to at once: how often a row is rescaled."""
    sides = [value for name, value in config.items() if "block_n" in name and not isinstance(value, str | bool)]
    return min(sides, default=16)


def lag_of(config: Mapping[str, Value]) -> float:
    """How far a row's maximum may rise before a config rescales, as a natural logarithm; configs give powers of two."""
    value = config.get("lag", 0)
    return math.log(2.0) * value if isinstance(value, int) else 0.0


def shifted(contract: RoundingContract, kernel: Any, dtype: str, config: Mapping[str, Value]) -> RoundingContract:
    """The contract of a kernel that shifts rows by other numbers than their maxima: a lag that it waits, the lift of weights that
    are rounded to 8 bits. With a lag less of it, so that none is larger than 2 to its headroom."""
    lag, headroom = lag_of(config), getattr(kernel, "HEADROOM", {}).get(inputs.DTYPES.get(dtype))
    if headroom is None:
        return replace(contract, lag=lag)
    top = math.log(2.0) * headroom
    return replace(contract, lag=top, underflow=contract.underflow * math.exp(lag - top))


def most_splits(config: Mapping[str, Value]) -> int:
    """Into how many parts a config divides the keys of a row."""
    counts = [value for name, value in config.items() if "splits" in name and not isinstance(value, str | bool)]
    return max(counts, default=1)


def described(config: Mapping[str, Value], tensors: Sequence[str]) -> tuple[str, ...]:
    """Those of `tensors` that must lie as a config's descriptors need them: aligned, with a last stride of 1."""
    asked = [value for name, value in config.items() if "load" in name]
    if "tma" in asked:
        return tuple(tensors)
    return tuple(name for name in tensors if name in ("k", "v")) if "tma_kv" in asked else ()


def products_of(config: Mapping[str, Value], where: Literal["device", "interpreter"]) -> Products:
    """How a config multiplies fp32 numbers. The interpreter does it exactly, whatever the config says."""
    asked = config.get("precision", "ieee")
    return "ieee" if where == "interpreter" or asked not in get_args(Products) else cast("Products", asked)


@dataclass(slots=True, kw_only=True, eq=False)
class KernelSubject:
    """A kernel file under one config, on guarded inputs and poisoned outputs and workspaces.

    Inputs are copied, with their strides and their alignment, so nothing that is handed in can be damaged. `place` says
    where to: "fresh" memory in every run, or the "same" as in the last run that had the same shapes and strides, which is
    what a kernel that remembers pointers, or reads what an earlier run left, would trip over.

    `double` is the fp64 mode: inputs are converted to fp64, and the same source computes in it. That is for kernels whose
    sums have a type that follows the inputs, in Triton's interpreter only. Constants of a kernel remain fp32 there, which
    its contract says, so the derived bound is that of the algorithm without its roundings.

    `large` poisons with a large number instead of NaN, `outputs` places outputs by name (see `Memory`).
    """

    kernel: Kernel
    config: Mapping[str, Value]
    device: str = "cpu"
    place: Literal["fresh", "same"] = "fresh"
    double: bool = False
    large: bool = False
    outputs: Mapping[str, Placement] = field(default_factory=dict)
    # Tensors of earlier runs, by what has to agree for their memory to be used again.
    _kept: dict[tuple[Any, ...], Guarded] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        kernel = getattr(self.kernel, "__name__", type(self.kernel).__name__).rpartition(".")[2]
        return f"{kernel} in fp64" if self.double else kernel

    @property
    def interpreted(self) -> bool:
        """Whether Triton interprets it, so that every access of it can be watched."""
        return self.device == "cpu" and not calls_pytorch(self.kernel)

    def refuses(self, problem: Problem) -> str | None:
        if problem.pass_ != self.kernel.PASS:
            return f"{self.name} computes the {self.kernel.PASS} pass only"
        missing = lacks(self.kernel.launches, problem)
        return None if missing is None else f"its launches {missing}"

    def contract(self, problem: Problem) -> RoundingContract:
        dtype = "fp64" if self.double else problem.dtype
        where: Literal["device", "interpreter"] = "interpreter" if self.device == "cpu" else "device"
        contract = contract_for(self.kernel, problem, self.config, where, dtype)
        if calls_pytorch(self.kernel):
            return contract
        one_tile = where == "interpreter" and getattr(self.kernel, "PACKED", False)
        once = problem.nondeterministic and where == "device"
        return replace(contract, in_order=most_splits(self.config) == 1, one_tile=one_tile, reproducible=not once)

    def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
        """See `Subject.run`; a backward pass uses the out and lse that it is given."""
        found = self.run_guarded(problem, inputs)
        outputs = {name: view.cpu() for name, view in found.views().items()}
        return Answer(outputs=outputs, faults=tuple(found.faults(str(problem))))

    def run_guarded(self, problem: Problem, values: Mapping[str, Tensor]) -> Run:
        """The same, with all memory that took part."""
        operation = operation_for(problem)
        memory = Memory(device=self.device, large=self.large, outputs=self.outputs)
        given = [
            self._lay(inputs.place_as(name, self._converted(values[name]), device=self.device))
            for name in operation.inputs
        ]
        made = [self._lay(tensor) for tensor in _outputs(problem, given[0].view.dtype, memory)]
        with blaming(problem):
            scratch = [self._lay(tensor) for tensor in _workspaces(self.kernel, given, self.config, memory)]
            return _launch(self.kernel, problem, given, made, scratch, self.config)

    def _converted(self, values: Tensor) -> Tensor:
        if not self.double or values.dtype == torch.float64 or not values.is_floating_point():
            return values
        # Strides carry over, also those that no ordinary conversion keeps: padding and stride 0.
        wide = torch.empty(0, dtype=torch.float64, device=values.device)
        wide.resize_(values.untyped_storage().nbytes() // values.element_size())
        wide = wide.as_strided(values.shape, values.stride(), values.storage_offset())
        reach = inputs.reachable(wide, wide)
        reach.copy_(inputs.reachable(values, values))
        return wide

    def _lay(self, tensor: Guarded) -> Guarded:
        """`tensor`, in the memory of an earlier run if that is wanted and there is one."""
        if self.place == "fresh":
            return tensor
        view = tensor.view
        key = (tensor.name, view.dtype, tuple(view.shape), view.stride(), view.storage_offset(), len(tensor.storage))
        if key not in self._kept:
            self._kept[key] = tensor
            return tensor
        kept = self._kept[key]
        kept.storage.copy_(tensor.storage)
        return Guarded(name=tensor.name, view=kept.view, storage=kept.storage, pristine=tensor.pristine)
