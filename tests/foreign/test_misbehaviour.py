"""Each way to misbehave is a finding with its own name; a well-behaved implementation has none."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import suite
from harness.cases import Case
from harness.errors import RefusedError, SubjectError
from harness.foreign import Foreign, adapt, load
from harness.inputs import draw
from harness.judges import JUDGES
from harness.problem import parse_problem
from harness.properties import property_for
from harness.witness import FAULTS, poisoned

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FORWARD = "b1 h2 s5 d16 fp16 fwd"
BACKWARD = "b1 h2 s5 d16 fp32 bwd"


@pytest.fixture(scope="module")
def misbehaving(implementations):
    sys.path.insert(0, str(HERE))
    import misbehaving

    sys.path.remove(str(HERE))
    return misbehaving


def case_of(problem: str, **changes) -> Case:
    return Case(kernel="x", problem=problem, config={}, recipe="normal", seed=1, lies={}, **changes)


def faults_of(subject, problem: str) -> list[str]:
    asked = parse_problem(problem)
    values = draw(asked, seed=1)
    return list(subject.run(asked, values).faults)


# The function, the problem that shows it, and the fault.
FAULTY = (
    ("returns_an_array", FORWARD, "not a tensor: out is ndarray"),
    ("returns_nothing", FORWARD, "not a tensor: out is NoneType"),
    ("returns_a_subclass", FORWARD, "tensor subclass: out is Lazy"),
    ("returns_axes_swapped", FORWARD, "wrong shape: out has (1, 5, 2, 16), not (1, 2, 5, 16)"),
    ("returns_fp64", FORWARD, "wrong dtype: out has torch.float64, not torch.float16"),
    ("returns_meta", FORWARD, "wrong device: out is on meta, not on cpu"),
    ("scales_q_in_place", FORWARD, "mutated input: q was written to"),
    ("writes_beside_k", FORWARD, "mutated input: k was written to, -1 elements from its start"),
    ("answers_in_q", FORWARD, "aliased input: out lies in the memory of q"),
    ("answers_with_a_view", "b1 h2 q5 k1 d16 fp16 fwd", "aliased input: out lies in the memory of v"),
    ("answers_in_one_buffer", FORWARD, "stale memory: out lies where out of the call before still does"),
    ("answers_in_one_buffer", FORWARD, "stale memory: out changed when the function was called again"),
    ("remembers_by_pointer", FORWARD, "cached answer: out did not change with the sign of an input"),
    ("remembers_gradients", BACKWARD, "cached answer: dq, dk, dv did not change with the sign of an input"),
    ("leaves_the_last_row", FORWARD, "uninitialized memory: 32 of 160 elements of out are what torch.empty held"),
    ("detaches", BACKWARD, "no gradient: out is detached from q, k and v"),
    ("detaches_k", BACKWARD, "no gradient: out does not depend on k"),
)


@pytest.mark.parametrize(
    ("name", "problem", "fault"), FAULTY, ids=[f"{row[0]}-{row[2].split(':')[0]}" for row in FAULTY]
)
def test_a_fault_has_its_name(misbehaving, name, problem, fault):
    subject = adapt(getattr(misbehaving, name), "sdpa")
    assert fault in faults_of(subject, problem)
    assert fault.partition(":")[0] in FAULTS
    finding, _ = JUDGES["bound"].find(subject, case_of(problem))
    assert finding is not None
    # The property about memory says it as well, so that no campaign depends on one judge.
    checks = property_for("memory").judge(subject, parse_problem(problem), np.random.default_rng(0))
    assert any(check.output == "memory" and not check.ratio <= 1 for check in checks)


def test_every_fault_has_a_test():
    others = {"no log-sum-exp", "no Triton"}
    assert {fault.partition(":")[0] for _, _, fault in FAULTY} | others == set(FAULTS)


@pytest.mark.parametrize("signature", ["sdpa", "flash", "flex", "ours"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_a_good_one_has_no_fault(implementations, signature, pass_):
    subject = adapt(getattr(implementations, signature), signature)
    for dtype in ("fp16", "bf16", "fp32"):
        for shape in ("b2 h4/2 q5 k9 d16/24", "b1 h1 q9 k5 d3", "b1 h2 s1 d16", "b1 h2 q3 k1 d16"):
            problem = f"{shape} {dtype} causal {pass_}"
            assert faults_of(subject, problem) == []
            assert JUDGES["bound"].find(subject, case_of(problem))[0] is None


def test_a_promised_log_sum_exp_has_to_come_and_to_be_fp32(misbehaving, implementations):
    assert faults_of(adapt(misbehaving.out_only, "ours", ("lse",)), FORWARD) == [
        "no log-sum-exp: only out was returned"
    ]
    # Without the promise it is not missed.
    assert faults_of(adapt(misbehaving.out_only, "ours"), FORWARD) == []
    assert faults_of(adapt(misbehaving.lse_of_16_bits, "ours"), FORWARD) == [
        "wrong dtype: lse has torch.float16, not torch.float32"
    ]
    for signature in ("flash", "ours"):
        answer = adapt(getattr(implementations, signature), signature).run(
            parse_problem(FORWARD), draw(parse_problem(FORWARD), seed=0)
        )
        assert set(answer.outputs) == {"out", "lse"}
    flex = adapt(implementations.flex, "flex", ("lse",))
    assert set(flex.run(parse_problem(FORWARD), draw(parse_problem(FORWARD), seed=0)).outputs) == {"out", "lse"}


def test_a_log_sum_exp_is_judged(implementations):
    def in_bits(q, k, v, **keywords):
        out, lse = implementations.ours(q, k, v, **keywords)
        return out, lse / np.log(2.0)

    finding, _ = JUDGES["bound"].find(adapt(in_bits, "ours"), case_of(FORWARD))
    assert finding is not None and finding.detail.startswith("lse[")


def test_half_a_pointer_cache_is_found_by_repetition(misbehaving):
    """Negating v shows nothing where only K is remembered; other values at the same addresses do."""
    subject = adapt(misbehaving.remembers_k_by_pointer, "sdpa")
    assert faults_of(subject, "b1 h2 s5 d16 fp32 fwd") == []
    problem = parse_problem("b1 h2 s5 d16 fp32 causal fwd")
    checks = property_for("repetition").judge(subject, problem, np.random.default_rng(0))
    assert any(not check.ratio <= 1 for check in checks)


def test_equal_inputs_give_equal_bits(misbehaving):
    finding, _ = JUDGES["repeat"].find(adapt(misbehaving.is_random, "sdpa"), case_of("b1 h2 s5 d16 fp32 fwd"))
    assert finding is not None and "differ between two runs" in finding.detail


def test_what_is_raised_is_a_finding_whatever_its_type(misbehaving):
    subject = adapt(misbehaving.raises, "sdpa")
    with pytest.raises(SubjectError, match="CustomError: out of luck in `b1 h2 s5"):
        faults_of(subject, FORWARD)
    finding, checks = suite.ask(subject, case_of(FORWARD), "bound")
    assert finding is not None and finding.judge == "exception" and checks == ()


def test_not_implemented_is_a_refusal_until_support_is_stated(misbehaving):
    with pytest.raises(RefusedError, match="head dim 16"):
        faults_of(adapt(misbehaving.is_not_implemented, "sdpa"), FORWARD)
    with pytest.raises(SubjectError, match="NotImplementedError: head dim 16"):
        faults_of(adapt(misbehaving.is_not_implemented, "sdpa", ("fwd", "fp16")), FORWARD)


def test_a_refused_problem_is_not_run(misbehaving):
    with pytest.raises(RefusedError, match="does not support `fwd`"):
        faults_of(adapt(misbehaving.raises, "sdpa", ("bwd",)), FORWARD)


def test_poison_is_in_every_empty_tensor_and_goes_again():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        assert torch.empty(4).isnan().all() and torch.empty_like(torch.ones(3, dtype=torch.float16)).isnan().all()
        assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(
    ("kind", "expected"), [("launches", "[]"), ("falls_back", "['no Triton: no kernel was launched']")]
)
def test_a_claimed_triton_kernel_has_to_be_launched(kind, expected):
    """In a process of its own, where Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{HERE}"}
    command = [sys.executable, "-W", "ignore", str(HERE / "triton_claims.py"), kind]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.strip() == expected


