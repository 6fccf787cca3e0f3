"""What the verb `campaign` does, given its parsed options."""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import commands, probe, report, report_campaign
from harness.answers import Answers
from harness.bench import Bench, seed_of
from harness.campaign import FILE, Clock, Entry, Lab, Ledger, Part, campaign, locked, read_book
from harness.campaign_plan import SHARES, SPACES, Subject, plan
from harness.cases import COUNTEREXAMPLES, SCHEMA, Case, Counterexample, write_counterexample
from harness.champions import champion_file_of
from harness.commands import Setting, journal_identity
from harness.errors import MachineError, UsageError, did_you_mean
from harness.files import write_whole
from harness.keeping import save_champions
from harness.lab import GpuLab
from harness.lab_truth import Truth
from harness.operation import supported
from harness.problem import parse_problem
from harness.recorded import read_recorded
from harness.truth import Reply, ask, chosen_configs
from harness.worker import Job, ProcessRunner
from harness.workload import load_workloads
from harness.workspace import Workspace, digest_modules, find_workspace, package_version, triton_cache

FOUND = 1

# Beside the tuner's judges, what decides what a part gives.
_DECIDING = ("ahead", "beside", "ceilings", "judging", "truth")
# Cores that are left to the process that owns the device and to this one.
_SPARED_CORES = 2
_INTERPRET_S = 120.0


def run_campaign(options: argparse.Namespace) -> int:
    """`flashtune campaign`: do what is not done yet of all that is worth knowing of the GPU that is here."""
    # Looking for the GPU takes its time too.
    clock = Clock(60.0 * (options.minutes or 0.0))
    commands.require_packages("torch", "triton", "hypothesis", "optuna", "pebble")
    folder = Path(options.out).resolve()
    workspace = find_workspace(options.workspace)
    if options.adopt:
        return _adopt(folder, workspace, options)
    if options.minutes is None:
        raise UsageError("a campaign needs to know how long it may take", hint="pass `--minutes N`")
    if options.answers:
        return _record_answers(folder, workspace, options)
    setting = _setting()
    shares = _shares(options.only)
    subjects = subjects_of(workspace, setting, options.seed)
    workloads = load_workloads(workspace.root / "search_spaces" / "workloads.toml")
    parts = plan(subjects, list(workloads.values()), device_of=_device_of(setting))
    with locked(folder):
        ledger = Ledger(folder, device=setting.device.name, arch=setting.device.arch, keep=options.keep)
        machine = probe.probe(root=workspace.root)
        ledger.begin(began=_now(), minutes=options.minutes, machine=_described(machine, setting))
        with contextlib.closing(make_lab(options, folder, workspace, setting, ledger, parts)) as lab:
            ended = _work(parts, lab, ledger, clock, shares, options)
            lab.tidy([part for part in parts if (entry := ledger.entry(part)) is not None and entry.status == "done"])
        ledger.end(ended, clock.spent())
    return _show(folder, ledger, parts, options)


def _work(
    parts: Sequence[Part],
    lab: Lab,
    ledger: Ledger,
    clock: Clock,
    shares: Mapping[str, float],
    options: argparse.Namespace,
) -> str:
    """Do the parts and say how it ended. What it raises ends the run as well, and is written down first."""
    err = report.open_console(sys.stderr)
    try:
        for part, entry in campaign(parts, lab, ledger, clock, shares=shares):
            if not options.quiet:
                err.print(report_campaign.part_line(part.name, entry, clock.left()))
    except KeyboardInterrupt:
        ledger.end("interrupted", clock.spent())
        raise
    except MachineError as error:
        with contextlib.suppress(MachineError):  # a full disk refuses this line too
            ledger.end(error.message, clock.spent())
        raise
    wanted = [part for part in parts if part.step in shares]
    return "all done" if all(_is_done(ledger.entry(part)) for part in wanted) else "out of time"


def _is_done(entry: Entry | None) -> bool:
    return entry is not None and entry.status in ("done", "skipped", "failed")


def _show(folder: Path, ledger: Ledger, parts: Sequence[Part], options: argparse.Namespace) -> int:
    # What belongs to other versions of a kernel is still in the file, and says nothing of this one.
    current = {part.name: entry for part in parts if (entry := ledger.entry(part)) is not None}
    book = dataclasses.replace(ledger.book, parts=current)
    document = report_campaign.document(folder, book, parts)
    if options.json:
        commands.print_document("campaign", document)
    else:
        for line in report_campaign.campaign_lines(document, book):
            report.open_console(sys.stdout).print(line)
    return FOUND if document.wrong else 0


