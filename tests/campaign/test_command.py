"""The whole command on a fake device: what is on disk, what is printed, how it goes on, and what it does when things go wrong."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from harness import campaign_plan, campaigning, commands, documents, lab_truth
from harness.answers import Answers
from harness.campaign import Part, read_book
from harness.cli import main
from harness.device import TARGETS
from harness.outcome import TimedOut
from harness.recorded import read_recorded
from harness.space import Space
from harness.truth import Answer
from harness.workspace import Workspace
from tests.campaign.fake_device import FakeChildren, failed, reply

REPOSITORY = Path(__file__).parents[2]
SMALL = "b1 h2 s512 d64 fp16 fwd"


def few_configs(self: Workspace, stem: str) -> SimpleNamespace:
    """The space of a kernel with the default's value of every parameter, and a few more of some."""
    module = LOAD_SPACE(self, stem)

    def space(problem: Any, device: Any) -> Space:
        whole, chosen = module.space(problem, device), module.default(problem, device)
        more = {
            "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3),
            "block_m": (32, 64, 128),
            "dq_warps": (4, 8),
            "dkdv_stages": (1, 2),
        }
        params = [
            dataclasses.replace(
                one, values=tuple(value for value in one.values if value in (chosen[one.name], *more.get(one.name, ())))
            )
            for one in whole.params
        ]
        return Space(params=tuple(params), rules=whole.rules)

    return SimpleNamespace(space=space, default=module.default)


LOAD_SPACE = Workspace.load_space


