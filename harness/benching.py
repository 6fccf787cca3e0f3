"""What the verb `bench` does, given its parsed options: champions and default in turns with peers on the GPU that is here."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import commands, report
from harness.bench import Bench, short
from harness.bench_documents import BenchDocument, BenchedDocument, PeerDocument
from harness.beside import RIVALS
from harness.campaign_plan import FLEX, TUNED_FLEX, champion_name
from harness.champions import ChampionFile, read_champions
from harness.commands import Setting, print_document
from harness.errors import MachineError, UsageError, did_you_mean
from harness.keeping import champion_path
from harness.lab_beside import Beside
from harness.problem import Problem
from harness.report_bench import bench_lines
from harness.trust import Here, standing
from harness.worker import Job, ProcessRunner
from harness.workspace import Workspace, find_workspace, package_version, triton_cache

# Who may be asked for, in the order in which they are timed: what takes longest to compile is last.
PEERS = ("default", *(name for name in RIVALS if name != "flex"), "flex", TUNED_FLEX)
# Cores that are left to the process that owns the device and to this one.
_SPARED_CORES = 2


def run_bench(options: argparse.Namespace) -> int:
    """`flashtune bench`: time champions and default beside peers. Exits 3 without a GPU: nothing here is estimated."""
    workspace = find_workspace(options.workspace)
    problems = commands.problems_of(options, workspace)
    peers = chosen_peers(options.peers)
    commands.require_packages("torch", "triton", "pebble")
    live, driver = commands.here()
    if live is None:
        raise MachineError(
            "`bench` times kernels on a GPU, and there is none here",
            hint="`flashtune tune` estimates without one; a champion file from elsewhere can be compared: `flashtune compare`",
        )
    setting = Setting(live, "measured", driver)
    err = report.open_console(sys.stderr)
    with make_bench(options, workspace, setting) as bench:
        beside = Beside(bench)
        found = []
        for problem in problems:
            if not options.quiet:
                err.print(f"{options.kernel} {problem}")
            found.append(_benched(beside, options.kernel, problem, peers))
    document = BenchDocument(
        kernel=options.kernel, device=live.name, arch=live.arch, driver=driver, torch=package_version("torch"),
        triton=package_version("triton"), problems=tuple(found),
    )  # fmt: skip
    if options.json:
        print_document("bench", document)
    else:
        for line in bench_lines(document):
            report.open_console(sys.stdout).print(line)
    if not any(peer.ratio for one in found for peer in one.peers):
        raise MachineError(
            "nothing could be timed beside anything", hint="the reasons stand above; ask other peers with `--peers`"
        )
    return 0


def chosen_peers(given: str | None) -> tuple[str, ...]:
    """The peers of a list with commas, all of them without one. Raises `UsageError` for a name that nobody has."""
    if given is None:
        return PEERS
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise UsageError(f"there is no peer `{name}`", hint=did_you_mean(name, PEERS))
    if not names:
        raise UsageError("`--peers` names nobody", hint=f"known: {', '.join(PEERS)}")
    return tuple(dict.fromkeys(names))


@contextlib.contextmanager
def make_bench(options: argparse.Namespace, workspace: Workspace, setting: Setting) -> Any:
    """The children at work on the GPU that is here, with the champions of the workspace."""
    jobs = options.jobs or max((os.cpu_count() or 1) - _SPARED_CORES, 1)
    job = Job(root=workspace.root, stem=options.kernel, device=setting.device, mode="measured", seed=options.seed)
    runner = ProcessRunner(job=job, jobs=jobs, cache=triton_cache())
    with contextlib.closing(runner), tempfile.TemporaryDirectory(prefix="flashtune-bench-") as folder:
        yield Bench(
            workspace=workspace, setting=setting, folder=Path(folder), runner=runner, jobs=jobs, seed=options.seed,
            known=champions_known(workspace, setting, (options.kernel, *FLEX.values())),
        )  # fmt: skip


def champions_known(
    workspace: Workspace, setting: Setting, stems: Sequence[str]
) -> Callable[[str], Mapping[str, Any] | None]:
    """The champions of this device that were measured and whose proof holds, by the name of the part that gives them."""
    found: dict[str, Mapping[str, Any]] = {}
    for stem in stems:
        if stem not in workspace.stems:
            continue
        # Reviewed champions come before drafts.
        for draft in (True, False):
            path = champion_path(workspace.results, setting.device.name, stem, draft=draft)
            if path.exists():
                found |= _of_file(read_champions(path), stem, workspace)
    return found.get


def _of_file(file: ChampionFile, stem: str, workspace: Workspace) -> dict[str, Mapping[str, Any]]:
    here = Here(kernel_digest=workspace.kernel_digest(stem))
    return {
        champion_name(stem, champion.read()): {"champion": {"config": dict(champion.config)}}
        for champion in file.champions
        if champion.number.kind == "measured" and standing(file, champion, here).status == "current"
    }


def _benched(beside: Beside, stem: str, problem: Problem, peers: Sequence[str]) -> BenchedDocument:
    given = beside.rivals(stem, problem, list(peers), None)
    data = given.data
    if given.status != "done":
        return BenchedDocument(
            problem=problem.key, flops=problem.flops, config=data.get("config", {}), config_of=data.get("config_of", ""),
            peers=(), reason=given.reason,
        )  # fmt: skip
    return BenchedDocument(
        problem=problem.key, flops=problem.flops, config=data["config"], config_of=data["config_of"],
        peers=tuple(_peer(name, one, problem) for name, one in data["rivals"].items()),
    )  # fmt: skip


def _peer(name: str, one: Mapping[str, Any], problem: Problem) -> PeerDocument:
    if "not_measured" in one:
        return PeerDocument(name=name, not_measured=one["not_measured"])
    interval = one.get("interval")
    return PeerDocument(
        name=name, peer_ms=one["rival_ms"], ours_ms=one["ours_ms"], peer_tflops=_rate(problem, one["rival_ms"]),
        ours_tflops=_rate(problem, one["ours_ms"]), ratio=one["ratio"],
        interval=None if interval is None else (interval[0], interval[1]), verdict=_of_ours(one["verdict"]),
        samples=one["samples"], method=one["method"], peer_bytes=one["rival_bytes"], ours_bytes=one["ours_bytes"],
        throttled=one.get("throttled", False),
    )  # fmt: skip


def _of_ours(verdict: str) -> Any:
    """What is said of ours, of what was said of the peer."""
    return {"faster": "slower", "slower": "faster"}.get(verdict, "cannot tell")


def _rate(problem: Problem, value_ms: float) -> float | None:
    return short(problem.flops / value_ms / 1e9)
