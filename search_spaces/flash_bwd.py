"""What may vary in `kernels/flash_bwd.py`, when a combination is legal, and a safe config for every device.

The two launches that matter, `dkdv` and `dq`, have tunables of their own and share nothing but the GPU, or are made one.
A rule removes only what cannot be launched or cannot win. Figures come from compiling for sm_80, sm_89, sm_90, sm_100, gfx942.
"""

from harness.device import DeviceFacts
from harness.problem import DTYPE_BYTES, Problem
from harness.space import Apart, Config, Param, Rule, Space, matrix_knobs, matrix_rule, padded, power_of_two

# Shared memory of tiles of 16 rows of heads beyond 512 (seen on sm_80 and sm_89).
_WIDEST_BYTES = 112 << 10
# Below these sides a tile cannot be cut in a useful way, however short the sequence is.
_LEAST_QUERIES = 32
_LEAST_KEYS = 32

# Where both have a launch of their own, no tunable of the one changes anything for the other; the tiles of dq are dbias's too.
_APART = Apart(
    when={"structure": "separate"},
    kernels={"dkdv": ("flash_bwd_dkdv_kernel",), "dq": ("flash_bwd_dq_kernel", "flash_bwd_dbias_kernel")},
    tunables={
        launch: tuple(f"{launch}_{name}" for name in ("block_m", "block_n", "warps", "stages", "load"))
        for launch in ("dkdv", "dq")
    },
)


def space(problem: Problem, device: DeviceFacts) -> Space:
    """The tunables of the backward kernels for `problem` on `device`."""
    return Space(params=_params(problem, device), rules=_rules(problem, device), apart=_APART)


def default(problem: Problem, device: DeviceFacts) -> Config:
    """A config that spills nothing for head dims up to 256, in 16 bits 576, by arch, dtype and the wider one. Its tiles of keys
    do for atomic additions too, if a problem allows them."""
    dkdv, dq = _default_tiles(problem, device)
    longest_m = max(_LEAST_QUERIES, power_of_two(problem.q_len))
    longest_n = max(_LEAST_KEYS, power_of_two(problem.kv_len))
    wide = max(problem.head_dim, problem.v_head_dim) > 256
    load = "tma" if _tma_possible(problem, device) and DTYPE_BYTES[problem.dtype] == 2 and not wide else "pointer"
    return Config({
        "dkdv_block_m": min(dkdv[0], longest_m), "dkdv_block_n": min(dkdv[1], longest_n),
         "dkdv_warps": dkdv[2], "dkdv_stages": dkdv[3],
        "dkdv_load": "pointer" if _crowded(problem, device) else load,
        "dq_block_m": min(dq[0], longest_m), "dq_block_n": min(dq[1], longest_n),
         "dq_warps": dq[2], "dq_stages": dq[3], "dq_load": load,
        "waves_per_eu": 0, "structure": "separate", "mfma_side": 0, "kpack": 2 if wide and device.vendor != "cuda" else 1,
    })  # fmt: skip


def _params(problem: Problem, device: DeviceFacts) -> tuple[Param, ...]:
    cuda = device.vendor == "cuda"
    loads = ("pointer", "tma") if _tma_possible(problem, device) else ("pointer",)
    stages = (1, 2, 3) if cuda else (1, 2)
    blocks, warps = (16, 32, 64, 128), (4, 8)
    return (
        Param("dkdv_block_m", blocks, "more queries per step amortise softmax bookkeeping, for registers"),
        Param("dkdv_block_n", blocks, "more keys per program read each query less often, for registers"),
        Param("dkdv_warps", warps, "more warps share the two accumulators", interpreted=False),
        Param("dkdv_stages", stages, "more query blocks in flight hide latency, for shared memory", interpreted=False),
        Param("dkdv_load", loads, "descriptors spare address arithmetic, but may cost registers here"),
        Param("dq_block_m", blocks, "more queries per program read each key less often, for registers"),
        Param("dq_block_n", blocks, "more keys per step amortise softmax bookkeeping, for registers"),
        Param("dq_warps", warps, "more warps share the accumulator", interpreted=False),
        Param("dq_stages", stages, "more key blocks in flight hide latency, for shared memory", interpreted=False),
        Param("dq_load", loads, "descriptors spare address arithmetic"),
        Param("waves_per_eu", (0,) if cuda else (0, 1, 2), "fewer registers for more waves", interpreted=False),
        Param(
            "structure",
            ("separate", "fused", "atomic"),
            "one launch for both begins with queries where no tile of keys is left, with the registers of the hungrier; "
            "atomic additions of dq spare all that is computed twice, for traffic and for equal bits",
        ),
        *matrix_knobs(device.arch == "gfx942"),
    )


