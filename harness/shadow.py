"""Shadow memory for Triton's interpreter: every access of a kernel is checked against the tensors that it was given.

`shadow` replaces the interpreter's memory operations for as long as it is open. Kernels then see addresses that exist
nowhere: each tensor has a range of its own, so an address says from which tensor it was computed, however far it went
astray, and nothing but registered elements can be reached. What is found are values (`Finding`), and the run goes on.

Refuses to judge numbers, to launch anything, and to see what the interpreter does not have: threads, warps, pipelines,
and order between programs that is made with atomic operations (all programs of a launch count as concurrent).
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import triton
from torch import Tensor

from harness import interpreter
from harness.errors import UsageError, did_you_mean
from harness.footprint import GIVEN, MADE, UNKNOWN, Array, Footprint, Memory, Reach

Role = Literal["input", "output", "workspace"]
Access = Literal["load", "store", "atomic"]
Kind = Literal[
    "out of bounds load",
    "out of bounds store",
    "out of bounds atomic",
    "wrong tensor",
    "uninitialised read",
    "input written",
    "read of foreign write",
    "write after foreign read",
    "write race",
    "double write",
    "atomic mixed with plain",
    "conflicting lanes",
    "int32 overflow",
    "device assert",
    "never written",
]

_TRITON, _HERE = Path(triton.__file__).parent, Path(__file__).parent

# What a refused load gives: NaN, also where 16-bit brain floats and 8-bit floats travel as integers; integers that
# neither make a loop run long nor point into a tensor.
_POISON: Mapping[str, Any] = {"f": math.nan, "b": False, "i": -1, "u1": 0x7F, "u2": 0x7FC0, "u4": 0, "u8": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that a kernel must not do.

    `tensor` names the tensor that the address was computed from ("" if none is known or none matters), `index` is the
    element in it (None outside of it) and `offset` the bytes from its first element; `program` is the program id. They are
    those of the first lane of all `count` lanes that were found at this `line` ("file:line") of this `kernel`.
    """

    kind: Kind
    tensor: str
    index: tuple[int, ...] | None
    offset: int
    program: tuple[int, int, int]
    kernel: str
    line: str
    detail: str = ""
    count: int = 1

    def __str__(self) -> str:
        element = f"{self.offset:+d} bytes" if self.index is None else f"[{', '.join(map(str, self.index))}]"
        place = f" of {self.tensor} {element}" if self.tensor else ""
        where = f", program {self.program} of {self.kernel} at {self.line}" if self.kernel else ""
        return f"{self.kind}{place}{where} ({self.count} times)" + (f": {self.detail}" if self.detail else "")


