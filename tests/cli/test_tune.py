"""Whole commands on the fake device: text, documents, exit codes, files."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from harness import commands, documents
from harness.champions import champion_schema
from harness.cli import main
from harness.commands import find_space
from harness.device import TARGETS
from harness.problem import Problem
from harness.space import Space
from harness.workspace import find_workspace
from tests.fake_runner import FakeRunner, wrong_verdict

REPOSITORY = Path(__file__).parents[2]
PROBLEM = "b1 h8/2 s512 d64 bf16 causal"


@functools.cache
def space_of(kernel: str, problem: Problem, device: str) -> Space:
    """A space as a tune finds it: of one kernel, problem and device it is the same in every test, and takes a second to list."""
    return find_space(find_workspace(str(REPOSITORY)), kernel, problem, TARGETS[device])


class Desk:
    """A workspace of its own around the repository's kernels, a fake device, and a way to run commands."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        for part in ("kernels", "search_spaces"):
            (root / part).symlink_to(REPOSITORY / part)
        self.root = root
        self.runners: list[FakeRunner] = []
        self.scripts: dict = {}
        self._capsys = capsys
        self._patch = monkeypatch
        # Symlinked parts lie elsewhere, which the workspace would rightly refuse.
        monkeypatch.setattr("harness.workspace._require_inside", lambda *arguments: None)
        # Optuna forces every suggested value to the disk, twenty a trial: what survives a power cut is no question here.
        monkeypatch.setattr("os.fsync", lambda descriptor: None)
        monkeypatch.setattr(commands, "process_runner", self._make_runner)
        monkeypatch.setattr(
            commands, "find_space", lambda _, kernel, problem, device: space_of(kernel, problem, device.name)
        )
        monkeypatch.chdir(root)
        self.here(None)

    def here(self, device: str | None) -> None:
        live = TARGETS[device] if device else None
        self._patch.setattr(commands, "_live_device", lambda: (live, "580.1" if live else None))

    def _make_runner(self, job, jobs) -> FakeRunner:
        self.runners.append(FakeRunner(job.mode, device=job.device, noise=0.01, scripts=self.scripts))
        return self.runners[-1]

    def run(self, *argv: str) -> tuple[int, str, str]:
        code = main(list(argv))
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def tune(self, *argv: str, kernel: str = "flash_fwd") -> dict:
        budget = () if "--budget" in argv else ("--budget", "12")
        code, out, err = self.run("tune", kernel, "--problem", PROBLEM, *budget, "--json", *argv)
        assert code == 0, err
        document = json.loads(out)
        jsonschema.validate(document, documents.json_schema("tune"))
        return document


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("kernel", ["flash_fwd", "flash_bwd"])
def test_measured_mode_from_command_to_champion_file(desk: Desk, kernel: str) -> None:
    desk.here("h200")
    document = desk.tune(kernel=kernel)
    assert document["mode"] == "measured"
    assert document["device"] == {"name": "h200", "arch": "sm_90"}
    champion = document["problems"][0]["champion"]
    assert champion["kind"] == "measured"
    assert champion["verdict"]["where"] == "device"
    stored = json.loads((desk.root / f"results/best/h200/{kernel}.json").read_text())
    assert stored["champions"][0]["config"] == champion["config"]
    assert stored["champions"][0]["number"]["kind"] == "measured"
    assert stored["environment"]["driver"] == "580.1" and stored["environment"]["toolchain"] == "fake 1.0"
    assert stored["champions"][0]["certificate"]["kernel_digest"] == stored["champions"][0]["kernel"]["source_digest"]
    number = stored["champions"][0]["number"]
    assert number["interval_ms"][0] <= number["value_ms"] <= number["interval_ms"][1] and number["samples"] == 31
    assert number["runner_up"]["config"] != champion["config"]
    jsonschema.validate(stored, champion_schema())