def _rules(problem: Problem, device: DeviceFacts) -> tuple[Rule, ...]:
    roomy = device.vendor != "cuda" or device.shared_bytes_per_block >= _WIDEST_BYTES
    longest_m = max(_LEAST_QUERIES, power_of_two(problem.q_len))
    longest_n = max(_LEAST_KEYS, power_of_two(problem.kv_len))
    wide, wide_v = padded(problem.head_dim), padded(problem.v_head_dim)

    def fits_length(config: Config) -> bool:
        queries = max(int(config["dkdv_block_m"]), int(config["dq_block_m"]))
        return queries <= longest_m and max(int(config["dkdv_block_n"]), int(config["dq_block_n"])) <= longest_n

    def square_enough(config: Config) -> bool:
        if not problem.banded:
            return True
        keeps_keys = int(config["dkdv_block_m"]) <= 4 * int(config["dkdv_block_n"])
        return keeps_keys and int(config["dq_block_n"]) <= 4 * int(config["dq_block_m"])

    def fits_shared(config: Config) -> bool:
        return all(
            _shared_bytes(problem, device, config, launch) <= device.shared_bytes_per_block for launch in ("dkdv", "dq")
        )

    def fits_registers(config: Config) -> bool:
        threads = int(config["dkdv_warps"]) * device.warp_size
        share = int(config["dkdv_block_m"]) * wide if config["structure"] == "atomic" else 0
        sums = (int(config["dkdv_block_n"]) * (wide + wide_v + int(config["dkdv_block_m"])) + share) // threads
        query_threads = int(config["dq_warps"]) * device.warp_size
        query_sums = int(config["dq_block_m"]) * (wide + int(config["dq_block_n"])) // query_threads
        return max(sums, query_sums) <= device.registers_per_thread

    def launched_together(config: Config) -> bool:
        return config["structure"] != "fused" or config["dkdv_warps"] == config["dq_warps"]

    def in_any_order(config: Config) -> bool:
        return config["structure"] != "atomic" or problem.nondeterministic

    def one_tile(config: Config) -> bool:
        if config["structure"] != "atomic":
            return True
        alike = all(config[f"dq_{name}"] == config[f"dkdv_{name}"] for name in ("block_m", "block_n", "warps"))
        return alike and config["dq_stages"] == 1 and config["dq_load"] == "pointer"

    return (
        Rule("tile_exceeds_length", "the tile would be mostly padding", fits_length),
        Rule("causal_tile_shape", "most of a tile this wide would lie outside the band", square_enough),
        Rule("shared_memory", "the blocks in flight do not fit a block's shared memory", fits_shared),
        Rule("registers", "scores and gradients alone need more registers than a thread has", fits_registers),
        Rule(
            "widest_heads",
            "of heads beyond 512, two tensors' smallest tiles take 112 KiB of shared memory, more than sm_86 and sm_89 have",
            lambda config: problem.head_dim <= 512 or roomy,
        ),
        matrix_rule(lambda config: max(int(config["dkdv_block_n"]), int(config["dq_block_m"]))),
        Rule("fused_warps", "programs of one launch have as many warps", launched_together),
        Rule(
            "atomic_order",
            "additions in any order give other bits in every run, which a problem must allow",
            in_any_order,
        ),
        Rule("atomic_tiles", "where shares of dq are added to memory, it has no tiles of its own to choose", one_tile),
    )


def _tma_possible(problem: Problem, device: DeviceFacts) -> bool:
    """Descriptors exist from sm_90 on and need whole 16 bytes per head, which every layout's strides are multiples of."""
    size = DTYPE_BYTES[problem.dtype]
    aligned = problem.head_dim * size % 16 == 0 and problem.v_head_dim * size % 16 == 0
    return device.compute_capability >= 90 and aligned and problem.q_len > 0 and problem.kv_len > 0


