"""The two operators that PyTorch sees, what may be given to them, and how that reaches the Triton kernels.

`define_operators` makes a forward and a backward operator out of two functions that compute, and of a table of arguments
beside q, k and v: their schemas, shapes for meta and fake tensors, derivatives. Refuses second derivatives, and to decide
anything: a configuration comes as text, and is the kernels' `safe_config` where there is none.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import flash_bwd, flash_fwd, primitives

Config = Mapping[str, int | str | bool]

# ---------------------------------------------------------------------------------------------------------------------
# What may be given beside q, k and v
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An optional argument that changes what is computed. The kernels take it as a keyword of the same name.

    `kind` is its type in the operators' schemas: "Tensor", "float" or "int". `gradient`: the backward kernel returns one, in
    the shape of the argument and in the order of the table, behind dq, dk and dv. `cast`: autocast casts it as it casts q.
    `ready`: the kernels take it; what they do not take yet is refused by name.
    """

    name: str
    kind: str
    meaning: str
    gradient: bool = False
    cast: bool = False
    ready: bool = False


# To add one: an entry here, and a keyword of that name in `flash_fwd.flash_fwd` and `flash_bwd.flash_bwd`.
VARIANTS = (
    Variant(name="bias", kind="Tensor", gradient=True, cast=True,
            meaning="added to the scaled scores: (batch, q_heads, q_len, kv_len), each axis as long as that or 1"),
    Variant(name="mask", kind="Tensor", meaning="false where a query must not see a key: bool, axes like those of bias"),
    Variant(name="slopes", kind="Tensor", meaning="the slopes of ALiBi: (batch, q_heads), or (q_heads)"),
    Variant(name="sinks", kind="Tensor", gradient=True, meaning="a score per head that only the normaliser sees: (q_heads)"),
    Variant(name="prefix", kind="Tensor", meaning="how many first keys every query of a sequence sees: (batch)"),
    Variant(name="q_documents", kind="Tensor", meaning="the document of each query: (batch, q_len)"),
    Variant(name="kv_documents", kind="Tensor", meaning="the document of each key: (batch, kv_len)"),
    Variant(name="softcap", kind="float", meaning="a score s becomes softcap * tanh(s / softcap)"),
    Variant(name="chunk", kind="int", meaning="queries see only keys of their own chunk of so many positions"),
    Variant(name="dropout", kind="float", meaning="the probability with which a weight is dropped"),
    Variant(name="dropout_seed", kind="int", meaning="decides which weights are dropped"),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The operators
# ---------------------------------------------------------------------------------------------------------------------

# What every kernel takes, given or not.
_ALWAYS = ("scale", "window_left", "window_right", "top_left")


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
    """Define `flashtune::PREFIX_fwd` and `flashtune::PREFIX_bwd`, replacing operators of these names.

    Tensors are positional, everything else is named, and nothing has a default: the dispatcher leaves out arguments that
    equal theirs. What the two functions are called with is said at `run_forward` and `run_backward`.
    """
    inputs = ("q", "k", "v", *(each.name for each in variants if each.kind == "Tensor"))
    gradients = tuple(each.name for each in variants if each.gradient)
    saved = (*inputs, "out", "lse")
    received = (*saved, "dout", "dlse")
    read = "Tensor q, Tensor k, Tensor v" + "".join(f", Tensor? {name}" for name in inputs[3:])
    said = "float? scale, SymInt? window_left, SymInt? window_right, bool top_left"
    said += "".join(f", {each.kind}? {each.name}" for each in variants if each.kind != "Tensor")
    found = ", ".join(["Tensor"] * (3 + len(gradients)))

    def forward(*given: Tensor | None, config: str, backward_config: str, **named: Any) -> tuple[Tensor, Tensor]:
        return compute_forward(_present(inputs, given), _settings(named), config)

    def forward_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None, **__: Any) -> tuple[Tensor, Tensor]:
        primitives.require_inputs(q, k, v)
        lse_type = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=lse_type)

    def backward(*given: Tensor | None, config: str, wanted: list[bool], **named: Any) -> tuple[Tensor, ...]:
        asked = dict(zip(gradients, wanted, strict=True))
        return compute_backward(_present(received, given), _settings(named), config, asked)

    def backward_shapes(*given: Tensor | None, wanted: list[bool], **_: Any) -> tuple[Tensor, ...]:
        present = _present(received, given)
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


def _present(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def _settings(named: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of the kernels: a number that was not given is left out."""
    return {name: value for name, value in named.items() if name in _ALWAYS or value is not None}


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


def run_backward(
    given: Mapping[str, Tensor], settings: Mapping[str, Any], config: str, wanted: Mapping[str, bool]
) -> tuple[Tensor, ...]:
    """dq, dk, dv by `flash_bwd`; `given` holds out, lse, dout and perhaps dlse as well, the rest is as in `run_forward`.

    `wanted` says of every variant with a gradient whether it is needed; one that is not is an empty tensor. None is ready yet.
    """
    _require_runnable(given, settings)
    q, k, v, dout = (given[name] for name in ("q", "k", "v", "dout"))
    chosen = _chosen(config, flash_bwd.safe_config(q, v), "flash_bwd")
    with torch.cuda.device_of(q):
        tensors = dict(given) | _described(chosen, q=q, k=k, v=v, dout=dout)
        if "dlse" in tensors:
            return _with_dlse(tensors, settings, chosen)
        return flash_bwd.flash_bwd(**tensors, **settings, config=chosen)


def _with_dlse(
    tensors: dict[str, Tensor], settings: Mapping[str, Any], config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients where lse has one too. THE ONE PLACE THAT KNOWS HOW `dlse` REACHES THE KERNELS: once `flash_bwd.flash_bwd`
    takes `dlse=`, `run_backward` passes it on like any other tensor, and this function goes.

    The derivative of lse by score j is P_j, so dS = P (dP - delta + dlse): the kernels have to subtract delta - dlse. It is
    put right between the first launch, which makes delta, and the others, which read it. An empty row depends on nothing,
    whatever its dlse is.
    """
    dlse = tensors.pop("dlse")
    q, k, v, lse = (tensors[name] for name in ("q", "k", "v", "lse"))
    scale = settings["scale"] if settings["scale"] is not None else 1.0 / math.sqrt(q.shape[3])
    results = {"dq": q.new_empty(q.shape), "dk": k.new_empty(k.shape), "dv": v.new_empty(v.shape)}
    scratch = {
        name: q.new_empty(shape, dtype=dtype) for name, (shape, dtype) in flash_bwd.workspaces(**tensors).items()
    }
    keywords = {**settings, "scale": scale, **config}
    rows, *products = flash_bwd.launches(**tensors, **results, **scratch, **keywords)
    rows.run()
    scratch["delta"] -= dlse.masked_fill(lse == -math.inf, 0.0)
    for launch in products:
        launch.run()
    return results["dq"], results["dk"], results["dv"]


def _require_runnable(given: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless all tensors lie on one device, on which Triton runs, and the scale is a number."""
    q = given["q"]
    for name, tensor in given.items():
        if tensor.device != q.device:
            raise ValueError(f"all tensors must lie on one device, found q on {q.device} and {name} on {tensor.device}")
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