def test_compiled_launches_are_counted_too(monkeypatch):
    from triton.runtime.jit import JITFunction

    from harness.witness import counted

    monkeypatch.setattr(JITFunction, "run", lambda self, *given, **keywords: "ran")
    original = JITFunction.run
    with counted() as launches:
        assert JITFunction.run(None) == "ran" and JITFunction.run(None, grid=(1,)) == "ran"
    assert launches == [2] and JITFunction.run is original


def test_strides_arrive_unless_they_are_not_supported(implementations):
    seen = {}

    def looks(q, k, v, **keywords):
        seen["q"], seen["k"] = q.stride(), k.stride()
        return implementations.sdpa(q, k, v, **keywords)

    problem = parse_problem("b1 h2 s5 d16 fp32 fwd")
    values = draw(problem, seed=0)
    values["q"] = values["q"].transpose(1, 2).contiguous().transpose(1, 2)
    values["k"] = values["k"].mT.contiguous().mT
    for words, q, k in (
        ((), (160, 16, 32, 1), (160, 80, 1, 5)),
        (("no-transposed",), (160, 16, 32, 1), (160, 80, 16, 1)),
        (("no-strides",), (160, 80, 16, 1), (160, 80, 16, 1)),
    ):
        assert adapt(looks, "sdpa", words).run(problem, values).faults == ()
        assert (seen["q"], seen["k"]) == (q, k)


def test_loading_by_name_is_the_same_subject(misbehaving):
    subject = load(Foreign("misbehaving:returns_fp64", "sdpa", ("fwd",)))
    assert faults_of(subject, FORWARD) == ["wrong dtype: out has torch.float64, not torch.float16"]
