"""Tables distilled from champions that nobody measured, and the Python that they become."""

import ast
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from harness.problem import parse_problem
from harness.space import Config
from harness.table import Known, choose, distill, hold_out, python_table

SHORT, LONG = Config({"block_m": 32, "num_warps": 4}), Config({"block_m": 128, "num_warps": 4})


def known(problem: str, config: Config, value_ms: float = 1.0) -> Known:
    return Known(parse_problem(problem), config, value_ms)


def always(problem: Any, config: Any) -> bool:
    return True


def never_timed(problem: Any, config: Any) -> None:
    return None


def module(rows: Any) -> SimpleNamespace:
    """The table as its Python says it."""
    text = python_table(rows, kernel="subject", device="h200", arch="sm_90", digest="k1", source="nobody")
    tree = ast.parse(text)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all(len(line) <= 130 for line in text.splitlines())
    names: dict[str, Any] = {}
    exec(compile(tree, "table.py", "exec"), names)
    return SimpleNamespace(**names)


CHAMPIONS = [
    *(known(f"b1 h8 s{length} d64 bf16 causal", SHORT) for length in (128, 256, 512)),
    *(known(f"b1 h8 s{length} d64 bf16 causal", LONG) for length in (2048, 4096)),
    known("b1 h8 s512 d128 bf16", LONG),
]


def test_two_configs_become_two_rows_at_a_power_of_two() -> None:
    rows = distill(CHAMPIONS, always, never_timed)
    assert [(row.q_len, row.kv_len, row.heads, row.config) for row in rows] == [
        (512, None, None, SHORT), (None, None, None, LONG), (None, None, None, LONG),
    ]  # fmt: skip
    for one in CHAMPIONS:
        assert choose(rows, one.problem) == one.config
    assert choose(rows, parse_problem("b4 h16 s1000 d64 bf16 causal")) == LONG
    assert choose(rows, parse_problem("b1 h8 s512 d64 fp16 causal")) is None
    assert choose(rows, parse_problem("b1 h8 s512 d80 bf16 causal")) is None


def test_a_config_that_costs_little_spares_a_row_and_an_illegal_one_never_does() -> None:
    near = [
        known(f"b1 h8 s{length} d64 bf16", SHORT if length % 3 else LONG) for length in (64, 96, 128, 192, 256, 384)
    ]
    # As long as nobody timed it, another config counts as worse; and no more rows are made than a person reads.
    assert 1 < len(distill(near, always, never_timed)) <= 4
    (row,) = distill(near, always, lambda problem, config: 1.0)
    assert row.config == SHORT
    assert len(distill(near, always, lambda problem, config: 1.5)) > 1
    legal = lambda problem, config: config["block_m"] <= problem.q_len  # noqa: E731
    tall = [known("b1 h8 s64 d64 bf16", SHORT), known("b1 h8 s128 d64 bf16", LONG), known("b1 h8 s256 d64 bf16", LONG)]
    assert choose(distill(tall, legal, never_timed), parse_problem("b1 h8 s64 d64 bf16")) == SHORT


def test_the_table_is_tried_on_what_it_was_not_made_of() -> None:
    champions = [*CHAMPIONS[:5], known("b1 h8 s1024 d64 bf16 causal", LONG, 2.0)]
    times = {(champions[3].problem, SHORT): 1.5, (champions[5].problem, SHORT): 2.5}
    trials = hold_out(champions, [SHORT] * 6, always, lambda problem, config: times.get((problem, config)))
    found = {trial.problem.split()[2]: trial for trial in trials}
    assert found["s256"].same and found["s256"].regret == 0.0
    assert found["s1024"].config == LONG and found["s1024"].regret == 0.0 and found["s1024"].default_regret == 0.25
    assert found["s2048"].default_regret == 0.5 and found["s4096"].default_regret is None
    (alone,) = hold_out(champions[:1], [SHORT], always, never_timed)
    assert alone.config is None and not alone.legal and alone.regret is None


@given(
    st.lists(
        st.tuples(st.integers(1, 1 << 16), st.integers(1, 1 << 16), st.integers(1, 64), st.sampled_from([16, 32, 64, 128])),
        min_size=1, max_size=12, unique_by=lambda one: one[:3],
    ),
    st.tuples(st.integers(1, 1 << 17), st.integers(1, 1 << 17), st.integers(1, 128)),
    st.sampled_from(["", "causal", "causal window=100", "causal top-left", "softcap=2.0"]),
)  # fmt: skip
def test_the_python_says_what_the_rows_say(made: Any, asked: Any, words: str) -> None:
    configs = [Config({"block_m": tile, "load": "tma", "flat": True}) for *_, tile in made]
    problems = [f"b{b} h8/2 q{q} k{k} d64 bf16 {words}" for q, k, b, _ in made]
    champions = [known(problem, config) for problem, config in zip(problems, configs, strict=True)]
    rows = distill(champions, always, never_timed)
    problem = parse_problem(f"b{asked[2]} h8/2 q{asked[0]} k{asked[1]} d64 bf16 {words}")
    table, chosen = module(rows), choose(rows, problem)
    # As `kernels.attention.Question` says it.
    question = SimpleNamespace(
        pass_="fwd", dtype="torch.bfloat16", batch=problem.batch, q_heads=8, kv_heads=2, q_len=problem.q_len,
        kv_len=problem.kv_len, head_dim=64, v_head_dim=64, window_left=problem.window_left,
        window_right=0 if problem.causal else None, top_left="top-left" in words,
        variants=("softcap",) if "softcap" in words else (),
    )  # fmt: skip
    assert table.lookup(question) == (None if chosen is None else dict(chosen))
    question.dtype = "torch.float16"
    assert table.lookup(question) is None


def test_without_champions_the_table_is_its_fallback() -> None:
    table = module(distill([], always, never_timed))
    assert (table.ROWS, table.CONFIGS, table.FALLBACK) == ((), (), None)
    assert table.config(kind=(), q_len=1, kv_len=1, heads=1) is None
