"""Which words and names are understood, and what is said of those that are not."""

import json
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from harness.adapters import ABILITIES, CLAIMS, SIGNATURES, read_support
from harness.errors import UsageError
from harness.foreign import Foreign, adapt, load
from harness.libraries import STOCK
from harness.problem import parse_problem

PROBLEM = parse_problem("b1 h2 s8 d16 fp32 fwd")


def refused(*arguments) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load(Foreign(*arguments))
    return caught.value


def test_a_function_is_found_by_module_and_name(implementations):
    subject = load(Foreign("foreign_implementations:sdpa", "sdpa", ("fwd",)))
    assert subject.function is implementations.sdpa and subject.name == "foreign_implementations:sdpa"
    assert load(Foreign("foreign_implementations:Module.forward", "sdpa")).function is implementations.Module.forward
    assert adapt(implementations.flash, "flash").name == "foreign_implementations:flash"


def test_a_target_without_a_colon_shows_how_to_write_one():
    error = refused("foreign_implementations.sdpa", "sdpa")
    assert "`foreign_implementations.sdpa` names no function" in error.message
    assert "package.module:function" in error.hint
    assert all(name in error.hint for name in STOCK)


@pytest.mark.parametrize("target", [":f", "module:", ":"])
def test_half_a_target_is_none(target):
    assert "names no function" in refused(target, "sdpa").message


def test_a_missing_module_is_named():
    error = refused("no_such_package.kernels:f", "sdpa")
    assert "there is no module `no_such_package`" in error.message and "PYTHONPATH" in error.hint


def test_what_a_module_raises_is_told_as_it_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "raises_something.py").write_text("class Odd(Exception): pass\nraise Odd('no licence')\n")
    (tmp_path / "needs_another.py").write_text("import no_such_dependency\n")
    error = refused("raises_something:f", "sdpa")
    assert "importing raises_something raised Odd: no licence" in error.message
    # The module is there; what it needs is not.
    error = refused("needs_another:f", "sdpa")
    assert "importing needs_another raised ModuleNotFoundError: No module named 'no_such_dependency'" in error.message


def test_a_missing_name_and_something_else_are_told_apart(implementations):
    error = refused("foreign_implementations:sdpaa", "sdpa")
    assert "foreign_implementations has no `sdpaa`" in error.message and error.hint == "did you mean `sdpa`?"
    assert "is no function but int" in refused("foreign_implementations:NOT_CALLABLE", "sdpa").message


def test_a_function_needs_a_signature_and_a_stock_adapter_has_one(implementations):
    for asked, said in (("", "needs a signature"), ("sdp", "there is no signature `sdp`")):
        error = refused("foreign_implementations:sdpa", asked)
        assert said in error.message and all(f"`{name}`" in error.hint for name in SIGNATURES)
    assert "has a signature of its own" in refused("sdpa:math", "flash").message
    assert load(Foreign("sdpa:math", "sdpa")).signature is SIGNATURES["sdpa"]


def test_foreign_is_plain_json():
    adapter = TypeAdapter(Foreign)
    foreign = Foreign("a.b:c", "flash", ("fwd", "no-gqa"))
    assert adapter.validate_json(adapter.dump_json(foreign)) == foreign
    with pytest.raises(ValidationError):
        adapter.validate_json(json.dumps({"target": "a:b", "eval": "1"}))


def test_no_words_mean_everything_and_words_mean_themselves():
    assert read_support(()).abilities == set(ABILITIES) and not read_support(()).stated
    few = read_support(("fwd", "causal", "fp16"))
    # Nothing was said of the alignment, so both are meant.
    assert few.abilities == {"fwd", "causal", "fp16", "top-left", "bottom-right"} and few.stated
    assert read_support(("causal",)).abilities >= {"fwd", "bwd", "fp16", "bf16", "fp32"}
    assert read_support(("no-gqa", "no-bwd")).abilities == set(ABILITIES) - {"gqa", "bwd"}
    assert read_support(("triton",)).abilities == set(ABILITIES) and read_support(("triton",)).claims == {"triton"}
    assert read_support(("d64", "d128")).dims == (64, 128)


@pytest.mark.parametrize("word", ["gqaa", "no-", "no-everything", "d", "d0", "FP16"])
def test_an_unknown_word_shows_those_that_are_known(word):
    with pytest.raises(UsageError) as caught:
        read_support((word,))
    assert f"`{word}`" in caught.value.message
    assert all(name in caught.value.hint for name in (*ABILITIES, *CLAIMS))


NEEDS = {
    "fwd": "b1 h2 s8 d16 fp32 fwd",
    "bwd": "b1 h2 s8 d16 fp32 bwd",
    "fp16": "b1 h2 s8 d16 fp16 fwd",
    "bf16": "b1 h2 s8 d16 bf16 fwd",
    "fp32": "b1 h2 s8 d16 fp32 fwd",
    "window": "b1 h2 s8 d16 fp32 window=3:2 fwd",
    "causal": "b1 h2 s8 d16 fp32 causal fwd",
    "empty": "b1 h2 s0 d16 fp32 fwd",
    "unequal-lengths": "b1 h2 q8 k9 d16 fp32 fwd",
    "top-left": "b1 h2 q8 k9 d16 fp32 causal top-left fwd",
    "bottom-right": "b1 h2 q8 k9 d16 fp32 causal fwd",
    "dead-rows": "b1 h2 q9 k8 d16 fp32 causal fwd",
    "gqa": "b1 h4/2 s8 d16 fp32 fwd",
    "unequal-dims": "b1 h2 s8 d16/32 fp32 fwd",
    "any-dim": "b1 h2 s8 d24 fp32 fwd",
    "scale": "b1 h2 s8 d16 fp32 scale=0.5 fwd",
    "negative-scale": "b1 h2 s8 d16 fp32 scale=-0.5 fwd",
}


@pytest.mark.parametrize("word", [word for word in ABILITIES if word not in ("strides", "transposed")])
def test_what_is_not_supported_is_refused_and_avoided(word):
    support = read_support((f"no-{word}",))
    problem = parse_problem(NEEDS[word])
    assert support.lacks(problem) == f"does not support `{word}`: {ABILITIES[word].why}"
    assert read_support(()).lacks(problem) is None
    if word not in ("fwd", "bwd"):
        near = support.nearest(problem)
        assert near != problem and near.pass_ == problem.pass_ and support.lacks(near) is None
    other = parse_problem("b1 h2 s8 d16 fp32 fwd" if word not in ("fwd", "fp32") else "b1 h2 s8 d16 fp16 bwd")
    assert support.lacks(other) is None and support.nearest(other) == other


def test_the_nearest_problem_needs_nothing_that_is_lacking():
    support = read_support(("fwd", "fp16", "d64"))
    odd = parse_problem("b0 h4/2 q9 k3 d24/40 bf16 causal window=1 top-left scale=-0.5 sbhd fwd")
    assert support.nearest(odd) == parse_problem("b1 h2 s9 d64 fp16 sbhd fwd")


def test_a_missing_transformers_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = refused("transformers:sdpa")
    assert error.message == "transformers is not installed here" and error.hint == "pip install transformers"
