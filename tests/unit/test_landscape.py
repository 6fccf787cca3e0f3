"""Every format of recorded spaces, and what is no recorded space."""

import gzip
import json
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.landscape import landscapes, read_landscapes
from harness.recorded import FORMAT
from harness.space import Config


def cache(entries: list[dict[str, object]]) -> dict[str, object]:
    keys = ["tile", "warps"]
    return {
        "device_name": "A card", "kernel_name": "attend", "tune_params_keys": keys,
        "tune_params": {key: sorted({entry[key] for entry in entries}) for key in keys},
        "cache": {",".join(str(entry[key]) for key in keys): entry for entry in entries},
    }  # fmt: skip


ENTRIES = [
    {"tile": 64, "warps": 4, "time": 2.0, "times": [1.5, 2.5], "compile_time": 300.0, "benchmark_time": 40.0},
    {"tile": 16, "warps": 4, "time": 1.0, "times": [1.0], "compile_time": 200.0, "verification_time": 10.0},
    {"tile": 16, "warps": 8, "time": "RuntimeFailedConfig", "compile_time": 100.0},
    {"tile": 128, "warps": 4, "time": 1e20},
]


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_a_cache_of_kernel_tuner(tmp_path: Path) -> None:
    (found,) = read_landscapes(write(tmp_path / "attend-card.json", cache(ENTRIES)))
    assert (found.name, found.kernel, found.device) == ("attend-card", "attend", "A card")
    assert [(param.name, param.values) for param in found.params] == [("tile", (16, 64, 128)), ("warps", (4, 8))]
    # In the order of the space, and nothing is legal that was not recorded.
    assert [tuple(config.values()) for config in found.space.legal] == [(16, 4), (16, 8), (64, 4), (128, 4)]
    assert found.best_ms == 1.0
    slow = found.recordings[Config({"tile": 64, "warps": 4})]
    assert (slow.time_ms, slow.times_ms, slow.compile_s, slow.run_s) == (2.0, (1.5, 2.5), 0.3, 0.04)
    assert found.recordings[Config({"tile": 16, "warps": 8})].failure == "RuntimeFailedConfig"
    assert found.recordings[Config({"tile": 128, "warps": 4})].time_ms is None


def test_a_cache_that_was_not_closed_and_one_that_is_compressed(tmp_path: Path) -> None:
    text = json.dumps(cache(ENTRIES))
    open_ = tmp_path / "open.json"
    open_.write_text(text.removesuffix("}}") + ",\n")
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    one, other = landscapes(tmp_path)
    assert [one.name, other.name] == ["open", "packed"]
    assert one.recordings == other.recordings


def test_t4_results(tmp_path: Path) -> None:
    results = [
        {
            "configuration": {"tile": 16}, "invalidity": "correct", "measurements": [{"name": "time", "value": 3.0}],
            "times": {"compilation_time": 100, "benchmark_time": 50, "runtimes": [3.0, 3.1]},
        },
        {"configuration": {"tile": 32}, "invalidity": "compile", "measurements": [{"name": "time", "value": 1e20}]},
    ]  # fmt: skip
    (found,) = read_landscapes(write(tmp_path / "t4.json", {"schema_version": "1.0.0", "results": results}))
    first, second = found.recordings.values()
    assert (first.time_ms, first.times_ms, first.compile_s, first.run_s) == (3.0, (3.0, 3.1), 0.1, 0.05)
    assert (second.time_ms, second.failure) == (None, "compile")


def test_our_recorded_spaces(tmp_path: Path) -> None:
    header = {
        "format": FORMAT, "schema": 1, "kernel": "flash_fwd", "problem": "p", "device": "h200", "arch": "sm_90",
        "params": {"block": [16, 32]}, "default": [16], "legal": 2, "of": 2, "complete": True, "versions": {},
    }  # fmt: skip
    lines = [
        {"config": [16], "outcome": "measured", "seconds": 1.0, "time_ms": 2.0, "times_ms": [2.0], "compile_ms": 400.0},
        {"config": [32], "outcome": "wrong", "seconds": 0.5, "reason": "out is off"},
    ]
    path = tmp_path / "space.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    (found,) = read_landscapes(path)
    good, bad = found.recordings.values()
    assert (good.time_ms, good.compile_s, good.run_s) == (2.0, 0.4, 0.6)
    assert (bad.time_ms, bad.failure) == (None, "out is off")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"cache": {}}', '{"results": []}', json.dumps({"cache": {"1": {}}, "tune_params_keys": ["a"]}),
     json.dumps(cache([{"tile": 1, "warps": 1, "time": "failed"}])), "\x00\x01"],
)  # fmt: skip
def test_what_is_none_is_said_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"broken\.json is no recorded space"):
        read_landscapes(path)


def test_a_folder_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        landscapes(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no recorded space"):
        landscapes(tmp_path)
