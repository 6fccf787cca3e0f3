"""Champions of the kernels of this repository that nobody measured, with the digests that the kernels have."""

from pathlib import Path
from typing import Any

from harness.champions import ChampionFile
from harness.device import TARGETS
from harness.keeping import write_champions
from harness.problem import parse_problem
from harness.workspace import Workspace
from tests.fake_champions import champion, champion_file

ROOT = Path(__file__).parents[2]
WORKSPACE = Workspace(ROOT)


def champion_of(
    problem: str, *, kernel: str = "flash_fwd", device: str = "h200", kind: str = "measured", **tunables: Any
):
    """The default of a problem with other values of some tunables, as its champion."""
    parsed, space = parse_problem(problem), WORKSPACE.load_space(kernel)
    default = dict(space.default(parsed, TARGETS[device]))
    config = dict(space.space(parsed, TARGETS[device]).check({**default, **tunables}))
    digest = WORKSPACE.kernel_digest(kernel)
    return champion(
        problem, kind=kind, config=config, default=default, kernel_digest=digest, source_digest=digest
    )  # fmt: skip


def keep(folder: Path, *champions: Any, kernel: str = "flash_fwd", device: str = "h200") -> Path:
    """A file of them in `folder`."""
    path = folder / f"{kernel}-{device}.json"
    file: ChampionFile = champion_file(*champions, device=device, kernel=kernel)
    write_champions(path, file)
    return path
