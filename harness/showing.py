"""What `flashtune doctor` and `flashtune show` do: what is here, and what was found.

stdout carries results. Refuses to lay out text (`harness.report_show` does).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import documents, report, report_show
from harness.champions import read_champions
from harness.commands import print_document, runs_folder, shown
from harness.device import find_target
from harness.errors import WorkspaceError
from harness.store import read_journal
from harness.workspace import Workspace, find_workspace


def run_doctor(options: argparse.Namespace) -> int:
    """`flashtune doctor`: what is here, and whether a measurement here could be trusted."""
    from harness import probe

    machine = probe.probe()
    found = list(probe.trust(machine))
    live = probe.live_device(machine)
    workspace = _workspace_or_none(options.workspace)
    document = documents.DoctorDocument(
        trustworthy=live is not None and not any(finding.severity == "error" for finding in found),
        mode="measured" if live else "estimated",
        device=documents.DeviceDocument(name=live.name, arch=live.arch) if live else None,
        workspace=str(workspace.root) if workspace else None,
        kernels=tuple(workspace.stems) if workspace else (),
        machine=machine,
        findings=tuple(
            documents.FindingDocument(severity=finding.severity, message=finding.message, hint=finding.hint)
            for finding in found
        ),
    )
    if options.json:
        print_document("doctor", document)
    else:
        for line in report_show.doctor_lines(document):
            report.open_console(sys.stdout).print(line)
    return 0


def run_show(options: argparse.Namespace) -> int:
    """`flashtune show`: champions, or with `--failed` the failures of the journals by reason."""
    workspace = find_workspace(options.workspace)
    kernels = [workspace.check_stem(options.kernel)] if options.kernel else workspace.stems
    if options.failed:
        records = [record for path in _journals(options, workspace, kernels) for record in read_journal(path)[1]]
        # What was tried again has its last word only.
        last = {(one.problem, frozenset(one.config.items()), one.role): one for one in records}
        document = documents.ShowDocument(failures=report.failures(last.values()))
    else:
        wanted = find_target(options.target).name if options.target else None
        found = [(path, read_champions(path)) for path in sorted((workspace.results / "best").glob("*/*.json"))]
        document = documents.ShowDocument(
            champions=tuple(
                (shown(path), champions)
                for path, champions in found
                if champions.kernel in kernels and wanted in (None, champions.device)
            )
        )
    if options.json:
        print_document("show", document)
    else:
        for line in report_show.show_lines(document, failed=options.failed):
            report.open_console(sys.stdout).print(line)
    return 0


def _journals(options: argparse.Namespace, workspace: Workspace, kernels: Sequence[str]) -> list[Path]:
    return sorted(path for name in kernels for path in runs_folder(options, workspace).glob(f"{name}-*.jsonl"))


def _workspace_or_none(given: str | None) -> Workspace | None:
    try:
        return find_workspace(given)
    except WorkspaceError:
        if given is not None:
            raise
        return None
