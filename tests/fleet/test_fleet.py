"""A fleet of fake accelerators under real Ray and real PostgreSQL: nothing is lost, nothing is done twice, nothing is mixed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from harness import fleet
from harness.errors import JournalError, MachineError
from harness.fleet_study import MODEL, LoggedPlace, Scene, by_size, records_in, settle, task_of
from harness.landscape import read_landscapes
from harness.outcome import KILLED, CompileFailed
from harness.replayed import STAND_IN, ReplayPlace, facts_of
from harness.shared import SharedJournal, _let_go, open_shared_journal
from harness.space import Config
from harness.store import read_journal
from harness.tune import Budget, Tried, tune
from tests.unit.test_replay import landscape, written

TRIALS = 12


def runner_of(place: ReplayPlace, **more: Any) -> fleet.RayRunner:
    return fleet.RayRunner(place=place, device=facts_of(place.device), mode="measured", ahead=3, **more)


def opened(folder: Path, storage: str, identity: dict[str, Any], **more: Any) -> SharedJournal:
    return open_shared_journal(
        folder / f"{Path(identity['test']).name}.jsonl", identity, {STAND_IN.key: landscape().space}, storage, **more
    )


def test_any_number_of_workers_ends_the_same_while_one_after_the_other_is_killed(
    cluster: Any, storage: str, tmp_path: Path
) -> None:
    written(tmp_path / "made.json")
    path = tmp_path / "made.json"
    scene = Scene(space=path, storage=storage, folder=tmp_path, trials=TRIALS, kill_every_s=2.0)
    found = by_size(scene, (1, 2, 4))
    assert found["same_trials"]
    for count, one in found["by_workers"].items():
        assert (one["trials"], one["distinct"], one["repeated"], one["lost"]) == (TRIALS, TRIALS, 0, 0), count
        assert one["champion_ms"] == one["best_recorded_ms"]
        assert one["killed"] >= 1
    assert len({json.dumps(one["champion"]) for one in found["by_workers"].values()}) == 1
    # Whoever was killed was replaced; with one worker that can be seen.
    assert found["by_workers"]["1"]["processes"] >= 2


def test_who_joins_late_is_used_and_who_leaves_is_replaced(cluster: Any, tmp_path: Path) -> None:
    written(tmp_path / "made.json")
    land, log = read_landscapes(tmp_path / "made.json")[0], tmp_path / "log"
    place = LoggedPlace(path=tmp_path / "made.json", device="late", pace=0.2, log=log)
    more = {"num_cpus": 0, "resources": {"flashtune_device:late": 1}, "object_store_memory": 80 << 20}
    first = cluster.add_node(node_ip_address="127.0.0.1", **more)
    with contextlib.closing(runner_of(place)) as runner, contextlib.closing(_memory()) as journal:
        events = tune(task_of(land, seed=0), runner, journal, budget=Budget(trials=40), seed=0)
        tried = 0
        second = None
        for event in events:
            tried += isinstance(event, Tried)
            if tried == 4 and second is None:
                assert len(runner.workers) == 1
                second = cluster.add_node(node_ip_address="127.0.0.1", **more)
            if second is not None and first is not None and len(set(_processes(log))) == 2:
                cluster.remove_node(first)
                first, gone = None, len(_processes(log))
    assert first is None, "the second worker was never used"
    assert tried == 40
    trials = Counter(Config(one.config) for one in journal.records if one.role == "screen")
    assert len(trials) == 40
    assert set(trials.values()) == {1}
    after = _processes(log)[gone + 1 :]
    assert len(set(after)) == 1, "the one that stayed did the rest"
    cluster.remove_node(second)


def _processes(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def _memory() -> Any:
    from harness.store import open_memory_journal

    return open_memory_journal({})


def test_a_tune_whose_driver_was_killed_is_gone_on_with_from_the_storage(
    cluster: Any, storage: str, tmp_path: Path
) -> None:
    written(tmp_path / "made.json")
    identity = {"test": str(tmp_path), "device": MODEL}
    here, there = tmp_path / "here", tmp_path / "there"
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "tests.fleet.driver",
        cluster.address,
        storage,
        str(tmp_path),
        str(there),
        str(TRIALS),
    ]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while len(_processes(log)) < 6 and driver.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert driver.poll() is None, driver.stderr.read().decode()  # type: ignore[union-attr]
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
    kept = len(read_journal(there / f"{tmp_path.name}.jsonl")[1])
    # On another machine: nothing is known of the first driver but that its heart stopped.
    land = landscape()
    place = LoggedPlace(path=tmp_path / "made.json", device=MODEL, pace=0.1, log=log)
    with (
        contextlib.closing(opened(here, storage, identity, heartbeat_s=1, grace_s=3)) as journal,
        contextlib.closing(runner_of(place, most=2)) as runner,
    ):
        assert kept <= len(journal.records) <= kept + 1
        settled = settle(task_of(land, seed=0), runner, journal, trials=TRIALS, seed=0)
        trials = Counter(Config(one.config) for one in records_in(journal))
        states = Counter(one.state.name for one in journal.studies[STAND_IN.key].get_trials(deepcopy=False))
    assert len(trials) == TRIALS
    assert set(trials.values()) == {1}
    assert settled.value_ms is not None and settled.champion is not None
    # What was in flight when the driver died, and nothing else, was given up and begun again.
    assert set(states) == {"COMPLETE", "PRUNED", "FAIL"}
    assert 1 <= states["FAIL"] <= 12
    begun = Counter(line.split(" ", 1)[1] for line in log.read_text().splitlines())
    assert sum(number - 1 for number in begun.values()) <= states["FAIL"]


def test_two_models_never_mix(cluster: Any, storage: str, tmp_path: Path) -> None:
    written(tmp_path / "made.json")
    land = landscape()
    task = task_of(land, seed=0)
    # Nobody offers such a device, whatever else there is.
    nobody = runner_of(ReplayPlace(path=tmp_path / "made.json", device="other"), patience_s=1)
    with contextlib.closing(nobody), pytest.raises(MachineError, match="no worker offers flashtune_device:other"):
        nobody.prove(STAND_IN, task.default)()
    # A node that offers one and has another is not taken.
    lying = fleet.RayRunner(
        place=ReplayPlace(path=tmp_path / "made.json", device="h100"), device=facts_of(MODEL), mode="measured"
    )
    with contextlib.closing(lying), pytest.raises(MachineError, match=f"offers a {MODEL} and has a h100"):
        lying.prove(STAND_IN, task.default)()
    # Nor is what one model said taken for another's: not by the study, and not by a trial in it.
    mine = {"test": str(tmp_path), "device": MODEL}
    with contextlib.closing(opened(tmp_path / "a", storage, mine)) as journal:
        journal.begin(STAND_IN.key, task.default)
    with pytest.raises(JournalError, match=f"its device is `{MODEL}`, this one's `other`"):
        opened(tmp_path / "b", storage, mine | {"device": "other"})


def test_claims_are_made_once_and_let_go(storage: str, tmp_path: Path) -> None:
    land = landscape()
    config, other, *_ = land.space.legal
    identity = {"test": str(tmp_path), "device": MODEL}
    folder = tmp_path / "one"
    journal = opened(folder, storage, identity, heartbeat_s=1, grace_s=2)
    journal.begin(STAND_IN.key, config)
    journal.begin(STAND_IN.key, config)
    study = journal.studies[STAND_IN.key]
    assert [one.state.name for one in study.trials] == ["RUNNING"]
    # Its heart beats, so a tune elsewhere may not have it.
    with pytest.raises(JournalError, match="another tune is working on the study"):
        opened(tmp_path / "two", storage, identity, heartbeat_s=1, grace_s=2)
    from harness.outcome import Record

    record = Record(trial=0, problem=STAND_IN.key, config=dict(config), outcome=CompileFailed(reason="no"), seconds=1.0)
    journal.append(record)
    journal.begin(STAND_IN.key, other)
    journal._over.set()
    journal._file.close()  # as if it had been killed
    journal._heart.join()
    _let_go(journal.storage)
    with contextlib.closing(opened(folder, storage, identity)) as again:
        # The claim was this journal's own, whose lock is free: nobody need be waited for.
        assert [one.state.name for one in again.studies[STAND_IN.key].trials] == ["PRUNED", "FAIL"]
        assert again.records == [record]
    with contextlib.closing(opened(tmp_path / "three", storage, identity)) as elsewhere:
        assert elsewhere.records == [record]
        stranger = elsewhere.studies[STAND_IN.key]
        stranger.add_trial(optuna.create_trial(value=1.0, user_attrs={"record": "{}", "identity": "another"}))
        with pytest.raises(JournalError, match="a trial of another device"):
            list(elsewhere.recover(STAND_IN.key, stranger, 0))


def test_what_was_found_without_a_fleet_is_merged_into_its_storage(storage: str, tmp_path: Path) -> None:
    from harness.outcome import Record
    from harness.store import open_journal

    config = landscape().space.legal[0]
    identity = {"test": str(tmp_path), "device": MODEL}
    record = Record(
        trial=0, problem=STAND_IN.key, config=dict(config), outcome=CompileFailed(reason=KILLED), seconds=1.0
    )
    with contextlib.closing(open_journal(tmp_path / "one" / f"{tmp_path.name}.jsonl", identity)) as alone:
        alone.append(record)
    opened(tmp_path / "one", storage, identity).close()
    with contextlib.closing(opened(tmp_path / "two", storage, identity)) as elsewhere:
        assert elsewhere.records == [record]


def test_a_storage_behind_a_proxy(storage: str, tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed: pip install grpcio")
    from tests.fleet.proxy import proxy

    config, other, *_ = landscape().space.legal
    identity = {"test": str(tmp_path), "device": MODEL}
    with proxy(storage) as address:
        journal = opened(tmp_path / "one", address, identity)
        journal.begin(STAND_IN.key, config)
        # Behind a proxy nothing beats, so who holds a claim cannot be known to be dead.
        with pytest.raises(JournalError, match="another tune is working"):
            opened(tmp_path / "two", address, identity, heartbeat_s=1, grace_s=1)
        journal.close()
        with contextlib.closing(opened(tmp_path / "two", address, identity, heartbeat_s=1, grace_s=1)) as again:
            again.begin(STAND_IN.key, other)
            assert [one.state.name for one in again.studies[STAND_IN.key].trials] == ["FAIL", "RUNNING"]
