"""What `tune --fleet` does, given its parsed options: a tune whose compilers and devices are those of a Ray cluster.

The driver searches, keeps the journal and chooses; the cluster compiles, judges and measures. Refuses to begin on two models of
device at once, and workers whose kernel, judge or toolchain is another than the driver's.
"""

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import commands, fleet
from harness.commands import DEFAULT_TARGET, Setting, Site
from harness.device import find_target
from harness.errors import MachineError, UsageError
from harness.search import BATCH
from harness.shared import open_shared_journal
from harness.space import Space
from harness.store import Journal, open_journal
from harness.worker import Job, ProcessRunner, Runner
from harness.workspace import Workspace, find_workspace, triton_cache

# What of the workspace a cluster elsewhere is sent.
_NOT_SENT = (".venv", ".git", "results", "docs", "tests", "build", "**/__pycache__", "*.egg-info")


@dataclass(frozen=True, slots=True)
class MachinePlace:
    """What makes the runner of the machine on which it is called, working for `job`; in mode "measured" on the device that is
    really there. The workspace is where Ray has put what it was sent, or where the driver has it."""

    job: Job

    def __call__(self) -> Runner:
        job = replace(self.job, root=self._root())
        if job.mode == "measured":
            live, _ = commands.here()
            if live is None:
                raise MachineError(f"a node offers a {job.device.name}, and no GPU that Triton can use is there")
            job = replace(job, device=live)
        return ProcessRunner(job=job, jobs=1, cache=triton_cache())

    def digest(self) -> str:
        """Digest of all that numbers depend on, as it is here; an estimate depends on no driver."""
        driver = commands.here()[1] if self.job.mode == "measured" else None
        setting = Setting(self.job.device, self.job.mode, driver)
        found = commands.run_identity(self.job.stem, Workspace(self._root()), setting, self.job.seed)
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]

    def _root(self) -> Path:
        sent = Path.cwd()
        return sent if (sent / "kernels" / f"{self.job.stem}.py").exists() else self.job.root


@dataclass(frozen=True, slots=True)
class _FirstLook:
    """A place that says what device a node has, for a driver without one."""

    model: str

    def __call__(self) -> Runner:
        live, _ = commands.here()
        if live is None:
            raise MachineError(f"a node offers a {self.model}, and no GPU that Triton can use is there")
        job = Job(root=Path.cwd(), stem="", device=live, mode="measured", seed=0)
        return ProcessRunner(job=job, jobs=1, cache=triton_cache())

    def digest(self) -> str:
        """The driver of the device that is there."""
        return commands.here()[1] or ""


def run_fleet_tune(options: argparse.Namespace) -> int:
    """`flashtune tune --fleet F`: tune on a cluster, and keep the champions here."""
    if not options.fleet:
        raise UsageError("`--storage` is for a fleet", hint="add --fleet local, or leave --storage out")
    with contextlib.ExitStack() as stack:
        return commands.tune_at(options, lambda given: _site(given, stack))


def _site(options: argparse.Namespace, stack: contextlib.ExitStack) -> Site:
    commands.require_packages("torch", "triton")
    if options.fleet == "local":
        live = commands.live_device()
        cpus = options.jobs or os.cpu_count() or 1
        fleet.connect("local", device=live.name if live else None, devices=_gpus_here() if live else 0, cpus=cpus)
    else:
        sent = {
            "working_dir": str(find_workspace(options.workspace).root),
            "excludes": [f"/{name}" for name in _NOT_SENT],
        }
        fleet.connect(options.fleet, runtime_env=sent)
    stack.callback(fleet.disconnect)
    setting = _setting(options.target, options.fleet)
    devices = fleet.models().get(setting.device.name, 0)

    def runner(job: Job) -> Runner:
        place = MachinePlace(job)
        measured = setting.mode == "measured"
        return fleet.RayRunner(
            place=place, device=setting.device, mode=setting.mode, ahead=fleet.batches_ahead(devices, BATCH),
            digest=place_digest(job, setting) if measured else "", gpus=1 if measured else 0,
        )  # fmt: skip

    def journal(path: Path, identity: Mapping[str, Any], spaces: Mapping[str, Space]) -> Journal:
        if options.storage:
            return open_shared_journal(path, identity, spaces, options.storage)
        return open_journal(path, identity)

    return Site(setting=setting, runner=runner, journal=journal)


def place_digest(job: Job, setting: Setting) -> str:
    """What a worker must say of itself to work on a tune of `setting`."""
    found = commands.run_identity(job.stem, Workspace(job.root), setting, job.seed)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _setting(target: str | None, address: str) -> Setting:
    """Measure on the model that is asked for, or on the only one there is; estimate where the cluster has no such device."""
    offered = fleet.models()
    if target is None and len(offered) > 1:
        raise UsageError(
            f"the cluster at {address} has several models of device: {', '.join(sorted(offered))}",
            hint="give one of them with --target; numbers of two models are never mixed",
        )
    wanted = target or next(iter(offered), None)
    if wanted not in offered:
        return Setting(find_target(wanted or DEFAULT_TARGET), "estimated")
    with contextlib.closing(
        fleet.RayRunner(place=_FirstLook(wanted), device=_named(wanted), mode="measured", gpus=1)
    ) as look:
        found = look.first_standing()
    if found.device.name != wanted:
        raise MachineError(
            f"a node offers {fleet.RESOURCE}{wanted} and has a {found.device.name}",
            hint="name the resource as `flashtune doctor` names the device there",
        )
    return Setting(found.device, "measured", found.digest or None)


def _named(model: str) -> Any:
    """Facts under the name of a model whose own are not known yet."""
    return replace(find_target(DEFAULT_TARGET), name=model)


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()
