"""A workspace of a test's own, with a small kernel of its own and champions of its own, and a way to run commands in it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from harness import commands, documents
from harness.cli import main
from harness.device import TARGETS, DeviceFacts
from harness.problem import Problem
from harness.space import Config, Param, Rule, Space
from harness.workspace import Workspace

KERNEL = 'PASS = "fwd"\n\n\ndef launches(q):\n    return tile(q)\n\n\ndef tile(q):\n    return q\n'


def space(problem: Problem, device: DeviceFacts) -> Space:
    """Tiles that are not longer than the sequence."""
    fits = Rule(
        "fits_length", "a tile is not longer than the sequence", lambda config: config["block_m"] <= problem.q_len
    )
    return Space(
        params=(
            Param("block_m", (16, 32, 64, 128), "more rows"),
            Param("num_warps", (1, 2, 4, 8), "more warps", interpreted=False),
        ),
        rules=(fits,),
    )


def default(problem: Problem, device: DeviceFacts) -> Config:
    return Config({"block_m": 16, "num_warps": 4})


class Desk:
    """`subject` is the kernel of the workspace `root`; no GPU is here until `here` says so."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        for part in ("kernels", "search_spaces"):
            (root / part).mkdir()
            (root / part / "subject.py").write_text(KERNEL)
        self.root, self.results = root, root / "results"
        self.workspace = Workspace(root)
        self.spaces = SimpleNamespace(space=space, default=default)
        self._capsys, self._patch = capsys, monkeypatch
        monkeypatch.setattr(Workspace, "load_space", lambda workspace, stem: self.spaces)
        monkeypatch.chdir(root)
        self.here(None)

    @property
    def digest(self) -> str:
        return self.workspace.kernel_digest("subject")

    def here(self, device: str | None) -> None:
        live = TARGETS[device] if device else None
        self._patch.setattr(commands, "_live_device", lambda: (live, "580.1" if live else None))

    def edit(self, old: str, new: str) -> None:
        """Change the kernel."""
        path = self.root / "kernels" / "subject.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def run(self, *argv: object) -> tuple[int, str, str]:
        code = main([str(each) for each in argv])
        said = self._capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    def document(self, *argv: object, code: int = 0) -> Any:
        found, out, err = self.run(*argv, "--json")
        assert found == code, err
        document = json.loads(out)
        jsonschema.validate(document, documents.json_schema(str(argv[0])))
        return document
