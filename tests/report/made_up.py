"""Evidence that nobody measured: journals, champions and a ledger of a campaign, made up for the tests of the report."""

import itertools
import json
from pathlib import Path
from typing import Any

from harness.champions import Number, RunnerUp
from harness.device import TARGETS
from harness.outcome import (
    CompileFailed,
    Estimate,
    Estimated,
    LaunchFailed,
    Measured,
    Pruned,
    Record,
    Samples,
    TimedOut,
    Wrong,
)  # fmt: skip
from harness.problem import Problem, parse_problem
from harness.store import open_journal
from tests import fake_champions
from tests.fake_runner import fake_artifact, fake_time_ms, passing_verdict, wrong_verdict

FORWARD = "b1 h32/8 s2048 d128 bf16 causal fwd"
BACKWARD = "b1 h32/8 s2048 d128 bf16 causal bwd"
# What an enemy would write wherever text may stand.
HOSTILE = "$x^{$<script>alert(1)</script><img src=x onerror=alert(1)>'\"&|`@all"


def outcome(problem: Problem, config: dict[str, Any], mode: str) -> Any:
    """A number for most configs, every kind of failure for some."""
    tile = config["block_m"] * config["block_n"]
    if tile >= 256 * 128:
        return Pruned(rule="shared_memory", detail="needs 300 KiB, device has 227 KiB")
    if config["num_warps"] == 1 and tile >= 128 * 64:
        return Pruned(rule="spills", detail=f"spills {tile} bytes per thread, limit is 64")
    special = {(16, 256): CompileFailed(reason="ptxas gave up"), (16, 128): TimedOut(stage="compile", limit_s=60.0),
               (32, 256): LaunchFailed(stage="verify", reason="the process was killed by SIGSEGV"),
               (64, 256): Wrong(verdict=wrong_verdict(problem))}  # fmt: skip
    if (config["block_m"], config["block_n"]) in special and config["num_warps"] == 4:
        return special[config["block_m"], config["block_n"]]
    verdict, artifact, value = passing_verdict(problem), fake_artifact(config), fake_time_ms(problem, config)
    if mode == "estimated":
        return Estimated(verdict=verdict, artifact=artifact, estimate=Estimate(value_ms=value, terms={}, model="fake"))
    return Measured(verdict=verdict, artifact=artifact, samples=Samples(times_ms=(value,) * 5, method="fake"))


def journal(
    runs: Path, *, kernel: str = "flash_fwd", problem: str = FORWARD, device: str = "h200", mode: str = "measured",
    problem_text: str | None = None, **identity: Any,
) -> Path:  # fmt: skip
    """A journal of a whole grid of block sizes; `problem_text` is what it says of its problem."""
    read = parse_problem(problem)
    path = runs / f"{kernel}-{device}-{mode}-made-up.jsonl"
    facts = {"kernel": kernel, "device": device, "arch": TARGETS[device].arch, "mode": mode, "triton": "3.6.0", "torch": "2.13.0",
             "driver": None, "kernel_digest": "made", "judge_digest": "up", "gate_seed": 0}  # fmt: skip
    opened = open_journal(path, facts | identity)
    sizes = (16, 32, 64, 128, 256)
    for trial, (n, m, warps) in enumerate(itertools.product(sizes, sizes, (1, 4, 8))):
        config = {"block_m": m, "block_n": n, "num_warps": warps}
        opened.append(
            Record(trial=trial, problem=problem_text or read.key, config=config, outcome=outcome(read, config, mode), seconds=1.0)
        )  # fmt: skip
    opened.close()
    return path


