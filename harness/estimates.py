"""Estimates of many compiled candidates at a time, in a child that compiles."""

from collections.abc import Sequence
from typing import Any

from harness.compile import meta_launches
from harness.device import DeviceFacts
from harness.estimate import estimate
from harness.outcome import Artifact
from harness.problem import Problem
from harness.space import Config


def estimate_all(
    kernel: Any, problem: Problem, device: DeviceFacts, candidates: Sequence[tuple[Config, Artifact]]
) -> list[float]:
    """Predicted milliseconds of each candidate."""
    return [
        estimate(problem, meta_launches(kernel, problem, config, device), artifact, device).value_ms
        for config, artifact in candidates
    ]
