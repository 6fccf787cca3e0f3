"""What may vary in `kernels/flash_fwd.py`, when a combination is legal, and a safe config for every device.

A rule removes only what cannot be launched or cannot win; whether a config that is left is good is the tuner's business.
Figures come from compiling the kernel for sm_80, sm_89, sm_90, sm_100 and gfx942 and reading the binaries.
"""

from harness.device import DeviceFacts
from harness.problem import DTYPE_BYTES, Problem
from harness.space import (
    SCALED_QUERIES,
    Config,
    Param,
    Rule,
    Space,
    eight_bits,
    exact_scale,
    matrix_knobs,
    matrix_rule,
    padded,
    power_of_two,
    tile_width,
)  # fmt: skip

# Below these sides a tile cannot be cut in a useful way, however short the sequence is.
_LEAST_QUERIES = 64
_LEAST_KEYS = 32
# Programs per multiprocessor from which on more of them cannot pay.
_FULL = 2
# Registers per thread, 0 for the compiler's choice: two to five blocks of four warps fit (65,536 registers, in units of 8).
_REGISTER_LIMITS = (0, 96, 128, 168, 255)
# What every block takes beside what it asks for (CUDA programming guide).
_RESERVED_BYTES = 1024
# Registers of a thread beside scores and output, at least: statistics of rows, places in memory, counters (seen: 44 and more).
_OTHER_REGISTERS = 32


def space(problem: Problem, device: DeviceFacts) -> Space:
    """The tunables of the forward kernel for `problem` on `device`."""
    params = (*_tile_params(problem, device), *_grid_params(problem, device), *_code_params(problem, device))
    rules = (*_tile_rules(problem, device), *_grid_rules(problem, device), *_code_rules(problem, device))
    return Space(params=params, rules=rules)


def default(problem: Problem, device: DeviceFacts) -> Config:
    """A config that compiles without spills for head dims up to 256, in 16 bits up to 576; by arch, dtype and the wider one."""
    block_m, block_n, warps, stages = _default_tile(problem, device)
    block_m = min(block_m, max(_LEAST_QUERIES, power_of_two(problem.q_len)))
    block_n = min(block_n, max(_LEAST_KEYS, power_of_two(problem.kv_len)))
    # Heads of 576 fit in two tiles only, and in registers only if they come by pointers; those of 8 bits by descriptors.
    halved = problem.head_dim > 512 and _divisible(problem)
    described = _tma_possible(problem, device) and DTYPE_BYTES[problem.dtype] <= 2
    described = described and not (halved and not _eight_bits_on_hopper(problem, device))
    return Config({
        "block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages, "precision": "ieee",
        "load": "tma" if described else "pointer", "loops": "split", "warp_specialize": False, "head_order": "outer",
        "masked_stages": min(stages, 2) if _two_loops(problem) else 1, "groups_together": 1, "programs_per_sm": 0,
        "flatten": False, "waves_per_eu": 0, "maxnreg": 0, "v_load": "late", "cache_hints": False,
        "lone_accumulator": False, "lag": 0, "head_chunks": halved, "scaled_queries": False, "mfma_side": 0, "kpack": 1,
    })  # fmt: skip


def _tile_params(problem: Problem, device: DeviceFacts) -> tuple[Param, ...]:
    cuda, modern, two_loops = device.vendor == "cuda", _tma_possible(problem, device), _two_loops(problem)
    return (
        Param("block_m", (16, 32, 64, 128, 256), "more queries per program read each key less often, for more registers"),
        Param("block_n", (16, 32, 64, 128, 256), "more keys per step amortise softmax bookkeeping, for more shared memory"),
        Param("num_warps", (1, 2, 4, 8), "more warps share the accumulators of one tile", interpreted=False),
        Param("num_stages", (1, 2, 3, 4, 5) if cuda else (1, 2), "more key blocks in flight hide latency, for shared memory",
              interpreted=False),
        Param("precision", _precisions(problem, device), "matrix units multiply fp32 with fewer bits, once or in three parts",
              interpreted=False),
        Param("load", ("pointer", "tma", "tma_kv") if modern else ("pointer",),
              "descriptors spare registers and address arithmetic; Q is read once, and may lie in any way by pointers"),
        Param("loops", ("split", "single") if two_loops else ("split",), "one masked loop is less code than two"),
        Param("masked_stages", (1, 2) if two_loops else (1,), "few blocks are masked, so deep prefetch rarely pays",
              interpreted=False),
        Param(
            "warp_specialize", (False, True) if modern and DTYPE_BYTES[problem.dtype] == 2 else (False,),
            "a warp of its own for the loads lets two warp groups overlap softmax and products", interpreted=False,
        ),
    )  # fmt: skip


