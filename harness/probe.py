"""What is on this machine, and whether a measurement here could be trusted.

Reads only: no clock, power or persistence setting is ever changed. Refuses to fail where something is missing: what is
not there is None, beside the reason. Every source (torch, triton, NVML) comes in through `load`, so that a machine with
a GPU can be described to this module by a fake.
"""

import importlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from harness.device import TARGETS, DeviceFacts
from harness.errors import MachineError
from harness.sensor import THROTTLING, Load, driver_version, load_nvml, open_sensor

_VALUE = ConfigDict(extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)

Severity = Literal["error", "warning", "note"]

OLDEST_TRITON = (3, 6)
_GIT_SECONDS = 20
_DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Package:
    """An importable package: its version, or None and why it cannot be imported."""

    version: str | None
    reason: str = ""

    @property
    def release(self) -> tuple[int, ...]:
        """The leading numbers of the version, `(3, 6, 0)` of `3.6.0+git1234`; empty when it is missing."""
        found = re.match(r"\d+(?:\.\d+)*", self.version or "")
        return tuple(int(part) for part in found[0].split(".")) if found else ()


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Gpu:
    """One GPU, as torch and NVML describe it; None where neither says.

    `throttle` names the clock event reasons of this moment. `other_processes` counts compute processes beside this one.
    """

    index: int
    name: str
    arch: str
    multiprocessors: int
    memory_bytes: int
    warp_size: int
    warps_per_sm: int
    shared_bytes_per_block: int | None = None
    shared_bytes_per_sm: int | None = None
    l2_bytes: int | None = None
    memory_gb_per_s: float | None = None
    clock_max_mhz: int | None = None
    clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    throttle: tuple[str, ...] | None = None
    other_processes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Machine:
    """What `probe` found. `no_gpu` says why `gpus` is empty; `commit` is that of the workspace, `-dirty` if changed."""

    platform: str
    python: str
    cores: int
    memory_bytes: int | None
    torch: Package
    triton: Package
    numpy: Package
    nvml: Package
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    no_gpu: str = ""
    commit: str | None = None


