"""`flashtune fuzz --impl`: somebody's function in a module of their own, without a workspace, right and misbehaving."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from harness import documents, fuzz
from harness.cases import read_counterexample
from harness.cli import main
from harness.foreign import Foreign
from harness.fuzz_child import Plan

REPOSITORY = Path(__file__).parents[2]

MODULE = """
import ctypes, os, time
import torch
from torch.nn.functional import scaled_dot_product_attention

def right(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    mask = attn_mask
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q.double() @ k.double().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v.double()).to(q.dtype)

def unscaled(q, k, v, **options):
    return right(q, k, v, **{**options, "scale": 1.0})

def mutates(q, k, v, **options):
    out = right(q, k, v, **options)
    k.zero_()
    return out

def hangs(q, k, v, **options):
    time.sleep(1000)

def segfaults(q, k, v, **options):
    ctypes.string_at(0)

"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "somebodys.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flashtune(library: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", *argv], cwd=library, capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": f"{REPOSITORY}:{library}", "PATH": "/usr/bin:/bin", "HOME": str(library)},
    )  # fmt: skip


def test_a_right_function_passes_and_nothing_is_written(library: Path) -> None:
    done = flashtune(
        library, "fuzz", "--impl", "somebodys:right", "--signature", "sdpa", "--supports", "fwd fp16 fp32", "--cases", "20",
        "--time", "100s", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    jsonschema.validate(document, documents.json_schema("fuzz"))
    assert document["cases"] >= 20
    assert document["oracles"]["bound"] > 10
    assert set(document["largest"]) == {"out"}
    assert [path.name for path in library.iterdir() if path.name != "__pycache__"] == ["somebodys.py"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        # tests/foreign/test_plugin.py has such a wrong function in every run.
        pytest.param("unscaled", "Falsified", marks=pytest.mark.slow),
        ("mutates", "mutated input: k was written to"),
        ("segfaults", "the process was killed by SIGSEGV"),
    ],
)
def test_misbehaviour_is_a_named_finding_that_replays(library: Path, name: str, says: str) -> None:
    asked = ["--impl", f"somebodys:{name}", "--signature", "sdpa", "--supports", "fwd fp16"]
    done = flashtune(library, "fuzz", *asked, "--time", "100s", "--seed", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert says in done.stdout
    (path,) = (library / "flashtune-corpus" / f"somebodys-{name}").iterdir()
    example = read_counterexample(path)
    assert example.case.foreign == Foreign(f"somebodys:{name}", "sdpa", ("fwd", "fp16"))
    again = flashtune(library, "replay", str(path))
    assert again.returncode == 1, again.stdout + again.stderr
    # What was found is asked first, and found again.
    rerun = flashtune(library, "fuzz", *asked, "--profile", "repro", "--json")
    assert rerun.returncode == 1, rerun.stdout + rerun.stderr
    assert json.loads(rerun.stdout)["cases"] == 1


def test_a_function_that_is_not_there_is_named(library: Path) -> None:
    done = flashtune(library, "fuzz", "--impl", "somebodys:rigth", "--signature", "sdpa")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "somebodys has no `rigth`" in done.stderr
    assert "did you mean `right`?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_function_that_hangs_is_killed(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "HANG_S", 12.0)
    monkeypatch.setattr(fuzz, "_CRASHES", 0)
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{library}")
    plan = Plan(seed=0, seconds=60, cases=10, foreign=Foreign("somebodys:hangs", "sdpa", ("fwd", "fp16")))
    tally = fuzz.fuzz(plan, tmp_path / "corpus", versions={}, seen=lambda tally: None)
    assert tally.verdicts == {"timed out": 1}
    assert tally.found[0].detail == "no answer within 12 seconds"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fuzz"], "found neither"),
        (["fuzz", "flash_fwd", "--impl", "sdpa"], "found both"),
        (["fuzz", "--impl", "somebodys:right"], "a function needs a signature"),
        (["fuzz", "--impl", "somebodys:right", "--signature", "sdpaa"], "sdpaa"),
        (["fuzz", "--impl", "somebodys.right", "--signature", "sdpa"], "`somebodys.right` names no function"),
        (["fuzz", "--impl", "sdpa", "--supports", "everything"], "everything"),
        (["fuzz", "--impl", "sdpa", "--profile", "weekly"], "there is no profile `weekly`"),
    ],
)
def test_a_mistake_is_answered_in_words(
    library: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert says in capsys.readouterr().err
