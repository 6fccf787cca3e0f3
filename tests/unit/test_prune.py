"""Static rules: each fires just above its limit, says so in words, and leaves alone what is at the limit."""

from typing import Any

import pytest

from harness.device import find_target
from harness.outcome import Artifact, Binary, Loop
from harness.prune import RULES, blocks_per_multiprocessor, prune
from harness.space import Config

H100 = find_target("h100")


def binary(**changes: Any) -> Binary:
    values: dict[str, Any] = {
        "kernel": "attend", "registers": 128, "spill_bytes": 0, "shared_bytes": 64 << 10, "warps": 4,
        "instructions": {"matrix": 8, "global_store": 1}, "loops": (Loop(instructions={"matrix": 8}),), "code_hash": "x",
    }  # fmt: skip
    return Binary(**(values | changes))


def judged(*binaries: Binary, **config: Any) -> Any:
    return prune(Artifact(binaries=binaries, toolchain="test"), Config(config), H100)


def test_a_modest_candidate_may_run() -> None:
    assert judged(binary()) is None


@pytest.mark.parametrize(
    ("rule", "detail", "over", "at"),
    [
        (
            "shared_memory", "`attend` needs 300 KiB of shared memory, device has 227 KiB",
            {"shared_bytes": 300 << 10}, {"shared_bytes": 227 << 10},
        ),
        (
            "registers", "`attend` needs 69632 registers per block, device has 65536",
            {"registers": 129, "warps": 16}, {"registers": 128, "warps": 16},
        ),
        (
            "registers", "`attend` needs 256 registers per thread, device has 255",
            {"registers": 256}, {"registers": 255},
        ),
        (
            "spills", "`attend` spills 72 bytes per thread, limit is 64",
            {"spill_bytes": 72}, {"spill_bytes": 64},
        ),
    ],
)  # fmt: skip
def test_a_rule_fires_above_its_limit(rule: str, detail: str, over: dict[str, int], at: dict[str, int]) -> None:
    pruned = judged(binary(**over))
    assert (pruned.rule, pruned.detail) == (rule, detail)
    assert judged(binary(**at)) is None


@pytest.mark.parametrize("kind", ["global_store", "atomic", "tma"])
def test_what_stores_nothing_is_no_kernel(kind: str) -> None:
    """Triton 3.6 compiles what needs too much tensor memory to these instructions and no error."""
    trap = {"other": 14, "alu": 1, "branch": 1}
    pruned = judged(binary(instructions=trap, loops=(), registers=4))
    assert pruned.rule == "trap" and "`attend` stores nothing" in pruned.detail
    assert judged(binary(instructions=trap | {kind: 1}, loops=())) is None


def test_a_fraction_of_a_kibibyte_is_shown() -> None:
    assert "needs 227.5 KiB" in judged(binary(shared_bytes=(227 << 10) + 512)).detail


def test_specialization_that_was_asked_for_must_be_there() -> None:
    pruned = judged(binary(warps=8), warp_specialize=True)
    assert pruned.rule == "warp_specialization"
    assert "8 plain warps" in pruned.detail
    assert judged(binary(warps=12, specialized=True), warp_specialize=True) is None
    assert judged(binary(warps=8), warp_specialize=False) is None
    assert judged(binary(warps=8)) is None


def test_small_launches_without_a_loop_are_not_asked_to_specialize() -> None:
    preprocess = binary(kernel="delta", loops=(), instructions={"fma": 3, "global_store": 1})
    assert judged(preprocess, binary(specialized=True), warp_specialize=True) is None


def test_every_binary_is_looked_at() -> None:
    assert judged(binary(), binary(kernel="second", spill_bytes=800)).detail.startswith("`second`")


def test_every_rule_has_a_name_and_a_reason() -> None:
    assert [rule.name for rule in RULES] == ["trap", "shared_memory", "registers", "spills", "warp_specialization"]
    assert all(rule.why for rule in RULES)


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"registers": 255, "shared_bytes": 0}, 2),  # 256 * 128 registers of 65536
        ({"registers": 168, "shared_bytes": 0}, 3),
        ({"registers": 32, "shared_bytes": 0}, 16),  # 4 of 64 warps each
        ({"registers": 32, "shared_bytes": 0, "warps": 1}, 32),  # slots
        ({"registers": 32, "shared_bytes": 113 << 10}, 2),  # 228 KiB, 1 KiB kept of each block
        ({"registers": 32, "shared_bytes": (113 << 10) + 16}, 1),
        ({"registers": 32, "shared_bytes": 230 << 10}, 0),
    ],
)
def test_what_fits_on_a_multiprocessor(changes: dict[str, int], blocks: int) -> None:
    assert blocks_per_multiprocessor(binary(**changes), H100) == blocks


def test_amd_shares_its_local_memory_whole() -> None:
    assert blocks_per_multiprocessor(binary(registers=64, shared_bytes=32 << 10), find_target("mi300x")) == 2
