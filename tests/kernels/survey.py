"""Compile every default, and a sample of every structural tunable, for GPUs that are not here; say what came out.

    python -m tests.kernels.survey                              # all of it, with the Triton that is installed: about an hour
    python -m tests.kernels.survey --devices h200 --share 1/8   # every eighth job for one device, from the first on
    python -m tests.kernels.survey --triton FOLDER              # pip install --no-deps --target FOLDER triton

A line for each launch, and a sentence at the end. Exit code 1 if a default spills, or if anything is refused, does not fit or is
a trap.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.device import TARGETS
from harness.problem import parse_problem
from harness.space import Config
from harness.workspace import find_workspace
from tests.kernels import test_kernels as jobs_of

ROOT = Path(__file__).parents[2]
DEVICES = ("a100", "h200", "b200", "mi300x")
# Problems that together offer every value of every tunable.
SAMPLED = (
    ("flash_fwd", "b2 h8/2 s4096 d128 bf16 causal fwd"), ("flash_fwd", "b2 h8/2 s4096 d96 bf16 causal fwd"),
    ("flash_fwd", "b2 h8/2 s4096 d64 bf16 causal softcap=30.0 fwd"), ("flash_fwd", "b2 h8/2 s4096 d64 fp32 causal fwd"),
    ("flash_bwd", "b2 h8/2 s4096 d128 bf16 causal bwd"), ("flash_bwd", "b2 h8/2 s4096 d128 bf16 causal nondeterministic bwd"),
    ("flash_decode", "b4 h32/8 q1 k8192 d128 bf16 causal"), ("flash_decode", "b4 h32/8 q4 k8192 d128 bf16 causal paged=64"),
)  # fmt: skip
# How much of a tile there is, and who shares it: everything else is structure.
SIZES = ("block_m", "block_n", "warps", "num_stages", "dkdv_stages", "dq_stages", "num_splits")


def defaults(device: str) -> Iterator[tuple[str, str, str]]:
    """Jobs (device, problem, kernel) of all defaults that the tests know."""
    for found, problem in (*jobs_of.ALL, *jobs_of.WIDE, *jobs_of.VARIANTS, *jobs_of.EIGHT_BITS):
        if found == device:
            yield device, problem, f"flash_{problem.split()[-1]}"
    yield from ((device, problem, "flash_decode") for found, problem in jobs_of.DECODING if found == device)


def samples(device: str) -> Iterator[tuple[str, str, str, dict[str, object]]]:
    """Jobs, with their changes of the default config: for each value of a structural tunable that the default does not have, the
    legal config that differs least from it."""
    workspace, seen = find_workspace(), set()
    for stem, notation in SAMPLED:
        module, problem = workspace.load_space(stem), parse_problem(notation)
        space, default = module.space(problem, TARGETS[device]), module.default(problem, TARGETS[device])
        nearest: dict[tuple[str, object], Config] = {}
        distance: dict[tuple[str, object], int] = {}
        for config in space.legal:
            changed = [name for name in config if config[name] != default[name]]
            for name in changed:
                key = (name, config[name])
                if not name.endswith(SIZES) and len(changed) < distance.get(key, 99):
                    nearest[key], distance[key] = config, len(changed)
        for key, config in nearest.items():
            if (stem, *key) not in seen:
                seen.add((stem, *key))
                yield device, notation, stem, {name: config[name] for name in config if config[name] != default[name]}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--devices", nargs="+", default=DEVICES, choices=jobs_of.ARCHITECTURES)
    options.add_argument("--share", default="1/1", help="I/N: every N-th job, from the I-th on")
    options.add_argument("--only", choices=("defaults", "samples"), help="not the others")
    options.add_argument("--triton", type=Path, help="folder that holds another Triton")
    asked = options.parse_args()
    first, step = map(int, asked.share.split("/"))
    jobs: list[tuple[object, ...]] = []
    for device in asked.devices:
        jobs += defaults(device) if asked.only != "samples" else ()
        jobs += samples(device) if asked.only != "defaults" else ()
    path = os.pathsep.join(map(str, ([asked.triton] if asked.triton else []) + [ROOT]))
    command = [sys.executable, "-m", "tests.kernels.compiled_defaults", json.dumps(jobs[first - 1 :: step]), "survey"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
