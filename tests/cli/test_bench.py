"""`bench` on a fake device: who is timed beside whom, what is said where nothing could be, and what a script reads."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from harness import benching, commands, documents
from harness.cli import main
from harness.device import TARGETS
from harness.workspace import Workspace
from tests.campaign.fake_device import SLOWER, FakeChildren, failed
from tests.export.flex_champions import CAUSAL, flex_champion, flex_file, stem_of
from tests.fake_champions import champion, champion_file, keep

REPOSITORY = Path(__file__).parents[2]


class Desk:
    """The repository's kernels, and a device whose children answer with formulas."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        for part in ("kernels", "search_spaces"):
            (root / part).symlink_to(REPOSITORY / part)
        self.root, self.workspace, self._capsys, self._patch = root, Workspace(root), capsys, patch
        self.answers: dict[str, Any] = {}
        self.children: list[FakeChildren] = []
        patch.setattr("harness.workspace._require_inside", lambda *arguments: None)
        patch.setattr(benching, "ProcessRunner", self._make)
        patch.chdir(root)
        self.here("h200")

    def here(self, device: str | None) -> None:
        live = TARGETS[device] if device else None
        self._patch.setattr(commands, "_live_device", lambda: (live, "580.1" if live else None))

    def _make(self, job: Any, jobs: int, cache: Path) -> FakeChildren:
        self.children.append(FakeChildren(answers=self.answers))
        return self.children[-1]

    def run(self, *argv: str) -> tuple[int, str, str]:
        code = main(["bench", *argv])
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def document(self, *argv: str) -> dict[str, Any]:
        code, out, err = self.run(*argv, "--json", "--quiet")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        jsonschema.validate(found, documents.json_schema("bench"))
        return found


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, capsys, monkeypatch)


def test_champion_and_default_are_timed_beside_every_peer(desk: Desk) -> None:
    problem = f"{CAUSAL} fwd"
    module, asked = desk.workspace.load_space("flash_fwd"), commands.parse_problem(problem)
    default, space = module.default(asked, TARGETS["h200"]), module.space(asked, TARGETS["h200"])
    config = dict(next(config for config in reversed(space.legal) if config != default))
    digest = desk.workspace.kernel_digest("flash_fwd")
    keep(desk.root / "results", champion_file(champion(problem, config=config, kernel_digest=digest)))
    keep(desk.root / "results", flex_file("fwd", flex_champion(problem)))
    found = desk.document("flash_fwd", "--problem", problem)
    (one,) = found["problems"]
    assert one["config"] == config and one["config_of"] == f"champion of {problem}"
    peers = {peer["name"]: peer for peer in one["peers"]}
    assert list(peers) == list(benching.PEERS)
    for name, slower in SLOWER.items():
        peer = peers[name]
        assert peer["ratio"] == pytest.approx(slower, rel=0.01), name
        assert peer["interval"][0] <= peer["ratio"] <= peer["interval"][1]
        assert peer["verdict"] == ("faster" if slower > 1 else "slower"), name
        assert peer["ours_tflops"] / peer["peer_tflops"] == pytest.approx(slower, rel=0.01)
        assert peer["not_measured"] == "" and peer["samples"] == 40
    assert peers["default"]["ratio"] is not None


def test_a_table_says_who_is_faster_and_why_someone_is_missing(desk: Desk) -> None:
    desk.answers["pair"] = lambda problem, config, rival, method, seed: (
        failed("RuntimeError: no kernel for it", "measure") if rival == "sdpa:cudnn" else FakeChildren()._known(
            benching.Beside._sampled.__globals__["beside"].pair, (problem, config, rival, method, seed)
        )
    )  # fmt: skip
    code, out, err = desk.run(
        "flash_bwd", "--problem", f"{CAUSAL} bwd", "--peers", "sdpa:flash,sdpa:cudnn,flex:tuned,default"
    )
    assert code == 0, err
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "default: dkdv_block_m=" in out
    (row,) = [line for line in out.splitlines() if line.startswith("  sdpa:flash")]
    assert float(row.split()[5]) == pytest.approx(0.9, rel=0.01) and "…" in row
    assert "sdpa:cudnn: not measured: RuntimeError: no kernel for it" in out
    assert "flex:tuned: not measured: FlexAttention was not tuned" in out
    assert "  default " not in out, "ours is the default here, and is not timed beside itself"


def test_a_kernel_of_pytorch_is_benched_like_ours(desk: Desk) -> None:
    desk.answers["pair"] = None
    desk.answers.clear()
    problem = f"{CAUSAL} fwd"
    keep(desk.root / "results", flex_file("fwd", flex_champion(problem, num_stages=3)))
    (one,) = desk.document(stem_of("fwd"), "--problem", problem, "--peers", "default,sdpa:flash")["problems"]
    assert one["config"]["num_stages"] == 3 and [peer["name"] for peer in one["peers"]] == ["default", "sdpa:flash"]


def test_a_stale_champion_an_estimate_and_a_wrong_config_are_not_timed(desk: Desk) -> None:
    problem = f"{CAUSAL} fwd"
    keep(
        desk.root / "results",
        flex_file("fwd", flex_champion(problem).model_copy(update={"number": champion(kind="estimated").number})),
    )
    (one,) = desk.document("flex_attention", "--problem", problem, "--peers", "sdpa:math")["problems"]
    assert one["config_of"] == "default"


def test_without_a_gpu_nothing_is_timed_and_the_error_says_so(desk: Desk) -> None:
    desk.here(None)
    code, out, err = desk.run("flash_fwd", "--problem", f"{CAUSAL} fwd")
    assert (code, out) == (3, "") and "error: `bench` times kernels on a GPU, and there is none here" in err
    assert "flashtune compare" in err and not desk.children


def test_mistakes_are_named(desk: Desk) -> None:
    for argv, said in (
        (("flash_fwd", "--peers", "sdpa:flush"), "there is no peer `sdpa:flush`"),
        (("flash_fwd", "--peers", ","), "names nobody"),
        (("flash_fud",), "no kernel with a search space is called"),
        (("flash_fwd", "--problem", "b1 h1 s64 d64 bf16 bwd"), "computes the fwd pass"),
    ):
        code, _, err = desk.run(*argv)
        assert code == 2 and said in err


def test_where_nothing_could_be_timed_the_exit_says_so(desk: Desk) -> None:
    desk.answers["pair"] = lambda *asked: failed("RuntimeError: out of memory", "measure")
    code, out, err = desk.run("flash_fwd", "--problem", f"{CAUSAL} fwd", "--peers", "sdpa:flash")
    assert code == 3 and "out of memory" in out and "nothing could be timed" in err
