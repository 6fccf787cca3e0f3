"""Child of `test_kernels.py`: compile default configs for GPUs that are not here, and print what came out as JSON.

Arguments: a list of [device, problem, stem] or [device, problem, stem, changes of the default config], and optionally "large"
for a config that is bound to spill, "table" for a line of text for each launch as it comes, or "survey" for that and a
sentence at the end, where what is refused is a line too. For a table of all variants: python -m tests.kernels.test_kernels h200
"""

import json
import sys

import triton

from harness.compile import compile_candidate
from harness.device import TARGETS
from harness.outcome import Artifact
from harness.problem import parse_problem
from harness.prune import prune
from harness.space import Config
from harness.workspace import find_workspace

LARGE = {"dkdv_block_m": 64, "dkdv_block_n": 128, "dkdv_warps": 4}


def main() -> None:
    workspace = find_workspace()
    found: list[dict[str, object]] = []
    told = "table" in sys.argv or "survey" in sys.argv
    refused = 0
    for device_name, notation, stem, *changes in json.loads(sys.argv[1]):
        problem, device = parse_problem(notation), TARGETS[device_name]
        config = Config(dict(workspace.load_space(stem).default(problem, device), **(changes[0] if changes else {})))
        if "large" in sys.argv:
            config = Config(dict(config) | LARGE)
        artifact = compile_candidate(workspace.load_kernel(stem), problem, config, device)
        if not isinstance(artifact, Artifact) and "survey" in sys.argv:
            refused += 1
            sys.stdout.write(f"{device_name:7} {notation:56} REFUSED {changes} {artifact}\n")
            continue
        if not isinstance(artifact, Artifact):
            raise SystemExit(f"{device_name} `{notation}`: {artifact}")
        for binary in artifact.binaries:
            found.append({
                "device": device_name, "problem": notation, "kernel": binary.kernel, "config": str(config),
                "registers": binary.registers, "spill_bytes": binary.spill_bytes, "shared_bytes": binary.shared_bytes,
                "shared_limit": device.shared_bytes_per_block, "warps": binary.warps, "specialized": binary.specialized,
                "changes": changes[0] if changes else {},
            })  # fmt: skip
            broken = prune(Artifact(binaries=(binary,), toolchain="", compile_ms=0.0), Config({}), device)
            found[-1]["trap"] = broken is not None and broken.rule == "trap"
            if told:
                sys.stdout.write(line(found[-1]) + "\n")
                sys.stdout.flush()
    if "survey" in sys.argv:
        sys.exit(_sentence(found, refused))
    if not told:
        sys.stdout.write(json.dumps(found))


def _sentence(found: list[dict[str, object]], refused: int) -> int:
    """Say what came out; whether anything of it is a fault."""
    defaults = [entry for entry in found if not entry["changes"]]
    spilling = [sum(bool(entry["spill_bytes"]) for entry in some) for some in (defaults, found)]
    over = sum(int(str(entry["shared_bytes"])) > int(str(entry["shared_limit"])) for entry in found)
    traps = sum(bool(entry["trap"]) for entry in found)
    sys.stdout.write(
        f"triton {triton.__version__}: {len(defaults)} launches of defaults, {spilling[0]} spill; {len(found) - len(defaults)} of"
        f" samples, {spilling[1] - spilling[0]} spill; {over} over the limit of shared memory, {traps} traps, {refused} refused\n"
    )
    return 1 if spilling[0] or over or traps or refused else 0


def line(entry: dict[str, object]) -> str:
    """Registers, spills and shared memory of a launch as text."""
    return (
        f"{entry['device']:7} {entry['problem']:56} {str(entry['kernel']).removeprefix('flash_'):18}"
        f" {entry['registers']:>4} registers {entry['spill_bytes']:>5} bytes spilled {entry['shared_bytes']:>7} bytes shared"
        f"{' TRAP' if entry['trap'] else ''} {entry['changes'] or ''}"
    )


main()
