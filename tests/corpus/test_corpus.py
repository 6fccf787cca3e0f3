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


@pytest.mark.parametrize("stem", Workspace(ROOT).stems)
def test_nothing_that_was_found_is_wrong_again(stem: str) -> None:
    examples = {path: read_counterexample(path) for path in FILES if path.parent.name == stem}
    for path, example in examples.items():
        assert (path.stem, stem) == (example.case.id, example.case.kernel)
    cases = tuple(example.case for example in examples.values())
    plan = Plan(
        seed=0, seconds=0, cases=0, root=ROOT, kernel=stem, pass_=Workspace(ROOT).kernel_pass(stem), only=cases
    )  # fmt: skip
    answers = replay_case(plan)
    assert [answer for answer in answers if answer["detail"]] == []
    checks = {(answer["case"], answer["judge"]): answer["checks"] for answer in answers}
    for example in examples.values():
        assert checks[example.case.id, example.judge] > 0, example.case.id
