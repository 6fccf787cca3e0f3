"""`flashtune tune --fleet`: what it refuses, and (slow) a whole tune with real compilers on a cluster of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import fleet, shared
from harness.cli import main
from harness.errors import MachineError, UsageError

PROBLEM = "b1 h2 s128 d64 fp16 causal"


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )


def test_what_is_no_fleet_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "flash_fwd", "--problem", PROBLEM, "--storage", "grpc://here:1"]) == 2
    assert "`--storage` is for a fleet" in capsys.readouterr().err
    assert main(["tune", "flash_fwd", "--problem", PROBLEM, "--fleet", "http://here:1"]) == 2
    assert "`http://here:1` is no Ray cluster" in capsys.readouterr().err


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patched:
        without(patched, "ray")
        assert main(["tune", "flash_fwd", "--problem", PROBLEM, "--fleet", "local"]) == 3
        said = capsys.readouterr().err
        assert "the package `ray`" in said
        assert "flashtune[fleet]" in said
    with monkeypatch.context() as patched:
        without(patched, "psycopg")
        with pytest.raises(MachineError, match="needs the package `psycopg`"):
            shared.open_storage("postgresql://me@here/there")


def test_addresses_of_storages() -> None:
    for address in ("sqlite:///here", "postgresql://", "grpc://here", "nonsense"):
        with pytest.raises((UsageError, MachineError)):
            shared.open_storage(address)
    assert shared.shown_url("postgresql://me:secret@here:5432/there") == "postgresql://me@here:5432/there"
    with pytest.raises(MachineError, match="does not answer") as refused:
        shared.open_storage("postgresql://me:secret@127.0.0.1:1/there")
    assert "secret" not in str(refused.value)


def test_batches_in_flight_do_not_depend_on_a_few_devices() -> None:
    assert {fleet.batches_ahead(devices, 4) for devices in (0, 1, 2, 3, 4)} == {3}
    assert fleet.batches_ahead(8, 4) == 5


@pytest.mark.slow
def test_a_fleet_of_compilers_estimates(storage: str, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "harness", "tune", "flash_fwd", "--fleet", "local", "--storage", storage, "--target", "h200",
        "--problem", PROBLEM, "--budget", "3", "--jobs", "2", "--draft", "--json", "--runs",
    ]  # fmt: skip

    def tuned(runs: Path) -> Any:
        done = subprocess.run([*command, str(runs)], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = tuned(tmp_path / "one")
    # Elsewhere, with nothing but the storage, everything is known already.
    again = tuned(tmp_path / "two")
    assert first["problems"][0]["champion"] == again["problems"][0]["champion"]
    kept = [(tmp_path / name).glob("*.jsonl") for name in ("one", "two")]
    one, two = (sorted(next(iter(each)).read_text().splitlines()) for each in kept)
    assert one == two
