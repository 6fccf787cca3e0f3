import errno
import json
import os
from pathlib import Path

import pytest

from harness.errors import JournalError
from harness.outcome import CompileFailed, Entrant, Measured, Pruned, Race, Record, Samples, Wrong
from harness.problem import parse_problem
from harness.store import open_journal, open_memory_journal, read_journal
from tests.fake_runner import fake_artifact, passing_verdict, wrong_verdict

IDENTITY = {"kernel": "flash_fwd", "device": "h200"}
PROBLEM = parse_problem("b1 h8 s64 d32 fp16")


def record(trial: int, **changes) -> Record:
    outcomes = [
        Pruned(rule="spills", detail="spills 128 bytes"),
        CompileFailed(reason="the process was killed by SIGABRT", log="LLVM ERROR"),
        Wrong(verdict=wrong_verdict(PROBLEM)),
        Measured(
            verdict=passing_verdict(PROBLEM, "device"),
            artifact=fake_artifact({"a": trial}),
            samples=Samples(times_ms=(1.0, 2.0)),
        ),
    ]
    values = {
        "trial": trial,
        "problem": PROBLEM.key,
        "config": {"block_m": 16 << trial},
        "outcome": outcomes[trial % 4],
    }
    return Record(**(values | {"seconds": 0.5} | changes))


def write(path: Path, count: int) -> list[Record]:
    journal = open_journal(path, IDENTITY)
    for trial in range(count):
        journal.append(record(trial))
    journal.close()
    return [record(trial) for trial in range(count)]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written = write(path, 5)
    assert read_journal(path) == (IDENTITY, written)
    reopened = open_journal(path, IDENTITY)
    assert reopened.records == written
    assert reopened.find(PROBLEM.key, {"block_m": 32}) == written[1]
    assert reopened.find(PROBLEM.key, {"block_m": 33}) is None
    assert reopened.find("another problem", {"block_m": 32}) is None
    reopened.close()


def test_final_samples_are_found_by_what_they_were_taken_beside(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "run.jsonl", IDENTITY)
    journal.append(record(3))
    final = record(3, role="final", beside={"block_m": 16})
    journal.append(final)
    config = final.config
    assert journal.find(PROBLEM.key, config) == record(3)
    assert journal.find_final(PROBLEM.key, config, {"block_m": 16}) == final
    assert journal.find_final(PROBLEM.key, config, None) is None
    journal.close()


def test_a_journal_cut_anywhere_keeps_every_whole_record_and_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    written = write(whole, 4)
    content = whole.read_bytes()
    ends = [position + 1 for position, byte in enumerate(content) if byte == ord("\n")]
    for cut in {*range(0, len(content), 97), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}:
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        kept = max(0, sum(end <= cut for end in ends) - 1)
        journal = open_journal(path, IDENTITY)
        assert journal.records == written[:kept], cut
        journal.append(record(9))
        journal.close()
        assert read_journal(path) == (IDENTITY, [*written[:kept], record(9)]), cut


@pytest.mark.parametrize("tail", [b"\x00" * 512, b'{"trial":3,\x00\x00\n', b"garbage\n"])
def test_what_a_power_cut_left_of_the_last_line_is_set_aside(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "run.jsonl"
    written = write(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    journal = open_journal(path, IDENTITY)
    assert (journal.records, journal.torn) == (written, len(tail))
    journal.close()
    assert path.read_bytes() == whole
    assert path.with_suffix(".torn").read_bytes() == tail


def test_a_race_is_found_by_who_took_part_and_a_trial_whatever_it_stood_beside(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "run.jsonl", IDENTITY)
    entrants = tuple(Entrant(config={"block_m": size}, times_ms=(1.0,)) for size in (128, 16))
    race = record(3, role="race", race=Race(entrants=entrants, rounds=1, ended="for a test"))
    trial = record(3, beside={"block_m": 16})
    for one in (trial, race):
        journal.append(one)
    assert journal.find_race(PROBLEM.key, [{"block_m": 16}, {"block_m": 128}]) == race
    assert journal.find_race(PROBLEM.key, [{"block_m": 16}]) is None
    assert journal.find(PROBLEM.key, trial.config) == trial
    shared = record(3, role="shared", beside={"block_m": 16})
    journal.append(shared)
    assert journal.find_shared(PROBLEM.key, shared.config, {"block_m": 16}) == shared
    assert journal.find_final(PROBLEM.key, shared.config, {"block_m": 16}) is None
    journal.close()
    with pytest.raises(ValueError, match="a race is recorded with its entrants"):
        record(3, role="race")


def test_a_journal_in_memory_is_one_like_any_other() -> None:
    journal = open_memory_journal(IDENTITY)
    journal.append(record(3))
    assert journal.find(PROBLEM.key, record(3).config) == record(3)
    journal.close()


def test_damage_before_the_last_line_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:40] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match=r"is damaged in line 3 of 4") as refused:
        open_journal(path, IDENTITY)
    assert "cut it before that line" in refused.value.hint
    assert path.read_bytes() == b"".join(lines)


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, 1)
    with pytest.raises(JournalError, match="belongs to another run: its device is `h200`, this one's `a100`"):
        open_journal(path, IDENTITY | {"device": "a100"})


@pytest.mark.parametrize("content", [b"hello", b"hello\n", b"[]\n", b'{"journal": "flashtune"}\n'])
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="is not a journal of flashtune"):
        open_journal(path, IDENTITY)
    assert path.read_bytes() == content


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"schema": 99, "journal": "flashtune", "identity": IDENTITY}) + "\n")
    with pytest.raises(JournalError, match="has schema 99, this version reads 1"):
        open_journal(path, IDENTITY)


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = open_journal(path, IDENTITY)
    with pytest.raises(JournalError, match="is being written by another tune"):
        open_journal(path, IDENTITY)
    first.close()
    open_journal(path, IDENTITY).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot open the journal .*Not a directory") as refused:
        open_journal(tmp_path / "file" / "runs" / "run.jsonl", IDENTITY)
    assert refused.value.exit_code == 3


@pytest.mark.parametrize("short", [True, False])
def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: bool) -> None:
    path = tmp_path / "run.jsonl"
    written = write(path, 2)
    journal = open_journal(path, IDENTITY)

    class Full:
        """A file on a disk with room for 10 more bytes."""

        def __init__(self, file) -> None:
            self.file = file

        def fileno(self) -> int:
            return self.file.fileno()

        def write(self, line: bytes) -> int:
            self.file.write(line[:10])
            if short:
                return 10
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            self.file.close()

    monkeypatch.setattr(journal, "_file", Full(journal._file))
    with pytest.raises(JournalError, match="No space left on device") as refused:
        journal.append(record(2))
    assert "free some space and run the same command again" in refused.value.hint
    journal.close()
    assert read_journal(path) == (IDENTITY, written)


def test_a_time_without_a_passing_verdict_cannot_be_built_or_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a time cannot exist without a passing verdict"):
        Measured(verdict=wrong_verdict(PROBLEM), samples=Samples(times_ms=(1.0,)), artifact=fake_artifact({}))
    path = tmp_path / "run.jsonl"
    journal = open_journal(path, IDENTITY)
    journal.append(record(3))
    journal.close()
    path.write_text(path.read_text().replace('"status":"passed"', '"status":"wrong"'))
    with pytest.raises(JournalError, match="a time cannot exist without a passing verdict"):
        read_journal(path)
