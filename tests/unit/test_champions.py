import dataclasses
import json
from pathlib import Path

import pytest

from harness.champions import (
    Certificate,
    Champion,
    ChampionFile,
    Environment,
    KillRate,
    Number,
    champion_path,
    merge_champions,
    read_champions,
    save_champions,
    write_champions,
)
from harness.errors import MachineError, WorkspaceError
from harness.problem import parse_problem
from tests.fake_runner import fake_artifact, passing_proof, passing_verdict

WHERE = {"device": "h200", "arch": "sm_90", "kernel": "flash_fwd"}


def champion(problem: str = "b1 h8 s64 d32 fp16", kind: str = "measured", value_ms: float = 1.0) -> Champion:
    read = parse_problem(problem)
    return Champion(
        problem=read.key,
        config={"block_m": 64},
        default={"block_m": 32},
        number=Number(kind=kind, value_ms=value_ms, default_ms=2.0),
        verdict=passing_verdict(read),
        certificate=Certificate(proof=passing_proof(), kill_rate=KillRate(killed=3, planted=4)),
        binaries=fake_artifact({}).binaries,
        environment=Environment(
            toolchain="triton 3.6.0", torch="2.13.0", driver=None, kernel_digest="k", space_digest="s"
        ),
        trials={kind: 24},
    )


def test_champions_come_back_as_they_were_in_a_stable_order(tmp_path: Path) -> None:
    path = champion_path(tmp_path, "h200", "flash_fwd", draft=False)
    assert path == tmp_path / "best" / "h200" / "flash_fwd.json"
    second, first = champion("b2 h8 s64 d32 fp16"), champion("b1 h8 s64 d32 fp16")
    save_champions(path, [second], **WHERE)
    saved = save_champions(path, [first], **WHERE)
    assert read_champions(path) == saved
    assert saved.champions == (first, second)
    before = path.read_bytes()
    save_champions(path, [second, first], **WHERE)
    assert path.read_bytes() == before


def test_an_estimate_never_replaces_a_time() -> None:
    measured, estimated = champion(kind="measured", value_ms=2.0), champion(kind="estimated", value_ms=1.0)
    empty = ChampionFile(schema=1, champions=(), **WHERE)
    assert merge_champions(merge_champions(empty, [measured]), [estimated]).champions == (measured,)
    assert merge_champions(merge_champions(empty, [estimated]), [measured]).champions == (measured,)


def test_a_slower_time_replaces_a_faster_one_of_another_environment_only() -> None:
    fast, slow = champion(value_ms=1.0), champion(value_ms=2.0)
    empty = ChampionFile(schema=1, champions=(), **WHERE)
    assert merge_champions(merge_champions(empty, [fast]), [slow]).champions == (fast,)
    assert merge_champions(merge_champions(empty, [slow]), [fast]).champions == (fast,)
    changed = dataclasses.replace(slow, environment=dataclasses.replace(slow.environment, kernel_digest="other"))
    assert merge_champions(merge_champions(empty, [fast]), [changed]).champions == (changed,)


def test_drafts_are_kept_apart(tmp_path: Path) -> None:
    assert champion_path(tmp_path, "h200", "flash_fwd", draft=True).name == "flash_fwd.draft.json"


@pytest.mark.parametrize(("field", "value"), [("device", "a100"), ("kernel", "flash_bwd"), ("arch", "sm_80")])
def test_devices_and_kernels_do_not_mix(tmp_path: Path, field: str, value: str) -> None:
    path = tmp_path / "champions.json"
    save_champions(path, [champion()], **WHERE)
    with pytest.raises(WorkspaceError, match="holds flash_fwd on h200"):
        save_champions(path, [champion()], **(WHERE | {field: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not a champion file: Invalid JSON"),
        (
            lambda text: text.replace('"value_ms":1.0', '"value_ms":"NaN"').replace(
                '"value_ms": 1.0', '"value_ms": "NaN"'
            ),
            "finite",
        ),
        (lambda text: text.replace('"passed"', '"great"'), "is not a champion file"),
        (lambda text: json.dumps(json.loads(text) | {"schema": 3}), "has schema 3, this version reads 2"),
        (lambda text: "[]", "is not a champion file"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "champions.json"
    save_champions(path, [champion()], **WHERE)
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(WorkspaceError, match=message):
        read_champions(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "champions.json"
    save_champions(path, [champion()], **WHERE)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineError, match="cannot write the champions to .*No space left on device"):
        write_champions(path, ChampionFile(schema=1, champions=(), **WHERE))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["champions.json"]
