"""What the verbs `lookup` and `table` do, given their parsed options."""

import argparse
import functools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness import report
from harness.champion_documents import (
    AnswerDocument,
    LookupDocument,
    PassedOverDocument,
    ProvenanceDocument,
    TableDocument,
)
from harness.commands import DEFAULT_TARGET, here, print_document
from harness.device import DeviceFacts, find_target
from harness.errors import MissError, UsageError
from harness.files import write_whole
from harness.lookup import Answer, Database, Entry, PassedOver, SoftMismatchWarning, open_database
from harness.outcome import value_ms
from harness.problem import Problem, parse_problem
from harness.recorded import read_recorded
from harness.report_lookup import lookup_lines, table_lines
from harness.space import Config
from harness.store import read_journal
from harness.table import Known, TimeOf, choose, distill, hold_out, python_table
from harness.trust import standing
from harness.workload import WORKSPACE_FILE, load_workloads, problems_for
from harness.workspace import Workspace, find_workspace

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


def _device(options: argparse.Namespace) -> tuple[DeviceFacts, DeviceFacts | None, str | None]:
    """The device that is asked about; the one that is here, and its driver."""
    live, driver = here()
    if options.device and (live is None or options.device != live.name):
        return find_target(options.device), live, driver
    return live or find_target(DEFAULT_TARGET), live, driver


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


def run_table(options: argparse.Namespace) -> int:
    """`flashtune table`: distil the champions of a kernel into a small table in Python; try it on held-out shapes."""
    workspace = find_workspace(options.workspace)
    kernel = workspace.check_stem(options.kernel)
    device, _, _ = _device(options)
    entries = _best_entries(open_database(workspace, kernel), device)
    known = [Known(one.problem, Config(one.champion.config), one.champion.number.value_ms) for one in entries]
    space = functools.cache(lambda problem: workspace.load_space(kernel).space(problem, device))

    def legal(problem: Problem, config: Config) -> bool:
        try:
            space(problem).check(config)
        except UsageError:
            return False
        return True

    time_of = recorded_times(workspace, kernel, device.name, entries)
    rows = distill(known, legal, time_of)
    trials = hold_out(known, [Config(one.champion.default) for one in entries], legal, time_of)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(one.champion.number.kind for one in entries).items())
    source = f"{report.plural(len(entries), 'champion')} ({kinds})" if entries else "no champion"
    digest = workspace.kernel_digest(kernel)
    text = python_table(rows, kernel=kernel, device=device.name, arch=device.arch, digest=digest, source=source)
    write_whole(Path(options.out), text.encode(), hint="give another `--out`")
    shapes = {problem for problem in _shapes(workspace, kernel) if problem not in {one.problem for one in known}}
    answers = [(problem, config) for problem in shapes if (config := choose(rows, problem)) is not None]
    document = TableDocument(
        kernel=kernel, device=device.name, out=options.out, rows=len(rows), champions=len(entries), held_out=len(trials),
        answered=sum(one.config is not None for one in trials), legal=sum(one.legal for one in trials),
        same=sum(one.same for one in trials),
        regrets={one.problem: one.regret for one in trials if one.regret is not None},
        default_regrets={one.problem: one.default_regret for one in trials if one.default_regret is not None},
        shapes=len(shapes), shapes_answered=len(answers), shapes_legal=sum(legal(*each) for each in answers),
    )  # fmt: skip
    if options.json:
        print_document("table", document)
    else:
        for line in table_lines(document):
            report.open_console(sys.stdout).print(line)
    return 0


def _best_entries(database: Database, device: DeviceFacts) -> list[Entry]:
    """The champions of a device that may be used, one a problem: those that are trusted most."""
    best: dict[str, Entry] = {}
    for entry in sorted(database.entries, key=lambda one: (one.trust, one.path)):
        here_now = replace(database.here, arch=device.arch)
        if entry.file.device.name == device.name and standing(entry.file, entry.champion, here_now).status == "current":
            best.setdefault(entry.problem.key, entry)
    return [best[problem] for problem in sorted(best)]


def _shapes(workspace: Workspace, kernel: str) -> list[Problem]:
    workloads = load_workloads(workspace.root / WORKSPACE_FILE)
    pass_ = workspace.kernel_pass(kernel)
    return [problem for workload in workloads.values() for problem in problems_for(workload, pass_)]


def recorded_times(workspace: Workspace, kernel: str, device: str, entries: Sequence[Entry]) -> TimeOf:
    """What is recorded of a config on a problem: by its champion, in the journals, and in the recorded spaces of the device.

    Numbers count where they are of the same kernel, and of the kind that the champion's number is.
    """
    found: dict[tuple[str, Config], float] = {}
    kinds = {one.problem.key: one.champion.number.kind for one in entries}
    digest = workspace.kernel_digest(kernel)
    for path in sorted((workspace.results / "spaces" / device).glob(f"{kernel}-*.jsonl*")):
        space = read_recorded(path)
        if kinds.get(space.header.problem) == "measured" and space.header.versions.get("kernel") == digest:
            for line in space.measured:
                if line.time_ms is not None:
                    found[space.header.problem, Config(dict(zip(space.header.params, line.config, strict=True)))] = (
                        line.time_ms
                    )
    for path in sorted((workspace.results / "runs").glob(f"{kernel}-{device}-*.jsonl")):
        identity, records = read_journal(path)
        if identity.get("kernel_digest") == digest:
            for record in records:
                value = value_ms(record.outcome)
                if value is not None and record.role == "screen" and kinds.get(record.problem) == identity.get("mode"):
                    found[record.problem, Config(record.config)] = value
    for one in entries:
        number, runner_up = one.champion.number, one.champion.number.runner_up
        if runner_up is not None:
            found[one.problem.key, Config(runner_up.config)] = runner_up.value_ms
        if number.default_ms is not None:
            found[one.problem.key, Config(one.champion.default)] = number.default_ms
    return lambda problem, config: found.get((problem.key, config))
