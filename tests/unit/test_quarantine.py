"""Who is held, for whom, and what is said; a file that is damaged holds nobody."""

from pathlib import Path

import pytest

from harness.errors import MachineError
from harness.outcome import CompileFailed, LaunchFailed, TimedOut, dangerous, maybe_innocent
from harness.quarantine import Quarantine

SCOPE = {"kernel": "flash_fwd", "digest": "1", "device": "h200", "triton": "3.6.0", "driver": None}
CRASH = LaunchFailed(stage="verify", reason="the process was killed by SIGSEGV")


def test_what_is_held_is_refused_by_every_tune_of_the_same_toolchain_only(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "quarantine.jsonl"
    first = Quarantine(path, SCOPE)
    assert first.refusal("p", {"a": 1}) is None
    first.hold("p", {"a": 1, "b": 2}, CRASH)
    first.hold("p", {"a": 2}, TimedOut(stage="compile", limit_s=180.0))
    first.hold("p", {"a": 3}, CompileFailed(reason="the process was killed by SIGABRT"))
    for held in (first, Quarantine(path, SCOPE)):
        refused = held.refusal("p", {"b": 2, "a": 1})
        assert refused.rule == "quarantine"
        assert refused.detail.startswith("verify: the process was killed by SIGSEGV (device h200, triton 3.6.0")
        assert "compile did not end within 180 s" in held.refusal("p", {"a": 2}).detail
        assert held.refusal("p", {"a": 3}).detail.startswith("compile: the process was killed by SIGABRT")
        assert held.refusal("another", {"a": 2}) is None
    for other in ({"triton": "3.9.0"}, {"digest": "2"}, {"driver": "580.1"}, {"device": "a100"}):
        assert Quarantine(path, SCOPE | other).refusal("p", {"a": 2}) is None


def test_the_same_is_written_down_once_and_a_damaged_line_holds_nobody(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    held = Quarantine(path, SCOPE)
    held.hold("p", {"a": 1}, CRASH)
    held.hold("p", {"a": 1}, CRASH)
    line = path.read_bytes()
    assert line.count(b"\n") == 1
    path.write_bytes(b"garbage\n[]\n{}\n" + line + line[:30])
    assert Quarantine(path, SCOPE).refusal("p", {"a": 1}) is not None


def test_a_quarantine_that_cannot_be_written_is_said_and_one_without_a_file_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write .*quarantine.jsonl"):
        Quarantine(tmp_path / "file" / "quarantine.jsonl", SCOPE).hold("p", {"a": 1}, CRASH)
    nobody = Quarantine(None, {})
    nobody.hold("p", {"a": 1}, CRASH)
    assert nobody.refusal("p", {"a": 1}) is None


@pytest.mark.parametrize(
    ("outcome", "bad", "perhaps"),
    [
        (CRASH, True, False),
        (LaunchFailed(stage="measure", reason="the device failed and its process was given up"), True, False),
        (LaunchFailed(stage="measure", reason="the process was killed by SIGKILL"), True, True),
        (TimedOut(stage="measure", limit_s=1.0), True, True),
        (LaunchFailed(stage="measure", reason="OutOfMemoryError: CUDA out of memory"), False, False),
        (CompileFailed(reason="PassManager::run failed"), False, False),
    ],
)
def test_who_is_dangerous_and_who_may_be_innocent(outcome: object, bad: bool, perhaps: bool) -> None:
    assert (dangerous(outcome), maybe_innocent(outcome)) == (bad, perhaps)
