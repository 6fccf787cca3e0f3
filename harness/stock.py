"""The stock workspace: which files it has, where they are, and the verb `init`, which writes them out as a new workspace.

A wheel carries a copy of it in `harness/_stock`, which its build makes (setup.py); in a checkout the checkout itself is the copy,
so that no second one is kept. Refuses to write into a folder that holds anything. The build imports it: it needs only what is
there before anything is installed.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.errors import MachineError, UsageError

_HERE = Path(__file__).parent
# Beside these, nothing is needed to tune.
_PATTERNS = (
    "kernels/*.py",
    "kernels/*.toml",
    "search_spaces/*.py",
    "search_spaces/*.toml",
    "results/README.md",
    ".gitignore",
)


def stock_files(root: Path) -> Iterator[Path]:
    """The files of the stock workspace under `root`, relative to it, in order."""
    for pattern in _PATTERNS:
        yield from (path.relative_to(root) for path in sorted(root.glob(pattern)))


def stock_root() -> Path:
    """Where the stock workspace is: in the installed package, else in the checkout. Raises `MachineError`."""
    for root in (_HERE / "_stock", _HERE.parent):
        if (root / "kernels").is_dir() and (root / "search_spaces").is_dir():
            return root
    raise MachineError(
        f"this flashtune carries no stock workspace: neither {_HERE / '_stock'} nor {_HERE.parent} has `kernels/`",
        hint="install a wheel (`pip wheel .` in a checkout makes one), or work in a checkout",
    )


def write_stock(folder: Path) -> int:
    """Write the stock workspace into `folder`, which is empty or not there yet; the number of files. Raises `UsageError` for a
    folder that holds anything, and `MachineError` where it cannot be written."""
    root = stock_root()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise UsageError(f"{folder} {what}", hint="name a folder that is empty or does not exist yet")
        count = 0
        for name in stock_files(root):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / name).read_bytes())
            count += 1
    except OSError as error:
        raise MachineError(
            f"cannot write the workspace {folder}: {error.strerror or error}",
            hint="remove what is there of it, and make room",
        ) from error
    return count


def run_init(options: argparse.Namespace) -> int:
    """`flashtune init`: a new workspace."""
    # Whatever needs a package comes after the build, which has none.
    from harness import report
    from harness.champion_documents import InitDocument
    from harness.commands import print_document
    from harness.workspace import find_workspace

    folder = Path(options.folder)
    count = write_stock(folder)
    kernels = tuple(find_workspace(folder).stems)
    if options.json:
        print_document("init", InitDocument(path=str(folder), files=count, kernels=kernels))
        return 0
    report.open_console(sys.stdout).print(f"{folder}: a workspace with {', '.join(kernels)}")
    if not options.quiet:
        report.open_console(sys.stderr).print(
            f"next: cd {folder} && flashtune tune KERNEL --workload quickstart --draft"
        )
    return 0