def _shared_bytes(problem: Problem, device: DeviceFacts, config: Config, launch: str) -> int:
    """Least shared memory of a block of `launch`: the blocks of the other side that are in flight."""
    size = DTYPE_BYTES[problem.dtype]
    wide, wide_v = padded(problem.head_dim), padded(problem.v_head_dim)
    kept, passing = ("n", "m") if launch == "dkdv" else ("m", "n")
    rows, block = int(config[f"{launch}_block_{kept}"]), int(config[f"{launch}_block_{passing}"])
    stages = int(config[f"{launch}_stages"])
    if device.vendor != "cuda" or stages == 1:
        return block * min(wide, wide_v) * size
    # Matrix instructions of a warp group read from shared memory while later blocks arrive; others copy to registers.
    grouped = device.compute_capability >= 90 and size == 2 and rows >= 64
    return (stages if grouped else stages - 1) * block * (wide + wide_v) * size


def _default_tiles(
    problem: Problem, device: DeviceFacts
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """(block_m, block_n, warps, stages) of dkdv and of dq."""
    widest = max(padded(problem.head_dim), padded(problem.v_head_dim))
    uneven = padded(problem.head_dim) != padded(problem.v_head_dim)
    if problem.dtype == "fp32":
        if widest <= 128:
            return (16, 32, 8, 1), (32, 16, 4 if widest <= 64 else 8, 1)
        if device.vendor != "cuda":
            return (16, 16, 4, 1), (16, 16, 4, 1)
        # ptxas aims at several blocks per multiprocessor and then spills a few bytes: what avoids it differs by arch.
        if uneven:
            return (16, 16, 8 if device.arch == "sm_90" else 4, 1), (16, 16, 8, 2 if device.arch == "sm_80" else 1)
        if device.compute_capability >= 100:
            return (16, 16, 8, 2), (16, 16, 4, 1)
        return (16, 16, 8, 1), (16, 16, 8, 1)
    if widest > 256:
        return _widest_tiles(problem, device)
    if device.vendor != "cuda":
        return ((32, 64, 4, 1), (64, 32, 4, 1)) if widest <= 128 else ((16, 32, 4, 1), (32, 16, 4, 1))
    if device.compute_capability >= 90:
        return _modern_tiles(problem, device)
    return _older_tiles(widest, uneven=uneven, shares=problem.nondeterministic)


def _widest_tiles(problem: Problem, device: DeviceFacts) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Of heads beyond 256 in 16 bits, whose sums fill the registers."""
    if device.vendor != "cuda":
        return (16, 16, 4, 1), (16, 16, 4, 1)
    if problem.head_dim <= 256:
        return (16, 32, 8, 1), (32, 16, 8, 1)
    return (16, 16, 8, 1), (16, 16, 8, 1 if problem.head_dim <= 512 else 2)


def _modern_tiles(problem: Problem, device: DeviceFacts) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """From sm_90 on, up to 256 in 16 bits."""
    widest = max(padded(problem.head_dim), padded(problem.v_head_dim))
    newest = device.compute_capability >= 100
    if widest <= 64:
        return (64, 128, 8, 2), (128, 64, 8, 2)
    if widest <= 128:
        # The random numbers of dropout take registers, and so do shares of dq, also of tensor memory.
        keys = 64 if problem.nondeterministic or (problem.dropout and not newest) else 128
        tall = newest or (problem.nondeterministic and not problem.dropout)
        return (64 if tall else 32, keys, 8, 2), (128, 64, 8, 2)
    if _crowded(problem, device):
        return (32, 16 if problem.dropout and problem.nondeterministic else 32, 8, 2), (64, 32, 8, 2)
    if padded(problem.head_dim) != padded(problem.v_head_dim):
        return (32, 64, 8, 2), (64, 32, 8, 2)
    return (32, 64, 8, 1) if newest else (16, 64, 8, 2), (64, 32, 8, 2)


def _crowded(problem: Problem, device: DeviceFacts) -> bool:
    """Whether random numbers or shares of dq take the registers of wide heads on sm_90, where warps then multiply one by one."""
    wide = 128 < max(padded(problem.head_dim), padded(problem.v_head_dim)) <= 256 and DTYPE_BYTES[problem.dtype] == 2
    return wide and device.compute_capability == 90 and (problem.dropout > 0 or problem.nondeterministic)


def _older_tiles(
    widest: int, *, uneven: bool, shares: bool
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    if widest <= 64:
        return (32, 64 if shares else 128, 8, 2), (128, 32, 8, 2)
    return ((32, 64, 8, 2), (64, 32, 8, 2)) if widest <= 128 else ((32, 64 if uneven else 32, 8, 1), (64, 16, 8, 1))
