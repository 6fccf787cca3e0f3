"""What the verb `report` does, given its parsed options: everything that was found, as one page or as tables."""

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from harness import __version__, report
from harness.champion_documents import ReportDocument
from harness.champions import ChampionFile
from harness.commands import find_space, print_document, require_packages, shown_path
from harness.device import find_target
from harness.errors import HarnessError, UsageError
from harness.evidence import Evidence, SpaceFacts, gather
from harness.files import write_whole
from harness.finders import find, read_problem
from harness.findings import Findings
from harness.page_md import markdown
from harness.sealed import tame
from harness.showing import here_of, workspace_or_none
from harness.trust import Standing, standing
from harness.workspace import Workspace, find_workspace

# Counting a space takes seconds.
_MOST_SPACES = 8
_FORMATS = ("html", "md")


def run_report(options: argparse.Namespace) -> int:
    """`flashtune report`: champions, searches, spaces, failures and proofs as a page, or as tables for a pull request."""
    if options.format not in _FORMATS:
        raise UsageError(f"there is no format `{options.format}`", hint="`--format html` (one page) or `--format md`")
    if options.format == "html":
        require_packages(
            "matplotlib", "jinja2", hint="`pip install 'flashtune[report]'`, or `--format md`, which needs neither"
        )
    out = Path(options.out)
    if out.is_dir():
        raise UsageError(f"`--out {tame(out, 200)}` is a folder", hint="name a file, for example report.html")
    workspace = workspace_or_none(options) if options.sources else find_workspace(options.workspace)
    evidence = _evidence(options, workspace)
    found = find(replace(evidence, spaces=_spaces(evidence, workspace)))
    content = _content(found, options.format, _made(workspace, options)).encode()
    write_whole(out, content)
    document = ReportDocument(
        path=str(out), format=options.format, bytes=len(content), champions=len(found.champions),
        measured=found.kinds["measured"], missing={one.section: one.command for one in found.missing},
        unread=dict(evidence.unread),
    )  # fmt: skip
    if options.json:
        print_document("report", document)
    else:
        _say(document, quiet=options.quiet)
    return 0


def _content(found: Findings, format_: str, made: str) -> str:
    if format_ == "md":
        return markdown(found, made=made)
    # Only a page needs the libraries that draw.
    from harness.page import page

    return page(found, made=made)


def _evidence(options: argparse.Namespace, workspace: Workspace | None) -> Evidence:
    def standings_of(file: ChampionFile) -> dict[str, Standing] | None:
        here = here_of(file, workspace)
        return None if here is None else {one.problem: standing(file, one, here) for one in file.champions}

    if options.sources:
        return gather([Path(name) for name in options.sources], standings_of)
    assert workspace is not None
    results = workspace.results
    # Relative where that is shorter: the page goes to others, whom our folders do not concern.
    return gather([Path(shown_path(results))] if results.is_dir() else [], standings_of)


def _spaces(evidence: Evidence, workspace: Workspace | None) -> tuple[SpaceFacts, ...]:
    """The spaces of the problems that were tuned, as their kernels are here; those that cannot be asked are left out."""
    if workspace is None:
        return ()
    tuned = {
        (one.file.kernel.name, one.file.device.name, each.problem): None
        for one in evidence.champions
        for each in one.file.champions
    }
    tuned |= {(one.kernel, one.device, one.problem): None for one in evidence.trials}
    found: list[SpaceFacts] = []
    for kernel, device, problem in tuned:
        read = read_problem(problem)
        if kernel not in workspace.stems or read is None or len(found) == _MOST_SPACES:
            continue
        try:
            space = find_space(workspace, kernel, read, find_target(device))
        except HarnessError:
            continue
        found.append(
            SpaceFacts(
                kernel=kernel, device=device, problem=problem, size=space.census.size, legal=space.census.legal,
                pruned=space.census.pruned, whys={rule.name: rule.why for rule in space.rules},
            )
        )  # fmt: skip
    return tuple(found)


def _made(workspace: Workspace | None, options: argparse.Namespace) -> str:
    """Of what and when, in words."""
    what = (
        ", ".join(options.sources)
        if options.sources
        else f"workspace {workspace.root.name}"
        if workspace
        else "nothing"
    )
    return tame(f"{what}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, flashtune {__version__}", 300)


def _say(document: ReportDocument, *, quiet: bool) -> None:
    out, err = report.open_console(sys.stdout), report.open_console(sys.stderr)
    measured = f"{document.measured} measured, {document.champions - document.measured} not"
    champions = report.plural(document.champions, "champion")
    out.print(f"{tame(document.path, 400)}: {champions} ({measured}), {document.bytes / 1e3:,.0f} kB")
    if quiet:
        return
    for section, command in document.missing.items():
        err.print(f"  {section}: something is missing; {command}")
    for path, reason in document.unread.items():
        err.print(f"warning: {path} could not be read: {reason}")
