"""Reads compiled kernels: what they cost (registers, spills, shared memory, warps) and what they do (instructions,
loops).

NVIDIA binaries are disassembled with the `nvdisasm` of Triton's own wheel; AMD code is read from the assembly that
Triton keeps. Instructions are counted as one warp issues them. Refuses to judge: limits are in `harness.prune`.

Classes of instructions: `matrix`, `special` (exp2, reciprocal), `fma` (fp32 and fp16 arithmetic), `alu` (integer,
logic, compare, select, move), `convert`, `shuffle`, `uniform` (scalar unit), `shared_load`, `shared_store`,
`global_load`, `global_store`, `atomic`, `async_copy` (global to shared, by the threads), `tma` (bulk copies),
`local_load` and `local_store` (spills), `tensor_memory`, `barrier`, `wait`, `branch`, `setmaxreg`, `other`.
"""

import functools
import hashlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from elftools.elf.elffile import ELFFile

from harness.errors import MachineError
from harness.flow import Instruction, innermost_loops
from harness.outcome import Binary, Loop


class Code(NamedTuple):
    """The instructions of a kernel by class, and its innermost working loops, in code order.

    `Loop.matrix_flops` is what one warp does in one iteration, 0 where the instruction does not say its shape.
    """

    instructions: Mapping[str, int]
    loops: tuple[Loop, ...]


def read_binary(asm: Mapping[str, Any], metadata: Any) -> Binary:
    """Read a compiled kernel of Triton (`CompiledKernel.asm`, `.metadata`).

    Raises `MachineError` if the binary is of no kind that is known, or the disassembler is missing.
    """
    if "cubin" in asm:
        code = sass_code(_disassembly(asm["cubin"]))
        registers, spill_bytes = _cuda_resources(asm["cubin"], metadata.name)
        warps = _cuda_warps(asm["ptx"], metadata.num_warps)
        text = _text_bytes(asm["cubin"])
    elif "hsaco" in asm:
        code = amdgcn_code(asm["amdgcn"])
        registers, spill_bytes = amdgcn_resources(asm["amdgcn"])
        warps = metadata.num_warps
        text = _text_bytes(asm["hsaco"])
    else:
        raise MachineError(f"cannot read the binary of `{metadata.name}`: found only {', '.join(asm)}")
    return Binary(
        kernel=metadata.name,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=metadata.shared,
        warps=warps,
        instructions=code.instructions,
        loops=code.loops,
        code_hash=code_hash(text, shared_bytes=metadata.shared, warps=warps),
        specialized=_is_specialized(asm, code.instructions),
    )


def code_hash(text: bytes, *, shared_bytes: int, warps: int) -> str:
    """Name of what the GPU runs: the machine code, and the launch settings that are no part of it."""
    return hashlib.sha256(f"{shared_bytes} {warps} ".encode() + text).hexdigest()


