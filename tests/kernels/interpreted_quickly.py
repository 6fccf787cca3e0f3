"""Sparing the interpreter its looks through the language changes no bit, and leaves the language as it was."""

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter as internals

from harness import interpreter
from harness.cases import Case, tensors_of
from harness.errors import SubjectError
from harness.subject import KernelSubject
from harness.workspace import Workspace
from tests.mutants.test_mutants import CONFIGS, ROOT

PROBLEM = "b1 h2/1 q20 k33 d16 {} causal window=9"


def answers(stem: str, dtype: str) -> dict[str, torch.Tensor]:
    case = Case(
        kernel=stem, problem=f"{PROBLEM.format(dtype)} {stem.removeprefix('flash_')}", config=CONFIGS[stem], recipe="normal",
        seed=1, lies={},
    )  # fmt: skip
    subject = KernelSubject(kernel=Workspace(ROOT).load_kernel(stem), config=case.config)
    return dict(subject.run(case.asked, tensors_of(case)).outputs)


@pytest.fixture
def slow_again():
    original = internals._patch_lang
    yield original
    internals._patch_lang = original


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("stem", ["flash_fwd", "flash_bwd"])
def test_quick_and_slow_answers_have_the_same_bits(stem, dtype, slow_again):
    slow = answers(stem, dtype)
    interpreter.quicken()
    assert internals._patch_lang is not slow_again
    quick = answers(stem, dtype)
    again = answers(stem, dtype)
    for name, output in slow.items():
        assert torch.equal(output, quick[name])
        assert torch.equal(output, again[name])


def test_the_language_is_restored_after_a_launch_and_after_one_that_raises(slow_again, monkeypatch):
    before = tl.load, tl.core.tensor.__add__
    interpreter.quicken()
    answers("flash_fwd", "fp16")
    assert (tl.load, tl.core.tensor.__add__) == before
    patched = internals._patch_lang
    interpreter.quicken()
    assert internals._patch_lang is patched
    monkeypatch.setattr(internals.InterpreterBuilder, "create_dot", None)
    with pytest.raises(SubjectError):
        answers("flash_fwd", "fp16")
    monkeypatch.undo()
    assert tl.load is before[0]
    answers("flash_fwd", "fp16")
    assert tl.load is before[0]
