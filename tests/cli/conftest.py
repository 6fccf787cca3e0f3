from pathlib import Path

import pytest

from tests.cli.desk import Desk


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A workspace with one small kernel, and champions that a test writes."""
    return Desk(tmp_path, capsys, monkeypatch)
