"""What the verb `verify` does, given its parsed options: champions that were proved of another kernel are proved again.

One that passes is renewed: it has a certificate of the kernel as it is now, and keeps its config and its number, with the digest
of the kernel that was timed. One that is wrong is struck from its file. Refuses to strike what the suite could not tell.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from harness import commands, documents, report
from harness.cases import COUNTEREXAMPLES, SCHEMA, write_counterexample
from harness.champion_documents import RenewedDocument, VerifyDocument
from harness.champions import Champion, ChampionFile, KillRate, read_champions
from harness.commands import here, print_document, require_packages, shown_path
from harness.compare import Verdict
from harness.crown import certificate_of
from harness.device import DeviceFacts, find_target
from harness.errors import UsageError
from harness.keeping import replace_champion
from harness.outcome import Mode, Proof, TimedOut
from harness.proving import versions
from harness.report_show import verify_lines
from harness.space import Config
from harness.worker import Job, Runner
from harness.workspace import Workspace, find_workspace

FOUND = 1

_Status = Literal["renewed", "struck", "unsettled", "current"]


@dataclass(frozen=True, slots=True)
class _Became:
    """The champion as it is now, None if it was struck; where the suite could not tell, as it was, with a reason."""

    champion: Champion | None
    detail: str
    settled: bool = True


def run_verify(options: argparse.Namespace) -> int:
    """`flashtune verify`: prove stale champions again; exit 1 when one was struck, or could not be settled."""
    workspace = find_workspace(options.workspace)
    kernels = [workspace.check_stem(options.kernel)] if options.kernel else workspace.stems
    require_packages("torch", "triton", "hypothesis")
    # A damaged file is said before anything is proved.
    files = [(path, read_champions(path)) for path in sorted((workspace.results / "best").glob("*/*.json"))]
    out, done = report.open_console(sys.stdout), []
    for path, file in files:
        if file.kernel.name not in kernels or file.kernel.family != workspace.kernel_family(file.kernel.name):
            continue
        for one in _verify_file(path, file, workspace, options):
            done.append(one)
            if not options.json and (one.became != "current" or not options.quiet):
                for line in verify_lines(one):
                    out.print(line)
    if options.json:
        print_document("verify", VerifyDocument(champions=tuple(done)))
    elif not done:
        out.print("no champions yet: `flashtune tune KERNEL` finds some")
    return FOUND if any(one.became in ("struck", "unsettled") for one in done) else 0


def _verify_file(
    path: Path, file: ChampionFile, workspace: Workspace, options: argparse.Namespace
) -> Iterator[RenewedDocument]:
    digest, stem = workspace.kernel_digest(file.kernel.name), file.kernel.name
    due = [one for one in file.champions if options.all or one.certificate.kernel_digest != digest]
    for one in file.champions:
        if one not in due:
            yield _document(path, one, "current", "")
    if not due:
        return
    try:
        device, mode = _where(file)
    except UsageError as unknown:
        for one in due:
            yield _document(path, one, "unsettled", unknown.message)
        return
    job = Job(root=workspace.root, stem=stem, device=device, mode=mode, seed=options.seed)
    with contextlib.closing(commands.process_runner(job, options.jobs or os.cpu_count() or 1)) as runner:
        for one in due:
            became = _proved(runner, stem, one, workspace)
            if became.champion != one and not replace_champion(path, one, became.champion):
                became = _Became(one, "its file was changed meanwhile", settled=False)
            status: _Status = "unsettled" if not became.settled else "struck" if became.champion is None else "renewed"
            yield _document(path, one, status, became.detail)


def _where(file: ChampionFile) -> tuple[DeviceFacts, Mode]:
    """The device of the champions, and `measured` if it is here: then the proof runs on it, else in the interpreter."""
    live, _ = here()
    if live is not None and (live.name, live.arch) == (file.device.name, file.device.arch):
        return live, "measured"
    return find_target(file.device.name), "estimated"


def _proved(runner: Runner, stem: str, champion: Champion, workspace: Workspace) -> _Became:
    problem, digest = champion.read(), workspace.kernel_digest(stem)
    try:
        config: Config = workspace.load_space(stem).space(problem, runner.device).check(champion.config)
    except UsageError as illegal:
        return _Became(None, illegal.message)
    proving = runner.prove(problem, config)
    verdict = runner.verify(problem, config)()
    if not isinstance(verdict, Verdict) or verdict.status == "unknown":
        return _Became(champion, _why(verdict), settled=False)
    if not verdict.passed:
        return _Became(None, verdict.detail or verdict.status)
    proof = proving()
    if not isinstance(proof, Proof) or proof.status == "unknown":
        return _Became(champion, _why(proof), settled=False)
    if not proof.passed:
        kept = _keep_counterexample(proof, workspace.results / "corpus" / stem)
        return _Became(None, proof.detail + (f"; `flashtune replay {kept}`" if kept else ""))

    def rate(suite: str) -> KillRate | None:
        return documents.kill_rate(workspace.results, stem, suite=suite, kernel_digest=digest)

    certificate = certificate_of(verdict, proof, digest, rate)
    if extras := champion.certificate.model_extra:
        certificate = certificate.model_copy(update=extras)
    weaker = champion.certificate.where == "device" and proof.where == "interpreter"
    detail = (
        f"{proof.cases} cases on the device" if proof.where == "device" else f"{proof.cases} cases in the interpreter"
    )
    detail += ", whereas its old proof was on the device" if weaker else ""
    return _Became(champion.model_copy(update={"certificate": certificate}), detail)


def _why(found: object) -> str:
    """Why gate or suite did not come to an end, in words."""
    if isinstance(found, Verdict | Proof):
        return f"cannot tell: {found.detail or 'nothing could be compared'}"
    if isinstance(found, TimedOut):
        return f"it took longer than {found.limit_s:.0f} s"
    return f"it could not be run: {getattr(found, 'reason', found)}"


def _keep_counterexample(proof: Proof, corpus: Path) -> str:
    """The id of the case in which it was wrong, which is kept as `flashtune fuzz` keeps its own; empty if there is none."""
    judge, _, detail = proof.detail.partition(": ")
    tree = {"schema": SCHEMA, "case": proof.counterexample, "judge": judge, "detail": detail, "found_with": versions()}
    try:
        found = COUNTEREXAMPLES.validate_json(json.dumps(tree))
    except ValidationError:
        return ""
    return write_counterexample(corpus, found).stem


def _document(path: Path, champion: Champion, became: _Status, detail: str) -> RenewedDocument:
    return RenewedDocument(path=shown_path(path), problem=champion.problem, became=became, detail=detail)
