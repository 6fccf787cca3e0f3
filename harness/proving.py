"""What the verbs `fuzz` and `replay` do, given their parsed options."""

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from harness import documents, report, report_proof, sanitizer, suite
from harness.cases import CASES, read_counterexample
from harness.commands import DEFAULT_TARGET, live_device, parse_seconds, print_document
from harness.device import DeviceFacts, find_target
from harness.errors import MachineError, UsageError, WorkspaceError, did_you_mean
from harness.foreign import Foreign, check
from harness.fuzz import Tally, fuzz, replay_case
from harness.fuzz_child import Plan
from harness.operation import dtypes_of, supported
from harness.problem import Dtype, Pass, Problem
from harness.space import Config
from harness.workspace import Workspace, find_workspace, package_version

FOUND = 1

# What `fuzz` does without `--profile`: a minute of what the nightly campaign does.
_DEFAULT_PROFILE = "nightly"
_DEFAULT_S = 60.0
_UNLIMITED = 10**9

# Tiles up to this side: larger ones are the same code with more to compute, and a case should take a fraction of a second.
_LARGEST_SIDE = 64


def run_fuzz(options: argparse.Namespace) -> int:
    """`flashtune fuzz`: search for a counterexample; exit 1 when there is one."""
    if bool(options.kernel) == bool(options.impl):
        found = "both" if options.kernel else "neither"
        raise UsageError(
            f"fuzz needs a kernel of this workspace or `--impl`, found {found}",
            hint="`flashtune fuzz flash_fwd`, or `flashtune fuzz --impl package.module:function --signature sdpa`",
        )
    profile = suite.profile_for(options.profile or _DEFAULT_PROFILE)
    plan = replace(
        _foreign_plan(options) if options.impl else _kernel_plan(options),
        seconds=parse_seconds(options.time) if options.time else profile.time_s if options.profile else _DEFAULT_S,
        cases=options.cases or (profile.cases if options.profile else _UNLIMITED),
        profile=profile.name,
        device=_device(),
        sanitize=_sanitizer(options.sanitize),
    )
    subject = options.impl or options.kernel
    unseen = find_workspace(options.workspace).kernel_unseen(options.kernel) if options.kernel else ()
    err = report.open_console(sys.stderr)
    with report.FuzzBar(
        err, shown=err.is_terminal and not options.quiet, seconds=plan.seconds, cases=max(plan.cases, 1)
    ) as bar:
        corpus = _corpus_folder(options, plan)
        tally = fuzz(plan, corpus, versions=versions(), seen=lambda tally: bar.step(tally.cases, tally.seconds))
    if options.json:
        print_document("fuzz", _fuzz_document(tally))
    else:
        for line in report_proof.fuzz_lines(subject, _fuzz_document(tally), _examples(tally)):
            report.open_console(sys.stdout).print(line)
    if unseen and plan.device == "cpu" and not options.quiet:
        err.print(f"note: PyTorch's reference was asked here, so nothing was seen of: {', '.join(unseen)}")
    if not tally.counterexamples and not tally.judges["bound"] and plan.cases:
        raise MachineError(
            f"cannot tell: in {tally.cases} cases `{subject}` gave nothing that could be judged",
            hint="it refuses every case, or the time was too short: pass a longer `--time`",
        )
    return FOUND if tally.counterexamples else 0


def _kernel_plan(options: argparse.Namespace) -> Plan:
    if options.signature or options.supports:
        raise UsageError(
            "`--signature` and `--supports` are about an implementation named by `--impl`", hint="leave them out"
        )
    workspace = find_workspace(options.workspace)
    pass_ = workspace.kernel_pass(options.kernel)
    live = live_device()
    configs = every_config(workspace, options.kernel, pass_, live)
    return Plan(
        seed=options.seed, seconds=0, cases=0, root=workspace.root, kernel=options.kernel, pass_=pass_, configs=configs,
        variants=supported(workspace.kernel_parameters(options.kernel), pass_),
    )  # fmt: skip


def _foreign_plan(options: argparse.Namespace) -> Plan:
    words = tuple(word for given in options.supports or () for word in given.replace(",", " ").split())
    foreign = Foreign(options.impl, options.signature or "", words)
    check(foreign)
    return Plan(seed=options.seed, seconds=0, cases=0, foreign=foreign)


def _device() -> Literal["cpu", "cuda"]:
    return "cuda" if live_device() is not None else "cpu"


def _sanitizer(tool: str | None) -> str:
    """The tool, if it exists and can run here."""
    if tool is None:
        return ""
    if tool not in sanitizer.TOOLS:
        raise UsageError(f"there is no sanitizer `{tool}`", hint=did_you_mean(tool, sanitizer.TOOLS))
    if _device() == "cpu":
        raise MachineError(
            "`--sanitize` watches compiled kernels, and there is no GPU here",
            hint="leave it out: in Triton's interpreter the judge `shadow` watches every access",
        )
    sanitizer.program()
    return tool


def _corpus_folder(options: argparse.Namespace, plan: Plan) -> Path:
    """Where it was asked for, in the workspace, or in the current folder where a foreign implementation has none around it."""
    if options.corpus:
        return Path(options.corpus)
    if plan.root is not None:
        return plan.root / "results" / "corpus" / plan.kernel
    try:
        results = find_workspace(options.workspace).results / "corpus"
    except WorkspaceError:
        if options.workspace is not None:
            raise
        results = Path("flashtune-corpus")
    return results / re.sub(r"[^A-Za-z0-9]+", "-", options.impl)


