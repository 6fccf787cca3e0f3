"""The two operations: which tensors go in and come out, their shapes, and the words that a kernel's `launches` takes.

Refuses to run anything and to import a kernel.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from harness.notation import EIGHT_BITS
from harness.problem import PAIR_AXES, Dtype, Pass, Problem


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

# What a field of the problem adds to the inputs of both passes, and the gradients it adds to the outputs of the backward pass.
_ADDED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alibi": (("slopes",), ()),
    "bias": (("bias",), ("dbias",)),
    "sinks": (("sinks",), ("dsinks",)),
    "prefix": (("prefix",), ()),
    "documents": (("q_documents", "kv_documents"), ()),
    "mask": (("mask",), ()),
    "packed": (("q_starts", "kv_starts"), ()),
    "paged": (("block_table", "kv_lengths"), ()),
}
# What inputs of 8 bits are multiplied with.
SCALES = ("q_descale", "k_descale", "v_descale")
# Inputs of both passes beside q, k and v.
ADDED_INPUTS = (*(name for inputs, _ in _ADDED.values() for name in inputs), *SCALES)

# What `launches` is told of the problem beside its tensors; its other keyword-only parameters are tunables. All problems
# have the first ones.
_ALWAYS = ("scale", "window_left", "window_right", "top_left")
PROBLEM_KEYWORDS = (*_ALWAYS, "softcap", "chunk", "dropout", "dropout_seed", "nondeterministic")
# Keywords of `launches` that are for callers: no part of a problem, and no tunables.
CALLER_KEYWORDS = ("functions", "multiprocessors")

# Any number whose halves both matter.
DROPOUT_SEED = 0x2545F4914F6CDD1D


def operation_for(problem: Problem) -> Operation:
    """The pass of the problem, with the tensors that it adds to plain attention."""
    plain = FORWARD if problem.pass_ == "fwd" else BACKWARD
    added = [_ADDED[name] for name in problem.variants if name in _ADDED]
    added += [(SCALES, ())] if problem.eight_bits else []
    if not added and not problem.lse_grad:
        return plain
    inputs = tuple(name for names, _ in added for name in names) + (("dlse",) if problem.lse_grad else ())
    outputs = tuple(name for _, names in added for name in names) if problem.pass_ == "bwd" else ()
    return Operation(plain.pass_, plain.inputs + inputs, plain.outputs + outputs)


def shapes(problem: Problem) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype name)} of all tensors of the problem's operation, in its order.

    lse and what belongs to it, slopes, sinks and scales are fp32, masks "bool", prefixes, documents, starts, lengths and tables
    "int32", out and bias bf16 where q, k and v have 8 bits, the rest as the problem says. Paged keys and values are (pages,
    kv_heads, rows of a page, head dim), one page more than the table could name.
    """
    queries, keys = (problem.batch, problem.q_heads, problem.q_len), (problem.batch, problem.kv_heads, problem.kv_len)
    pages = -(-problem.kv_len // (problem.paged or 1))
    if problem.paged is not None:
        keys = (problem.batch * pages + 1, problem.kv_heads, problem.paged)
    like_q, like_k = (*queries, problem.head_dim), (*keys, problem.head_dim)
    like_v, like_out = (*keys, problem.v_head_dim), (*queries, problem.v_head_dim)
    every = {
        "q": like_q, "k": like_k, "v": like_v, "out": like_out, "lse": queries, "dout": like_out, "dlse": queries,
        "dq": like_q, "dk": like_k, "dv": like_v,
        "slopes": (problem.batch, problem.q_heads), "bias": pair_shape(problem, problem.bias),
        "dbias": pair_shape(problem, problem.bias), "sinks": (problem.q_heads,), "dsinks": (problem.q_heads,),
        "prefix": (problem.batch,), "q_documents": (problem.batch, problem.q_len),
        "kv_documents": (problem.batch, problem.kv_len), "q_starts": ((problem.packed or 0) + 1,),
        "kv_starts": ((problem.packed or 0) + 1,), "mask": pair_shape(problem, problem.mask),
        "block_table": (problem.batch, pages), "kv_lengths": (problem.batch,),
        **dict.fromkeys(SCALES, (problem.packed or problem.batch, problem.kv_heads)),
    }  # fmt: skip
    stored = {**dict.fromkeys(("out", "bias"), "bf16"), **_STORED} if problem.eight_bits else _STORED
    return {name: (every[name], stored.get(name, problem.dtype)) for name in operation_for(problem).tensors}


_STORED: Mapping[str, str] = {
    **dict.fromkeys(("lse", "dlse", "slopes", "sinks", "dsinks", *SCALES), "fp32"),
    **dict.fromkeys(
        ("prefix", "q_documents", "kv_documents", "q_starts", "kv_starts", "block_table", "kv_lengths"), "int32"
    ),
    "mask": "bool",
}


def pair_shape(problem: Problem, letters: str | None) -> tuple[int, ...]:
    """The shape of a tensor of pairs that has the axes in `letters`: one element along the others."""
    sizes = (problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
    return tuple(size if axis in (letters or "") else 1 for axis, size in zip(PAIR_AXES, sizes, strict=True))


def lacks(launches: Callable[..., Any], problem: Problem) -> str | None:
    """What of `problem` a kernel's `launches` has no parameter for, in words; None if it has all."""
    parameters = inspect.signature(launches).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    wanted = (*operation_for(problem).tensors, *problem_keywords(problem))
    missing = [name for name in wanted if name not in parameters]
    return f"has no {' and no '.join(missing)}" if missing else None


def problem_keywords(problem: Problem) -> Mapping[str, Any]:
    """Those of `PROBLEM_KEYWORDS` that this problem has, with their values; causal is a right window of 0."""
    numbers = ("softcap", "chunk", "nondeterministic")
    added: dict[str, Any] = {name: getattr(problem, name) for name in numbers if name in problem.variants}
    if problem.dropout:
        added |= {"dropout": problem.dropout, "dropout_seed": DROPOUT_SEED}
    return added | {
        "scale": problem.softmax_scale,
        "window_left": problem.window_left,
        "window_right": problem.right,
        "top_left": problem.top_left,
    }


# What a kernel's `launches` must take for a field beyond plain attention, where that is not its tensors.
_KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "softcap": ("softcap",), "chunk": ("chunk",), "dropout": ("dropout", "dropout_seed"),
}  # fmt: skip


def supported(parameters: Collection[str], pass_: Pass) -> tuple[str, ...]:
    """Which fields of a problem beyond plain attention a kernel takes, whose `launches` has these parameters."""
    needed: dict[str, tuple[str, ...]] = dict(_KEYWORDS)
    needed |= {name: names + gradients * (pass_ == "bwd") for name, (names, gradients) in _ADDED.items()}
    needed |= {"lse_grad": ("dlse",), "nondeterministic": ("nondeterministic",)} if pass_ == "bwd" else {}
    return tuple(name for name, wanted in needed.items() if set(wanted) <= set(parameters))


def dtypes_of(parameters: Collection[str]) -> tuple[Dtype, ...]:
    """The types of q, k and v that a kernel may take, whose `launches` has these parameters."""
    return tuple(name for name in get_args(Dtype) if name not in EIGHT_BITS or set(SCALES) <= set(parameters))


def permitting(problem: Problem, config: Mapping[str, Any]) -> Problem:
    """The problem, and the permission that a config needs: atomic additions come in another order in every run."""
    return problem.replace(nondeterministic=True) if config.get("structure") == "atomic" else problem


def tunables(launches: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the tunables of a kernel's `launches`, in its order."""
    parameters = inspect.signature(launches).parameters.values()
    keywords = (parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name in keywords if name not in (*PROBLEM_KEYWORDS, *CALLER_KEYWORDS))