_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][A-Z0-9_]*)([.\w]*)([^;]*)")
_SASS_LABEL = re.compile(r"(\.L_\w+):")
_SASS_TARGET = re.compile(r"\.L_\w+")
_SASS_ENDS = frozenset({"EXIT", "RET", "BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "KILL"})


def sass_code(disassembly: str) -> Code:
    """Read the output of `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        found = _SASS_LINE.match(line)
        if found is None:
            label = _SASS_LABEL.match(line)
            if label:
                labels[label[1]] = len(instructions)
            continue
        guard, opcode, modifiers, operands = found.groups()
        ends = opcode in _SASS_ENDS
        # A branch may be conditional by its guard or by an operand before its label (a predicate, divergence).
        conditional = guard is not None or (opcode == "BRA" and "," in operands)
        instructions.append(
            Instruction(
                kind=sass_class(opcode, modifiers),
                flops=_sass_flops(opcode, modifiers),
                targets=tuple(_SASS_TARGET.findall(operands)) if ends else (),
                falls=not ends or conditional,
            )
        )
    return _code(instructions, labels)


# Class by opcode; a prefix of the opcode is enough. Longer prefixes win.
_SASS_CLASSES: Mapping[str, str] = {
    "HGMMA": "matrix", "IGMMA": "matrix", "QGMMA": "matrix", "BGMMA": "matrix", "HMMA": "matrix", "IMMA": "matrix",
    "QMMA": "matrix", "OMMA": "matrix", "DMMA": "matrix", "BMMA": "matrix", "UTCHMMA": "matrix", "UTCQMMA": "matrix",
    "UTCIMMA": "matrix", "UTCOMMA": "matrix", "UTCMXQMMA": "matrix", "MUFU": "special", "FFMA": "fma", "FADD": "fma",
    "FMUL": "fma", "HFMA2": "fma", "HADD2": "fma", "HMUL2": "fma", "DFMA": "fma", "DADD": "fma", "DMUL": "fma",
    "F2F": "convert", "F2I": "convert", "I2F": "convert", "FRND": "convert", "F2FP": "convert", "F2IP": "convert",
    "I2I": "convert", "I2FP": "convert", "SHFL": "shuffle", "REDUX": "shuffle", "MOVM": "shuffle", "VOTE": "alu",
    "LDSM": "shared_load", "LDS": "shared_load", "STS": "shared_store", "STSM": "shared_store", "ATOMS": "atomic",
    "ATOM": "atomic", "ATOMG": "atomic", "RED": "atomic", "REDG": "atomic", "REDS": "atomic", "UTMAREDG": "tma",
    "LDGSTS": "async_copy", "LDG": "global_load", "LD": "global_load", "STG": "global_store", "ST": "global_store",
    "UTMA": "tma", "UBLKCP": "tma", "UBLKPF": "tma", "UBLKRED": "tma", "UTMACMDFLUSH": "wait", "UTMACCTL": "wait",
    "LDL": "local_load", "STL": "local_store", "LDTM": "tensor_memory", "STTM": "tensor_memory",
    "UTCCP": "tensor_memory", "UTCATOMSWS": "tensor_memory", "BAR": "barrier", "SYNCS": "barrier",
    "UCGABAR": "barrier", "UTCBAR": "barrier", "MEMBAR": "barrier", "FENCE": "barrier", "WARPSYNC": "other",
    "DEPBAR": "wait", "LDGDEPBAR": "other", "WARPGROUP": "other", "WARPGROUPSET": "other", "NOP": "other",
    "NANOSLEEP": "wait", "ARRIVES": "barrier", "CCTL": "wait", "ERRBAR": "wait", "LDC": "other", "LDCU": "uniform",
    "BRA": "branch", "BRX": "branch", "JMP": "branch", "JMX": "branch", "EXIT": "branch", "RET": "branch",
    "CALL": "branch", "BSSY": "branch", "BSYNC": "branch", "BREAK": "branch", "KILL": "branch",
    "USETMAXREG": "setmaxreg", "S2R": "other", "S2UR": "other", "CS2R": "alu", "R2UR": "uniform", "ELECT": "alu",
    "ENDCOLLECTIVE": "other", "ACQBULK": "wait", "PREEXIT": "other",
}  # fmt: skip
_SASS_EXACT = frozenset({"LD", "ST", "LDC", "ATOM", "RED"})


@functools.cache
def sass_class(opcode: str, modifiers: str = "") -> str:
    """The class of an instruction by its opcode (without what follows the first dot) and its modifiers."""
    if (opcode, modifiers.split(".")[1:2]) in (("WARPGROUP", ["DEPBAR"]), ("SYNCS", ["PHASECHK"])):
        return "wait"
    for length in range(len(opcode), 1, -1):
        kind = _SASS_CLASSES.get(opcode[:length])
        if kind is not None and (length == len(opcode) or opcode[:length] not in _SASS_EXACT):
            return kind
    # The uniform datapath prefixes its opcodes with U; what is left is integer and logic work.
    return "uniform" if opcode.startswith("U") else "alu"


def _sass_flops(opcode: str, modifiers: str) -> int:
    """Operations of one warp. HGMMA.64x128x16 is one instruction of each of the four warps that share it; mma.sync
    names its 16x8 tile and depth in one number. tcgen05 takes its shape from a descriptor register: unknown, 0."""
    if "GMMA" in opcode:
        shape = re.match(r"\.(\d+)x(\d+)x(\d+)", modifiers)
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) // 4 if shape else 0
    if opcode.startswith("U"):
        return 0
    shape = re.match(r"\.(?:SP\.)?(16|8)8(\d+)\b", modifiers) if opcode.endswith("MMA") else None
    return 2 * int(shape[1]) * 8 * int(shape[2]) if shape else 0


_AMD_LINE = re.compile(r"\t([a-z][a-z0-9_]+)(?:\s+([^;]*))?")
_AMD_LABEL = re.compile(r"(\.?L?BB\d+_\d+):")
_AMD_TARGET = re.compile(r"\.LBB\d+_\d+")
_AMD_SPECIAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")
_AMD_FMA = re.compile(r"v_(pk_)?(fma|fmac|mac|mad|mul|add|sub|subrev|fmaak|fmamk|dot2)\w*_(f32|f16|bf16|f64)")
_AMD_PREFIXES: tuple[tuple[str, str], ...] = (
    ("v_mfma", "matrix"), ("v_smfmac", "matrix"), ("v_wmma", "matrix"), ("v_cvt", "convert"),
    ("v_permlane", "shuffle"), ("v_readlane", "shuffle"), ("v_writelane", "shuffle"),
    ("ds_bpermute", "shuffle"), ("ds_permute", "shuffle"), ("ds_swizzle", "shuffle"), ("ds_read", "shared_load"),
    ("ds_load", "shared_load"), ("ds_write", "shared_store"), ("ds_store", "shared_store"), ("ds_", "atomic"),
    ("scratch_load", "local_load"), ("scratch_store", "local_store"), ("s_barrier", "barrier"), ("s_waitcnt", "wait"),
    ("s_wait", "wait"), ("s_nop", "other"), ("s_sleep", "wait"), ("s_cbranch", "branch"), ("s_branch", "branch"),
    ("s_endpgm", "branch"), ("s_setpc", "branch"), ("s_swappc", "branch"), ("s_", "uniform"), ("v_", "alu"),
)  # fmt: skip


def amdgcn_code(assembly: str) -> Code:
    """Read AMD assembly text as LLVM writes it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        label = _AMD_LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = _AMD_LINE.match(line)
        if found is None:
            continue
        opcode, operands = found[1], found[2] or ""
        instructions.append(
            Instruction(
                kind=amdgcn_class(opcode, operands),
                flops=_amd_flops(opcode),
                targets=tuple(_AMD_TARGET.findall(operands)) if "branch" in opcode else (),
                falls=opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
            )
        )
    return _code(instructions, labels)


def amdgcn_class(opcode: str, operands: str = "") -> str:
    """The class of an AMD instruction. `operands` tells loads into shared memory (a trailing `lds`) from others."""
    memory = re.match(r"(buffer|global|flat)_(load|store|atomic)", opcode)
    if memory:
        if memory[2] == "load" and (re.search(r"\blds\b", operands) or "_lds_" in opcode):
            return "async_copy"
        return {"load": "global_load", "store": "global_store", "atomic": "atomic"}[memory[2]]
    if opcode.startswith(_AMD_SPECIAL):
        return "special"
    if _AMD_FMA.match(opcode):
        return "fma"
    return next((kind for prefix, kind in _AMD_PREFIXES if opcode.startswith(prefix)), "other")


def _amd_flops(opcode: str) -> int:
    """Operations of one wave for `v_mfma_f32_32x32x8_bf16`, or with several blocks `v_mfma_f32_4x4x4_16b_f16`."""
    shape = re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", opcode)
    return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * int(shape[4] or 1) if shape else 0


def amdgcn_resources(assembly: str) -> tuple[int, int]:
    """Vector registers of a thread (with accumulation registers, which share the file) and scratch bytes of a
    thread."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    if registers is None or scratch is None:
        raise MachineError("the assembly of an AMD kernel names no register count")
    return int(registers[1]), int(scratch[1])


def _is_work(counts: Mapping[str, int]) -> bool:
    """Matrix instructions; or exponentials by the tile, which specialized warps do in a loop of their own; or the
    multiplications of a matrix product by the thread, as for fp32."""
    return counts.get("matrix", 0) > 0 or counts.get("special", 0) >= 16 or counts.get("fma", 0) >= 128


def _code(instructions: list[Instruction], labels: Mapping[str, int]) -> Code:
    loops = []
    for body in innermost_loops(instructions, labels, wanted=_is_work):
        counts = Counter(instructions[index].kind for index in body)
        loops.append(Loop(instructions=dict(counts), matrix_flops=sum(instructions[index].flops for index in body)))
    return Code(instructions=dict(Counter(one.kind for one in instructions)), loops=tuple(loops))


@functools.lru_cache(maxsize=64)
def _disassembly(cubin: bytes) -> str:
    # Without dataflow analysis the labels are the same and the tool is a third faster.
    return _run_tool("nvdisasm", ("-c", "-ndf"), cubin)


def _cuda_resources(cubin: bytes, name: str) -> tuple[int, int]:
    """Registers, and stack plus local bytes of a thread."""
    usage = _run_tool("cuobjdump", ("--dump-resource-usage",), cubin)
    found = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise MachineError(f"cuobjdump does not tell the registers of `{name}`; it said: {usage[:400]}")
    return int(found[1]), int(found[2]) + int(found[3])


def _cuda_warps(ptx: str, asked: int) -> int:
    """Warps that a launch must have: the kernel's own requirement, which counts those that specialization added."""
    found = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    return int(found[1]) // 32 if found else asked


def _is_specialized(asm: Mapping[str, Any], instructions: Mapping[str, int]) -> bool:
    total = re.search(r'"ttg\.total-num-warps" = (\d+)', asm.get("ttgir", ""))
    asked = re.search(r'"ttg\.num-warps" = (\d+)', asm.get("ttgir", ""))
    added = total is not None and asked is not None and int(total[1]) > int(asked[1])
    return added or instructions.get("setmaxreg", 0) > 0


def _text_bytes(elf: bytes) -> bytes:
    """The machine code: no debug lines, no file names."""
    sections = [section for section in ELFFile(io.BytesIO(elf)).iter_sections() if section.name.startswith(".text")]
    return b"".join(section.data() for section in sorted(sections, key=lambda section: section.name))


def _run_tool(name: str, options: tuple[str, ...], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run([tool_path(name), *options, file.name], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise MachineError(f"{name} refused a binary of Triton: {ran.stderr.strip()[:400]}")
    return ran.stdout


@functools.cache
def tool_path(name: str) -> str:
    """Where Triton's wheel keeps a CUDA binary tool. Raises `MachineError` if it is not there."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if bundled.is_file():
        return str(bundled)
    try:
        return str(getattr(triton.knobs.nvidia, name).path)
    except (AttributeError, RuntimeError):
        raise MachineError(
            f"cannot find `{name}`, which reads NVIDIA binaries; looked at {bundled}",
            hint="install Triton from its wheel, which brings the tool",
        ) from None