def run_replay(options: argparse.Namespace) -> int:
    """`flashtune replay`: ask every judge about one corpus file; exit 1 when one of them still finds it wrong."""
    path = _corpus_file(options)
    example = read_counterexample(path)
    plan = Plan(seed=0, seconds=0, cases=0, only=(example.case,), foreign=example.case.foreign, device=_device())
    if plan.foreign is None:
        workspace = find_workspace(options.workspace)
        workspace.check_stem(example.case.kernel)
        pass_ = workspace.kernel_pass(example.case.kernel)
        plan = replace(plan, root=workspace.root, kernel=example.case.kernel, pass_=pass_)
    answers = tuple(
        documents.ReplayedJudge(
            judge=answer["judge"], detail=answer["detail"], worst=answer["worst"], checks=answer["checks"]
        )
        for answer in replay_case(plan)
    )
    document = documents.ReplayDocument(file=str(path), problem=example.case.problem, judges=answers)
    if options.json:
        print_document("replay", document)
    else:
        for line in report_proof.replay_lines(document, CASES.dump_python(example.case, mode="json"), example.detail):
            report.open_console(sys.stdout).print(line)
    if not any(answer.checks or answer.detail for answer in answers):
        raise MachineError(
            f"cannot tell: no judge had anything to compare in {path}",
            hint="the subject refuses the case now; `flashtune replay` says nothing of one that computes nothing",
        )
    return FOUND if any(answer.detail for answer in answers) else 0


def every_config(
    workspace: Workspace, kernel: str, pass_: Pass, live: DeviceFacts | None = None
) -> dict[Dtype, list[dict[str, int | str | bool]]]:
    """`fuzz_configs` by type of q, k and v, of those that the kernel takes and the device has."""
    dtypes = dtypes_of(workspace.kernel_parameters(kernel))
    found = {dtype: fuzz_configs(workspace, kernel, pass_, dtype, live) for dtype in dtypes}
    return {dtype: configs for dtype, configs in found.items() if configs}


def fuzz_configs(
    workspace: Workspace, kernel: str, pass_: Pass, dtype: Dtype, live: DeviceFacts | None = None
) -> list[dict[str, int | str | bool]]:
    """Every legal config of the device that is here; without one those that the interpreter can tell apart, with tiles that
    are quick to run."""
    long = Problem(
        batch=1, q_heads=4, kv_heads=2, q_len=4096, kv_len=4096, head_dim=64, v_head_dim=64, dtype=dtype, pass_=pass_
    )  # fmt: skip
    distinct: dict[Config, Config] = {}
    # Some parameters have more than one value only where there is a mask, some only where little is to be done, some only for
    # heads that are no power of two wide, some only for scores that are changed.
    short, odd = long.replace(q_len=16, kv_len=16), long.replace(head_dim=96, v_head_dim=96)
    several = [long, long.replace(causal=True, window_left=1024), short, odd]
    if "softcap" in workspace.kernel_parameters(kernel):
        several.append(long.replace(softcap=4.0))
    if "nondeterministic" in workspace.kernel_parameters(kernel):
        several.append(long.replace(nondeterministic=True))
    for problem in several:
        space = workspace.load_space(kernel).space(problem, live or find_target(DEFAULT_TARGET))
        if live is None:
            # Before it is enumerated: large tiles are most of a space.
            space = space.limited(lambda name, value: "block" not in name or int(value) <= _LARGEST_SIDE)
        seen = space.names if live is not None else space.interpreted
        distinct |= {config.restricted(seen): config for config in reversed(space.distinct(seen))}
    small = [dict(config) for config in distinct.values()]
    # Few configs add atomically, as tiles of dq are none of theirs then: they are asked about as often as one in four.
    rare = [config for config in small if config.get("structure") == "atomic"]
    small += rare * (len(small) // max(4 * len(rare), 1))
    return sorted(small, key=lambda config: [str(value).zfill(4) for value in config.values()])


def _corpus_file(options: argparse.Namespace) -> Path:
    """A corpus file by path, or by the id in its name."""
    if Path(options.what).is_file():
        return Path(options.what)
    corpus = find_workspace(options.workspace).results / "corpus"
    found = sorted(corpus.glob(f"*/{options.what}.json"))
    if len(found) != 1:
        raise UsageError(
            f"`{options.what}` is no file, and {len(found)} counterexamples in {corpus} have that id",
            hint="give the path of a corpus file, or the id that `flashtune fuzz` printed",
        )
    return found[0]


def _fuzz_document(tally: Tally) -> documents.FuzzDocument:
    return documents.FuzzDocument(
        cases=tally.cases,
        seconds=round(tally.seconds, 1),
        verdicts=dict(sorted(tally.verdicts.items())),
        oracles=dict(sorted(tally.judges.items())),
        largest=dict(sorted(tally.largest.items())),
        counterexamples=tuple(map(str, tally.counterexamples)),
    )


def _examples(tally: Tally) -> list[tuple[Mapping[str, object], str, str]]:
    return [(CASES.dump_python(found.case, mode="json"), found.judge, found.detail) for found in tally.found]


def versions() -> dict[str, str]:
    """Of what a verdict in the interpreter depends on beside the code."""
    return {name: package_version(name) or "missing" for name in ("triton", "torch", "numpy")}
