"""What may vary in `kernels/flex_attention_bwd.py`: the `bwd_` options of PyTorch's FlexAttention, and its BlockMask's blocks.

One launch computes dk and dv (tiles m1, n1) and dq (tiles m2, n2). Up to PyTorch 2.13 tiles that do not fit one another are only
found out by the compiler, or not at all: the rules are stated here.
"""

from harness.device import DeviceFacts
from harness.problem import DTYPE_BYTES, Problem
from harness.space import Config, Rule, Space, padded

from .flex_attention import hidden, longest, shared_rules, sparse_sides

_SIDES = (16, 32, 64, 128)


def space(problem: Problem, device: DeviceFacts) -> Space:
    """The options of the backward template for `problem` on `device`."""
    stages = (1, 2, 3, 4) if device.vendor == "cuda" else (1, 2)
    return Space(
        params=(
            hidden("block_m1", _SIDES, "more queries per step of dk and dv amortise bookkeeping, for registers"),
            hidden("block_n1", _SIDES, "more keys per program of dk and dv read each query less often"),
            hidden("block_m2", _SIDES, "more queries per program of dq read each key less often"),
            hidden("block_n2", _SIDES, "more keys per step of dq amortise bookkeeping, for registers"),
            hidden("num_warps", (4, 8), "more warps share the accumulators"),
            hidden("num_stages", stages, "more blocks in flight hide latency"),
            # PyTorch drops all options where its own default tiles, of up to 128, do not divide the blocks (up to 2.13).
            hidden("sparse", sparse_sides(problem, (128, 256)), "smaller blocks of the mask hide more"),
        ),
        rules=_rules(problem, device),
    )


def default(problem: Problem, device: DeviceFacts) -> Config:
    """Tiles near those that PyTorch chooses itself, which compile without spills for sm_80 and sm_90."""
    wide = max(padded(problem.head_dim), padded(problem.v_head_dim))
    if problem.dtype == "fp32" or device.vendor != "cuda" or wide > 128:
        tiles, warps, stages = (16, 16, 16, 16), 8 if problem.dtype == "fp32" and wide > 64 else 4, 1
    elif device.compute_capability >= 90:
        tiles, warps, stages = (64, 128, 128, 64) if wide <= 64 else (64, 64, 64, 64), 8, 2
    else:
        tiles, warps, stages = (32, 64, 64, 32), 4 if wide <= 64 else 8, 2
    m1, n1, m2, n2 = tiles
    most_m, most_n = longest(problem.q_len), longest(problem.kv_len)
    n1, m2 = min(n1, most_n), min(m2, most_m)
    return Config({
        "block_m1": min(m1, most_m, n1), "block_n1": n1, "block_m2": m2, "block_n2": min(n2, most_n, m2),
        "num_warps": warps, "num_stages": stages, "sparse": sparse_sides(problem, (128,))[0],
    })  # fmt: skip


def _rules(problem: Problem, device: DeviceFacts) -> tuple[Rule, ...]:
    wide, wide_v = padded(problem.head_dim), padded(problem.v_head_dim)
    size = DTYPE_BYTES[problem.dtype]

    def fits_length(config: Config) -> bool:
        queries, keys = longest(problem.q_len), longest(problem.kv_len)
        return (
            max(int(config["block_m1"]), int(config["block_m2"])) <= queries
            and max(int(config["block_n1"]), int(config["block_n2"])) <= keys
        )

    def divides(config: Config) -> bool:
        sparse = int(config["sparse"])
        return not sparse or all(
            sparse % int(config[name]) == 0 for name in ("block_m1", "block_n1", "block_m2", "block_n2")
        )

    def keys_divide(config: Config) -> bool:
        return int(config["block_n1"]) % int(config["block_m1"]) == 0

    def queries_divide(config: Config) -> bool:
        return int(config["block_m2"]) % int(config["block_n2"]) == 0

    def fits_shared(config: Config) -> bool:
        side = max(int(config["block_m1"]), int(config["block_n2"]))
        flying = max(int(config["num_stages"]) - 1, 1) * side * (wide + wide_v) * size
        return device.vendor != "cuda" or flying <= device.shared_bytes_per_block

    def fits_registers(config: Config) -> bool:
        threads = int(config["num_warps"]) * device.warp_size
        keys = int(config["block_n1"]) * (wide + wide_v + int(config["block_m1"])) // threads
        queries = int(config["block_m2"]) * (wide + int(config["block_n2"])) // threads
        return max(keys, queries) <= device.registers_per_thread

    return (
        *shared_rules(problem),
        Rule("tile_exceeds_length", "the tile would be mostly padding", fits_length),
        Rule("sparse_blocks", "tiles must divide the blocks of the BlockMask", divides),
        Rule(
            "key_tiles",
            "FlexAttention steps through queries by whole parts of its tile of keys: n1 % m1 == 0",
            keys_divide,
        ),
        Rule(
            "query_tiles",
            "FlexAttention steps through keys by whole parts of its tile of queries: m2 % n2 == 0",
            queries_divide,
        ),
        Rule("shared_memory", "the blocks in flight do not fit a block's shared memory", fits_shared),
        Rule("registers", "scores and gradients alone need more registers than a thread has", fits_registers),
    )
