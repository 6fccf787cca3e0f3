"""Inject every fault and print the table; with --write, into docs/faults.md."""

import sys
import tempfile
from pathlib import Path

from tests.faults.injected import rows, table

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        written = table(rows(Path(folder)))
    sys.stdout.write(written)
    if "--write" in sys.argv[1:]:
        (Path(__file__).parents[2] / "docs" / "faults.md").write_text(written)