def test_estimates_become_drafts_and_leave_measured_champions_alone(desk: Desk) -> None:
    desk.here("h200")
    desk.tune()
    before = (desk.root / "results/best/h200/flash_fwd.json").read_bytes()
    desk.here(None)
    document = desk.tune("--target", "h200")
    assert document["mode"] == "estimated"
    assert (desk.root / "results/best/h200/flash_fwd.json").read_bytes() == before
    draft = json.loads((desk.root / "results/best/h200/flash_fwd.draft.json").read_text())
    assert {champion["number"]["kind"] for champion in draft["champions"]} == {"estimated"}


def test_drafts_and_journals_are_ignored_by_git() -> None:
    ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
    assert "results/runs/" in ignored
    assert "results/best/*/*.draft.json" in ignored


def test_a_target_that_is_not_here_is_estimated_even_beside_a_gpu(desk: Desk) -> None:
    desk.here("a100")
    assert desk.tune("--target", "h200")["mode"] == "estimated"
    assert desk.tune("--target", "a100")["mode"] == "measured"
    assert desk.tune("--target", "sm_80")["mode"] == "measured"


def test_the_same_seed_finds_the_same_champions_and_repeats_nothing(desk: Desk) -> None:
    first = desk.tune("--seed", "3")
    second = desk.tune("--seed", "3")
    assert not desk.runners[1].calls
    assert first == second
    third = desk.tune("--seed", "3", "--runs", str(desk.root / "elsewhere"))
    assert {key: third[key] for key in third if key != "journal"} == {
        key: first[key] for key in first if key != "journal"
    }


def test_a_larger_budget_continues_where_the_smaller_ended(desk: Desk) -> None:
    desk.tune()
    document = json.loads(desk.run("tune", "flash_fwd", "--problem", PROBLEM, "--budget", "20", "--json")[1])
    assert sum(document["problems"][0]["outcomes"].values()) == 20
    assert desk.runners[1].calls["compile"] == 8


def test_no_champion_when_every_candidate_is_wrong(desk: Desk) -> None:
    desk.scripts = {"verify": lambda problem, config: wrong_verdict(problem)}
    document = desk.tune()
    assert document["problems"][0]["champion"] is None
    assert document["problems"][0]["outcomes"]["wrong"] + document["problems"][0]["outcomes"].get("pruned", 0) == 12
    assert not (desk.root / "results/best").exists()
    code, out, _ = desk.run("tune", "flash_fwd", "--problem", PROBLEM, "--budget", "12")
    assert "No champion: no candidate passed" in out
    assert "out: error 1.0e-01 is 77 times its bound at [0, 0, 3, 5]" in out


def test_a_person_reads_estimated_wherever_nothing_was_measured(desk: Desk) -> None:
    code, out, err = desk.run("tune", "flash_fwd", "--problem", PROBLEM, "--budget", "12")
    assert code == 0
    assert "estimated: no such device is here" in err
    for line in out.splitlines():
        if " ms" in line or "TFLOP/s" in line:
            assert "estimate" in line
    assert "nothing was measured" in out


def test_a_person_reads_a_measured_result(desk: Desk) -> None:
    desk.here("h200")
    _, out, err = desk.run("tune", "flash_fwd", "--problem", PROBLEM, "--budget", "12")
    assert "estimate" not in out + err
    assert "Time (median ± MAD):" in out
    assert "31 samples" in out


def test_interrupted_at_any_trial_the_journal_is_valid_and_the_next_run_continues(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(problem, config):
        if desk.runners[-1].calls["value screen"] == 5:
            raise KeyboardInterrupt
        return

    desk.scripts = {"value": stop}
    code, out, err = desk.run("tune", "flash_fwd", "--problem", PROBLEM, "--budget", "12")
    assert code == 130
    assert "interrupted: every finished trial is in the journal; the same command continues" in err
    assert desk.runners[0].closed
    desk.scripts = {}
    document = desk.tune()
    assert sum(document["problems"][0]["outcomes"].values()) == 12
    assert desk.runners[1].calls["value screen"] + 4 == document["problems"][0]["outcomes"]["estimated"]


def test_an_unfinished_line_is_dropped_and_said(desk: Desk) -> None:
    journal = Path(desk.tune()["journal"])
    # The last line is the finalist's proof, the one before it a trial.
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1])[:-20])
    code, _, err = desk.run("tune", "flash_fwd", "--problem", PROBLEM, "--budget", "12")
    assert code == 0
    assert "warning: dropped an unfinished line of" in err
    assert desk.runners[-1].calls["compile"] == desk.runners[-1].calls["prove"] == 1


