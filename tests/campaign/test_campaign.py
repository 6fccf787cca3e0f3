"""The campaign on a fake laboratory: order, time, resuming after a cut anywhere, and everything that may go wrong."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness import files
from harness.campaign import RESERVE_S, Clock, Entry, Given, Ledger, Part, campaign, locked, read_book
from harness.errors import MachineError, UsageError
from tests.campaign.fake_lab import FakeClock, FakeLab, part

STEPS: Mapping[str, float] = {"truth": 0.5, "spaces": 0.3, "judging": 0.2}
PLAN = [
    part("truth", "a", 3), part("truth", "b", 4), part("spaces", "big", 20), part("spaces", "small", 5),
    part("judging", "same", 2),
]  # fmt: skip
ALL = {one.name for one in PLAN}


def ledger_in(folder: Path, **options: bool) -> Ledger:
    ledger = Ledger(folder, device="h200", arch="sm_90", **options)
    ledger.begin(began="2026-01-01T00:00:00+00:00", minutes=1.0, machine={"driver": "580.1"})
    return ledger


def run(
    folder: Path, lab: FakeLab, seconds: float, plan: list[Part] | None = None, **options: bool
) -> tuple[Ledger, list[tuple[str, Entry]]]:
    ledger = ledger_in(folder, **options)
    clock = Clock(seconds + RESERVE_S, lab.clock)
    events = campaign(plan or PLAN, lab, ledger, clock, shares=STEPS)
    return ledger, [(one.name, entry) for one, entry in events]


def statuses(folder: Path) -> dict[str, str]:
    return {name: entry.status for name, entry in read_book(folder / "campaign.json").parts.items()}


def test_with_time_enough_everything_is_done_in_order_and_nothing_twice(tmp_path: Path) -> None:
    lab = FakeLab(FakeClock())
    _, events = run(tmp_path, lab, 1000)
    assert [name for name, _ in events] == [one.name for one in PLAN] == lab.done
    assert statuses(tmp_path) == dict.fromkeys(ALL, "done")
    again = FakeLab(lab.clock)
    _, events = run(tmp_path, again, 1000)
    assert not events and not again.done
    assert statuses(tmp_path) == dict.fromkeys(ALL, "done")


def test_a_run_ends_before_its_time_and_no_part_begins_that_cannot_end(tmp_path: Path) -> None:
    plan = [part("truth", "a", 3, least=3), part("truth", "long", 50, least=50), part("truth", "short", 2, least=2)]
    lab = FakeLab(FakeClock())
    run(tmp_path, lab, 30, plan)
    assert lab.clock.now <= 30
    assert lab.done == ["truth/a", "truth/short"]


def test_steps_keep_to_their_shares_first_and_then_what_is_left_goes_on_in_the_order_of_worth(tmp_path: Path) -> None:
    plan = [part("truth", "huge", 500), part("spaces", "big", 500), part("judging", "same", 2)]
    lab = FakeLab(FakeClock())
    _, events = run(tmp_path, lab, 95, plan)
    assert lab.clock.now <= 95
    # Half for truth, a third for spaces, judging has what it needs, and truth takes the rest.
    assert lab.done == ["truth/huge", "spaces/big", "judging/same", "truth/huge"]
    entry = dict(events)
    assert entry["spaces/big"].data["units"] == 30
    assert entry["truth/huge"].data["units"] == 50 + 95 - 50 - 30 - 2
    assert statuses(tmp_path) == {"truth/huge": "partial", "spaces/big": "partial", "judging/same": "done"}


def test_many_short_runs_do_what_one_long_run_does(tmp_path: Path) -> None:
    kept: dict[str, int] = {}
    turns = 0
    while statuses(tmp_path) != dict.fromkeys(ALL, "done") if turns else True:
        turns += 1
        assert turns < 60
        lab = FakeLab(FakeClock())
        lab.kept = kept
        run(tmp_path, lab, 7)
        assert lab.clock.now <= 7
    book = read_book(tmp_path / "campaign.json")
    assert {name: entry.data["units"] for name, entry in book.parts.items()} == {
        one.name: one.what["takes"] for one in PLAN
    }
    assert len(book.runs) == turns
    # A part is charged with the seconds of all its runs.
    assert book.parts["spaces/big"].seconds == pytest.approx(20)


class KilledError(BaseException):
    """Nobody catches this, as nobody catches SIGKILL."""


@pytest.mark.parametrize("survivors", range(len(PLAN) + 1))
def test_a_campaign_killed_in_any_part_goes_on_with_that_part(tmp_path: Path, survivors: int) -> None:
    lab = FakeLab(FakeClock())

    def kill(one: Part, left: object) -> None:
        if len(lab.done) == survivors:
            raise KilledError

    lab.watch = kill
    if survivors < len(PLAN):
        with pytest.raises(KilledError):
            run(tmp_path, lab, 1000)
    else:
        run(tmp_path, lab, 1000)
    assert set(statuses(tmp_path).values()) <= {"done"}
    assert len(statuses(tmp_path)) == survivors
    after = FakeLab(FakeClock())
    run(tmp_path, after, 1000)
    assert after.done == [one.name for one in PLAN[survivors:]]
    assert statuses(tmp_path) == dict.fromkeys(ALL, "done")


@pytest.mark.parametrize("writes", range(3, 9))
def test_a_kill_while_the_ledger_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    replace, count = Path.replace, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == writes:
            raise KilledError
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    # The run's own line is the first; if everything is written there is nobody to kill.
    if writes <= len(PLAN) + 1:
        with pytest.raises(KilledError):
            run(tmp_path, FakeLab(FakeClock()), 1000)
    else:
        run(tmp_path, FakeLab(FakeClock()), 1000)
    monkeypatch.undo()
    assert len(statuses(tmp_path)) == min(writes - 2, len(PLAN))
    after = FakeLab(FakeClock())
    run(tmp_path, after, 1000)
    assert after.done == [one.name for one in PLAN[writes - 2 :]]
    assert [path.name for path in tmp_path.iterdir()] == ["campaign.json"]


def test_what_a_part_raises_is_its_outcome_and_it_is_tried_again_in_later_runs_but_not_for_ever(tmp_path: Path) -> None:
    script = {"truth/b": ZeroDivisionError("a tile of no rows\nand more")}
    for turn in range(5):
        lab = FakeLab(FakeClock(), script)
        run(tmp_path, lab, 1000)
        # First what is open, then what failed; three attempts are enough.
        assert lab.done == ([one.name for one in PLAN] if turn == 0 else ["truth/b"] if turn < 3 else [])
    entry = read_book(tmp_path / "campaign.json").parts["truth/b"]
    assert entry.status == "failed" and entry.attempts == 3
    assert entry.reason.startswith("ZeroDivisionError: a tile of no rows (")
    assert statuses(tmp_path) == dict.fromkeys(ALL - {"truth/b"}, "done") | {"truth/b": "failed"}


def test_a_part_that_runs_out_of_time_inside_keeps_what_it_had_and_is_no_failure(tmp_path: Path) -> None:
    silent = Part(step="truth", name="truth/silent", what={"takes": 40, "silent": True}, least_s=1, of="k:j")
    lab = FakeLab(FakeClock())
    _, events = run(tmp_path, lab, 20, [silent])
    assert [entry.status for _, entry in events] == ["partial", "partial"]
    assert events[-1][1].attempts == 0
    after = FakeLab(FakeClock())
    after.kept = lab.kept
    run(tmp_path, after, 30, [silent])
    assert statuses(tmp_path) == {"truth/silent": "done"}
    assert after.clock.now == 20


def test_a_lost_device_ends_the_campaign_and_blames_no_part(tmp_path: Path) -> None:
    lab = FakeLab(FakeClock(), {"truth/b": RuntimeError("an illegal memory access")})
    lab.alive = False
    with pytest.raises(MachineError, match="the device no longer answers since `truth/b`: RuntimeError"):
        run(tmp_path, lab, 1000)
    assert statuses(tmp_path) == {"truth/a": "done", "truth/b": "lost"}
    after = FakeLab(FakeClock())
    run(tmp_path, after, 1000)
    assert after.done == [one.name for one in PLAN[1:]]
    assert read_book(tmp_path / "campaign.json").parts["truth/b"].attempts == 0


def test_what_a_machine_lacks_is_asked_of_the_next_one(tmp_path: Path) -> None:
    lab = FakeLab(FakeClock(), {"truth/a": Given(status="skipped", reason="no compute-sanitizer here")})
    run(tmp_path, lab, 1000)
    assert lab.done.count("truth/a") == 1
    assert statuses(tmp_path)["truth/a"] == "skipped"
    after = FakeLab(FakeClock())
    run(tmp_path, after, 1000)
    assert after.done == ["truth/a"]
    assert statuses(tmp_path)["truth/a"] == "done"


def test_a_full_disk_ends_the_campaign_in_words_and_leaves_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = FakeLab(FakeClock())

    def fill(one: Part, left: object) -> None:
        if one.name == "spaces/big":

            def refuse(handle: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(files.os, "fsync", refuse)

    lab.watch = fill
    with pytest.raises(MachineError, match="cannot write .*campaign.json: No space left on device") as caught:
        run(tmp_path, lab, 1000)
    assert "as it was" in caught.value.hint
    monkeypatch.undo()
    assert statuses(tmp_path) == {"truth/a": "done", "truth/b": "done"}
    assert [path.name for path in tmp_path.iterdir()] == ["campaign.json"]


def test_what_belongs_to_another_kernel_is_done_again_and_to_older_judges_unless_it_is_kept(tmp_path: Path) -> None:
    run(tmp_path, FakeLab(FakeClock()), 1000)
    for of, keep, again in (("k:j", False, 0), ("k:other", True, 0), ("k:other", False, 5), ("other:other", True, 5)):
        plan = [Part(step=one.step, name=one.name, what=one.what, least_s=1, of=of) for one in PLAN]
        lab = FakeLab(FakeClock())
        run(tmp_path, lab, 1000, plan, keep=keep)
        assert len(lab.done) == again, (of, keep)


def test_a_part_never_gets_more_than_it_may_take(tmp_path: Path) -> None:
    lab = FakeLab(FakeClock())
    seen = []
    lab.watch = lambda one, left: seen.append(left())
    run(tmp_path, lab, 1000, [part("truth", "endless", 10**6, most=40)])
    assert seen[0] == 40
    assert lab.clock.now <= 80  # once in each pass


def test_the_laboratory_is_told_what_is_coming(tmp_path: Path) -> None:
    lab = FakeLab(FakeClock())
    run(tmp_path, lab, 1000)
    assert lab.expected[0] == ["truth/a", "truth/b"]


def test_a_ledger_of_another_device_or_of_something_else_is_refused(tmp_path: Path) -> None:
    run(tmp_path, FakeLab(FakeClock()), 1000)
    with pytest.raises(UsageError, match=r"a campaign on h200 \(sm_90\), here is a100 \(sm_80\)"):
        Ledger(tmp_path, device="a100", arch="sm_80")
    (tmp_path / "campaign.json").write_text('{"schema": 1}')
    with pytest.raises(UsageError, match="is no campaign: Field required at campaign"):
        ledger_in(tmp_path)


def test_one_campaign_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "new"),
        pytest.raises(MachineError, match="another campaign writes to"),
        locked(tmp_path / "new"),
    ):
        pass
    with locked(tmp_path / "new"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot use the folder"), locked(tmp_path / "file"):
        pass


def test_numbers_that_json_has_no_word_for_come_back(tmp_path: Path) -> None:
    lab = FakeLab(FakeClock(), {"truth/a": Given(status="done", data={"worst": None, "list": [1, 2.5, "x"]})})
    run(tmp_path, lab, 1000)
    content = json.loads((tmp_path / "campaign.json").read_text())
    assert content["parts"]["truth/a"]["data"] == {"worst": None, "list": [1, 2.5, "x"]}
    assert content["runs"][0]["machine"] == {"driver": "580.1"}
