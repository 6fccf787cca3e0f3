"""FlashInfer-Bench reads the exported trace set, builds its solutions and calls them, in a process of its own."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from harness.export.flashinfer_bench import definition_name
from harness.problem import parse_problem
from tests.export.real import champion_of, keep


@pytest.fixture
def exported(export, tmp_path: Path):
    timed = champion_of("b1 h4/2 s128 d64 fp16 causal", num_warps=4)
    estimated = champion_of("b2 h4/2 s256 d64 fp16 causal", kind="estimated")
    varied = champion_of("b1 h4/2 s128 d64 fp16 softcap=30")
    decode = champion_of("b1 h4/2 s128 d64 fp16 causal", kernel="flash_decode")
    backward = champion_of("b1 h4/2 s128 d64 fp16 causal bwd", kernel="flash_bwd")
    files = [
        keep(tmp_path, timed, estimated, varied), keep(tmp_path, decode, kernel="flash_decode"),
        keep(tmp_path, backward, kernel="flash_bwd"),
    ]  # fmt: skip
    return export("flashinfer-bench", *files)


def test_flashinfer_bench_reads_builds_and_finds_the_best(exported) -> None:
    out, document = exported
    name = "attention_h4_kv2_d64_fp16_causal"
    assert [path.stem for path in (out / "definitions").rglob("*.json")] == [name]
    solutions = [json.loads(path.read_text()) for path in sorted((out / "solutions").rglob("*.json"))]
    assert [one["name"] for one in solutions] == [
        f"flashtune_{kernel}_h200_{name}" for kernel in ("flash_decode", "flash_fwd")
    ]
    traces = [json.loads(line) for path in (out / "traces").rglob("*.jsonl") for line in path.read_text().splitlines()]
    # Of the estimate there is none; its problem is a workload.
    assert [(one["solution"], one["workload"]["axes"]["q_len"]) for one in traces] == [
        (solutions[0]["name"], 128), (solutions[1]["name"], 128),
    ]  # fmt: skip
    assert traces[1]["evaluation"]["performance"] == {
        "latency_ms": 1.0, "reference_latency_ms": 2.0, "speedup_factor": 2.0,
    }  # fmt: skip
    assert len((out / f"workloads/gqa_dense/{name}.jsonl").read_text().splitlines()) == 2
    reasons = {one["reason"] for one in document["skipped"]}
    assert "a definition is written of the forward pass only" in reasons and any("softcap" in one for one in reasons)
    try:
        version = importlib.metadata.version("flashinfer-bench")
    except importlib.metadata.PackageNotFoundError:
        assert document["verified_by"] is None
        pytest.skip("flashinfer-bench is not installed (extra `consumers`)")
    by = document["verified_by"]
    assert (by["package"], by["version"]) == ("flashinfer-bench", version)
    assert (
        "2 workloads and 2 traces, and get_best_trace found each" in by["check"] and "built 2 solutions" in by["check"]
    )


def test_names_of_definitions_tell_problems_apart() -> None:
    problems = (
        "b1 h4/2 s64 d64 fp16", "b1 h4/2 s64 d64 fp16 causal", "b1 h4/2 s64 d64 bf16", "b1 h4/4 s64 d64 fp16",
        "b1 h4/2 q32 k64 d64 fp16 causal top-left", "b1 h4/2 s64 d64 fp16 window=8:4", "b1 h4/2 s64 d64 fp16 scale=0.5",
        "b1 h4/2 s64 d64/32 fp16", "b1 h4/2 s64 d64 fp16 window=8:0", "b1 h4/2 s64 d64 fp16 window=0:8",
    )  # fmt: skip
    names = [definition_name(parse_problem(each)) for each in problems]
    assert len(set(names)) == len(problems) and all(name.replace("_", "").isalnum() for name in names)
    assert definition_name(parse_problem("b7 h4/2 s99 d64 fp16")) == names[0]
