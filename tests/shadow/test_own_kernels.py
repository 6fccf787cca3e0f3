"""The project's kernels under a watch: nothing to report on them as they are, and exactly the planted fault in a copy."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def planted_names() -> list[str]:
    """Read, not imported: importing kernels here would fix Triton's mode for this process."""
    tree = ast.parse((HERE / "own.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Planted"]
    return [ast.literal_eval(call.args[0]) for call in calls]


@pytest.fixture(scope="module")
def clean(report):
    return report("own.py", "clean")


def test_the_kernels_give_no_alarm(clean):
    assert len(clean) == 41
    assert [(line["case"], finding["text"]) for line in clean for finding in line["findings"]] == []


def test_watched_kernels_leave_the_same_bits(clean):
    assert [line["case"] for line in clean if not line["same"]] == []


@pytest.fixture(scope="module")
def planted(report, tmp_path_factory):
    lines = report("own.py", "planted", str(ROOT / "kernels"), str(tmp_path_factory.mktemp("planted")))
    return {line["bug"]: line for line in lines}


@pytest.mark.parametrize("name", planted_names())
def test_a_planted_fault_is_found_and_nothing_else(planted, name):
    found = planted[name]
    assert {(finding["kind"], finding["tensor"]) for finding in found["findings"]} == set(map(tuple, found["wanted"]))
    assert found["strays"] == [], "refused stores must not reach the guards"
    launched = [finding for finding in found["findings"] if finding["kind"] != "never written"]
    assert all(finding["kernel"].startswith("flash_") for finding in launched)
    assert all(
        finding["line"].split(":")[0] in ("primitives.py", "flash_fwd.py", "flash_bwd.py") for finding in launched
    )


def test_an_anchor_that_is_gone_fails_loudly(child, tmp_path):
    kernels, scratch = tmp_path / "kernels", tmp_path / "scratch"
    kernels.mkdir()
    scratch.mkdir()
    (kernels / "flash_bwd.py").write_text("PASS = 'bwd'\n")
    done = child("own.py", "planted", str(kernels), str(scratch), "dq written to q")
    assert done.returncode == 1
    assert "`dq written to q`" in done.stderr
