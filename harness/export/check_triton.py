"""Lets Triton take what an export to `triton` wrote: run by `harness.export.triton` in a process of its own.

A pretended driver says which GPU is meant; nothing is compiled and nothing launched.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from harness.compile import meta_launches
from harness.device import find_target
from harness.problem import parse_problem
from harness.space import Config
from harness.workspace import Workspace


class _Driver:
    """A GPU as far as the autotuner asks for one."""

    def __init__(self, arch: str) -> None:
        nvidia = arch.startswith("sm_")
        self._target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)

    def get_current_target(self) -> GPUTarget:
        return self._target


class NotTakenError(Exception):
    """What was written is not taken; the text says how."""


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise NotTakenError(what)


def _never(*args: Any, **kwargs: Any) -> None:
    raise NotTakenError("Triton would time configs although it was seeded")


def _ask(folder: Path, root: Path, one: dict[str, str]) -> tuple[int, int]:
    """How many configs Triton took of one champion, and how many of its choices it keeps on the disk."""
    seeding, tuned = _load(folder / "seeding.py"), _load(folder / one["module"])
    device, problem = find_target(one["device"]), one["problem"]
    driver.set_active(_Driver(device.arch))
    kernel = Workspace(root).load_kernel(one["kernel"])
    taken = kept = 0
    several = [meta_launches(kernel, parse_problem(problem), Config(each), device) for each in tuned.TUNABLES[problem]]
    for launch, *others in zip(*several, strict=True):
        for config in tuned.CONFIGS[problem][launch.name]:
            _require(triton.Config(**config.__dict__) == config, "a config does not survive Triton's own JSON")
        tuner = seeding.autotuned(launch, tuned, problem, cache_results=True)
        ran: list[dict[str, Any]] = []
        tuner.fn = _Recorder(launch.kernel, ran)
        tuner._bench = _never
        seeding.seed(tuner, launch, tuned, problem)
        seeding.run(tuner, launch)
        _require_same(ran[-1], launch, "the champion")
        for config, other in zip(tuner.configs[1:], others, strict=True):
            # As if Triton had timed it and liked it better.
            tuner.cache[seeding.tuning_key(tuner, launch)] = config
            seeding.run(tuner, launch)
            _require_same(ran[-1], other, "the default")
        taken += len(tuner.configs)
        if tuned.TIMES_MS[problem] is not None and len(tuner.configs) > 1:
            kept += _keep(seeding, tuned, problem, launch)
    return taken, kept


def _require_same(ran: dict[str, Any], launch: Any, whose: str) -> None:
    """Raise unless the autotuner would launch exactly what the kernel's own `launches` says."""
    given = {name: value for name, value in ran.items() if name not in ("grid", "warmup")}
    wanted = {**launch.args, **launch.constants, **launch.options}
    extra = given.keys() - wanted.keys() - {"num_ctas", "maxnreg", "ir_override", "num_stages"}
    wrong = [name for name, value in wanted.items() if not _equal(given.get(name), value)]
    _require(not extra and not wrong, f"Triton would launch something else than {whose}: {', '.join([*extra, *wrong])}")
    _require(tuple(ran["grid"](given)) == tuple(launch.grid), f"Triton would launch another grid than {whose}")


def _equal(one: Any, other: Any) -> bool:
    """Tensors of two calls are other objects, of one shape and type."""
    if hasattr(one, "dtype") and hasattr(other, "dtype"):
        return bool(one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype)
    return bool(one is other or one == other)


class _Recorder:
    """The kernel, but for launching."""

    def __init__(self, kernel: Any, ran: list[dict[str, Any]]) -> None:
        self._ran = ran
        self.fn = kernel

    def run(self, **given: Any) -> None:
        self._ran.append(given)


def _keep(seeding: ModuleType, tuned: ModuleType, problem: str, launch: Any) -> int:
    """Seed Triton's files, and let another autotuner find its choice there."""
    seeding.seed(seeding.autotuned(launch, tuned, problem), launch, tuned, problem, disk=True)
    later = seeding.autotuned(launch, tuned, problem)
    key = seeding.tuning_key(later, launch)
    _require(later.check_disk_cache(key, later.configs, _never), "Triton does not find the file that was seeded")
    _require(later.cache[key] == later.configs[0], "Triton reads another choice than was seeded")
    return 1


def main() -> None:
    folder, question = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    said: dict[str, str] = {"version": triton.__version__}
    try:
        counts = [_ask(folder, Path(question["root"]), one) for one in question["champions"]]
        taken, kept = (sum(each) for each in zip(*counts, strict=True))
        said["check"] = (
            f"its autotuner took {taken} configs for a pretended GPU, and would launch each with its own arguments and grid"
            + (f"; check_disk_cache found {kept} seeded choices" if kept else "; no choice was seeded to disk")
        )
    except NotTakenError as refused:
        said["refused"] = str(refused)
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
