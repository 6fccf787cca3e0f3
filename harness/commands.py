"""What each verb of the command line does, given its parsed options: one function a verb.

stdout carries results, stderr narration. Refuses to parse (that is `harness.cli`) and to lay out text (`harness.report`).
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import documents, report, report_portfolio
from harness.champions import ChampionFile, KillRate
from harness.crown import Origin, champion_of, toolchain_of
from harness.device import DeviceFacts, find_target
from harness.errors import MachineError, UsageError
from harness.experience import expected_slowdown
from harness.keeping import save_champions
from harness.outcome import Mode
from harness.past import keep_past, past_of
from harness.portfolio import Portfolio
from harness.problem import Problem, parse_problem
from harness.quarantine import Quarantine
from harness.search import DEFAULT_STRATEGY, check_strategy, make_strategy, open_study
from harness.several import tune_all
from harness.space import Space
from harness.store import Journal, open_journal
from harness.tune import Budget, Settled, Task, Tried
from harness.worker import Job, ProcessRunner, Runner
from harness.workload import find_workload, problems_for
from harness.workspace import (
    SUITE_MODULES,
    Workspace,
    digest_modules,
    find_workspace,
    package_version,
    triton_cache,
)  # fmt: skip

DEFAULT_TARGET = "h200"

# Modules that decide a verdict or a number: records made by other versions of them are not continued.
_JUDGES = (
    "binary", "bounds", "canary", "child", "compare", "compile", "device", "estimate", "flow", "gate_cases", "inputs", "measure",
    "operation", "oracle", "outcome", "problem", "proof", "prune", "selection", "sensor", "sensor_amd", "stats", "timing",
    "trials", "tune", "verify", "worker", *SUITE_MODULES,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a tune happens: the device, and whether a number there is a time or an estimate."""

    device: DeviceFacts
    mode: Mode
    driver: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a tune happens, and what makes its runner and, from a path, an identity and the spaces by problem, its journal."""

    setting: Setting
    runner: Callable[[Job], Runner]
    journal: Callable[[Path, Mapping[str, Any], Mapping[str, Space]], Journal]


def run_tune(options: argparse.Namespace) -> int:
    """`flashtune tune`: search every problem of the workload and keep the champions."""
    return tune_at(options, _site)


def _site(options: argparse.Namespace) -> Site:
    """This machine."""
    require_packages("torch", "triton")
    jobs = options.jobs or os.cpu_count() or 1
    return Site(
        setting=_setting(options.target),
        runner=lambda job: process_runner(job, jobs),
        journal=lambda path, identity, spaces: open_journal(path, identity),
    )


def tune_at(options: argparse.Namespace, find_site: Callable[[argparse.Namespace], Site]) -> int:
    """Tune at the site that is found once the options are understood."""
    workspace = find_workspace(options.workspace)
    problems = problems_of(options, workspace)
    budget = parse_budget(options.budget)
    options.strategy = check_strategy(options.strategy or DEFAULT_STRATEGY)
    site = find_site(options)
    setting = site.setting
    spaces = {problem: find_space(workspace, options.kernel, problem, setting.device) for problem in problems}
    job = Job(root=workspace.root, stem=options.kernel, device=setting.device, mode=setting.mode, seed=options.seed)
    with (
        contextlib.closing(_open_run(options, workspace, site, spaces)) as journal,
        contextlib.closing(site.runner(job)) as runner,
    ):
        tasks = [_task(problem, space, workspace, setting, journal, options) for problem, space in spaces.items()]
        if not options.quiet:
            _announce(tasks, setting, journal, options)
        settled, portfolio = _run_tasks(
            tasks, runner, journal, (budget, _open_quarantine(options, workspace, setting)), options
        )
    saved = keep_champions(settled, workspace, setting, options.kernel, draft=options.draft)
    if options.json:
        print_document(
            "tune",
            documents.tune_document(options.kernel, setting.device, setting.mode, settled, journal.path, portfolio),
        )
    else:
        if portfolio is not None:
            report.open_console(sys.stdout).print(report_portfolio.portfolio_lines(portfolio, setting.mode))
        summary = report.summary_lines(
            settled, shown_path(journal.path), shown_path(saved) if saved else None, setting.mode
        )
        report.open_console(sys.stdout).print(summary, end="")
    return 0


def _task(
    problem: Problem,
    space: Space,
    workspace: Workspace,
    setting: Setting,
    journal: Journal,
    options: argparse.Namespace,
) -> Task:
    default = space.check(workspace.load_space(options.kernel).default(problem, setting.device))
    name = f"{options.kernel} {problem} {options.strategy} seed={options.seed}"
    study = open_study(name, journal.path.with_suffix(".optuna.log"))
    files = keep_past(journal.path, options.kernel, (runs_folder(options, workspace), workspace.results / "spaces"))
    past = past_of(files, options.kernel, problem.key, setting.device.name)
    expected = expected_slowdown(past, space)
    strategy = make_strategy(options.strategy, space, default, study=study, seed=options.seed, expected=expected)
    return Task(problem=problem, space=space, default=default, strategy=strategy)


def _open_quarantine(options: argparse.Namespace, workspace: Workspace, setting: Setting) -> Quarantine:
    """The candidates of this kernel that no tune here tries again, with this device and toolchain."""
    scope = {
        "kernel": options.kernel, "digest": workspace.kernel_digest(options.kernel), "device": setting.device.name,
        "triton": package_version("triton"), "torch": package_version("torch"), "driver": setting.driver,
    }  # fmt: skip
    return Quarantine(runs_folder(options, workspace) / "quarantine.jsonl", scope)


def _announce(tasks: Sequence[Task], setting: Setting, journal: Journal, options: argparse.Namespace) -> None:
    err = report.open_console(sys.stderr)
    err.print(report.heading(options.kernel, setting.device, setting.mode, [task.problem for task in tasks]))
    for task in tasks:
        err.print(report.space_line(task.problem, task.space))
    if journal.torn:
        err.print(f"warning: dropped an unfinished line of {journal.torn} bytes at the end of the journal")
    err.print()


def _run_tasks(
    tasks: Sequence[Task],
    runner: Runner,
    journal: Journal,
    bounds: tuple[Budget, Quarantine],
    options: argparse.Namespace,
) -> tuple[list[Settled], Portfolio | None]:
    out, err = report.open_console(sys.stdout), report.open_console(sys.stderr)
    budget, quarantine = bounds
    total = None if budget.trials is None else sum(min(budget.trials, len(task.space.legal)) for task in tasks)
    settled: list[Settled] = []
    portfolio = None
    with report.Bar(err, shown=err.is_terminal and not (options.quiet or options.no_progress), total=total) as bar:
        for event in tune_all(tasks, runner, journal, budget=budget, seed=options.seed, quarantine=quarantine):
            if isinstance(event, Tried):
                bar.step(event, runner.mode)
            elif isinstance(event, Portfolio):
                portfolio = event
            else:
                settled.append(event)
                if not options.json:
                    out.print(report.settled_lines(event, runner.mode))
    return settled, portfolio


def run_space(options: argparse.Namespace) -> int:
    """`flashtune space`: the size of a space, and how many configs each rule removes."""
    workspace = find_workspace(options.workspace)
    pass_ = workspace.kernel_pass(options.kernel)
    problem = _check_pass(parse_problem(options.problem, default_pass=pass_), options.kernel, pass_)
    device = find_target(options.target or DEFAULT_TARGET)
    space = find_space(workspace, options.kernel, problem, device)
    if options.json:
        census = space.census
        document = documents.SpaceDocument(size=census.size, legal=census.legal, pruned=census.pruned)
        print_document("space", document)
        return 0
    whys = {rule.name: rule.why for rule in space.rules}
    out = report.open_console(sys.stdout)
    for line in report.census_lines(problem, device, space.census, whys):
        out.print(line)
    return 0


def parse_budget(text: str) -> Budget:
    """`24` is trials per problem, `90s`, `10m`, `1h` is time per problem. Raises `UsageError`."""
    match = re.fullmatch(r"([1-9]\d*)([smh]?)", text)
    if not match:
        raise UsageError(
            f"the budget `{text}` cannot be read",
            hint="give trials per problem (`24`) or time per problem (`90s`, `10m`)",
        )
    return Budget(seconds=parse_seconds(text)) if match[2] else Budget(trials=int(match[1]))


def parse_seconds(text: str) -> float:
    """Seconds of `90s`, `10m`, `1h`. Raises `UsageError`."""
    match = re.fullmatch(r"([1-9]\d*)([smh])", text)
    if not match:
        raise UsageError(f"the time `{text}` cannot be read", hint="write for example `90s`, `10m` or `1h`")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def print_document(name: str, document: Any) -> None:
    """Print one of `harness.documents` on stdout."""
    print(documents.DOCUMENTS[name].dump_json(document, indent=1, by_alias=True).decode())


def problems_of(options: argparse.Namespace, workspace: Workspace) -> list[Problem]:
    """The problems that `--problem` or `--workload` name, of the pass of the kernel."""
    pass_ = workspace.kernel_pass(options.kernel)
    if options.problem and options.workload:
        raise UsageError("`--problem` and `--workload` exclude each other", hint="give one of them")
    if options.problem:
        read = [parse_problem(text, default_pass=pass_) for text in options.problem]
        return list(dict.fromkeys(_check_pass(problem, options.kernel, pass_) for problem in read))
    workload = find_workload(
        options.workload or "quickstart", extra=workspace.root / "search_spaces" / "workloads.toml"
    )
    return list(dict.fromkeys(problems_for(workload, pass_)))


def _check_pass(problem: Problem, kernel: str, pass_: str) -> Problem:
    if problem.pass_ != pass_:
        raise UsageError(
            f"`{kernel}` computes the {pass_} pass, the problem `{problem}` asks for {problem.pass_}",
            hint=f"write `{pass_}` or leave the pass out",
        )
    return problem


def find_space(workspace: Workspace, kernel: str, problem: Problem, device: DeviceFacts) -> Space:
    """The space of a kernel for a problem on a device. Raises `UsageError` if nothing in it is legal."""
    space: Space = workspace.load_space(kernel).space(problem, device)
    if not space.legal:
        removed = ", ".join(f"{name} −{count}" for name, count in space.census.pruned.items() if count)
        raise UsageError(f"the space of `{kernel}` for `{problem}` on {device.name} has no legal config: {removed}")
    return space


def _setting(target: str | None) -> Setting:
    """Measure if the wanted device is here, else estimate for the target by compiling for it."""
    named = find_target(target) if target else None
    live, driver = _live_device()
    if live is not None and (named is None or named.name in (live.name, live.arch)):
        return Setting(live, "measured", driver)
    return Setting(named or find_target(DEFAULT_TARGET), "estimated")


def live_device() -> DeviceFacts | None:
    """The GPU that is here, if Triton can compile for it."""
    return _live_device()[0]


def here() -> tuple[DeviceFacts | None, str | None]:
    """The GPU that is here, if Triton can compile for it, and its driver."""
    return _live_device()


def _live_device() -> tuple[DeviceFacts | None, str | None]:
    # Asking torch costs seconds; where the kernel driver has made no device node there is nothing to ask for.
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")):
        return None, None
    from harness import probe

    machine = probe.probe()
    return probe.live_device(machine), machine.driver


def require_packages(*names: str, hint: str = "run `make setup`") -> None:
    """Raise a `MachineError` if one of these packages is not installed, without importing it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MachineError(f"the package `{name}` is not installed in {sys.prefix}", hint=hint)


