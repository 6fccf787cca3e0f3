"""`flashtune replay --spaces`: its table, its document, and what it refuses."""

import importlib.util
import json
from pathlib import Path

import jsonschema
import pytest

from harness.cli import main
from harness.documents import json_schema
from tests.unit.test_replay import written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "other"):
        written(tmp_path / f"{name}.json")
    return tmp_path


def test_the_document_of_ours_and_of_rivals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["gp", "random", "optuna:tpe"]
    if importlib.util.find_spec("kernel_tuner"):
        names.append("kernel_tuner:simulated_annealing")
    options = ["--strategies", ",".join(names), "--budget", "50", "--seeds", "3", "--json", "--jobs", "1"]
    assert main(["replay", "--spaces", str(folder), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, json_schema("replay-spaces"))
    assert {(one["space"], one["strategy"]) for one in document["results"]} == {
        (space, name) for space in ("one", "other") for name in names
    }
    for one in document["results"]:
        assert one["legal"] == 80
        assert set(one["fraction_at"]) == {"10", "20", "50"}
        assert one["fraction_at"]["10"] <= one["fraction_at"]["50"] <= 1
        low, high = one["fraction_interval_at"]["50"]
        assert low <= one["fraction_at"]["50"] <= high
    best = document["overall"][0]
    assert best["strategy"] != "random"
    assert document["left_out"] == {}


def test_the_table_of_a_warm_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--spaces", str(folder), "--warm", "--budget", "10", "--seeds", "2", "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one: 80 legal configs, 2 seeds"
    # The other space is the same one, so the first trial is the best.
    assert lines[2].split() == ["gp", "warm", "1.000", "0.000", "1.00", "1.00", lines[2].split()[-1]]
    assert "over all 2 spaces" in lines
    assert max(map(len, lines)) <= 100


def test_a_warm_start_from_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "alone.json")
    options = ["--warm", "--budget", "10", "--seeds", "1", "--jobs", "1"]
    assert main(["replay", "--spaces", str(tmp_path), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        "`--warm` has no search learn from others here: no other space here is of the kernel of alone" in captured.err
    )
    # What needs no past runs as ever, and the other is named as left out.
    assert main(["replay", "--spaces", str(tmp_path), "--strategies", "random", *options]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "takes a counterexample, or `--spaces DIR`"),
        (["FILE", "--spaces", "DIR"], "not both"),
        (["--spaces", "DIR", "--strategies", "gpp"], "gpp"),
        (["--spaces", "DIR", "--strategies", "kernel_tuner:none"], "none"),
        (["--spaces", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_what_it_refuses(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert main(["replay", *(str(folder) if one == "DIR" else one for one in options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert said in captured.err
