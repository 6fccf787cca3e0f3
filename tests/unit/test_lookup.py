"""Which config a problem gets, over a small space and champions that nobody measured."""

import math
import sys
import warnings
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.device import TARGETS
from harness.errors import MissError, UsageError
from harness.likeness import bucket, distance, features
from harness.lookup import Database, Entry, SoftMismatchWarning
from harness.problem import Problem, parse_problem
from harness.trust import Here
from tests.cli.desk import default, space
from tests.fake_champions import certificate, champion, champion_file

ASKED = parse_problem("b1 h8 s1024 d64 bf16 causal")


def config(block_m: int = 64, num_warps: int = 4) -> dict[str, int]:
    return {"block_m": block_m, "num_warps": num_warps}


def entry(
    problem: str, *, path: str = "best/h200/subject.json", device: str = "h200", driver: str = "580.1", **changes
) -> Entry:
    made = champion(problem, **({"config": config(), "kernel_digest": "k", "source_digest": "k"} | changes))
    return Entry(path, champion_file(made, device=device, kernel="subject", driver=driver), made, made.read())


def database(*entries: Entry, **here) -> Database:
    known = Here(**({"kernel_digest": "k", "triton": "3.6.0", "torch": "2.13.0", "driver": "580.1"} | here))
    return Database(kernel="subject", entries=entries, here=known, space=space, default=default, live=TARGETS["h200"])


def ask(found: Database, problem: Problem = ASKED, mode: str = "nearest", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoftMismatchWarning)
        return found.lookup(problem, options.pop("device", "h200"), mode, **options)


def reasons(found: Database, problem: Problem = ASKED, mode: str = "nearest", **options) -> list[str]:
    return [one.reason for one in found.explain(problem, TARGETS["h200"], mode, **options)[1]]


EXACT, SAME_BUCKET = "b1 h8 s1024 d64 bf16 causal", "b1 h8 s1000 d64 bf16 causal"
NEAR, FAR = "b1 h8 s4096 d64 bf16 causal", "b1 h8 s16384 d64 bf16 causal"


def test_the_order_is_exact_then_bucket_then_nearest_then_default() -> None:
    tiles = {EXACT: 16, SAME_BUCKET: 32, NEAR: 64, FAR: 128}
    entries = [entry(problem, config=config(tile)) for problem, tile in tiles.items()]
    for left, (match, tile) in enumerate([("exact", 16), ("bucket", 32), ("nearest", 64), ("default", 16)]):
        answer = ask(database(*entries[left:]))
        assert (answer.match, answer.config["block_m"]) == (match, tile)
    assert ask(database(*entries)).distance == 0 and ask(database(*entries[2:])).distance == 4.0
    assert ask(database(*entries[3:])).distance is None
    assert reasons(database(*entries[3:])) == ["it is 8.0 doublings away, more than 4"]
    assert reasons(database(*entries)) == ["it is 8.0 doublings away, more than 4"] + ["another one fits better"] * 2


def test_a_mode_says_how_far_to_look() -> None:
    entries = [entry(EXACT), entry(SAME_BUCKET), entry(NEAR)]
    for mode, kinds in {
        "exact": ["exact", "default", "default"], "bucket": ["exact", "bucket", "default"],
        "nearest": ["exact", "bucket", "nearest"], "default": ["default"] * 3, "require": ["exact", "bucket", "nearest"],
    }.items():  # fmt: skip
        assert [ask(database(one), mode=mode).match for one in entries] == kinds
    assert reasons(database(entries[2]), mode="exact") == ["it is a match of kind `nearest`, and `exact` was asked for"]
    with pytest.raises(UsageError, match="there is no mode of looking up `best`"):
        ask(database(), mode="best")


def test_a_miss_raises_only_where_a_champion_is_required() -> None:
    assert ask(database()).config == default(ASKED, TARGETS["h200"])
    with pytest.raises(MissError, match="no champion of subject answers `b1 h8 s1024 d64 bf16 causal fwd` on h200"):
        ask(database(entry(FAR)), mode="require")
    with pytest.raises(UsageError, match="h2000"):
        ask(database(), device="h2000")


@pytest.mark.parametrize(
    ("problem", "other"),
    [
        ("b1 h8 s1024 d64 fp16 causal", "dtype"),
        ("b1 h8 s1024 d64 bf16", "band"),
        ("b1 h8 s1024 d64 bf16 causal window=100", "band"),
        ("b1 h8 s1024 d128 bf16 causal", "head dim"),
        ("b1 h8 s1024 d64 bf16 causal alibi", "variants"),
        ("b1 h8 s1024 d128 fp16 causal", "dtype and another head dim"),
    ],
)
def test_another_kind_of_problem_is_never_near(problem: str, other: str) -> None:
    assert ask(database(entry(problem))).match == "default"
    assert reasons(database(entry(problem))) == [f"its problem has another {other}"]


def test_legality_is_checked_again_for_the_problem_that_asks() -> None:
    short = parse_problem("b1 h8 s32 d64 bf16 causal")
    tall = database(
        entry("b1 h8 s64 d64 bf16 causal", config=config(64)), entry("b1 h8 s128 d64 bf16 causal", config=config(32))
    )
    answer = ask(tall, short)
    assert answer.config["block_m"] == 32 and answer.provenance.problem == "b1 h8 s128 d64 bf16 causal fwd"
    assert "breaks the rule `fits_length`" in reasons(tall, short)[0]
    assert ask(database(entry("b1 h8 s32 d64 bf16 causal", config=config(64))), short).match == "default"


