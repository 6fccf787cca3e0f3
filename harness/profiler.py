"""NVIDIA's Nsight Compute (`ncu`): how a process is started under it, and what it read of the memory's traffic.

Refuses to guess: where it is missing, may not read the counters, or says nothing of a kernel, there is a reason in words and no
number.
"""

import csv
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.workspace import environment

_PROGRAM = "ncu"
# Bytes that device memory was read and written.
METRIC = "dram__bytes.sum"
_UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9, "Tbyte": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of device memory that were read and written, in all launches together, and how many these were."""

    bytes_: float
    launches: int


def find_program() -> str | None:
    """The path of `ncu`, on the PATH or where the CUDA toolkit puts it; None if it is nowhere there."""
    toolkits = [Path(folder) / "bin" for folder in (environment("CUDA_HOME"), "/usr/local/cuda") if folder]
    return shutil.which(_PROGRAM) or next(
        (str(folder / _PROGRAM) for folder in toolkits if os.access(folder / _PROGRAM, os.X_OK)), None
    )


def wrapped(command: Sequence[str], program: str) -> list[str]:
    """`command` under `ncu`, which reads what is launched between the process's `cudaProfilerStart` and `Stop`."""
    return [
        program, "--profile-from-start", "off", "--target-processes", "all", "--metrics", METRIC, "--csv",
        "--print-units", "base", *command,
    ]  # fmt: skip


def read_traffic(said: str) -> Traffic | str:
    """What `ncu --csv` said, or in words why there is no number in it."""
    lines = said.splitlines()
    start = next((place for place, line in enumerate(lines) if "Metric Name" in line and "Metric Value" in line), None)
    if start is None:
        return _complaint(lines)
    total, launches = 0.0, 0
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") != METRIC:
            continue
        value, unit = row.get("Metric Value") or "", (row.get("Metric Unit") or "").strip()
        number = value.replace(",", "")
        if not re.fullmatch(r"\d+(\.\d+)?([eE][+-]?\d+)?", number) or unit not in _UNITS:
            return f"`ncu` gave `{value} {unit}` for {METRIC} of `{row.get('Kernel Name')}`"
        total, launches = total + float(number) * _UNITS[unit], launches + 1
    if not launches:
        return f"`ncu` has no {METRIC} on this device"
    return Traffic(bytes_=total, launches=launches)


def _complaint(lines: Sequence[str]) -> str:
    errors = [line.replace("==ERROR==", "").strip() for line in lines if line.startswith("==ERROR==")]
    if errors:
        return f"`ncu` says: {errors[0]}"
    told = [line for line in lines if line.strip()]
    return f"`ncu` gave no table{f': {told[-1].strip()}' if told else ''}"
