"""Where the elements of tensors lie, byte for byte, and what is remembered of every piece of memory under them.

Geometry and state for `harness.shadow`: it knows addresses, strides and gaps, but no kernel, no interpreter and no rule of
what may be read or written when.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.errors import RefusedError, UsageError

Array = NDArray[Any]

# What a unit of memory belongs to: nobody, an input, an output or workspace, a tensor of which only the place is known.
NOBODY, GIVEN, MADE, UNKNOWN = range(4)

# Tensors are shown at multiples of 2^44, in the middle of such a range. User space ends at 2^47, so that no real address
# looks like a shown one. The lowest bits are the real ones, for they decide alignment.
SLOT_BITS = 44
FIRST_SLOT = 16
_MIDDLE = 1 << (SLOT_BITS - 1)
_PAGE = 1 << 12

# Memory is remembered in units of the smallest element that was named for it, at most this many bytes.
_LARGEST_UNIT = 8


# Linux's MAP_NORESERVE, which Python names from 3.13 on.
_NO_RESERVE = 0x4000
_SMALL = 1 << 26


def zeros(count: int, dtype: type[np.generic]) -> Array:
    """A vector of `count` zeros. Pages of it cost nothing, and are promised by nobody, before they are written to, so that
    a large storage with few elements is cheap. Raises `RefusedError` where even addresses are limited."""
    size = count * np.dtype(dtype).itemsize
    if size < _SMALL:
        return np.zeros(count, dtype=dtype)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError as error:
        raise RefusedError(f"{size >> 30} GiB of addresses are not to be had here: {error.strerror}") from error
    return np.frombuffer(pages, dtype=dtype)


class Region:
    """The state of one storage from address `start` on, in units of `unit` bytes.

    `owner` says what a unit belongs to. `written`, `added` and `read` hold the serial number of the program that last wrote,
    atomically changed or read it; 0 is nobody and -1 the host. `lane` is scratch.
    """

    def __init__(self, start: int, length: int, element_size: int) -> None:
        self.start, self.unit = start, min(element_size, _LARGEST_UNIT)
        count = -(-length // self.unit)
        self.owner = zeros(count, np.uint8)
        self.written = zeros(count, np.int32)
        self.added = zeros(count, np.int32)
        self.read = zeros(count, np.int32)
        self.lane = zeros(count, np.int32)


class Footprint:
    """The elements of a tensor in its region.

    `real` is the address of its first element and `shown` the address that a kernel sees; `bytes` reach from there behind
    the last element; `first` is the unit of the first element. `inside` marks the units of elements, None if all of the
    span are. `quiet` says that every element belongs to an input, so that reading it needs no bookkeeping.
    """

    def __init__(self, name: str, tensor: Tensor, region: Region, slot: int) -> None:
        self.name, self.region = name, region
        self.shape, self.strides, self.size = tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size()
        empty = tensor.numel() == 0
        # Not `data_ptr`, which forgets where an empty tensor is.
        self.real = int(tensor.untyped_storage().data_ptr() + tensor.storage_offset() * self.size)
        self.shown = (slot << SLOT_BITS) + _MIDDLE + self.real % _PAGE
        self.first = (self.real - region.start) // region.unit
        furthest = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        self.bytes = 0 if empty else (furthest + 1) * self.size
        inside = zeros(self.bytes // region.unit, np.bool_)
        if not empty:
            self._elements(inside)[...] = True
        self.inside = None if inside.all() else inside
        self.quiet = False

    def state(self, of_region: Array) -> Array:
        """A writable view of an array of the region, shaped as the tensor, with the units of an element on a last axis."""
        if not self.bytes:
            return np.zeros((*self.shape, 1), dtype=of_region.dtype)
        return self._elements(of_region[self.first : self.first + self.bytes // self.region.unit])

    def _elements(self, units: Array) -> Array:
        each = self.size // self.region.unit
        steps = (*(stride * each * units.itemsize for stride in self.strides), units.itemsize)
        view: Array = np.lib.stride_tricks.as_strided(units, (*self.shape, each), steps)
        return view

    def holds(self, offsets: Array, width: int) -> Array:
        """Whether accesses of `width` bytes at `offsets` (bytes from the first element, signed) touch elements only, and
        begin where an element, or a part of that width, begins."""
        step = min(width, self.size)
        good: Array = (offsets >= 0) & (offsets <= self.bytes - width) & (offsets & (step - 1) == 0)
        if self.inside is not None:
            for further in range(0, width, self.region.unit):
                good[good] = self.inside[(offsets[good] + further) // self.region.unit]
        return good

    def spans(self, low: int, high: int) -> bool:
        """Whether there are nothing but elements between two shown addresses, those of the first bytes of elements."""
        return self.inside is None and self.shown <= low and high <= self.shown + self.bytes - self.size

    def units(self, offsets: Array, lanes: Array, width: int) -> tuple[Array, Array]:
        """The units of the region that accesses of `width` bytes touch, and the lane of each."""
        units, each = offsets // self.region.unit + self.first, max(1, width // self.region.unit)
        if each == 1:
            return units, lanes
        return (units[:, None] + np.arange(each)).ravel(), np.repeat(lanes, each)

    def index(self, offset: int) -> tuple[int, ...] | None:
        """The element at `offset` bytes, or None if none lies there or its axes cannot be told apart."""
        found, rest = [0] * len(self.shape), offset // self.size
        if not 0 <= offset < self.bytes:
            return None
        for axis in sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis]):
            if self.strides[axis]:
                found[axis] = min(rest // self.strides[axis], self.shape[axis] - 1)
                rest -= found[axis] * self.strides[axis]
        return None if rest else tuple(found)


@dataclass(slots=True)
class Reach:
    """Where the lanes of an access go: real addresses and mask, and the flat positions that were `refused`.

    `touched` lists the footprints that need bookkeeping, each with the units touched and the flat positions that touch
    them; `strays` the offsets (bytes from the first element) of accesses that reach no element of their tensor, or the
    addresses where no tensor is known.
    """

    addresses: Array
    mask: Array
    refused: Array | None = None
    touched: list[tuple[Footprint, Array, Array]] = field(default_factory=list)
    strays: list[tuple[Footprint | None, Array]] = field(default_factory=list)


class Memory:
    """All footprints, and the way from addresses to them."""

    def __init__(self) -> None:
        self.footprints: list[Footprint] = []
        self._regions: dict[int, Region] = {}
        self._by_slot: dict[int, Footprint] = {}
        self._by_identity: dict[tuple[object, ...], Footprint] = {}
        # Memory that is freed could be given to another tensor while its state is still remembered.
        self._alive: list[torch.UntypedStorage] = []

    def find(self, tensor: Tensor) -> Footprint | None:
        """The footprint of exactly these elements, under the name that they got first."""
        return self._by_identity.get(_identity(tensor))

    def add(self, name: str, tensor: Tensor, owner: int) -> Footprint:
        """Remember `tensor`. Of memory with two owners, an input stays an input, and who has a role keeps it.

        Raises `UsageError` for memory that is not the host's, or that is remembered already in larger units.
        """
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise UsageError(
                f"`{name}` cannot be watched: it must be a strided tensor on the CPU, found {tensor.device}"
            )
        storage, size = tensor.untyped_storage(), tensor.element_size()
        region = self._regions.get(storage.data_ptr()) if tensor.numel() else Region(storage.data_ptr(), 0, size)
        region = region or Region(storage.data_ptr(), storage.nbytes(), size)
        if size % region.unit:
            raise UsageError(
                f"`{name}` has elements of {size} bytes, in memory that is watched {region.unit} bytes at a time",
                hint="name this tensor when the watch begins",
            )
        if tensor.numel():
            self._regions[storage.data_ptr()] = region
        self._alive.append(storage)
        made = Footprint(name, tensor, region, FIRST_SLOT + len(self.footprints))
        self.footprints.append(made)
        self._by_slot[made.shown >> SLOT_BITS] = made
        self._by_identity.setdefault(_identity(tensor), made)
        owners = made.state(region.owner)
        owners[...] = GIVEN if owner == GIVEN else np.where(owners == NOBODY, owner, owners)
        for other in self.footprints:
            if other.region is region:
                other.quiet = bool((other.state(region.owner) == GIVEN).all())
        return made

    def empty(self, tensor: Tensor, holes: Tensor) -> None:
        """Take the elements of a remembered input where `holes` (bool, in its shape) is true for memory that nobody wrote."""
        found = self._by_identity[_identity(tensor)]
        if bool(holes.any()):
            found.state(found.region.owner)[holes.numpy()] = MADE
            found.quiet = False

    def reach(self, addresses: Array, mask: Any, width: int, *, writes: bool) -> Reach:
        """Sort the active lanes of an access of `width` bytes by footprint, and refuse those that reach no element."""
        mask = np.asarray(mask, dtype=bool)
        lanes = None if mask.all() else np.flatnonzero(mask)
        active = addresses.ravel() if lanes is None else addresses.ravel()[lanes]
        if not active.size:
            return Reach(addresses, mask)
        low, high = int(active.min()), int(active.max())
        one = self._by_slot.get(low >> SLOT_BITS)
        aligned = not int(np.bitwise_or.reduce(active)) & (width - 1)
        if one and one.quiet and not writes and one.size == width and aligned and one.spans(low, high):
            return Reach(addresses - np.uint64(one.shown - one.real), mask)
        lanes = np.arange(active.size) if lanes is None else lanes
        reach = Reach(addresses.flatten(), mask)
        refused = []
        for tensor, members, origin in self._sorted(active, low, high):
            offsets = (active[members] - np.uint64(origin)).view(np.int64)
            good = tensor.holds(offsets, width) if tensor else np.zeros(offsets.shape, dtype=bool)
            if not good.all():
                reach.strays.append((tensor, offsets[~good]))
                refused.append(lanes[members[~good]])
            if tensor and good.any():
                kept, inner = (lanes[members], offsets) if good.all() else (lanes[members[good]], offsets[good])
                reach.addresses[kept] = inner.view(np.uint64) + np.uint64(tensor.real)
                if writes or not tensor.quiet:
                    reach.touched.append((tensor, *tensor.units(inner, kept, width)))
        reach.addresses = reach.addresses.reshape(addresses.shape)
        if refused:
            reach.refused = np.concatenate(refused)
            reach.mask = mask.copy()
            reach.mask.flat[reach.refused] = False
        return reach

    def _sorted(self, active: Array, low: int, high: int) -> Iterator[tuple[Footprint | None, Array, int]]:
        """Positions in `active` by the footprint that the address was computed from, and what to count offsets from. Real
        addresses, which kernels find in tables of pointers, go to the footprint in which they lie."""
        slots = active >> np.uint64(SLOT_BITS)
        single = low >> SLOT_BITS == high >> SLOT_BITS
        for slot in [low >> SLOT_BITS] if single else np.unique(slots).tolist():
            members = np.arange(active.size) if single else np.flatnonzero(slots == slot)
            if slot in self._by_slot:
                yield self._by_slot[slot], members, self._by_slot[slot].shown
                continue
            for tensor in self.footprints if slot < FIRST_SLOT else ():
                here = tensor.holds((active[members] - np.uint64(tensor.real)).view(np.int64), 1)
                if here.any():
                    yield tensor, members[here], tensor.real
                members = members[~here]
            if members.size:
                yield None, members, 0


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
