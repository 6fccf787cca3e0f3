"""Types of 8 bits in Triton's interpreter. Run by `test_kernels.py` in a process of its own."""

import pytest
import torch
import triton
import triton.language as tl

from harness.quicken import quicken
from kernels.primitives import rounded, widened

quicken()

TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def widen(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(y + at, widened(tl.load(x + at), tl.float32))


@triton.jit
def narrow(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(y + at, rounded(tl.load(x + at), y.dtype.element_ty))


def every(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype)


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bits, of any NaN those of one."""
    whole = values.view({1: torch.uint8, 4: torch.int32}[values.element_size()])
    return whole.masked_fill(values.float().isnan(), 0x7F)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_is_widened_as_torch_does(dtype: torch.dtype) -> None:
    wide = torch.empty(256)
    widen[(1,)](every(dtype), wide, 256)
    assert torch.equal(bits(wide), bits(every(dtype).float()))


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_are_rounded_as_torch_does_and_saturate_as_devices_do(dtype: torch.dtype) -> None:
    """Every number, every tie between two of them, their neighbours in fp32, and what is next to nothing."""
    numbers = every(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    largest = torch.finfo(dtype).max
    asked = torch.cat([numbers, ties, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, float("nan")])])
    around = torch.tensor([torch.inf])
    asked = torch.cat([asked, torch.nextafter(asked, around), torch.nextafter(asked, -around)])
    asked = torch.cat([asked, torch.randn(4096 - len(asked), generator=torch.Generator().manual_seed(3)) * 10])
    found = torch.empty(len(asked), dtype=dtype)
    narrow[(1,)](asked, found, len(asked))
    assert torch.equal(bits(found), bits(asked.clamp(-largest, largest).to(dtype)))
    beyond = torch.tensor([largest * 1.2, -largest * 64, torch.inf, -torch.inf])
    found = torch.empty(4, dtype=dtype)
    narrow[(1,)](beyond, found, 4)
    assert found.float().tolist() == [largest, -largest, largest, -largest]
