"""The proof of a finalist: the suite, asked about one config and problems like the one it was tuned for.

A candidate passes a gate before it has a number; it must pass this before it becomes a champion. Refuses to shrink: a finalist
that is wrong is dropped, and its case is kept for `flashtune replay`.
"""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from harness import suite
from harness.cases import CASES, Case, case_strategy, kernel_subject, like
from harness.compile import compiling_for
from harness.device import DeviceFacts
from harness.errors import HarnessError
from harness.judges import JUDGES, applicable
from harness.outcome import Proof
from harness.problem import Problem
from harness.space import Config, Value
from harness.subject import Kernel, KernelSubject, Run, Subject

# The cost of a proof is that of a few gates; `flashtune fuzz` asks thousands.
CASES_PER_FINALIST = 12
JUDGES_PER_CASE = 4
FAR = "far"


def prove(
    kernel: Kernel,
    stem: str,
    problem: Problem,
    config: Mapping[str, Value],
    *,
    seed: int,
    device: str = "cpu",
) -> Proof:
    """Ask the suite about `kernel` under `config`, in problems like `problem`, until the first objection or to the end.

    The judges of each case are the suite's choice, and every judge is asked about at least one case in which it has something
    to compare, if there is one.
    """
    where: Literal["interpreter", "device"] = "interpreter" if device == "cpu" else "device"
    cases = _cases(stem, problem, config, seed)
    subjects = [kernel_subject(kernel, case, device=device) for case in cases]
    oracles: Counter[str] = Counter()
    largest: dict[str, float] = {}
    for position, name in _questions(subjects, cases, oracles):
        case = cases[position]
        for _, finding, checks in suite.ask_each(subjects[position], case, [name]):
            oracles[name] += bool(checks or finding)
            if finding is not None:
                return Proof(
                    status="wrong", where=where, suite=suite.suite_digest(), seed=seed, cases=position + 1, oracles=+oracles,
                    largest=largest, detail=f"{finding.judge}: {finding.detail}",
                    counterexample=json.loads(CASES.dump_json(case)),
                )  # fmt: skip
            if name == "bound":
                for check in checks:
                    largest[check.output] = max(largest.get(check.output, 0.0), check.ratio)
    return Proof(
        status="passed" if oracles["bound"] else "unknown", where=where, suite=suite.suite_digest(), seed=seed,
        cases=len(cases), oracles=dict(sorted((+oracles).items())), largest=dict(sorted(largest.items())),
        detail="" if oracles["bound"] else "the kernel refused every case",
    )  # fmt: skip


def _cases(stem: str, problem: Problem, config: Mapping[str, Value], seed: int) -> tuple[Case, ...]:
    strategy = case_strategy(stem, problem.pass_, {problem.dtype: [Config(config)]}, shape=like(problem))
    return suite.fixed_cases(strategy, CASES_PER_FINALIST, seed)


def _questions(
    subjects: Sequence[Subject], cases: Sequence[Case], oracles: Mapping[str, int]
) -> Iterator[tuple[int, str]]:
    """Cases by position and who is asked about them; at last the judges that have compared nothing so far.

    What is far apart in memory differs from case to case, so that judge is asked about each.
    """
    for position, (subject, case) in enumerate(zip(subjects, cases, strict=True)):
        names = suite.judges_for(subject, case, JUDGES_PER_CASE)
        if FAR not in names and FAR in applicable(subject, case):
            names.append(FAR)
        for name in names:
            yield position, name
    for name in JUDGES:
        for position, (subject, case) in enumerate(zip(subjects, cases, strict=True)):
            if oracles[name]:
                break
            if name in applicable(subject, case):
                yield position, name


# ---------------------------------------------------------------------------------------------------------------------
# Ahead
# ---------------------------------------------------------------------------------------------------------------------


def compile_case(
    kernel: Kernel, stem: str, problem: Problem, config: Mapping[str, Value], seed: int, asked: tuple[int, DeviceFacts]
) -> None:
    """Leave in Triton's cache what the proof launches on a device for one of its cases; `asked` is its position, and the device.

    The judges are asked as they will be, of a kernel that compiles its launches and runs none; what they say is not heard.
    Whatever goes wrong here goes wrong there again; what is no error of ours ends this case, as an outcome of the child.
    """
    position, device = asked
    case = _cases(stem, problem, config, seed)[position]
    subject = kernel_subject(kernel, case, device="cuda")
    dry = _Dry(kernel=_Compiling(kernel), config=subject.config, device="cuda", outputs=subject.outputs)
    with compiling_for(device):
        for name in suite.judges_for(dry, case, JUDGES_PER_CASE):
            with contextlib.suppress(HarnessError):
                suite.ask(dry, case, name)


@dataclass(slots=True, kw_only=True, eq=False)
class _Dry(KernelSubject):
    """To its judges it is on a device; its memory is the CPU's."""

    def run_guarded(self, problem: Problem, values: Mapping[str, Tensor]) -> Run:
        here = KernelSubject(kernel=self.kernel, config=self.config, large=self.large, outputs=self.outputs)
        return here.run_guarded(problem, values)


class _Compiling:
    """A kernel whose launches compile and do not run."""

    def __init__(self, kernel: Kernel) -> None:
        self.PASS = kernel.PASS
        self.PACKED = getattr(kernel, "PACKED", False)
        # Both are asked which parameters they have.
        self.workspaces = kernel.workspaces
        self.launches = functools.wraps(kernel.launches)(
            lambda **arguments: [_Compiled(launch) for launch in kernel.launches(**arguments)]
        )


@dataclass(frozen=True, slots=True)
class _Compiled:
    launch: Any

    def run(self) -> None:
        one = self.launch
        if hasattr(one, "kernel") and 0 not in one.grid:
            one.kernel.warmup(grid=one.grid, **one.args, **one.constants, **one.options)
