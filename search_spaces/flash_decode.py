"""What may vary in `kernels/flash_decode.py`, when a combination is legal, and a safe config for every device.

A rule removes only what cannot be launched or cannot win; whether a config that is left is good is the tuner's business.
Figures come from compiling the kernel for sm_80, sm_89, sm_90, sm_100 and gfx942 and reading the binaries.
"""

from harness.device import DeviceFacts
from harness.problem import DTYPE_BYTES, Problem
from harness.space import Config, Param, Rule, Space, padded, power_of_two

# Below these sides a tile cannot be cut in a useful way, however few rows or keys there are.
_LEAST_ROWS = 16
_LEAST_KEYS = 32
# The smallest side of a tile of keys.
_LEAST_BLOCK = 16
_SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
# Partial results are written and read once, so that more of them than this cost more than a pass over everything they save.
_MOST_SCRATCH = 8


def space(problem: Problem, device: DeviceFacts) -> Space:
    """The tunables of the decoding kernel for `problem` on `device`."""
    return Space(params=_params(problem, device), rules=_rules(problem, device))


def default(problem: Problem, device: DeviceFacts) -> Config:
    """A config that compiles without spills for any head dim up to 576, with enough splits for every multiprocessor."""
    block_m, block_n, warps, stages = _default_tile(problem, device)
    block_m = min(block_m, _most_rows(problem))
    block_n = min(block_n, max(_LEAST_KEYS, power_of_two(problem.kv_len)))
    programs = problem.batch * problem.kv_heads * -(-problem.q_len * problem.group // block_m)
    # Columns that only pad a tile cost pointers a mask, and a descriptor nothing; setting one up costs every program some time.
    load = "tma" if _default_tma(problem, device) else "pointer"
    wanted = -(-device.multiprocessors // max(programs, 1))
    return Config({
        "block_m": block_m, "block_n": block_n, "num_splits": _allowed_splits(problem, block_n, wanted),
        "num_warps": warps, "num_stages": stages, "load": load,
        "loops": "single" if problem.window_left is not None else "split", "waves_per_eu": 0,
    })  # fmt: skip


def _params(problem: Problem, device: DeviceFacts) -> tuple[Param, ...]:
    cuda = device.vendor == "cuda"
    return (
        Param("block_m", (16, 32, 64, 128), "more queries of a group per program read its keys less often, for registers"),
        Param("block_n", (16, 32, 64, 128, 256), "more keys per step amortise softmax bookkeeping, for shared memory"),
        Param("num_splits", _SPLITS, "more parts of the keys occupy more multiprocessors, for more to merge"),
        Param("num_warps", (1, 2, 4, 8), "more warps have more loads in flight, and share few rows", interpreted=False),
        Param(
            "num_stages", (1, 2, 3, 4, 5) if cuda else (1, 2), "more key blocks in flight hide latency, for shared memory",
            interpreted=False,
        ),
        Param(
            "load", ("pointer", "tma") if _tma_possible(problem, device) else ("pointer",),
            "descriptors spare registers and address arithmetic",
        ),
        Param("loops", _loops(problem), "one masked loop is less code than two, of which the second is short"),
        Param("waves_per_eu", (0,) if cuda else (0, 1, 2, 3), "fewer registers for more waves", interpreted=False),
    )  # fmt: skip


def _rules(problem: Problem, device: DeviceFacts) -> tuple[Rule, ...]:
    most_rows = _most_rows(problem)
    most_keys = max(_LEAST_KEYS, power_of_two(problem.kv_len))

    def fits_length(config: Config) -> bool:
        return int(config["block_m"]) <= most_rows and int(config["block_n"]) <= most_keys

    def enough_rows(config: Config) -> bool:
        # Matrix instructions work on 16 rows; plain multiply-add, which fp32 takes, shares out columns as well, and so do
        # matrix instructions whose result is very wide.
        shared = problem.dtype == "fp32" or padded(problem.v_head_dim) > 256
        return shared or int(config["num_warps"]) * 16 <= 4 * int(config["block_m"])

    def enough_blocks(config: Config) -> bool:
        return int(config["num_splits"]) <= max(1, _key_blocks(problem, int(config["block_n"])))

    def worth_merging(config: Config) -> bool:
        return int(config["num_splits"]) <= max(1, _mergeable_splits(problem))

    def whole_blocks(config: Config) -> bool:
        if problem.paged is None or config["load"] == "pointer":
            return True
        return problem.paged % int(config["block_n"]) == 0 and config["loops"] == "split"

    def fits_shared(config: Config) -> bool:
        return _shared_bytes(problem, device, config) <= device.shared_bytes_per_block

    def fits_registers(config: Config) -> bool:
        tile = int(config["block_m"]) * (int(config["block_n"]) + padded(problem.v_head_dim))
        return tile // (int(config["num_warps"]) * device.warp_size) <= device.registers_per_thread

    return (
        Rule("tile_exceeds_length", "the tile would be mostly padding", fits_length),
        Rule("warps_per_tile", "more than four warps would share 16 rows of a result that is not wide", enough_rows),
        Rule("splits_exceed_blocks", "a split behind the last key block would have nothing to do", enough_blocks),
        Rule(
            "scratch_memory", "partial results would take eight times the memory of inputs and outputs", worth_merging
        ),
        Rule("shared_memory", "queries and the key blocks in flight do not fit a block's shared memory", fits_shared),
        Rule(
            "descriptor_pages", "a descriptor would read beyond a page, or behind the end of a sequence", whole_blocks
        ),
        Rule("registers", "scores and output alone need more registers than a thread has", fits_registers),
    )


def _most_rows(problem: Problem) -> int:
    return max(_LEAST_ROWS, power_of_two(problem.q_len * problem.group))


def _loops(problem: Problem) -> tuple[str, ...]:
    # With a left window every block is masked; with no mask at all none is.
    if problem.window_left is not None:
        return ("single",)
    ragged = problem.kv_len % 256 or problem.paged is not None
    return ("split", "single") if problem.right is not None or ragged else ("split",)


def _tma_possible(problem: Problem, device: DeviceFacts) -> bool:
    """Descriptors exist from sm_90 on and need whole 16 bytes per head, which every layout's strides are multiples of."""
    size = DTYPE_BYTES[problem.dtype]
    aligned = problem.head_dim * size % 16 == 0 and problem.v_head_dim * size % 16 == 0
    if problem.paged is not None and (problem.paged % _LEAST_BLOCK or problem.window_left is not None):
        # No page holds a whole block of keys, or every block is masked.
        return False
    return device.compute_capability >= 90 and aligned and problem.q_len > 0 and problem.kv_len > 0


def _key_blocks(problem: Problem, block_n: int) -> int:
    """Key blocks that any query sees, at most."""
    keys, right = problem.kv_len, problem.right
    if problem.window_left is not None and right is not None:
        # A run of this many keys may begin inside a block.
        keys = min(keys, problem.q_len + problem.window_left + right + block_n - 1)
    return -(-keys // block_n)


def _mergeable_splits(problem: Problem) -> int:
    """Splits whose partial results (fp32, with two numbers for each row) take `_MOST_SCRATCH` times what must be moved."""
    split_bytes = problem.batch * problem.q_heads * problem.q_len * (problem.v_head_dim + 2) * 4
    return _MOST_SCRATCH * problem.least_bytes // max(split_bytes, 1)


def _allowed_splits(problem: Problem, block_n: int, wanted: int) -> int:
    """The least number of splits that is not less than `wanted`, or the largest that is legal."""
    most = max(1, min(_key_blocks(problem, block_n), _mergeable_splits(problem)))
    legal = [splits for splits in _SPLITS if splits <= most]
    return next((splits for splits in legal if splits >= wanted), legal[-1])


def _shared_bytes(problem: Problem, device: DeviceFacts, config: Config) -> int:
    """Least shared memory of a block: key and value blocks in flight, and the queries where they lie there too."""
    size = DTYPE_BYTES[problem.dtype]
    wide, wide_v = padded(problem.head_dim), padded(problem.v_head_dim)
    block_m, block_n, stages = int(config["block_m"]), int(config["block_n"]), int(config["num_stages"])
    step = block_n * (wide + wide_v) * size
    if device.vendor != "cuda" or stages == 1:
        return block_n * min(wide, wide_v) * size
    if device.compute_capability >= 90 and size == 2 and block_m >= 64 and int(config["num_warps"]) >= 4:
        # Matrix instructions of a warp group read both operands from shared memory while later blocks arrive.
        return block_m * wide * size + stages * step
    # Elsewhere a block is copied to registers before its buffer is needed again.
    return (stages - 1) * step


def _default_tile(problem: Problem, device: DeviceFacts) -> tuple[int, int, int, int]:
    """block_m, block_n, num_warps, num_stages."""
    widest = max(padded(problem.head_dim), padded(problem.v_head_dim))
    if problem.dtype == "fp32":
        # ptxas aims at several blocks per multiprocessor and then spills a few bytes: what avoids it differs by arch.
        wide = device.compute_capability < 100 if widest > 128 else _ragged(problem)
        return 16, 32 if widest <= 128 and not _ragged(problem) else 16, 8 if wide else 4, 1
    # Rows that are no multiple of 16 elements apart are loaded element by element, each with an address and a mask.
    aligned = not (problem.head_dim % 16 or problem.v_head_dim % 16) or _default_tma(problem, device)
    block_m = 16 if problem.q_len * problem.group <= 16 or widest > 256 or not aligned else 32
    block_n = (64 if widest <= 128 else 32 if widest <= 256 else 16) if aligned else (32 if widest <= 64 else 16)
    if device.vendor != "cuda":
        return block_m, block_n, 4, 1
    older = device.compute_capability < 90
    wide = widest > 512 and device.arch != "sm_89"
    # Triton 3.9 spills where keys are wider than values and four warps share 32 rows.
    tall = widest == 256 and block_m == 32 and (older or padded(problem.head_dim) != padded(problem.v_head_dim))
    warps = 8 if wide or tall else 4
    return block_m, block_n, warps, 3 if widest <= 256 else 1 if older and widest > 512 else 2


def _default_tma(problem: Problem, device: DeviceFacts) -> bool:
    possible = problem.paged is None and DTYPE_BYTES[problem.dtype] == 2 and _tma_possible(problem, device)
    return _ragged(problem) and possible


def _ragged(problem: Problem) -> bool:
    """Whether a tile is wider than a head."""
    return any(padded(side) != side for side in (problem.head_dim, problem.v_head_dim))