def test_show_lists_champions_and_failures(desk: Desk) -> None:
    desk.scripts = {"verify": lambda problem, config: wrong_verdict(problem) if config["block_m"] == 64 else None}
    desk.tune()
    code, out, _ = desk.run("show")
    assert code == 0
    assert "flash_fwd on h200 (sm_90) (draft, not reviewed)" in out
    assert "b1 h8/2 s512 d64 bf16 causal fwd" in out
    assert "ms estimated" in out
    _, out, _ = desk.run("show", "flash_fwd", "--failed")
    assert "× wrong: out: error 1.0e-01 is 77 times its bound" in out
    for arguments in (["show", "--json"], ["show", "--failed", "--json"]):
        jsonschema.validate(json.loads(desk.run(*arguments)[1]), documents.json_schema("show"))


def test_space_prints_what_its_document_says(desk: Desk) -> None:
    code, out, _ = desk.run("space", "flash_fwd", "--problem", PROBLEM, "--json")
    document = json.loads(out)
    jsonschema.validate(document, documents.json_schema("space"))
    assert document["size"] == document["legal"] + sum(document["pruned"].values())
    _, text, _ = desk.run("space", "flash_fwd", "--problem", PROBLEM)
    for name in document["pruned"]:
        assert name in text
    assert f"{document['legal']:,}" in text


def test_doctor_prints_what_its_document_says(desk: Desk) -> None:
    code, out, _ = desk.run("doctor", "--json")
    assert code == 0
    document = json.loads(out)
    jsonschema.validate(document, documents.json_schema("doctor"))
    assert document["kernels"] == ["flash_bwd", "flash_decode", "flash_fwd", "flex_attention", "flex_attention_bwd"]
    assert "Can a time measured here be trusted?" in desk.run("doctor")[1]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["tune", "flash_fwdd"], 2, "error: no kernel with a search space is called `flash_fwdd`"),
        (["tune", "flash_fwd", "--workload", "quikstart"], 2, "hint: did you mean `quickstart`?"),
        (["tune", "flash_fwd", "--target", "h2000"], 2, "`h2000`"),
        (["tune", "flash_fwd", "--problem", "b1 h8 s64 d32 fp61"], 2, "means nothing: `fp61`"),
        (
            ["tune", "flash_fwd", "--problem", "b1 h8/3 s64 d32"],
            2,
            "query heads (8) must be a multiple of key/value heads (3)",
        ),
        (["tune", "flash_fwd", "--problem", "b1 h8 s64 d0"], 2, "head dim must be between 1 and 1024, found 0"),
        (["tune", "flash_fwd", "--problem", "b1 h8 s64 d32 window=-1:0"], 2, "found -1"),
        (["tune", "flash_fwd", "--problem", "b1 h8 s64 d32 bwd"], 2, "`flash_fwd` computes the fwd pass"),
        (["tune", "flash_fwd", "--problem", PROBLEM, "--workload", "quickstart"], 2, "exclude each other"),
        (["tune", "flash_fwd", "--problem", PROBLEM, "--strategy", "luck"], 2, "no search strategy is called `luck`"),
        (["tune", "flash_fwd", "--problem", PROBLEM, "--budget", "0"], 2, "the budget `0` cannot be read"),
        (["tune", "flash_fwd", "--problem", PROBLEM, "--budget", "soon"], 2, "the budget `soon` cannot be read"),
        (["tune", "flash_fwd", "--workspace", "/nowhere"], 3, "/nowhere is not a workspace"),
        (["tune", "flash_fwd", "--problem", PROBLEM, "--runs", "/proc/runs"], 3, "cannot open the journal"),
        (["show", "nothing"], 2, "no kernel with a search space is called `nothing`"),
        (["tune", "flash_fwd", "--seed", "-1"], 2, "`-1` is no whole number of at least 0"),
        (["tune", "flash_fwd", "--jobs", "0"], 2, "`0` is no whole number of at least 1"),
        (["fuzz", "flash_fwd", "--cases", "0"], 2, "`0` is no whole number of at least 1"),
        (["show", "--target", "h2oo"], 2, "`h2oo`"),
        (["tune"], 2, "the following arguments are required: KERNEL"),
        (["dance"], 2, "invalid choice: 'dance'"),
        (["tune", "flash_fwd", "--seed", "x"], 2, "`x` is no whole number of at least 0"),
    ],
)
def test_bad_input_is_answered_in_words(desk: Desk, argv: list[str], code: int, says: str) -> None:
    found, out, err = desk.run(*argv)
    assert found == code
    assert says in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not out


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["tune", "flash_fwd", "--problem", PROBLEM], 3, "error: the package `torch` is not installed"),
        (["fuzz", "flash_fwd"], 3, "error: the package `torch` is not installed"),
        (["space", "flash_fwd", "--problem", PROBLEM], 0, ""),
        (["show"], 0, ""),
        (["lookup", PROBLEM], 0, ""),
        (["validate", "nothing.json"], 3, ""),
        (["doctor"], 0, ""),
    ],
)
def test_without_torch_and_triton_every_verb_works_or_says_so(argv: list[str], code: int, says: str) -> None:
    program = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("torch", "triton") else find(name, *rest)
