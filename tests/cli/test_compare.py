"""`compare`: what became faster or slower, what cannot be told, and what must not be compared."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from harness import documents
from harness.champions import Number
from harness.cli import main
from harness.keeping import write_champions
from harness.outcome import Measured, Record, Samples
from harness.store import open_journal
from tests.fake_champions import champion, champion_file
from tests.fake_runner import fake_artifact, passing_verdict

PROBLEM, OTHER = "b1 h8 s64 d32 fp16 fwd", "b2 h8 s64 d32 fp16 fwd"


def number(value: float, spread: float = 0.01, **changes: Any) -> Number:
    fields: dict[str, Any] = {
        "kind": "measured", "value_ms": value, "interval_ms": (value * (1 - spread), value * (1 + spread)), "samples": 40,
        "protocol": "p1", "method": "graph of 1, L2 flushed",
    }  # fmt: skip
    return Number(**(fields | changes))


def file(
    folder: Path, name: str, *numbers: Number, problems: tuple[str, ...] = (PROBLEM, OTHER), **changes: Any
) -> Path:
    path = folder / f"{name}.json"
    found = [champion(problem, number=one) for problem, one in zip(problems, numbers, strict=False)]
    write_champions(path, champion_file(*found, **changes))
    return path


def compare(old: Path, new: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert main(["compare", str(old), str(new), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, documents.json_schema("compare"))
    return {one["problem"]: one for one in found["problems"]} | {"": found}


def test_a_regression_is_found_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = file(tmp_path, "old", number(1.0), number(1.0)), file(tmp_path, "new", number(1.2), number(0.5))
    found = compare(old, new, capsys, code=1)
    slower, faster = found[PROBLEM], found[OTHER]
    assert slower["verdict"] == "slower" and slower["speedup"] == pytest.approx(1 / 1.2)
    assert slower["interval"] == pytest.approx([0.99 / 1.212, 1.01 / 1.188])
    assert faster["verdict"] == "faster" and found[""]["regressions"] == 1
    assert main(["compare", str(old), str(new)]) == 1
    out = capsys.readouterr().out
    assert out.index("slower: flash_fwd") < out.index("faster: flash_fwd") and "1 problem became slower" in out
    assert max(len(line) for line in out.splitlines()) <= 100 + len(str(tmp_path)) * 2


def test_overlapping_intervals_tell_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(file(tmp_path, "old", number(1.0)), file(tmp_path, "new", number(1.015)), capsys)
    assert found[PROBLEM]["verdict"] == "cannot tell" and "overlap" in found[PROBLEM]["reason"]


@pytest.mark.parametrize(("changed", "why"), [
    ({"kind": "estimated", "interval_ms": None}, "the old number is measured, the new one estimated"),
    ({"interval_ms": None}, "too few samples"), ({"protocol": "p2"}, "different versions of the code"),
    ({"method": "event, L2 flushed"}, "taken by `graph of 1, L2 flushed`, the new one by `event"),
])  # fmt: skip
def test_what_answers_another_question_is_not_compared(
    changed: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(file(tmp_path, "old", number(1.0)), file(tmp_path, "new", number(9.0, **changed)), capsys)
    assert found[PROBLEM]["verdict"] == "cannot tell" and why in found[PROBLEM]["reason"]


def test_estimates_are_compared_with_estimates_only_and_said_to_be_none_but_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, Any] = {"kind": "estimated", "interval_ms": None, "samples": None, "method": None}
    old, new = file(tmp_path, "old", number(1.0, **plain)), file(tmp_path, "new", number(1.1, **plain))
    found = compare(old, new, capsys, code=1)[PROBLEM]
    assert found["verdict"] == "slower" and found["interval"] is None and "no times" in found["reason"]
    assert compare(old, old, capsys)[PROBLEM]["verdict"] == "same"


def test_what_is_in_one_of_them_only_and_another_environment_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = file(tmp_path, "old", number(1.0), number(1.0))
    new = file(tmp_path, "new", number(1.0), problems=(PROBLEM,), torch="2.99.0")
    found = compare(old, new, capsys)
    assert found[OTHER]["verdict"] == "gone" and "2.99.0" in found[""]["notes"][0]
    assert compare(new, old, capsys)[OTHER]["verdict"] == "new"


def test_folders_hold_one_number_for_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        file(tmp_path / name, "flash_fwd", number(1.0 if name == "a" else 2.0))
    assert compare(tmp_path / "a", tmp_path / "b", capsys, code=1)[PROBLEM]["verdict"] == "slower"
    file(tmp_path / "a", "flash_fwd.draft", number(1.0))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "more than one number" in capsys.readouterr().err


def test_other_devices_and_what_is_not_there_are_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = file(tmp_path, "old", number(1.0))
    assert main(["compare", str(old), str(file(tmp_path, "far", number(1.0), device="a100"))]) == 2
    assert "no kernel on a device is in both" in capsys.readouterr().err
    assert main(["compare", str(old), str(tmp_path / "nothing.json")]) == 2
    assert "there is no " in capsys.readouterr().err


def journal(path: Path, scale: float, *, incumbent: float | None = None) -> Path:
    """A screening of one config, and (with an incumbent) the last comparison with the default."""
    rng = np.random.default_rng(1)
    times = tuple(scale * (1 + 0.002 * rng.standard_normal(40)))
    identity = {
        "kernel": "flash_fwd",
        "device": "h200",
        "torch": "2.13.0",
        "triton": "3.6.0",
        "judge_digest": path.stem,
    }
    kept = open_journal(path, identity)
    artifact = fake_artifact({"block_m": 64})

    def outcome(samples: Samples) -> Measured:
        from harness.problem import parse_problem

        return Measured(verdict=passing_verdict(parse_problem(PROBLEM), "device"), samples=samples, artifact=artifact)

    plain = {"trial": 0, "problem": PROBLEM, "config": {"block_m": 64}, "seconds": 1.0}
    kept.append(Record(**plain, outcome=outcome(Samples(times_ms=(scale / 2,) * 6, method="graph"))))
    beside = () if incumbent is None else tuple(incumbent / scale * time for time in times)
    kept.append(Record(
        **plain, role="final", beside=None if incumbent is None else {"block_m": 32},
        outcome=outcome(Samples(times_ms=times, incumbent_ms=beside, method="graph")),
    ))  # fmt: skip
    kept.close()
    return path


def test_journals_are_compared_by_the_samples_taken_after_the_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = journal(tmp_path / "old.jsonl", 1.0), journal(tmp_path / "new.jsonl", 1.1)
    found = compare(old, new, capsys, code=1)[PROBLEM]
    assert found["verdict"] == "slower" and found["old_ms"] == pytest.approx(1.0, rel=0.01)
    assert found["interval"][0] < 1 / 1.1 < found["interval"][1]
    # Where the default is no slower it stays, and its samples count.
    stays = journal(tmp_path / "stays.jsonl", 1.1, incumbent=1.0)
    found = compare(old, stays, capsys)[PROBLEM]
    assert (
        found["verdict"] == "cannot tell"
        and found["new_ms"] == pytest.approx(1.0, rel=0.01)
        and found["config_changed"]
    )
