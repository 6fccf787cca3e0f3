import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ProblemError
from harness.problem import Problem, parse_problem

LENGTH = st.integers(0, 9)
BOUND = st.none() | st.integers(0, 12)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    causal = draw(st.booleans())
    kv_heads = draw(st.integers(1, 3))
    return Problem(
        batch=draw(st.integers(0, 3)),
        q_heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        q_len=draw(LENGTH),
        kv_len=draw(LENGTH),
        head_dim=draw(st.integers(1, 576)),
        v_head_dim=draw(st.integers(1, 512)),
        dtype=draw(st.sampled_from(["fp16", "bf16", "fp32"])),
        causal=causal,
        window_left=draw(BOUND),
        window_right=None if causal else draw(BOUND),
        top_left=draw(st.booleans()),
        scale=draw(st.none() | st.floats(-10, 10)),
        layout=draw(st.sampled_from(["bhsd", "bshd", "sbhd"])),
        pass_=draw(st.sampled_from(["fwd", "bwd"])),
    )


@given(problems())
def test_the_notation_reads_back_as_the_same_problem(problem: Problem) -> None:
    assert parse_problem(str(problem)) == problem


@given(problems(), st.randoms(use_true_random=False))
def test_words_may_come_in_any_order(problem: Problem, random) -> None:
    words = str(problem).split()
    random.shuffle(words)
    assert parse_problem(" ".join(words)) == problem


@given(problems())
def test_visible_pairs_are_those_of_the_definition(problem: Problem) -> None:
    visible = 0
    for i in range(problem.q_len):
        for j in range(problem.kv_len):
            after_left = problem.window_left is None or i + problem.offset - problem.window_left <= j
            before_right = problem.right is None or j <= i + problem.offset + problem.right
            visible += after_left and before_right
    assert problem.visible_pairs == visible


def test_flops_of_the_paper_setting() -> None:
    # 4 * length^2 * head_dim * heads * batch, FlashAttention-2, section 4.1.
    forward = parse_problem("b64 h16 s1024 d64 fp16")
    assert forward.flops == 4 * 1024**2 * 64 * 16 * 64
    assert forward.replace(pass_="bwd").flops * 2 == forward.flops * 5


