"""Our workloads are what they say, and a file that is not right is refused in words that help."""

import re
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.problem import parse_problem
from harness.workload import (
    TAGS,
    WORKSPACE_FILE,
    Workload,
    find_workload,
    load_workloads,
    problems_for,
    workload_names,
)

OURS = load_workloads()
EVERY = [(name, problem) for name, workload in OURS.items() for problem in workload.problems]

# Query heads, key/value heads, head dims and windows of the models' published configurations.
SHAPES = {
    "gpt2-medium": (16, 16, 64, 64, {None}),
    "llama-3.1-8b": (32, 8, 128, 128, {None}),
    "llama-3.1-70b": (64, 8, 128, 128, {None}),
    "qwen3-8b": (32, 8, 128, 128, {None}),
    "qwen3-0.6b": (16, 8, 128, 128, {None}),
    "mistral-7b": (32, 8, 128, 128, {None, 4096 - 1}),
    "gemma-2-9b": (16, 8, 256, 256, {None, 4096 - 1}),
    "gemma-3-12b": (16, 8, 256, 256, {None, 1024 - 1}),
    "gpt-oss": (64, 8, 64, 64, {None, 128 - 1}),
    "deepseek-v3": (128, 128, 128 + 64, 128, {None}),
    "bert-large": (16, 16, 64, 64, {None}),
}


@pytest.mark.parametrize(("name", "problem"), EVERY, ids=str)
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_every_problem_is_valid_both_ways_and_reads_back(name, problem, pass_):
    del name
    wanted = problem.replace(pass_=pass_)
    assert parse_problem(str(wanted)) == wanted
    assert wanted.flops > 0


def test_every_model_is_there_with_its_published_shape():
    assert set(SHAPES) | {"quickstart"} == set(OURS)
    for name, (q_heads, kv_heads, head_dim, v_head_dim, windows) in SHAPES.items():
        problems = OURS[name].problems
        found = {(p.q_heads, p.kv_heads, p.head_dim, p.v_head_dim) for p in problems}
        assert found == {(q_heads, kv_heads, head_dim, v_head_dim)}, name
        assert {p.window_left for p in problems} == windows, name


def test_only_bert_and_the_flash_attention_paper_have_no_causal_mask():
    open_ones = {name for name, problem in EVERY if not problem.causal}
    assert open_ones == {"bert-large", "gpt2-medium", "quickstart"}
    assert all(not problem.causal for problem in OURS["bert-large"].problems)


def test_a_window_is_only_given_where_it_hides_something():
    for name, problem in EVERY:
        if problem.window_left is not None:
            assert problem.visible_pairs < problem.replace(window_left=None).visible_pairs, (name, str(problem))


def test_every_workload_names_its_source_and_explains_a_missing_use():
    for name, workload in OURS.items():
        assert re.search(r"config\.json(, text_config)?: |of this file", workload.source), name
        if name != "quickstart":
            assert {"prefill", "training"} <= set(workload.tags), name
        if "long-context" not in workload.tags and name != "quickstart":
            assert re.search(r"no long context: the model ends at \d+ positions", workload.leaves_out), name


def test_what_the_notation_cannot_say_is_said():
    assert "soft cap" in OURS["gemma-2-9b"].leaves_out
    assert "sinks" in OURS["gpt-oss"].leaves_out


def test_the_flash_attention_setting_is_the_papers():
    assert "b64 h16 s1024 d64 fp16 fwd" in map(str, OURS["gpt2-medium"].problems)


def test_quickstart_is_a_small_true_subset_of_the_others():
    others = {problem for name, problem in EVERY if name != "quickstart"}
    quick = OURS["quickstart"].problems
    assert len(quick) == 2
    assert set(quick) < others
    assert all(problem.q_len <= 2048 for problem in quick)
    assert {problem.causal for problem in quick} == {True, False}


@pytest.mark.parametrize("name", [name for name in OURS if name != "quickstart"])
def test_a_tag_selects_its_problems_and_all_tags_make_the_whole(name):
    whole = find_workload(name)
    parts = [find_workload(f"{name}:{tag}") for tag in TAGS if tag in whole.tags]
    assert sum((part.problems for part in parts), ()) == whole.problems
    for part in parts:
        assert part.name.startswith(f"{name}:")
        assert len(set(part.tags)) == 1
        assert part.source == whole.source


def test_problems_take_the_pass_and_appear_once():
    twice = OURS["qwen3-8b"]
    assert len(twice.problems) == 5
    backward = problems_for(twice, "bwd")
    assert len(backward) == 4
    assert {problem.pass_ for problem in backward} == {"bwd"}
    assert [problem.replace(pass_="fwd") for problem in backward] == list(dict.fromkeys(twice.problems))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UsageError, match=r"no workload is called `llama-3\.1-8`") as refusal:
        find_workload("llama-3.1-8")
    assert refusal.value.hint == "did you mean `llama-3.1-8b`?"


