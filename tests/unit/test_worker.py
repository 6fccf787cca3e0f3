"""Faults in a child process end as the outcome of one candidate, and the next candidate is tried as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.device import TARGETS
from harness.outcome import CompileFailed, LaunchFailed, TimedOut
from harness.problem import parse_problem
from harness.space import Config
from harness.worker import Job, Limits, ProcessRunner

PROBLEM = parse_problem("b1 h1 s16 d16 fp16")

# A kernel file whose `launches` does what its config says: stages call it in the child.
MISBEHAVING = """
import ctypes, os, time
PASS = "fwd"
def workspaces(q, k, v):
    return {}
def launches(q, k, v, out, lse, *, scale, window_left, window_right, top_left, act):
    if act == "abort":
        os.write(2, b"LLVM ERROR: the compiler gave up\\n")
        os.abort()
    if act == "segfault":
        ctypes.string_at(0)
    if act == "exit":
        os._exit(7)
    if act == "hang":
        time.sleep(3600)
    if act == "raise":
        raise ZeroDivisionError("a tile of no rows")
    if act == "memory":
        return [bytearray(1 << 36)]
    return []
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("workspace")
    for part in ("kernels", "search_spaces"):
        (root / part).mkdir()
        (root / part / "__init__.py").write_text("")
        (root / part / "subject.py").write_text(MISBEHAVING)
    job = Job(root=root, stem="subject", device=TARGETS["h200"], mode="estimated", seed=0)
    limits = Limits(compile_s=20, verify_s=20)
    made = ProcessRunner(job=job, jobs=1, cache=root / "cache", limits=limits)
    yield made
    made.close()


def act(name: str) -> Config:
    return Config({"act": name})


def test_a_quiet_candidate_comes_back(runner: ProcessRunner) -> None:
    artifact = runner.compile(PROBLEM, act("nothing"))()
    assert artifact.binaries == ()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("abort", "the process was killed by SIGABRT"),
        ("segfault", "the process was killed by SIGSEGV"),
        ("exit", "the process ended with exit code 7"),
        ("raise", "ZeroDivisionError: a tile of no rows"),
        ("memory", "MemoryError"),
    ],
)
def test_a_fault_in_the_compiler_is_an_outcome_and_the_next_candidate_is_fine(
    runner: ProcessRunner, what: str, reason: str
) -> None:
    failed, after = runner.compile(PROBLEM, act(what)), runner.compile(PROBLEM, act("nothing"))
    outcome = failed()
    assert isinstance(outcome, CompileFailed)
    assert outcome.reason == reason
    assert after().binaries == ()
    if what == "abort":
        assert "LLVM ERROR: the compiler gave up" in outcome.log
    if what == "raise":
        assert "in launches" in outcome.log


def test_a_fault_while_judging_is_a_failed_launch(runner: ProcessRunner) -> None:
    outcome = runner.verify(PROBLEM, act("abort"))()
    assert outcome == LaunchFailed(stage="verify", reason="the process was killed by SIGABRT", log=outcome.log)
    outcome = runner.verify(PROBLEM, act("raise"))()
    assert outcome == LaunchFailed(stage="verify", reason="ZeroDivisionError: a tile of no rows", log=outcome.log)


def test_a_kernel_that_launches_nothing_does_not_pass(runner: ProcessRunner) -> None:
    verdict = runner.verify(PROBLEM, act("nothing"))()
    assert verdict.status == "wrong"
    assert "nothing was launched" in verdict.detail


def test_a_hang_is_killed_and_the_next_candidate_is_fine(runner: ProcessRunner, tmp_path: Path) -> None:
    impatient = ProcessRunner(job=runner.job, jobs=1, cache=tmp_path, limits=Limits(compile_s=6))
    try:
        assert impatient.compile(PROBLEM, act("nothing"))().binaries == ()  # so that the limit is not spent on imports
        hanging, after = impatient.compile(PROBLEM, act("hang")), impatient.compile(PROBLEM, act("nothing"))
        began = time.monotonic()
        assert hanging() == TimedOut(stage="compile", limit_s=6)
        assert time.monotonic() - began < 15
        assert after().binaries == ()
    finally:
        impatient.close()


