"""The operation that a library calls: attention with its gradients, as PyTorch operators around the Triton kernels.

`attention` decides what is decided once per call (band, autocast, configurations) and calls `flashtune::attention_fwd`, whose
gradient is `flashtune::attention_bwd`, or where a variant is asked for `flashtune::attention_varied_fwd`. All are opaque to
`torch.compile` and know the shapes of their results, so that meta and fake tensors work. Refuses second derivatives, and to
choose a good configuration: `config` says one, `lookup` knows one, else the kernels take one that compiles everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import functions as registry
from . import primitives
from .operators import SLOTS, VARIANTS, Config, define_operators, define_paged, run_backward, run_forward


def _prefix(package: str) -> str:
    """Names of operators are global, and a later definition silently replaces an earlier one: a copy has names of its own."""
    return "attention" if package == "kernels" else f"{package.replace('.', '_')}_attention"


# Two pairs, because what PyTorch itself does on the host for a call that is differentiated grows with the square of the number
# of arguments: 0.16 ms for the 9 of plain attention, 0.46 ms for 28 (PyTorch 2.13).
PLAIN = define_operators(_prefix(__package__ or ""), (), run_forward, run_backward)
VARIED = define_operators(f"{_prefix(__package__ or '')}_varied", VARIANTS, run_forward, run_backward)
PAGED = define_paged(f"{_prefix(__package__ or '')}_paged")

_TENSORS = tuple(each.name for each in VARIANTS if each.kind == "Tensor")
_DIFFERENTIABLE = ("q", "k", "v", *(each.name for each in VARIANTS if each.gradient))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What `lookup` is asked: one pass ("fwd" or "bwd") of one call. `variants` names those that were given, "functions" among
    them. `deterministic` asks for a configuration whose results are equal bits whenever its inputs are, which those are of whose
    `structure` is not "atomic"."""

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
    softcap: float | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    prefix: Tensor | None = None,
    q_documents: Tensor | None = None,
    kv_documents: Tensor | None = None,
    q_starts: Tensor | None = None,
    kv_starts: Tensor | None = None,
    q_descale: Tensor | float | None = None,
    k_descale: Tensor | float | None = None,
    v_descale: Tensor | float | None = None,
    chunk: int | None = None,
    dropout: float | None = None,
    dropout_seed: int | None = None,
    functions: str | None = None,
    given: Sequence[Tensor | float] = (),
    config: Config | None = None,
    backward_config: Config | None = None,
    lookup: Lookup | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T inside the band) v, differentiable: out, or (out, lse) with `return_lse`.

    q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len, v_head_dim), any
    strides; query head h reads key head h // (q_heads / kv_heads). out (batch, q_heads, q_len, v_head_dim) in their type; lse
    (batch, q_heads, q_len), fp32 (fp64 for fp64), natural logarithm, differentiable. fp16, bf16, fp32 (fp64 in Triton's
    interpreter); under autocast q, k, v and bias are cast to its type. A row that sees no key and no sink has output 0 and lse
    -inf.

    Of 8 bits (float8_e4m3fn, float8_e5m2; from sm_89 on, not on AMD), q, k and v stand for what they hold times `q_descale`,
    `k_descale` and `v_descale`: fp32 (batch, kv_heads), each axis as long as that or 1, any strides, of packed sequences
    (sequences, kv_heads); or one number; or None, which is 1. They must be at least 0, which is not checked, because they lie on
    the device. out is bf16, weights are rounded to the type of v, and there is no gradient.

    `scale` None means 1/sqrt(head_dim). Query i sees keys i + o - left ... i + o + right for `window` = (left, right), None on
    a side being no bound, with o = kv_len - q_len, or 0 if `top_left`; `causal` is a right side of 0.

    A scaled score s becomes softcap * tanh(s / softcap), then less slopes (q_heads, or batch or 1 and q_heads) times the distance
    |j - i - o| of key j (ALiBi), then plus `bias`, then what `functions` make of it. `sinks` (q_heads) are scores of one more
    key per head whose value is 0. bias and `mask` (bool; true where a query may see a key) are (batch, q_heads, q_len, kv_len),
    each axis as long as that or 1. The first prefix (batch; integers) keys are visible to all queries whatever the band. Hidden
    are: keys of another chunk of so many positions (i + o, and j), keys of another document (numbers, (batch, q_len) and
    (batch, kv_len)), what `mask` or `functions` say.

    `dropout` is the probability with which a weight becomes 0, after the softmax; the others are divided by 1 - dropout. Which
    ones is a function of `dropout_seed` (0 ... 2^63 - 1), batch, head, query and key alone: give every call one of its own.

    Packed sequences lie one behind the other along the length of a batch of 1; q_starts and kv_starts (int32, sequences + 1) rise
    from 0 to q_len and to kv_len, which is not checked, because they lie on the device. Each is attention of its own, whose
    positions are counted from its beginning; bias, mask and functions cannot be combined with it.

    `functions` is a name that `functions.register_functions` gave to score and mask functions, `given` the tensors and numbers
    for them.

    Gradients go to q, k, v, bias and sinks. `config` and `backward_config` give every tunable of `flash_fwd` and `flash_bwd`.
    Where one is None, `lookup` is asked a `Question`; where that is None or answers None, the kernels' `safe_config` is taken.
    `torch.compile` follows `lookup`, so that one which opens files has to read them beforehand. `deterministic` is part of the
    question, and refuses a `backward_config` whose `structure` is "atomic", which gives other bits in every run.

    Raises `ValueError` for what does not go together, `NotImplementedError` for the gradient of any other tensor, for second
    derivatives and in forward mode.
    """
    band = _band(causal, window)
    _require_seed(dropout, dropout_seed)
    named: dict[str, Any] = {
        "bias": bias, "mask": mask, "slopes": slopes, "sinks": sinks, "prefix": prefix, "q_documents": q_documents,
        "kv_documents": kv_documents, "q_starts": q_starts, "kv_starts": kv_starts, "softcap": softcap, "chunk": chunk,
        "dropout": dropout or None, "dropout_seed": dropout_seed if dropout else None,
        "q_descale": _scale(q_descale, q), "k_descale": _scale(k_descale, q), "v_descale": _scale(v_descale, q),
    }  # fmt: skip
    present = tuple(name for name, value in named.items() if value is not None) + (("functions",) if functions else ())
    q, k, v, named["bias"] = _autocast(q.device.type, q, k, v, bias)
    travelling = _travelling(functions, given)
    tensors = {"q": q, "k": k, "v": v}
    if present:
        named |= _whole(q, slopes, sinks)
        tensors |= {name: named.pop(name) for name in _TENSORS} | dict(zip(SLOTS, travelling.tensors, strict=False))
        _require_differentiable(tensors)
    _refuse_tangents(tensors)
    if q.dtype in primitives.HEADROOM and torch.is_grad_enabled() and _learned(tensors):
        raise NotImplementedError(
            f"{_learned(tensors)[0]} requires a gradient, and attention of {q.dtype} has none: call it under torch.no_grad(), or "
            "convert q, k and v to bf16"
        )
    if lookup is not None:
        question = _question(q, k, v, band, top_left, deterministic, present)
        config = lookup(question) if config is None else config
        if backward_config is None and torch.is_grad_enabled() and _learned(tensors):
            backward_config = lookup(replace(question, pass_="bwd"))
    if deterministic and backward_config is not None and backward_config.get("structure") == "atomic":
        raise ValueError("structure='atomic' gives other bits in every run: say deterministic=False, or take 'separate'")
    settings = {
        "scale": scale, "window_left": band[0], "window_right": band[1], "top_left": top_left,
        "config": config_text(config), "backward_config": config_text(backward_config),
    }  # fmt: skip
    if present:
        out, lse = VARIED.forward(
            q, k, v, *(tensors.get(name) for name in (*_TENSORS, *SLOTS)), **settings, **named,
            functions=functions or "", given_kinds=travelling.kinds, given_floats=travelling.floats,
            given_ints=travelling.ints,
        )  # fmt: skip
    else:
        out, lse = PLAIN.forward(q, k, v, **settings)
    return (out, lse) if return_lse else out


def attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    kv_lengths: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    top_left: bool = False,
    config: Config | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of few queries to keys that lie in pages, for inference: out, or (out, lse) with `return_lse`, as `attention`.

    q (batch, q_heads, q_len, head_dim), k_pages (pages, kv_heads, rows, head_dim), v_pages (pages, kv_heads, rows, v_head_dim),
    any strides. Row j of sequence b is row j % rows of page block_table[b, j // rows], for j < kv_lengths[b]. block_table (batch,
    columns) and kv_lengths (batch) are int32 and lie on the device of q; that their pages exist, and that no length exceeds
    columns times rows, is not checked. Pages may be shared, and lie in any order; what belongs to no row is never read. A page
    has any number of rows from 1 on, for which a kernel is compiled.

    The band is that of `attention`, with each sequence's own length for kv_len: `causal` lets the last query see the last key.
    Many queries are answered too, but slower than need be. `config` gives every tunable of `flash_decode`; None takes one that
    compiles everywhere. Raises `ValueError` for what does not go together, `NotImplementedError` where a gradient is asked for.
    """
    left, right = _band(causal, window)
    q, k_pages, v_pages = _autocast(q.device.type, q, k_pages, v_pages)
    tensors = {"q": q, "k_pages": k_pages, "v_pages": v_pages}
    _refuse_tangents(tensors)
    learned = _learned(tensors)
    if learned and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{learned[0]} requires a gradient, and attention to pages has none: call it under torch.no_grad(), or take"
            " `attention`"
        )
    out, lse = PAGED(
        q, k_pages, v_pages, block_table, kv_lengths, scale=scale, window_left=left, window_right=right, top_left=top_left,
        config=config_text(config),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _question(
    q: Tensor, k: Tensor, v: Tensor, band: tuple[int | None, int | None], top_left: bool, deterministic: bool,
    present: tuple[str, ...],
) -> Question:  # fmt: skip
    primitives.require_inputs(q, k, v, eight_bits=True)
    return Question(
        pass_="fwd", batch=q.shape[0], q_heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=k.shape[2],
        head_dim=q.shape[3], v_head_dim=v.shape[3], dtype=q.dtype, device=q.device, window_left=band[0],
        window_right=band[1], top_left=top_left, deterministic=deterministic, variants=present,
    )  # fmt: skip


def _scale(scale: Tensor | float | None, q: Tensor) -> Tensor | None:
    """A scale as the kernels take it: of two axes, on the device."""
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        return scale.reshape(1, 1) if scale.ndim == 0 else scale
    return torch.full((1, 1), scale, dtype=torch.float32, device=q.device)


def _require_seed(dropout: float | None, seed: int | None) -> None:
    """Raise `ValueError` for dropout without a seed: with a seed of ours, every call would drop the same weights."""
    if dropout and seed is None:
        raise ValueError("dropout needs a dropout_seed, another one at every call, for instance drawn by torch.randint")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ValueError(f"dropout_seed must be at least 0 and below 2^63, found {seed}")


def _whole(q: Tensor, slopes: Tensor | None, sinks: Tensor | None) -> dict[str, Tensor]:
    """slopes with their axis of batches, and one sink for all heads once for each, as its gradient is made."""
    found = {}
    if slopes is not None and slopes.ndim == 1:
        found["slopes"] = slopes[None]
    if sinks is not None and sinks.ndim == 1 and sinks.shape[0] == 1 and q.ndim == 4:
        found["sinks"] = sinks.expand(q.shape[1])
    return found


def _travelling(functions: str | None, given: Sequence[Tensor | float]) -> registry.Given:
    """What functions are given, as an operator takes it. Raises `ValueError` where there are no functions."""
    if not functions and len(given):
        raise ValueError("given is for functions, and there are none: say which ones, by the name they are registered under")
    return registry.apart(given)


def _learned(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """The names of those whose gradient may be asked for."""
    return [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]


def _require_differentiable(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise `NotImplementedError` for a tensor that requires a gradient that does not exist: PyTorch would take it for 0."""
    wrong = [name for name in _learned(tensors) if name not in _DIFFERENTIABLE]
    if wrong and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{wrong[0]} requires a gradient, and attention has none of it (only of {', '.join(_DIFFERENTIABLE)}): detach it, or "
            "say the same by a bias"
        )


def _refuse_tangents(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise `NotImplementedError` in forward mode, in which PyTorch would take an operator's result for a constant."""
    for tensor in tensors.values():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "attention has no derivative in forward mode (jvp, dual numbers): take reverse mode, or an attention made of "
                "PyTorch's own operations"
            )


def _autocast(device: str, *tensors: Tensor | None) -> list[Any]:
    """The tensors in the type of autocast, where it is on; as by PyTorch's own rule, fp64 stays what it is, and so do 8 bits,
    which mean nothing without their scales."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    kept = (torch.float64, *primitives.HEADROOM)
    return [tensor if tensor is None or tensor.dtype in kept else tensor.to(dtype) for tensor in tensors]


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
