"""Lookups for a library: a callable that answers the questions of `kernels.attention.attention` from the champions.

    forward, backward = open_database(workspace, "flash_fwd"), open_database(workspace, "flash_bwd")
    attention(q, k, v, lookup=Lookup({"fwd": forward, "bwd": backward}, device="h200"))

Knows the kernels by what their questions say. Refuses to guess: what the notation of a problem cannot say has no champion.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from harness.errors import MissError
from harness.lookup import Database, Mode
from harness.problem import Dtype, Pass, Problem
from harness.space import Value

_DTYPES: Mapping[str, Dtype] = {
    "torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.float8_e4m3fn": "fp8e4m3",
    "torch.float8_e5m2": "fp8e5m2",
}  # fmt: skip

# Fields of a problem by what a question calls them. Values that a question does not give do not change what is near.
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "softcap": {"softcap": 1.0}, "slopes": {"alibi": True}, "bias": {"bias": "bhqk"}, "sinks": {"sinks": True},
    "mask": {"mask": "bhqk"}, "prefix": {"prefix": True}, "q_documents": {"documents": True},
    "kv_documents": {"documents": True}, "dropout": {"dropout": 0.5}, "dropout_seed": {}, "q_descale": {}, "k_descale": {},
    "v_descale": {},
}  # fmt: skip


# What of a question is asked, in this order.
PLAIN = (
    "pass_", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim", "dtype", "window_left",
    "window_right", "top_left", "deterministic", "variants",
)  # fmt: skip


class Question(Protocol):
    """One pass of one call, as `kernels.attention.Question` says it. Members are as there."""

    @property
    def pass_(self) -> Pass: ...
    @property
    def batch(self) -> int: ...
    @property
    def q_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def q_len(self) -> int: ...
    @property
    def kv_len(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def window_left(self) -> int | None: ...
    @property
    def window_right(self) -> int | None: ...
    @property
    def top_left(self) -> bool: ...
    @property
    def deterministic(self) -> bool: ...
    @property
    def variants(self) -> tuple[str, ...]: ...


@dataclass(eq=False)
class Lookup:
    """Answers with a config, or None where the kernel has to take its own; `databases` are those of the kernels by pass."""

    databases: Mapping[str, Database]
    device: str
    mode: Mode = "nearest"
    sibling: bool = False
    _answers: dict[Any, tuple[tuple[str, Value], ...]] = field(default_factory=dict)

    def __call__(self, question: Question) -> dict[str, Value] | None:
        """The config for a question. Raises `MissError` in the mode `require`."""
        found = self.answer(*(getattr(question, name) for name in PLAIN))
        return dict(found) if found else None

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def answer(self, *said: Any) -> Any:
        """The items of the config for a question that is said in the values of `PLAIN`, or nothing.

        `torch.compile` asks once for each graph, and keeps the answer.
        """
        try:
            return self._answers[said]
        except KeyError:
            found = self._find(SimpleNamespace(**dict(zip(PLAIN, said, strict=True))))
            self._answers[said] = tuple(found.items()) if found else ()
        return self._answers[said]

    def _find(self, question: Question) -> dict[str, Value] | None:
        problem, database = problem_of(question), self.databases.get(question.pass_)
        if problem is None or database is None:
            return None
        if problem.nondeterministic:
            # Who allows other bits takes a champion that uses this, or else one that does not.
            with contextlib.suppress(MissError):
                found = database.lookup(problem, self.device, self.mode, False, self.sibling)
                if found.match != "default":
                    return dict(found.config)
            problem = problem.replace(nondeterministic=False)
        return dict(database.lookup(problem, self.device, self.mode, question.deterministic, self.sibling).config)


def problem_of(question: Question) -> Problem | None:
    """The problem that a question is about, or None where the notation cannot say it."""
    dtype = _DTYPES.get(str(question.dtype))
    if dtype is None or any(name not in _VARIANTS for name in question.variants):
        return None
    variants: dict[str, Any] = {}
    for name in question.variants:
        variants |= _VARIANTS[name]
    causal, free = question.window_right == 0, question.pass_ == "bwd" and not question.deterministic
    return Problem(
        batch=question.batch, q_heads=question.q_heads, kv_heads=question.kv_heads, q_len=question.q_len,
        kv_len=question.kv_len, head_dim=question.head_dim, v_head_dim=question.v_head_dim, dtype=dtype, causal=causal,
        window_left=question.window_left, window_right=None if causal else question.window_right,
        top_left=question.top_left, pass_=question.pass_, nondeterministic=free, **variants,
    )  # fmt: skip