def make_lab(
    options: argparse.Namespace,
    folder: Path,
    workspace: Workspace,
    setting: Setting,
    ledger: Ledger,
    parts: Sequence[Part],
) -> Any:
    """The laboratory on the GPU that is here."""
    stem = str(next(part.what["kernel"] for part in parts if "kernel" in part.what))
    by_name = {part.name: part for part in parts}

    def known(name: str) -> Mapping[str, Any] | None:
        entry = ledger.entry(by_name[name]) if name in by_name else None
        return None if entry is None else entry.data

    jobs = options.jobs or max((os.cpu_count() or 1) - _SPARED_CORES, 1)
    job = Job(root=workspace.root, stem=stem, device=setting.device, mode="measured", seed=options.seed)
    runner = ProcessRunner(job=job, jobs=jobs, cache=triton_cache())
    bench = Bench(
        workspace=workspace, setting=setting, folder=folder, runner=runner, jobs=jobs, seed=options.seed,
        known=known, memory_bytes=_memory_bytes(ledger), keep=options.keep,
    )  # fmt: skip
    runner.left = bench.seconds
    runs = [{"began": run.began, **{key: run.machine.get(key) for key in _OF_RUNS}} for run in ledger.book.runs]
    return GpuLab(bench=bench, stem=stem, runs=runs)


# What of a machine is repeated in every recorded space.
_OF_RUNS = ("driver", "gpu", "commit")


def subjects_of(workspace: Workspace, setting: Setting, seed: int) -> list[Subject]:
    """The kernels of the workspace, those first that have a space to be measured in full, in their order."""
    order = [stem for stem, _, _ in SPACES]
    stems = sorted(workspace.stems, key=lambda stem: (order.index(stem) if stem in order else len(order), stem))
    found = []
    for stem in stems:
        identity = journal_identity(stem, workspace, setting, seed)
        judges = f"{identity.pop('judge_digest')}{digest_modules(_DECIDING)}"
        of = f"{_digest(identity)}:{_digest(judges)}"
        pass_ = workspace.kernel_pass(stem)
        variants = frozenset(supported(workspace.kernel_parameters(stem), pass_))
        family = workspace.kernel_family(stem)
        found.append(Subject(stem=stem, pass_=pass_, of=of, variants=variants, family=family))
    if not found:
        raise UsageError(f"{workspace.root} has no kernel with a search space")
    return found


def _device_of(setting: Setting) -> str:
    versions = [setting.device.name, setting.device.arch, package_version("torch")]
    return f"{_digest(versions)}:{digest_modules(('ceilings', 'measure', 'timing'))}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _setting() -> Setting:
    device, driver = commands.here()
    if device is None:
        raise MachineError(
            "a campaign measures, and there is no GPU here that Triton can compile for",
            hint="`flashtune doctor --campaign` says what is missing",
        )
    return Setting(device, "measured", driver)


def _shares(only: Sequence[str] | None) -> Mapping[str, float]:
    for step in only or ():
        if step not in SHARES:
            raise UsageError(f"a campaign has no step `{step}`", hint=did_you_mean(step, list(SHARES)))
    if not only:
        return SHARES
    return {step: 1.0 for step in SHARES if step in only}


def _described(machine: probe.Machine, setting: Setting) -> dict[str, Any]:
    """What a number depends on of a machine, and nothing that names it."""
    gpu = machine.gpus[0] if machine.gpus else None
    described: dict[str, Any] = {
        "gpu": gpu.name if gpu else setting.device.name, "driver": setting.driver, "cores": machine.cores,
        "memory_bytes": machine.memory_bytes, "python": machine.python, "commit": machine.commit,
        **{name: getattr(machine, name).version for name in ("torch", "triton", "numpy")},
    }  # fmt: skip
    if gpu is not None:
        described |= {
            "gpu_memory_bytes": gpu.memory_bytes, "clock_max_mhz": gpu.clock_max_mhz, "power_limit_w": gpu.power_limit_w,
            "multiprocessors": gpu.multiprocessors, "l2_bytes": gpu.l2_bytes, "throttle": list(gpu.throttle or ()),
        }  # fmt: skip
    return described


def _memory_bytes(ledger: Ledger) -> int | None:
    found = ledger.book.runs[-1].machine.get("gpu_memory_bytes") if ledger.book.runs else None
    return int(found) if found else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------------------------------------
# Elsewhere: recording the interpreter's answers before, keeping what was found after
# ---------------------------------------------------------------------------------------------------------------------


