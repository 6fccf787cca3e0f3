"""What the verbs `lookup` and `table` do, given their parsed options."""

import argparse
import sys
import time
import warnings

from harness import report
from harness.champion_documents import AnswerDocument, LookupDocument, PassedOverDocument, ProvenanceDocument
from harness.commands import DEFAULT_TARGET, here, print_document
from harness.device import DeviceFacts, find_target
from harness.errors import MissError, UsageError
from harness.lookup import Answer, Database, PassedOver, SoftMismatchWarning, open_database
from harness.problem import Problem, parse_problem
from harness.report_lookup import lookup_lines
from harness.workspace import Workspace, find_workspace

FOUND = 1
_REPEATS, _TURNS = 20_000, 5


def run_lookup(options: argparse.Namespace) -> int:
    """`flashtune lookup`: the config that a problem gets from each kernel that computes its pass, and why."""
    workspace = find_workspace(options.workspace)
    pass_ = workspace.kernel_pass(options.kernel) if options.kernel else "fwd"
    problem = parse_problem(options.problem, default_pass=pass_)
    kernels = [options.kernel] if options.kernel else _kernels_for(workspace, problem)
    if options.kernel and problem.pass_ != pass_:
        raise UsageError(
            f"`{options.kernel}` computes the {pass_} pass, the problem `{problem}` asks for {problem.pass_}"
        )
    device, live, driver = _device(options)
    answers = []
    missing: MissError | None = None
    for kernel in kernels:
        database = open_database(workspace, kernel, live=live, driver=driver)
        try:
            answer, passed_over = database.explain(
                problem, device, options.mode, deterministic=options.deterministic, sibling=options.sibling
            )
        except MissError as miss:
            missing = miss
            continue
        cached = cached_us(database, problem, device.name, options) if options.time else None
        answers.append(_document(kernel, answer, passed_over, cached))
    if missing is not None and not answers:
        raise missing
    document = LookupDocument(problem=problem.key, device=device.name, mode=options.mode, answers=tuple(answers))
    if options.json:
        print_document("lookup", document)
    else:
        for line in lookup_lines(document):
            report.open_console(sys.stdout).print(line)
    return 0


def _kernels_for(workspace: Workspace, problem: Problem) -> list[str]:
    found = [stem for stem in workspace.stems if workspace.kernel_pass(stem) == problem.pass_]
    if not found:
        raise UsageError(f"no kernel of this workspace computes the {problem.pass_} pass")
    return found


def _device(options: argparse.Namespace) -> tuple[DeviceFacts, str | None, str | None]:
    """The device that is asked about; the name of the one that is here, and its driver."""
    live, driver = here()
    name = live.name if live else None
    if options.device and (live is None or options.device != live.name):
        return find_target(options.device), name, driver
    return live or find_target(DEFAULT_TARGET), name, driver


def cached_us(database: Database, problem: Problem, device: str, options: argparse.Namespace) -> float:
    """Microseconds that an answer takes which was given before: the least of a few turns, which others disturb the least.

    The problem is asked as an equal, other value each time, as a caller would.
    """
    asked = problem.replace()
    with warnings.catch_warnings():
        # They stand beside the answer.
        warnings.simplefilter("ignore", SoftMismatchWarning)
        database.lookup(problem, device, options.mode, options.deterministic, options.sibling)
    turns = []
    for _ in range(_TURNS):
        began = time.perf_counter()
        for _ in range(_REPEATS):
            database.lookup(asked, device, options.mode, options.deterministic, options.sibling)
        turns.append((time.perf_counter() - began) / _REPEATS * 1e6)
    return min(turns)


def _document(kernel: str, answer: Answer, passed_over: tuple[PassedOver, ...], cached: float | None) -> AnswerDocument:
    source = answer.provenance
    return AnswerDocument(
        kernel=kernel,
        match=answer.match,
        config=dict(answer.config),
        distance=answer.distance,
        provenance=None if source is None else ProvenanceDocument(
            path=source.path, device=source.device, problem=source.problem, kind=source.kind, value_ms=source.value_ms,
            where=source.where, draft=source.draft,
        ),
        warnings=answer.warnings,
        passed_over=tuple(
            PassedOverDocument(path=one.path, device=one.device, problem=one.problem, reason=one.reason)
            for one in passed_over
        ),
        cached_us=cached,
    )  # fmt: skip
