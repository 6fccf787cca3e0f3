"""Published figures: they must agree with each other, and every target must be found by name."""

import pytest

from harness.device import TARGETS, DeviceFacts, find_target
from harness.errors import UsageError

# Dense fp16 operations of a multiprocessor (or compute unit) in a clock, from the makers' architecture papers.
PER_CLOCK = {"a100": 2048, "h100": 4096, "h200": 4096, "b200": 8192, "rtx4090": 512, "mi300x": 2048}


@pytest.mark.parametrize(("name", "expected"), list(PER_CLOCK.items()))
def test_matrix_rates_follow_from_units_and_clock(name: str, expected: int) -> None:
    facts = TARGETS[name]
    per_clock = facts.matrix_tflops["fp16"] * 1e6 / facts.multiprocessors / facts.clock_mhz
    assert per_clock == pytest.approx(expected, rel=0.01)
    assert facts.matrix_tflops["bf16"] == facts.matrix_tflops["fp16"]
    assert facts.matrix_tflops["tf32"] == pytest.approx(facts.matrix_tflops["fp16"] / 2)


@pytest.mark.parametrize("facts", TARGETS.values(), ids=list(TARGETS))
def test_figures_agree_with_each_other(facts: DeviceFacts) -> None:
    lanes = facts.multiprocessors * facts.fma_per_clock * 2 * facts.clock_mhz / 1e6
    # Some makers publish the fp32 rate at a higher clock than the matrix rate.
    assert lanes <= facts.matrix_tflops["fp32"] * 1.01 <= lanes * 1.12
    assert facts.shared_bytes_per_block <= facts.shared_bytes_per_sm
    assert facts.registers_per_sm * 4 in (256 << 10, 512 << 10)
    assert facts.vendor in ("cuda", "hip")
    assert facts.source


@pytest.mark.parametrize("facts", [facts for facts in TARGETS.values() if facts.vendor == "cuda"], ids=lambda f: f.name)
def test_nvidia_keeps_a_kibibyte_of_each_block(facts: DeviceFacts) -> None:
    assert facts.shared_bytes_per_sm - facts.shared_bytes_per_block == 1024
    assert facts.compute_capability == int(facts.arch[3:])


def test_a_bare_architecture_is_a_target() -> None:
    hopper = find_target("sm_90")
    assert hopper.name == hopper.arch == "sm_90"
    assert hopper.matrix_tflops == find_target("h100").matrix_tflops
    assert find_target("gfx942").vendor == "hip"
    assert find_target("gfx942").compute_capability == 0


def test_names_are_found_in_any_case() -> None:
    assert find_target(" H200 ") is TARGETS["h200"]


def test_a_misspelt_target_gets_a_hint() -> None:
    with pytest.raises(UsageError, match="h20O") as refusal:
        find_target("h20O")
    assert "did you mean `h200`?" in refusal.value.hint
    with pytest.raises(UsageError) as unknown:
        find_target("tpu")
    assert "mi300x" in unknown.value.hint
