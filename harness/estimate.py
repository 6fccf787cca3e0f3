"""Predicts the time of a candidate from its machine code and the published figures of a GPU. Model `pipes-1`.

Refuses to measure, to look at a kernel's source or config, and to call its number a time: it is an estimate.

What it uses. From each binary: registers, shared memory and warps (how many blocks share a multiprocessor), the
instructions of one iteration of each working loop by class, and those outside loops. From each launch: the grid and the
steps of every program. From the device: rates per clock. Nothing else, so it works for any kernel that keeps the
contract.

How. One iteration makes demands on pipes: matrix units, special functions, fp32 units, integer units, shared memory,
and issue slots. Matrix units and the shared memory that feeds them run in step, at the pace of the slower: a product.
The vector pipes (special, fp32, integer) of the blocks that share a multiprocessor overlap as `hidden` says, by the
warps of a scheduler; products, vector work and waiting overlap likewise, by the streams that are independent of each
other: blocks for wgmma and tcgen05 (a barrier in each step keeps the warps of a block together), consumer groups where
warps are specialized, sets of four warps for mma.sync and mfma. Loads from memory that are not issued ahead, or not far
enough ahead, expose their latency, and spills theirs. Cache and memory bandwidth bound the result from below. Programs
are then placed in launch order, each on the first free slot, so waves, tails and the imbalance of a causal mask appear.
Launches add up.

What it does not see: bank conflicts; misses in L2 beyond the least traffic (hence no effect of the order of heads);
clocks that sink under power limits beyond the constant below; the order of instructions, so neither stalls between
dependent ones nor how well a compiler interleaves products and softmax; the width of single loads; how deep a masked
loop prefetches; contention of atomics; unrolling (an iteration is taken for one step, more matrix work in it for
redundant work). Fit for ranking configs that differ much; two within a few per cent of each other are equal to it.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.device import DeviceFacts
from harness.outcome import Artifact, Binary, Estimate, Loop
from harness.problem import DTYPE_BYTES, Problem
from harness.prune import blocks_per_multiprocessor

MODEL = "pipes-1"

# ---- Constants. "Physical" ones are published or measured by others, "chosen" ones are round numbers. Nothing was
# fitted by a program, but these were settled with published attention figures in view (plain Triton on H100 and A100):
# the value for sm_90 within its reported range, DEPENDENCE, SHUFFLE_CLOCKS, LOADS_IN_TURN, and that products and their
# loads run in step.

# Physical: share of the published matrix rate that large matrix products really reach under power limits: 650 to 790 of
# 989 reported on H100 and H200. Of the others (275 of 312 on A100, 160 of 165 on RTX 4090, 1650 of 2250 on B200, 750 of
# 1307 on MI300X) no source was checked: good to about a tenth.
MATRIX_SUSTAINED: Mapping[str, float] = {"sm_80": 0.88, "sm_89": 0.95, "sm_90": 0.75, "sm_100": 0.74, "gfx942": 0.57}
# Chosen for architectures that nobody described above.
MATRIX_SUSTAINED_ELSEWHERE = 0.8
# Physical: mma.sync on Hopper reaches about 63 % of wgmma (Luo et al. 2024, "Benchmarking and Dissecting the Nvidia
# Hopper GPU Architecture via Microbenchmarking", table of tensor core throughput).
HOPPER_MMA_SYNC = 0.63
# Physical: an mma.sync instruction of one warp does at most 16x8x16 products; wgmma of 16 columns already does twice
# that.
MMA_SYNC_FLOPS = 4096
# Physical: integer, logic, compare and convert lanes of a multiprocessor (CUDA programming guide, throughput table;
# CDNA 3 has 64 lanes for all of these).
INTEGER_LANES = 64
# Physical: lanes of a shuffle in a clock (same table).
SHUFFLE_LANES = 32
# Physical: bytes of shared memory in a clock.
SHARED_BYTES_PER_CLOCK = 128
# Chosen: bytes of one lane of a load or copy; Triton vectorises tiles to 128 bits wherever alignment allows.
LANE_BYTES = 16
# Chosen: clocks that a warp stands still for one spill access: latency of L1 about 33, four in flight.
SPILL_CLOCKS = 8.0
# Physical: clocks of a warp's access to 32 columns of tensor memory, which gives 2 KiB in a clock.
TENSOR_MEMORY_CLOCKS = 2.0
# Physical: issue slots of a multiprocessor in a clock: one per scheduler on NVIDIA, one vector instruction on CDNA.
ISSUE_SLOTS: Mapping[str, int] = {"cuda": 4, "hip": 1}
# Physical: L2 bytes in a clock for each multiprocessor when all read: 5.5 to 7 TB/s are measured on H100.
CACHE_BYTES_PER_CLOCK = 28.0
# Physical: share of the published memory bandwidth that streaming kernels reach.
MEMORY_SUSTAINED = 0.9
# Physical: clocks from asking for a tile to having it, from L2 or memory (about 270 and 800 on Hopper); chosen in
# between.
MEMORY_LATENCY = 600.0
# Chosen: clocks that a stream stands still at a wait for matrix units or copies (AMD code waits in many small
# portions), at a barrier, and for a shuffle (latency about 25, two or three in flight).
WAIT_CLOCKS: Mapping[str, float] = {"cuda": 30.0, "hip": 10.0}
BARRIER_CLOCKS = 20.0
SHUFFLE_CLOCKS = 10.0
# Chosen: share of its vector work that a warp alone on its scheduler stands behind dependent instructions (latencies of
# 4 to 6 clocks, 20 and more for special functions); two warps fill half of each other's gaps, and so on.
DEPENDENCE = 0.5
# Chosen: loads that a step without prefetch waits for one after the other: the tile of each of its two products.
LOADS_IN_TURN = 2.0
# Chosen: clocks to start a program, fetch its first tiles and drain its last stores.
PROGRAM_CLOCKS = 1500.0
# Physical: what a launch costs on the device beside its work.
LAUNCH_MS = 0.003
# Numerical: beyond this many programs, all but the last are assumed to be spread evenly.
PLACED_PROGRAMS = 8192

_COPIES = ("global_load", "async_copy")


@dataclass(frozen=True, slots=True)
class _Demand:
    """Clocks of a multiprocessor's pipes that one block needs, for one step or for the code outside loops."""

    matrix: float = 0.0
    special: float = 0.0
    fma: float = 0.0
    alu: float = 0.0
    shared: float = 0.0
    issue: float = 0.0
    waiting: float = 0.0
    cache_bytes: float = 0.0
    ahead: bool = False

    def vector(self, blocks: int, streams: float) -> float:
        return blocks * max(hidden((self.special, self.fma, self.alu), streams), self.issue)

    @property
    def product(self) -> float:
        """Loads of operands run ahead of the products that they feed: the slower of the two counts."""
        return max(self.matrix, self.shared)


