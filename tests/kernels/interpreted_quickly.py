"""A quick interpreter changes no bit, leaves the language as it was, and can be put back."""

import copy

import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as internals

from harness.cases import Case, tensors_of
from harness.errors import SubjectError
from harness.quicken import quicken, slow_down
from harness.subject import KernelSubject
from harness.workspace import Workspace
from tests.mutants.test_mutants import CONFIGS, ROOT

PROBLEM = "b1 h2/1 q20 k33 d16 {} causal window=9 softcap=2.0 dropout=0.5"


def answers(stem: str, dtype: str) -> dict[str, torch.Tensor]:
    case = Case(
        kernel=stem, problem=f"{PROBLEM.format(dtype)} {stem.removeprefix('flash_')}", config=CONFIGS[stem], recipe="normal",
        seed=1, lies={},
    )  # fmt: skip
    subject = KernelSubject(kernel=Workspace(ROOT).load_kernel(stem), config=case.config)
    return dict(subject.run(case.asked, tensors_of(case)).outputs)


def places() -> list[object]:
    """What is replaced."""
    return [
        internals._patch_lang, internals._get_np_dtype, internals.interpreter_builder.options, tl.block_type.__init__,
        tl.tensor.__init__, TritonSemantic.broadcast_impl_value,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def slow_again():
    before = places()
    yield
    slow_down()
    assert places() == before


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("stem", ["flash_fwd", "flash_bwd"])
def test_quick_and_slow_answers_have_the_same_bits(stem, dtype):
    slow, slow_places = answers(stem, dtype), places()
    quicken()
    assert all(quick is not plain for quick, plain in zip(places(), slow_places, strict=True))
    quick = answers(stem, dtype)
    again = answers(stem, dtype)
    for name, output in slow.items():
        assert torch.equal(output, quick[name])
        assert torch.equal(output, again[name])


def test_once_is_as_good_as_twice():
    quicken()
    first = places()
    quicken()
    assert places() == first


def test_equal_types_are_one_and_different_ones_are_not():
    quicken()
    one = tl.block_type(tl.int32, [16, tl.constexpr(4)])
    assert one is tl.block_type(tl.int32, (16, 4))
    others = [
        tl.block_type(tl.int32, [4, 16]), tl.block_type(tl.int64, [16, 4]), tl.block_type(tl.pointer_type(tl.int32), [16, 4]),
        tl.block_type(tl.pointer_type(tl.int32, const=True), [16, 4]), tl.block_type(tl.pointer_type(tl.int32, 3), [16, 4]),
    ]  # fmt: skip
    assert all(one != other for other in others) and len({id(other) for other in others}) == len(others)
    assert copy.copy(one) == one
    for refused in ([], [3], [1 << 40]):
        with pytest.raises((TypeError, ValueError)):
            tl.block_type(tl.int32, refused)
        with pytest.raises((TypeError, ValueError)):
            tl.block_type(tl.int32, refused)
    slow_down()
    assert tl.block_type(tl.int32, [16, 4]) == one
    assert tl.block_type(tl.int32, [16, 4]) is not one


def test_the_language_is_restored_after_a_launch_and_after_one_that_raises(monkeypatch):
    before = tl.load, tl.core.tensor.__add__
    quicken()
    answers("flash_fwd", "fp16")
    assert (tl.load, tl.core.tensor.__add__) == before
    monkeypatch.setattr(internals.InterpreterBuilder, "create_dot", None)
    with pytest.raises(SubjectError):
        answers("flash_fwd", "fp16")
    monkeypatch.undo()
    assert tl.load is before[0]
    answers("flash_fwd", "fp16")
    assert tl.load is before[0]
