"""docs/support.md, in child processes: it asks the kernels, and this process never imports Triton."""

import os
import subprocess
import sys
from pathlib import Path

from harness import problem

ROOT = Path(__file__).parents[2]
TINY = """
PASS = "fwd"


def launches(q, k, v, out, lse, slopes=None, *, scale, window_left, window_right, top_left, softcap=None):
    if q.dtype.itemsize == 4:
        raise ValueError("16 bits only")
    if softcap:
        raise NotImplementedError("softcap is to come")
    return []


def workspaces(q, k, v, **variant):
    return {}
"""


def written(path: Path, folder: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-W", "error", "-m", "harness.support", str(path)]
    environment = kept | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return path.read_text()


def test_the_document_in_the_repository_is_that_of_the_code(tmp_path: Path) -> None:
    # After a wanted change: python -m harness.support
    assert (ROOT / "docs" / "support.md").read_text() == written(tmp_path / "support.md", ROOT)


def test_every_field_of_a_problem_has_a_row() -> None:
    """A new variant needs one in `harness.support.ROWS`."""
    text = (ROOT / "docs" / "support.md").read_text()
    assert [name for name in problem._PLAIN if f"| `{name.replace('_', '-')}" not in text] == []


def test_what_a_kernel_refuses_is_no_and_its_reason_is_told(tmp_path: Path) -> None:
    for folder, text in (("kernels", TINY), ("search_spaces", "def default(problem, device):\n    return {}\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
        (tmp_path / folder / "tiny.py").write_text(text)
    text = written(tmp_path / "support.md", tmp_path)
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[2] for line in text.splitlines() if line[:2] == "| "
    }
    assert rows["attention without a mask"] == rows["ALiBi slopes"] == "fp16 bf16"
    assert rows["fp32"] == rows["softcap"] == rows["dropout"] == rows["paged keys and values"] == "-"
    for reason in (
        "- tiny, fp32: 16 bits only", "- tiny, softcap: softcap is to come; 16 bits only", "- tiny, dropout: has no dropout and",
        "- tiny, score and mask functions of the caller: has no functions", "- tiny, ALiBi slopes: 16 bits only",
    ):  # fmt: skip
        assert reason in text, text
