"""What was found once is asked again, for ever: every file in results/corpus, by every judge."""

from pathlib import Path

import pytest

from harness.cases import read_counterexample
from harness.fuzz import replay_case
from harness.fuzz_child import Plan
from harness.workspace import Workspace

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "results" / "corpus"
FOLDERS = sorted(path for path in CORPUS.iterdir() if path.is_dir())


def test_there_is_a_corpus_for_every_kernel() -> None:
    assert set(Workspace(ROOT).stems) <= {path.name for path in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_nothing_that_was_found_is_wrong_again(folder: Path) -> None:
    examples = [(path, read_counterexample(path)) for path in sorted(folder.glob("*.json"))]
    assert examples
    cases = tuple(example.case for _, example in examples)
    assert [path.stem for path, _ in examples] == [case.id for case in cases]
    (who,) = {(case.kernel, case.foreign) for case in cases}
    plan = Plan(seed=0, seconds=0, cases=0, only=cases, foreign=who[1])
    if plan.foreign is None:
        pass_ = Workspace(ROOT).kernel_pass(who[0])
        plan = Plan(seed=0, seconds=0, cases=0, only=cases, root=ROOT, kernel=who[0], pass_=pass_)
    answers = replay_case(plan)
    assert [answer for answer in answers if answer["detail"]] == []
    checks = {(answer["case"], answer["judge"]): answer["checks"] for answer in answers}
    for _, example in examples:
        assert checks[example.case.id, example.judge] > 0, example.case.id