def _grid_params(problem: Problem, device: DeviceFacts) -> tuple[Param, ...]:
    several = problem.batch * problem.q_heads > 1
    return (
        Param(
            "head_order", ("outer", "inner") if several else ("outer",),
            "heads of a group that run side by side read the same keys from the cache",
        ),
        Param(
            "groups_together", (1, 2, 4, 8, 16) if several else (1,),
            "as many heads as the cache holds keys of take turns, so that long tiles of all start first",
        ),
        Param("programs_per_sm", (0, 1, 2, 4), "programs that stay begin once and share out long and short tiles; 0 is one each"),
        Param("flatten", (False, True), "one loop over the keys of all tiles begins to load the next tile early",
              interpreted=False),
    )  # fmt: skip


def _code_params(problem: Problem, device: DeviceFacts) -> tuple[Param, ...]:
    cuda = device.vendor == "cuda"
    return (
        Param("waves_per_eu", (0,) if cuda else (0, 1, 2, 3), "fewer registers for more waves", interpreted=False),
        Param("maxnreg", _REGISTER_LIMITS if cuda else (0,), "fewer registers let another block hide latency", interpreted=False),
        Param(
            "lag", (0, 8) if device.compute_capability < 100 else (0,),
            "sums that wait until a maximum has risen by so many powers of two are rarely rescaled, for a vote at each step",
        ),
        Param(
            "head_chunks", (False, True) if _divisible(problem) else (False,),
            "two tiles of a head that is no power of two wide multiply less padding, in twice as many products",
        ),
        Param("v_load", ("late", "early"), "values asked for before the softmax are there after it, for registers"),
        Param(
            "cache_hints", (False, True) if cuda else (False,),
            "Q, which one program reads, may leave room in L1 for keys and values, which blocks beside it read too",
            interpreted=False,
        ),
        Param(
            "lone_accumulator", (False, True) if device.compute_capability >= 100 else (False,),
            "one accumulator in tensor memory takes less room there and fewer registers than several by turns",
            interpreted=False,
        ),
        SCALED_QUERIES, *matrix_knobs(device.arch == "gfx942"),
    )  # fmt: skip


