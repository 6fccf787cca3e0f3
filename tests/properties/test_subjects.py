"""Kernels as subjects: guarded memory, fp64 mode, and properties that a correct kernel and a foreign library keep."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import bounds, compare, inputs, oracle
from harness.errors import UsageError
from harness.inputs import Placement
from harness.problem import parse_problem
from harness.properties import PROPERTIES, agreement, property_for
from harness.subject import KernelSubject, workspaces_of

HERE = Path(__file__).parent
CONFIG = {"block_m": 16, "block_n": 16}
PROBLEM = parse_problem("b1 h2/1 s20 d16 fp16 causal")


def test_inputs_keep_strides_and_outputs_lie_as_told(emulated):
    kernel = emulated.Emulated("fwd")
    padded = Placement(order=(0, 2, 1, 3), row_padding=3, shift=5)
    subject = KernelSubject(kernel=kernel, config=CONFIG, outputs={"out": padded})
    values = inputs.draw(PROBLEM, seed=0)
    values["k"] = inputs.place("k", values["k"], padded).view
    values["v"] = values["v"][:, :, :1].expand(-1, -1, 20, -1)
    run = subject.run_guarded(PROBLEM, values)
    for given in run.given:
        assert given.view.stride() == values[given.name].stride()
        assert torch.equal(given.view, values[given.name])
        assert given.view.data_ptr() != values[given.name].data_ptr()
    assert run.given[1].view.storage_offset() % 64 == 5
    assert run.made[0].view.stride() == (20 * 38, 19, 38, 1) and run.made[0].view.storage_offset() % 64 == 5
    assert run.faults("x") == []


@pytest.mark.parametrize(("place", "same"), [("fresh", False), ("same", True)])
def test_memory_is_fresh_or_the_same(emulated, place, same):
    subject = KernelSubject(kernel=emulated.Emulated("fwd"), config=CONFIG, place=place)
    values = inputs.draw(PROBLEM, seed=0)
    first = subject.run_guarded(PROBLEM, values)
    earlier = first.views()["out"].clone()
    second = subject.run_guarded(PROBLEM, inputs.draw(PROBLEM, seed=1))
    assert all(
        (one.view.data_ptr() == two.view.data_ptr()) == same for one, two in zip(first.made, second.made, strict=True)
    )
    assert torch.equal(first.views()["out"], earlier) != same
    third = subject.run(PROBLEM, values)
    assert torch.equal(third.outputs["out"], earlier) and third.faults == ()


class Scratchy:
    """A kernel whose scratch depends on a tunable."""

    PASS, PACKED = "fwd", True

    def workspaces(self, q, k, v, *, num_splits):
        return {"sums": ((num_splits, *q.shape), torch.float32)}


def test_scratch_may_depend_on_tunables(emulated):
    values, config = inputs.draw(PROBLEM, seed=0), {**CONFIG, "num_splits": 3}
    assert workspaces_of(Scratchy(), values, config) == {"sums": ((3, 1, 2, 20, 16), torch.float32)}
    assert workspaces_of(emulated.Emulated("fwd"), values, config) == {}
    with pytest.raises(TypeError, match="num_splits"):
        workspaces_of(Scratchy(), values, CONFIG)


def test_a_contract_says_how_keys_and_heads_are_shared_out(emulated):
    plain, split = emulated.Emulated("fwd"), {**CONFIG, "num_splits": 2}
    for kernel, config, where, in_order, packed in (
        (plain, CONFIG, "cpu", True, False), (plain, split, "cpu", False, False), (Scratchy(), CONFIG, "cpu", True, True),
        (Scratchy(), {**CONFIG, "num_splits": 1}, "cuda", True, False),
    ):  # fmt: skip
        contract = KernelSubject(kernel=kernel, config=config, device=where).contract(PROBLEM)
        assert (contract.in_order, contract.one_tile) == (in_order, packed)


@pytest.mark.parametrize(
    ("precision", "error", "passes"), [("ieee", 0.0, 1), ("tf32", 2.0**-9, 1), ("tf32x3", 5 * 2.0**-22, 3)]
)
def test_a_config_is_held_to_the_products_that_it_asks_for(emulated, precision, error, passes):
    """On a device; the interpreter makes them all exactly, and numbers of 16 bits have no choice."""
    subject = KernelSubject(kernel=emulated.Emulated("fwd"), config={**CONFIG, "precision": precision})
    asked = PROBLEM.replace(dtype="fp32")
    assert (subject.contract(asked).product, subject.contract(asked).passes) == (0.0, 1)
    subject = replace(subject, device="cuda")
    assert (subject.contract(asked).product, subject.contract(asked).passes) == (error, passes)
    assert subject.contract(PROBLEM).product == 0.0


def test_a_kernel_refuses_the_other_pass(emulated):
    subject = KernelSubject(kernel=emulated.Emulated("fwd"), config=CONFIG)
    assert subject.refuses(PROBLEM) is None
    assert "fwd pass only" in str(subject.refuses(PROBLEM.replace(pass_="bwd")))


def test_an_unknown_property_is_named():
    with pytest.raises(UsageError, match="no property `hul`"):
        property_for("hul")


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_the_bound_of_fp64_holds_for_exact_results_and_not_for_16_bits(pass_):
    problem = PROBLEM.replace(pass_=pass_)
    values = inputs.draw(problem, seed=2)
    contract = bounds.contract_for("fp64")
    if pass_ == "fwd":
        expected, found = (
            bounds.expect_forward(problem, values, contract, structured=False),
            oracle.forward(problem, values),
        )
    else:
        expected = bounds.expect_backward(problem, values, contract, structured=False)
        found = oracle.backward(problem, values)
    # A scale that is fp32 is as wrong as that, and no more.
    off = {name: value * (1 + 2.0**-27) for name, value in found.items()}
    assert compare.status_of(compare.judge(off, expected, case="")) == "passed"
    for name, value in found.items():
        spoiled = {**off, name: value.half().double()}
        assert compare.status_of(compare.judge(spoiled, expected, case="")) == "wrong", name


def run_campaign(*arguments: str) -> list[dict]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "campaign.py"), *arguments]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


def assert_silent(lines: list[dict], problems: int) -> None:
    assert len({line["problem"] for line in lines}) == problems
    assert sum(line["checks"] for line in lines) > problems
    assert [line for line in lines if line["failed"]] == []


def test_the_kernels_keep_a_sample_of_all_properties():
    assert_silent(run_campaign("11", "4", "0.25"), 4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("double",)], ids=["storage", "fp64"])
def test_the_kernels_keep_all_properties(mode):
    assert_silent(run_campaign("12", "40", "1.0", *mode), 40)


def test_torch_keeps_all_properties(sdpa, problems):
    subject = sdpa.MathSubject()
    judged: dict[str, int] = {}
    for number in range(30):
        problem = problems.random_problem(np.random.default_rng([13, number]), ("fwd", "bwd")[number % 2], "fp32")
        for position, law in enumerate(PROPERTIES):
            checks = law.judge(subject, problem, np.random.default_rng([number, position]))
            failed = [compare.sentence(check) for check in checks if not check.ratio <= 1]
            assert failed == [], f"{law.name} of {problem}"
            judged[law.name] = judged.get(law.name, 0) + len(checks)
    # It gives no log-sum-exp, and its adapter refuses empty tensors.
    assert {name for name, count in judged.items() if not count} == {"split", "more keys", "empty tensors"}


def test_configs_that_disagree_on_a_probe_are_told_apart(emulated):
    good = [KernelSubject(kernel=emulated.Emulated("fwd"), config={**CONFIG, "block_n": side}) for side in (16, 32)]
    bad = KernelSubject(kernel=emulated.Emulated("fwd", "one in 256"), config=CONFIG)
    for seed in range(4):
        passed = agreement(good, PROBLEM, np.random.default_rng(seed))
        assert passed and all(check.ratio == 0 for check in passed)
    found = agreement([*good, bad], PROBLEM, np.random.default_rng(0))
    assert {check.case.partition("[")[2][:9] for check in found if not check.ratio <= 1} == {"subject 2"}
    single = PROBLEM.replace(dtype="fp32")
    assert agreement(good, single, np.random.default_rng(0)) == ()
