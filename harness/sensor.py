"""Live readings of a GPU through NVML: clock, temperature, power, what slows it down, who else uses it.

Reads only: no clock, power or persistence setting is ever changed. Refuses to guess: what is not said is None.
NVML comes in through `load`, so that a fake can stand for it; AMD GPUs are read in `harness.sensor_amd`.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Load = Callable[[str], Any]

# Bits of the clock event reasons (nvml.h, nvmlClocksEventReason*). The first group lowers the clock against our will.
THROTTLING: Mapping[int, str] = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_HARMLESS: Mapping[int, str] = {0x01: "idle", 0x02: "application clocks", 0x100: "display clocks"}
_CLOCK_SM = 1
_DRIVER_FILES = (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version"))
_TEMPERATURE_GPU = 0


class Sensor:
    """Readings of one GPU, named by an NVML handle."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._gpu = handle

    def clock_mhz(self) -> int | None:
        """Multiprocessor clock of this moment."""
        clock: int | None = self._read("nvmlDeviceGetClockInfo", _CLOCK_SM)
        return clock

    def throttle(self) -> tuple[str, ...] | None:
        """Names of all clock event reasons of this moment, those that slow the GPU down first."""
        bits = self._read("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # drivers before 535 know it by its older name
            bits = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        if bits is None:
            return None
        return tuple(name for bit, name in (*THROTTLING.items(), *_HARMLESS.items()) if bits & bit)

    def slowed(self) -> tuple[str, ...]:
        """What lowers the clock against our will at this moment. Nothing when the driver does not say."""
        return tuple(name for name in self.throttle() or () if name in THROTTLING.values())

    def heat(self) -> tuple[int | None, float | None]:
        """Temperature in degrees Celsius and power in watts."""
        power = self._read("nvmlDeviceGetPowerUsage")
        return self._read("nvmlDeviceGetTemperature", _TEMPERATURE_GPU), None if power is None else power / 1000

    def other_processes(self, own_pid: int, *, visible: Callable[[int], bool] | None = None) -> int | None:
        """Compute processes beside `own_pid`; `visible` says whether a process number exists here.

        Inside a container NVML gives the numbers of the host, so that our own is not among them. Where one of them does
        not exist here, one is taken to be this process.
        """
        found = self._read("nvmlDeviceGetComputeRunningProcesses")
        if found is None:
            return None
        pids = {process.pid for process in found}
        exists = visible or (lambda pid: Path(f"/proc/{pid}").exists())
        hidden = own_pid not in pids and any(not exists(pid) for pid in pids)
        return len(pids - {own_pid}) - hidden

    def readings(self, own_pid: int) -> dict[str, Any]:
        """All readings by name, in MHz, degrees Celsius and watts."""
        power, limit = self._read("nvmlDeviceGetPowerUsage"), self._read("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "clock_mhz": self.clock_mhz(),
            "clock_max_mhz": self._read("nvmlDeviceGetMaxClockInfo", _CLOCK_SM),
            "temperature_c": self._read("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1000,
            "power_limit_w": None if limit is None else limit / 1000,
            "throttle": self.throttle(),
            "other_processes": self.other_processes(own_pid),
        }

    def _read(self, name: str, *args: int) -> Any:
        try:
            return getattr(self._nvml, name)(self._gpu, *args)
        except (AttributeError, self._nvml.NVMLError):
            return None


def load_nvml(load: Load = importlib.import_module) -> tuple[Any, str]:
    """The initialised `pynvml` module and the version of NVML, or None and the reason why there is none."""
    try:
        nvml = load("pynvml")
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"
    try:
        nvml.nvmlInit()
        return nvml, str(nvml.nvmlSystemGetNVMLVersion())
    except nvml.NVMLError as error:
        return None, f"NVML does not start: {error}"


def driver_version(nvml: Any, files: Sequence[Path] = _DRIVER_FILES) -> str | None:
    """The version of NVIDIA's driver: as NVML says, or without it as the kernel does; None without either."""
    if nvml is not None:
        try:
            return str(nvml.nvmlSystemGetDriverVersion())
        except nvml.NVMLError:
            return None
    for path in files:
        try:
            found = re.search(r"\b\d{3,}(?:\.\d+)+\b", path.read_text(errors="replace"))
        except OSError:
            continue
        if found:
            return found[0]
    return None


def open_sensor(torch: Any, index: int, load: Load = importlib.import_module) -> Sensor | None:
    """The sensor of torch's GPU number `index`, or None without NVML.

    Found by its UUID: NVML counts all GPUs, torch only those that `CUDA_VISIBLE_DEVICES` leaves.
    """
    nvml, _ = load_nvml(load)
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if nvml is None or uuid is None:
        return None
    name = str(uuid) if str(uuid).startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    try:
        return Sensor(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
    except nvml.NVMLError:
        return None