@plain_dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that weakens a measurement here. An `error` forbids measuring, a `warning` taints it."""

    severity: Severity
    code: str
    message: str
    hint: str


def probe(
    *,
    root: Path | None = None,
    load: Load = importlib.import_module,
    commit: Callable[[Path], str | None] | None = None,
) -> Machine:
    """Describe this machine. `root` is the folder whose git commit is named. Imports torch and triton."""
    torch, torch_package = _load_package("torch", load)
    nvml, nvml_version = load_nvml(load)
    gpus, no_gpu = _find_gpus(torch, load) if torch is not None else ((), f"torch is missing: {torch_package.reason}")
    return Machine(
        platform=platform.platform(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        torch=torch_package,
        triton=_load_package("triton", load)[1],
        numpy=_load_package("numpy", load)[1],
        nvml=Package(version=nvml_version) if nvml else Package(version=None, reason=nvml_version),
        driver=driver_version(nvml),
        gpus=gpus,
        no_gpu=no_gpu,
        commit=(commit or git_commit)(root or Path.cwd()),
    )


def live_device(machine: Machine, *, index: int = 0) -> DeviceFacts | None:
    """Facts of the GPU that is here, or None if there is none.

    A GPU that is one of `TARGETS` takes the name and the rates of that target, with the limits read here in place of
    the published ones. Any other is named by a slug of its product name, with rates generic to its architecture.
    """
    if index >= len(machine.gpus):
        return None
    gpu = machine.gpus[index]
    name = _PRODUCTS.get(gpu.name.strip())
    if name is None or TARGETS[name].arch != gpu.arch:
        return _generic_device(gpu)
    named = TARGETS[name]
    return replace(
        named,
        multiprocessors=gpu.multiprocessors,
        l2_bytes=gpu.l2_bytes or named.l2_bytes,
        shared_bytes_per_block=gpu.shared_bytes_per_block or named.shared_bytes_per_block,
        shared_bytes_per_sm=gpu.shared_bytes_per_sm or named.shared_bytes_per_sm,
        source=f"{named.source}; multiprocessors, L2 and shared memory as read here",
    )


def toolchain(load: Load = importlib.import_module) -> str:
    """What makes machine code: `triton-3.6.0`, or `triton-3.6.0+ptxas12.9` where ptxas is not Triton's own.

    Raises `MachineError` without triton.
    """
    triton, package = _load_package("triton", load)
    if triton is None:
        raise MachineError(f"triton cannot be imported: {package.reason}", hint="pip install triton")
    name = f"triton-{package.version}"
    home = Path(triton.__file__).parent
    for tool in ("ptxas", "ptxas_blackwell"):
        try:
            found = getattr(load("triton.knobs").nvidia, tool)
        except (ImportError, AttributeError, RuntimeError):  # no NVIDIA tools in this build
            continue
        if not Path(found.path).is_relative_to(home):
            name += f"+{tool.replace('_', '-')}{found.version}"
    return name


def git_commit(root: Path) -> str | None:
    """The commit that `root` is at, with `-dirty` when files differ from it; None outside a repository."""
    command = ["git", "--no-optional-locks", "-C", str(root), *_DESCRIBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _load_package(name: str, load: Load) -> tuple[Any, Package]:
    try:
        module = load(name)
    except (ImportError, OSError, RuntimeError) as error:  # a broken installation fails in the loader or on a library
        return None, Package(version=None, reason=f"{type(error).__name__}: {error}")
    return module, Package(version=str(module.__version__))


def _find_gpus(torch: Any, load: Load) -> tuple[tuple[Gpu, ...], str]:
    if not torch.cuda.is_available():
        build = torch.version.cuda or getattr(torch.version, "hip", None)
        why = "no driver or no device answers" if build else "it is built without CUDA or ROCm"
        return (), f"torch {torch.__version__} sees no GPU: {why}"
    try:
        return tuple(_describe(torch, index, load) for index in range(torch.cuda.device_count())), ""
    except RuntimeError as error:
        return (), f"torch cannot query the GPU: {error}"


def _describe(torch: Any, index: int, load: Load) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    amd = bool(getattr(torch.version, "hip", None))
    shared_per_sm = getattr(found, "shared_memory_per_multiprocessor", None)
    shared = getattr(found, "shared_memory_per_block_optin", None)
    if not shared:  # NVIDIA keeps 1 KiB of each multiprocessor (CUDA programming guide, table of technical limits)
        shared = getattr(found, "shared_memory_per_block", None) if amd else shared_per_sm and shared_per_sm - 1024
    sensor = open_sensor(torch, index, load)
    readings = sensor.readings(os.getpid()) if sensor else {}
    readings["clock_max_mhz"] = readings.get("clock_max_mhz") or getattr(found, "clock_rate", 0) // 1000 or None
    return Gpu(
        index=index,
        name=found.name,
        arch=found.gcnArchName.split(":")[0] if amd else f"sm_{found.major}{found.minor}",
        multiprocessors=found.multi_processor_count,
        memory_bytes=found.total_memory,
        warp_size=found.warp_size,
        warps_per_sm=found.max_threads_per_multi_processor // found.warp_size,
        shared_bytes_per_block=shared or None,
        shared_bytes_per_sm=shared_per_sm or None,
        l2_bytes=getattr(found, "L2_cache_size", None) or None,
        memory_gb_per_s=None if amd else _bandwidth(found),
        **readings,
    )


def _bandwidth(found: Any) -> float | None:
    """Peak memory bandwidth in 1e9 bytes a second: two transfers a clock over the whole bus."""
    rate = 2 * getattr(found, "memory_clock_rate", 0) * 1e3 * getattr(found, "memory_bus_width", 0) / 8 / 1e9
    return rate or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system, or one that does not say
        return None


# Product names, as drivers give them, of exactly the models whose published figures `TARGETS` holds. An H100 PCIe or a
# 40 GB A100 has other clocks and another memory, and is therefore no `h100` and no `a100`.
_PRODUCTS: Mapping[str, str] = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI300X OAM": "mi300x",
}


def products_of(device: str) -> tuple[str, ...]:
    """What drivers call a device of `TARGETS`; nothing for one whose name is already a slug of that."""
    return tuple(product for product, name in _PRODUCTS.items() if name == device)


@plain_dataclass(frozen=True, slots=True)
class _Rates:
    """Rates of one multiprocessor in one clock: dense fp16 matrix operations with fp32 sums (multiply and add count one
    each), fp32 FMA lanes; resident blocks; and a usual clock and memory bandwidth where the driver does not say."""

    matrix_operations: int
    fma: int
    blocks: int
    clock_mhz: int
    memory_gb_per_s: float


# From the makers' architecture whitepapers and the CUDA programming guide (technical specifications per capability).
_RATES: Mapping[str, _Rates] = {
    "sm_70": _Rates(1024, 64, 32, 1530, 900),
    "sm_75": _Rates(1024, 64, 16, 1590, 320),
    "sm_80": _Rates(2048, 64, 32, 1410, 1555),
    "sm_86": _Rates(512, 128, 16, 1700, 768),
    "sm_89": _Rates(512, 128, 24, 2520, 864),
    "sm_90": _Rates(4096, 128, 32, 1755, 2039),
    "sm_100": _Rates(8192, 128, 32, 1850, 8000),
    "sm_120": _Rates(512, 128, 24, 2407, 1792),
    "gfx90a": _Rates(1024, 128, 32, 1700, 1638),
    "gfx942": _Rates(2048, 128, 32, 2100, 5300),
    "gfx950": _Rates(4096, 128, 32, 2400, 8000),
    "gfx1100": _Rates(512, 128, 32, 2500, 960),
}


def _nearest_rates(arch: str) -> str:
    """The known architecture that is most like `arch`: the same, or the newest that is not newer, or the oldest."""
    if arch in _RATES:
        return arch
    if not arch.startswith("sm_"):
        return "gfx90a" if arch.startswith("gfx9") else "gfx1100"
    known = sorted(int(name[3:]) for name in _RATES if name.startswith("sm_"))
    wanted = int(re.sub(r"\D", "", arch))
    return f"sm_{max([number for number in known if number <= wanted], default=known[0])}"


def _generic_device(gpu: Gpu) -> DeviceFacts:
    nearest = _nearest_rates(gpu.arch)
    rates = _RATES[nearest]
    nvidia, cdna = gpu.arch.startswith("sm_"), gpu.arch.startswith("gfx9")
    clock = gpu.clock_max_mhz or rates.clock_mhz
    shared = gpu.shared_bytes_per_block or 48 << 10
    half = gpu.multiprocessors * rates.matrix_operations * clock / 1e6
    # Numbers of 8 bits came with sm_89; those of gfx942 are others.
    eight = {"fp8": 2 * half} if nvidia and int(re.sub(r"\D", "", gpu.arch)) >= 89 else {}
    return DeviceFacts(
        name=re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-"),
        arch=gpu.arch,
        multiprocessors=gpu.multiprocessors,
        clock_mhz=clock,
        memory_gb_per_s=gpu.memory_gb_per_s or rates.memory_gb_per_s,
        l2_bytes=gpu.l2_bytes or 4 << 20,
        shared_bytes_per_block=shared,
        shared_bytes_per_sm=gpu.shared_bytes_per_sm or shared,
        registers_per_sm=65536 if nvidia else 131072 if cdna else 98304,
        registers_per_thread=255 if nvidia else 512 if cdna else 256,
        warps_per_sm=gpu.warps_per_sm,
        blocks_per_sm=rates.blocks,
        warp_size=gpu.warp_size,
        matrix_tflops=eight
        | {
            "fp16": half,
            "bf16": half,
            "tf32": half / 2,
            "fp32": gpu.multiprocessors * 2 * rates.fma * clock / 1e6,
        },
        fma_per_clock=rates.fma,
        special_per_clock=16,
        source=f"read from torch and the driver; matrix and FMA rates are those of any {nearest}",
    )


def trust(machine: Machine) -> list[Finding]:
    """What speaks against a measurement on this machine, gravest first; empty when nothing does."""
    findings = [*_software_findings(machine), *(found for gpu in machine.gpus for found in _gpu_findings(gpu))]
    if not machine.gpus:
        hint = "measure on a machine with a GPU, or ask for estimates of a named target with `--target`"
        findings.append(
            Finding(severity="error", code="no-gpu", message=f"no GPU is here: {machine.no_gpu}", hint=hint)
        )
    elif machine.nvml.version is None:
        message = f"clocks and throttling cannot be watched: {machine.nvml.reason}"
        hint = "pip install nvidia-ml-py (NVIDIA only); without it a throttled sample looks like any other"
        findings.append(Finding(severity="warning", code="no-sensor", message=message, hint=hint))
    return sorted(findings, key=lambda found: ("error", "warning", "note").index(found.severity))


def _software_findings(machine: Machine) -> list[Finding]:
    findings = []
    for name, package in (("torch", machine.torch), ("triton", machine.triton), ("numpy", machine.numpy)):
        if package.version is None:
            message = f"{name} cannot be imported: {package.reason}"
            findings.append(Finding(severity="error", code=f"no-{name}", message=message, hint=f"pip install {name}"))
    triton, numpy = machine.triton.release, machine.numpy.release
    if triton and triton < OLDEST_TRITON:
        message = f"triton {machine.triton.version} is older than 3.6, the oldest that is supported"
        findings.append(Finding(severity="error", code="old-triton", message=message, hint="pip install 'triton>=3.6'"))
    if triton[:2] == (3, 6) and numpy >= (2, 4):
        message = (
            f"numpy {machine.numpy.version} breaks `range()` in the interpreter of triton {machine.triton.version}"
        )
        hint = "pip install 'numpy<2.4'; until then no kernel can be verified on a CPU"
        # With a GPU, kernels are verified on it.
        severity: Severity = "warning" if machine.gpus else "error"
        findings.append(Finding(severity=severity, code="numpy-interpreter", message=message, hint=hint))
    return findings


def _gpu_findings(gpu: Gpu) -> list[Finding]:
    findings = []
    who = f"GPU {gpu.index} ({gpu.name})"
    slowed = [reason for reason in gpu.throttle or () if reason in THROTTLING.values()]
    hot = [reason for reason in slowed if reason not in ("power cap", "sync boost")]
    if hot:
        message = f"{who} lowers its clock now: {', '.join(hot)}, {gpu.clock_mhz} of {gpu.clock_max_mhz} MHz"
        hint = "let it cool down, check its fans and its power supply, then measure again"
        findings.append(Finding(severity="error", code="throttled", message=message, hint=hint))
    if "power cap" in slowed:
        message = f"{who} is at its power cap: {gpu.power_w} of {gpu.power_limit_w} W"
        hint = "times will follow the power of a kernel as well as its work; compare only samples taken in turns"
        findings.append(Finding(severity="warning", code="power-cap", message=message, hint=hint))
    if "sync boost" in slowed:
        message, hint = (
            f"{who} follows the clock of a slower GPU (sync boost)",
            "have the group dissolved, or measure all",
        )
        findings.append(Finding(severity="warning", code="sync-boost", message=message, hint=hint))
    if "application clocks" in (gpu.throttle or ()):
        message, hint = f"{who} has its clock fixed by a user", "fine for comparing; it is not the speed at full clock"
        findings.append(Finding(severity="note", code="fixed-clock", message=message, hint=hint))
    if gpu.other_processes:
        message = f"{who} is shared with {gpu.other_processes} other compute process(es)"
        hint = "end them or take another GPU (see `nvidia-smi`); shared caches and memory make times worthless"
        findings.append(Finding(severity="warning", code="shared-gpu", message=message, hint=hint))
    return findings
