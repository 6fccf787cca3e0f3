import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from harness import commands, documents
from harness.cli import main
from harness.export_documents import MANIFEST
from tests.cli.desk import Desk
from tests.export.real import ROOT


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A workspace with one small kernel, and champions that a test writes."""
    (tmp_path / "desk").mkdir()
    return Desk(tmp_path / "desk", capsys, monkeypatch)


@pytest.fixture
def export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, Any]]:
    """Exports champions of this repository's kernels: where they are, and the document of the command."""
    monkeypatch.setattr(commands, "_live_device", lambda: (None, None))

    def run(target: str, *sources: Path, out: str = "out", check: bool = True) -> tuple[Path, Any]:
        argv = ["export", "--to", target, "--out", str(tmp_path / out), "--workspace", str(ROOT), "--json"]
        code = main([*argv, *(() if check else ("--no-check",)), "--from", *map(str, sources)])
        said = capsys.readouterr()
        assert code == 0, said.err
        document = json.loads(said.out)
        jsonschema.validate(document, documents.json_schema("export"))
        beside = json.loads((tmp_path / out / MANIFEST).read_text())
        assert beside == document | {"out": "."}
        return tmp_path / out, document

    return run
