"""Child of `test_kernels.py`: compile default configs for GPUs that are not here, and print what came out as JSON.

Arguments: a list of [device, problem, stem] or [device, problem, stem, changes of the default config], and optionally "large"
for a config that is bound to spill, or "table" for a line of text for each launch as it comes. For a table of all variants:
python -m tests.kernels.test_kernels h200
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
    for device_name, notation, stem, *changes in json.loads(sys.argv[1]):
        problem, device = parse_problem(notation), TARGETS[device_name]
        config = Config(dict(workspace.load_space(stem).default(problem, device), **(changes[0] if changes else {})))
        if "large" in sys.argv:
            config = Config(dict(config) | LARGE)
        artifact = compile_candidate(workspace.load_kernel(stem), problem, config, device)
        if not isinstance(artifact, Artifact):
            raise SystemExit(f"{device_name} `{notation}`: {artifact}")
        for binary in artifact.binaries:
            found.append({
                "device": device_name, "problem": notation, "kernel": binary.kernel, "config": str(config),
                "registers": binary.registers, "spill_bytes": binary.spill_bytes, "shared_bytes": binary.shared_bytes,
                "shared_limit": device.shared_bytes_per_block, "warps": binary.warps, "specialized": binary.specialized,
            })  # fmt: skip
            if "table" in sys.argv:
                sys.stdout.write(line(found[-1]) + "\n")
                sys.stdout.flush()
    if "table" not in sys.argv:
        sys.stdout.write(json.dumps(found))


def line(entry: dict[str, object]) -> str:
    """Registers, spills and shared memory of a launch as text."""
    return (
        f"{entry['device']:7} {entry['problem']:56} {str(entry['kernel']).removeprefix('flash_'):18}"
        f" {entry['registers']:>4} registers {entry['spill_bytes']:>5} bytes spilled {entry['shared_bytes']:>7} bytes shared"
    )


main()
