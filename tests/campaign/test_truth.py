"""The questions, and what becomes of a candidate that is asked one: on an emulated kernel, which is right or made wrong."""

import math
from typing import Any

import pytest
import torch

from harness import truth
from harness.answers import Answers
from harness.cases import Case
from harness.errors import RefusedError, UsageError
from harness.operation import operation_for, shapes
from harness.problem import PASSES, Problem, parse_problem
from harness.space import Config, Param, Space
from tests.gate.emulated_flash import Emulated

PROBLEM = "b1 h2/1 q33 k40 d16 fp16 causal fwd"


def case(problem: str = PROBLEM, recipe: str = "normal") -> Case:
    config = {"block_m": 16, "block_n": 16}
    return Case(kernel="emulated", problem=problem, config=config, recipe=recipe, seed=0, lies={})


def test_the_questions_cover_every_variant_dtype_mask_and_head_dim_in_both_passes() -> None:
    for pass_ in PASSES:
        asked = [parse_problem(text) for text, _ in truth.questions(pass_)]
        assert {one.pass_ for one in asked} == {pass_}
        assert len({(one, recipe) for one, (_, recipe) in zip(asked, truth.questions(pass_), strict=True)}) == len(
            asked
        )
        variants = {name for one in asked for name in one.variants}
        wanted = {"softcap", "alibi", "bias", "sinks", "dropout", "prefix", "chunk", "documents", "mask", "packed"}
        assert variants == wanted | ({"lse_grad"} if pass_ == "bwd" else set())
        assert {one.dtype for one in asked} == {"fp16", "bf16", "fp32"}
        assert min(one.head_dim for one in asked) == 16 and max(one.head_dim for one in asked) == 256
        assert {one.layout for one in asked} == {"bhsd", "bshd", "sbhd"}
        assert {1, 2, 3, 4, 8} <= {one.group for one in asked}
        kinds: list[Any] = [
            lambda p: p.causal and p.top_left, lambda p: p.causal and not p.top_left and p.q_len != p.kv_len,
            lambda p: p.window_left is not None and p.causal, lambda p: p.window_right is not None, lambda p: p.q_len < p.kv_len,
            lambda p: p.q_len > p.kv_len, lambda p: p.softmax_scale < 0, lambda p: p.v_head_dim != p.head_dim,
        ]  # fmt: skip
        assert all(any(kind(one) for one in asked) for kind in kinds)


def test_recorded_answers_of_two_forward_kernels_and_a_backward_one_can_be_carried() -> None:
    total = 0
    for pass_ in ("fwd", "fwd", "bwd"):
        for text, _ in truth.questions(pass_):
            problem = parse_problem(text)
            made = (shapes(problem)[name] for name in operation_for(problem).outputs)
            total += sum(math.prod(shape) * (4 if dtype == "fp32" else 2) for shape, dtype in made)
    # Half of random bits do not compress; files of a campaign stay below 16 MiB.
    assert total < 17 << 20


def test_configs_are_the_default_and_others_far_from_it_and_always_the_same() -> None:
    space = Space(params=(Param("a", (1, 2, 4, 8), "w"), Param("b", (False, True), "w")), rules=())
    default = space.legal[0]
    chosen = truth.chosen_configs(space, default, 2, seed=5)
    assert chosen[:2] == [default, Config({"a": 8, "b": True})]
    assert len(set(chosen)) == 3 and chosen == truth.chosen_configs(space, default, 2, seed=5)
    assert len(truth.chosen_configs(space, default, 20, seed=5)) == 8
    assert truth.chosen_configs(space, default, 0, seed=5) == [default]


def test_a_right_kernel_is_right_and_its_answer_agrees_with_itself() -> None:
    reply = truth.ask(Emulated("fwd"), case(), "cpu", 3)
    assert reply.wrong == "" and reply.worst is not None and 0 < reply.worst <= 1 and reply.runs == 3
    again = truth.ask(Emulated("fwd"), case(), "cpu", 1, reply.answer)
    assert again.wrong == "" and {check.output for check in again.against} == {"out", "lse"}
    assert max(check.ratio for check in again.against) == 0