def test_children_die_with_a_parent_that_is_killed(runner: ProcessRunner, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(f"""
import sys
from pathlib import Path
from harness.device import TARGETS
from harness.problem import parse_problem
from harness.space import Config
from harness.worker import Job, ProcessRunner
if __name__ == "__main__":
    job = Job(root=Path({str(runner.job.root)!r}), stem="subject", device=TARGETS["h200"], mode="estimated", seed=0)
    runner = ProcessRunner(job=job, jobs=1, cache=Path({str(tmp_path)!r}))
    runner.compile(parse_problem({PROBLEM.key!r}), Config({{"act": "nothing"}}))()
    runner.compile(parse_problem({PROBLEM.key!r}), Config({{"act": "hang"}}))
    print("ready", flush=True)
    sys.stdin.read()
""")
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=10)
    gone, alive = psutil.wait_procs(
        [child for child in children if "resource_tracker" not in _command(child)], timeout=10
    )
    assert not alive
    assert gone
    for stream in (parent.stdin, parent.stdout):
        stream.close()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_device_that_no_longer_answers_costs_its_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a sticky CUDA error: the candidate raises, and then the device does not answer."""
    from harness import child, worker

    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    def raise_illegal(job: Job, problem: object, config: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    job = Job(root=Path(), stem="subject", device=TARGETS["h200"], mode="measured", seed=0)
    monkeypatch.setitem(child.STAGES, "verify", raise_illegal)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(child, "canary_complaint", lambda: "")
    monkeypatch.setattr(child, "device_answers", lambda: True)
    outcome = child.run_stage("verify", job, PROBLEM, act("nothing"))
    assert isinstance(outcome, LaunchFailed)
    assert not ended
    monkeypatch.setattr(child, "device_answers", lambda: False)
    with pytest.raises(SystemExit):
        child.run_stage("verify", job, PROBLEM, act("nothing"))
    assert worker.describe_exit(ended[0]) == "the device failed and its process was given up"


def test_a_device_that_fails_during_a_proof_costs_its_process_and_not_the_next_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The suite takes what a kernel raises for its answer, also the error of a device that then answers nobody."""
    from harness import child
    from tests.fake_runner import passing_proof, wrong_proof

    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    job = Job(root=Path(), stem="subject", device=TARGETS["h200"], mode="measured", seed=0)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(child, "canary_complaint", lambda: "")
    monkeypatch.setattr(child, "device_answers", lambda: False)
    monkeypatch.setitem(child.STAGES, "prove", lambda *given: passing_proof())
    assert child.run_stage("prove", job, PROBLEM, act("nothing")).passed and not ended
    monkeypatch.setitem(child.STAGES, "prove", lambda *given: wrong_proof())
    with pytest.raises(SystemExit):
        child.run_stage("prove", job, PROBLEM, act("nothing"))
    monkeypatch.setattr(child, "device_answers", lambda: True)
    assert child.run_stage("prove", job, PROBLEM, act("nothing")) == wrong_proof()


def call_me(kernel: object, what: str) -> object:
    from harness.errors import SubjectError, UsageError

    if what == "bug":
        raise ZeroDivisionError("in the function")
    if what == "subject":
        raise SubjectError("the kernel raised")
    if what == "usage":
        raise UsageError("asked wrongly")
    return kernel.PASS, what


def test_a_function_runs_in_a_child_and_what_it_raises_is_told_apart(runner: ProcessRunner) -> None:
    from harness.errors import UsageError

    def call(what: str) -> object:
        return runner.for_kernel("subject").call("compiler", "verify", call_me, what, limit_s=60)()

    assert call("fine") == ("fwd", "fine")
    outcome = call("bug")
    assert isinstance(outcome, LaunchFailed) and outcome.reason == "ZeroDivisionError: in the function"
    outcome = call("subject")
    assert isinstance(outcome, LaunchFailed) and outcome.reason == "the kernel raised"
    with pytest.raises(UsageError, match="asked wrongly"):
        call("usage")


def test_no_stage_outlasts_the_time_that_is_left(runner: ProcessRunner, tmp_path: Path) -> None:
    hurried = ProcessRunner(job=runner.job, jobs=1, cache=tmp_path, left=lambda: 8.0)
    try:
        assert hurried.compile(PROBLEM, act("nothing"))().binaries == ()
        assert hurried.compile(PROBLEM, act("hang"))() == TimedOut(stage="compile", limit_s=8.0)
    finally:
        hurried.close()
