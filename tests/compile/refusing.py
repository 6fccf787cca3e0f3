"""A kernel file whose compiler raises what its config names."""

from types import SimpleNamespace
from typing import Any

from triton.runtime.errors import OutOfResources, PTXASError

PASS = "fwd"

RAISES = {
    "passes": RuntimeError("PassManager::run failed"),
    "ptxas": PTXASError("ptxas fatal: too many registers"),
    "resources": OutOfResources(300, 200, "shared memory"),
    "ours": RuntimeError("a bug in the kernel file"),
    "type": TypeError("a bug in the kernel file"),
}


def launches(*tensors: Any, raises: str, **rest: Any) -> list[Any]:
    """One launch that cannot be compiled."""

    def warmup(**arguments: Any) -> None:
        raise RAISES[raises]

    return [SimpleNamespace(kernel=SimpleNamespace(warmup=warmup), grid=(1, 1, 1), args={}, constants={}, options={})]


def workspaces(**inputs: Any) -> dict[str, Any]:
    """None are needed."""
    return {}
