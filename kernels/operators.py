"""The two operators that PyTorch sees, what may be given to them, and how that reaches the Triton kernels.

`define_operators` makes a forward and a backward operator out of two functions that compute, and of a table of arguments
beside q, k and v: their schemas, shapes for meta and fake tensors, derivatives. Refuses second derivatives, and to decide
anything: a configuration comes as text, and is the kernels' `safe_config` where there is none. Functions of the caller come by
name, see `functions`.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import flash_bwd, flash_decode, flash_fwd, functions, paged, primitives, variants
from .functions import Given

Config = Mapping[str, int | str | bool]

# ---------------------------------------------------------------------------------------------------------------------
# What may be given beside q, k and v
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An optional argument that changes what is computed. The kernels take it as a keyword of the same name.

    `kind` is its type in the operators' schemas: "Tensor", "float" or "SymInt". `gradient`: the backward kernel fills one, in the
    shape of the argument, as a keyword of its name behind a d; it comes in the order of the table, behind dq, dk and dv.
    """

    name: str
    kind: str
    meaning: str
    gradient: bool = False


# To add one: an entry here, a parameter of `attention.attention`, and a keyword of `flash_fwd.launches`, `flash_bwd.launches` and
# `variants.variant_of`. A number that changes from call to call is a SymInt, or torch.compile would compile for each.
VARIANTS = (
    Variant(name="bias", kind="Tensor", gradient=True,
            meaning="added to the scaled scores: (batch, q_heads, q_len, kv_len), each axis as long as that or 1"),
    Variant(name="mask", kind="Tensor", meaning="false where a query must not see a key: bool, axes like those of bias"),
    Variant(name="slopes", kind="Tensor", meaning="the slopes of ALiBi: (batch or 1, q_heads), or (q_heads)"),
    Variant(name="sinks", kind="Tensor", gradient=True, meaning="a score per head that only the normaliser sees: (q_heads)"),
    Variant(name="prefix", kind="Tensor", meaning="how many first keys every query of a sequence sees: (batch)"),
    Variant(name="q_documents", kind="Tensor", meaning="the document of each query: (batch, q_len)"),
    Variant(name="kv_documents", kind="Tensor", meaning="the document of each key: (batch, kv_len)"),
    Variant(name="q_starts", kind="Tensor", meaning="where packed sequences begin, and the end: int32 (sequences + 1)"),
    Variant(name="kv_starts", kind="Tensor", meaning="the same of their keys: int32 (sequences + 1)"),
    Variant(name="q_descale", kind="Tensor", meaning="what q of 8 bits is multiplied with: fp32 (batch or 1, kv_heads or 1)"),
    Variant(name="k_descale", kind="Tensor", meaning="the same of k; of packed sequences (sequences or 1, kv_heads or 1)"),
    Variant(name="v_descale", kind="Tensor", meaning="the same of v"),
    Variant(name="softcap", kind="float", meaning="a score s becomes softcap * tanh(s / softcap)"),
    Variant(name="chunk", kind="SymInt", meaning="queries see only keys of their own chunk of so many positions"),
    Variant(name="dropout", kind="float", meaning="the probability with which a weight is dropped"),
    Variant(name="dropout_seed", kind="SymInt", meaning="decides which weights are dropped"),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The operators
# ---------------------------------------------------------------------------------------------------------------------

# What every kernel takes, given or not.
_ALWAYS = ("scale", "window_left", "window_right", "top_left")
# How functions of the caller travel.
SLOTS = tuple(f"given_{i}" for i in range(functions.MOST_TENSORS))
_NUMBERS = "str functions, str given_kinds, float[] given_floats, SymInt[] given_ints"


@dataclass(frozen=True, slots=True, eq=False)
class Operators:
    """The two operators, and the variants that their schemas hold."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    variants: tuple[Variant, ...]


def define_operators(
    prefix: str,
    variants: tuple[Variant, ...],
    compute_forward: Callable[..., tuple[Tensor, Tensor]],
    compute_backward: Callable[..., tuple[Tensor, ...]],
) -> Operators:
    """Define `flashtune::PREFIX_fwd` and `flashtune::PREFIX_bwd`, replacing operators of these names; they take functions of the
    caller too, unless they take no variants.

    Tensors are positional, everything else is named, and nothing has a default: the dispatcher leaves out arguments that equal
    theirs. What the two functions are called with is said at `run_forward` and `run_backward`.
    """
    inputs = ("q", "k", "v", *(each.name for each in variants if each.kind == "Tensor"), *(SLOTS if variants else ()))
    gradients = tuple(each.name for each in variants if each.gradient)
    saved = (*inputs, "out", "lse")
    received = (*saved, "dout", "dlse")
    read = "Tensor q, Tensor k, Tensor v" + "".join(f", Tensor? {name}" for name in inputs[3:])
    said = "float? scale, SymInt? window_left, SymInt? window_right, bool top_left"
    said += "".join(f", {each.kind}? {each.name}" for each in variants if each.kind != "Tensor")
    said += f", {_NUMBERS}" if variants else ""
    found = ", ".join(["Tensor"] * (3 + len(gradients)))

    def forward(*tensors: Tensor | None, config: str, backward_config: str, **named: Any) -> tuple[Tensor, Tensor]:
        return compute_forward(*_keywords(inputs, tensors, named), config)

    def forward_shapes(*tensors: Tensor | None, config: str, backward_config: str, **named: Any) -> tuple[Tensor, Tensor]:
        given, settings = _keywords(inputs, tensors, named)
        q, v = given["q"], given["v"]
        _require_sense(given, settings)
        return _results(q, v)

    def backward(*tensors: Tensor | None, config: str, wanted: list[bool], **named: Any) -> tuple[Tensor, ...]:
        asked = dict(zip(gradients, wanted, strict=True))
        return compute_backward(*_keywords(received, tensors, named), config, asked)

    def backward_shapes(*tensors: Tensor | None, wanted: list[bool], **_: Any) -> tuple[Tensor, ...]:
        present = _present(received, tensors)
        asked = dict.fromkeys(("q", "k", "v"), True) | dict(zip(gradients, wanted, strict=True))
        return tuple(
            present[name].new_empty(present[name].shape) if needed else present["q"].new_empty(0)
            for name, needed in asked.items()
        )

    def remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Mapping[str, Any], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)
        ctx.named = dict(keyword_only_inputs)

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * len(inputs)
        if ctx.named.get("functions"):
            functions.require_slope(ctx.named["functions"])
        present = dict(zip(saved, ctx.saved_tensors, strict=True))
        needed = dict(zip(inputs, ctx.needs_input_grad, strict=True))
        named = {name: value for name, value in ctx.named.items() if name not in ("config", "backward_config")}
        results = backward_op(
            *present.values(), torch.zeros_like(present["out"]) if dout is None else dout, dlse, **named,
            config=ctx.named["backward_config"], wanted=[needed[name] for name in gradients],
        )  # fmt: skip
        by_name = dict(zip(("q", "k", "v", *gradients), results, strict=True))
        return tuple(by_name.get(name) if needed[name] else None for name in inputs)

    forward_op = torch.library.custom_op(
        f"flashtune::{prefix}_fwd", forward, mutates_args=(),
        schema=f"({read}, *, {said}, str config, str backward_config) -> (Tensor, Tensor)",
    )  # fmt: skip
    backward_op = torch.library.custom_op(
        f"flashtune::{prefix}_bwd", backward, mutates_args=(),
        schema=f"({read}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, *, {said}, str config, bool[] wanted)"
        f" -> ({found})",
    )  # fmt: skip
    forward_op.register_fake(forward_shapes)
    backward_op.register_fake(backward_shapes)
    forward_op.register_autograd(differentiate, setup_context=remember)
    backward_op.register_autograd(_refuse_second_derivative)
    return Operators(forward_op, backward_op, variants)


def define_paged(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Define `flashtune::NAME`: attention of few queries to paged keys by `flash_decode`, which has no gradient."""

    def forward(*tensors: Tensor, config: str, **settings: Any) -> tuple[Tensor, Tensor]:
        return run_paged(dict(zip(_PAGED, tensors, strict=True)), settings, config)

    def shapes(*tensors: Tensor, config: str, **settings: Any) -> tuple[Tensor, Tensor]:
        q, k, v, table, lengths = tensors
        _require_one_device(dict(zip(_PAGED, tensors, strict=True)), {})
        paged.pages_of(q, k, v, table, lengths, top_left=settings["top_left"])
        return _results(q, v)

    read = ", ".join(f"Tensor {each}" for each in _PAGED)
    operator = torch.library.custom_op(
        f"flashtune::{name}", forward, mutates_args=(),
        schema=f"({read}, *, float? scale, SymInt? window_left, SymInt? window_right, bool top_left, str config)"
        " -> (Tensor, Tensor)",
    )  # fmt: skip
    operator.register_fake(shapes)
    return operator


_PAGED = ("q", "k", "v", "block_table", "kv_lengths")


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse, with nothing in them."""
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=primitives.stored_as(q.dtype))
    return out, q.new_empty(q.shape[:3], dtype=primitives.statistics_as(q.dtype))


def _present(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def _keywords(
    names: tuple[str, ...], tensors: tuple[Tensor | None, ...], named: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the kernels take: tensors by name, and the rest. What was not given is left out, and functions are put together."""
    given = _present(names, tensors)
    slots = [given.pop(name) for name in SLOTS if name in given]
    settings = {name: value for name, value in named.items() if name in _ALWAYS or value is not None}
    name, *numbers = (settings.pop(key, "") for key in ("functions", "given_kinds", "given_floats", "given_ints"))
    if name:
        kinds, floats, ints = numbers
        settings["functions"] = functions.together(name, Given(kinds, slots, floats, ints))
    return given, settings


def _require_sense(given: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the tensors and the numbers go together, as the kernels would."""
    _require_one_device(given, settings)
    primitives.require_inputs(*(given[name] for name in ("q", "k", "v")), eight_bits=True)
    added = {name: tensor for name, tensor in given.items() if name not in ("q", "k", "v")}
    added |= {name: value for name, value in settings.items() if name not in _ALWAYS}
    variants.variant_of(given["q"], given["k"], **added)


def _require_one_device(given: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless all tensors lie on one device, those for functions too."""
    q = given["q"]
    of_functions = settings["functions"].given or () if "functions" in settings else ()
    numbered = {f"given[{i}]": value for i, value in enumerate(of_functions) if isinstance(value, Tensor)}
    for name, tensor in {**given, **numbered}.items():
        if tensor.device != q.device:
            raise ValueError(f"all tensors must lie on one device, found q on {q.device} and {name} on {tensor.device}")


def _refuse_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "attention has first derivatives only, but its gradients were differentiated: take an attention made of PyTorch's own "
        "operations for that term, for instance scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What they run
# ---------------------------------------------------------------------------------------------------------------------


def run_forward(given: Mapping[str, Tensor], settings: Mapping[str, Any], config: str) -> tuple[Tensor, Tensor]:
    """out and lse by `flash_fwd`. `given` holds the tensors that were given, by name; `settings` are keywords of the kernel;
    `config` is the text of a configuration, or empty. Raises `ValueError` for what does not go together."""
    _require_runnable(given, settings)
    q, k, v = (given[name] for name in ("q", "k", "v"))
    chosen = _chosen(config, flash_fwd.safe_config(q, v), "flash_fwd")
    with torch.cuda.device_of(q):
        tensors = dict(given) | _described(chosen, q=q, k=k, v=v)
        return flash_fwd.flash_fwd(**tensors, **settings, config=chosen)


def run_paged(given: Mapping[str, Tensor], settings: Mapping[str, Any], config: str) -> tuple[Tensor, Tensor]:
    """out and lse by `flash_decode` from q, pools k and v, block_table and kv_lengths; else as `run_forward`."""
    _require_runnable(given, settings)
    q, k, v, table, lengths = (given[name] for name in _PAGED)
    paged.pages_of(q, k, v, table, lengths, top_left=settings["top_left"])
    chosen = _chosen(config, flash_decode.safe_config(q, k, v, table), "flash_decode")
    with torch.cuda.device_of(q):
        return flash_decode.flash_decode(**given, **settings, config=chosen)


def run_backward(
    given: Mapping[str, Tensor], settings: Mapping[str, Any], config: str, wanted: Mapping[str, bool]
) -> tuple[Tensor, ...]:
    """dq, dk, dv by `flash_bwd`; `given` holds out, lse, dout and perhaps dlse as well, the rest is as in `run_forward`.

    `wanted` says of every variant with a gradient whether it is needed; one that is not is an empty tensor.
    """
    _require_runnable(given, settings)
    q, k, v, dout = (given[name] for name in ("q", "k", "v", "dout"))
    chosen = _chosen(config, flash_bwd.safe_config(q, v), "flash_bwd")
    with torch.cuda.device_of(q):
        tensors = dict(given) | _described(chosen, q=q, k=k, v=v, dout=dout)
        added = {f"d{name}": given[name].new_empty(given[name].shape) for name, needed in wanted.items() if needed}
        # Whoever asked has allowed it: `attention` refuses such a configuration otherwise.
        settings = {**settings, "nondeterministic": chosen["structure"] == "atomic"}
        results = flash_bwd.flash_bwd(**tensors, **settings, **added, config=chosen)
    return (*results, *(added[f"d{name}"] if needed else q.new_empty(0) for name, needed in wanted.items()))


def _require_runnable(given: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless all tensors lie on one device, on which Triton runs, and the scale is a number."""
    _require_one_device(given, settings)
    q = given["q"]
    if q.device.type == "cpu" and not primitives.INTERPRETED.value:
        raise ValueError(
            "attention runs on a GPU, found tensors on the CPU: move them, or set TRITON_INTERPRET=1 before Triton is imported"
        )
    if settings["scale"] is not None and not math.isfinite(settings["scale"]):
        raise ValueError(f"scale must be None or a finite number, found {settings['scale']}")


@functools.lru_cache(maxsize=1024)
def _read_config(text: str) -> Config:
    found: Config = json.loads(text)
    return found


def _chosen(text: str, safe: Config, kernel: str) -> Config:
    """The configuration that `text` holds, or `safe`. Raises `ValueError` unless it gives the same names as `safe`."""
    if not text:
        return safe
    config = _read_config(text)
    missing, unknown = sorted(safe.keys() - config.keys()), sorted(config.keys() - safe.keys())
    if missing or unknown:
        found = [f"without {', '.join(missing)}"] if missing else []
        found += [f"with {', '.join(unknown)}, which it does not have"] if unknown else []
        raise ValueError(f"a config must give every tunable of {kernel} and nothing else, found one {' and '.join(found)}")
    return config


def _described(config: Config, **matrices: Tensor) -> dict[str, Tensor]:
    """The same tensors; where `config` asks for descriptors, one that they cannot describe as it lies is copied.

    Callers choose how q, k and v lie, but not how a gradient does: all strides of that of `out.sum()` are 0.
    """
    asked = set(config.values())
    bound = matrices.keys() if "tma" in asked else {"k", "v"} if "tma_kv" in asked else set()
    return {
        name: tensor if name not in bound or _describable(name, tensor) else tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in matrices.items()
    }


def _describable(name: str, tensor: Tensor) -> bool:
    try:
        primitives.require_tma(**{name: tensor})
    except ValueError:
        return False
    # One descriptor may span the heads of a group.
    return tensor.stride(1) > 0