from harness.cli import main
sys.exit(main({argv!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_study_log_that_was_cut_does_not_matter(desk: Desk) -> None:
    first = desk.tune()
    (log,) = (desk.root / "results/runs").glob("*.optuna.log")
    log.write_bytes(log.read_bytes()[:-10])
    size = log.stat().st_size
    assert desk.tune() == first
    assert abs(log.stat().st_size - size) < 100


def test_champion_and_default_come_from_the_same_samples(desk: Desk) -> None:
    desk.here("h200")
    (problem,) = desk.tune()["problems"]
    stored = json.loads((desk.root / "results/best/h200/flash_fwd.json").read_text())["champions"][0]["number"]
    assert stored["value_ms"] == problem["champion"]["value_ms"]
    assert stored["default_ms"] == problem["default"]["value_ms"]
    if stored["ratio"] is None:
        assert stored["value_ms"] == stored["default_ms"]
    else:
        low, high = stored["ratio_interval"]
        assert low <= stored["ratio"] <= high < 1
        assert low * 0.98 < stored["value_ms"] / stored["default_ms"] < high * 1.02


def test_a_journal_in_use_is_refused(desk: Desk) -> None:
    journal = Path(desk.tune()["journal"])
    from harness.store import open_journal, read_journal

    held = open_journal(journal, read_journal(journal)[0])
    code, _, err = desk.run("tune", "flash_fwd", "--problem", PROBLEM)
    held.close()
    assert code == 3
    assert "is being written by another tune" in err


def test_a_disk_that_is_full_anywhere_is_said_and_the_journal_is_kept(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.tune("--budget", "4")

    def full(self, *arguments):
        raise OSError(28, "No space left on device", "study.optuna.log")

    with monkeypatch.context() as patch:
        patch.setattr("optuna.storages.journal.JournalFileBackend.append_logs", full)
        code, _, err = desk.run("tune", "flash_fwd", "--problem", PROBLEM, "--budget", "12")
    assert code == 3
    assert "error: the machine refused study.optuna.log: No space left on device" in err
    assert "hint: every finished trial is in the journal" in err
    desk.tune()
    assert desk.runners[-1].calls["compile"] == 8
