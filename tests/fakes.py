"""Stand-ins for hardware that is not here: torch and NVML beside the simulated device of `harness.simulated`."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from harness.simulated import SimulatedDevice as FakeDevice
from harness.simulated import normal, quiet

__all__ = ["H200", "MI300X", "FakeDevice", "FakeTorch", "fake_nvml", "normal", "quiet"]


class FakeNvmlError(Exception):
    """What a fake NVML raises, as `pynvml.NVMLError` is raised."""


def fake_nvml(**answers: Any) -> SimpleNamespace:
    """A `pynvml` that gives `answers` by function name without the prefix `nvmlDeviceGet`.

    A value that is an exception is raised. What is not named raises `NVMLError`, as for an unsupported query.
    """
    known = {
        "ClockInfo": 1980,
        "MaxClockInfo": 1980,
        "Temperature": 41,
        "PowerUsage": 120500,
        "EnforcedPowerLimit": 700000,
        "CurrentClocksEventReasons": 0,
        "ComputeRunningProcesses": [],
    } | answers

    def answer(value: Any) -> Callable[..., Any]:
        def query(*args: Any) -> Any:
            if isinstance(value, Exception):
                raise value
            return value(*args) if callable(value) else value

        return query

    return SimpleNamespace(
        NVMLError=FakeNvmlError,
        nvmlInit=answer(known.pop("Init", None)),
        nvmlSystemGetNVMLVersion=answer("12.570.86"),
        nvmlSystemGetDriverVersion=answer(known.pop("DriverVersion", "570.86.15")),
        nvmlDeviceGetHandleByUUID=answer(known.pop("HandleByUUID", lambda uuid: uuid)),
        **{f"nvmlDeviceGet{name}": answer(value) for name, value in known.items()},
    )


H200 = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 150_110_011_392,
    "warp_size": 32,
    "max_threads_per_multi_processor": 2048,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 62914560,
    "clock_rate": 1980000,
    "memory_clock_rate": 3201000,
    "memory_bus_width": 6144,
    "uuid": "7ac9a7b1-0000-1111-2222-333344445555",
}

MI300X = {
    "name": "AMD Instinct MI300X",
    "major": 9,
    "minor": 4,
    "gcnArchName": "gfx942:sramecc+:xnack-",
    "multi_processor_count": 304,
    "total_memory": 205_822_885_888,
    "warp_size": 64,
    "max_threads_per_multi_processor": 2048,
    "shared_memory_per_block": 65536,
    "shared_memory_per_multiprocessor": 65536,
    "L2_cache_size": 4194304,
    "clock_rate": 2100000,
}


class FakeTorch:
    """As much of torch as `harness.probe` and `harness.measure.CudaTimer` touch; logs the calls of the latter."""

    def __init__(self, *gpus: dict[str, Any], hip: bool = False, cuda: bool = True, elapsed_ms: float = 1.5) -> None:
        self.__version__ = "2.13.0+fake"
        self.log: list[str] = []
        self.version = SimpleNamespace(cuda=None if hip or not cuda else "12.9", hip="6.4" if hip else None)
        self.int8 = "int8"
        self._elapsed_ms = elapsed_ms
        self.cuda = SimpleNamespace(
            is_available=lambda: bool(gpus),
            device_count=lambda: len(gpus),
            get_device_properties=lambda index: SimpleNamespace(**gpus[index]),
            device=lambda device: _Entered(self.log, f"device {device}"),
            Event=lambda enable_timing: _Event(self, enable_timing),
            Stream=lambda: _Stream(self.log, "side"),
            current_stream=lambda: _Stream(self.log, "current"),
            synchronize=lambda: self.log.append("synchronize"),
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            graph=lambda graph, stream: _Entered(self.log, f"capture on {stream.name}"),
        )

    def device(self, kind: str, index: int) -> str:
        return f"{kind}:{index}"

    def empty(self, size: int, *, dtype: str, device: str) -> SimpleNamespace:
        self.log.append(f"empty {size} {dtype} on {device}")
        return SimpleNamespace(zero_=lambda: self.log.append("zero"))


@dataclass
class _Entered:
    log: list[str]
    name: str

    def __enter__(self) -> None:
        self.log.append(f"enter {self.name}")

    def __exit__(self, *error: object) -> None:
        self.log.append(f"leave {self.name}")


@dataclass
class _Stream:
    log: list[str]
    name: str

    def wait_stream(self, other: "_Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class _Event:
    def __init__(self, torch: FakeTorch, enable_timing: bool) -> None:
        self._torch = torch
        self._timing = enable_timing

    def record(self) -> None:
        self._torch.log.append("record")

    def synchronize(self) -> None:
        self._torch.log.append("wait for event")

    def elapsed_time(self, end: "_Event") -> float:
        if not (self._timing and end._timing):
            raise ValueError("both events must time")
        return self._torch._elapsed_ms