def test_of_two_that_are_as_near_the_smaller_one_answers() -> None:
    smaller, larger = "b1 h8 s512 d64 bf16 causal", "b1 h8 s2048 d64 bf16 causal"
    for entries in ([entry(smaller), entry(larger)], [entry(larger), entry(smaller)]):
        assert ask(database(*entries)).provenance.problem == f"{smaller} fwd"


def test_stale_champions_and_other_architectures_never_answer() -> None:
    stale, other = entry(EXACT, kernel_digest="old"), entry(EXACT, device="a100")
    assert ask(database(stale, other)).match == "default" == ask(database(stale, other), sibling=True).match
    assert reasons(database(stale, other)) == [
        "it was proved of kernel old, the kernel is k now", "it is of sm_80, this is sm_90",
    ]  # fmt: skip


def test_a_sibling_answers_only_on_request_and_after_the_device_itself() -> None:
    sibling = entry(EXACT, device="h100", config=config(128))
    assert ask(database(sibling)).match == "default"
    assert reasons(database(sibling)) == ["it is of h100, a sibling, which was not asked for"]
    answer = ask(database(sibling), sibling=True)
    assert answer.match == "exact" and answer.provenance.device == "h100"
    assert "it was tuned on h100, a sibling of h200" in answer.warnings
    assert ask(database(sibling, entry(NEAR)), sibling=True).match == "nearest"


def test_times_come_before_estimates_and_reviewed_ones_before_drafts() -> None:
    draft = "best/h200/subject.draft.json"
    guess = entry(EXACT, kind="estimated", path=draft, config=config(16))
    trial, time = entry(EXACT, path=draft, config=config(32)), entry(NEAR, config=config(64))
    assert ask(database(guess, trial, time)).config["block_m"] == 64
    assert ask(database(guess, trial)).config["block_m"] == 32
    answer = ask(database(guess))
    assert answer.warnings == ("its number is an estimate, not a time", "it is of a draft, which nobody reviewed")
    assert answer.provenance.draft and answer.provenance.kind == "estimated"


def test_the_environment_that_is_here_comes_first() -> None:
    old, new = entry(EXACT, driver="570.0", config=config(16), path="a"), entry(EXACT, config=config(32), path="b")
    assert ask(database(old, new)).config["block_m"] == 32
    answer = ask(database(old))
    assert answer.config["block_m"] == 16 and answer.warnings == ("made with driver 570.0, here is 580.1",)
    # The driver of another GPU than the one that is here says nothing.
    elsewhere = database(entry(EXACT, device="h100", driver="570.0"))
    assert ask(elsewhere, device="h100").warnings == ()


def test_a_soft_mismatch_warns_once() -> None:
    found = database(entry(EXACT), entry(NEAR), torch="2.14.0")
    with pytest.warns(
        SoftMismatchWarning, match=r"best/h200/subject.json: made with torch 2.13.0, here is 2.14.0"
    ) as seen:
        for problem in (EXACT, NEAR, EXACT, SAME_BUCKET):
            assert found.lookup(parse_problem(problem), "h200").warnings
    assert len(seen) == 1


def test_deterministic_leaves_out_what_nobody_saw_repeat() -> None:
    unseen = entry(EXACT, certificate=certificate("k", repeated=0), config=config(128))
    assert ask(database(unseen)).config["block_m"] == 128
    assert ask(database(unseen), deterministic=True).match == "default"
    assert reasons(database(unseen), deterministic=True) == ["nobody saw it give equal bits twice"]
    assert ask(database(unseen, entry(NEAR)), deterministic=True).match == "nearest"


LENGTHS = st.integers(1, 1 << 21)


@given(LENGTHS, LENGTHS, LENGTHS, st.sampled_from([1, 2, 3, 64]))
def test_distance_is_a_distance(one: int, other: int, third: int, batch: int) -> None:
    a, b, c = (parse_problem(f"b1 h8/2 q{n} k{2 * n} d64 bf16 causal window={n}") for n in (one, other, third))
    b = b.replace(batch=batch)
    assert distance(a, a) == 0 and distance(a, b) == distance(b, a) >= 0
    # Sums of logarithms are rounded: a few steps of the last place of the largest sum.
    slack = 8 * math.ulp(distance(a, b) + distance(b, c))
    assert distance(a, c) <= distance(a, b) + distance(b, c) + slack
    if bucket(a, 132) == bucket(b, 132):
        assert features(a) == features(b) and a.window_left == b.window_left


def test_a_cached_answer_takes_less_than_five_microseconds(capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    from harness.lookups import cached_us

    found = database(entry(EXACT), entry(NEAR))
    options = Namespace(mode="nearest", deterministic=False, sibling=False)
    # The least of a few turns, and of a few more where other work keeps this one waiting.
    took = min(cached_us(found, ASKED, "h200", options) for _ in range(3))
    with capsys.disabled():
        sys.stdout.write(f" [cached lookup: {took:.2f} us]")
    assert took < 5


def test_a_gpu_that_no_table_knows_is_known_while_it_is_here() -> None:
    unknown = replace(TARGETS["h200"], name="nvidia-h900", multiprocessors=200)
    found = database(entry(EXACT))
    found.live = unknown
    assert ask(found, device="nvidia-h900", sibling=True).match == "exact"
    assert ask(found, device="nvidia-h900").match == "default"
    with pytest.raises(UsageError, match="nvidia-h901"):
        ask(found, device="nvidia-h901")
