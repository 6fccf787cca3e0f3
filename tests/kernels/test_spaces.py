"""The search spaces of the stock kernels: names, defaults and rules, without importing Triton."""

import ast
import itertools
import time
from pathlib import Path

import pytest

from harness.device import TARGETS
from harness.operation import CALLER_KEYWORDS, PROBLEM_KEYWORDS
from harness.problem import parse_problem
from harness.space import Config
from search_spaces import flash_bwd, flash_decode, flash_fwd

ROOT = Path(__file__).parents[2]
SPACES = {"fwd": flash_fwd, "bwd": flash_bwd, "decode": flash_decode}
PASSES = {"fwd": "fwd", "bwd": "bwd", "decode": "fwd"}
PROBLEMS = [
    f"b2 h8/2 {lengths} d{head_dim} {dtype} {mask}"
    for lengths, head_dim, dtype, mask in itertools.product(
        ("s4096", "q1 k77", "q0 k5", "q5 k0"), ("8", "40", "64", "100", "128", "192/128", "256"),
        ("bf16", "fp32"), ("", "causal window=100"),
    )
]  # fmt: skip


@pytest.mark.parametrize("name", SPACES)
def test_parameters_are_the_tunables_of_the_kernel(name: str) -> None:
    tree = ast.parse((ROOT / "kernels" / f"flash_{name}.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "launches")
    tunables = {argument.arg for argument in function.args.kwonlyargs} - {*PROBLEM_KEYWORDS, *CALLER_KEYWORDS}
    for device in TARGETS.values():
        assert set(SPACES[name].space(parse_problem(f"b1 h1 s64 d64 bf16 {PASSES[name]}"), device).names) == tunables


@pytest.mark.parametrize("device", TARGETS)
@pytest.mark.parametrize("name", SPACES)
def test_every_default_is_legal(device: str, name: str) -> None:
    for text in PROBLEMS:
        problem = parse_problem(f"{text} {PASSES[name]}")
        SPACES[name].space(problem, TARGETS[device]).check(SPACES[name].default(problem, TARGETS[device]))


@pytest.mark.parametrize("device", TARGETS)
def test_every_default_of_decoding_is_legal_for_wide_heads_and_few_queries(device: str) -> None:
    for heads, head_dim in itertools.product(("h128/1 q1 k8192", "h32/8 q5 k8190"), ("192/128", "512", "576/512")):
        problem = parse_problem(f"b2 {heads} d{head_dim} bf16 causal")
        flash_decode.space(problem, TARGETS[device]).check(flash_decode.default(problem, TARGETS[device]))


def test_atomic_additions_are_for_problems_that_allow_them() -> None:
    alike = {"dq_block_m": 32, "dq_block_n": 128, "dq_warps": 8, "dq_stages": 1, "dq_load": "pointer"}
    alike |= {"dkdv_block_m": 32, "dkdv_block_n": 128, "dkdv_warps": 8}
    allowed = f"{LONG} nondeterministic"
    assert backward("h200", LONG, structure="atomic", **alike) == "atomic_order"
    assert backward("h200", allowed, structure="atomic", **alike) is None
    assert backward("h200", allowed, structure="atomic", **alike | {"dq_stages": 2}) == "atomic_tiles"
    assert backward("h200", allowed, structure="atomic", **alike | {"dq_block_m": 64}) == "atomic_tiles"
    for text, most in ((LONG, 0), (allowed, 200)):
        space = flash_bwd.space(parse_problem(f"{text} bwd"), TARGETS["h200"])
        atomic = [config for config in space.legal if config["structure"] == "atomic"]
        assert bool(most) <= len(atomic) <= most and len(space.legal) > len(atomic)


@pytest.mark.parametrize("device", [name for name, facts in TARGETS.items() if facts.multiplies("fp8e4m3")])
def test_every_default_of_eight_bits_is_legal(device: str) -> None:
    for text in (*PROBLEMS, "b2 h8/2 s4096 d576/512 bf16", "b2 h8/2 s4096 d512 bf16 mask=bk"):
        if "fp32" not in text:
            problem = parse_problem(text.replace("bf16", "fp8e4m3"))
            flash_fwd.space(problem, TARGETS[device]).check(flash_fwd.default(problem, TARGETS[device]))


def test_types_of_eight_bits_are_refused_where_matrix_units_do_not_take_them() -> None:
    for dtype, device in itertools.product(("fp8e4m3", "fp8e5m2"), ("a100", "mi300x")):
        problem = parse_problem(f"b2 h8/2 s4096 d128 {dtype}")
        space = flash_fwd.space(problem, TARGETS[device])
        assert not space.legal and space.census.alone["eight_bits"] == space.census.size
        assert forward(device, str(problem)) == "eight_bits"
    assert forward("h200", LONG.replace("bf16", "fp8e4m3"), block_m=64, block_n=16, num_warps=4) == "eight_bits"
    assert forward("h200", LONG.replace("bf16", "fp8e4m3"), block_m=64, block_n=32, num_warps=4) is None


def forward(device: str, problem: str, **changes: object) -> str | None:
    """Name of the rule that removes the default config with `changes`, or None."""
    parsed, target = parse_problem(problem), TARGETS[device]
    config = Config({**flash_fwd.default(parsed, target), **changes})  # type: ignore[dict-item]
    broken = flash_fwd.space(parsed, target).broken_rule(config)
    return broken.name if broken else None


def backward(device: str, problem: str, **changes: object) -> str | None:
    parsed, target = parse_problem(f"{problem} bwd"), TARGETS[device]
    config = Config({**flash_bwd.default(parsed, target), **changes})  # type: ignore[dict-item]
    broken = flash_bwd.space(parsed, target).broken_rule(config)
    return broken.name if broken else None


LONG = "b2 h8/2 s4096 d128 bf16 causal"


def test_each_rule_of_the_forward_space_removes_what_it_says() -> None:
    assert forward("h200", LONG) is None
    assert forward("h200", LONG, block_m=16, block_n=16, num_warps=8) == "warps_per_tile"
    assert forward("h200", "b1 h1 s60 d64 bf16", block_m=128, block_n=32) == "tile_exceeds_length"
    assert forward("h200", LONG, num_stages=1) == "masked_loop"
    assert forward("h200", LONG, block_m=16, block_n=128, num_warps=4) == "causal_tile_shape"
    assert forward("h200", LONG, loops="single") == "masked_loop"
    assert forward("h200", LONG, num_warps=4, warp_specialize=True) == "warp_specialization"
    one_loop = {"loops": "single", "masked_stages": 1, "num_warps": 4, "warp_specialize": True}
    assert forward("h200", LONG, **one_loop, load="tma_kv") == "warp_specialization"
    assert forward("h200", LONG, v_load="early") is None
    assert forward("h200", LONG, v_load="early", load="pointer") == "v_placement"
    assert forward("b200", LONG, v_load="early", load="pointer") is None
    assert forward("h200", LONG, cache_hints=True, load="pointer") == "cache_hints"
    plain = {"load": "pointer", "num_stages": 1, "masked_stages": 1}
    assert forward("h200", LONG, cache_hints=True, **plain) is None
    assert forward("h200", LONG, cache_hints=True, **plain | {"load": "tma"}) == "cache_hints"
    assert forward("h200", LONG, num_stages=4) == "shared_memory"
    assert forward("h200", LONG, num_warps=4) == "registers"
    # 128 registers of 8 warps let two blocks share a multiprocessor, whose shared memory holds one of these tiles.
    assert forward("h200", LONG, maxnreg=128) == "register_limit"
    small = {"block_m": 64, "block_n": 64, "num_warps": 4}
    assert forward("h200", LONG, **small, maxnreg=255) is None
    assert forward("h200", LONG, **small, maxnreg=168) == "register_limit"
    assert forward("h200", LONG, **small, num_stages=1, masked_stages=1, maxnreg=128) is None


def test_sums_are_rescaled_late_only_where_that_compiles() -> None:
    assert forward("h200", LONG, lag=8) is None
    assert forward("h200", "b1 h1 s60 d64 bf16", lag=8) == "lag"
    one_loop = {"loops": "single", "masked_stages": 1, "num_warps": 4, "warp_specialize": True, "block_n": 64}
    assert forward("h200", LONG, **one_loop, lag=8) == "lag"
    offered = {param.name: param.values for param in flash_fwd.space(parse_problem(LONG), TARGETS["b200"]).params}
    assert offered["lag"] == (0,)


def test_queries_are_scaled_first_only_where_that_is_exact_and_spares_something() -> None:
    changed = "b2 h8/2 s4096 d64 bf16 causal softcap=30.0"
    assert forward("h200", changed, scaled_queries=True) is None
    assert forward("h200", changed.replace("d64", "d128") + " scale=-0.5", scaled_queries=True) is None
    for other in (
        LONG, changed.replace("d64", "d128"), changed.replace("bf16", "fp16"), changed + " scale=2.0", changed + " scale=0.0",
        changed.replace("softcap=30.0", ""), "b2 h8/2 s4096 d128 bf16 scale=-0.5",
    ):  # fmt: skip
        assert forward("h200", other, scaled_queries=True) == "scaled_queries"


def test_only_amd_is_offered_its_knobs() -> None:
    for device, sides in (("h200", (0,)), ("mi300x", (0, 16))):
        for module in (flash_fwd, flash_bwd):
            offered = {param.name: param.values for param in module.space(parse_problem(LONG), TARGETS[device]).params}
            assert offered["mfma_side"] == sides and len(offered["kpack"]) == len(sides)
    assert forward("mi300x", LONG, mfma_side=16) is None
    assert forward("mi300x", "b1 h1 s64 d64 bf16", block_m=16, num_warps=2, mfma_side=16) == "mfma_side"
    assert backward("mi300x", LONG, mfma_side=16) is None
    assert backward("mi300x", LONG, dkdv_block_n=16, dq_block_m=16, dq_block_n=16, mfma_side=16) == "mfma_side"


def test_gradients_of_the_widest_heads_are_refused_where_they_cannot_fit() -> None:
    widest = "b2 h8/2 s4096 d576/512 bf16 causal"
    assert backward("rtx4090", widest) == "widest_heads"
    assert not flash_bwd.space(parse_problem(widest + " bwd"), TARGETS["rtx4090"]).legal
    assert backward("a100", widest) is None and backward("mi300x", widest) is None
    assert forward("rtx4090", widest) is None and backward("rtx4090", "b2 h8/2 s4096 d512 bf16 causal") is None


def test_heads_are_offered_two_tiles_where_these_are_narrower() -> None:
    for head_dim, offered in (("64", (False,)), ("96", (False, True)), ("192/128", (False, True)), ("100", (False,))):
        space = flash_fwd.space(parse_problem(f"b1 h1 s256 d{head_dim} bf16"), TARGETS["h200"])
        assert {param.name: param.values for param in space.params}["head_chunks"] == offered
    # Four stages of keys and values of 96 fit where those of 128 do not.
    assert forward("h200", LONG.replace("d128", "d96"), num_stages=4) == "shared_memory"
    assert forward("h200", LONG.replace("d128", "d96"), num_stages=4, head_chunks=True) is None


def test_one_launch_for_both_parts_of_a_backward_pass_has_one_number_of_warps() -> None:
    assert backward("h200", LONG, structure="fused") is None
    assert backward("h200", LONG, structure="fused", dq_warps=4) in ("fused_warps", "registers")
    assert backward("h200", LONG, structure="fused", dq_warps=4, dq_block_m=64) == "fused_warps"


def test_each_rule_of_the_grid_removes_what_it_says() -> None:
    """L2 of an H200 (50 MiB) holds keys and values of 16 of these heads, of 2 MiB each, and a third is left free; there are 4."""
    assert forward("h200", LONG, head_order="inner", groups_together=4) is None
    assert forward("h200", LONG, head_order="inner", groups_together=2) == "turns"
    assert forward("h200", LONG, groups_together=4) == "turns"
    assert forward("h200", LONG.replace("b2 h8/2", "b4 h8"), head_order="inner") == "turns"
    assert forward("h200", "b2 h2/1 s4096 d128 bf16 causal", head_order="inner", groups_together=2) == "turns_in_waves"
    assert forward("mi300x", "b1 h16/4 s65536 d128 bf16", head_order="inner", groups_together=4) == "turns"
    assert forward("h200", LONG, programs_per_sm=1) is None
    assert forward("h200", "b1 h4 s4096 d128 bf16", programs_per_sm=1) == "persistent_tiles"
    assert forward("h200", LONG, programs_per_sm=2) == "persistent_fit"
    small = {"block_m": 64, "block_n": 64, "num_warps": 4}
    assert forward("h200", LONG, **small, programs_per_sm=2) is None
    assert forward("h200", LONG, programs_per_sm=1, flatten=True, loops="single", masked_stages=1) == "flatten"
    by_pointer = {"load": "pointer", "loops": "single", "masked_stages": 1, "block_n": 64}
    assert forward("h200", LONG, programs_per_sm=1, flatten=True, **by_pointer) is None
    assert forward("h200", LONG, flatten=True, **by_pointer) == "flatten"
    assert forward("h200", LONG, programs_per_sm=1, flatten=True, **by_pointer | {"loops": "split"}) == "flatten"
    assert forward("h200", LONG, **small, programs_per_sm=2, maxnreg=255) is None
    assert forward("h200", LONG, **small, programs_per_sm=1, maxnreg=255) == "persistent_registers"


def test_small_tiles_are_left_only_where_large_ones_would_not_fill_the_device() -> None:
    assert forward("h200", LONG, block_m=32, block_n=32, num_warps=4) == "tile_needlessly_small"
    assert forward("h200", LONG, block_n=16) == "tile_needlessly_small"
    assert forward("h200", "b1 h4/2 s512 d128 bf16 causal", block_m=32, block_n=32, num_warps=4) is None
    assert forward("a100", "b2 h8 s4096 d256 bf16", block_m=32, block_n=64, num_warps=4, num_stages=3) is None
    assert forward("h200", "b2 h8 s4096 d256 fp32", block_m=16, block_n=16) is None


def test_a_space_knows_what_specialized_warps_cannot_load() -> None:
    one_loop = {"loops": "single", "masked_stages": 1, "num_warps": 4, "warp_specialize": True, "block_n": 64}
    for word in ("softcap=30.0", "alibi", "sinks", "dropout=0.1"):
        assert forward("h200", f"{LONG} {word}", **one_loop) is None
    one_loop |= {"loops": "split"}
    for word in ("chunk=512", "prefix"):
        assert forward("h200", f"{LONG} {word}", **one_loop) is None
    for word in ("documents", "mask=bk"):
        assert forward("h200", f"{LONG} {word}", **one_loop) == "warp_specialized_loads"
    assert forward("h200", f"{LONG} bias=hqk", **one_loop | {"loops": "single"}) == "warp_specialized_loads"


def test_the_flagship_space_is_large_and_quick_to_enumerate() -> None:
    """Thousands of configs of millions of combinations; seconds are those of a busy machine."""
    began = time.process_time()
    census = flash_fwd.space(parse_problem("b1 h64/8 s16384 d128 bf16 causal"), TARGETS["h200"]).census
    assert time.process_time() - began < 5
    assert census.size > 1_000_000 and 5_000 < census.legal < 30_000


def test_configs_that_published_kernels_use_are_never_removed() -> None:
    """Seeds from FlashAttention-3, FlexAttention and the Triton tutorial, as far as this kernel can express them."""
    for block_m, block_n, warps, stages in ((128, 128, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2), (128, 64, 4, 3)):
        assert forward("h100", LONG, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages) is None
    one_loop = {"loops": "single", "masked_stages": 1, "num_warps": 4, "warp_specialize": True}
    assert forward("h100", LONG, block_n=64, **one_loop) is None and forward("h100", LONG, **one_loop) is None
    assert forward("a100", "b1 h8 s4096 d64 bf16", block_m=128, block_n=64, num_warps=4, num_stages=3) is None
    assert forward("mi300x", LONG, block_m=128, block_n=64, num_warps=4, num_stages=1, masked_stages=1) is None
    for block_m, block_n, warps, stages in ((64, 128, 8, 3), (64, 64, 8, 2), (64, 64, 4, 3), (32, 128, 8, 2)):
        tile = {"dkdv_block_m": block_m, "dkdv_block_n": block_n, "dkdv_warps": warps, "dkdv_stages": stages}
        assert backward("h100", LONG, **tile) is None
    for block_m, block_n, warps, stages in ((128, 128, 8, 2), (64, 128, 8, 2), (128, 64, 8, 3)):
        tile = {"dq_block_m": block_m, "dq_block_n": block_n, "dq_warps": warps, "dq_stages": stages}
        assert backward("h100", LONG, **tile) is None


def test_each_rule_of_the_backward_space_removes_what_it_says() -> None:
    assert backward("h200", LONG) is None
    assert backward("h200", "b1 h1 s20 d64 bf16", dq_block_n=64) == "tile_exceeds_length"
    assert backward("h200", LONG, dkdv_block_m=128, dkdv_block_n=16) == "causal_tile_shape"
    assert backward("rtx4090", LONG, dkdv_block_m=128, dkdv_stages=3) == "shared_memory"
    assert backward("h200", LONG, dkdv_warps=4, dkdv_block_m=64) == "registers"


DECODING = "b4 h32/8 q1 k8192 d128 bf16 causal"


def decode(device: str, problem: str, **changes: object) -> str | None:
    parsed, target = parse_problem(problem), TARGETS[device]
    config = Config({**flash_decode.default(parsed, target), **changes})  # type: ignore[dict-item]
    broken = flash_decode.space(parsed, target).broken_rule(config)
    return broken.name if broken else None


def test_each_rule_of_the_decoding_space_removes_what_it_says() -> None:
    assert decode("h200", DECODING) is None
    assert decode("h200", DECODING, block_m=32) == "tile_exceeds_length"
    assert decode("h200", DECODING, num_warps=8) == "warps_per_tile"
    assert decode("h200", DECODING, block_n=128, num_splits=128) == "splits_exceed_blocks"
    assert decode("h200", f"{DECODING} window=100", num_splits=4) == "splits_exceed_blocks"
    assert decode("h200", "b4 h32/8 q512 k8192 d128 bf16", num_splits=64) == "scratch_memory"
    assert decode("h200", DECODING, block_n=128, num_stages=5) == "shared_memory"
    assert decode("h200", "b4 h32/8 q32 k8192 d256 bf16", block_m=128, num_warps=4) == "registers"


@pytest.mark.parametrize("device", TARGETS)
def test_default_splits_occupy_every_multiprocessor_and_leave_none_without_a_key_block(device: str) -> None:
    target = TARGETS[device]
    for batch, kv_len, q_len in itertools.product((1, 4, 64, 1000), (1, 100, 8192, 131072), (1, 4)):
        problem = parse_problem(f"b{batch} h32/8 q{q_len} k{kv_len} d128 bf16 causal")
        config = flash_decode.default(problem, target)
        rows = -(-q_len * 4 // int(config["block_m"]))
        programs, splits = batch * 8 * rows, int(config["num_splits"])
        assert splits == 1 or splits * int(config["block_n"]) <= kv_len + int(config["block_n"])
        assert splits == 1 or programs * splits < 2 * target.multiprocessors
        # Either every multiprocessor has a program, or twice as many splits are not to be had.
        doubled = Config({**config, "num_splits": 2 * splits})
        space = flash_decode.space(problem, target)
        legal = 2 * splits in space.params[2].values and space.broken_rule(doubled) is None
        assert programs * splits >= target.multiprocessors or not legal


def test_descriptors_are_offered_where_a_page_holds_a_whole_key_block() -> None:
    pages = f"{DECODING} paged=64"
    assert decode("h200", pages) is None and decode("h200", pages, load="tma") is None
    assert decode("h200", pages, load="tma", block_n=128, num_splits=1) == "descriptor_pages"
    assert decode("h200", pages, load="tma", loops="single") == "descriptor_pages"
    assert decode("h200", pages, block_n=128, num_splits=1) is None
    for problem in (f"{DECODING} paged=24", f"{DECODING} paged=64 window=100"):
        assert decode("h200", problem) is None
        assert flash_decode.space(parse_problem(problem), TARGETS["h200"]).params[5].values == ("pointer",)


def test_a_left_window_is_masked_in_one_loop() -> None:
    offered = {
        mask: flash_decode.space(parse_problem(f"b4 h32/8 q1 k8192 d128 bf16 {mask}"), TARGETS["h200"]).params[6].values
        for mask in ("", "causal", "causal window=512")
    }
    assert offered == {"": ("split",), "causal": ("split", "single"), "causal window=512": ("single",)}


@pytest.mark.parametrize("device", ["a100", "rtx4090", "mi300x"])
def test_only_gpus_with_descriptors_are_offered_them(device: str) -> None:
    problem = parse_problem(LONG)
    offered = {param.name: param.values for param in flash_fwd.space(problem, TARGETS[device]).params}
    assert offered["load"] == ("pointer",) and offered["warp_specialize"] == (False,)
    assert offered["cache_hints"] == ((False,) if device == "mi300x" else (False, True))
    offered = {param.name: param.values for param in flash_fwd.space(problem, TARGETS["h200"]).params}
    assert offered["load"] == ("pointer", "tma", "tma_kv")
    unaligned = flash_fwd.space(parse_problem("b1 h1 s64 d100 bf16"), TARGETS["h200"])
    assert {param.name: param.values for param in unaligned.params}["load"] == ("pointer",)


def test_only_fp32_has_a_choice_of_products() -> None:
    for device, dtype, values in (
        ("h200", "fp32", ("ieee", "tf32", "tf32x3")), ("mi300x", "fp32", ("ieee", "tf32")), ("h200", "bf16", ("ieee",)),
    ):  # fmt: skip
        space = flash_fwd.space(parse_problem(f"b1 h1 s64 d64 {dtype}"), TARGETS[device])
        assert {param.name: param.values for param in space.params}["precision"] == values


@pytest.mark.parametrize("name", SPACES)
def test_a_space_can_be_enumerated(name: str) -> None:
    space = SPACES[name].space(parse_problem(f"{LONG} {PASSES[name]}"), TARGETS["h200"])
    census = space.census
    assert 0 < census.legal < census.size and census.size == census.legal + sum(census.pruned.values())
    assert all(param.why and not param.why.endswith(".") for param in space.params)
