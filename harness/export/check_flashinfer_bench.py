"""Lets FlashInfer-Bench load what an export to `flashinfer-bench` wrote: run by `harness.export.flashinfer_bench`.

In a process of its own. Triton interprets, so that its builder can build and call a solution without a GPU.
"""

import importlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any


def check(folder: Path) -> str:
    """What was checked, in words. Raises `ValueError` (as pydantic does) that says what is not taken."""
    import torch

    package = importlib.import_module("flashinfer_bench")
    builders = importlib.import_module("flashinfer_bench.compile.builders.triton_builder")
    found = package.TraceSet.from_path(str(folder))
    ran = best = 0
    for name, definition in found.definitions.items():
        heads, kv_heads, dim, v_dim = (
            definition.axes[axis].value for axis in ("q_heads", "kv_heads", "head_dim", "v_head_dim")
        )
        # Equal scores, and values that are all 1: the answer is known, and has no rounding.
        dtype = getattr(torch, definition.inputs["q"].dtype.value)
        q, k = torch.zeros(1, heads, 3, dim, dtype=dtype), torch.zeros(1, kv_heads, 3, dim, dtype=dtype)
        v = torch.ones(1, kv_heads, 3, v_dim, dtype=dtype)
        namespace: dict[str, Any] = {}
        exec(compile(definition.reference, "reference", "exec"), namespace)  # what its own benchmark does
        wanted = namespace["run"](q, k, v)
        for solution in found.solutions[name]:
            runnable = builders.TritonBuilder().build(definition, solution)
            out = runnable(q, k, v)
            runnable.cleanup()
            if not torch.equal(out, wanted) or not torch.equal(out, torch.ones_like(out)):
                raise ValueError(f"the solution {solution.name} does not give the mean of equal values")
            ran += 1
        for trace in found.traces.get(name, []):
            axes = trace.workload.axes
            best += found.get_best_trace(name, axes=axes, max_rel_error=1.0) is not None
    traces = sum(map(len, found.traces.values()))
    if best != traces:
        raise ValueError(f"get_best_trace answers for {best} of {traces} traces")
    said = ", and get_best_trace found each of these" if traces else ""
    return (
        f"TraceSet.from_path read {len(found.definitions)} definitions, {sum(map(len, found.workloads.values()))} workloads and "
        f"{traces} traces{said}; its TritonBuilder built {ran} solutions, "
        "which ran in Triton's interpreter"
    )


def main() -> None:
    os.environ["FIB_CACHE_PATH"] = str(Path.cwd() / "fib")
    said: dict[str, str] = {}
    try:
        said["version"] = importlib.metadata.version("flashinfer-bench")
        said["check"] = check(Path(sys.argv[1]))
    except importlib.metadata.PackageNotFoundError:
        said = {"missing": "flashinfer-bench"}
    except ModuleNotFoundError as missing:
        said = {"missing": str(missing.name)}
    except (ValueError, RuntimeError) as refused:
        said["refused"] = str(refused)
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