def _tile_rules(problem: Problem, device: DeviceFacts) -> tuple[Rule, ...]:
    longest_m = max(_LEAST_QUERIES, power_of_two(problem.q_len))
    longest_n = max(_LEAST_KEYS, power_of_two(problem.kv_len))
    # Published configs have 64 rows and more, 32 where a row is longer than 256 bytes, and 32 keys and more. Plain
    # multiply-add keeps more of them in registers.
    widest = max(padded(problem.head_dim), padded(problem.v_head_dim)) * DTYPE_BYTES[problem.dtype]
    least_m, least_n = 64 if widest <= 256 else 32, 32 if widest <= 512 else 16
    full = problem.batch * problem.q_heads * (problem.q_len // least_m) >= _FULL * device.multiprocessors

    def fits_length(config: Config) -> bool:
        return int(config["block_m"]) <= longest_m and int(config["block_n"]) <= longest_n

    def enough_rows(config: Config) -> bool:
        # Matrix instructions work on 16 rows; plain multiply-add, which fp32 takes, shares out columns as well.
        plain = problem.dtype == "fp32" and config["precision"] == "ieee"
        return plain or int(config["num_warps"]) * 16 <= 4 * int(config["block_m"])

    def square_enough(config: Config) -> bool:
        tall, wide = int(config["block_m"]), int(config["block_n"])
        return not (problem.banded and problem.q_len > tall) or wide <= 4 * tall

    def large_enough(config: Config) -> bool:
        tall, wide = int(config["block_m"]), int(config["block_n"])
        if problem.dtype == "fp32" and config["precision"] == "ieee":
            return tall >= 32 or widest > 512 or not full
        return (tall >= least_m or not full) and (wide >= least_n or problem.kv_len <= wide)

    def fits_shared(config: Config) -> bool:
        return _shared_bytes(problem, device, config) <= device.shared_bytes_per_block

    def fits_registers(config: Config) -> bool:
        return _accumulators(problem, device, config) <= device.registers_per_thread

    def masked_loop(config: Config) -> bool:
        prefetched = int(config["masked_stages"])
        return prefetched == 1 or (config["loops"] == "split" and prefetched <= int(config["num_stages"]))

    def specializable(config: Config) -> bool:
        if not config["warp_specialize"]:
            return True
        deep, tall = int(config["num_stages"]) >= 2, int(config["block_m"]) >= 64
        return config["load"] == "tma" and config["num_warps"] == 4 and _one_loop(problem, config) and deep and tall

    def loads_by_descriptor(config: Config) -> bool:
        by_pointer = problem.documents or problem.mask is not None or problem.bias is not None
        return not (config["warp_specialize"] and by_pointer)

    return (
        *((eight_bits(device.multiplies(problem.dtype)),) if problem.eight_bits else ()),
        Rule("tile_exceeds_length", "the tile would be mostly padding", fits_length),
        Rule("warps_per_tile", "more than four warps would share 16 rows", enough_rows),
        Rule("causal_tile_shape", "most of a tile this wide would lie outside the band", square_enough),
        Rule("tile_needlessly_small", "taller tiles would fill the device twice, and read keys less often; 32 keys a step fit",
             large_enough),
        Rule("masked_loop", "only a masked loop of its own can be pipelined on its own, and no deeper than the main loop",
             masked_loop),
        Rule("warp_specialization", "needs descriptors, 4 warps, 64 rows, 2 stages and one loop (Triton 3.6 fails otherwise)",
             specializable),
        Rule("warp_specialized_loads", "a bias, a mask and documents are loaded by pointers (Triton 3.6 fails)",
             loads_by_descriptor),
        Rule("shared_memory", "queries and the key blocks in flight do not fit a block's shared memory", fits_shared),
        Rule("registers", "scores and output alone need more registers than a thread has", fits_registers),
    )  # fmt: skip


def _grid_rules(problem: Problem, device: DeviceFacts) -> tuple[Rule, ...]:
    most = _groups_in_cache(problem, device)

    def takes_turns(config: Config) -> bool:
        count = int(config["groups_together"])
        if config["head_order"] == "outer":
            return count == 1
        return problem.group * count > 1 and count in (1, most)

    def waits_for_turns(config: Config) -> bool:
        count, tiles = int(config["groups_together"]), problem.group * -(-problem.q_len // int(config["block_m"]))
        return count == 1 or count * tiles > device.multiprocessors

    def worth_staying(config: Config) -> bool:
        programs = int(config["programs_per_sm"]) * device.multiprocessors
        tiles = problem.batch * problem.q_heads * -(-problem.q_len // int(config["block_m"]))
        return programs < tiles or not programs

    def fit_together(config: Config) -> bool:
        blocks, warps = int(config["programs_per_sm"]), int(config["num_warps"])
        if blocks <= 1:
            return True
        registers = (_accumulators(problem, device, config) + _OTHER_REGISTERS) * warps * device.warp_size
        shared = _shared_bytes(problem, device, config) + _RESERVED_BYTES
        fitting = blocks * registers <= device.registers_per_sm and blocks * warps <= device.warps_per_sm
        return fitting and blocks * shared <= device.shared_bytes_per_sm and not config["warp_specialize"]

    def flattens(config: Config) -> bool:
        if not config["flatten"]:
            return True
        stays = int(config["programs_per_sm"]) > 0 and int(config["num_stages"]) > 1
        return stays and config["load"] == "pointer" and _one_loop(problem, config)

    return (
        Rule("turns", "in the inner order take turns the heads of a group, or of as many groups as L2 holds keys of",
             takes_turns),
        Rule("turns_in_waves", "where one wave holds all their tiles, groups need not take turns", waits_for_turns),
        Rule("persistent_tiles", "programs that stay must have more than one tile each", worth_staying),
        Rule("persistent_fit", "programs that stay must fit a multiprocessor together; specialized warps take it whole",
             fit_together),
        Rule("flatten", "needs programs that stay, one loop and prefetched pointer loads (Triton 3.6 fails with descriptors)",
             flattens),
    )  # fmt: skip


def _code_rules(problem: Problem, device: DeviceFacts) -> tuple[Rule, ...]:
    def v_is_placed(config: Config) -> bool:
        # Seen in all of 13 pairs of binaries: the pipeliner of sm_90 puts copies where it likes. Descriptors it leaves.
        if config["v_load"] == "late" or device.compute_capability != 90 or config["load"] != "pointer":
            return True
        ahead = int(config["num_stages"]) > 1
        return not ahead or not (int(config["masked_stages"]) > 1 or _one_loop(problem, config))

    def hint_arrives(config: Config) -> bool:
        # Copies that run ahead, by threads or by descriptors, pass L1 by; their hints leave no trace in the code.
        return not config["cache_hints"] or (config["load"] == "pointer" and config["num_stages"] == 1)

    def worthwhile_limit(config: Config) -> bool:
        limit, warps = int(config["maxnreg"]), int(config["num_warps"])
        if limit == 0:
            return True
        blocks = device.registers_per_sm // (limit * warps * device.warp_size)
        looser = min((other for other in _REGISTER_LIMITS if other > limit), default=0)
        as_many = looser and device.registers_per_sm // (looser * warps * device.warp_size) == blocks
        if blocks < 2 or as_many or _accumulators(problem, device, config) + _OTHER_REGISTERS > limit:
            return False
        shared = _shared_bytes(problem, device, config) + _RESERVED_BYTES
        return blocks * shared <= device.shared_bytes_per_sm and not config["warp_specialize"]

    def limit_is_used(config: Config) -> bool:
        limit, programs = int(config["maxnreg"]), int(config["programs_per_sm"])
        return not (limit and programs) or limit * programs * int(config["num_warps"]) * device.warp_size > (
            device.registers_per_sm // 2
        )

    def rescales(config: Config) -> bool:
        if not config["lag"]:
            return True
        branches = device.compute_capability < 100 and not config["warp_specialize"]
        return branches and problem.kv_len > int(config["block_n"])

    def in_tensor_memory(config: Config) -> bool:
        return not config["lone_accumulator"] or problem.dtype != "fp32" or config["precision"] != "ieee"

    return (
        Rule("lag", "needs a second block of keys, and sums outside tensor memory and specialized warps (Triton 3.6 fails)",
             rescales),
        Rule("v_placement", "copies that run ahead are placed by the compiler, to the same code (sm_90)", v_is_placed),
        Rule("cache_hints", "only plain loads go through L1: not descriptors, nor copies that run ahead", hint_arrives),
        Rule("register_limit", "a limit must let another block share the multiprocessor, in its shared memory too, and hold"
             " scores and output; specialized warps have limits of their own", worthwhile_limit),
        Rule("persistent_registers", "a limit that leaves half the registers to nobody helps no program that stays",
             limit_is_used),
        exact_scale(problem.dtype, problem.softmax_scale, changed=bool(problem.softcap or problem.alibi or problem.bias)),
        matrix_rule(lambda config: int(config["block_m"])),
        Rule("lone_accumulator", "products of fp32 on plain multiply-add need no tensor memory", in_tensor_memory),
    )  # fmt: skip


def _tma_possible(problem: Problem, device: DeviceFacts) -> bool:
    """Descriptors exist from sm_90 on and need whole 16 bytes per head, which every layout's strides are multiples of."""
    size = DTYPE_BYTES[problem.dtype]
    aligned = problem.head_dim * size % 16 == 0 and problem.v_head_dim * size % 16 == 0
    return device.compute_capability >= 90 and aligned and problem.q_len > 0 and problem.kv_len > 0


def _precisions(problem: Problem, device: DeviceFacts) -> tuple[str, ...]:
    """How products may be made: only fp32 has a choice, and on AMD only CDNA 3 (gfx942) has tf32."""
    if problem.dtype != "fp32" or device.vendor != "cuda":
        return ("ieee", "tf32") if problem.dtype == "fp32" and device.arch == "gfx942" else ("ieee",)
    return ("ieee", "tf32", "tf32x3")


def _divisible(problem: Problem) -> bool:
    """Whether two tiles of a head, of queries and keys or of values, are narrower than one."""
    return any(tile_width(dim, chunked=True) < padded(dim) for dim in (problem.head_dim, problem.v_head_dim))


def _eight_bits_on_hopper(problem: Problem, device: DeviceFacts) -> bool:
    return problem.eight_bits and device.compute_capability == 90


def _may_mask(problem: Problem, block_n: int = 256) -> bool:
    """Whether some key block may need a mask: a band, sequences that end anywhere, or keys that `block_n` does not divide."""
    return problem.banded or problem.packed is not None or problem.kv_len % block_n != 0


def _groups_in_cache(problem: Problem, device: DeviceFacts) -> int:
    """The largest power of two of key/value heads whose keys and values leave a third of L2 free; it divides their number."""
    each = problem.kv_len * (problem.head_dim + problem.v_head_dim) * DTYPE_BYTES[problem.dtype]
    heads, count = problem.batch * problem.kv_heads, 1
    while 3 * 2 * count * each <= 2 * device.l2_bytes and heads % (2 * count) == 0 and count < 16:
        count *= 2
    return count


def _two_loops(problem: Problem) -> bool:
    """Whether there may be a loop with and one without a mask: not where more than the band hides keys."""
    free = problem.prefix or problem.documents or problem.chunk is not None or problem.mask is not None
    return _may_mask(problem) and not free


def _one_loop(problem: Problem, config: Config) -> bool:
    """Whether the kernel of a config has one loop over keys."""
    return config["loops"] == "single" or not (_two_loops(problem) and _may_mask(problem, int(config["block_n"])))


def _shared_bytes(problem: Problem, device: DeviceFacts, config: Config) -> int:
    """Least shared memory of a block: key and value blocks in flight, and the queries where they lie there too."""
    size = DTYPE_BYTES[problem.dtype]
    wide, wide_v = (tile_width(dim, chunked=config["head_chunks"]) for dim in (problem.head_dim, problem.v_head_dim))
    block_m, block_n, stages = int(config["block_m"]), int(config["block_n"]), int(config["num_stages"])
    step = block_n * (wide + wide_v) * size
    if device.vendor != "cuda" or stages == 1:
        return block_n * min(wide, wide_v) * size
    grouped = size <= 2 or config["precision"] == "tf32"
    if device.compute_capability >= 90 and grouped and block_m >= 64 and int(config["num_warps"]) >= 4:
        # Matrix instructions of a warp group read both operands from shared memory while later blocks arrive.
        return block_m * wide * size + stages * step
    # Elsewhere a block is copied to registers before its buffer is needed again.
    return (stages - 1) * step


def _accumulators(problem: Problem, device: DeviceFacts, config: Config) -> int:
    """Registers per thread for the scores and the output tile."""
    warps = int(config["num_warps"]) * (2 if config["warp_specialize"] else 1)
    wide_v = tile_width(problem.v_head_dim, chunked=config["head_chunks"])
    tile = int(config["block_m"]) * (int(config["block_n"]) + wide_v)
    return tile // (warps * device.warp_size)


def _default_tile(problem: Problem, device: DeviceFacts) -> tuple[int, int, int, int]:
    """block_m, block_n, num_warps, num_stages."""
    widest = max(padded(problem.head_dim), padded(problem.v_head_dim))
    uneven = padded(problem.head_dim) != padded(problem.v_head_dim)
    if problem.dtype == "fp32":
        if widest <= 128 or uneven:
            return 32, 16, 8 if widest == 128 else 4, 1
        return 16, 16, 4 if device.compute_capability >= 100 else 8, 1
    if widest > 256:
        return _widest_tile(problem, device)
    if device.vendor != "cuda":
        return (128, 64, 4, 1) if widest <= 64 else (128, 32, 4, 1) if widest <= 128 else (64, 32, 4, 1)
    # What comes in beside scores takes registers: elements of a bias, random numbers, elements of a mask.
    crowded = problem.bias is not None or problem.dropout > 0
    if device.compute_capability >= 90:
        deep = uneven and device.compute_capability >= 100
        if _eight_bits_on_hopper(problem, device):
            # What the units add up goes through registers of its own.
            crowded = crowded or problem.mask is not None or problem.documents
            return (64, 64, 8, 2) if widest > 128 else (128, 64 if crowded else 128, 8, 2)
        if crowded:
            tall = 64 if problem.eight_bits and problem.dropout else 128
            return (tall, 64, 8, 2) if widest <= 128 else (64, 64 if device.compute_capability < 100 else 32, 8, 2)
        return (128, 128, 8, 2) if widest <= 128 else (128, 64, 8, 3 if deep else 2)
    if widest <= 128:
        small = widest <= 64 and not problem.eight_bits
        return (64 if problem.packed and not small else 128, 64 if problem.packed or small else 32, 8, 2)
    return (32 if problem.mask is not None else 64, 32, 8, 2)


def _widest_tile(problem: Problem, device: DeviceFacts) -> tuple[int, int, int, int]:
    """block_m, block_n, num_warps, num_stages for heads beyond 256 in 16 bits, whose sums fill the registers."""
    if device.vendor != "cuda":
        return (64, 16, 8, 1) if problem.head_dim <= 512 else (32, 16, 8, 1)
    if device.compute_capability >= 90 and (problem.head_dim <= 512 or _eight_bits_on_hopper(problem, device)):
        return 64, 32, 8, 2
    return 32, 32, 8, 1
