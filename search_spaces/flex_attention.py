"""What may vary in `kernels/flex_attention.py`: `kernel_options` of PyTorch's FlexAttention, and the blocks of its BlockMask.

Nothing that changes numbers is in the space: neither PRESCALE_QK, which rounds queries once more, nor ROWS_GUARANTEED_SAFE. No
option of a run on a CPU has any effect, so nothing here is `interpreted`.
"""

from harness.device import DeviceFacts
from harness.problem import DTYPE_BYTES, Problem
from harness.space import Config, Param, Rule, Space, Value, padded, power_of_two

# With fewer queries PyTorch takes another kernel, whose options are others.
LEAST_QUERIES = 128
LEAST_SIDE = 16
_WORD = "FlexAttention"


def space(problem: Problem, device: DeviceFacts) -> Space:
    """The options of the forward template for `problem` on `device`."""
    tma = (False, True) if tma_possible(problem, device) else (False,)
    warps = (4, 8) if problem.head_dim > 64 else (2, 4, 8)
    stages = (1, 2, 3, 4, 5) if device.vendor == "cuda" else (1, 2)
    return Space(
        params=(
            hidden(
                "block_m", (16, 32, 64, 128, 256), "more queries per program read each key less often, for registers"
            ),
            hidden("block_n", (16, 32, 64, 128, 256), "more keys per step amortise bookkeeping, for shared memory"),
            hidden("num_warps", warps, "more warps share the accumulator"),
            hidden("num_stages", stages, "more key blocks in flight hide latency, for shared memory"),
            hidden("use_tma", tma, "descriptors spare address arithmetic"),
            hidden("sparse", sparse_sides(problem, (64, 128, 256)), "smaller blocks of the mask hide more keys"),
        ),
        rules=_rules(problem, device),
    )


def hidden(name: str, values: tuple[Value, ...], why: str) -> Param:
    """A tunable that no run on a CPU shows."""
    return Param(name, values, why, interpreted=False)


def default(problem: Problem, device: DeviceFacts) -> Config:
    """Tiles near those that PyTorch chooses itself, which compile without spills for sm_80 and sm_90."""
    wide = max(padded(problem.head_dim), padded(problem.v_head_dim))
    if problem.dtype == "fp32":
        block_m, block_n, warps = {64: (32, 32, 4), 128: (32, 32, 8)}.get(max(wide, 64), (16, 16, 8))
    elif device.vendor != "cuda":
        block_m, block_n, warps = (64, 32, 4) if wide <= 128 else (32, 16, 4)
    elif device.compute_capability >= 90:
        block_m, block_n, warps = {64: (128, 128, 4), 128: (128, 64, 8)}.get(max(wide, 64), (64, 32, 4))
    else:
        block_m, block_n, warps = (64, 64, 4) if wide <= 128 else (64, 16, 4)
    return Config({
        "block_m": min(block_m, longest(problem.q_len)), "block_n": min(block_n, longest(problem.kv_len)), "num_warps": warps,
        "num_stages": 3 if device.compute_capability >= 80 and problem.dtype != "fp32" and wide <= 128 else 1, "use_tma": False,
        "sparse": sparse_sides(problem, (128,))[0],
    })  # fmt: skip


def _rules(problem: Problem, device: DeviceFacts) -> tuple[Rule, ...]:
    wide, wide_v = padded(problem.head_dim), padded(problem.v_head_dim)

    def fits_length(config: Config) -> bool:
        return int(config["block_m"]) <= longest(problem.q_len) and int(config["block_n"]) <= longest(problem.kv_len)

    def divides(config: Config) -> bool:
        sparse = int(config["sparse"])
        return not sparse or (sparse % int(config["block_m"]) == 0 and sparse % int(config["block_n"]) == 0)

    def ends_with_tiles(config: Config) -> bool:
        if problem.q_len % LEAST_QUERIES or problem.kv_len % LEAST_QUERIES:
            return True
        return problem.q_len % int(config["block_m"]) == 0 and problem.kv_len % int(config["block_n"]) == 0

    def fits_shared(config: Config) -> bool:
        size = DTYPE_BYTES[problem.dtype]
        flying = max(int(config["num_stages"]) - 1, 1) * int(config["block_n"]) * (wide + wide_v) * size
        return device.vendor != "cuda" or flying <= device.shared_bytes_per_block

    def fits_registers(config: Config) -> bool:
        threads = int(config["num_warps"]) * device.warp_size
        sums = int(config["block_m"]) * (wide_v + int(config["block_n"])) // threads
        return sums <= device.registers_per_thread

    def enough_rows(config: Config) -> bool:
        return problem.dtype == "fp32" or int(config["num_warps"]) * 16 <= 4 * int(config["block_m"])

    return (
        *shared_rules(problem),
        Rule("tile_exceeds_length", "the tile would be mostly padding", fits_length),
        Rule("sparse_blocks", f"tiles must divide the blocks of the BlockMask, or {_WORD} refuses them", divides),
        Rule(
            "unchecked_ends",
            f"where 128 divides the lengths, {_WORD} does not look whether a tile ends behind them",
            ends_with_tiles,
        ),
        Rule("rows_per_warp", "more warps than rows of matrix instructions share nothing", enough_rows),
        Rule("shared_memory", "the blocks in flight do not fit a block's shared memory", fits_shared),
        Rule("registers", "scores and sums alone need more registers than a thread has", fits_registers),
    )


def shared_rules(problem: Problem) -> tuple[Rule, ...]:
    """What neither pass takes, by the problem alone."""
    narrow = min(problem.head_dim, problem.v_head_dim) < LEAST_SIDE
    return (
        Rule("head_dim", f"{_WORD} has no kernel for heads narrower than {LEAST_SIDE}", lambda config: not narrow),
        Rule(
            "decoding",
            f"below {LEAST_QUERIES} queries {_WORD} is another kernel, with other options",
            lambda config: problem.q_len >= LEAST_QUERIES or problem.pass_ == "bwd",
        ),
    )


def masked(problem: Problem) -> bool:
    """Whether the problem needs a BlockMask."""
    return problem.banded or problem.freely_masked


def sparse_sides(problem: Problem, sides: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of blocks of a BlockMask that a problem may have: 0 is none."""
    return sides if masked(problem) else (0,)


def longest(length: int) -> int:
    """The longest side of a tile for a length."""
    return max(2 * LEAST_SIDE, power_of_two(length))


def tma_possible(problem: Problem, device: DeviceFacts) -> bool:
    """Descriptors exist from sm_90 on and need whole 16 bytes per head."""
    size = DTYPE_BYTES[problem.dtype]
    return device.compute_capability >= 90 and problem.head_dim * size % 16 == 0 and problem.v_head_dim * size % 16 == 0
