"""The bounds against a correct kernel and against subtly imprecise ones: neither loose nor wrong."""

from collections import defaultdict
from dataclasses import replace

import pytest

from harness import bounds, compare, inputs, verify
from harness.gate_cases import GateCase
from harness.problem import parse_problem

CONFIG = {"block_m": 32, "block_n": 32}
PROBLEMS = (
    "b1 h4/2 s160 d64",
    "b2 h2 q96 k170 d128 causal",
    "b1 h4/1 q170 k131 d40/72 causal window=50",
    "b1 h2 q70 k190 d32 window=30:20",
    "b1 h1 s700 d64 causal",
    "b1 h2 s90 d16 scale=1.0",
)


def worst_ratios(emulated, dtype: str, pass_: str, recipe: str = "normal", defect: str = "") -> dict[str, float]:
    """The greatest error over bound of every output over all problems."""
    found: dict[str, float] = defaultdict(float)
    contract = bounds.contract_for(dtype, key_block=CONFIG["block_n"])
    for text in PROBLEMS:
        problem = parse_problem(f"{text} {dtype} {pass_}")
        question = verify._ask(GateCase(problem, recipe, "plain"), 11, contract, "cpu")
        answer = verify._answer(emulated.Emulated(pass_, defect), question, CONFIG, large=False)
        for check in compare.judge(answer.views(), question.expected, case=text):
            found[check.output] = max(found[check.output], check.ratio)
    return dict(found)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_a_correct_kernel_fills_a_good_part_of_its_bounds(emulated, dtype, pass_):
    ratios = worst_ratios(emulated, dtype, pass_)
    # All of lse is fp32, where exp2 and log2 may be off by two units in the last place but here are off by one.
    assert 0.05 < ratios.pop("lse", 0.1) < 1
    assert all(0.25 < ratio < 1 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_fp32_stays_within_and_not_ten_times_below(emulated, pass_):
    ratios = worst_ratios(emulated, "fp32", pass_)
    assert all(0.1 < ratio < 1 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("recipe", [*(name for name in inputs.RECIPES if name != "normal"), "sunk"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_unusual_inputs_raise_no_false_alarm(emulated, dtype, recipe):
    passes = ("fwd",) if recipe in ("counting", "sunk") else ("fwd", "bwd")
    ratios = {name: ratio for pass_ in passes for name, ratio in worst_ratios(emulated, dtype, pass_, recipe).items()}
    assert all(ratio < 1 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("dtype", "pass_", "defect", "output"),
    [
        ("fp16", "fwd", "fp8 weights", "out"),
        ("fp16", "fwd", "16-bit accumulator", "out"),
        ("fp16", "fwd", "one in 256", "out"),
        ("fp16", "fwd", "16-bit lse", "lse"),
        ("bf16", "fwd", "fp8 weights", "out"),
        ("bf16", "fwd", "16-bit lse", "lse"),
        ("fp32", "fwd", "tf32", "out"),
        ("fp32", "fwd", "tf32", "lse"),
        ("fp16", "bwd", "fp8 dS", "dq"),
        ("fp16", "bwd", "fp8 dS", "dk"),
    ],
)
def test_a_coarser_precision_than_agreed_is_out_of_bounds(emulated, dtype, pass_, defect, output):
    assert worst_ratios(emulated, dtype, pass_, defect=defect)[output] > 1


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_forward_pass_may_hand_its_own_results_to_the_backward_pass(emulated, dtype):
    """`chained` bounds hold, and are not much wider than those for ideal out and lse."""
    contract = bounds.contract_for(dtype, key_block=CONFIG["block_n"], chained=True)
    for text in PROBLEMS:
        forward, backward = (parse_problem(f"{text} {dtype} {pass_}") for pass_ in ("fwd", "bwd"))
        question = verify._ask(GateCase(backward, "normal", "plain"), 5, contract, "cpu")
        asked = replace(question, asked=GateCase(forward, "normal", "plain"))
        made = verify._answer(emulated.Emulated("fwd"), asked, CONFIG, large=False).views()
        chained = replace(question, values={**question.values, **made})
        answer = verify._answer(emulated.Emulated("bwd"), chained, CONFIG, large=False)
        for check in compare.judge(answer.views(), question.expected, case=text):
            assert 0.1 < check.ratio < 1, check
