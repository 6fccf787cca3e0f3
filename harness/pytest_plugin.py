"""A pytest plugin for a library's CI: the fixture `flashtune`, which proves that a function computes attention.

    from my_library import attention

    def test_attention(flashtune):
        flashtune.prove(attention, signature="sdpa", supports="fwd bwd causal fp16")

Refuses to import torch before the fixture is used: pytest loads plugins for every test run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from harness.cases import Case
    from harness.foreign import Foreign, ForeignSubject
    from harness.in_process import Proof
    from harness.judges import Finding


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that every `flashtune.prove` of a run shares."""
    group = parser.getgroup("flashtune", "proof of attention functions")
    group.addoption(
        "--flashtune-profile", default="pr", metavar="NAME", help="pr (default), nightly, mutation or repro"
    )
    group.addoption("--flashtune-seed", default=0, type=int, metavar="N", help="chooses the cases; 0 unless given")
    group.addoption(
        "--flashtune-corpus",
        default=None,
        metavar="DIR",
        help="where counterexamples are kept and replayed from; `flashtune-corpus` beside the configuration unless given",
    )


@pytest.fixture
def flashtune(request: pytest.FixtureRequest) -> "Flashtune":
    """Proves functions; see `Flashtune`."""
    config = request.config
    given = config.getoption("--flashtune-corpus")
    corpus = Path(given) if given else config.rootpath / "flashtune-corpus"
    return Flashtune(config.getoption("--flashtune-profile"), config.getoption("--flashtune-seed"), corpus)


class Flashtune:
    """The fixture. A target is a function, `package.module:function`, or a stock adapter (which has its own signature)."""

    def __init__(self, profile: str, seed: int, corpus: Path) -> None:
        self.profile = profile
        self.seed = seed
        self.corpus = corpus

    def prove(
        self,
        target: Callable[..., Any] | str,
        signature: str = "",
        supports: str = "",
        *,
        cases: int | None = None,
        seed: int | None = None,
        device: str = "cpu",
    ) -> "Proof":
        """Fail the test with a shrunk counterexample, which is kept in the corpus, or if nothing could be judged.

        Known counterexamples are asked first. `cases` and `seed` replace what the profile and the options say.
        """
        from dataclasses import replace

        from harness import in_process, suite

        profile = suite.profile_for(self.profile)
        if cases is not None:
            profile = replace(profile, cases=cases)
        subject, foreign = self._subject(target, signature, supports, device)
        proof = in_process.prove(
            subject, foreign, profile=profile, seed=self.seed if seed is None else seed, corpus=self.corpus
        )
        self._report(proof, wanted=profile.cases)
        return proof

    def replay(
        self, path: str | Path, target: Callable[..., Any] | str, signature: str = "", supports: str = ""
    ) -> None:
        """Fail the test if a corpus file is still a counterexample to `target`."""
        from harness import in_process

        subject, _ = self._subject(target, signature, supports, "cpu")
        self._report(in_process.replay(subject, Path(path)), wanted=1)

    def cases(
        self, target: Callable[..., Any] | str, signature: str = "", supports: str = ""
    ) -> "SearchStrategy[Case]":
        """A hypothesis strategy of cases that the target may be asked, for tests of one's own; see `judge`."""
        from harness import in_process

        return in_process.cases_of(*self._subject(target, signature, supports, "cpu"))

    def judge(
        self, case: "Case", target: Callable[..., Any] | str, signature: str = "", supports: str = ""
    ) -> "Finding | None":
        """What all judges together find wrong with the target in one case, or None."""
        from harness import in_process

        return in_process.judge_case(self._subject(target, signature, supports, "cpu")[0], case)

    def _subject(
        self, target: Callable[..., Any] | str, signature: str, supports: str, device: str
    ) -> "tuple[ForeignSubject, Foreign]":
        from harness.foreign import Foreign, adapt, load

        words = tuple(supports.split())
        if isinstance(target, str):
            foreign = Foreign(target, signature, words)
            return load(foreign, device=device), foreign
        subject = adapt(target, signature, words, device=device)
        return subject, Foreign(subject.name, signature, words)

    def _report(self, proof: "Proof", *, wanted: int) -> None:
        if proof.found is not None:
            pytest.fail(proof.text(), pytrace=False)
        if wanted and not proof.judges["bound"]:
            reasons = "; ".join(f"{count} times: {reason}" for reason, count in proof.refused.most_common(3))
            pytest.fail(
                f"cannot tell whether {proof.target} computes attention: no case of {proof.cases} could be judged"
                + (f" ({reasons})" if reasons else ""),
                pytrace=False,
            )
