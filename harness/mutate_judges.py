"""Every judge that mutants are shown to: those of the proof, the gate, other projects' criteria.

Refuses to define a property or a bound; a new judge is one more entry in `EVERY`.
"""

from collections.abc import Mapping

from harness import verify
from harness.cases import Case
from harness.criteria import CRITERIA_JUDGES
from harness.errors import UsageError
from harness.judges import JUDGES, Asked, Judge
from harness.subject import KernelSubject, Subject


def _gate(subject: Subject, case: Case) -> Asked:
    """What `tune` asks of every candidate, with the case's problem as the one that is tuned for."""
    if not isinstance(subject, KernelSubject):
        raise UsageError(f"{subject.name} is not a kernel file, which the gate needs")
    verdict = verify.gate(subject.kernel, case.asked, subject.config, seed=case.seed, where="interpreter")
    return verdict.checks, () if verdict.passed else (verdict.detail,)


EVERY: Mapping[str, Judge] = {
    "gate": Judge("gate", "what `tune` asks of every candidate before it may be timed", _gate),
    **JUDGES,
    **CRITERIA_JUDGES,
}