def process_runner(job: Job, jobs: int) -> Runner:
    return ProcessRunner(job=job, jobs=jobs, cache=triton_cache())


def runs_folder(options: argparse.Namespace, workspace: Workspace) -> Path:
    return Path(options.runs) if options.runs else workspace.results / "runs"


def _open_run(
    options: argparse.Namespace, workspace: Workspace, site: Site, spaces: Mapping[Problem, Space]
) -> Journal:
    """The journal of everything that depends on the same kernel, device, toolchain and judge."""
    setting = site.setting
    identity = run_identity(options.kernel, workspace, setting, options.seed)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{options.kernel}-{setting.device.name}-{setting.mode}-{digest}.jsonl"
    by_problem = {problem.key: space for problem, space in spaces.items()}
    journal = site.journal(runs_folder(options, workspace) / name, identity, by_problem)
    # The study is rebuilt from the journal, whose lock is ours; a log that was cut in the middle of a line is of no use.
    journal.path.with_suffix(".optuna.log").unlink(missing_ok=True)
    return journal


def run_identity(kernel: str, workspace: Workspace, setting: Setting, seed: int) -> dict[str, Any]:
    """What every record of a journal depends on."""
    return {**journal_identity(kernel, workspace, setting, seed), "driver": setting.driver}


def journal_identity(kernel: str, workspace: Workspace, setting: Setting, seed: int) -> dict[str, Any]:
    """What every record of a kernel depends on, beside the driver."""
    return {
        "kernel": kernel,
        "device": setting.device.name,
        "arch": setting.device.arch,
        "mode": setting.mode,
        "triton": package_version("triton"),
        "torch": package_version("torch"),
        "kernel_digest": workspace.kernel_digest(kernel),
        "judge_digest": digest_modules(_JUDGES),
        "gate_seed": seed,
    }


