"""Every fault ends as an outcome with its reason, costs at most the trial in flight, and is what docs/faults.md says."""

from pathlib import Path

import pytest

from harness.outcome import CompileFailed, LaunchFailed, Measured, Pruned, TimedOut
from tests.faults import injected
from tests.faults.injected import CALM, CANDIDATES, Row, configs, table, tune_in

EXPECTED = {
    "segfault in the compiler": "compile failed: the process was killed by SIGSEGV",
    "compiler abort": "compile failed: the process was killed by SIGABRT",
    "hang in the compiler": "timed out in compile after 2.50 s",
    "out of memory on the host": "compile failed: MemoryError",
    "compiler killed once": "measured",
    "illegal address": "verify failed: the device failed and its process was given up",
    "misaligned access": "measure failed: the device failed and its process was given up",
    "hang on the device": "timed out in measure after 2.50 s",
    "out of memory on the device": "measure failed: RuntimeError: CUDA out of memory. Tried to allocate 2.00 TiB.",
    "segfault on the device": "verify failed: the process was killed by SIGSEGV",
    "worker killed once": "measured",
    "worker killed always": "measure failed: the process was killed by SIGKILL",
    "error that shows in the next candidate": "measured",
    "all children killed between trials": "7 of 7 measured",
    "device that fails its canary once": "waited for; 2 of 2 measured",
    "device that fails its canary for good": "the tune ends: the device no longer computes what is known",
    "full disk under the compiler": "the tune ends: a child process found no room on the disk",
    "full disk under the journal": "the tune ends: cannot write to the journal RUNS/run.jsonl: No space left on device",
    "corrupted journal tail": "2 trials kept, the rest run again",
    "clock jump": "3 of 3 measured",
    "two tuners on one journal": "the second ends: the journal RUNS/run.jsonl is being written by another tune",
    "parent killed": "1 finished trial kept, the next run goes on",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return injected.rows(tmp_path_factory.mktemp("faults"))


def test_every_fault_ends_as_an_outcome_with_its_reason(found: list[Row]) -> None:
    assert {row.fault for row in found} == EXPECTED.keys()
    for row in found:
        assert EXPECTED[row.fault] in row.outcome, row


def test_at_most_the_trial_in_flight_is_lost(found: list[Row]) -> None:
    assert all(row.lost <= 1 for row in found)
    assert not any(row.lost for row in found if row.fault in CANDIDATES)


def test_the_table_in_the_docs_is_what_happens(found: list[Row]) -> None:
    written = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    assert table(found) == written, "run `python -m tests.faults --write`"


def test_what_may_be_innocent_is_tried_again_once_and_then_held(tmp_path: Path) -> None:
    order = configs("hang in the compiler", "worker killed always", "segfault in the compiler", CALM)
    runs = [tune_in(tmp_path, order)[0] for _ in range(3)]
    outcomes = [[record.outcome for record in records] for records in runs]
    assert [[record.attempt for record in records] for records in runs] == [[1] * 5, [1, 2, 2, 1, 1], [1, 2, 2, 1, 1]]
    assert runs[1] == runs[2]
    for outcome in outcomes:
        assert [type(one) for one in outcome] == [Measured, TimedOut, LaunchFailed, CompileFailed, Measured]
    # A new journal of the same toolchain meets none of them again; one of another toolchain does.
    (tmp_path / "run.jsonl").unlink()
    records, _ = tune_in(tmp_path, order)
    held = [record.outcome for record in records[1:4]]
    assert all(isinstance(outcome, Pruned) and outcome.rule == "quarantine" for outcome in held), held
    assert "compile did not end within 2.5 s (device h200, triton 3.6.0, driver 580.1)" in held[0].detail
    assert "measure: the process was killed by SIGKILL" in held[1].detail
