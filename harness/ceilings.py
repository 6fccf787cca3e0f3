"""What the device could do at best, measured: bytes copied in its memory and bf16 products, a second.

Both by PyTorch, on random data, at sizes that no cache holds. Runs in the one worker that owns the GPU. Refuses to take a
published figure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness import measure, timing
from harness.stats import bootstrap_median

# Bytes of a copy's source, sides of square matrices: the largest that fit, for products the best of several.
_COPY_BYTES = (4 << 30, 2 << 30, 1 << 30)
_SIDES = (16384, 8192, 4096)
_POLICY = measure.Policy(method="event", target=0.002, min_samples=20, max_samples=60, budget_ms=3000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """A measured rate in units of 1e12 a second: the median, and the 95 % interval of the median. `what` and `size` say of
    what; `times_ms` are the samples."""

    what: str
    size: str
    rate: float
    interval: tuple[float, float]
    times_ms: tuple[float, ...]


def ceilings(kernel: Any, seed: int) -> tuple[Ceiling, ...]:
    """Copy bandwidth in TB/s (bytes read and bytes written), then bf16 matrix rates in TFLOP/s by size."""
    del kernel
    generator = torch.Generator(device=timing.DEVICE).manual_seed(seed)
    return (_copy(), *(_product(side, generator) for side in _SIDES if _fits(3 * side * side * 2)))


def _copy() -> Ceiling:
    size = next((one for one in _COPY_BYTES if _fits(2 * one)), _COPY_BYTES[-1] >> 2)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=timing.DEVICE)
    target = torch.empty_like(source)
    return _measured("copy TB/s", f"{size >> 20} MiB", 2 * size, lambda: target.copy_(source))


def _product(side: int, generator: torch.Generator) -> Ceiling:
    left, right = (
        torch.randn(side, side, dtype=torch.bfloat16, device=timing.DEVICE, generator=generator) for _ in range(2)
    )
    out = torch.empty_like(left)
    return _measured("bf16 TFLOP/s", f"{side} x {side} x {side}", 2 * side**3, lambda: torch.mm(left, right, out=out))


def _measured(what: str, size: str, amount: int, run: Callable[[], object]) -> Ceiling:
    rng = np.random.default_rng(0)
    found = measure.measure(lambda: (run(), None)[1], timer=timing.timer(), policy=_POLICY, rng=rng)
    interval = bootstrap_median(found.times_ms, rng=rng)
    rates = [amount / time / 1e9 for time in (found.median_ms, interval.high, interval.low)]
    return Ceiling(what=what, size=size, rate=rates[0], interval=(rates[1], rates[2]), times_ms=found.times_ms)


def _fits(size: int) -> bool:
    """Whether so many bytes take at most half of what is free on the device."""
    return 2 * size <= timing.free_bytes()