@dataclass(frozen=True, slots=True)
class _Resident:
    """How a launch occupies a multiprocessor: blocks at once, warps of a block at work, independent streams."""

    blocks: int
    warps: int
    streams: float
    slots: int

    @property
    def warps_per_scheduler(self) -> float:
        return self.blocks * self.warps / 4


def estimate(problem: Problem, launches: Sequence[Any], artifact: Artifact, device: DeviceFacts) -> Estimate:
    """Predicted milliseconds of all launches one after the other.

    `launches` are `kernels.launch.Launch` in the order of `artifact.binaries`. `terms` are milliseconds too: what each
    pipe would need alone (`matrix`, `special`, `fma`, `alu`, `shared`, `issue`), and of the result, `waiting` that was
    not hidden, `programs` (starting and ending them), `tail` (slots that stood empty), `launch`; `dram` is the least
    time for the traffic. Raises `ValueError` if launches and binaries do not belong together.
    """
    terms: dict[str, float] = {}
    each: dict[str, float] = {}
    total = 0.0
    for launch, binary in zip(launches, artifact.binaries, strict=True):
        value, parts = _launch_ms(problem, launch, binary, device)
        total += value
        each[binary.kernel] = each.get(binary.kernel, 0.0) + value
        for name, part in parts.items():
            terms[name] = terms.get(name, 0.0) + part
    terms["dram"] = problem.least_bytes / (device.memory_gb_per_s * MEMORY_SUSTAINED * 1e6)
    value = max(total, terms["dram"] + terms.get("launch", 0.0), LAUNCH_MS)
    return Estimate(value_ms=value, terms=terms, model=MODEL, launches_ms=each if len(each) > 1 else {})


