"""What the gate asks and how it judges, on a kernel emulated in torch."""

import pytest

from harness import verify
from harness.operation import shapes
from harness.problem import parse_problem

CONFIG = {"block_m": 16, "block_n": 32}
FORWARD = parse_problem("b4 h8/2 s4096 d16 fp16 causal")
BACKWARD = parse_problem("b4 h8/2 s4096 d16 fp16 causal bwd")


def gate(kernel, problem, where="interpreter", seed=3):
    return verify.gate(kernel, problem, CONFIG, seed=seed, where=where)


@pytest.mark.parametrize("problem", [FORWARD, BACKWARD], ids=["fwd", "bwd"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_correct_kernel_passes_with_every_output_of_every_case_checked(emulated, problem, dtype):
    problem = problem.replace(dtype=dtype)
    verdict = gate(emulated.Emulated(problem.pass_), problem)
    assert verdict.status == "passed" and verdict.detail == ""
    assert verdict.cases == tuple(str(case) for case in verify.gate_cases(problem, CONFIG))
    outputs = ["out", "lse"] if problem.pass_ == "fwd" else ["dq", "dk", "dv"]
    assert [check.output for check in verdict.checks] == outputs * 3
    assert "num_warps" in verdict.blind_to


@pytest.mark.parametrize("text", [
    "b1 h4 q1 k4000 d16 fp16", "b2 h6/2 q300 k100 d24/40 bf16 causal top-left sbhd", "b1 h3/1 s77 d16 fp16 window=20:5",
    "b1 h71/1 s100 d16 fp32 causal window=3 bshd", "b1 h2 q7 k0 d16 fp16", "b1 h2 s0 d16 fp16", "b0 h2 s50 d16 fp16",
])  # fmt: skip
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_no_family_of_problems_raises_a_false_alarm(emulated, text, pass_):
    verdict = gate(emulated.Emulated(pass_), parse_problem(text).replace(pass_=pass_))
    assert verdict.status == "passed", verdict.detail


@pytest.mark.parametrize(
    ("defect", "status", "words"),
    [
        ("never launched", "wrong", "nothing was launched"),
        ("input written", "wrong", "input k"),
        ("stray write", "wrong", "memory -3 elements from the start of"),
        ("unwritten", "wrong", "were not written"),
        ("not a number", "wrong", "is NaN"),
        ("different every time", "flaky", "differ between two runs, first [0, 0, 0, 0]"),
    ],
)
@pytest.mark.parametrize("problem", [FORWARD, BACKWARD], ids=["fwd", "bwd"])
def test_ill_behaviour_is_named(emulated, problem, defect, status, words):
    verdict = gate(emulated.Emulated(problem.pass_, defect), problem, where="device")
    assert verdict.status == status, verdict.detail
    assert words in verdict.detail


def test_an_exception_of_the_kernel_reaches_the_caller(emulated):
    class CrashError(RuntimeError):
        pass

    kernel = emulated.Emulated("fwd")
    kernel.launches = lambda **arguments: (_ for _ in ()).throw(CrashError("no"))
    with pytest.raises(CrashError):
        gate(kernel, FORWARD)


def test_the_seed_reproduces_the_verdict_and_another_seed_asks_other_values(emulated):
    first, again, other = (gate(emulated.Emulated("fwd"), FORWARD, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert [check.error for check in first.checks] != [check.error for check in other.checks]


@pytest.mark.parametrize("config", [{"block_m": m, "block_n": n} for m in (16, 64, 128) for n in (16, 64, 128)])
@pytest.mark.parametrize("text", ["s4096", "s4095", "s4097", "q1 k4096", "q1000 k3000", "s20"])
def test_lengths_keep_their_remainders_so_the_same_code_is_asked(text, config):
    problem = parse_problem(f"b2 h8/2 {text} d64 bf16 causal window=1024")
    like = verify.gate_cases(problem, config)[0]
    for block in config.values():
        assert like.q_len % block == problem.q_len % block
        assert like.kv_len % block == problem.kv_len % block
    assert (like.offset > 0, like.offset < 0) == (problem.offset > 0, problem.offset < 0)
    assert like.q_len <= problem.q_len and like.kv_len <= problem.kv_len


@pytest.mark.parametrize("pair", [(16, 16), (128, 128), (128, 32), (32, 128)])
@pytest.mark.parametrize("mask", ["", "causal", "causal window=1000", "window=700:900"])
def test_every_kind_of_tile_occurs(pair, mask):
    """Of the tiles of all cases: whole inside, cut by each edge that there is, empty, and ragged at both ends."""
    config = {"block_m": pair[0], "block_n": pair[1]}
    problem = parse_problem(f"b2 h8/2 s4096 d64 bf16 {mask}")
    kinds: set[str] = set()
    for case in verify.gate_cases(problem, config):
        for top in range(0, case.q_len, pair[0]):
            for start in range(0, case.kv_len, pair[1]):
                kinds |= tile_kinds(case, range(top, top + pair[0]), range(start, start + pair[1]))
    wanted = {"inside", "ragged keys", "ragged queries"}
    wanted |= {"right edge"} if problem.right is not None else set()
    wanted |= {"left edge"} if problem.window_left is not None else set()
    assert wanted <= kinds


def tile_kinds(case, queries, keys) -> set[str]:
    ragged = {"ragged keys"} if keys.stop > case.kv_len else set()
    ragged |= {"ragged queries"} if queries.stop > case.q_len else set()
    rows = [i + case.offset for i in queries if i < case.q_len]
    cols = [j for j in keys if j < case.kv_len]
    right = case.right is not None and any(j > i + case.right for i in rows for j in (cols[0], cols[-1]))
    left = case.window_left is not None and any(j < i - case.window_left for i in rows for j in (cols[0], cols[-1]))
    empty = all(
        (case.right is not None and j > i + case.right) or (case.window_left is not None and j < i - case.window_left)
        for i in rows
        for j in cols
    )
    if empty:
        return ragged
    edges = {name for name, there in (("right edge", right), ("left edge", left)) if there}
    return ragged | (edges or ({"inside"} if not ragged else set()))


def test_cases_see_batches_key_heads_groups_and_rows_without_keys():
    like, ragged, short = verify.gate_cases(FORWARD, CONFIG)
    assert (short.batch, short.kv_heads, short.group) == (2, 2, 2)
    assert (ragged.q_heads, ragged.kv_heads) == (4, 1) and ragged.q_len > ragged.kv_len
    assert like.group == 2
    assert [shape for shape, _ in shapes(short).values()] == [
        (2, 4, 5, 16), (2, 2, 37, 16), (2, 2, 37, 16), (2, 4, 5, 16), (2, 4, 5),
    ]  # fmt: skip
    assert verify.gate_cases(FORWARD.replace(kv_heads=8), CONFIG)[2].q_heads == 2
    assert verify.gate_cases(FORWARD.replace(q_heads=14), CONFIG)[1].group == 3


def test_cases_ignore_what_the_interpreter_cannot_see_and_the_size_of_the_problem():
    few, many = ({**CONFIG, "num_warps": warps} for warps in (4, 8))
    assert verify.gate_cases(FORWARD, few) == verify.gate_cases(FORWARD, many)
    larger = FORWARD.replace(batch=9, q_len=8192, kv_len=8192)
    assert verify.gate_cases(FORWARD, CONFIG) == verify.gate_cases(larger, CONFIG)
