"""The suite's choices: the same for everybody, dependent on the case alone, and what shrinking ends at."""

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from harness import suite
from harness.bounds import RoundingContract, contract_for
from harness.cases import Case, Lie, Patch, case_strategy, like
from harness.errors import RefusedError, SubjectError, UsageError
from harness.footprint import zeros
from harness.fuzz_child import Fuzzer, Plan
from harness.inputs import DTYPES
from harness.judges import JUDGES
from harness.oracle import backward, forward
from harness.problem import Problem, parse_problem
from harness.shrink import shrink
from harness.space import Config
from harness.subject import Answer

CONFIGS = {"fp16": [Config({"block_m": 16, "block_n": 16}), Config({"block_m": 64, "block_n": 32})]}
CASE = Case(
    kernel="k", problem="b2 h4/2 q33 k47 d40 fp16 causal window=9 scale=0.5 bshd fwd", config={"block_m": 64, "block_n": 32},
    recipe="outliers", seed=7, lies={"k": Lie(row_padding=3)}, patches=(Patch(tensor="q", position=3, value=1.0),),
)  # fmt: skip


class Perfect:
    """The oracle as a subject; `hook` may spoil what it gives."""

    name = "perfect"

    def __init__(self, hook=lambda problem: None) -> None:
        self.hook = hook

    def refuses(self, problem: Problem) -> str | None:
        return None

    def contract(self, problem: Problem) -> RoundingContract:
        return contract_for(problem.dtype)

    def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
        self.hook(problem)
        exact = forward(problem, inputs) if problem.pass_ == "fwd" else backward(problem, inputs)
        return Answer(
            outputs={name: v.to(torch.float32 if name == "lse" else DTYPES[problem.dtype]) for name, v in exact.items()}
        )


def test_a_case_alone_decides_who_is_asked() -> None:
    first = suite.judges_for(Perfect(), CASE, 4)
    assert first == suite.judges_for(Perfect(), CASE, 4)
    assert first[0] == "bound"
    assert len(set(first)) == 5
    others = {tuple(suite.judges_for(Perfect(), replace(CASE, seed=seed), 4)) for seed in range(8)}
    assert len(others) > 4


def test_judges_that_need_a_kernel_file_are_not_asked_about_a_function() -> None:
    for seed in range(20):
        names = suite.judges_for(Perfect(), replace(CASE, seed=seed), 30)
        assert not {"shadow", "far", "fp64"} & set(names)


def test_a_campaign_is_the_same_sequence_for_everybody() -> None:
    strategy = case_strategy("k", "fwd", CONFIGS)
    first = suite.fixed_cases(strategy, 30, 3)
    assert first == suite.fixed_cases(strategy, 30, 3)
    assert first[:10] == suite.fixed_cases(strategy, 10, 3)
    assert len({case.id for case in first}) == 30
    assert first != suite.fixed_cases(strategy, 30, 4)


def test_cases_like_a_problem_have_its_head_dims_and_mask() -> None:
    wanted = parse_problem("b4 h32/8 s4096 d128/64 bf16 causal window=1024 bshd")
    for case in suite.fixed_cases(case_strategy("k", "fwd", {"bf16": CONFIGS["fp16"]}, shape=like(wanted)), 20, 0):
        asked = case.asked
        assert (asked.head_dim, asked.v_head_dim, asked.dtype, asked.layout) == (128, 64, "bf16", "bshd")
        assert asked.causal
        assert asked.window_left is not None
        assert max(asked.q_len, asked.kv_len) <= 130


def test_on_a_device_the_cases_of_a_round_share_what_is_compiled_in() -> None:
    root = Path(__file__).parents[2]
    configs = {"fp16": [{"block_m": side, "block_n": 16, "load": "pointer"} for side in (16, 32, 64, 128)]}
    plan = Plan(seed=0, seconds=1, cases=1, root=root, kernel="flash_fwd", device="cuda", configs=configs)
    fuzzer = Fuzzer(plan, io.StringIO())
    rounds = [suite.fixed_cases(fuzzer._strategy(seed), 10, seed) for seed in range(6)]
    families = set()
    for cases in rounds:
        (family,) = {(str(c.config), c.asked.head_dim, c.asked.v_head_dim, c.asked.causal) for c in cases}
        families.add(family)
        assert len({case.asked.q_len for case in cases}) > 1
    assert len(families) > 3


