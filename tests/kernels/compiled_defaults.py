"""Child of `test_kernels.py`: compile default configs for GPUs that are not here, and print what came out as JSON.

Arguments: a list of [device, problem, stem], and optionally "large" for a config that is bound to spill instead of the default.
"""

import json
import sys

from harness.compile import compile_candidate
from harness.device import TARGETS
from harness.outcome import Artifact
from harness.problem import parse_problem
from harness.space import Config
from harness.workspace import find_workspace

LARGE = {"dkdv_block_m": 64, "dkdv_block_n": 128, "dkdv_warps": 4}


def main() -> None:
    workspace = find_workspace()
    found = []
    for device_name, notation, stem in json.loads(sys.argv[1]):
        problem, device = parse_problem(notation), TARGETS[device_name]
        config = workspace.load_space(stem).default(problem, device)
        if "large" in sys.argv:
            config = Config(dict(config) | LARGE)
        artifact = compile_candidate(workspace.load_kernel(stem), problem, config, device)
        if not isinstance(artifact, Artifact):
            raise SystemExit(f"{device_name} `{notation}`: {artifact}")
        found += [
            {
                "device": device_name, "problem": notation, "kernel": binary.kernel, "config": str(config),
                "registers": binary.registers, "spill_bytes": binary.spill_bytes, "shared_bytes": binary.shared_bytes,
                "shared_limit": device.shared_bytes_per_block,
            }
            for binary in artifact.binaries
        ]  # fmt: skip
    sys.stdout.write(json.dumps(found))


main()
