import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cases import (
    CASES,
    Case,
    Counterexample,
    Lie,
    Patch,
    case_strategy,
    read_counterexample,
    structured,
    tensors_of,
    write_counterexample,
)
from harness.errors import UsageError
from harness.operation import shapes
from harness.space import Config

CONFIGS = {
    "fp16": [
        Config({"block_m": 16, "block_n": 32, "load": "pointer"}),
        Config({"block_m": 64, "block_n": 16, "load": "tma"}),
        Config({"block_m": 16, "block_n": 64, "load": "tma_kv"}),
    ],
    "bf16": [Config({"block_m": 32, "block_n": 32, "load": "pointer"})],
}


def drawn(pass_: str) -> st.SearchStrategy[Case]:
    return case_strategy("subject", pass_, CONFIGS)


@given(drawn("fwd") | drawn("bwd"))
def test_a_case_survives_json_and_keeps_its_id(case: Case) -> None:
    again = CASES.validate_json(CASES.dump_json(case))
    assert again == case
    assert again.id == case.id


@settings(max_examples=25)
@given(drawn("fwd") | drawn("bwd"))
def test_a_case_decides_every_bit_of_its_tensors(case: Case) -> None:
    first, second = tensors_of(case), tensors_of(CASES.validate_json(CASES.dump_json(case)))
    wanted = shapes(case.asked)
    for name, tensor in first.items():
        assert tuple(tensor.shape) == wanted[name][0]
        assert tensor.stride() == second[name].stride()
        assert torch.equal(tensor, second[name])


@given(drawn("fwd"))
def test_descriptors_are_given_tensors_that_lie_as_the_layout_says(case: Case) -> None:
    assert "tma" not in case.config.values() or not case.lies
    assert "tma_kv" not in case.config.values() or not {"k", "v"} & set(case.lies)


def test_a_patch_and_a_lie_do_what_they_say() -> None:
    plain = Case(
        kernel="k", problem="b1 h2 s3 d8 fp16 fwd", config={"block_m": 16}, recipe="normal", seed=1, lies={}, patches=()
    )
    assert not structured(plain)
    lie = Lie(layout="bshd", row_padding=3, shift=1, expanded=(1,))
    changed = Case(
        kernel="k", problem=plain.problem, config=plain.config, recipe="normal", seed=1, lies={"v": lie},
        patches=(Patch(tensor="k", position=9, value=5.0),),
    )  # fmt: skip
    before, after = tensors_of(plain), tensors_of(changed)
    assert torch.equal(before["q"], after["q"])
    assert after["k"].reshape(-1)[9] == 5
    assert (before["k"] != after["k"]).sum() == 1
    assert after["v"].stride()[1] == 0
    assert after["v"].storage_offset() % 8 == 1
    assert torch.equal(after["v"][:, 0], after["v"][:, 1])
    assert structured(changed)


def test_counterexamples_are_kept_once_and_damage_is_named(tmp_path: Path) -> None:
    case = Case(kernel="k", problem="b1 h1 s1 d8 fp16 fwd", config={}, recipe="normal", seed=0, lies={})
    example = Counterexample(schema=1, case=case, judge="bound", detail="off", found_with={"triton": "3.6.0"})
    path = write_counterexample(tmp_path / "corpus", example)
    assert write_counterexample(tmp_path / "corpus", example) == path
    assert read_counterexample(path) == example
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 7}))
    with pytest.raises(UsageError, match="has schema 7, this version reads 1"):
        read_counterexample(path)
    path.write_text("{")
    with pytest.raises(UsageError, match="is no corpus file: Invalid JSON"):
        read_counterexample(path)
    with pytest.raises(UsageError, match="cannot read .*No such file"):
        read_counterexample(tmp_path / "nothing.json")
