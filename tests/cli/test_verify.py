"""`flashtune verify` on a fake runner: what is renewed, struck, or left as it is."""

import dataclasses
import json
from pathlib import Path

import pytest

from harness import commands
from harness.champions import read_champions
from harness.outcome import LaunchFailed, TimedOut
from tests.cli.desk import Desk
from tests.fake_champions import certificate, champion, champion_file, keep
from tests.fake_runner import FakeRunner, wrong_proof, wrong_verdict

CONFIG = {"block_m": 64, "num_warps": 4}
PROBLEM = "b1 h8 s64 d32 fp16 fwd"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[FakeRunner]:
    made: list[FakeRunner] = []

    def make(job, jobs) -> FakeRunner:
        made.append(FakeRunner(job.mode, device=job.device, scripts=SCRIPTS))
        return made[-1]

    SCRIPTS.clear()
    monkeypatch.setattr(commands, "process_runner", make)
    return made


SCRIPTS: dict = {}


def write(bench: Desk, *champions, **changes) -> Path:
    return keep(bench.results, champion_file(*champions, kernel="subject", **changes))


def test_a_stale_champion_that_passes_is_renewed_and_keeps_its_number(bench: Desk, runners: list[FakeRunner]) -> None:
    noted = certificate().model_copy(update={"x-note": "reviewed"})
    stale, fine = champion(config=CONFIG, certificate=noted), champion("b2 h8 s64 d32 fp16", kernel_digest=bench.digest)
    path = write(bench, stale, fine)
    document = bench.document("verify")
    assert [(one["problem"], one["became"]) for one in document["champions"]] == [
        (fine.problem, "current"), (PROBLEM, "renewed"),
    ]  # fmt: skip
    assert "3 cases in the interpreter, whereas its old proof was on the device" in document["champions"][1]["detail"]
    found = read_champions(path).champions
    assert found[1] == fine and found[0].number == stale.number and found[0].kernel == stale.kernel
    assert found[0].certificate.kernel_digest == bench.digest and found[0].certificate.suite == "fake"
    assert found[0].certificate.model_extra == {"x-note": "reviewed"}
    assert (runners[0].mode, runners[0].closed) == ("estimated", True)
    assert bench.document("verify")["champions"][0]["became"] == "current" and len(runners) == 1
    assert "its number is of an older version of the kernel (k1)" in " ".join(bench.run("show")[1].split())
    assert [one["became"] for one in bench.document("verify", "--all", code=1)["champions"]] == ["renewed", "struck"]


def test_on_the_device_the_proof_is_the_devices(bench: Desk, runners: list[FakeRunner]) -> None:
    path = write(bench, champion(config=CONFIG))
    bench.here("h200")
    code, out, _ = bench.run("verify", "subject")
    assert code == 0 and "renewed   b1 h8 s64 d32 fp16 fwd" in out and "3 cases on the device" in out
    assert read_champions(path).champions[0].certificate.where == "device" and runners[0].mode == "measured"


@pytest.mark.parametrize(
    ("stage", "found", "detail"),
    [
        ("verify", lambda problem, config: wrong_verdict(problem), "error 1.0e-01 is 77 times its bound"),
        ("prove", lambda problem, config: wrong_proof(), "shadow: store out of bounds"),
    ],
)
def test_a_champion_that_is_wrong_is_struck(
    bench: Desk, runners: list[FakeRunner], stage: str, found, detail: str
) -> None:
    path = write(bench, champion(config=CONFIG), champion("b2 h8 s64 d32 fp16", kernel_digest=bench.digest))
    SCRIPTS[stage] = found
    document = bench.document("verify", code=1)
    (struck,) = [one for one in document["champions"] if one["became"] == "struck"]
    assert detail in struck["detail"]
    assert [one.problem for one in read_champions(path).champions] == ["b2 h8 s64 d32 fp16 fwd"]


def test_its_counterexample_is_kept_for_replay(bench: Desk, runners: list[FakeRunner]) -> None:
    write(bench, champion(config=CONFIG))
    case = json.loads(next((REPOSITORY / "results/corpus/flash_fwd").glob("*.json")).read_text())["case"]
    SCRIPTS["prove"] = lambda problem, config: dataclasses.replace(wrong_proof(), counterexample=case)
    (struck,) = bench.document("verify", code=1)["champions"]
    (kept,) = (bench.results / "corpus" / "subject").glob("*.json")
    assert f"`flashtune replay {kept.stem}`" in struck["detail"]
    assert json.loads(kept.read_text())["judge"] == "shadow"


def test_a_config_that_the_space_no_longer_allows_is_struck(bench: Desk, runners: list[FakeRunner]) -> None:
    path = write(bench, champion(config=CONFIG | {"block_m": 128}))
    (struck,) = bench.document("verify", code=1)["champions"]
    assert struck["became"] == "struck" and "breaks the rule `fits_length`" in struck["detail"]
    assert not runners[0].calls and read_champions(path).champions == ()


@pytest.mark.parametrize(
    ("stage", "found", "detail"),
    [
        ("verify", LaunchFailed(stage="verify", reason="no memory"), "it could not be run: no memory"),
        ("prove", TimedOut(stage="prove", limit_s=600), "it took longer than 600 s"),
    ],
)
def test_what_cannot_be_settled_stays_stale(
    bench: Desk, runners: list[FakeRunner], stage: str, found, detail: str
) -> None:
    path = write(bench, champion(config=CONFIG))
    before = path.read_bytes()
    SCRIPTS[stage] = lambda problem, config: found
    (left,) = bench.document("verify", code=1)["champions"]
    assert (left["became"], left["detail"]) == ("unsettled", detail) and path.read_bytes() == before


def test_a_champion_that_another_tune_replaced_meanwhile_is_not_touched(bench: Desk, runners: list[FakeRunner]) -> None:
    path = write(bench, champion(config=CONFIG))

    def meanwhile(problem, config):
        write(bench, champion(config=CONFIG | {"num_warps": 8}, kernel_digest=bench.digest))

    SCRIPTS["prove"] = meanwhile
    (left,) = bench.document("verify", code=1)["champions"]
    assert left["detail"] == "its file was changed meanwhile"
    assert read_champions(path).champions[0].config["num_warps"] == 8
