"""Use exported `triton.Config` lists with the kernel that they are of; seed Triton's autotuner, and read what it has kept.

    import seeding, flash_fwd_h200 as tuned                       # both files lie in the folder of the export
    problem = "b1 h32/8 s2048 d128 bf16 causal fwd"               # a key of tuned.CONFIGS
    for launch in flash_fwd.launches(q, k, v, out, lse, ..., **tuned.TUNABLES[problem][0]):
        tuner = seeding.autotuned(launch, tuned, problem)
        seeding.seed(tuner, launch, tuned, problem)               # or not: then Triton times the listed configs here
        seeding.run(tuner, launch)

Needs Triton and nothing else. A seed belongs to one machine: Triton's key holds the kernel's source with its place in the file,
the compiler's version and the device, so files are made where they are used, by Triton itself. Refuses to write estimates there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.runtime.autotuner import Autotuner


def autotuned(launch: Any, tuned: ModuleType, problem: str, *, cache_results: bool = False) -> Any:
    """Triton's autotuner over the configs of one launch (`kernels.launch.Launch`) of `problem`.

    With `cache_results` it keeps what it finds in `.autotune.json`. Raises `ValueError` for a launch of another shape or with
    other tunables than the champion's: a config decides arguments and a grid that are right for no other.
    """
    _require_same(launch, tuned, problem)
    named = _fixed(launch, tuned.CONFIGS[problem][launch.name])
    keys = [name for name, value in named.items() if _is_size(name, value)]
    tuner = Autotuner(
        launch.kernel, launch.kernel.arg_names, tuned.CONFIGS[problem][launch.name], keys, None, None,
        cache_results=cache_results,
    )  # fmt: skip
    tuner.grids = tuned.GRIDS[problem][launch.name]
    return tuner


def run(tuner: Any, launch: Any) -> None:
    """Launch with the config that the autotuner takes. `triton.set_allocator` comes first where `launch.scratch` is true."""
    tuner.run(**_fixed(launch, tuner.configs), grid=_grid_of(tuner), warmup=False)


def tuning_key(tuner: Any, launch: Any) -> tuple[Any, ...]:
    """What the autotuner remembers a choice by: the values of its keys, and the type of every tensor."""
    named = _fixed(launch, tuner.configs)
    types = [str(value.dtype) for name, value in named.items() if name in tuner.arg_names and hasattr(value, "dtype")]
    return (*(named[name] for name in tuner.keys), *types)


def seed(tuner: Any, launch: Any, tuned: ModuleType, problem: str, *, disk: bool = False) -> bool:
    """Let the autotuner take the champion without timing anything, for this process; with `disk`, for later ones on this machine.

    True if the champion is taken; with `disk` False if Triton had kept another choice, which stays. Raises `ValueError` with
    `disk` where the champion's number is an estimate: what stands in Triton's files are times.
    """
    key = tuning_key(tuner, launch)
    champion = tuner.configs[0]
    if disk:
        times = tuned.TIMES_MS[problem]
        if times is None:
            raise ValueError(
                f"the number of `{problem}` is an estimate, not a time: seed the process, or let Triton time it"
            )

        def known() -> None:
            # Triton calls this where it would time. What was not timed counts as failed there, and is never taken.
            each = [float("inf") if time is None else time for time in times]
            tuner.configs_timings = {config: [time] * 3 for config, time in zip(tuner.configs, each, strict=False)}
            tuner.cache[key] = champion

        tuner.check_disk_cache(key, tuner.configs, known)
    else:
        tuner.cache[key] = champion
    return bool(tuner.cache[key] == champion)


def read(path: Path | str) -> tuple[tuple[Any, ...], list[tuple[Any, tuple[float, ...] | None]]]:
    """What a file of Triton's (`.autotune.json`) says: its key, and each config with its times in milliseconds, by speed.

    The times are the median and the 20 % and 80 % quantiles; None for one that failed, which Triton writes as `Infinity`. Raises
    `ValueError` for another file.
    """
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        timings = [(triton.Config(**config), tuple(map(float, times))) for config, times in found["configs_timings"]]
        key = tuple(found["key"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of Triton's autotuner: {error}") from error
    timings.sort(key=lambda pair: pair[1])
    return key, [(config, times if times[0] != float("inf") else None) for config, times in timings]


def _fixed(launch: Any, configs: Sequence[Any]) -> dict[str, Any]:
    """The arguments of a launch that no config decides."""
    decided = {name for config in configs for name in config.kwargs}
    return {name: value for name, value in {**launch.args, **launch.constants}.items() if name not in decided}


def _require_same(launch: Any, tuned: ModuleType, problem: str) -> None:
    champion = tuned.CONFIGS[problem][launch.name][0]
    given = {**launch.args, **launch.constants, **launch.options}
    wanted = {**champion.kwargs, **tuned.SIZES[problem][launch.name]}
    for name, value in wanted.items():
        if given.get(name) != value:
            raise ValueError(
                f"the launch is not that of the champion of `{problem}`: {name} is {given.get(name)}, not {value}"
            )
    if tuple(launch.grid) != tuple(tuned.GRIDS[problem][launch.name][0]):
        raise ValueError(f"the launch is not that of the champion of `{problem}`: its grid is {launch.grid}")


def _is_size(name: str, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and not name.startswith("stride_")


def _grid_of(tuner: Any) -> Any:
    def grid(meta: Any) -> tuple[int, ...]:
        for config, size in zip(tuner.configs, tuner.grids, strict=True):
            if all(meta[name] == value for name, value in config.kwargs.items()):
                return tuple(size)
        raise KeyError("no config of the list is being launched")

    return grid


if __name__ == "__main__":
    for name in sys.argv[1:]:
        its_key, its_configs = read(name)
        sys.stdout.write(f"{name}\n  key {its_key}\n")
        for its_config, its_times in its_configs:
            sys.stdout.write(f"  {f'{its_times[0]:.6g} ms' if its_times else 'failed'}  {its_config}\n")
