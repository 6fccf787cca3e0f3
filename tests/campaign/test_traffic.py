"""Bytes moved, by a `ncu` that is a script: what is read of it, and what is said where there is nothing to read."""

from pathlib import Path
from typing import Any

import pytest

from harness import lab_truth, profiler
from harness.campaign_plan import PAPER, traffic_name
from harness.problem import parse_problem
from harness.profiler import Traffic, read_traffic
from tests.campaign.test_command import Desk

RUN_WITHIN = lab_truth.run_within

FORWARD = parse_problem(f"{PAPER} fwd")
HEAD = '"ID","Process ID","Process Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
ROW = '"{id}","7","python","{kernel}","Command line profiler metrics","dram__bytes.sum","{unit}","{value}"'


def table(*rows: tuple[str, str], noise: bool = True) -> str:
    lines = [
        ROW.format(id=place, kernel=f"k{place}", unit=unit, value=value) for place, (unit, value) in enumerate(rows)
    ]
    before = ["==PROF== Connected to process 7 (/usr/bin/python)", "some words of the program"] if noise else []
    return "\n".join([*before, HEAD, *lines])


@pytest.mark.parametrize(("said", "found"), [
    (table(("byte", "1,000"), ("byte", "24")), Traffic(bytes_=1024.0, launches=2)),
    (table(("Mbyte", "1.5"), noise=False), Traffic(bytes_=1.5e6, launches=1)),
    ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission to read counters", "ERR_NVGPUCTRPERM - no permission"),
    (table(("byte", "n/a")), "`ncu` gave `n/a byte`"), (table(("inst", "5")), "`ncu` gave `5 inst`"),
    (table(), "no dram__bytes.sum"), ("", "`ncu` gave no table"), ("Killed", "no table: Killed"),
])  # fmt: skip
def test_what_is_read_of_a_table(said: str, found: Any) -> None:
    answer = read_traffic(said)
    assert answer == found if isinstance(found, Traffic) else isinstance(answer, str) and found in answer


def install(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `ncu` on the PATH that keeps what it was asked."""
    folder.mkdir()
    path = folder / "ncu"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder / "asked"


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    found = Desk(tmp_path, capsys, monkeypatch)
    # What fuzzes is not run; the profiler is.
    monkeypatch.setattr(lab_truth, "run_within", RUN_WITHIN)
    return found


def moved(desk: Desk) -> dict[str, Any]:
    desk.few("beside/traffic")
    desk.campaign()
    entry = desk.parts()[traffic_name(FORWARD)]
    assert entry.status == "done"
    found: dict[str, Any] = entry.data
    return found


def test_the_campaign_reads_what_standard_attention_and_ours_move(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standard, ours = (table(("byte", value)).replace("\n", "\\n") for value in ("80,000,000,000", "2,000,000,000"))
    script = f"case \"$*\" in *sdpa:math*) printf '{standard}';; *) printf '{ours}';; esac"
    asked = install(tmp_path / "bin", script, monkeypatch)
    found = moved(desk)
    assert found["traffic"]["standard"] == {"dram_bytes": 80e9, "launches": 1}
    assert found["traffic"]["ours"] == {"dram_bytes": 2e9, "launches": 1}
    assert found["least_bytes"] == FORWARD.least_bytes and found["flops"] == FORWARD.flops
    lines = asked.read_text().splitlines()
    assert len(lines) == 4 and all(
        "--metrics dram__bytes.sum" in line and "--profile-from-start off" in line for line in lines
    )
    assert sum('"rival": "sdpa:math"' in line for line in lines) == 2 and all(
        "harness.traffic_child" in line for line in lines
    )
    _, out, _ = desk.run("--minutes", "1")
    assert "GPT-2 medium fwd, bytes moved by ncu: standard 80.0 GB, ours 2.00 GB" in out


@pytest.mark.parametrize(("script", "why"), [
    ("echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1", "ERR_NVGPUCTRPERM"),
    ("printf '%s' '" + table(("byte", "5")) + "'; echo gone >&2; exit 9", "ended with exit code 9: gone"),
])  # fmt: skip
def test_what_could_not_be_read_is_said_with_its_reason(
    script: str, why: str, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "bin", script, monkeypatch)
    found = moved(desk)["traffic"]
    assert all(why in one["not_measured"] and "dram_bytes" not in one for one in found.values())


def test_without_a_profiler_nothing_is_made_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "find_program", lambda: None)
    found = moved(desk)["traffic"]
    assert found == {name: {"not_measured": "`ncu` (Nsight Compute) is not installed"} for name in ("standard", "ours")}
