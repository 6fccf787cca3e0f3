"""The two operations: which tensors go in and come out, their shapes, and the words that a kernel's `launches` takes.

Refuses to run anything and to import a kernel.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.problem import Pass, Problem


@dataclass(frozen=True, slots=True)
class Operation:
    """One pass of attention: its input and output tensors by name, in the order of a kernel's parameters."""

    pass_: Pass
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.inputs + self.outputs


FORWARD = Operation("fwd", ("q", "k", "v"), ("out", "lse"))
BACKWARD = Operation("bwd", ("q", "k", "v", "out", "lse", "dout"), ("dq", "dk", "dv"))

# What `launches` is told of the problem beside its tensors; its other keyword-only parameters are tunables.
PROBLEM_KEYWORDS = ("scale", "window_left", "window_right", "top_left")


def operation_for(problem: Problem) -> Operation:
    """FORWARD or BACKWARD."""
    return FORWARD if problem.pass_ == "fwd" else BACKWARD


def shapes(problem: Problem) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype name)} of all tensors of the problem's operation; lse is fp32, the rest as the problem says."""
    queries, keys = (problem.batch, problem.q_heads, problem.q_len), (problem.batch, problem.kv_heads, problem.kv_len)
    like_q, like_k = (*queries, problem.head_dim), (*keys, problem.head_dim)
    like_v, like_out = (*keys, problem.v_head_dim), (*queries, problem.v_head_dim)
    every = {
        "q": like_q, "k": like_k, "v": like_v, "out": like_out, "lse": queries, "dout": like_out,
        "dq": like_q, "dk": like_k, "dv": like_v,
    }  # fmt: skip
    return {name: (every[name], "fp32" if name == "lse" else problem.dtype) for name in operation_for(problem).tensors}


def problem_keywords(problem: Problem) -> Mapping[str, Any]:
    """The values of `PROBLEM_KEYWORDS` for this problem; causal is a right window of 0."""
    return {
        "scale": problem.softmax_scale,
        "window_left": problem.window_left,
        "window_right": problem.right,
        "top_left": problem.top_left,
    }


def tunables(launches: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the tunables of a kernel's `launches`, in its order."""
    parameters = inspect.signature(launches).parameters.values()
    keywords = (parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name in keywords if name not in PROBLEM_KEYWORDS)
