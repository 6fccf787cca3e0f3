"""What the gate asks and how it judges, on a kernel emulated in torch."""

import pytest
import torch

from harness import inputs, oracle, verify
from harness.gate_cases import gate_cases
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
    cases = gate_cases(problem, CONFIG)
    assert verdict.cases == tuple(dict.fromkeys(str(case.problem) for case in cases))
    outputs = ["out", "lse"] if problem.pass_ == "fwd" else ["dq", "dk", "dv"]
    assert [check.output for check in verdict.checks] == outputs * len(cases)
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
    like = gate_cases(problem, config)[0].problem
    for block in config.values():
        assert like.q_len % block == problem.q_len % block
        assert like.kv_len % block == problem.kv_len % block
    assert (like.offset > 0, like.offset < 0) == (problem.offset > 0, problem.offset < 0)
    assert like.q_len <= problem.q_len and like.kv_len <= problem.kv_len


@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("mask", ["", "causal", "causal window=2000"])
def test_divided_keys_leave_no_part_without_a_block_and_one_with_two(mask, splits):
    config = {"block_m": 16, "block_n": 64, "num_splits": splits}
    problem = parse_problem(f"b2 h8/2 q2 k8190 d64 bf16 {mask}")
    like = gate_cases(problem, config)[0].problem
    seen = sum(
        bool(oracle.visible_keys(like, slice(0, 2))[:, key : key + 64].any()) for key in range(0, like.kv_len, 64)
    )
    assert splits < seen <= splits + 2
    assert like.kv_len % 64 == problem.kv_len % 64


@pytest.mark.parametrize("pair", [(16, 16), (128, 128), (128, 32), (32, 128)])
@pytest.mark.parametrize("mask", ["", "causal", "causal window=1000", "window=700:900"])
def test_every_kind_of_tile_occurs(pair, mask):
    """Of the tiles of all cases: whole inside, cut by each edge that there is, empty, and ragged at both ends."""
    config = {"block_m": pair[0], "block_n": pair[1]}
    problem = parse_problem(f"b2 h8/2 s4096 d64 bf16 {mask}")
    kinds: set[str] = set()
    for case in (asked.problem for asked in gate_cases(problem, config)):
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
    like, ragged, again, short = (case.problem for case in gate_cases(FORWARD, CONFIG))
    assert (short.batch, short.kv_heads, short.group) == (2, 2, 2)
    assert (ragged.q_heads, ragged.kv_heads) == (4, 1) and ragged.q_len > ragged.kv_len
    assert like.group == 2 and again == ragged
    assert [shape for shape, _ in shapes(short).values()] == [
        (2, 4, 2, 16), (2, 2, 33, 16), (2, 2, 33, 16), (2, 4, 2, 16), (2, 4, 2),
    ]  # fmt: skip
    assert gate_cases(FORWARD.replace(kv_heads=8), CONFIG)[3].problem.q_heads == 2
    assert gate_cases(FORWARD.replace(q_heads=14), CONFIG)[1].problem.group == 3


@pytest.mark.parametrize(
    "mask", ["causal", "window=500:0", "window=500:3", "window=500:300 top-left", "causal window=900"]
)
def test_in_a_short_case_each_bound_hides_a_single_key(mask):
    short = gate_cases(parse_problem(f"b2 h8/2 s4096 d64 bf16 {mask}"), CONFIG)[3].problem
    seen = oracle.visible_keys(short, slice(0, short.q_len))
    hidden_right = (~seen).triu(short.offset + 1).sum()
    hidden_left = (~seen).tril(short.offset).sum()
    assert hidden_left == (short.window_left is not None)
    assert hidden_right == (short.right is not None and not (short.top_left and short.causal))
    assert short.kv_len % CONFIG["block_n"] == 1


def test_a_window_changes_between_cases_of_the_same_lengths():
    problem = parse_problem("b1 h2 s4096 d64 bf16 window=900:700")
    _, ragged, again, _ = (case.problem for case in gate_cases(problem, CONFIG))
    assert again == ragged.replace(window_left=ragged.window_left - 1, window_right=ragged.window_right - 1)
    narrow = parse_problem("b1 h2 s4096 d64 bf16 window=1:1")
    assert len({case.problem for case in gate_cases(narrow, CONFIG)[1:3]}) == 1


@pytest.mark.parametrize("problem", [FORWARD, BACKWARD], ids=["fwd", "bwd"])
def test_but_for_the_first_case_no_two_tensors_share_their_strides(problem):
    like, *others = gate_cases(problem, CONFIG)
    assert {axis.order for axis in like.placements().values()} == {(0, 1, 2, 3), (0, 1, 2)}
    for case in others:
        strides = {name: found for name, found in strides_of(case).items() if name != "lse"}
        assert {name for name, found in strides.items() if found[3] == 1} == {"k", "v"}
        for some in ([found[:2] for found in strides.values()], [found[2] for found in strides.values()]):
            assert len(set(some)) == len(some), case


@pytest.mark.parametrize(
    "text", ["b4 h8/2 s4096 d64 fp16 causal", "b4 h8/2 s4096 d80 fp16 bwd", "b4 h3/1 s999 d40/24 fp32 bwd"]
)
@pytest.mark.parametrize("how", [{"unit": True}, {"load": "tma"}, {"load": "tma_kv"}])
def test_descriptors_and_devices_are_given_rows_that_they_can_take(text, how):
    problem = parse_problem(text)
    config = CONFIG | {name: value for name, value in how.items() if name == "load"}
    for case in gate_cases(problem, config, unit="unit" in how):
        for name, strides in strides_of(case).items():
            whole = 4 if problem.dtype == "fp32" else 8
            assert name == "lse" or (strides[3] == 1 and all(stride % whole == 0 for stride in strides[:3]))


def strides_of(case) -> dict[str, tuple[int, ...]]:
    placements = case.placements()
    return {
        name: inputs.unwritten(name, shape, torch.float32, placements[name]).view.stride()
        for name, (shape, _) in shapes(case.problem).items()
    }


@pytest.mark.parametrize("scale", ["", "scale=-0.3", "scale=40", "scale=1e-9", "scale=0"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_in_the_short_case_all_scores_lie_far_below_zero(dtype, scale):
    short = gate_cases(parse_problem(f"b4 h8/2 s4096 d16 {dtype} causal {scale}"), CONFIG)[3]
    values = short.values(3)
    assert all(bool(value.isfinite().all()) for value in values.values())
    scores = next(iter(oracle.rows(short.problem, values))).scores
    if short.problem.softmax_scale in (0.0, 1e-9):
        assert scores.isfinite().any()
    else:
        assert scores.max() < -87  # exp is below the least fp32 number that is not subnormal


def test_on_a_device_a_case_runs_often_and_in_the_interpreter_once(emulated):
    for where, runs in (("device", 6), ("interpreter", 1)):
        kernel = emulated.Emulated("fwd")
        gate(kernel, FORWARD, where=where)
        assert kernel.calls == 4 * runs


def test_cases_ignore_what_the_interpreter_cannot_see_and_the_size_of_the_problem():
    few, many = ({**CONFIG, "num_warps": warps} for warps in (4, 8))
    assert gate_cases(FORWARD, few) == gate_cases(FORWARD, many)
    larger = FORWARD.replace(batch=9, q_len=8192, kv_len=8192)
    assert gate_cases(FORWARD, CONFIG) == gate_cases(larger, CONFIG)
