"""A fleet that loses workers all the time: the same tune by 1, 2 and 4 of them on a recorded space, one killed every few seconds.

The cluster is Ray's, started here on the loopback address; accelerators are custom resources, and what a device does is what was
recorded. Refuses to kill anything but workers of that cluster, and to count what is not in the storage.
"""

import contextlib
import functools
import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness import fleet
from harness.landscape import Landscape, read_landscapes
from harness.outcome import Measured, Record
from harness.replayed import STAND_IN, ReplayPlace, ReplayRunner, default_of, facts_of
from harness.search import BATCH, make_strategy, open_study
from harness.shared import SharedJournal, open_shared_journal
from harness.space import Config
from harness.tune import Budget, Settled, Task, tune

MODEL = "replayed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedPlace(ReplayPlace):
    """A `ReplayPlace` whose device writes down, in `log`, each run that it begins, with its process."""

    log: Path

    def __call__(self) -> ReplayRunner:
        return _Logged(
            land=read_landscapes(self.path)[0], device=facts_of(self.device), pace=self.pace, begun=self._begun
        )

    def _begun(self, config: Config) -> None:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {config}\n")


@dataclass(kw_only=True)
class _Logged(ReplayRunner):
    begun: Callable[[Config], None]

    def value(self, problem: Any, config: Config, passed: Any, *, incumbent: Any, depth: Any) -> Callable[[], Any]:
        inner = ReplayRunner.value(self, problem, config, passed, incumbent=incumbent, depth=depth)

        def wait() -> Any:
            if depth == "screen":
                self.begun(config)
            return inner()

        return wait


def task_of(land: Landscape, *, seed: int) -> Task:
    """What to tune where a recorded space is the device."""
    default = default_of(land)
    strategy = make_strategy("gp", land.space, default, study=open_study("fleet"), seed=seed)
    return Task(problem=STAND_IN, space=land.space, default=default, strategy=strategy)


def settle(task: Task, runner: fleet.RayRunner, journal: SharedJournal, *, trials: int, seed: int) -> Settled:
    """One whole tune by a fleet."""
    *_, settled = tune(task, runner, journal, budget=Budget(trials=trials), seed=seed)
    assert isinstance(settled, Settled)
    return settled


@contextlib.contextmanager
def killing(every_s: float, progress: Callable[[], int], rng: random.Random) -> Iterator[list[int]]:
    """Meanwhile, `kill -9` one of the actors below this process every so many seconds; not before something was finished since
    the last time, so that even one worker comes to an end. Gives the processes that were killed."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        seen, next_s = 0, 0.0
        while not over.wait(0.1):
            there = actors() if progress() > seen and time.monotonic() > next_s else []
            if there:
                seen, next_s = progress(), time.monotonic() + every_s
                killed.append(rng.choice(there))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def actors() -> list[int]:
    """The processes of our actors below this one."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "::_Bench" in "".join(child.cmdline()[:1]):
                found.append(child.pid)
    return sorted(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is tuned, and where its trials live: the recorded space in the file `space`, the storage at the address `storage`.
    One worker is killed every `kill_every_s` seconds; `pace` is real seconds for a recorded one; `folder` has journals."""

    space: Path
    storage: str
    folder: Path
    trials: int
    kill_every_s: float = 3.0
    pace: float = 0.1
    seed: int = 0


def study_fleet(scene: Scene, workers: Sequence[int]) -> dict[str, Any]:
    """The same tune by fleets of several sizes, on a cluster that is started here."""
    fleet.connect("local", device=MODEL, devices=max(workers), cpus=2)
    try:
        return by_size(scene, workers)
    finally:
        fleet.disconnect()


def by_size(scene: Scene, workers: Sequence[int]) -> dict[str, Any]:
    """`study_fleet` on the cluster that this process is connected to."""
    land = read_landscapes(scene.space)[0]
    run, found = uuid.uuid4().hex[:8], {}
    sets: list[set[Config]] = []
    for count in workers:
        log = scene.folder / f"{run}-{count}.log"
        place = LoggedPlace(path=scene.space, device=MODEL, pace=scene.pace, log=log)
        runner = fleet.RayRunner(
            place=place, device=facts_of(MODEL), mode="measured", ahead=fleet.batches_ahead(count, BATCH), most=count
        )
        identity = {"study": run, "device": MODEL, "workers": count}
        spaces = {STAND_IN.key: land.space}
        with (
            contextlib.closing(
                open_shared_journal(scene.folder / f"{run}-{count}.jsonl", identity, spaces, scene.storage)
            ) as journal,
            contextlib.closing(runner),
            killing(scene.kill_every_s, functools.partial(len, journal.records), random.Random(scene.seed)) as killed,
        ):
            began = time.monotonic()
            settled = settle(task_of(land, seed=scene.seed), runner, journal, trials=scene.trials, seed=scene.seed)
            seconds = time.monotonic() - began
            states = Counter(one.state.name for one in journal.studies[STAND_IN.key].get_trials(deepcopy=False))
            kept = records_in(journal)
        found[str(count)] = _summary(settled, kept, states, log) | {"seconds": round(seconds, 1), "killed": len(killed)}
        sets.append({Config(one.config) for one in kept})
    return {
        "space": land.name, "legal": len(land.space.legal), "asked_for": scene.trials, "best_ms": land.best_ms,
        "by_workers": found, "same_trials": all(one == sets[0] for one in sets),
    }  # fmt: skip


def records_in(journal: SharedJournal) -> list[Record]:
    """The records of trials that are in the storage, as it says now."""
    return [
        record for problem, study in journal.studies.items()
        for record in journal.recover(problem, study, 0) if record.role == "screen"
    ]  # fmt: skip


def _summary(settled: Settled, kept: Sequence[Record], states: Mapping[str, int], log: Path) -> dict[str, Any]:
    times = Counter(Config(one.config) for one in kept)
    begun = [line.split(" ", 1) for line in log.read_text().splitlines()] if log.exists() else []
    measured = [one.outcome.value_ms for one in kept if isinstance(one.outcome, Measured)]
    return {
        "trials": len(kept), "distinct": len(times), "repeated": sum(number > 1 for number in times.values()),
        "lost": states.get("FAIL", 0) + states.get("RUNNING", 0) + states.get("WAITING", 0),
        "processes": len({pid for pid, _ in begun}), "runs_begun": len(begun),
        "champion": dict(settled.champion.config) if settled.champion else None, "champion_ms": settled.value_ms,
        "best_recorded_ms": min(measured, default=None),
    }  # fmt: skip
