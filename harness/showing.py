"""What the verbs `show`, `validate`, `diff`, `merge` and `doctor` do, given their parsed options: what is here or was found."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import champion_documents, documents, report, report_show
from harness.champion_documents import FileDocument, ShownDocument, ValidateDocument
from harness.champions import ChampionFile, read_champions
from harness.commands import here, print_document, runs_folder, shown_path
from harness.device import find_target
from harness.errors import ChampionError, MachineError, UsageError, WorkspaceError
from harness.keeping import lock_of, merge, write_champions
from harness.sealed import locked, tame
from harness.store import read_journal
from harness.trust import Here, standing
from harness.workspace import Workspace, find_workspace, package_version

FOUND = 1


def run_doctor(options: argparse.Namespace) -> int:
    """`flashtune doctor`: what is here, and whether a measurement here could be trusted."""
    from harness import probe

    machine = probe.probe()
    found = list(probe.trust(machine))
    live = probe.live_device(machine)
    workspace = workspace_or_none(options)
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
    """`flashtune show`: champions of the workspace or of a file, or with `--failed` the failures of the journals by reason."""
    if options.what and (options.what.endswith(".json") or "/" in options.what):
        path = Path(options.what)
        shown = _shown(options.what, read_champions(path), workspace_or_none(options))
        document = documents.ShowDocument(champions=(shown,))
    elif options.failed:
        workspace = find_workspace(options.workspace)
        paths = [path for stem in _kernels(options, workspace) for path in _journals(options, workspace, stem)]
        records = [record for path in paths for record in read_journal(path)[1]]
        # What was tried again has its last word only.
        last = {(one.problem, frozenset(one.config.items()), one.role): one for one in records}
        document = documents.ShowDocument(failures=report.failures(last.values()))
    else:
        document = documents.ShowDocument(champions=tuple(_champions(options)))
    if options.json:
        print_document("show", document)
    else:
        for line in report_show.show_lines(document, failed=options.failed):
            report.open_console(sys.stdout).print(line)
    return 0


def _champions(options: argparse.Namespace) -> list[ShownDocument]:
    workspace = find_workspace(options.workspace)
    kernels = _kernels(options, workspace)
    wanted = find_target(options.target).name if options.target else None
    found = [(path, read_champions(path)) for path in sorted((workspace.results / "best").glob("*/*.json"))]
    return [
        _shown(shown_path(path), file, workspace)
        for path, file in found
        if file.kernel.name in kernels and wanted in (None, file.device.name)
    ]


def _kernels(options: argparse.Namespace, workspace: Workspace) -> list[str]:
    return [workspace.check_stem(options.what)] if options.what else workspace.stems


def _journals(options: argparse.Namespace, workspace: Workspace, kernel: str) -> list[Path]:
    return sorted(runs_folder(options, workspace).glob(f"{kernel}-*.jsonl"))


def _shown(path: str, file: ChampionFile, workspace: Workspace | None) -> ShownDocument:
    """A file, and how its champions stand against the kernel that is here, if it is."""
    found = here_of(file, workspace)
    standings = None
    if found is not None:
        standings = {champion.problem: standing(file, champion, found) for champion in file.champions}
    return ShownDocument(path=path, file=file, standings=standings)


def here_of(file: ChampionFile, workspace: Workspace | None) -> Here | None:
    """What the champions of a file are held against, or None where their kernel is not."""
    stem = file.kernel.name
    if workspace is None or stem not in workspace.stems or workspace.kernel_family(stem) != file.kernel.family:
        return None
    device, driver = here()
    same = device is not None and device.name == file.device.name
    return Here(
        kernel_digest=workspace.kernel_digest(stem), triton=package_version("triton"), torch=package_version("torch"),
        driver=driver if same else None,
    )  # fmt: skip


def workspace_or_none(options: argparse.Namespace) -> Workspace | None:
    """The workspace, where there is one; a file from anywhere needs none."""
    try:
        return find_workspace(options.workspace)
    except WorkspaceError:
        if options.workspace is not None:
            raise
        return None


def run_validate(options: argparse.Namespace) -> int:
    """`flashtune validate`: whether files are champion files; exit 1 when one is not, 3 when one cannot be read at all."""
    checked = [_validated(Path(name)) for name in options.files]
    document = ValidateDocument(files=tuple(one for one, _ in checked))
    if options.json:
        print_document("validate", document)
    else:
        for line in report_show.validate_lines(document):
            report.open_console(sys.stdout).print(line)
    if any(missing for _, missing in checked):
        return MachineError.exit_code
    return 0 if all(one.valid for one in document.files) else FOUND


def _validated(path: Path) -> tuple[FileDocument, bool]:
    """What is to be said of one file, and whether it could not be read."""
    name = tame(path, 400)
    try:
        file = read_champions(path)
    except ChampionError as error:
        unread = isinstance(error.__cause__, OSError)
        return FileDocument(path=name, valid=False, detail=error.message), unread
    return FileDocument(path=name, valid=True, detail=str(file), champions=len(file.champions)), False


def run_diff(options: argparse.Namespace) -> int:
    """`flashtune diff`: what two champion files do not share; exit 1 when there is anything."""
    old, new = (read_champions(Path(name)) for name in (options.old, options.new))
    document = champion_documents.diff_document(old, new)
    if options.json:
        print_document("diff", document)
    else:
        for line in report_show.diff_lines(document, tame(options.old), tame(options.new)):
            report.open_console(sys.stdout).print(line)
    return FOUND if document.differences else 0


def run_merge(options: argparse.Namespace) -> int:
    """`flashtune merge`: the champions of several files in one; what is at `--out` already is kept in it too."""
    out = Path(options.out)
    if not out.name.endswith(".json"):
        raise UsageError(f"`--out {tame(out)}` does not end in `.json`", hint="champion files do")
    with locked(lock_of(out)):
        names = [*options.files, *([options.out] if out.exists() and not _among(out, options.files) else [])]
        written = write_champions(out, merge([(tame(name), read_champions(Path(name))) for name in names]))
    if options.json:
        print_document(
            "merge", FileDocument(path=options.out, valid=True, detail=str(written), champions=len(written.champions))
        )
    else:
        said = f"{report.plural(len(written.champions), 'champion')} of {written}: {tame(out, 400)}"
        report.open_console(sys.stdout).print(said)
    return 0


def _among(out: Path, names: Sequence[str]) -> bool:
    return any(Path(name).exists() and out.samefile(name) for name in names)
