"""What a campaign does: every part once, in the order of worth, and only what a kernel takes."""

from collections import Counter

import pytest

from harness.campaign_plan import (
    DECODING,
    SHARES,
    SPACES,
    Subject,
    anchor_of,
    anchors,
    champion_name,
    compared,
    plan,
    sweep,
)
from harness.problem import parse_problem
from harness.workload import load_workloads

EVERY = frozenset(
    {"softcap", "alibi", "bias", "sinks", "dropout", "prefix", "chunk", "documents", "mask", "packed", "lse_grad"}
)
DECODE = Subject(stem="flash_decode", pass_="fwd", of="m:j", variants=frozenset())
FORWARD = Subject(stem="flash_fwd", pass_="fwd", of="k:j", variants=EVERY)
BACKWARD = Subject(stem="flash_bwd", pass_="bwd", of="l:j", variants=EVERY)
WORKLOADS = list(load_workloads().values())


def test_every_part_has_a_name_of_its_own_and_steps_come_in_their_order() -> None:
    parts = plan([FORWARD, BACKWARD], WORKLOADS, device_of="d:d")
    assert len({part.name for part in parts}) == len(parts)
    assert list(dict.fromkeys(part.step for part in parts)) == list(SHARES)
    assert sum(SHARES.values()) == pytest.approx(1)
    assert parts == plan([FORWARD, BACKWARD], WORKLOADS, device_of="d:d")
    kernels = {part.what["kernel"]: part.of for part in parts if "kernel" in part.what}
    assert kernels == {"flash_fwd": "k:j", "flash_bwd": "l:j"}
    assert parts[0].what["do"] == "ceilings" and parts[0].of == "d:d"


def test_a_part_is_given_at_least_what_it_needs_to_begin() -> None:
    assert all(0 < part.least_s <= part.most_s for part in plan([FORWARD, BACKWARD], WORKLOADS, device_of="d"))


def test_a_kernel_is_asked_only_what_it_takes() -> None:
    bare = Subject(stem="mine", pass_="fwd", of="k:j", variants=frozenset({"softcap"}))
    asked = [
        parse_problem(part.what["problem"]) for part in plan([bare], (), device_of="d") if part.what["do"] == "question"
    ]
    assert {name for problem in asked for name in problem.variants} == {"softcap"}
    assert len(asked) > 30
    # Its space is not one of those that are measured in full, and there is no backward kernel.
    counted = Counter(part.step for part in plan([bare], WORKLOADS, device_of="d"))
    assert not counted["spaces"] and counted["champions"] and counted["beside"] == len(sweep()) + 5


def test_the_sweep_has_a_constant_number_of_tokens_and_an_anchor_for_every_row() -> None:
    problems = sweep()
    assert len(set(problems)) == len(problems) == 72
    assert {problem.batch * problem.q_len for problem in problems} == {16384}
    assert {problem.q_heads * problem.head_dim for problem in problems} == {2048}
    assert len(anchors()) == 12 and {anchor_of(problem) for problem in problems} == set(anchors())
    assert all(anchor_of(problem).pass_ == problem.pass_ for problem in problems)


def test_champions_are_sought_for_both_passes_of_training_and_for_anchors_and_workloads_in_turns() -> None:
    parts = [part for part in plan([FORWARD, BACKWARD], WORKLOADS, device_of="d") if part.step == "champions"]
    problems = [parse_problem(part.what["problem"]) for part in parts]
    assert set(problems[:3]) == {parse_problem(problem) for stem, problem, _ in SPACES if stem != "flash_decode"}
    assert sum(problem in anchors() for problem in problems[5:13]) == 4
    trained = [one.tagged("training") for one in WORKLOADS if "training" in one.tags]
    wanted = {problem.replace(pass_="bwd") for one in trained for problem in one.problems}
    assert wanted <= set(problems)
    long = [place for place, problem in enumerate(problems) if problem.kv_len >= 100_000]
    assert long and min(long) > len(problems) // 2


def test_decoding_has_its_kernel_in_every_step_and_leaves_the_others_theirs() -> None:
    parts = plan([FORWARD, DECODE, BACKWARD], WORKLOADS, device_of="d")
    assert {part.step for part in parts if part.what.get("kernel") == "flash_decode"} == set(SHARES)
    decoding = {parse_problem(text) for text in DECODING}
    for part in parts:
        if part.step in ("champions", "beside"):
            problem = parse_problem(part.what["problem"])
            assert (problem in decoding) == (part.what["kernel"] == "flash_decode")
            assert part.of == {"flash_fwd": "k:j", "flash_decode": "m:j", "flash_bwd": "l:j"}[part.what["kernel"]]
    # Whoever compares finds the champion of the same problem.
    names = {part.name for part in parts}
    assert all(champion_name("flash_decode", problem) in names for problem in decoding)
    assert all(anchor_of(problem) == problem for problem in compared() if problem not in sweep())


def test_flexattention_is_tuned_to_be_compared_with_and_asked_nothing_else() -> None:
    flex = [
        Subject(stem=stem, pass_=pass_, of=f"f{pass_}:j", family="flex_attention")
        for stem, pass_ in (("flex_attention", "fwd"), ("flex_attention_bwd", "bwd"))
    ]
    plain = plan([FORWARD, BACKWARD], WORKLOADS, device_of="d:d")
    parts = plan([*flex, FORWARD, BACKWARD], WORKLOADS, device_of="d:d")
    added = [part for part in parts if part not in plain]
    assert [part for part in parts if part in plain] == plain
    tuned = [part for part in added if part.what["do"] == "champion"]
    compared_with = [part for part in added if part.what["do"] == "beside"]
    assert len(added) == len(tuned) + len(compared_with) and {part.step for part in added} == {"beside"}
    assert {part.what["kernel"] for part in tuned} == {"flex_attention", "flex_attention_bwd"}
    assert all(part.what["rivals"] == ["flex:tuned"] and "+" in part.of for part in compared_with)
    # Every problem that is compared stands behind the tune of what stands for it.
    names = [part.name for part in parts]
    for part in compared_with:
        problem = parse_problem(part.what["problem"])
        stem = "flex_attention" if problem.pass_ == "fwd" else "flex_attention_bwd"
        assert names.index(champion_name(stem, anchor_of(problem))) < names.index(part.name)
    assert {parse_problem(part.what["problem"]) for part in compared_with} >= set(sweep())
    assert len({part.name for part in parts}) == len(parts)
