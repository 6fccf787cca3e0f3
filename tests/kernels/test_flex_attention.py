"""FlexAttention as a subject: the problem is put right, what it cannot do is named, a verdict on a CPU says what it misses."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import bounds, compare, timing, verify
from harness.cases import Case, tensors_of
from harness.device import TARGETS
from harness.errors import RefusedError
from harness.judges import applicable
from harness.operation import operation_for, problem_keywords, shapes
from harness.problem import Problem, parse_problem
from harness.space import Config
from harness.subject import KernelSubject
from harness.workspace import Workspace

WORKSPACE = Workspace(Path(__file__).parents[2])
STEMS = {"fwd": "flex_attention", "bwd": "flex_attention_bwd"}
EVERY = "b2 h4/2 q70 k100 d32 bf16 causal window=9 softcap=2.0 alibi bias=hqk prefix chunk=33 documents mask=bk fwd"


def default(problem: Problem) -> Config:
    """A config that is legal whatever the lengths are."""
    module = WORKSPACE.load_space(STEMS[problem.pass_])
    found: Config = module.default(problem.replace(q_len=4096, kv_len=4096), TARGETS["h200"])
    return found


def subject(problem: Problem) -> KernelSubject:
    return KernelSubject(kernel=WORKSPACE.load_kernel(STEMS[problem.pass_]), config=default(problem))


def case_of(problem: Problem) -> Case:
    return Case(
        kernel=STEMS[problem.pass_],
        problem=str(problem),
        config=dict(default(problem)),
        recipe="normal",
        seed=1,
        lies={},
    )


@pytest.mark.parametrize("text", [
    "b2 h4/2 s70 d32 bf16 causal fwd", "b1 h2 q33 k65 d16/48 fp16 causal top-left fwd", "b1 h2 q65 k33 d16 fp32 causal fwd",
    "b1 h3 s40 d24 bf16 window=7:3 scale=-0.25 sbhd fwd", EVERY, "b2 h2 s40 d16 fp16 bias=1 mask=hqk softcap=0.5 fwd",
    "b1 h2 s64 d16 fp32 fwd", "b2 h4/2 q70 k100 d32 bf16 causal softcap=2.0 alibi documents bwd",
    "b1 h2 q65 k33 d16 fp32 causal mask=bqk bwd", "b2 h4/1 s40 d16/32 fp16 window=5 prefix chunk=9 bwd",
])  # fmt: skip
def test_every_element_lies_within_its_bound(text: str) -> None:
    problem = parse_problem(text)
    given = tensors_of(case_of(problem))
    ours = subject(problem)
    expect = bounds.expect_forward if problem.pass_ == "fwd" else bounds.expect_backward
    expected = expect(problem, given, ours.contract(problem), structured=False)
    answer = ours.run(problem, given)
    checks = compare.judge(answer.outputs, expected, case=text)
    assert answer.faults == () and len(checks) == len(operation_for(problem).outputs)
    assert compare.status_of(checks) == "passed", [compare.sentence(check) for check in checks]


@pytest.mark.parametrize(("text", "why"), [
    ("b1 h2 s64 d16 bf16 dropout=0.1 fwd", "no dropout"), ("b1 h2 s64 d16 bf16 sinks fwd", "no sinks"),
    ("b1 h2 s64 d16 bf16 packed=2 fwd", "no q_starts"), ("b1 h2 s64 d16 bf16 paged=16 fwd", "no block_table"),
    ("b1 h2 s64 d16 bf16 lse-grad bwd", "no dlse"), ("b1 h2 s64 d16 bf16 bias=hqk bwd", "no bias"),
    ("b1 h2 s64 d32 fp8e4m3 fwd", "no q_descale"), ("b1 h2 s64 d8 bf16 fwd", "head dims of at least 16"),
    ("b1 h2 q0 k64 d16 bf16 fwd", "without elements"),
])  # fmt: skip
def test_what_it_does_not_do_is_refused_by_name(text: str, why: str) -> None:
    problem = parse_problem(text)
    ours = subject(problem)
    known = ours.refuses(problem)
    if known is not None:
        assert why in known
        return
    with pytest.raises(RefusedError, match=why):
        ours.run(problem, tensors_of(case_of(problem)))


@pytest.mark.parametrize(("text", "changes", "why"), [
    ("b1 h2 s1024 d64 bf16 causal fwd", {"block_m": 256}, "do not divide blocks of 128"),
    ("b1 h2 s1024 d64 bf16 causal fwd", {"block_n": 48}, "power of two"),
    ("b1 h2 s1024 d64 bf16 causal fwd", {"sparse": 0}, "0 where nothing is masked"),
    ("b1 h2 s1152 d64 bf16 causal fwd", {"block_m": 256, "sparse": 256}, "checks no ends"),
    ("b1 h2 s1024 d64 bf16 causal bwd", {"block_m1": 128, "block_n1": 64}, "block_n1 % block_m1"),
    ("b1 h2 s1024 d64 bf16 causal bwd", {"block_m2": 32, "block_n2": 64}, "block_m2 % block_n2"),
])  # fmt: skip
def test_the_kernel_refuses_what_the_space_leaves_out(text: str, changes: dict[str, Any], why: str) -> None:
    problem = parse_problem(text)
    space = WORKSPACE.load_space(STEMS[problem.pass_]).space(problem, TARGETS["h200"])
    config = Config({**default(problem), **changes})
    broken = space.broken_rule(config)
    assert broken is not None or any(config[one.name] not in one.values for one in space.params)
    with pytest.raises(ValueError, match=why):
        call(problem, config)


def call(problem: Problem, config: Config) -> Any:
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype]), device="meta")
        for name, (shape, dtype) in shapes(problem).items()
    }
    (found,) = WORKSPACE.load_kernel(STEMS[problem.pass_]).launches(**tensors, **problem_keywords(problem), **config)
    return found


@pytest.mark.parametrize(
    "text", ["b1 h2 s1024 d64 bf16 causal fwd", "b1 h2 s1024 d64 bf16 fwd", "b1 h2 s1024 d64 bf16 causal bwd"]
)
def test_every_legal_config_is_one_that_the_kernel_takes(text: str) -> None:
    problem = parse_problem(text)
    for device in ("h200", "a100", "mi300x"):
        space = WORKSPACE.load_space(STEMS[problem.pass_]).space(problem, TARGETS[device])
        space.check(WORKSPACE.load_space(STEMS[problem.pass_]).default(problem, TARGETS[device]))
        for config in space.legal[::37]:
            assert dict(call(problem, config).subject[0].options)["BACKEND"] == "TRITON"


def test_a_problem_of_decoding_has_no_space() -> None:
    problem = parse_problem("b8 h32/8 q1 k8192 d128 bf16 fwd")
    space = WORKSPACE.load_space("flex_attention").space(problem, TARGETS["h200"])
    assert not space.legal and space.census.pruned["decoding"] == space.census.size


def test_a_verdict_on_a_cpu_says_what_it_is_blind_to_and_watches_no_memory() -> None:
    problem = parse_problem("b1 h2 s256 d32 bf16 causal fwd")
    kernel = WORKSPACE.load_kernel("flex_attention")
    verdict = verify.gate(kernel, problem, default(problem), seed=0, where="interpreter")
    assert verdict.passed, verdict.detail
    assert {"kernel_options", "generated Triton code", "roundings"} <= set(verdict.blind_to)
    assert "shadow" not in verdict.oracle and "PyTorch's own reference" in verdict.oracle
    # Judges that look over the interpreter's shoulder would see no access at all, and take that for a fault.
    asked = applicable(subject(problem), case_of(problem))
    assert "bound" in asked and not {"shadow", "far", "fp64", "agreement"}.intersection(asked)


def test_a_mask_that_is_put_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = parse_problem("b1 h2 s256 d32 bf16 causal fwd")
    kernel = WORKSPACE.load_kernel("flex_attention")
    right = kernel.Attention.mask_mod
    monkeypatch.setattr(
        kernel.Attention, "mask_mod", lambda self, tensors, band: right(self, tensors, (band[0], band[1], band[2] + 1))
    )
    assert verify.gate(kernel, problem, default(problem), seed=0, where="interpreter").status == "wrong"


@pytest.mark.parametrize(
    "text", [EVERY, "b2 h4/2 s128 d32 bf16 fwd", "b2 h4/2 s128 d32 fp32 causal alibi documents bwd"]
)
def test_what_a_gpu_is_given_compiles_in_one_graph_and_computes_the_same(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Inductor, whose code for a GPU cannot run here: what Dynamo and autograd make of it, timed and judged."""
    problem = parse_problem(text.replace("bf16", "fp32"))
    kernel, whole = WORKSPACE.load_kernel(STEMS[problem.pass_]), WORKSPACE.load_kernel("flex_attention")
    given = tensors_of(case_of(problem))
    outputs = {
        name: torch.empty(shape, dtype=torch.float32)
        for name, (shape, _) in shapes(problem).items()
        if name in operation_for(problem).outputs
    }
    (found,) = kernel.launches(**given, **outputs, **problem_keywords(problem), **default(problem))
    attention, tensors = found.subject
    compile_ = torch.compile
    asked: list[dict[str, Any]] = []

    def compiled(function: Any, **how: Any) -> Any:
        asked.append(how)
        return compile_(function, backend="aot_eager", **how)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(whole.flex, "_validate_device", lambda *tensors: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timed = whole._results(whole.compiled_once(), attention, tensors, attention.band)
        # The band as tensors, as where it is judged on a GPU; and what is timed runs again and again.
        band = tuple(None if bound is None else torch.tensor(bound) for bound in attention.band)
        judged = whole._results(whole._shared(attention), attention, tensors, band)
        run = found.prepared()
        run()
        run()
    assert [how["dynamic"] for how in asked] == [False, None, False] and all(how["fullgraph"] for how in asked)
    whole._shared.cache_clear()
    expect = bounds.expect_forward if problem.pass_ == "fwd" else bounds.expect_backward
    expected = expect(problem, given, bounds.library_contract(problem), structured=False)
    for results in (timed, judged):
        answer = dict(zip(operation_for(problem).outputs, results, strict=True))
        checks = compare.judge(answer, expected, case=text)
        assert compare.status_of(checks) == "passed", [compare.sentence(check) for check in checks]


def test_what_is_timed_of_a_call_is_what_it_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext
    from types import SimpleNamespace

    monkeypatch.setattr(timing, "capture_stream", nullcontext)
    done: list[str] = []
    prepared = SimpleNamespace(prepared=lambda: lambda: done.append("timed"), run=lambda: done.append("copied"))
    plain = SimpleNamespace(run=lambda: done.append("launched"))
    for launch in (prepared, plain):
        timing._timed(launch)()
    assert done == ["timed", "launched"]


@pytest.mark.parametrize("text", ["b1 h2 s256 d32 fp32 causal fwd", "b1 h2 s256 d32 fp32 causal bwd"])
def test_a_call_is_one_launch_that_is_not_timed_in_parts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = parse_problem(text)
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    kernel = WORKSPACE.load_kernel(STEMS[problem.pass_])
    assert timing.launches_ms(kernel, problem, tensors_of(case_of(problem)), default(problem)) == {}