def test_an_unknown_tag_gets_the_nearest():
    with pytest.raises(UsageError, match="workload `qwen3-8b` has no problems for `trainning`") as refusal:
        find_workload("qwen3-8b:trainning")
    assert refusal.value.hint == "did you mean `training`?"
    with pytest.raises(UsageError, match="has no problems for ``"):
        find_workload("qwen3-8b:")


def test_a_use_that_a_model_does_not_have_is_explained():
    with pytest.raises(UsageError, match=r"no problems for `long-context` \(.*ends at 512 positions\)") as refusal:
        find_workload("bert-large:long-context")
    assert refusal.value.hint == "it has: prefill, training"


def test_an_untagged_workload_has_no_tags_to_select():
    bare = Workload(name="mine", source="here", problems=(parse_problem("b1 h1 s16 d16"),))
    with pytest.raises(UsageError, match="`mine` has no problems for `training`"):
        bare.tagged("training")


@pytest.mark.parametrize("tags", [(), ("training", "training")])
def test_a_workload_without_problems_or_with_loose_tags_cannot_be(tags):
    problems = (parse_problem("b1 h1 s16 d16"),) if tags else ()
    with pytest.raises(ValueError, match="workload `mine` has"):
        Workload(name="mine", source="here", problems=problems, tags=tags)


def _write(folder: Path, text: str) -> Path:
    path = folder / WORKSPACE_FILE
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    return path


def test_a_workspace_adds_and_overrides(tmp_path):
    extra = _write(
        tmp_path,
        '["my-model-1.5"]\nsource = "ours"\ntraining = ["b2 h8/4 s96 d64 fp16 causal"]\n'
        '[quickstart]\nsource = "ours"\nprefill = ["b1 h1 s16 d16"]\n',
    )
    assert workload_names(extra) == [*OURS, "my-model-1.5"]
    assert str(find_workload("my-model-1.5:training", extra=extra).problems[0]) == "b2 h8/4 s96 d64 fp16 causal fwd"
    assert find_workload("quickstart", extra=extra).tags == ("prefill",)
    assert find_workload("quickstart").tags == ("training", "training")


def test_a_workspace_without_the_file_has_ours(tmp_path):
    assert load_workloads(tmp_path / WORKSPACE_FILE) == OURS


GOOD = 'source = "x"\n'


@pytest.mark.parametrize(
    ("text", "complaint", "hint"),
    [
        ("[mine\n", "is not valid TOML: ", "needs quotes"),
        ("mine = 3\n", "entry `mine`: expected a table, found 3", "write `[mine]`"),
        (f'[Mine]\n{GOOD}training=["b1 h1 s16 d16"]', "entry `Mine`: not a usable name", "small letters"),
        (f"[mine]\n{GOOD}trainin=[]", "entry `mine`: `trainin` means nothing here", "did you mean `training`?"),
        (f"[mine-1.5]\n{GOOD}", "entry `mine-1`: `5` means nothing here", 'needs quotes: `["mine-1.5"]`'),
        ('[mine]\ntraining=["b1 h1 s16 d16"]', "entry `mine`: `source` is missing", "name the paper"),
        ('[mine]\nsource=4\ntraining=["b1 h1 s16 d16"]', "entry `mine`: `source` must be a text, found 4", ""),
        (f"[mine]\n{GOOD}", "entry `mine`: there are no problems", "`prefill`, `training`, `long-context`"),
        (f"[mine]\n{GOOD}training=[]", "entry `mine`: there are no problems", ""),
        (f'[mine]\n{GOOD}training="b1"', "`training` must be a list of problems, found 'b1'", "write `training = ["),
        (f"[mine]\n{GOOD}training=[7]", "`training` must be a list of problems, found [7]", ""),
        (
            f'[mine]\n{GOOD}training=["b1 h3/2 s16 d16"]',
            "entry `mine`, `training`: query heads (3) must be a multiple of key/value heads (2)",
            "grouped-query",
        ),
        (
            f'[mine]\n{GOOD}prefill=["b1 h1 s16 d16 casual"]',
            "entry `mine`, `prefill`: problem `b1 h1 s16 d16 casual` has a word that means nothing: `casual`",
            "did you mean `causal`?",
        ),
        (f'[mine]\n{GOOD}training=["b1 h1 s16 d16 bwd"]', "problem `b1 h1 s16 d16 bwd` names a pass", "leave it out"),
        (f'[mine]\n{GOOD}training=["b1 h1 s16 d16", "h1 b1 s16 d16"]', "`h1 b1 s16 d16` is listed twice", ""),
    ],
)
def test_a_malformed_file_is_refused_by_file_entry_and_cause(tmp_path, text, complaint, hint):
    extra = _write(tmp_path, text)
    with pytest.raises(UsageError) as refusal:
        load_workloads(extra)
    assert str(extra) in refusal.value.message
    assert complaint in refusal.value.message
    assert hint in refusal.value.hint
    assert refusal.value.exit_code == 2


def test_a_file_that_is_no_text_is_refused(tmp_path):
    extra = _write(tmp_path, "")
    extra.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        load_workloads(extra)
