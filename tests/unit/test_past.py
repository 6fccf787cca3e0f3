"""What a new search learns from: journals of the same kernel, as they were when it began."""

import json
from pathlib import Path

import numpy as np

from harness.experience import expected_slowdown
from harness.past import keep_past, past_of
from harness.problem import parse_problem
from harness.search import make_strategy, open_study
from harness.space import Config, Param, Rule, Space
from harness.store import open_journal
from harness.tune import Budget, Task, tune
from tests.fake_runner import FakeRunner, fake_time_ms

SPACE = Space(
    params=(
        Param("block_m", (16, 32, 64, 128), "rows"),
        Param("block_n", (16, 32, 64, 128), "columns"),
        Param("num_warps", (2, 4), "warps"),
    ),
    rules=(Rule("any", "all are legal", lambda config: True),),
)
DEFAULT = Config({"block_m": 64, "block_n": 32, "num_warps": 4})
PROBLEM = parse_problem("b1 h2 s256 d64 fp16 causal fwd")


def tuned(folder: Path, name: str, *, kernel: str = "attend", device: str = "h100", trials: int = 24) -> Path:
    path = folder / f"{name}.jsonl"
    journal = open_journal(path, {"kernel": kernel, "device": device})
    strategy = make_strategy("random", SPACE, DEFAULT, study=open_study("test"), seed=trials)
    task = Task(problem=PROBLEM, space=SPACE, default=DEFAULT, strategy=strategy)
    list(tune(task, FakeRunner("measured"), journal, budget=Budget(trials=trials), seed=0))
    journal.close()
    return path


def test_the_past_leads_a_new_search_and_is_measured_again(tmp_path: Path) -> None:
    tuned(tmp_path, "attend-h100-a")
    files = keep_past(tmp_path / "attend-h200-b.jsonl", "attend", [tmp_path])
    past = past_of(files, "attend", PROBLEM.key, "h200")
    assert [(land.device, land.problem) for land in past] == [("h100", PROBLEM.key)]
    assert len(past[0].recordings) == 24
    expected = expected_slowdown(past, SPACE)
    assert expected is not None
    assert expected.shape == (1, 32)
    times = [fake_time_ms(PROBLEM, config) for config in SPACE.legal]
    assert np.corrcoef(expected[0], np.log(times))[0, 1] > 0.9
    strategy = make_strategy("gp", SPACE, DEFAULT, study=open_study("test"), seed=0, expected=expected)
    first, second = strategy.ask(2)
    assert first == DEFAULT
    assert fake_time_ms(PROBLEM, second) <= sorted(times)[2]


def test_a_journal_that_goes_on_has_the_past_that_it_began_with(tmp_path: Path) -> None:
    path = tuned(tmp_path, "attend-h100-a", trials=16)
    journal = tmp_path / "attend-h200-b.jsonl"
    files = keep_past(journal, "attend", [tmp_path])
    before = past_of(files, "attend", PROBLEM.key, "h200")
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines(keepends=True)[1].replace(b'"trial":0', b'"trial":99'))
    tuned(tmp_path, "attend-h100-c")
    assert keep_past(journal, "attend", [tmp_path]) == files == {str(path): files[str(path)]}
    assert past_of(files, "attend", PROBLEM.key, "h200")[0].recordings == before[0].recordings


def test_the_most_alike_come_first_and_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    tuned(tmp_path, "attend-h100-a")
    tuned(tmp_path, "attend-h200-b", device="h200")
    tuned(tmp_path, "attend-other", kernel="else")
    (tmp_path / "attend-broken.jsonl").write_text('{"journal": "flashtune"\nnothing')
    (tmp_path / "attend-none.jsonl").write_text("")
    files = keep_past(tmp_path / "attend-new.jsonl", "attend", [tmp_path, tmp_path / "nowhere"])
    assert len(files) == 5
    past = past_of({**files, str(tmp_path / "gone.jsonl"): 3}, "attend", PROBLEM.key, "h200")
    assert [land.device for land in past] == ["h200", "h100"]


def test_what_was_kept_and_is_damaged_is_kept_anew(tmp_path: Path) -> None:
    journal = tmp_path / "attend-new.jsonl"
    kept = tmp_path / "attend-new.past.json"
    kept.write_text("[1")
    assert keep_past(journal, "attend", [tmp_path]) == {}
    assert json.loads(kept.read_text()) == {}
