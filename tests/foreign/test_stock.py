"""Correct implementations and stock adapters of libraries keep all judges silent; what a library gets wrong is found."""

import importlib.util

import pytest

from harness import in_process, suite
from harness.adapters import read_support
from harness.cases import Case
from harness.foreign import Foreign, adapt, load
from harness.judges import JUDGES
from harness.libraries import STOCK
from harness.problem import parse_problem

PROFILE = suite.profile_for("pr")


def silent(subject, foreign, cases: int, *, least: int, seed: int = 0) -> in_process.Proof:
    from dataclasses import replace

    proof = in_process.prove(subject, foreign, profile=replace(PROFILE, cases=cases, judges=5), seed=seed)
    assert proof.found is None, proof.text()
    assert proof.judges["bound"] >= least, proof
    assert all(0 < ratio <= 1 for ratio in proof.largest.values())
    return proof


@pytest.mark.parametrize("signature", ["sdpa", "flash", "flex", "ours"])
def test_a_correct_implementation_is_silent(implementations, signature):
    subject = adapt(getattr(implementations, signature), signature)
    proof = silent(subject, Foreign(subject.name, signature), 50, least=20)
    assert {"out", "dq", "dk", "dv"} <= set(proof.largest)


def test_claims_that_hold_are_silent_and_ask_more(implementations):
    """In fp32, in loops over rows that BLAS cannot reorder, every bit agrees wherever numbers lie."""
    words = ("fwd", "fp32", "causal", "gqa", "bitwise", "unequal-lengths", "dead-rows")

    def by_rows(q, k, v, *, scale, window_left, window_right, top_left):
        import torch

        heads = []
        for batch in range(q.shape[0]):
            for head in range(q.shape[1]):
                key = k[batch, head // (q.shape[1] // k.shape[1])].contiguous()
                value = v[batch, head // (q.shape[1] // k.shape[1])].contiguous()
                rows = []
                offset = 0 if top_left else k.shape[2] - q.shape[2]
                for row in range(q.shape[2]):
                    last = k.shape[2] if window_right is None else max(0, min(k.shape[2], row + offset + 1))
                    scores = (q[batch, head, row].contiguous() * key[:last]).sum(-1) * scale
                    if not last:
                        rows.append(torch.zeros(v.shape[3]))
                        continue
                    weights = (scores - scores.max()).exp()
                    rows.append((weights[:, None] * value[:last]).sum(0) / weights.sum())
                heads.append(torch.stack(rows))
        return torch.stack(heads).reshape(*q.shape[:3], v.shape[3])

    subject = adapt(by_rows, "ours", words)
    assert subject.contract(parse_problem("b1 h1 s3 d16 fp32 fwd")).reproducible
    silent(subject, Foreign(subject.name, "ours", words), 20, least=10)


@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_implementation_is_found_and_shrunk(implementations, seed):
    subject = adapt(implementations.top_left_flash, "flash")
    proof = in_process.prove(subject, Foreign(subject.name, "flash"), profile=PROFILE, seed=seed)
    assert proof.found is not None
    problem = proof.found.case.asked
    # Properties that append keys need no unequal lengths to begin with.
    assert problem.banded and problem.q_len * problem.kv_len <= 4
    assert problem.batch == problem.kv_heads == 1 and problem.q_heads <= 2
    # Beyond hypothesis: nothing is left that the failure does not need.
    case = proof.found.case
    assert (problem.scale, problem.layout, problem.head_dim, problem.v_head_dim) == (None, "bhsd", 16, 16)
    assert (case.recipe, case.seed, dict(case.lies), case.patches) == ("normal", 0, {}, ())
    assert "does not compute attention" in proof.text() and str(problem) in proof.text()


def stock(name: str):
    if name.startswith("transformers") and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    return load(Foreign(name)), Foreign(name)


# Cases, and at least so many that are not refused.
SAMPLES = {
    "sdpa": (60, 25), "sdpa:math": (60, 30), "sdpa:flash": (60, 25), "flex:eager": (10, 8), "transformers:sdpa": (30, 10),
    "transformers:eager": (30, 5),
}  # fmt: skip


def test_every_stock_adapter_is_sampled_and_understood():
    # Two backends are on GPUs only, and one takes seconds for each variant.
    assert set(SAMPLES) | {"flex:compiled", "sdpa:cudnn", "sdpa:efficient"} == set(STOCK)
    for found in STOCK.values():
        assert read_support(found.supports).abilities and found.why


@pytest.mark.parametrize("name", SAMPLES)
def test_a_stock_adapter_is_silent(name):
    cases, least = SAMPLES[name]
    silent(*stock(name), cases, least=least)


@pytest.mark.slow
def test_compiled_flex_attention_is_silent():
    """Seconds for each variant that is compiled."""
    silent(*stock("flex:compiled"), 4, least=3)


def case_of(problem: str) -> Case:
    return Case(kernel="x", problem=problem, config={}, recipe="normal", seed=1, lies={})


@pytest.mark.parametrize("name", ["sdpa", "sdpa:flash"])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_known_bug_is_refused_unless_it_is_asked_for(name, scale):
    """Once torch has mended it this fails, and the entry can go."""
    problem = f"b1 h1 s4 d16 fp32 causal scale={scale} fwd"
    assert "known bug" in (load(Foreign(name)).refuses(parse_problem(problem)) or "")
    subject = load(Foreign(name, "", ("known-bugs",)))
    assert subject.refuses(parse_problem(problem)) is None
    finding, _ = JUDGES["bound"].find(subject, case_of(problem))
    assert finding is not None and "is NaN" in finding.detail
    # The same mask, written out, is right: so is the other backend.
    window = parse_problem(problem).replace(window_left=4)
    assert JUDGES["bound"].find(subject, case_of(str(window)))[0] is None
    assert JUDGES["bound"].find(load(Foreign("sdpa:math")), case_of(problem))[0] is None


def test_what_an_adapter_cannot_do_is_refused_with_its_reason():
    reasons = {
        ("sdpa:flash", "b1 h1 s4 d16/32 fp32 fwd"): "does not support `unequal-dims`",
        ("sdpa", "b1 h1 s40 d16 bf16 bwd"): "16-bit gradients in 16 bits beyond 32 queries",
        ("sdpa:math", "b1 h2/1 s4 d16 fp16 bwd"): "grouped heads",
        ("flex:eager", "b1 h1 s4 d16 fp32 bwd"): "does not support `bwd`",
        ("flex:eager", "b1 h1 s0 d16 fp32 fwd"): "does not support `empty`",
        ("flex:compiled", "b1 h1 s4 d16 fp32 scale=0.5 fwd"): "does not support `scale`",
    }
    for (name, problem), reason in reasons.items():
        assert reason in (load(Foreign(name)).refuses(parse_problem(problem)) or "nothing")


def test_the_flash_signature_has_no_word_for_top_left(implementations):
    subject = adapt(implementations.flash, "flash")
    assert "top-left" in (subject.refuses(parse_problem("b1 h1 q3 k4 d16 fp32 causal top-left fwd")) or "")
    assert subject.refuses(parse_problem("b1 h1 q3 k4 d16 fp32 causal fwd")) is None
