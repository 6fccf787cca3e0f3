"""What is known of GPU models: published figures of named targets.

Refuses to query a GPU or a driver: `harness.probe` does. Published figures are the makers' dense rates at boost clock;
they bound a prediction and are never shown as measurements.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from harness.errors import UsageError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """A GPU model. `arch` is `sm_90` or `gfx942`; `name` is lower-case and short, and names the folder of its
    champions.

    `shared_bytes_per_block` is the most that one block may ask for (opt-in limit), `shared_bytes_per_sm` what a
    multiprocessor has for all its blocks. `matrix_tflops` is the dense matrix rate by dtype, in 1e12 operations a
    second (fp8 means both of its types, and is left out where there are none; fp32 means what the kernels use for
    fp32 inputs: plain FMA units). `special_per_clock` is the number of exp2 results a multiprocessor gives in a clock,
    `fma_per_clock` of fp32 FMA lanes. `clock_mhz` is the clock at which the matrix rate was published. `l2_bytes` is what
    one die can reach of its own (an XCD on AMD). Bytes are bytes, rates are per device.
    """

    name: str
    arch: str
    multiprocessors: int
    clock_mhz: int
    memory_gb_per_s: float
    l2_bytes: int
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    registers_per_sm: int
    registers_per_thread: int
    warps_per_sm: int
    blocks_per_sm: int
    warp_size: int
    matrix_tflops: Mapping[str, float]
    fma_per_clock: int
    special_per_clock: int
    source: str

    @property
    def vendor(self) -> str:
        """`cuda` or `hip`, as Triton names its backends."""
        return "cuda" if self.arch.startswith("sm_") else "hip"

    def multiplies(self, dtype: str) -> bool:
        """Whether its matrix units take a type as the kernels are given it. The types of 8 bits of gfx942 have other numbers."""
        return not dtype.startswith("fp8") or "fp8" in self.matrix_tflops

    @property
    def compute_capability(self) -> int:
        """90 for `sm_90`; 0 on AMD."""
        return int(self.arch.removeprefix("sm_")) if self.vendor == "cuda" else 0


def _nvidia(**facts: object) -> DeviceFacts:
    common: dict[str, object] = {
        "registers_per_sm": 65536, "registers_per_thread": 255, "warp_size": 32, "blocks_per_sm": 32,
        "special_per_clock": 16, "warps_per_sm": 64, "fma_per_clock": 128,
    }  # fmt: skip
    return DeviceFacts(**(common | facts))  # type: ignore[arg-type]


_MODELS: Mapping[str, DeviceFacts] = {
    facts.name: facts
    for facts in (
        _nvidia(
            name="a100", arch="sm_80", multiprocessors=108, clock_mhz=1410, memory_gb_per_s=2039, l2_bytes=40 << 20,
            shared_bytes_per_block=163 << 10, shared_bytes_per_sm=164 << 10, fma_per_clock=64,
            matrix_tflops={"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
            source="NVIDIA A100 80GB SXM datasheet and GA100 whitepaper",
        ),
        _nvidia(
            name="h100", arch="sm_90", multiprocessors=132, clock_mhz=1830, memory_gb_per_s=3350, l2_bytes=50 << 20,
            shared_bytes_per_block=227 << 10, shared_bytes_per_sm=228 << 10,
            matrix_tflops={"fp8": 1978.9, "fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
            source="NVIDIA H100 SXM5 datasheet and GH100 whitepaper (1830 MHz is the clock of its matrix rates)",
        ),
        _nvidia(
            name="h200", arch="sm_90", multiprocessors=132, clock_mhz=1830, memory_gb_per_s=4800, l2_bytes=50 << 20,
            shared_bytes_per_block=227 << 10, shared_bytes_per_sm=228 << 10,
            matrix_tflops={"fp8": 1978.9, "fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
            source="NVIDIA H200 SXM datasheet and GH100 whitepaper",
        ),
        _nvidia(
            name="b200", arch="sm_100", multiprocessors=148, clock_mhz=1850, memory_gb_per_s=8000, l2_bytes=126 << 20,
            shared_bytes_per_block=227 << 10, shared_bytes_per_sm=228 << 10,
            matrix_tflops={"fp8": 4500, "fp16": 2250, "bf16": 2250, "tf32": 1125, "fp32": 75},
            source="NVIDIA HGX B200 datasheet (1000 W) and Blackwell tuning guide",
        ),
        _nvidia(
            name="rtx4090", arch="sm_89", multiprocessors=128, clock_mhz=2520, memory_gb_per_s=1008, l2_bytes=72 << 20,
            shared_bytes_per_block=99 << 10, shared_bytes_per_sm=100 << 10, warps_per_sm=48, blocks_per_sm=24,
            matrix_tflops={"fp8": 330.3, "fp16": 165.2, "bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
            source="NVIDIA Ada GPU architecture whitepaper (fp32 accumulation)",
        ),
        DeviceFacts(
            name="mi300x", arch="gfx942", multiprocessors=304, clock_mhz=2100, memory_gb_per_s=5300, l2_bytes=4 << 20,
            shared_bytes_per_block=64 << 10, shared_bytes_per_sm=64 << 10, registers_per_sm=131072,
            registers_per_thread=512, warps_per_sm=32, blocks_per_sm=32, warp_size=64, fma_per_clock=128,
            special_per_clock=16, matrix_tflops={"fp16": 1307.4, "bf16": 1307.4, "tf32": 653.7, "fp32": 163.4},
            source="AMD Instinct MI300X datasheet, CDNA 3 whitepaper and ISA guide (L2 of one XCD)",
        ),
    )
}  # fmt: skip

# A bare architecture stands for its commonest model in a data centre (or, for sm_89, on a desk).
_COMMONEST = {"sm_80": "a100", "sm_89": "rtx4090", "sm_90": "h100", "sm_100": "b200", "gfx942": "mi300x"}

TARGETS: Mapping[str, DeviceFacts] = {
    **_MODELS,
    **{
        arch: replace(_MODELS[model], name=arch, source=f"the figures of {model}: {_MODELS[model].source}")
        for arch, model in _COMMONEST.items()
    },
}


def find_target(name: str) -> DeviceFacts:
    """The facts of a model (`h200`) or of a bare architecture (`sm_90`). Raises `UsageError` if `name` is neither."""
    facts = TARGETS.get(name.strip().lower())
    if facts is None:
        hint = did_you_mean(name.lower(), tuple(TARGETS))
        raise UsageError(f"no published figures are known of a target `{name}`", hint=hint)
    return facts