def hidden(parts: Sequence[float], streams: float) -> float:
    """Time of `parts` when `streams` independent instruction streams share the pipes: the longest, plus what is not
    hidden.

    One stream does one thing after the other, the sum; very many keep the busiest pipe full, the maximum.
    """
    longest = max(parts)
    return longest + (sum(parts) - longest) / max(streams, 1.0)


def makespan(durations: Sequence[float], repeats: int, slots: int) -> float:
    """End of the last program when programs take the first free slot in order: `durations`, over and over, `repeats`
    times.

    Of very many programs only the last `PLACED_PROGRAMS` are placed; those before fill all slots evenly.
    """
    if not durations or repeats <= 0:
        return 0.0
    if min(durations) == max(durations):
        return -(-len(durations) * repeats // slots) * durations[0]
    placed = min(repeats, max(1, PLACED_PROGRAMS // len(durations)))
    free = [0.0] * min(slots, len(durations) * placed)
    for _ in range(placed):
        for duration in durations:
            heapq.heapreplace(free, free[0] + duration)
    return max(free) + (repeats - placed) * sum(durations) / slots


def _launch_ms(problem: Problem, launch: Any, binary: Binary, device: DeviceFacts) -> tuple[float, Mapping[str, float]]:
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    if programs == 0:
        return 0.0, {}
    per_ms = device.clock_mhz * 1e3
    resident = _residence(binary, device, programs)
    outside = _outside(binary, resident, problem, device)
    each = outside.vector(resident.blocks, resident.warps_per_scheduler) + outside.product
    fixed = PROGRAM_CLOCKS + each
    steps = launch.steps
    if steps is None or not any((*steps.plain, *steps.masked)):
        waves = -(-programs // resident.slots) * fixed / per_ms
        moved = _argument_bytes(launch) / (device.memory_gb_per_s * MEMORY_SUSTAINED * 1e6)
        return max(waves, moved) + LAUNCH_MS, {"programs": max(waves, moved), "launch": LAUNCH_MS}
    repeats = launch.grid[1] * launch.grid[2]
    # A program that makes several tiles starts and ends once, and does what is outside loops for each.
    tiles = steps.tiles or (1,) * len(steps.plain)
    rows = steps.rows or _rows_of_program(problem, sum(tiles) * repeats)
    plain, masked = (_step(loops, launch, resident, problem, device, rows) for loops in _loops_by_kind(binary, launch))
    stages = int(launch.options.get("num_stages", 2))
    plain_clocks, masked_clocks = (_clocks(demand, resident, stages) for demand in (plain, masked))
    durations = [
        free * plain_clocks + bound * masked_clocks + made * each + PROGRAM_CLOCKS
        for free, bound, made in zip(steps.plain, steps.masked, tiles, strict=True)
    ]
    busy = sum(durations) * repeats / resident.slots
    span = makespan(durations, repeats, resident.slots)
    counts = (sum(steps.plain) * repeats, sum(steps.masked) * repeats)
    terms = _pipe_terms(counts, (plain, masked), device)
    terms |= {
        "programs": (PROGRAM_CLOCKS * programs + each * sum(tiles) * repeats) / resident.slots / per_ms,
        "waiting": sum(
            count * demand.waiting / resident.streams / device.multiprocessors / per_ms
            for count, demand in zip(counts, (plain, masked), strict=True)
        ),
        "tail": (span - busy) / per_ms,
        "launch": LAUNCH_MS,
    }
    return span / per_ms + LAUNCH_MS, terms


def _pipe_terms(counts: tuple[int, int], demands: tuple[_Demand, _Demand], device: DeviceFacts) -> dict[str, float]:
    """Milliseconds that each pipe would need alone, spread over all multiprocessors."""
    per_ms = device.clock_mhz * 1e3 * device.multiprocessors
    names = ("matrix", "special", "fma", "alu", "shared", "issue")
    return {
        name: sum(count * getattr(demand, name) for count, demand in zip(counts, demands, strict=True)) / per_ms
        for name in names
    }


def _residence(binary: Binary, device: DeviceFacts, programs: int) -> _Resident:
    # With fewer programs than multiprocessors nobody shares; a block that does not fit at all is for `prune` to refuse.
    fitting = max(1, blocks_per_multiprocessor(binary, device))
    blocks = min(fitting, -(-programs // device.multiprocessors))
    working = [loop for loop in binary.loops if loop.instructions.get("special", 0) or not binary.specialized]
    if binary.specialized:
        warps = 4 * max(1, len(working))
        streams = float(blocks * max(1, len(working)))
    else:
        warps = binary.warps
        streams = float(blocks) if _is_asynchronous(binary, device) else blocks * max(1.0, warps / 4)
    return _Resident(blocks, warps, streams, blocks * device.multiprocessors)


def _is_asynchronous(binary: Binary, device: DeviceFacts) -> bool:
    """Whether matrix instructions run beside the warps (wgmma, tcgen05), by whole warp groups."""
    if device.compute_capability >= 100:
        return any(loop.instructions.get("matrix") for loop in binary.loops)
    return device.compute_capability == 90 and any(_flops_each(loop) > MMA_SYNC_FLOPS for loop in binary.loops)


def _flops_each(loop: Loop) -> float:
    return loop.matrix_flops / max(1, loop.instructions.get("matrix", 0))


def _loops_by_kind(binary: Binary, launch: Any) -> tuple[tuple[Loop, ...], tuple[Loop, ...]]:
    """The loops that one plain and one masked step run through.

    Specialized warps run all loops at the same time. Else the first loop does plain steps and the second masked ones;
    of one loop, both, unless the compiler unrolled the masked ones, which then are outside loops and part of every
    program.
    """
    loops = binary.loops
    if binary.specialized or not loops:
        return loops, loops
    if len(loops) > 1:
        return loops[:1], loops[1:2]
    outside = binary.instructions.get("matrix", 0) - loops[0].instructions.get("matrix", 0)
    unrolled = any(launch.steps.plain) and 2 * outside >= loops[0].instructions.get("matrix", 0) > 0
    return loops, (() if unrolled else loops)


def _step(
    loops: tuple[Loop, ...], launch: Any, resident: _Resident, problem: Problem, device: DeviceFacts, rows: float
) -> _Demand:
    """What one block needs for one step of its `loops`, an iteration of a loop being one step."""
    if not loops:
        return _Demand()
    warps = 4 if len(loops) > 1 else resident.warps
    counts: dict[str, float] = {}
    for loop in loops:
        for kind, number in loop.instructions.items():
            counts[kind] = counts.get(kind, 0.0) + number * warps
    # More operations than a step has by its tiles are done more than once, by warps that the tile has no rows for.
    known = sum(loop.matrix_flops for loop in loops) * warps
    flops = known or (launch.steps.flops_per_step if counts.get("matrix") else 0)
    demand = _demand(counts, flops, problem, device)
    copied = sum(counts.get(kind, 0.0) for kind in _COPIES) * device.warp_size * LANE_BYTES
    # A bulk copy does not say its size; the other operand of a product with `rows` rows has this many bytes.
    bulk = launch.steps.flops_per_step * DTYPE_BYTES[problem.dtype] / (2 * rows)
    # AMD code prefetches into registers, by plain loads.
    stages = int(launch.options.get("num_stages", 2))
    ahead = bool(counts.get("async_copy") or counts.get("tma") or (device.vendor == "hip" and stages > 1))
    waits_for_memory = counts.get("global_load", 0) > 0 and not ahead
    # Waits are per warp and at the same time in all warps of a block, so they do not add up over warps.
    steps_together = sum(_waiting(loop.instructions, device.vendor) for loop in loops) / len(loops)
    vector = demand.vector(1, resident.warps_per_scheduler)
    return _Demand(
        matrix=demand.matrix, special=demand.special, fma=demand.fma, alu=demand.alu, shared=demand.shared,
        issue=demand.issue, cache_bytes=max(copied, bulk if resident.warps and not copied else 0.0), ahead=ahead,
        waiting=steps_together + DEPENDENCE * vector / max(1.0, resident.warps / 4)
        + (LOADS_IN_TURN * MEMORY_LATENCY if waits_for_memory else 0.0),
    )  # fmt: skip


def _waiting(counts: Mapping[str, int], vendor: str) -> float:
    return (
        WAIT_CLOCKS[vendor] * counts.get("wait", 0)
        + BARRIER_CLOCKS * counts.get("barrier", 0)
        + SHUFFLE_CLOCKS * counts.get("shuffle", 0)
        + SPILL_CLOCKS * (counts.get("local_load", 0) + counts.get("local_store", 0))
    )


def _demand(counts: Mapping[str, float], flops: float, problem: Problem, device: DeviceFacts) -> _Demand:
    """Pipe clocks of `counts` warp instructions (of all warps together) with `flops` matrix operations."""
    lanes = device.warp_size
    moves = lanes * LANE_BYTES / SHARED_BYTES_PER_CLOCK
    touches = counts.get("shared_load", 0) + counts.get("shared_store", 0) + counts.get("async_copy", 0)
    scalar = ("uniform", "branch", "wait", "other") if device.vendor == "hip" else ()
    issued = sum(number for kind, number in counts.items() if kind not in scalar)
    return _Demand(
        matrix=_matrix_clocks(counts.get("matrix", 0), flops, problem, device),
        special=counts.get("special", 0) * lanes / device.special_per_clock,
        fma=counts.get("fma", 0) * lanes / device.fma_per_clock,
        alu=(counts.get("alu", 0) + counts.get("convert", 0)) * lanes / INTEGER_LANES
        + counts.get("shuffle", 0) * lanes / SHUFFLE_LANES,
        shared=touches * moves + counts.get("tensor_memory", 0) * TENSOR_MEMORY_CLOCKS,
        issue=issued / ISSUE_SLOTS[device.vendor],
    )


def _matrix_clocks(instructions: float, flops: float, problem: Problem, device: DeviceFacts) -> float:
    """Clocks of the matrix units of one multiprocessor, at the rate that is sustained."""
    if not instructions or not flops:
        return 0.0
    kind = "tf32" if problem.dtype == "fp32" else "fp8" if problem.eight_bits else problem.dtype
    peak = device.matrix_tflops[kind] * 1e6 / (device.multiprocessors * device.clock_mhz)
    rate = peak * MATRIX_SUSTAINED.get(device.arch, MATRIX_SUSTAINED_ELSEWHERE)
    if device.compute_capability != 90:
        return flops / rate
    each = flops / instructions
    if each <= MMA_SYNC_FLOPS:
        return flops / (rate * HOPPER_MMA_SYNC)
    # wgmma reads its columns (32 bytes each) from shared memory for every group of four warps, and its 64 rows too
    # (unless they are in registers, which a count does not tell): products with few columns are bound by that.
    columns = each / 512
    groups = instructions / 4
    return max(flops / rate, groups * (columns + 64) * 32 / SHARED_BYTES_PER_CLOCK)


def _clocks(demand: _Demand, resident: _Resident, stages: int) -> float:
    """Clocks in which every block of a multiprocessor makes one step."""
    blocks = resident.blocks
    product, vector = blocks * demand.product, demand.vector(blocks, 1 + resident.warps_per_scheduler)
    clocks = hidden((product, vector), resident.streams) + demand.waiting / resident.streams
    if demand.ahead:
        clocks += max(0.0, MEMORY_LATENCY - (stages - 1) * clocks) / resident.streams
    return max(clocks, blocks * demand.cache_bytes / CACHE_BYTES_PER_CLOCK)


def _outside(binary: Binary, resident: _Resident, problem: Problem, device: DeviceFacts) -> _Demand:
    """What one program needs for the code outside working loops, each instruction of it once."""
    inside: dict[str, int] = {}
    for loop in binary.loops:
        for kind, number in loop.instructions.items():
            inside[kind] = inside.get(kind, 0) + number
    warps = 4 if binary.specialized else resident.warps
    counts = {kind: max(0, number - inside.get(kind, 0)) * warps for kind, number in binary.instructions.items()}
    each = max((_flops_each(loop) for loop in binary.loops), default=0.0)
    return _demand(counts, counts.get("matrix", 0) * each, problem, device)


def _rows_of_program(problem: Problem, programs: int) -> float:
    queries = problem.batch * problem.q_heads * problem.q_len
    keys = problem.batch * problem.kv_heads * problem.kv_len
    return min(max(max(queries, keys) / programs, 16.0), 256.0)


def _argument_bytes(launch: Any) -> int:
    tensors = [value for value in launch.args.values() if hasattr(value, "element_size")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
