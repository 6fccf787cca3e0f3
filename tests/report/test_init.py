"""`flashtune init`: from the checkout, and from a wheel in a venv that has nothing of the checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import UsageError
from harness.stock import stock_files, stock_root, write_stock

ROOT = Path(__file__).parents[2]
# So small that its gate and its proof are asked within seconds.
PROBLEM = "b1 h1 s32 d16 fp16"


def test_a_checkout_is_its_own_copy(tmp_path: Path) -> None:
    assert stock_root() == ROOT
    assert write_stock(tmp_path / "deep" / "work") == len(list(stock_files(ROOT)))
    for name in stock_files(ROOT):
        assert (tmp_path / "deep" / "work" / name).read_bytes() == (ROOT / name).read_bytes()


def test_every_tracked_file_of_kernels_and_spaces_is_part_of_it() -> None:
    listed = subprocess.run(["git", "ls-files", "kernels", "search_spaces"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    assert set(listed.stdout.split()) <= {str(name) for name in stock_files(ROOT)}


def test_the_verb_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "work"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"flash_fwd", "flash_bwd"} <= set(found["kernels"])
    assert found["files"] == sum(path.is_file() for path in (tmp_path / "work").rglob("*"))


def test_a_folder_that_holds_anything_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["init", str(tmp_path)]) == UsageError.exit_code
    assert "is not empty" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "mine")]) == UsageError.exit_code
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_workspace_of_an_installed_wheel_tunes(tmp_path: Path) -> None:
    """The wheel is built of a copy, so that the checkout keeps no `build/`; packages come from this Python, and nothing of ours:
    a `.pth` of a folder that a `.pth` names is not read."""
    source, wheels, venv = tmp_path / "source", tmp_path / "wheels", tmp_path / "venv"
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in [*stock_files(ROOT), *(path.relative_to(ROOT) for path in (ROOT / "harness").rglob("*"))]:
        if (ROOT / path).is_file() and "__pycache__" not in path.parts:
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes((ROOT / path).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source)
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (wheel,) = wheels.glob("flashtune-*.whl")
    run(*pip, "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = (venv / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    flashtune = venv / "bin" / "flashtune"
    run(flashtune, "init", "work", cwd=tmp_path)
    where = run(venv / "bin" / "python", "-c", "import harness; print(harness.__file__)", cwd=tmp_path / "work")
    assert where.startswith(str(venv)), where
    for name in stock_files(ROOT):
        assert (tmp_path / "work" / name).read_bytes() == (ROOT / name).read_bytes()
    tuned = run(
        flashtune, "tune", "flash_fwd", "--problem", PROBLEM, "--budget", "1", "--draft", "--json", "--jobs", "1",
        cwd=tmp_path / "work",
    )  # fmt: skip
    (problem,) = json.loads(tuned)["problems"]
    assert problem["champion"]["proof"]["status"] == "passed"
    assert list((tmp_path / "work" / "results" / "best").glob("*/flash_fwd.draft.json"))


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints, outside of this checkout."""
    done = subprocess.run(
        [str(each) for each in command], cwd=cwd or "/", capture_output=True, text=True, timeout=280,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "TMPDIR": str(Path("/tmp"))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