def test_other_inputs_are_not_compared() -> None:
    reply = truth.ask(Emulated("fwd"), case(), "cpu", 1)
    other = truth.Answer(given="else", outputs=reply.answer.outputs)
    found = truth.ask(Emulated("fwd"), case(), "cpu", 1, other)
    assert not found.against and found.incomparable == "its inputs were others" and found.wrong == ""


def test_a_difference_to_the_interpreter_beyond_both_bounds_is_wrong() -> None:
    reply = truth.ask(Emulated("fwd"), case(), "cpu", 1)
    outputs = truth.unpack(reply.answer.outputs)
    outputs["out"][0, 1, 5, 3] += 0.5
    found = truth.ask(
        Emulated("fwd"), case(), "cpu", 1, truth.Answer(given=reply.answer.given, outputs=truth.pack(outputs))
    )
    assert "out[0, 1, 5, 3]" in found.wrong
    # Within the sum of the bounds it is none.
    check = reply.checks[0]
    outputs = truth.unpack(reply.answer.outputs)
    outputs["out"][check.index] += 0.9 * check.bound
    near = truth.ask(
        Emulated("fwd"), case(), "cpu", 1, truth.Answer(given=reply.answer.given, outputs=truth.pack(outputs))
    )
    assert near.wrong == ""


@pytest.mark.parametrize(("defect", "what"), [
    ("different every time", "differ between two runs"), ("stray write", "was written to"), ("not a number", "is NaN"),
    ("unwritten", "were not written"), ("input written", "input k of"), ("never launched", "nothing was launched"),
])  # fmt: skip
def test_what_is_wrong_with_a_kernel_is_said(defect: str, what: str) -> None:
    assert what in truth.ask(Emulated("fwd", defect), case(), "cpu", truth.RUNS).wrong


def test_one_run_does_not_see_what_changes_between_runs() -> None:
    assert truth.ask(Emulated("fwd", "different every time"), case(), "cpu", 1).wrong == ""


def test_what_a_kernel_cannot_do_is_refused_in_words() -> None:
    with pytest.raises(RefusedError, match="the kernel does not do"):
        truth.ask(Emulated("fwd"), case(PROBLEM.replace("fwd", "bwd")), "cpu", 1)


def test_answers_go_through_a_file(tmp_path: Any) -> None:
    reply = truth.ask(Emulated("fwd"), case(), "cpu", 1)
    answers = Answers(tmp_path)
    assert answers.find(case()) is None and len(answers) == 0
    answers.put(case(), reply.answer)
    path = answers.save()
    found = Answers(tmp_path).find(case())
    assert found == reply.answer
    assert Answers(tmp_path).find(case(recipe="large")) is None
    path.write_bytes(b"not gzip")
    with pytest.raises(UsageError, match="holds no answers of the interpreter"):
        Answers(tmp_path)


def test_tensors_come_back_from_bytes_in_every_dtype() -> None:
    several = {
        "half": torch.tensor([[1.0, -2.5], [float("nan"), float("-inf")]], dtype=torch.float16), "empty": torch.empty(0, 3),
        "brain": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T, "single": torch.tensor(3.25),
    }  # fmt: skip
    back = truth.unpack(truth.from_json(truth.to_json(truth.pack(several))))
    for name, tensor in several.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name].nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_every_question_can_be_drawn() -> None:
    """The inputs of each, which is what a mistake in a problem's notation would break."""
    for pass_ in PASSES:
        for text, recipe in truth.questions(pass_):
            problem: Problem = parse_problem(text)
            if problem.visible_pairs * problem.batch * problem.q_heads < 10_000:
                values = truth._values(case(str(problem), recipe))
                assert all(tensor.shape[0] or not tensor.numel() for tensor in values.values())
