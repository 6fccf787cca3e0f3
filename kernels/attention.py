"""The operation that a library calls: attention with its gradients, as PyTorch operators around the Triton kernels.

`attention` decides what is decided once per call (band, autocast, configurations) and calls `flashtune::attention_fwd`, whose
gradient is `flashtune::attention_bwd`. Both are opaque to `torch.compile`, both know the shapes of their results, so that meta
and fake tensors work. Refuses second derivatives, and to choose a good configuration: `config` says one, `lookup` knows one,
else the kernels take one that compiles everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import primitives
from .operators import VARIANTS, Config, Operators, define_operators, run_backward, run_forward


def _prefix(package: str) -> str:
    """Names of operators are global, and a later definition silently replaces an earlier one: a copy has names of its own."""
    return "attention" if package == "kernels" else f"{package.replace('.', '_')}_attention"


OPERATORS = define_operators(
    _prefix(__package__ or ""), tuple(variant for variant in VARIANTS if variant.ready), run_forward, run_backward
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What `lookup` is asked: one pass ("fwd" or "bwd") of one call. `variants` names those that were given. `deterministic`
    asks for a configuration whose results are equal bits whenever its inputs are; today every one is of that kind."""

    pass_: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    window_left: int | None
    window_right: int | None
    top_left: bool
    deterministic: bool
    variants: tuple[str, ...]


Lookup = Callable[[Question], Config | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    top_left: bool = False,
    config: Config | None = None,
    backward_config: Config | None = None,
    lookup: Lookup | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    **variants: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T inside the band) v, differentiable: out, or (out, lse) with `return_lse`.

    q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len, v_head_dim), any
    strides; query head h reads key head h // (q_heads / kv_heads). out (batch, q_heads, q_len, v_head_dim) in their type; lse
    (batch, q_heads, q_len), fp32 (fp64 for fp64), natural logarithm, differentiable. fp16, bf16, fp32 (fp64 in Triton's
    interpreter); under autocast all three are cast to its type. A row that sees no key has output 0 and lse -inf.

    `scale` None means 1/sqrt(head_dim). Query i sees keys i + o - left ... i + o + right for `window` = (left, right), None on
    a side being no bound, with o = kv_len - q_len, or 0 if `top_left`; `causal` is a right side of 0.

    `config` and `backward_config` give every tunable of `flash_fwd` and `flash_bwd`. Where one is None, `lookup` is asked a
    `Question`; where that is None or answers None, the kernels' `safe_config` is taken. `torch.compile` follows `lookup`, so
    that one which opens files has to read them beforehand. `deterministic` is part of the question.

    Raises `ValueError` for tensors, windows or tunables that do not go together, `NotImplementedError` for one of `VARIANTS`
    that the kernels do not take yet, for second derivatives and in forward mode.
    """
    return apply_operators(
        OPERATORS, q, k, v, scale=scale, band=_band(causal, window), top_left=top_left, config=config,
        backward_config=backward_config, lookup=lookup, return_lse=return_lse, deterministic=deterministic,
        variants=variants,
    )  # fmt: skip


def apply_operators(
    operators: Operators,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    band: tuple[int | None, int | None] = (None, None),
    top_left: bool = False,
    config: Config | None = None,
    backward_config: Config | None = None,
    lookup: Lookup | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    variants: Mapping[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` by these operators; `band` is (window_left, window_right)."""
    named = _accepted(operators, variants)
    to_cast = {"q": q, "k": k, "v": v} | {each.name: named[each.name] for each in operators.variants if each.cast}
    cast = _autocast(q.device.type, to_cast)
    q, k, v = cast.pop("q"), cast.pop("k"), cast.pop("v")
    named |= cast
    tensors = [named.pop(each.name) for each in operators.variants if each.kind == "Tensor"]
    _refuse_tangents(q, k, v, *tensors)
    if lookup is not None:
        question = _question(q, k, v, band, top_left, deterministic, variants)
        learning = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (q, k, v, *tensors)
        )
        config = lookup(question) if config is None else config
        if backward_config is None and learning:
            backward_config = lookup(replace(question, pass_="bwd"))
    out, lse = operators.forward(
        q, k, v, *tensors, scale=scale, window_left=band[0], window_right=band[1], top_left=top_left, **named,
        config=config_text(config), backward_config=config_text(backward_config),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _question(
    q: Tensor, k: Tensor, v: Tensor, band: tuple[int | None, int | None], top_left: bool, deterministic: bool,
    variants: Mapping[str, Any],
) -> Question:  # fmt: skip
    primitives.require_inputs(q, k, v)
    return Question(
        pass_="fwd", batch=q.shape[0], q_heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=k.shape[2],
        head_dim=q.shape[3], v_head_dim=v.shape[3], dtype=q.dtype, device=q.device, window_left=band[0],
        window_right=band[1], top_left=top_left, deterministic=deterministic,
        variants=tuple(name for name, value in variants.items() if value is not None),
    )  # fmt: skip


def _accepted(operators: Operators, variants: Mapping[str, Any]) -> dict[str, Any]:
    """A value, or None, for every variant of the operators. Raises for one that is not theirs."""
    known = {each.name: each for each in VARIANTS}
    ready = [each.name for each in operators.variants]
    for name, value in variants.items():
        if name not in known and name not in ready:
            raise TypeError(f"attention has no argument `{name}`; beside those of its signature it knows {', '.join(known)}")
        if name not in ready and value is not None:
            raise NotImplementedError(f"the kernels do not take `{name}` yet ({known[name].meaning}): leave it out")
    return {name: variants.get(name) for name in ready}


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise `NotImplementedError` in forward mode, in which PyTorch would take an operator's result for a constant."""
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "attention has no derivative in forward mode (jvp, dual numbers): take reverse mode, or an attention made of "
                "PyTorch's own operations"
            )


def _autocast(device: str, tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """The tensors in the type of autocast, where it is on; as by PyTorch's own rule, fp64 stays what it is."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return dict(tensors)
    dtype = torch.get_autocast_dtype(device)
    return {
        name: tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for name, tensor in tensors.items()
    }


def _band(causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """(window_left, window_right). Raises `ValueError` for a window that is negative or contradicts `causal`."""
    left, right = (None, None) if window is None else window
    for name, side in (("left", left), ("right", right)):
        if side is not None and side < 0:
            raise ValueError(f"the {name} side of window must be at least 0, found {side}; None is no bound")
    if causal and right not in (None, 0):
        raise ValueError(f"a causal window ends at the diagonal, found a right side of {right}; leave out causal")
    return left, 0 if causal else right


def config_text(config: Config | None) -> str:
    """A configuration as canonical JSON (sorted, without spaces), which an operator's schema allows; None is "".

    Written out because `torch.compile` follows this and not `json.dumps`. Raises `TypeError` for a value that is no whole
    number, truth value or plain word.
    """
    if config is None:
        return ""
    return "{" + ",".join(f'"{_word(name)}":{_value_text(name, config[name])}' for name in sorted(config)) + "}"


def _value_text(name: str, value: int | str | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return f'"{_word(value)}"'
    raise TypeError(f"a config maps names to whole numbers, truth values and words, found {name} = {value!r}")


def _word(text: str) -> str:
    if not isinstance(text, str) or '"' in text or "\\" in text:
        raise TypeError(f"names and words in a config are strings without quotes and backslashes, found {text!r}")
    return text