def _record_answers(folder: Path, workspace: Workspace, options: argparse.Namespace) -> int:
    """Interpret every question under the default config of the target, for a machine on which the interpreter does not work."""
    from harness.device import find_target

    device = find_target(options.target or commands.DEFAULT_TARGET)
    setting = Setting(device, "estimated")
    clock = Clock(60.0 * options.minutes)
    err = report.open_console(sys.stderr)
    with locked(folder):
        answers = Answers(folder)
        asked = _questions(workspace, setting, options.seed)
        open_ = [(stem, case) for stem, case in asked if answers.find(case) is None]
        job = Job(root=workspace.root, stem=asked[0][0], device=device, mode="estimated", seed=options.seed)
        runner = ProcessRunner(job=job, jobs=options.jobs or os.cpu_count() or 1, cache=triton_cache(), left=clock.left)
        with contextlib.closing(runner):
            given = _interpret(runner, open_, clock, answers, lambda line: None if options.quiet else err.print(line))
        path = answers.save()
    report.open_console(sys.stdout).print(
        f"{given} answers of the interpreter recorded now, {len(answers)} of {len(asked)} in all: {path}"
    )
    return 0


def _questions(workspace: Workspace, setting: Setting, seed: int) -> list[tuple[str, Case]]:
    parts = plan(subjects_of(workspace, setting, seed), (), device_of="")
    found = []
    for part in parts:
        if part.what["do"] == "question":
            stem, problem = part.what["kernel"], parse_problem(part.what["problem"])
            module = workspace.load_space(stem)
            space = module.space(problem, setting.device)
            default = space.check(module.default(problem, setting.device))
            first = chosen_configs(space, default, 0, seed_of(part.name))[0]
            found.append((stem, Truth.case(stem, part.what["problem"], part.what["recipe"], first)))
    return found


def _interpret(
    runner: ProcessRunner,
    asked: Sequence[tuple[str, Case]],
    clock: Clock,
    answers: Answers,
    say: Callable[[str], object],
) -> int:
    """Ask as many at a time as there are children, as long as there is time; the count of those that answered rightly."""
    given = 0
    for start in range(0, len(asked), runner.jobs):
        if clock.left() <= 0:
            break
        batch = asked[start : start + runner.jobs]
        waits = [
            runner.for_kernel(stem).call("interpreter", "verify", ask, case, "cpu", 1, limit_s=_INTERPRET_S)
            for stem, case in batch
        ]
        for (_, case), wait in zip(batch, waits, strict=True):
            found = wait()
            if isinstance(found, Reply) and not found.wrong:
                answers.put(case, found.answer)
                given += 1
            elif clock.left() > 0:  # what the end of the time cut is asked again
                why = found.wrong if isinstance(found, Reply) else getattr(found, "reason", "it took too long")
                say(f"no answer to `{case.problem}`: {why}")
    return given


def _adopt(folder: Path, workspace: Workspace, options: argparse.Namespace) -> int:
    """Keep the champions, complete recorded spaces and counterexamples of a campaign in this workspace, without a GPU."""
    book = read_book(folder / FILE)
    champions, written = [], []
    for name, entry in book.parts.items():
        stem = name.split("/")[1].split()[-1]
        found = entry.data.get("champion")
        if found:
            tree = {**entry.data.get("of", {}), "champions": [found]}
            champions.append(champion_file_of(tree, f"the champion in {folder / FILE}, {name},"))
        written += [
            write_counterexample(workspace.results / "corpus" / stem, one) for one in _examples(entry, book.runs)
        ]
    out = report.open_console(sys.stdout)
    places: Counter[tuple[str, Path]] = Counter()
    for each in champions:
        workspace.check_stem(each.kernel.name)
        places[each.kernel.name, save_champions(workspace.results, each, draft=options.draft)] += 1
    for (stem, path), several in sorted(places.items()):
        out.print(f"{report.plural(several, 'champion')} of {stem}: {path}")
    for path in sorted((folder / "spaces").glob("*.jsonl*")):
        if ".journal." not in path.name:
            read_recorded(path)  # a damaged one is refused
            kept = workspace.results / "spaces" / book.device / path.name
            write_whole(kept, path.read_bytes())
            out.print(f"recorded space: {kept}")
    out.print(f"{report.plural(len(written), 'counterexample')}" + "".join(f"\n  {path}" for path in written))
    return 0


def _examples(entry: Entry, runs: Sequence[Any]) -> Iterator[Counterexample]:
    machine = runs[entry.run].machine
    versions = {name: str(machine.get(name)) for name in ("triton", "torch", "numpy")}
    for one in entry.data.get("candidates", ()):
        if "case" in one:
            case = Case(**one["case"]) if not isinstance(one["case"], Case) else one["case"]
            judge = "bound" if one["status"] == "wrong" else "crash"
            yield Counterexample(schema=SCHEMA, case=case, judge=judge, detail=one["detail"], found_with=versions)
    for one in entry.data.get("counterexamples", ()):
        yield COUNTEREXAMPLES.validate_json(json.dumps(one))
