"""Live readings of an AMD GPU through amdsmi: clock, temperature, power, and whether it is throttled.

Reads only. Refuses to guess: a reading that is not a number is None. Written from AMD's documentation of `gpu_metrics`, tried on
a fake only; amdsmi comes with ROCm and through `load`.
"""

from collections.abc import Callable, Mapping
from typing import Any

Load = Callable[[str], Any]

# What the driver puts where a device has no such reading.
_NOTHING = {0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}


class AmdSensor:
    """Readings of one GPU, named by a handle of amdsmi."""

    def __init__(self, smi: Any, handle: Any) -> None:
        self._smi = smi
        self._gpu = handle

    def clock_mhz(self) -> int | None:
        """The slowest of the engines' clocks at this moment: a launch ends when the last of them does."""
        metrics = self._metrics()
        several = metrics.get("current_gfxclks")
        clocks = several if isinstance(several, list) else [metrics.get("current_gfxclk")]
        return min((number for number in map(_number, clocks) if number), default=None)

    def slowed(self) -> tuple[str, ...]:
        """The throttle status, if anything throttles; nothing where the driver does not say."""
        metrics = self._metrics()
        status = _number(metrics.get("indep_throttle_status")) or _number(metrics.get("throttle_status"))
        return (f"throttle status {status:#x}",) if status else ()

    def heat(self) -> tuple[int | None, float | None]:
        """Temperature of the hottest spot in degrees Celsius, and power in watts."""
        metrics = self._metrics()
        power = _number(metrics.get("current_socket_power")) or _number(metrics.get("average_socket_power"))
        return _number(metrics.get("temperature_hotspot")), None if power is None else float(power)

    def _metrics(self) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = self._smi.amdsmi_get_gpu_metrics_info(self._gpu)
        except (AttributeError, self._smi.AmdSmiException):
            return {}
        return found


def open_amd_sensor(properties: Any, load: Load) -> AmdSensor | None:
    """The sensor of the GPU with torch's `properties`, found by its place on the bus; None without amdsmi."""
    try:
        smi = load("amdsmi")
    except (ImportError, OSError, KeyError):
        return None
    try:
        place = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
        wanted = "{:04x}:{:02x}:{:02x}".format(*place)
        smi.amdsmi_init()
        for handle in smi.amdsmi_get_processor_handles():
            if smi.amdsmi_get_gpu_device_bdf(handle).lower().startswith(wanted):
                return AmdSensor(smi, handle)
    except (AttributeError, smi.AmdSmiException):
        return None
    return None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value not in _NOTHING else None