def number(kind: str = "measured", value_ms: float = 0.1, **changes: Any) -> Number:
    """A champion's number; measured ones have intervals."""
    if kind == "estimated":
        return Number(kind="estimated", value_ms=value_ms, default_ms=1.5 * value_ms, protocol="p1", **changes)
    facts = {
        "interval_ms": (0.98 * value_ms, 1.02 * value_ms), "samples": 60, "default_ms": 1.25 * value_ms, "ratio": 0.8,
        "ratio_interval": (0.78, 0.82), "runner_up": RunnerUp(config={"block_m": 32}, value_ms=1.01 * value_ms), "protocol": "p1",
    }  # fmt: skip
    return Number(kind="measured", value_ms=value_ms, **(facts | changes))


def champions(results: Path, *, hostile: bool = False) -> None:
    """One measured, one estimated champion, in two files; hostile ones say what an enemy would."""
    forward = fake_champions.champion(FORWARD, number=number())
    backward = fake_champions.champion(BACKWARD, "estimated", number=number("estimated", 0.4))
    first = fake_champions.champion_file(forward)
    if hostile:
        words = {"oracle": HOSTILE, "criterion": HOSTILE, "blind_to": (HOSTILE,), "judges": {"bound": 12, HOSTILE: 1}}
        forward = forward.model_copy(update={"certificate": forward.certificate.model_copy(update=words)})
        first = fake_champions.champion_file(forward, driver=HOSTILE, toolchain=HOSTILE)
        first = first.model_copy(update={"device": first.device.model_copy(update={"product": HOSTILE})})
    fake_champions.keep(results, first)
    fake_champions.keep(results, fake_champions.champion_file(backward, kernel="flash_bwd"), draft=True)


def campaign(folder: Path, *, device: str = "h200", config: Any = None, **rivals: Any) -> Path:
    """A ledger: what peers took beside ours, and the device's ceilings."""
    found = {
        "sdpa:flash": {"rival_ms": 0.13, "ours_ms": 0.1, "ratio": 1.3, "interval": [1.27, 1.33], "verdict": "faster"},
        "sdpa:cudnn": {"rival_ms": 0.095, "ours_ms": 0.1, "ratio": 0.95, "interval": [0.93, 0.97], "verdict": "slower"},
        "fa3": {"not_measured": "`flash_attn_interface` cannot be imported"},
    }  # fmt: skip
    rates = [{"what": "copy TB/s", "size": "4096 MiB", "rate": 4.1, "interval": [4.09, 4.11], "samples": 40},
             {"what": "bf16 TFLOP/s", "size": "8192", "rate": 700.0, "interval": [690.0, 705.0], "samples": 40}]  # fmt: skip
    common = {"status": "done", "run": 0, "seconds": 1.0, "of": "x:y"}
    book = {
        "schema": 1, "campaign": "flashtune", "device": device, "arch": TARGETS[device].arch,
        "runs": [{"began": "2000-01-01", "minutes": 9, "seconds": 60.0, "ended": "done", "machine": {}}],
        "parts": {
            "truth/ceilings": common | {"step": "truth", "data": {"ceilings": rates}},
            f"beside/{FORWARD}": common | {
                "step": "beside",
                "data": {"problem": FORWARD, "config_of": f"champion of {FORWARD}", "config": config or {"block_m": 64},
                         "rivals": found | rivals},
            },
        },
    }  # fmt: skip
    path = folder / "campaign.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(book))
    return path


def bench(path: Path, **peer: Any) -> Path:
    """What `flashtune bench --json` prints."""
    found = {"name": "flex", "peer_ms": 0.3, "ours_ms": 0.1, "ratio": 3.0, "interval": [2.9, 3.1], "verdict": "faster"}
    one = {
        "problem": FORWARD,
        "flops": 1,
        "config": {"block_m": 64},
        "config_of": "champion",
        "peers": [found, peer, 7],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kernel": "flash_fwd", "device": "h200", "problems": [one, None]}))
    return path


def everything(results: Path) -> Path:
    """All of it, as a workspace keeps it."""
    champions(results)
    journal(results / "runs")
    journal(results / "runs", kernel="flash_bwd", problem=BACKWARD, mode="estimated")
    campaign(results / "campaign")
    return results
