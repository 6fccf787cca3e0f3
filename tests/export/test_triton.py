"""Triton takes the exported configs: for a pretended GPU, with its own autotuner, in a process of its own."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import triton

from harness.compile import meta_launches
from harness.device import TARGETS
from harness.export import seeding
from harness.problem import parse_problem
from harness.space import Config
from tests.export.real import WORKSPACE, champion_of, keep

PROBLEM = "b1 h4/2 s128 d64 fp16 causal fwd"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch_of(problem: str, tunables):
    kernel = WORKSPACE.load_kernel("flash_fwd")
    (launch,) = meta_launches(kernel, parse_problem(problem), Config(tunables), TARGETS["h200"])
    return launch


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    timed = champion_of(PROBLEM, block_m=64, block_n=32, num_warps=4)
    estimated = champion_of("b1 h4/2 s256 d64 fp16 fwd", kind="estimated", num_stages=3)
    # Its programs share all tiles, which run-time arguments and the grid say, and its default's do not.
    persistent = champion_of(
        "b8 h32/8 s2048 d64 fp16 causal", programs_per_sm=2, load="pointer", masked_stages=1, num_warps=4, block_m=64
    )
    forward = keep(tmp_path, timed, estimated, persistent)
    backward = keep(
        tmp_path, champion_of("b1 h4/2 s128 d64 fp16 causal bwd", kernel="flash_bwd", dq_warps=4), kernel="flash_bwd"
    )
    return [forward, backward]


def test_triton_takes_the_configs_and_finds_what_was_seeded(export, sources) -> None:
    out, document = export("triton", *sources)
    by = document["verified_by"]
    assert (by["package"], by["version"]) == ("triton", triton.__version__)
    # Forward champions with their defaults, and the launches of the backward pass; a file for each of those that were timed.
    assert "its autotuner took" in by["check"] and "check_disk_cache found" in by["check"]
    assert {path for one in document["exported"] for path in one["into"]} == {"flash_fwd_h200.py", "flash_bwd_h200.py"}
    tuned = load(out / "flash_fwd_h200.py")
    champion, default = tuned.CONFIGS[PROBLEM]["flash_fwd_kernel"]
    assert (champion.kwargs["BLOCK_M"], champion.kwargs["BLOCK_N"], champion.num_warps) == (64, 32, 4)
    assert default.kwargs["BLOCK_M"] == 128 and tuned.TIMES_MS[PROBLEM] == [1.0, 2.0]
    assert tuned.TIMES_MS["b1 h4/2 s256 d64 fp16 fwd"] is None
    assert {one["number"] for one in tuned.PROVENANCE["champions"]} == {"measured", "estimated"}
    assert (out / "seeding.py").read_text() == Path(seeding.__file__).read_text()


def test_an_estimate_is_never_seeded_where_triton_keeps_times(export, sources) -> None:
    out, _ = export("triton", *sources, check=False)
    tuned, problem = load(out / "flash_fwd_h200.py"), "b1 h4/2 s256 d64 fp16 fwd"
    launch = launch_of(problem, tuned.TUNABLES[problem][0])
    tuner = seeding.autotuned(launch, tuned, problem)
    with pytest.raises(ValueError, match="is an estimate, not a time"):
        seeding.seed(tuner, launch, tuned, problem, disk=True)
    assert seeding.seed(tuner, launch, tuned, problem)


def test_configs_are_refused_for_another_call(export, sources) -> None:
    out, _ = export("triton", *sources, check=False)
    tuned = load(out / "flash_fwd_h200.py")
    longer = launch_of("b1 h4/2 s192 d64 fp16 causal fwd", tuned.TUNABLES[PROBLEM][0])
    with pytest.raises(ValueError, match="is not that of the champion"):
        seeding.autotuned(longer, tuned, PROBLEM)
    with pytest.raises(ValueError, match="is not that of the champion"):
        seeding.autotuned(launch_of(PROBLEM, tuned.TUNABLES[PROBLEM][1]), tuned, PROBLEM)


def test_a_file_of_the_autotuner_is_read_with_its_failures(tmp_path: Path) -> None:
    config = lambda stages: triton.Config({"BLOCK_M": 64}, num_warps=4, num_stages=stages)  # noqa: E731
    path = tmp_path / "kernel.autotune.json"
    # As Triton writes it, `Infinity` included.
    times = [
        (config(2).__dict__, [float("inf")] * 3),
        (config(3).__dict__, [0.2, 0.1, 0.3]),
        (config(4).__dict__, [0.1] * 3),
    ]
    path.write_text(json.dumps({"key": [128, "torch.float16"], "configs_timings": times}))
    assert "Infinity" in path.read_text()
    key, found = seeding.read(path)
    assert key == (128, "torch.float16")
    assert [(one.num_stages, times) for one, times in found] == [(4, (0.1,) * 3), (3, (0.2, 0.1, 0.3)), (2, None)]
    path.write_text('{"other": 1}')
    with pytest.raises(ValueError, match="no file of Triton's autotuner"):
        seeding.read(path)