class Watch:
    """What `shadow` saw so far. `dropped` counts the findings that the limit kept out.

    It is also what stands in for the interpreter's memory operations, see `harness.interpreter.Observer`.
    """

    def __init__(self, memory: Memory, outputs: tuple[Footprint, ...], limit: int) -> None:
        self.dropped = 0
        self._limit = limit
        self._found: dict[tuple[str, ...], Finding] = {}
        self._memory, self._outputs = memory, outputs
        # Serial numbers of the current launch and of the current program; programs of a launch follow its own number.
        self._launch = self._program = 0
        self._kernel = ""
        self._real = interpreter.operations()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found so far, in the order of appearance: one for each kind, tensor, kernel and line."""
        return tuple(self._found.values())

    def unwritten(self) -> tuple[Finding, ...]:
        """A finding of kind "never written" for each output that was not written completely."""
        found = []
        for output in self._outputs:
            never = ((output.state(output.region.written) == 0) & (output.state(output.region.added) == 0)).any(-1)
            count = int(never.sum())
            if count:
                index = tuple(int(position) for position in np.argwhere(never)[0])
                offset = output.size * sum(one * stride for one, stride in zip(index, output.strides, strict=True))
                found.append(
                    Finding(
                        kind="never written", tensor=output.name, index=index, offset=offset, program=(0, 0, 0),
                        kernel="", line="", detail=f"{count} of {never.size} elements", count=count,
                    )
                )  # fmt: skip
        return tuple(found)

    def host_wrote(self, name: str) -> None:
        """Says that the host has written tensor `name` (zeroed it, say), so that a kernel may read it or leave it alone."""
        named = [tensor for tensor in self._memory.footprints if tensor.name == name]
        if not named:
            raise UsageError(
                f"no tensor `{name}` is watched",
                hint=did_you_mean(name, [tensor.name for tensor in self._memory.footprints]),
            )
        for tensor in named:
            tensor.state(tensor.region.written)[...] = -1

    # -----------------------------------------------------------------------------------------------------------------
    # What the interpreter tells
    # -----------------------------------------------------------------------------------------------------------------

    def launch_begins(self, kernel: str, arguments: Mapping[str, Any]) -> None:
        """What a launch is given and nobody named is watched from now on, under the names of its parameters."""
        self._program += 1
        self._launch = self._program
        self._kernel = kernel
        for name, value in arguments.items():
            tensor = getattr(value, "base", value)
            if isinstance(tensor, Tensor) and self._memory.find(tensor) is None:
                self._memory.add(name, tensor, UNKNOWN)

    def program_begins(self) -> None:
        self._program += 1

    def address(self, tensor: Tensor) -> int:
        """The address that a kernel is to see of a tensor that it was given."""
        found = self._memory.find(tensor) or self._memory.add("unnamed", tensor, UNKNOWN)
        return found.shown

    def asserted(self, message: str) -> None:
        kind: Kind = "int32 overflow" if "overflow detected" in message else "device assert"
        self._add(kind, None, 0, 1, message)

    def load(self, addresses: Array, mask: Any, other: Array, dtype: Any, *, atomic: bool = False) -> Array:
        reach = self._reach(addresses, mask, np.dtype(dtype).itemsize, "load")
        for tensor, units, _ in reach.touched:
            self._check_read(tensor, units, atomic=atomic)
        return _poisoned(self._real.load(reach.addresses, reach.mask, other, dtype), reach)

    def store(self, addresses: Array, values: Array, mask: Any, *, atomic: bool = False) -> None:
        reach = self._reach(addresses, mask, values.dtype.itemsize, "store")
        for tensor, units, lanes in reach.touched:
            if atomic:
                self._check_atomic(tensor, units, reads=False)
            else:
                self._check_write(tensor, units, _bits(values, lanes, tensor.region.unit))
        self._real.store(reach.addresses, values, reach.mask)

    def atomic_rmw(self, operation: Any, addresses: Array, values: Array, mask: Any, order: Any) -> Array:
        reach = self._reach(addresses, mask, values.dtype.itemsize, "atomic")
        for tensor, units, _ in reach.touched:
            self._check_atomic(tensor, units, reads=operation != self._real.exchange)
        return _poisoned(self._real.atomic_rmw(operation, reach.addresses, values, reach.mask, order), reach)

    def atomic_cas(self, addresses: Array, expected: Array, values: Array, order: Any) -> Array:
        reach = self._reach(addresses, np.ones(addresses.shape, dtype=bool), values.dtype.itemsize, "atomic")
        for tensor, units, _ in reach.touched:
            self._check_atomic(tensor, units, reads=True)
        # It takes no mask, so refused lanes go to memory of our own.
        sink = np.zeros(1, dtype=np.uint64)
        if reach.refused is not None:
            reach.addresses.flat[reach.refused] = sink.ctypes.data
        return _poisoned(self._real.atomic_cas(reach.addresses, expected, values, order), reach)

    # -----------------------------------------------------------------------------------------------------------------
    # Rules
    # -----------------------------------------------------------------------------------------------------------------

    def _reach(self, addresses: Array, mask: Any, width: int, access: Access) -> Reach:
        reach = self._memory.reach(addresses, mask, width, writes=access != "load")
        for tensor, offsets in reach.strays:
            if tensor is None:
                self._add(_out_of(access), None, int(offsets[0]), offsets.size, f"address {int(offsets[0]):#x}")
                continue
            rest = np.ones(offsets.shape, dtype=bool)
            for other in self._memory.footprints:
                hit = rest & other.holds(offsets + (tensor.real - other.real), 1)
                if other is not tensor and hit.any():
                    self._add("wrong tensor", tensor, int(offsets[hit][0]), int(hit.sum()), f"{access} in {other.name}")
                    rest &= ~hit
            if rest.any():
                first = int(offsets[rest][0])
                span = f"its elements span {tensor.bytes} bytes"
                detail = "between its elements" if 0 <= first < tensor.bytes else span
                self._add(_out_of(access), tensor, first, int(rest.sum()), detail)
        return reach

    def _check_read(self, tensor: Footprint, units: Array, *, atomic: bool) -> None:
        region = tensor.region
        written, added = region.written[units], region.added[units]
        never = (written == 0) & (added == 0) & (region.owner[units] == MADE)
        self._flag("uninitialised read", tensor, units, never)
        self._flag_foreign("atomic mixed with plain" if atomic else "read of foreign write", tensor, units, written)
        if not atomic:
            self._flag_foreign("atomic mixed with plain", tensor, units, added)
            region.read[units] = self._joined(region.read[units])

    def _check_write(self, tensor: Footprint, units: Array, bits: Array | None) -> None:
        """A plain store of `bits`, by unit; None if they cannot be told."""
        region = tensor.region
        self._flag("input written", tensor, units, region.owner[units] == GIVEN)
        written = region.written[units]
        foreign = self._foreign(written)
        if foreign.any():
            same = np.zeros_like(foreign)
            if bits is not None:
                there = np.uint64(region.start) + units[foreign].astype(np.uint64) * np.uint64(region.unit)
                new = bits[foreign]
                same[foreign] = self._real.load(there, np.ones(there.shape, dtype=bool), new, new.dtype) == new
            self._flag("write race", tensor, units, foreign & ~same, written)
            self._flag("double write", tensor, units, foreign & same, written)
        self._flag_foreign("write after foreign read", tensor, units, region.read[units])
        self._flag_foreign("atomic mixed with plain", tensor, units, region.added[units])
        lanes = np.arange(len(units), dtype=np.int32)
        region.lane[units] = lanes
        last = region.lane[units]
        if bits is not None and (last != lanes).any():
            self._flag("conflicting lanes", tensor, units, bits != bits[last])
        region.written[units] = self._program

    def _check_atomic(self, tensor: Footprint, units: Array, *, reads: bool) -> None:
        region = tensor.region
        self._flag("input written", tensor, units, region.owner[units] == GIVEN)
        if reads:
            self._check_read(tensor, units, atomic=True)
        else:
            self._flag_foreign("atomic mixed with plain", tensor, units, region.written[units])
        self._flag_foreign("atomic mixed with plain", tensor, units, region.read[units])
        region.added[units] = self._joined(region.added[units])

    def _foreign(self, programs: Array) -> Array:
        """Which of them belong to another program of this launch."""
        foreign: Array = (programs >= self._launch) & (programs != self._program)
        return foreign

    def _joined(self, programs: Array) -> Array:
        """With the current program added; the number of the launch stands for several of its programs."""
        return np.where((programs < self._launch) | (programs == self._program), self._program, self._launch)

    def _flag_foreign(self, kind: Kind, tensor: Footprint, units: Array, programs: Array) -> None:
        self._flag(kind, tensor, units, self._foreign(programs), programs)

    def _flag(self, kind: Kind, tensor: Footprint, units: Array, wrong: Array, programs: Array | None = None) -> None:
        if wrong.any():
            at = int(wrong.argmax())
            offset = (int(units[at]) - tensor.first) * tensor.region.unit
            detail = "" if programs is None else f"with {self._named(int(programs[at]))}"
            self._add(kind, tensor, offset, int(wrong.sum()), detail)

    def _named(self, program: int) -> str:
        if program == self._launch:
            return "several programs"
        position, (_, rows, layers) = program - self._launch - 1, self._real.builder.grid_dim
        return f"program {(position // (rows * layers), position // layers % rows, position % layers)}"

    def _add(self, kind: Kind, tensor: Footprint | None, offset: int, count: int, detail: str) -> None:
        name, line = tensor.name if tensor else "", _kernel_line()
        key = (kind, name, self._kernel, line)
        if key in self._found:
            known = self._found[key]
            self._found[key] = dataclasses.replace(known, count=known.count + count)
        elif len(self._found) >= self._limit:
            self.dropped += 1
        else:
            self._found[key] = Finding(
                kind=kind, tensor=name, index=tensor.index(offset) if tensor else None, offset=offset, count=count,
                program=getattr(self._real.builder, "grid_idx", (0, 0, 0)), kernel=self._kernel, line=line, detail=detail,
            )  # fmt: skip


@contextmanager
def shadow(
    tensors: Mapping[str, Tensor],
    roles: Mapping[str, Role],
    *,
    holes: Mapping[str, Tensor] | None = None,
    limit: int = 100,
) -> Iterator[Watch]:
    """Check everything that kernels do in Triton's interpreter while the context is open.

    `tensors` are those that launches will be given, on the CPU, with any strides; `roles` says for each whether kernels only
    read it ("input"), must write all of it ("output"), or may use it after having written it ("workspace"). `holes` (bool, by
    name, in the shapes of inputs) are elements that hold nothing: reading one is an uninitialised read. A tensor that a launch
    is given and that is not named here is checked for bounds and races only. At most `limit` different findings are kept.
    Whatever happens inside, the interpreter is afterwards as it was.

    Raises `UsageError` for tensors without a role, roles without a tensor, and memory that cannot be watched; `MachineError`
    where Triton compiles, or another watch is open.
    """
    unmatched = sorted(set(tensors) ^ set(roles))
    if unmatched:
        raise UsageError(
            f"a watch needs a tensor and a role for each name, found only one of them for `{unmatched[0]}`"
        )
    unknown = sorted(set(roles.values()) - set(get_args(Role)))
    if unknown:
        raise UsageError(f"there is no role `{unknown[0]}`", hint=did_you_mean(unknown[0], get_args(Role)))
    interpreter.require()
    memory = Memory()
    # Small elements first, because the first tensor of a storage decides how finely it is watched.
    for name in sorted(tensors, key=lambda name: tensors[name].element_size()):
        memory.add(name, tensors[name], GIVEN if roles[name] == "input" else MADE)
    for name, hole in (holes or {}).items():
        memory.empty(tensors[name], hole)
    outputs = [tensor for tensor in memory.footprints if roles[tensor.name] == "output"]
    watch = Watch(memory, tuple(outputs), limit)
    with interpreter.observed(watch):
        yield watch


def _out_of(access: Access) -> Kind:
    return cast("Kind", f"out of bounds {access}")


def _poisoned(loaded: Array, reach: Reach) -> Array:
    if reach.refused is not None:
        kind = loaded.dtype.kind
        loaded.flat[reach.refused] = _POISON[kind if kind != "u" else f"u{loaded.dtype.itemsize}"]
    return loaded


def _bits(values: Array, lanes: Array, unit: int) -> Array | None:
    """What each of `lanes` stores, by units; None if a unit is more than a value. Lanes of several units repeat."""
    each = values.dtype.itemsize // unit
    if not each:
        return None
    flat = np.ascontiguousarray(values).reshape(-1).view(f"u{unit}")
    return flat[lanes] if each == 1 else flat[lanes * each + np.arange(len(lanes)) % each]


def _kernel_line() -> str:
    """Where in a kernel the interpreter is: the innermost line that is neither Triton's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if _TRITON not in path.parents and path.parent != _HERE:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
