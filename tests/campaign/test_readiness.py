"""What a machine lacks for a campaign, said before its time is spent, on machines that are made up."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from harness import documents, readiness
from harness.cli import main
from harness.readiness import Need, needs_of

REPOSITORY = Path(__file__).parents[2]
FINE = json.dumps({"name": "NVIDIA H200", "free": 140 << 30, "total": 141 << 30, "why": ""})


def found(
    out: Path, answer: tuple[str, str] = (FINE, ""), sanitizer: str = "", broken: dict[str, str] | None = None
) -> dict[str, Need]:
    def ask(program: str, seconds: float) -> tuple[str, str]:
        return (json.dumps(broken or {}), "") if "import_module" in program else answer

    needs = needs_of(out, str(REPOSITORY), ask=ask, refuses=lambda seconds: sanitizer)
    return {need.name: need for need in needs}


def test_a_machine_with_everything_is_ready(tmp_path: Path) -> None:
    needs = found(tmp_path)
    assert {name for name, need in needs.items() if need.severity == "missing"} == set()
    assert needs["GPU"].found == "NVIDIA H200, 140 of 141 GiB free; a kernel runs in a graph"
    assert needs["workspace"].found == str(REPOSITORY)


@pytest.mark.parametrize(("answer", "said"), [
    (("", "no answer within 180 seconds"), "no answer within 180 seconds"), (("gibberish", ""), "it said nothing"),
    ((json.dumps({"why": "torch 2.11.0 sees no GPU"}), ""), "torch 2.11.0 sees no GPU"),
    ((FINE.replace('""', '"a small kernel in a graph gave a wrong answer"'), ""), "gave a wrong answer"),
])  # fmt: skip
def test_a_device_that_does_not_answer_as_it_should_is_missing(
    tmp_path: Path, answer: tuple[str, str], said: str
) -> None:
    need = found(tmp_path, answer)["GPU"]
    assert need.severity == "missing" and said in need.found


def test_packages_that_are_missing_or_old_are_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = readiness.importlib.util.find_spec
    monkeypatch.setattr(readiness.importlib.util, "find_spec", lambda name: None if name == "optuna" else real(name))
    versions = {"triton": "3.5.1", "numpy": "2.5.2"}
    old = readiness.version_of
    monkeypatch.setattr(readiness, "version_of", lambda name: versions.get(name) or old(name))
    needs = found(tmp_path)
    assert needs["optuna"] == Need(name="optuna", found="not installed", severity="missing", hint=needs["optuna"].hint)
    assert "carry its wheel" in needs["optuna"].hint
    assert needs["triton"].severity == "missing" and "3.5.1, which is too old" in needs["triton"].found
    versions["triton"] = "3.6.0"
    needs = found(tmp_path)
    assert needs["interpreter"].severity == "warning" and "numpy 2.5.2" in needs["interpreter"].found
    assert "--answers" in needs["interpreter"].hint


def test_a_package_that_is_there_and_cannot_be_imported_is_missing(tmp_path: Path) -> None:
    why = "ModuleNotFoundError: No module named 'pydantic_core._pydantic_core'"
    need = found(tmp_path, broken={"pydantic": why})["pydantic"]
    assert need.severity == "missing" and why in need.found
    program = readiness._IMPORT_PROGRAM % ["json", "no_such_module"]
    out, failed = readiness._ask(program, 60.0)
    assert failed == "" and json.loads(out) == {
        "no_such_module": "ModuleNotFoundError: No module named 'no_such_module'"
    }


def test_what_python_cannot_even_try_to_import_is_missing(tmp_path: Path) -> None:
    needs = needs_of(tmp_path, str(REPOSITORY), ask=lambda program, seconds: ("", "killed"), refuses=lambda seconds: "")
    assert {need.name: need for need in needs}["imports"].severity == "missing"


def test_a_sanitizer_that_is_there_and_does_not_work_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness.sanitizer, "find_program", lambda: "/usr/bin/compute-sanitizer")
    assert found(tmp_path)["compute-sanitizer"].severity == "fine"
    need = found(tmp_path, sanitizer="Device not supported")["compute-sanitizer"]
    assert need.severity == "warning" and "Device not supported" in need.found
    monkeypatch.setattr(readiness.sanitizer, "find_program", lambda: None)
    assert found(tmp_path)["compute-sanitizer"].found == "not installed"


def test_a_folder_that_cannot_be_written_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(readiness.tempfile, "TemporaryFile", refuse)
    assert found(tmp_path / "new" / "folder")["out"] == Need(
        name="out", found=f"{tmp_path}: No space left on device", severity="missing",
        hint="choose another folder: what is found is written there",
    )  # fmt: skip


def test_it_is_printed_for_people_and_for_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(program: str, seconds: float) -> tuple[str, str]:
        return ('{"optuna": "no"}', "") if "import_module" in program else ("", "no GPU in this test")

    monkeypatch.setattr(readiness, "_ask", ask)
    argv = ["doctor", "--campaign", "--out", str(tmp_path), "--workspace", str(REPOSITORY)]
    assert main(argv) == 3
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "X GPU               no GPU in this test" in out and out.endswith(
        "Can a campaign start here?  no: 2 missing\n"
    )
    assert "--no-index --find-links wheels optuna\n" in out
    assert main([*argv, "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, documents.json_schema("readiness"))
    assert document["ready"] is False and document["bring"][-1].endswith("wheels optuna")


def test_it_needs_no_package_at_all() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import harness.readiness as r\n"
        "r._ask = lambda program, *a: ('{}' if 'import_module' in program else '', 'no')\n"
        "import argparse\n"
        "raise SystemExit(r.run_doctor(argparse.Namespace(out=None, workspace=sys.argv[1], json=False)))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program, str(REPOSITORY)], capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr == ""
    assert "X pydantic          not installed" in done.stdout


def test_a_command_that_lacks_a_package_says_so() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); from harness.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-S", "-c", program, str(REPOSITORY)], capture_output=True, text=True)
    assert done.returncode == 3 and "is not installed in" in done.stderr and "doctor --campaign" in done.stderr
    assert "Traceback" not in done.stderr
