"""What the verb `export` does, given its parsed options."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from harness import __version__, report
from harness.commands import here, print_document
from harness.export.base import Checked, Made, Request, Target, find_target
from harness.export.folder import MANIFESTS, digests, drafted, put_in_place, require_ours, write
from harness.export.gather import choose, find
from harness.export_documents import MANIFEST, ExportDocument, SkippedDocument
from harness.report_export import export_lines
from harness.workspace import Workspace, find_workspace


def run_export(options: argparse.Namespace) -> int:
    """`flashtune export`: champions in the form that a consumer reads, checked by the consumer's own code where it is here."""
    target, out = find_target(options.to), Path(options.out)
    require_ours(out, target.name)
    workspace = find_workspace(options.workspace)
    request, skipped = choose(find(_places(options, workspace, target), workspace.root), target, workspace, here()[0])
    if options.measured:
        estimates = [one for one in request.champions if one.estimated]
        skipped += tuple(one.skipped("its number is an estimate, and only times were asked for") for one in estimates)
        request = replace(request, champions=[one for one in request.champions if not one.estimated])
    made = target.make(request)
    with drafted(out, made.files) as draft:
        checked = _checked(target, draft, request, made, asked=not options.no_check)
        document = _document(options.out, target, made, skipped, checked)
        beside = replace(document, out=".")
        write(draft, {MANIFEST: MANIFESTS.dump_json(beside, indent=1) + b"\n"})
        put_in_place(draft, out)
    if options.json:
        print_document("export", document)
    else:
        for line in export_lines(document):
            report.open_console(sys.stdout).print(line)
    return 0


def _places(options: argparse.Namespace, workspace: Workspace, target: Target) -> list[Path]:
    """Where champions are looked for: where we were told, else where this workspace keeps them."""
    if options.sources:
        return [Path(name) for name in options.sources]
    stock = [workspace.results / "best", *([workspace.results / "runs"] if target.takes_journals else [])]
    return [place for place in stock if place.is_dir()]


def _checked(target: Target, draft: Path, request: Request, made: Made, *, asked: bool) -> Checked:
    if not asked:
        return "it was asked not to (`--no-check`)"
    if not made.files:
        return "nothing was written that could be read"
    return target.check(draft, request, made)


def _document(
    out: str, target: Target, made: Made, skipped: tuple[SkippedDocument, ...], checked: Checked
) -> ExportDocument:
    verified = None if isinstance(checked, str) else checked
    return ExportDocument(
        target=target.name, consumer=target.consumer, out=out, flashtune=__version__, files=digests(made.files),
        exported=made.exported, skipped=(*skipped, *made.skipped), verified_by=verified,
        not_verified=checked if isinstance(checked, str) else "", notes=made.notes, use=made.use,
    )  # fmt: skip
