"""Compiles kernel files in a process of its own and prints what came of it, as one JSON document.

Usage: python -m tests.compile.report JOBS, where JOBS is a JSON list of {path, target, problem, config, on_cpu?}.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from pydantic import TypeAdapter

from harness.compile import compile_candidate, meta_launches
from harness.device import find_target
from harness.outcome import Artifact, CompileFailed
from harness.problem import parse_problem
from harness.space import Config

_OUTCOME: TypeAdapter[Any] = TypeAdapter(Artifact | CompileFailed)


def load(path: str) -> Any:
    """The kernel file at `path`."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def specialisations(kernel: Any, job: dict[str, Any]) -> int:
    """How many kernels Triton's own cache holds after compiling for absent tensors and launching on present ones."""
    held = 0
    for launch in meta_launches(kernel, parse_problem(job["problem"]), Config(job["config"])):
        present = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in launch.args.items()
        }
        launch.kernel.warmup(grid=launch.grid, **present, **launch.constants, **launch.options)
        held = max(held, *(len(cache[0]) for cache in launch.kernel.device_caches.values()))
    return held


class SameDevice:
    """The stand-in that the harness uses, kept active."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return f"absent {self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def main() -> None:
    """Do the jobs in order, in this one process."""
    found = []
    for job in json.loads(sys.argv[1]):
        kernel = load(job["path"])
        problem, config = parse_problem(job["problem"]), Config(job["config"])
        outcome = compile_candidate(kernel, problem, config, find_target(job["target"]))
        entry = {"outcome": _OUTCOME.dump_python(outcome, mode="json"), "kind": type(outcome).__name__}
        if job.get("on_cpu"):
            arch = find_target(job["target"])
            target = triton.backends.compiler.GPUTarget(arch.vendor, arch.compute_capability, arch.warp_size)
            triton.runtime.driver.set_active(SameDevice(target))
            entry["held"] = specialisations(kernel, job)
            triton.runtime.driver.set_active(None)
        found.append(entry)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
