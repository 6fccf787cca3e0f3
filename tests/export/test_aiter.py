"""aiter: nobody checks it but our own schema, which its export says."""

import json
from pathlib import Path

import jsonschema
import pytest

import harness
from harness.export.aiter import MHA, kind_of
from harness.problem import parse_problem
from tests.cli.desk import Desk
from tests.fake_champions import champion, champion_file, keep

SCHEMA = Path(harness.__file__).parent / "schemas/aiter-mha.json"
FORWARD = {
    "BLOCK_M": 128, "BLOCK_N": 64, "PRELOAD_V": False, "waves_per_eu": 2, "num_warps": 4, "num_ctas": 1, "num_stages": 1,
}  # fmt: skip
GOLDEN = """{
  "fwd": {
    "default": {
      "BLOCK_M": 128,
      "BLOCK_N": 64,
      "PRELOAD_V": false,
      "waves_per_eu": 2,
      "num_warps": 4,
      "num_ctas": 1,
      "num_stages": 1
    }
  }
}
"""


@pytest.fixture
def theirs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A workspace whose kernel is of aiter's family."""
    desk.edit('PASS = "fwd"\n', 'PASS = "fwd"\nFAMILY = "aiter"\n')
    monkeypatch.setattr(
        desk.spaces, "space", lambda problem, device: type("Any", (), {"check": lambda self, config: config})()
    )
    return desk


def keep_theirs(desk: Desk, *problems: str, device: str = "mi300x", **changes) -> None:
    config = FORWARD | changes
    found = [champion(each, config=config, kernel_digest=desk.digest, source_digest=desk.digest) for each in problems]
    file = champion_file(*found, device=device, kernel="subject")
    keep(desk.results, file.model_copy(update={"kernel": file.kernel.model_copy(update={"family": "aiter"})}))


def test_the_file_is_as_it_was_agreed_and_nobody_has_read_it(theirs: Desk) -> None:
    keep_theirs(theirs, "b1 h8 s4096 d128 bf16 causal", "b1 h8 s1024 d128 bf16 causal")
    document = theirs.document("export", "--to", "aiter", "--out", "out")
    assert (theirs.root / "out/gfx942-MHA-DEFAULT.json").read_text() == GOLDEN
    assert document["verified_by"] is None and "our own schema" in document["not_verified"]
    assert [one["problem"] for one in document["exported"]] == ["b1 h8 s4096 d128 bf16 causal fwd"]
    assert [one["reason"] for one in document["skipped"]] == [
        "aiter has one config for the kind `default`, and a larger problem's is taken"
    ]
    (provenance,) = json.loads((theirs.root / "out/gfx942-MHA-DEFAULT.provenance.json").read_text())["configs"].values()
    assert provenance["problem"] == "b1 h8 s4096 d128 bf16 causal fwd" and provenance["number"] == "measured"
    assert '"PRE_LOAD_V": false' in document["use"][1]


def test_our_schema_is_that_of_the_code_and_closed() -> None:
    # After a wanted change: python -m harness.export.aiter
    schema = json.loads(SCHEMA.read_text())
    assert {name: value for name, value in schema.items() if name not in ("$schema", "title")} == {
        name: value for name, value in MHA.json_schema().items() if name != "title"
    }
    jsonschema.validate(json.loads(GOLDEN), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"fwd": {"default": FORWARD | {"BLOCK_X": 1}}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"fwd": {"default": FORWARD | {"num_warps": "4"}}}, schema)


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        ("b1 h8 s64 d128 bf16", "default"), ("b1 h8 s64 d64 bf16", "small_head"), ("b1 h8 s64 d16 bf16", "default"),
        ("b1 h8 s64 d192/128 bf16", "pe"), ("b1 h8 s64 d128 fp32", "dropout_or_fp32"),
        ("b1 h8 s64 d128 bf16 bwd", "onekernel"), ("b1 h8 s64 d192/128 bf16 bwd", "onekernel_pe"),
    ],
)  # fmt: skip
def test_a_problem_is_of_a_kind(problem: str, kind: str) -> None:
    assert kind_of(parse_problem(problem)) == kind


def test_what_aiter_cannot_run_stays(theirs: Desk) -> None:
    keep_theirs(theirs, "b1 h8 s64 d128 bf16", device="h200")
    keep_theirs(theirs, "b1 h8 s64 d128 bf16", BLOCK_Z=1)
    reasons = [one["reason"] for one in theirs.document("export", "--to", "aiter", "--out", "out")["skipped"]]
    assert reasons == [
        "aiter runs on AMD, and this is of sm_90",
        "its config is none of aiter's: Extra inputs are not permitted at BLOCK_Z",
    ]
