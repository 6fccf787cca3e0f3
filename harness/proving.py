"""What the verbs `fuzz` and `replay` do, given their parsed options."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from harness import documents, report, report_proof
from harness.cases import CASES, read_counterexample
from harness.commands import package_version, parse_seconds, print_document
from harness.device import find_target
from harness.errors import MachineError, UsageError
from harness.fuzz import Tally, fuzz, replay_case
from harness.fuzz_child import Plan
from harness.problem import Dtype, Pass, Problem
from harness.workspace import Workspace, find_workspace

FOUND = 1

# Tiles up to this side: larger ones are the same code with more to compute, and a case should take a fraction of a second.
_LARGEST_SIDE = 64
_DTYPES: tuple[Dtype, ...] = ("fp16", "bf16", "fp32")


def run_fuzz(options: argparse.Namespace) -> int:
    """`flashtune fuzz`: search for a counterexample; exit 1 when there is one."""
    workspace = find_workspace(options.workspace)
    pass_ = workspace.kernel_pass(options.kernel)
    plan = Plan(
        root=workspace.root,
        kernel=options.kernel,
        pass_=pass_,
        configs={dtype: _configs(workspace, options.kernel, pass_, dtype) for dtype in _DTYPES},
        seed=options.seed,
        seconds=parse_seconds(options.time),
        cases=options.cases,
    )
    err = report.open_console(sys.stderr)
    corpus = workspace.results / "corpus" / options.kernel
    total = min(options.cases, 10**9)
    with report.FuzzBar(err, shown=err.is_terminal and not options.quiet, seconds=plan.seconds, cases=total) as bar:
        tally = fuzz(plan, corpus, versions=_versions(), seen=lambda tally: bar.step(tally.cases, tally.seconds))
    if options.json:
        print_document("fuzz", _fuzz_document(tally))
    else:
        for line in report_proof.fuzz_lines(options.kernel, _fuzz_document(tally), _examples(tally)):
            report.open_console(sys.stdout).print(line)
    if not tally.counterexamples and not tally.judges["bound"]:
        raise MachineError(
            f"cannot tell: in {tally.cases} cases `{options.kernel}` gave nothing that could be judged",
            hint="the kernel refuses every case, or the time was too short: pass a longer `--time`",
        )
    return FOUND if tally.counterexamples else 0


def run_replay(options: argparse.Namespace) -> int:
    """`flashtune replay`: ask every judge about one corpus file; exit 1 when one of them still finds it wrong."""
    workspace = find_workspace(options.workspace)
    path = _corpus_file(workspace, options.what)
    example = read_counterexample(path)
    workspace.check_stem(example.case.kernel)
    plan = Plan(
        root=workspace.root,
        kernel=example.case.kernel,
        pass_=workspace.kernel_pass(example.case.kernel),
        configs={},
        seed=0,
        seconds=0,
        cases=0,
        only=example.case,
    )
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
            hint="the kernel refuses the case now; `flashtune replay` says nothing of a kernel that computes nothing",
        )
    return FOUND if any(answer.detail for answer in answers) else 0


def _configs(workspace: Workspace, kernel: str, pass_: Pass, dtype: Dtype) -> list[dict[str, int | str | bool]]:
    """Configs that the interpreter can tell apart, with tiles that are quick to run."""
    long = Problem(
        batch=1, q_heads=4, kv_heads=2, q_len=4096, kv_len=4096, head_dim=64, v_head_dim=64, dtype=dtype, pass_=pass_
    )  # fmt: skip
    space = workspace.load_space(kernel).space(long, find_target("h200"))
    distinct = {config.restricted(space.interpreted): config for config in reversed(space.legal)}
    small = [
        dict(config)
        for config in distinct.values()
        if all(int(value) <= _LARGEST_SIDE for name, value in config.items() if "block" in name)
    ]
    return sorted(small, key=lambda config: [str(value).zfill(4) for value in config.values()])


def _corpus_file(workspace: Workspace, what: str) -> Path:
    """A corpus file by path, or by the id in its name."""
    if Path(what).is_file():
        return Path(what)
    found = sorted((workspace.results / "corpus").glob(f"*/{what}.json"))
    if len(found) != 1:
        raise UsageError(
            f"`{what}` is no file, and {len(found)} counterexamples in {workspace.results / 'corpus'} have that id",
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


def _versions() -> dict[str, str]:
    return {name: package_version(name) or "missing" for name in ("triton", "torch", "numpy")}
