"""A whole tune by a fleet, as a process that can be killed: ADDRESS STORAGE FOLDER RUNS TRIALS."""

import contextlib
import sys
from pathlib import Path

from harness import fleet
from harness.fleet_study import MODEL, LoggedPlace, settle, task_of
from harness.landscape import read_landscapes
from harness.replayed import STAND_IN, facts_of
from harness.shared import open_shared_journal


def main(address: str, storage: str, folder: Path, runs: Path, trials: int) -> None:
    fleet.connect(address)
    land = read_landscapes(folder / "made.json")[0]
    place = LoggedPlace(path=folder / "made.json", device=MODEL, pace=0.1, log=folder / "log")
    identity = {"test": str(folder), "device": MODEL}
    spaces = {STAND_IN.key: land.space}
    with (
        contextlib.closing(
            open_shared_journal(runs / f"{folder.name}.jsonl", identity, spaces, storage, heartbeat_s=1, grace_s=3)
        ) as journal,
        contextlib.closing(
            fleet.RayRunner(place=place, device=facts_of(MODEL), mode="measured", ahead=3, most=2)
        ) as runner,
    ):
        settle(task_of(land, seed=0), runner, journal, trials=trials, seed=0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