def test_least_bytes_count_each_tensor_once() -> None:
    forward = parse_problem("b2 h4/2 q8 k16 d32/64 fp16")
    q, k, v, out, lse = 2 * 4 * 8 * 32, 2 * 2 * 16 * 32, 2 * 2 * 16 * 64, 2 * 4 * 8 * 64, 2 * 4 * 8
    assert forward.least_bytes == 2 * (q + k + v + out) + 4 * lse
    assert forward.replace(pass_="bwd").least_bytes == 2 * (2 * (q + k + v) + 2 * out) + 4 * lse


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ("b1 h8/8 q64 k64 d32/32 fp16", "b1 h8 s64 d32 fp16 fwd"),
        ("b1 h8 s64 d32 bf16 causal top-left", "b1 h8 s64 d32 bf16 causal fwd"),
        ("b1 h8 s64 d32 bf16 top-left", "b1 h8 s64 d32 bf16 fwd"),
        ("b1 h8 s64 d32 bf16 window=7:0", "b1 h8 s64 d32 bf16 causal window=7 fwd"),
        ("b1 h8 s64 d32 bf16 window=inf:0", "b1 h8 s64 d32 bf16 causal fwd"),
        ("b1 h8 s64 d32", "b1 h8 s64 d32 bf16 fwd"),
    ],
)
def test_two_spellings_of_one_problem_have_one_key(long: str, short: str) -> None:
    assert parse_problem(long).key == short


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b4 h32/8 s4096 d128 bf16 casual", "means nothing: `casual`"),
        ("b4 h32/5 s4096 d128", "query heads (32) must be a multiple of key/value heads (5)"),
        ("b4 h32/0 s4096 d128", "kv heads must be a whole number of at least 1, found 0"),
        ("b4 h32 s4096 d0", "head dim must be between 1 and 1024, found 0"),
        ("b4 h32 s4096 d128 window=-3:0", "window left must be a whole number of at least 0, found -3"),
        ("b4 h32 s4096 d128 window=x", "has a window that cannot be read: `window=x`"),
        ("b4 h32 s4096 d128 causal window=3:5", "a causal problem cannot have a right window of 5"),
        ("b4 h32 s4096 d128 scale=x", "has a scale that is no number"),
        ("b4 h32 s4096 d128 scale=nan", "scale must be a finite number"),
        ("b4 h32 q4096 d128", "does not say its kv len"),
        ("b4 b4 h32 s4096 d128", "gives batch twice"),
        ("b4 h32 s4096 q7 d128", "gives q len twice, again in `q7`"),
        ("", "does not say its batch"),
        ("b4 h32 s4096 d128 softcap=0", "softcap must be a positive number, found 0.0"),
        ("b4 h32 s4096 d128 softcap=x", "has a softcap that is no number"),
        ("b4 h32 s4096 d128 dropout=1", "dropout must be at least 0 and below 1, found 1.0"),
        ("b4 h32 s4096 d128 chunk=0", "chunk must be a whole number of at least 1, found 0"),
        ("b4 h32 s4096 d128 bias=kq", "bias must name axes out of `bhqk`, in this order, found `kq`"),
        ("b4 h32 s4096 d128 mask=x", "mask must name axes"),
        ("b4 h32 s4096 d128 packed=3", "packed sequences lie in a batch of 1, found 4"),
        ("b1 h32 s4096 d128 packed=3 bias=h", "packed sequences cannot be combined with a bias"),
        ("b1 h32 s4096 d128 packed=0", "packed must be a whole number of at least 1, found 0"),
        ("b4 h32 s4096 d128 paged=0", "paged must be a whole number of at least 1, found 0"),
        ("b4 h32 s4096 d128 paged=16 bwd", "paged keys have a forward pass only"),
        ("b1 h32 s4096 d128 paged=16 packed=2", "cannot be combined with packed sequences"),
        ("b1 h32 s4096 d128 lse-grad", "a forward problem is given no gradient of the log-sum-exp"),
    ],
)
def test_refusals_name_what_was_found(text: str, message: str) -> None:
    with pytest.raises(ProblemError) as refused:
        parse_problem(text)
    assert message in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "b2 h4/2 s64 d32 bf16 softcap=30.0 alibi bias=hqk sinks dropout=0.1 prefix chunk=16 documents mask=bk lse-grad bwd",
        "b1 h4/2 q64 k70 d32 bf16 causal top-left packed=3 fwd",
        "b2 h4 s64 d32 fp16 bias=1 mask=1 fwd",
        "b2 h4 s64 d32 fp16 causal top-left paged=16 fwd",
        "b2 h4 s64 d32 fp16 nondeterministic bwd",
        "b2 h4 s64 d32 fp8e4m3 softcap=2.0 fwd",
    ],
)
def test_what_is_added_has_one_name(text: str) -> None:
    problem = parse_problem(text)
    assert str(problem) == text
    assert set(problem.variants) <= set(parse_problem(str(problem)).variants)
    plain = problem.replace(
        softcap=None, alibi=False, bias=None, sinks=False, dropout=0.0, prefix=False, chunk=None, documents=False, mask=None,
        packed=None, paged=None, lse_grad=False,
        nondeterministic=False,
    )  # fmt: skip
    assert plain.variants == () and plain.replace(layout="bhsd") != problem


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("fp8e4m3 bwd", "fp8e4m3 has a forward pass only"),
        ("fp8e5m2 paged=4", "and without pages"),
        ("bf16 nondeterministic", "every forward pass gives equal bits"),
    ],
)
def test_what_has_no_such_pass_is_refused_by_name(words: str, says: str) -> None:
    with pytest.raises(ProblemError, match=says):
        parse_problem(f"b1 h1 s16 d16 {words}")


def test_what_a_problem_adds_to_a_formula() -> None:
    varied = parse_problem("b1 h2 s16 d16 bf16 softcap=2.0 sinks causal nondeterministic bwd")
    assert varied.beyond == ("softcap", "sinks") and varied.variants == (*varied.beyond, "nondeterministic")
    assert varied.bare == parse_problem("b1 h2 s16 d16 bf16 causal nondeterministic bwd")
    assert parse_problem("b1 h2 s16 d16 fp8e4m3").beyond == ("eight_bits",)
    assert parse_problem("b2 h2 s16 d16 fp8e5m2").least_bytes == 2 * 2 * 16 * (16 * (1 + 1 + 1 + 2) + 4)


def test_packed_sequences_count_pairs_as_if_they_were_equally_long() -> None:
    packed = parse_problem("b1 h1 s64 d16 fp16 causal packed=4")
    assert packed.visible_pairs == 4 * parse_problem("b1 h1 s16 d16 fp16 causal").visible_pairs


@given(st.text(max_size=40))
def test_any_text_is_a_problem_or_a_problem_error(text: str) -> None:
    try:
        parse_problem(text)
    except ProblemError as error:
        assert error.message