class Restless(Perfect):
    """Right within its bounds; the last bit of dq changes from run to run, unless sums are exact in any order. `always`: even
    then."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.runs, self.always = 0, always

    def contract(self, problem: Problem) -> RoundingContract:
        return replace(contract_for(problem.dtype), reproducible=not problem.nondeterministic)

    def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
        self.runs += 1
        answer = super().run(problem, inputs)
        probe = bool((inputs["dout"].abs().sum(-1) <= 1).all())
        if self.always or not probe:
            bits = answer.outputs["dq"].view(torch.int16)
            bits ^= self.runs % 2 * (answer.outputs["dq"] != 0).to(torch.int16)
        return answer


@pytest.mark.parametrize("name", ["repeat", "repetition"])
def test_other_bits_in_every_run_are_flaky_only_where_sums_are_exact_or_nobody_allowed_them(name: str) -> None:
    allowed = replace(CASE, problem="b1 h4/2 q33 k32 d16 fp16 softcap=2.0 nondeterministic bwd", lies={}, patches=())
    forbidden = replace(allowed, problem=allowed.problem.replace(" nondeterministic", ""))
    assert JUDGES[name].find(Restless(always=False), allowed)[0] is None
    assert JUDGES[name].find(Restless(always=False), allowed)[1]
    # Two runs of the other judge may lie two bounds apart.
    assert name != "repeat" or JUDGES[name].find(Restless(always=True), allowed)[0]
    assert JUDGES[name].find(Restless(always=False), forbidden)[0]
    wide = replace(allowed, problem=allowed.problem.replace("fp16", "fp32"))
    assert JUDGES["repeat"].excludes(Perfect(), wide) and not JUDGES["repeat"].excludes(Perfect(), allowed)


class Flickering(Perfect):
    """Right but for one run."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.runs, self.wrong = 0, wrong

    def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
        answer = super().run(problem, inputs)
        self.runs += 1
        if self.runs == self.wrong:
            answer.outputs["out"][0, 0, 0, 0] += 1
        return answer


@pytest.mark.parametrize(("wrong", "seen"), [(2, True), (10, True), (11, False)])
def test_a_difference_between_ten_runs_is_seen(wrong: int, seen: bool) -> None:
    subject = Flickering(wrong)
    finding, _ = suite.ask(subject, replace(CASE, lies={}, patches=()), "repeat")
    assert (finding is not None) == seen
    assert subject.runs == min(wrong, 10)


@pytest.mark.parametrize(
    ("raised", "judge"), [(SubjectError("RuntimeError: no"), "exception"), (RefusedError("not this"), None)]
)
def test_what_a_subject_raises_is_a_finding_and_a_refusal_is_nothing(raised: Exception, judge: str | None) -> None:
    def hook(problem: Problem) -> None:
        raise raised

    finding, checks = suite.ask(Perfect(hook), CASE, "bound")
    assert (finding.judge if finding else None) == judge
    assert checks == ()


def test_an_output_that_is_missing_without_a_word_does_not_pass() -> None:
    class Silent(Perfect):
        def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
            answer = super().run(problem, inputs)
            return Answer(outputs={name: output for name, output in answer.outputs.items() if name == "lse"})

    finding, _ = suite.ask(Silent(), replace(CASE, lies={}, patches=()), "bound")
    assert finding is not None
    assert "gave no out" in finding.detail


def test_an_unknown_profile_is_named() -> None:
    with pytest.raises(UsageError, match="there is no profile `nigthly`"):
        suite.profile_for("nigthly")
    assert set(suite.PROFILES) == {"pr", "nightly", "gpu", "mutation", "repro"}


def test_shrinking_ends_at_what_the_failure_needs() -> None:
    asked = []

    def fails(case: Case) -> bool:
        asked.append(case)
        return case.asked.causal and case.asked.kv_len >= 3

    found = shrink(CASE, CONFIGS, fails)
    assert found.problem == "b1 h1 q1 k3 d16 fp16 causal fwd"
    assert (found.lies, found.patches, found.recipe, found.seed) == ({}, (), "normal", 0)
    assert found.config == {"block_m": 16, "block_n": 16}
    assert len(asked) <= 120
    assert len({case.id for case in asked}) == len(asked)


def test_shrinking_keeps_what_the_failure_needs_and_stops_in_time() -> None:
    needed = shrink(
        CASE, CONFIGS, lambda case: bool(case.patches) and case.recipe == "outliers" and case.asked.group == 2
    )
    assert needed.patches
    assert needed.recipe == "outliers"
    assert needed.asked.group == 2
    assert not needed.lies
    assert shrink(CASE, CONFIGS, lambda case: False) == CASE
    assert shrink(CASE, CONFIGS, lambda case: True, most=0) == CASE


def test_a_vast_vector_of_zeros_costs_nothing_until_it_is_written() -> None:
    vast = zeros(1 << 36, np.int32)
    assert vast.nbytes == 1 << 38
    assert vast[-1] == 0
    vast[1 << 35] = 5
    assert vast[1 << 35] == 5
    assert zeros(10, np.uint8).tolist() == [0] * 10
