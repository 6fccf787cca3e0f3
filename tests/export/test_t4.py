"""A search as others read it: Kernel Tuner's own schema and simulation, and our own reader of both formats."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from harness.landscape import read_landscapes
from harness.outcome import CompileFailed, Estimate, Estimated, Measured, Pruned, Record, Samples, TimedOut, Wrong
from harness.problem import parse_problem
from harness.store import open_journal
from tests.cli.desk import Desk
from tests.fake_champions import champion, champion_file, keep
from tests.fake_runner import fake_artifact, passing_verdict, wrong_verdict

PROBLEM = parse_problem("b1 h8 s64 d32 fp16")
TIMES = {(64, 4): (1.0, 1.1, 0.9), (64, 8): (2.0, 2.0, 2.0)}


def outcomes(mode: str):
    """A number for each of `TIMES`, and a failure of every kind."""
    passed = passing_verdict(PROBLEM)
    for (block, warps), times in TIMES.items():
        config = {"block_m": block, "num_warps": warps}
        if mode == "measured":
            yield config, Measured(verdict=passed, samples=Samples(times_ms=times), artifact=fake_artifact(config))
        else:
            estimate = Estimate(value_ms=times[0], terms={}, model="fake")
            yield config, Estimated(verdict=passed, estimate=estimate, artifact=fake_artifact(config))
    failures = (
        Pruned(rule="registers", detail="too many"), CompileFailed(reason="no"), TimedOut(stage="measure", limit_s=1.0),
        Wrong(verdict=wrong_verdict(PROBLEM)),
    )  # fmt: skip
    for warps, outcome in zip((1, 2, 4, 8), failures, strict=True):
        yield {"block_m": 32, "num_warps": warps}, outcome


@pytest.fixture(params=["measured", "estimated"])
def searched(request, desk: Desk) -> Desk:
    """A workspace with a search in a journal, and the champion that it left."""
    desk.mode = request.param
    identity = {
        "kernel": "subject", "device": "h200", "arch": "sm_90", "mode": desk.mode, "kernel_digest": desk.digest,
        "triton": "3.6.0", "torch": "2.13.0", "driver": None,
    }  # fmt: skip
    journal = open_journal(desk.results / "runs/subject-h200.jsonl", identity)
    for trial, (config, outcome) in enumerate(outcomes(desk.mode)):
        journal.append(Record(trial=trial, problem=PROBLEM.key, config=config, outcome=outcome, seconds=0.5))
    journal.close()
    best = champion(
        PROBLEM.key, kind=desk.mode, config={"block_m": 64, "num_warps": 4}, kernel_digest=desk.digest,
        source_digest=desk.digest,
    )  # fmt: skip
    keep(desk.results, champion_file(best, kernel="subject"), draft=desk.mode == "estimated")
    return desk


def test_others_read_the_search_and_so_do_we(searched: Desk) -> None:
    document = searched.document("export", "--to", "t4", "--out", "out")
    name = "subject-h200-b1_h8_s64_d32_fp16_fwd.json"
    assert [one["into"] for one in document["exported"]] == [[f"t4/{name}", f"kernel-tuner/{name}"]]
    objective = "time" if searched.mode == "measured" else "estimated_time"
    t4 = json.loads((searched.root / "out/t4" / name).read_text())
    words = [one["invalidity"] for one in t4["results"]]
    assert sorted(words) == sorted(["correct", "correct", "constraints", "compile", "timeout", "correctness"])
    measured = {one["name"] for each in t4["results"] for one in each["measurements"]}
    assert measured == {objective} and all(
        each["correctness"] == (each["invalidity"] == "correct") for each in t4["results"]
    )
    cache = json.loads((searched.root / "out/kernel-tuner" / name).read_text())
    assert cache["objective"] == objective and len(cache["cache"]) == 6
    if searched.mode == "estimated":
        # Nothing that is no time is found where times are looked for.
        assert all(isinstance(entry.get("time", ""), str) for entry in cache["cache"].values())
        assert "not a time" in cache["x_flashtune"]["note"]
    for path in (searched.root / "out/t4" / name, searched.root / "out/kernel-tuner" / name):
        (land,) = read_landscapes(path)
        found = {tuple(config.values()): one.time_ms for config, one in land.recordings.items()}
        assert found == {**{key: sorted(times)[1] if searched.mode == "measured" else times[0] for key, times in TIMES.items()},
                         **dict.fromkeys([(32, warps) for warps in (1, 2, 4, 8)])}  # fmt: skip
    require_checked(document, "kernel-tuner")
    assert "searched 1 caches and found all of each" in document["verified_by"]["check"]


def require_checked(document, package: str) -> None:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        assert document["verified_by"] is None
        pytest.skip(f"{package} is not installed (extra `rivals`)")
    assert (document["verified_by"]["package"], document["verified_by"]["version"]) == (package, version)


def test_a_search_of_another_version_of_the_kernel_stays(searched: Desk) -> None:
    searched.edit("return q\n", "return q + 0\n")
    document = searched.document("export", "--to", "t4", "--out", "out")
    assert document["files"] == {}
    assert "it is of another version of the kernel" in [one["reason"] for one in document["skipped"]]


def test_what_a_journal_calls_itself_names_no_file_elsewhere(searched: Desk) -> None:
    path = searched.results / "runs/subject-h200.jsonl"
    path.write_text(path.read_text().replace('"device": "h200"', '"device": "../../../escape"'))
    document = searched.document("export", "--to", "t4", "--out", "out", "--no-check")
    name = "subject-escape-b1_h8_s64_d32_fp16_fwd.json"
    assert sorted(document["files"]) == sorted([f"t4/{name}", f"kernel-tuner/{name}", "kernel-tuner/simulate.py"])


def test_a_champion_without_its_journal_says_so(searched: Desk, tmp_path: Path) -> None:
    (searched.results / "runs/subject-h200.jsonl").unlink()
    document = searched.document("export", "--to", "t4", "--out", "out")
    assert document["exported"] == [] and "no journal of its search is here" in document["skipped"][0]["reason"]