class Desk:
    """A workspace around the repository's kernels, a fake device, a plan of a few parts, and a way to run the command."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        for part in ("kernels", "search_spaces"):
            (root / part).symlink_to(REPOSITORY / part)
        self.root, self.out, self._capsys, self._patch = root, root / "out", capsys, patch
        self.children: list[FakeChildren] = []
        self.answers: dict[str, Callable[..., Any]] = {}
        self.scripts: dict[str, Any] = {}
        self.chosen: Callable[[Part], bool] = lambda part: True
        real = campaign_plan.plan
        patch.setattr("harness.workspace._require_inside", lambda *arguments: None)
        patch.setattr(Workspace, "load_space", few_configs)
        patch.setattr(commands, "_live_device", lambda: (TARGETS["h200"], "580.1"))
        patch.setattr(campaigning, "ProcessRunner", self._make)
        patch.setattr(campaign_plan, "SPACES", (("flash_fwd", SMALL, ()),))
        patch.setattr(
            campaigning, "plan", lambda *given, **named: [one for one in real(*given, **named) if self.chosen(one)]
        )
        patch.setattr(lab_truth, "run_within", lambda command, seconds, cwd: (0, json.dumps(FUZZED), ""))
        patch.chdir(root)

    def _make(self, job: Any, jobs: int, cache: Path) -> FakeChildren:
        self.children.append(FakeChildren(answers=self.answers))
        self.children[-1].scripts = self.scripts
        return self.children[-1]

    def few(self, *names: str) -> None:
        """Only parts whose name contains one of these."""
        self.chosen = lambda part: any(name in part.name for name in names)

    def run(self, *argv: str) -> tuple[int, str, str]:
        code = main(["campaign", "--out", str(self.out), *argv])
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def campaign(self, *argv: str, code: int = 0) -> dict[str, Any]:
        found, out, err = self.run("--minutes", "5", "--json", "--quiet", *argv)
        assert found == code, err
        document: dict[str, Any] = json.loads(out)
        jsonschema.validate(document, documents.json_schema("campaign"))
        return document

    def parts(self) -> dict[str, Any]:
        return dict(read_book(self.out / "campaign.json").parts)


FUZZED = {
    "cases": 120, "seconds": 61.0, "verdicts": {"passed": 120}, "oracles": {"bound": 120}, "largest": {"out": 0.4},
    "counterexamples": [],
}  # fmt: skip
QUESTION = "flash_fwd/b1 h2 s128 d64 bf16 fwd [normal]"
BACKWARD = "b1 h2 s128 d64 bf16 bwd [normal]"


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, capsys, monkeypatch)


def test_a_campaign_from_command_to_files(desk: Desk) -> None:
    row = "b4 h16 s4096 d128 bf16 causal fwd"
    desk.few(
        "ceilings",
        QUESTION,
        BACKWARD,
        "fuzz flash_fwd",
        "spaces/",
        f"champions/flash_fwd/{row}",
        f"beside/{row}",
        "estimate",
        "same b1",
    )
    document = desk.campaign()
    steps = document["steps"]
    assert {name: (step["done"], step["parts"]) for name, step in steps.items()} == {
        "truth": (4, 4), "spaces": (1, 1), "champions": (1, 1), "beside": (3, 3), "judging": (2, 2),
    }  # fmt: skip
    assert document["ended"] == "all done" and document["wrong"] == []
    parts = desk.parts()
    assert parts["truth/ceilings"].data["ceilings"][1]["rate"] == 1000.0
    question = parts[f"truth/{QUESTION}"].data
    assert [one["status"] for one in question["candidates"]] == ["right"] * 3
    assert question["candidates"][0]["interpreter"] == "compared" and question["candidates"][0]["difference"] == 0.75
    assert question["candidates"][0]["runs"] == 10 and "interpreter" not in question["candidates"][1]
    assert len({json.dumps(one["config"]) for one in question["candidates"]}) == 3
    assert len(parts[f"truth/flash_bwd/{BACKWARD}"].data["candidates"]) == 2
    assert parts["truth/fuzz flash_fwd"].data["cases"] == 120
    # The space is a file of its own, whole; the journal is gone, as nothing needs it any more.
    (name,) = [name for name in document["files"] if name.startswith("spaces/")]
    space = read_recorded(desk.out / name)
    assert (
        space.header.complete
        and space.header.legal == len(space.lines) == parts[f"spaces/flash_fwd/{SMALL}"].data["tried"]
    )
    assert space.lines[0].config == space.header.default and space.header.runs[0]["driver"] == "580.1"
    assert all(line.estimate_ms for line in space.measured)
    assert parts[f"judging/estimate flash_fwd/{SMALL}"].data["correlation"] == pytest.approx(1, abs=0.05)
    # A champion is kept where `flashtune tune` keeps it, and in the ledger.
    champion = parts[f"champions/flash_fwd/{row}"].data["champion"]
    kept = json.loads((desk.root / "results/best/h200/flash_fwd.json").read_text())
    assert champion in kept["champions"] and champion["number"]["kind"] == "measured"
    beside = parts[f"beside/{row}"].data
    assert beside["config"] == champion["config"] and beside["config_of"] == f"champion of {row}"
    flash = beside["rivals"]["sdpa:flash"]
    assert flash["ratio"] == pytest.approx(0.9, rel=0.01) and flash["verdict"] == "faster"
    assert flash["interval"][0] <= flash["ratio"] <= flash["interval"][1]
    assert parts[f"beside/{row} flex"].data["rivals"]["flex"]["ratio"] == pytest.approx(1.3, rel=0.01)
    search = parts[f"judging/estimate flash_fwd/{SMALL}"].data["search"]
    assert len(search["regrets"]) == 9 and min(search["regrets"]) >= 0 and search["random_regret"] >= 0
    same = parts["judging/same b1 h16 s512 d64 fp16 fwd"].data
    assert same["of"] == 3 and same["false_alarms"] == 0
    assert document["files"].keys() == {"campaign.json", name}
    # Nothing is left to do.
    assert desk.campaign()["runs"] == 2
    assert not desk.children[-1].asked and not desk.children[-1].calls


def test_the_table_is_readable_at_100_columns(desk: Desk) -> None:
    desk.few(
        "ceilings",
        QUESTION,
        "fuzz flash_bwd",
        "spaces/",
        "champions/flash_fwd/b4 h16 s4096",
        "beside/b4 h16 s4096",
        "beside/b64 h16 s1024",
        "beside/b8 h32/8 q1 k8192",
        "judging/",
    )
    code, out, err = desk.run("--minutes", "5")
    assert code == 0
    assert max(len(line) for line in [*out.splitlines(), *err.splitlines()]) <= 100
    assert "left  truth/ceilings" in err
    for said in (
        "Campaign on h200 (sm_90) · 1 run", "Truth  3 candidates: 3 right",
        "1 compared with the interpreter, each run 10 times bit for bit",
        "ceiling, bf16 of 8192 x 8192 x 8192: 1,000 TFLOP/s (990 … 1,010)",
        "fuzz flash_bwd: 120 cases in 61 s, 0 counterexamples",
        "the default beside itself: called faster or slower 0 of 12 times", "rank correlation 0.99", "search, replayed: ",
        "forward and backward: standard attention", "11.0 times as fast; memory beside inputs 3.00 and 0.500 GiB",
        "  decode d128 b8 k8192", "the same command goes on",
    ):  # fmt: skip
        assert said in out, said
    (row,) = [line for line in out.splitlines() if line.startswith("  fwd d128 causal 4096")]
    # TFLOP/s, share of the measured ceiling, and the rivals' times over ours.
    assert [float(cell) for cell in row.split()[-7:-1]] == pytest.approx([0.9, 0.8, 2, 11, 0.7, 1.3], rel=0.01)


def test_what_is_wrong_is_said_loudly_kept_as_a_case_and_ends_with_1(desk: Desk) -> None:
    desk.few(QUESTION, BACKWARD)

    def ask(case: Any, device: str, *more: Any) -> Any:
        if device == "cuda" and case.kernel == "flash_fwd":
            return reply(77.0)
        return failed("the process was killed by SIGSEGV") if device == "cuda" else reply(0.2, runs=1)

    desk.answers = {"ask": ask}
    document = desk.campaign(code=1)
    assert len(document["wrong"]) == 5
    assert "wrong: out[0, 0, 3, 5] of `c` is off by 77" in document["wrong"][0]
    assert "crashed: the process was killed by SIGSEGV" in document["wrong"][-1]
    assert "WRONG  5 findings against our kernels" in desk.run("--minutes", "5", "--quiet")[1]
    # It can be taken home and replayed.
    code, out, _ = desk.run("--adopt")
    assert code == 0 and "5 counterexamples" in out
    found = sorted((desk.root / "results/corpus").glob("*/*.json"))
    assert {path.parent.name for path in found} == {"flash_fwd", "flash_bwd"} and len(found) == 5
    kept = json.loads(found[-1].read_text())
    assert kept["case"]["problem"] == "b1 h2 s128 d64 bf16 fwd" and kept["judge"] == "bound"


def test_champions_are_adopted_without_a_gpu(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.few("champions/flash_fwd/b4 h16 s4096 d128 bf16 causal")
    desk.campaign()
    path = desk.root / "results/best/h200/flash_fwd.json"
    before = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(commands, "_live_device", lambda: (None, None))
    code, out, _ = desk.run("--adopt")
    assert code == 0 and "1 champion of flash_fwd" in out
    assert path.read_bytes() == before


def test_a_finalist_that_is_not_proved_is_a_finding_with_its_case(desk: Desk) -> None:
    from tests.fake_runner import passing_proof

    desk.few("champions/flash_fwd/b4 h16 s4096 d128 bf16 causal")
    case = json.loads(next((REPOSITORY / "results/corpus/flash_fwd").glob("*.json")).read_text())["case"]
    wrong = dataclasses.replace(
        passing_proof("device"), status="wrong", detail="bound: out is off", counterexample=case
    )  # fmt: skip
    desk.scripts = {"prove": lambda problem, config: wrong}
    document = desk.campaign(code=1)
    assert f"bound: out is off (`{case['problem']}`)" in document["wrong"][0]
    (part,) = desk.parts().values()
    assert part.data["champion"] is None and part.data["why"] == "no candidate passed its gate and its proof"
    assert "counterexample" in desk.run("--adopt")[1]
    assert list((desk.root / "results/corpus/flash_fwd").glob("*.json"))


def test_complete_spaces_are_adopted_and_a_damaged_one_is_refused(desk: Desk) -> None:
    desk.few("spaces/")
    desk.campaign()
    (path,) = (desk.out / "spaces").iterdir()
    (desk.out / "spaces" / "flash_fwd-other.journal.jsonl").write_text("{}")
    code, out, _ = desk.run("--adopt")
    kept = desk.root / "results/spaces/h200" / path.name
    assert code == 0 and f"recorded space: {kept}" in out
    assert list(kept.parent.iterdir()) == [kept] and kept.read_bytes() == path.read_bytes()
    path.write_text("nothing")
    assert desk.run("--adopt")[0] == 2


def test_a_space_that_is_cut_goes_on_where_it_was(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.few("spaces/")
    tried = 0

    class Cut(BaseException):
        pass

    def verify(problem: Any, config: Any) -> None:
        nonlocal tried
        tried += 1
        if tried == 15:
            raise Cut

    desk.scripts = {"verify": verify}
    with pytest.raises(Cut):
        desk.run("--minutes", "5", "--quiet")
    (journal,) = (desk.out / "spaces").iterdir()
    assert journal.name.endswith(".journal.jsonl")
    lines = len(journal.read_text().splitlines())
    assert lines - 1 >= 11  # a batch of four is in flight at most
    desk.campaign()
    (space,) = (desk.out / "spaces").iterdir()
    found = read_recorded(space)
    assert found.header.complete
    assert desk.children[-1].calls["verify"] == found.header.legal - (lines - 1)


def test_a_space_without_time_is_a_fair_sample_that_says_what_it_is(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.few("spaces/", "estimate")
    count = 0

    def spend(problem: Any, config: Any) -> None:
        nonlocal count
        count += 1
        if count == 23:
            desk.children[-1].left_now = 3.0

    desk.scripts = {"verify": spend}
    monkeypatch.setattr(
        "harness.lab.GpuLab.do",
        _with_left(lambda: getattr(desk.children[-1], "left_now", 300.0)),
    )
    document = desk.campaign()
    part = desk.parts()[f"spaces/flash_fwd/{SMALL}"]
    assert part.status == "partial" and part.data["tried"] == 23 and "of" in part.reason
    assert document["ended"] == "out of time"
    judged = desk.parts()[f"judging/estimate flash_fwd/{SMALL}"]
    assert judged.status == "partial" and judged.data["configs"] == part.data["measured"] < judged.data["legal"]


def _with_left(left: Callable[[], float]) -> Any:
    from harness.lab import GpuLab

    real = GpuLab.do
    return lambda self, part, given: real(self, part, left)


def test_a_candidate_that_is_cut_by_the_clock_is_not_called_slow(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.few("spaces/")
    count = 0

    def late(problem: Any, config: Any) -> Any:
        nonlocal count
        count += 1
        return TimedOut(stage="verify", limit_s=0.1) if count > 10 else None

    desk.scripts = {"verify": late}
    monkeypatch.setattr("harness.lab.GpuLab.do", _with_left(lambda: 0.5 if count > 10 else 300.0))
    desk.campaign()
    (journal,) = (desk.out / "spaces").iterdir()
    assert "timed_out" not in journal.read_text()
    assert desk.parts()[f"spaces/flash_fwd/{SMALL}"].status == "partial"


def test_an_interpreter_that_does_not_work_here_is_left_alone_with_its_reason(desk: Desk) -> None:
    desk.chosen = lambda part: part.what["do"] == "question" and part.what["kernel"] == "flash_fwd"
    only = "TypeError: only 0-dimensional arrays can be converted"
    desk.answers = {"ask": lambda case, device, *more: failed(only) if device == "cpu" else reply()}
    desk.campaign()
    asked = desk.children[0].asked
    assert asked["interpreter ask"] < 20 < asked["device ask"]
    reasons = {part.data["candidates"][0]["interpreter"] for part in desk.parts().values()}
    assert reasons == {f"the interpreter gave no answer: {only}"}


def test_answers_that_were_recorded_elsewhere_are_compared(desk: Desk) -> None:
    desk.few(QUESTION)
    desk.out.mkdir()
    cases: list[Any] = []
    desk.answers = {"ask": lambda case, device, *more: (cases.append((case, device, more)), reply())[1]}
    desk.campaign()
    asked = next(case for case, device, _ in cases if device == "cpu")
    answers = Answers(desk.out)
    answers.put(asked, Answer(given="g", outputs={}))
    answers.save()
    (desk.out / "campaign.json").unlink()
    cases.clear()
    desk.campaign()
    assert {device for _, device, _ in cases} == {"cuda"}
    first = next(more for case, _, more in cases if case.id == asked.id)
    assert first[1] == Answer(given="g", outputs={})


def test_a_config_that_is_wrong_is_not_timed(desk: Desk) -> None:
    row = "b4 h16 s4096 d128 bf16 causal fwd"
    desk.few(f"beside/{row}", "same b1")
    from tests.fake_runner import wrong_verdict

    desk.scripts = {"verify": lambda problem, config: wrong_verdict(problem, "device")}
    desk.campaign()
    for part in desk.parts().values():
        assert part.status == "failed" and "our default is not timed: wrong: out: error" in part.reason
    assert not desk.children[0].asked["device pair"]


def test_a_rival_that_cannot_is_said_with_its_reason_and_the_others_go_on(desk: Desk) -> None:
    row = "b4 h8 s4096 d256 bf16 causal bwd"
    desk.few(f"beside/{row}")
    real = FakeChildren()

    def pair(problem: Any, config: Any, rival: Any, method: str, seed: int) -> Any:
        if rival == "sdpa:cudnn":
            return failed(f"RuntimeError: no kernel by {method}", "measure")
        from harness import beside

        found = real._known(beside.pair, (problem, config, rival, method, seed))
        return failed("a graph cannot hold it", "measure") if rival == "sdpa:math" and method == "graph" else found

    desk.answers = {"pair": pair}
    desk.campaign()
    rivals = desk.parts()[f"beside/{row}"].data["rivals"]
    assert rivals["sdpa:cudnn"] == {
        "not_measured": "RuntimeError: no kernel by event (in a graph: RuntimeError: no kernel by graph)"
    }
    assert rivals["sdpa:math"]["ratio"] == pytest.approx(11, rel=0.01) and rivals["sdpa:flash"]["verdict"] == "faster"
    assert desk.parts()[f"beside/{row}"].data["config_of"] == "default"


def test_a_problem_that_the_device_cannot_hold_is_skipped_in_words(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.few("champions/flash_fwd/b1 h64/8 s131072 d128")
    monkeypatch.setattr(campaigning, "_memory_bytes", lambda ledger: 1 << 30)
    desk.campaign()
    (part,) = desk.parts().values()
    assert (
        part.status == "skipped"
        and part.reason.startswith("it would take")
        and part.reason.endswith("the device has 1")
    )


def test_a_lost_device_is_said_and_the_same_command_goes_on(desk: Desk) -> None:
    desk.few("ceilings", QUESTION)
    desk.answers = {
        "ceilings": lambda seed: failed("the device failed and its process was given up", "measure"),
        "device_name": lambda: failed("no device"),
    }  # fmt: skip
    code, _, err = desk.run("--minutes", "5", "--quiet")
    assert code == 3 and "the device no longer answers since `truth/ceilings`" in err and "goes on" in err
    assert "no longer answers" in read_book(desk.out / "campaign.json").runs[-1].ended
    desk.answers = {}
    assert desk.campaign()["steps"]["truth"]["done"] == 2


def test_a_fuzzed_counterexample_is_a_finding(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.few("fuzz flash_fwd")
    example = next((REPOSITORY / "results/corpus/flash_fwd").glob("*.json"))

    def found(command: Any, seconds: float, cwd: Path) -> tuple[int, str, str]:
        corpus = Path(command[command.index("--corpus") + 1])
        (corpus / example.name).write_bytes(example.read_bytes())
        return 1, json.dumps(FUZZED | {"counterexamples": [str(corpus / example.name)]}), ""

    monkeypatch.setattr(lab_truth, "run_within", found)
    document = desk.campaign(code=1)
    assert document["wrong"][0].startswith("truth/fuzz flash_fwd: ")
    assert "1 counterexample" in desk.run("--adopt")[1]


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    code, out, _ = lab_truth.run_within(["bash", "-c", "sleep 60 & echo begun; wait"], 0.5, cwd=tmp_path)
    assert code is None and out == "begun\n"
    assert lab_truth.run_within(["bash", "-c", "exit 7"], 5.0, cwd=tmp_path)[0] == 7


@pytest.mark.parametrize(("argv", "code", "said"), [
    (("--minutes", "0"), 2, "`0` is no number of minutes"), (("--minutes", "x"), 2, "is no number of minutes"),
    ((), 2, "needs to know how long it may take"), (("--minutes", "5", "--only", "truht"), 2, "did you mean `truth`?"),
])  # fmt: skip
def test_usage_errors_say_what_to_do(desk: Desk, argv: tuple[str, ...], code: int, said: str) -> None:
    found, _, err = desk.run(*argv)
    assert found == code and said in err


def test_without_a_gpu_it_says_where_to_look(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_live_device", lambda: (None, None))
    code, _, err = desk.run("--minutes", "5")
    assert code == 3 and "doctor --campaign" in err
    assert not desk.out.exists()


def test_only_one_step_takes_all_the_time_if_that_is_wanted(desk: Desk) -> None:
    desk.few("ceilings", "same b1")
    assert desk.campaign("--only", "judging")["steps"]["judging"]["done"] == 1
    assert list(desk.parts()) == ["judging/same b1 h16 s512 d64 fp16 fwd"]


def test_another_kernel_is_another_campaign_part_by_part(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.few("ceilings", QUESTION)
    desk.campaign()
    real = campaigning.subjects_of
    changed = lambda *given: [dataclasses.replace(one, of="new:" + one.of) for one in real(*given)]  # noqa: E731
    monkeypatch.setattr(campaigning, "subjects_of", changed)
    document = desk.campaign()
    assert desk.children[-1].asked["device ask"] == 3 and not desk.children[-1].asked["device ceilings"]
    assert document["steps"]["truth"]["done"] == 2


def test_a_slice_of_a_space_is_what_differs_from_the_default_in_one_group_at_a_time(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = (("num_warps", "no_such_tunable"), ("num_stages", "block_m"))
    monkeypatch.setattr(campaign_plan, "SPACES", (("flash_fwd", SMALL, groups),))
    desk.few("spaces/")
    desk.campaign()
    (path,) = (desk.out / "spaces").iterdir()
    found = read_recorded(path)
    names, default = list(found.header.params), dict(zip(found.header.params, found.header.default, strict=True))
    rows = [dict(zip(names, line.config, strict=True)) for line in found.lines]
    for row in rows:
        stages = row["num_stages"] == default["num_stages"] and row["block_m"] == default["block_m"]
        assert row["num_warps"] == default["num_warps"] or stages
    assert found.header.complete and found.header.groups == groups
    assert len(rows) == found.header.legal < found.header.of
    assert any(row["num_warps"] != default["num_warps"] for row in rows)
    assert any(row["num_stages"] != default["num_stages"] for row in rows)


def test_flexattention_is_tuned_by_our_search_and_then_compared(desk: Desk) -> None:
    row = "b4 h16 s4096 d128 bf16 causal fwd"
    desk.few(
        f"champions/flex_attention/{row}",
        f"beside/{row} flex:tuned",
        "beside/b8 h16 s2048 d128 bf16 causal fwd flex:tuned",
    )
    desk.campaign()
    parts = desk.parts()
    champion = parts[f"champions/flex_attention/{row}"]
    assert champion.step == "beside" and champion.data["champion"]["config"]["sparse"] in (64, 128, 256)
    assert champion.data["of"]["kernel"]["family"] == "flex_attention"
    for text in (row, "b8 h16 s2048 d128 bf16 causal fwd"):
        (found,) = parts[f"beside/{text} flex:tuned"].data["rivals"].values()
        assert found["ratio"] == pytest.approx(1.15, rel=0.01), "that of its anchor serves a length of the sweep"
    _, out, _ = desk.run("--minutes", "1")
    (line,) = [line for line in out.splitlines() if line.startswith("  fwd d128 causal 4096")]
    assert float(line.split()[-1]) == pytest.approx(1.15, rel=0.01)


def test_without_a_tune_of_flexattention_there_is_no_comparison_with_one(desk: Desk) -> None:
    row = "b4 h16 s4096 d128 bf16 causal fwd"
    desk.few(f"beside/{row} flex:tuned")
    desk.campaign()
    (found,) = desk.parts()[f"beside/{row} flex:tuned"].data["rivals"].values()
    assert "was not tuned" in found["not_measured"]
