"""What was found once is asked again, for ever: every file in results/corpus, by every judge."""

from pathlib import Path

import pytest

from harness.cases import read_counterexample
from harness.fuzz import replay_case
from harness.fuzz_child import Plan
from harness.workspace import Workspace

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "results" / "corpus"
FILES = sorted(path for stem in Workspace(ROOT).stems for path in (CORPUS / stem).glob("*.json"))


def test_there_is_a_corpus_for_every_kernel() -> None:
    assert {path.parent.name for path in FILES} == set(Workspace(ROOT).stems)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_nothing_that_was_found_is_wrong_again(path: Path) -> None:
    example = read_counterexample(path)
    assert path.stem == example.case.id
    assert path.parent.name == example.case.kernel
    pass_ = Workspace(ROOT).kernel_pass(example.case.kernel)
    plan = Plan(
        seed=0, seconds=0, cases=0, root=ROOT, kernel=example.case.kernel, pass_=pass_, only=(example.case,)
    )  # fmt: skip
    answers = {answer["judge"]: answer for answer in replay_case(plan)}
    assert [answer for answer in answers.values() if answer["detail"]] == []
    assert answers[example.judge]["checks"] > 0
