"""Measured mode: time a candidate on the GPU that is here, in turns with the incumbent, until it is known well enough.

Every sample is kept, in order; none is averaged away or dropped. Refuses to judge: which of the two is faster is for
`harness.stats.compare` to say, and whether the candidate may be timed at all was for the gate.
"""

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from harness.errors import MachineError
from harness.outcome import Samples
from harness.sensor import Load, Sensor, open_sensor
from harness.sensor_amd import AmdSensor, open_amd_sensor
from harness.stats import median, median_interval

Run = Callable[[], None]
Depth = Literal["screen", "race", "final"]

_FLUSH_NVIDIA = 256 << 20
_FLUSH_AMD = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How long and how often to sample. Times are milliseconds of wall time.

    Sampling ends when the half-width of the interval of the median (and of the ratio to the incumbent) is at most
    `target` of it, at `max_samples` a side, or when `budget_ms` is spent; the budget outranks `min_samples`, one round
    always takes place. A candidate whose best sample is above `hopeless` times the incumbent's median after
    `hopeless_after` rounds is given up.

    `method` "event" times one launch between two events. The host's work of launching stays out of the time as long as
    it is shorter than the flush before it (some 60 microseconds). "graph" captures `copies` of all launches in a CUDA
    graph, times one replay and divides: for candidates of several launches, or shorter than about 50 microseconds.
    All but the first of the copies find what their predecessor left in L2, so that flushing is possible with one copy
    only. Times of different methods must not be compared; `Samples.method` names them.
    """

    warmup_ms: float = 25.0
    target: float = 0.01
    confidence: float = 0.95
    min_samples: int = 10
    max_samples: int = 200
    budget_ms: float = 2000.0
    flush_l2: bool = True
    method: Literal["event", "graph"] = "event"
    copies: int = 1
    hopeless: float = 3.0
    hopeless_after: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.min_samples <= self.max_samples:
            raise ValueError(f"samples must be 1 <= min <= max, found {self.min_samples} and {self.max_samples}")
        if self.method == "event" and self.copies != 1:
            raise ValueError(f"only a graph holds copies, found {self.copies} with the method `event`")
        if self.copies < 1 or (self.flush_l2 and self.copies != 1):
            raise ValueError(
                f"{self.copies} copies in a graph cannot each start with a flushed L2; use 1, or do not flush"
            )

    def __str__(self) -> str:
        how = f"graph of {self.copies}" if self.method == "graph" else "event"
        return f"{how}, L2 {'flushed' if self.flush_l2 else 'warm'}"


# A candidate in the screening is known well enough to be dropped or kept; the finalist and the default get what they need
# for an interval of their ratio. Graphs keep the host's launching, which the kernel cannot help, out of the time.
POLICIES: Mapping[Depth, Policy] = {
    "screen": Policy(method="graph", target=0.02, max_samples=60, budget_ms=400),
    "final": Policy(method="graph", target=0.003, min_samples=30, max_samples=300, budget_ms=4000),
    # How many rounds a race has is its own affair; what is asked for at once ends within this.
    "race": Policy(method="graph", max_samples=1 << 20, budget_ms=8000),
}


class Timer(Protocol):
    """What measuring needs of a device."""

    def time_ms(self, run: Run) -> float:
        """Milliseconds that the device worked on one `run`, after waiting for it to end."""

    def capture(self, run: Run, copies: int) -> Run:
        """A callable that has the device do `run` `copies` times, without the host in between."""

    def flush(self) -> None:
        """Evict what earlier launches left in L2."""

    def clock_mhz(self) -> int | None:
        """Multiprocessor clock of this moment, None if it cannot be read."""

    def slowed(self) -> tuple[str, ...]:
        """What lowers the clock of the device against our will at this moment."""

    def heat(self) -> tuple[int | None, float | None]:
        """Temperature in degrees Celsius and power in watts of this moment, None where they cannot be read."""


def measure(
    run: Run,
    *,
    timer: Timer,
    policy: Policy,
    rng: np.random.Generator,
    incumbent: Run | None = None,
    now_ms: Callable[[], float] = lambda: time.perf_counter() * 1e3,
) -> Samples:
    """Time `run`, and `incumbent` in turns with it, in an order drawn from `rng` in each round.

    Both take nothing and launch everything that one call consists of. A launch that fails raises through here. Raises
    `MachineError` if the timer gives no positive finite time. Both sides have equally many samples.
    """
    runs = [run] if incumbent is None else [run, incumbent]
    taken = _in_turns(runs, timer, policy, rng, now_ms, lambda times: _enough(times, policy))
    return taken[0] if incumbent is None else replace(taken[0], incumbent_ms=taken[1].times_ms)


def race(
    runs: Sequence[Run],
    *,
    timer: Timer,
    policy: Policy,
    rng: np.random.Generator,
    rounds: int,
    now_ms: Callable[[], float] = lambda: time.perf_counter() * 1e3,
) -> tuple[Samples, ...]:
    """Time all `runs` in turns for so many rounds (fewer if the policy's budget ends), in an order drawn in each.

    Of `policy` the number of samples does not count. What was read beside the samples stands with each of them.
    """
    return _in_turns(runs, timer, policy, rng, now_ms, lambda times: len(times[0]) >= rounds)


def _in_turns(
    runs: Sequence[Run],
    timer: Timer,
    policy: Policy,
    rng: np.random.Generator,
    now_ms: Callable[[], float],
    enough: Callable[[list[list[float]]], bool],
) -> tuple[Samples, ...]:
    if policy.method == "graph":
        runs = [_captured(timer, each, policy.copies) for each in runs]
    start = now_ms()
    while True:  # at least once: the first call loads the binary onto the device
        for each in runs:
            _sample(timer, each, policy)
        if now_ms() - start >= policy.warmup_ms:
            break
    times: list[list[float]] = [[] for _ in runs]
    clocks: list[int] = []
    slowed: set[str] = set()
    heat = [timer.heat()]
    start = now_ms()
    while True:
        for side in rng.permutation(len(runs)):
            times[side].append(_sample(timer, runs[side], policy))
            slowed |= set(timer.slowed())
            clock = timer.clock_mhz() if side == 0 else None
            if clock is not None:
                clocks.append(clock)
        if now_ms() - start >= policy.budget_ms or enough(times):
            break
    heat.append(timer.heat())
    shared = Samples(
        times_ms=tuple(times[0]), clocks_mhz=tuple(clocks), method=str(policy), throttled=bool(slowed),
        throttle=tuple(sorted(slowed)), temperature_c=max((one for one, _ in heat if one is not None), default=None),
        power_w=max((one for _, one in heat if one is not None), default=None),
    )  # fmt: skip
    return tuple(replace(shared, times_ms=tuple(each)) for each in times)


def _captured(timer: Timer, run: Run, copies: int) -> Run:
    run()  # a first launch may compile and load, which cannot be captured
    return timer.capture(run, copies)


def _sample(timer: Timer, run: Run, policy: Policy) -> float:
    if policy.flush_l2:
        timer.flush()
    elapsed = timer.time_ms(run) / policy.copies
    if not (math.isfinite(elapsed) and elapsed > 0):
        raise MachineError(
            f"the timer gave {elapsed} ms for a launch",
            hint="a launch that does nothing takes no time; a very short one needs the method `graph` with many copies",
        )
    return elapsed


def _enough(times: list[list[float]], policy: Policy) -> bool:
    candidate = times[0]
    if len(candidate) >= policy.max_samples or _hopeless(times, policy):
        return True
    if len(candidate) < policy.min_samples:
        return False
    known = [candidate] if len(times) == 1 else [candidate, [a / b for a, b in zip(*times, strict=True)]]
    for values in known:
        interval = median_interval(values, confidence=policy.confidence)
        if interval is None or interval.width / 2 > policy.target * median(values):
            return False
    return True


def _hopeless(times: list[list[float]], policy: Policy) -> bool:
    if len(times) == 1 or len(times[0]) < policy.hopeless_after:
        return False
    # Its best against their median: one slow sample alone gives nobody up.
    return min(times[0]) > policy.hopeless * median(times[1])


class CudaTimer:
    """A timer on torch's current stream of one GPU, NVIDIA or (through the same interface of torch) AMD.

    `flush_bytes` is at least twice the L2, and twice the 256 MB cache behind it on AMD, which torch does not report.
    Clocks, heat and throttling come from NVML or amdsmi when they are there.
    """

    def __init__(self, torch: Any, *, index: int = 0, sensor: Sensor | AmdSensor | None = None) -> None:
        self._torch = torch
        self._device = torch.device("cuda", index)
        self._sensor = sensor
        l2_bytes = torch.cuda.get_device_properties(index).L2_cache_size
        self.flush_bytes = max(2 * l2_bytes, _FLUSH_AMD if getattr(torch.version, "hip", None) else _FLUSH_NVIDIA)
        self._buffer: Any = None
        self._stream: Any = None

    @property
    def stream(self) -> Any:
        """The stream on which graphs are captured. What a backward pass of torch's is captured for must have run on it, because
        each of its operations runs on the stream of its forward one."""
        if self._stream is None:
            self._stream = self._torch.cuda.Stream()
        return self._stream

    def time_ms(self, run: Run) -> float:
        """Elapsed time between two events around `run`, in milliseconds; resolution about half a microsecond."""
        cuda = self._torch.cuda
        with cuda.device(self._device):
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))

    def capture(self, run: Run, copies: int) -> Run:
        """Capture `copies` of `run` in one graph. `run` must have run before, and must not allocate or synchronise."""
        cuda = self._torch.cuda
        with cuda.device(self._device):
            graph = cuda.CUDAGraph()
            # Capture needs a stream of its own that has seen all that was launched before.
            stream = self.stream
            stream.wait_stream(cuda.current_stream())
            cuda.synchronize()
            with cuda.graph(graph, stream=stream):
                for _ in range(copies):
                    run()
            cuda.current_stream().wait_stream(stream)
        replay: Run = graph.replay
        return replay

    def flush(self) -> None:
        """Write a buffer that is larger than L2, on the current stream; the launch that follows waits for it."""
        if self._buffer is None:
            self._buffer = self._torch.empty(self.flush_bytes, dtype=self._torch.int8, device=self._device)
        self._buffer.zero_()

    def clock_mhz(self) -> int | None:
        return self._sensor.clock_mhz() if self._sensor else None

    def slowed(self) -> tuple[str, ...]:
        return self._sensor.slowed() if self._sensor else ()

    def heat(self) -> tuple[int | None, float | None]:
        return self._sensor.heat() if self._sensor else (None, None)


def cuda_timer(index: int = 0, load: Load = importlib.import_module) -> CudaTimer:
    """A timer for torch's GPU number `index`. Raises `MachineError` if torch or the GPU is missing."""
    try:
        torch = load("torch")
    except (ImportError, OSError) as error:
        raise MachineError(f"torch cannot be imported: {error}", hint="pip install torch") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise MachineError(
            f"GPU {index} was asked for, torch {torch.__version__} sees {count}",
            hint="`flashtune doctor` says why; on a machine without a GPU ask for estimates with `--target`",
        )
    return CudaTimer(torch, index=index, sensor=_open_sensor(torch, index, load))


def _open_sensor(torch: Any, index: int, load: Load) -> Sensor | AmdSensor | None:
    if getattr(torch.version, "hip", None):
        return open_amd_sensor(torch.cuda.get_device_properties(index), load)
    return open_sensor(torch, index, load)