def champions_of(
    settled: Sequence[Settled], workspace: Workspace, setting: Setting, kernel: str
) -> ChampionFile | None:
    """The champions of settled problems as they are stored, each with its certificate; None if there are none."""
    digest = workspace.kernel_digest(kernel)

    def kill_rate(suite: str) -> KillRate | None:
        return documents.kill_rate(workspace.results, kernel, suite=suite, kernel_digest=digest)

    origin = Origin(
        device=setting.device, kernel=kernel, family=workspace.kernel_family(kernel), pass_=workspace.kernel_pass(kernel),
        kernel_digest=digest, triton=package_version("triton"), torch=package_version("torch"), driver=setting.driver,
        kill_rate=kill_rate,
    )  # fmt: skip
    found = tuple(one for one in (champion_of(each, setting.mode, origin) for each in settled) if one is not None)
    toolchain = next((each for each in map(toolchain_of, settled) if each is not None), None)
    return origin.file(found, toolchain) if found else None


def keep_champions(
    settled: Sequence[Settled], workspace: Workspace, setting: Setting, kernel: str, *, draft: bool
) -> Path | None:
    """Keep the champions: measured ones where they are reviewed and committed, all others as drafts."""
    fresh = champions_of(settled, workspace, setting, kernel)
    if fresh is None:
        return None
    return save_champions(workspace.results, fresh, draft=draft or setting.mode != "measured")


def shown_path(path: Path) -> str:
    """A path as the reader would type it: relative where that is shorter."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
