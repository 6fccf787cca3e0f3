"""What the verb `mutants` does, given its parsed options: measure the suite by bugs that were planted on purpose."""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence

from harness import mutate, report, report_mutants, suite
from harness.cases import Case, case_strategy
from harness.commands import print_document
from harness.criteria import CRITERIA
from harness.documents import CriterionDocument, MutantDocument, MutantsDocument
from harness.errors import UsageError, did_you_mean
from harness.mutate import SUITE, Mutant, MutantResult
from harness.operation import supported
from harness.problem import Pass
from harness.proving import FOUND, every_config, fuzz_configs, versions
from harness.space import Config
from harness.workspace import Workspace, find_workspace

# Equivalent mutants are shown fewer cases: whether they survive is a check of the arguments, not of the suite.
_EQUIVALENT_CASES = 30
# What the gate is asked as the problem that is tuned for: it sees a mutant if it does so for one of them.
_GATED = (
    "b1 h4/2 s256 d32 fp16 causal", "b1 h2 s250 d16/32 bf16", "b1 h2/1 q200 k144 d16 fp16 window=40:9",
    "b1 h2/1 s256 d16 fp32 causal window=33", "b2 h3/1 q100 k256 d24 fp16 causal top-left scale=0.3",
)  # fmt: skip


def run_mutants(options: argparse.Namespace) -> int:
    """`flashtune mutants`: which planted bugs does the suite see; exit 1 when one survives, or an equivalent one does not."""
    workspace = find_workspace(options.workspace)
    workspace.check_stem(options.kernel)
    pass_ = workspace.kernel_pass(options.kernel)
    mutants = _chosen(mutate.load_mutants(workspace.root / "kernels", options.kernel), options.only)
    cases = _suite_cases(workspace, options.kernel, pass_, options.cases, options.seed)
    began = time.monotonic()
    results: list[MutantResult] = []
    err = report.open_console(sys.stderr)
    with report.CountBar(err, shown=err.is_terminal and not options.quiet, total=len(mutants)) as bar:
        for equivalent in (False, True):
            some = [mutant for mutant in mutants if bool(mutant.equivalent) == equivalent]
            asked = {options.kernel: {SUITE: cases[: _EQUIVALENT_CASES if equivalent else None]}}
            results += mutate.measure(
                some, workspace.root / "kernels", asked, jobs=options.jobs, seen=lambda result: bar.step()
            )
    seconds = time.monotonic() - began
    criteria = _compared(workspace, options, mutants, pass_) if options.compare else ()
    killed = [one.cases for one in results if one.cases is not None and not one.equivalent]
    document = MutantsDocument(
        mutants=tuple(map(_mutant_document, results)),
        seconds=round(seconds, 1),
        suite=suite.suite_digest(),
        kernel_digest=workspace.kernel_digest(options.kernel),
        versions=versions(),
        seed=options.seed,
        most_cases=options.cases,
        median_cases=statistics.median(killed) if killed else None,
        criteria=criteria,
    )
    if options.json:
        print_document("mutants", document)
    else:
        whys = {mutant.name: mutant for mutant in mutants}
        for line in report_mutants.mutants_lines(options.kernel, document, whys):
            report.open_console(sys.stdout).print(line)
    wrong = [one for one in document.mutants if one.equivalent == bool(one.killed_by)]
    return FOUND if wrong else 0


def _chosen(mutants: Sequence[Mutant], only: Sequence[str] | None) -> tuple[Mutant, ...]:
    """Those whose name holds one of the words in `only`; all without."""
    if not only:
        return tuple(mutants)
    for word in only:
        if not any(word in mutant.name for mutant in mutants):
            raise UsageError(
                f"no mutant of this kernel has `{word}` in its name",
                hint=did_you_mean(word, [mutant.name for mutant in mutants]),
            )
    return tuple(mutant for mutant in mutants if any(word in mutant.name for word in only))


def _suite_cases(workspace: Workspace, kernel: str, pass_: Pass, count: int, seed: int) -> tuple[Case, ...]:
    found = every_config(workspace, kernel, pass_)
    configs = {dtype: [Config(values) for values in several] for dtype, several in found.items()}
    variants = supported(workspace.kernel_parameters(kernel), pass_)
    return suite.fixed_cases(case_strategy(kernel, pass_, configs, variants=variants), count, seed)


def _mutant_document(result: MutantResult) -> MutantDocument:
    detail = next((trial.detail for trial in result.trials if trial.how), "")
    return MutantDocument(
        name=result.name, kernel=result.kernel, equivalent=result.equivalent, killed_by=result.killed_by,
        cases=result.cases, detail=detail,
    )  # fmt: skip


def _compared(
    workspace: Workspace, options: argparse.Namespace, mutants: Sequence[Mutant], pass_: Pass
) -> tuple[CriterionDocument, ...]:
    """The gate and other projects' criteria, on the same mutants and on the kernel as it is."""
    real = [mutant for mutant in mutants if not mutant.equivalent]
    configs = fuzz_configs(workspace, options.kernel, pass_, "fp16")
    asked: dict[str, Sequence[Case]] = {"gate": _gate_cases(options.kernel, pass_, configs)}
    asked |= {name: cases for name, found in CRITERIA.items() if (cases := found.cases(options.kernel, pass_, configs))}
    results = mutate.measure(real, workspace.root / "kernels", {options.kernel: asked}, jobs=options.jobs)
    alarms = mutate.measure_alarms(options.kernel, workspace.root / "kernels", asked, jobs=options.jobs)
    found = []
    for trial in alarms:
        killed = sum(any(one.judge == trial.judge and one.how for one in result.trials) for result in results)
        found.append(
            CriterionDocument(
                name=trial.judge, killed=killed, shown=len(results), false_alarms=trial.alarms, cases=trial.cases
            )
        )
    return tuple(found)


def _gate_cases(kernel: str, pass_: Pass, configs: Sequence[Mapping[str, int | str | bool]]) -> tuple[Case, ...]:
    return tuple(
        Case(
            kernel=kernel, problem=f"{text} {pass_}", config=configs[(turn * len(configs)) // len(_GATED)], recipe="normal",
            seed=turn, lies={},
        )
        for turn, text in enumerate(_GATED)
    )  # fmt: skip
