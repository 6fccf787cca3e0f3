"""The campaign with real child processes, real compilation and real judges, on a GPU that is pretended.

Everything is real but the launches, which the interpreter makes, and the times, which mean nothing.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.campaign import read_book
from harness.recorded import read_recorded

REPOSITORY = Path(__file__).parents[2]
# Of the whole space, the default and its like with other warps.
FEWER = """

_whole = space


def space(problem, device):
    found, chosen = _whole(problem, device), default(problem, device)
    kept = {"num_warps": (4, 8)}
    params = tuple(
        Param(
            one.name, tuple(v for v in one.values if v in (chosen[one.name], *kept.get(one.name, ()))), one.why, one.interpreted
        )
        for one in found.params
    )
    return Space(params=params, rules=found.rules)
"""


@pytest.mark.slow
def test_every_step_runs_with_real_children(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for part in ("kernels", "search_spaces"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for stem in ("flash_fwd", "flash_bwd", "flash_decode"):
        path = tmp_path / "search_spaces" / f"{stem}.py"
        path.write_text(path.read_text() + FEWER)
    pretended = Path(__file__).parent / "pretended"
    environment = os.environ | {
        "PYTHONPATH": f"{pretended}:{REPOSITORY}", "FLASHTUNE_PRETENDED_GPU": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.campaign.rehearse", str(tmp_path), str(tmp_path / "out"), "15", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=1000)
    assert ran.returncode == 0, ran.stderr[-3000:]
    document = json.loads(ran.stdout)
    parts = read_book(tmp_path / "out" / "campaign.json").parts
    failed = {name: (entry.status, entry.reason) for name, entry in parts.items() if entry.status in ("failed", "lost")}
    assert not failed
    assert document["wrong"] == []
    questions = [entry.data for name, entry in parts.items() if "[normal]" in name]
    assert len(questions) == 3
    for question in questions:
        assert all(one["status"] == "right" and one["runs"] == 10 for one in question["candidates"])
        assert question["candidates"][0]["interpreter"] == "compared" and question["candidates"][0]["difference"] == 0
    (path,) = (tmp_path / "out" / "spaces").iterdir()
    space = read_recorded(path)
    assert space.header.complete and len(space.measured) == 2 and all(line.estimate_ms for line in space.lines)
    champions = [entry.data["champion"] for name, entry in parts.items() if name.startswith("champions/")]
    assert len(champions) == 2 and all(one["certificate"]["where"] == "device" for one in champions)
    rivals = [entry.data["rivals"] for name, entry in parts.items() if name.startswith("beside/")]
    # PyTorch has two of its backends on a CPU; the others are said not to be there.
    assert len(rivals) == 3 and all("ratio" in one["sdpa:math"] and "ratio" in one["sdpa:flash"] for one in rivals)
    assert all("RuntimeError" in one["sdpa:cudnn"]["not_measured"] for one in rivals)
    assert document["ended"] == "out of time"  # too few configs to judge an estimate by
