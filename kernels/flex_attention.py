"""Forward attention as PyTorch's FlexAttention computes it, compiled with `kernel_options` that a search may choose.

It launches nothing itself: `launches` gives one `Call`, in which the problem's mask is a `mask_mod` with its `BlockMask`, and
what changes scores is a `score_mod`. On a GPU `torch.compile` makes Triton code of it; on a CPU FlexAttention's own reference
computes the same in fp64, which shows whether the problem was put right and nothing of what the options decide (`UNSEEN`).

Tunables: `block_m`, `block_n`, `num_warps`, `num_stages`, `use_tma` are `kernel_options` of that name (in capitals, with the
prefix `fwd_`); `sparse` is the side of a block of the BlockMask, 0 where the problem needs none. PyTorch promises nothing
about these options from one release to the next; this was written for 2.11 to 2.13.
"""

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from .launch import Call

PASS = "fwd"
FAMILY = "flex_attention"
# What no run on a CPU shows: it is PyTorch's reference in fp64 that runs there.
UNSEEN = ("kernel_options", "BlockMask", "generated Triton code", "roundings", "races", "compiler")

# Of lengths that this divides, FlexAttention's code does not look whether a tile ends behind them.
_CHECKED = 128
# Compiled functions of judged problems that are kept: one serves many lengths.
_KEPT = 64
# Tensors that the functions of a problem read.
CAPTURED = ("slopes", "bias", "prefix", "q_documents", "kv_documents", "mask")
# Which captured tensors make a mask differ from batch to batch.
_OF_BATCHES = ("prefix", "q_documents")

Band = tuple[Any, Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What PyTorch is asked for, without its tensors: everything that is part of the code.

    `left`, `right` bound the band (None: no bound), `offset` is the key position of query 0's diagonal; `options` are the
    `kernel_options`, `sparse` the side of a block of the BlockMask, 0 for none. `captured` names the tensors that the functions
    read. `backward` asks for gradients.
    """

    scale: float
    left: int | None
    right: int | None
    offset: int
    softcap: float | None
    chunk: int | None
    captured: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    sparse: int
    backward: bool = False

    @property
    def masked(self) -> bool:
        """Whether anything is hidden."""
        return (self.left, self.right, self.chunk) != (None, None, None) or bool(
            {"prefix", "q_documents", "mask"}.intersection(self.captured)
        )

    @property
    def band(self) -> Band:
        return self.left, self.right, self.offset

    def mask_mod(self, tensors: Mapping[str, Tensor], band: Band) -> Callable[..., Tensor] | None:
        """Whether a query sees a key. Bounds of the band are numbers, or tensors of one number each."""
        if not self.masked:
            return None
        left, right, offset = band
        chunk = self.chunk
        prefix, mask = tensors.get("prefix"), tensors.get("mask")
        queries, keys = tensors.get("q_documents"), tensors.get("kv_documents")

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = k >= 0
            if left is not None:
                seen = seen & (k >= q + offset - left)
            if right is not None:
                seen = seen & (k <= q + offset + right)
            if prefix is not None:
                seen = seen | (k < prefix[b])
            if chunk is not None:
                seen = seen & ((q + offset) // chunk == k // chunk)
            if queries is not None and keys is not None:
                seen = seen & (queries[b, q] == keys[b, k])
            if mask is not None:
                seen = seen & _of_pair(mask, b, h, q, k)
            return seen

        return visible

    def score_mod(self, tensors: Mapping[str, Tensor], band: Band) -> Callable[..., Tensor] | None:
        """What becomes of a scaled score."""
        cap, offset = self.softcap, band[2]
        slopes, bias = tensors.get("slopes"), tensors.get("bias")
        if cap is None and slopes is None and bias is None:
            return None

        def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if cap is not None:
                score = cap * torch.tanh(score / cap)
            if slopes is not None:
                score = score - slopes[b, h] * torch.abs(k - q - offset)
            if bias is not None:
                score = score + _of_pair(bias, b, h, q, k)
            return score

        return changed

    def block_mask(self, tensors: Mapping[str, Tensor], band: Band, side: int) -> Any:
        """The BlockMask, with blocks of `side` queries and keys, or None."""
        visible = self.mask_mod(tensors, band)
        if visible is None:
            return None
        batches, heads = self.mask_sizes(tensors)
        q, k = tensors["q"], tensors["k"]
        return flex.create_block_mask(
            visible, batches, heads, q.shape[2], k.shape[2], device=q.device.type, BLOCK_SIZE=side or 128
        )

    def mask_sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        """Batches and heads that the mask tells apart; None where all are alike."""
        q, mask = tensors["q"], tensors.get("mask")
        own = any(name in tensors for name in _OF_BATCHES) or (mask is not None and mask.shape[0] > 1)
        return q.shape[0] if own else None, q.shape[1] if mask is not None and mask.shape[1] > 1 else None

    def forward(self, tensors: Mapping[str, Tensor], band: Band, block_mask: Any) -> tuple[Tensor, Tensor]:
        """out and its log-sum-exp, by FlexAttention."""
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        out, more = flex.flex_attention(
            q, k, v, score_mod=self.score_mod(tensors, band), block_mask=block_mask, scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1], kernel_options=dict(self.options) or None,
            return_aux=flex.AuxRequest(lse=True),
        )  # fmt: skip
        return out, more.lse


def launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    slopes: Tensor | None = None, bias: Tensor | None = None, prefix: Tensor | None = None,
    q_documents: Tensor | None = None, kv_documents: Tensor | None = None, mask: Tensor | None = None,
    *, scale: float, window_left: int | None, window_right: int | None, top_left: bool, softcap: float | None = None,
    chunk: int | None = None,
    block_m: int, block_n: int, num_warps: int, num_stages: int, use_tma: bool, sparse: int,
) -> list[Call]:  # fmt: skip
    """The one call. Raises `ValueError` naming what FlexAttention does not do."""
    given = _given((slopes, bias, prefix, q_documents, kv_documents, mask))
    tensors = {"q": q, "k": k, "v": v, **given}
    options = {
        "fwd_BLOCK_M": block_m, "fwd_BLOCK_N": block_n, "fwd_num_warps": num_warps, "fwd_num_stages": num_stages,
        "fwd_USE_TMA": use_tma,
    }  # fmt: skip
    attention = Attention(
        scale=scale, left=window_left, right=window_right, offset=0 if top_left else k.shape[2] - q.shape[2],
        softcap=softcap, chunk=chunk, captured=tuple(given), options=triton_only(options), sparse=sparse,
    )  # fmt: skip
    check_shapes(tensors)
    check_tiles(attention, queries=(block_m,), keys=(block_n,))
    lengths = (q.shape[2], k.shape[2])
    if all(length % _CHECKED == 0 for length in lengths) and (lengths[0] % block_m or lengths[1] % block_n):
        raise ValueError(
            f"FlexAttention checks no ends of lengths that {_CHECKED} divides: tiles must divide {lengths}"
        )
    return [
        Call(
            outputs=(out, lse),
            results=lambda: judged(attention, tensors),
            prepared=lambda: _prepared(attention, tensors),
            subject=(attention, tensors),
        )
    ]


def workspaces(q: Tensor, k: Tensor, v: Tensor, **more: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """None: PyTorch allocates for itself."""
    return {}


def _given(values: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in zip(CAPTURED, values, strict=True) if value is not None}


def triton_only(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The options, and that the Triton template of these options is meant, however short the queries are."""
    return (*options.items(), ("BACKEND", "TRITON"))


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for shapes and types that FlexAttention has no kernel for."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    if min(q.shape[3], v.shape[3]) < 16:
        raise ValueError(f"FlexAttention needs head dims of at least 16, found {min(q.shape[3], v.shape[3])}")
    if 0 in (*q.shape, *k.shape):
        raise ValueError("FlexAttention has no kernel for tensors without elements")


def check_tiles(attention: Attention, *, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    """Raise `ValueError` for tiles that do not divide the blocks of the mask, which FlexAttention refuses or computes wrongly."""
    for side in (*queries, *keys):
        if side < 16 or side & (side - 1):
            raise ValueError(f"a tile of FlexAttention is a power of two of at least 16, found {side}")
        if attention.sparse and attention.sparse % side:
            raise ValueError(f"tiles of {side} do not divide blocks of {attention.sparse} of the BlockMask")
    if attention.masked != bool(attention.sparse):
        raise ValueError("`sparse` is the side of a block of the mask, and 0 where nothing is masked")


def _of_pair(tensor: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The element of a tensor of pairs; along an axis of one element all positions share it."""
    at = [place if size > 1 else place * 0 for place, size in zip((b, h, q, k), tensor.shape, strict=True)]
    return tensor[at[0], at[1], at[2], at[3]]


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def judged(attention: Attention, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The results of a call whose numbers are looked at: out and lse, or dq, dk and dv.

    On a GPU one compiled function serves all lengths (PyTorch's automatic dynamic shapes), and the bounds of the band are
    tensors, so that few things are compiled; what is timed has neither, see `compiled_once`. Elsewhere it is the reference
    in fp64.
    """
    if not tensors["q"].is_cuda:
        with _reference():
            return _results(Attention.forward, attention, _widened(tensors), attention.band)
    band: Band = tuple(
        None if bound is None else torch.tensor(bound, device=tensors["q"].device) for bound in attention.band
    )
    # The numbers of the band are no part of this code, but whether there is a bound is.
    form = replace(attention, left=_set(attention.left), right=_set(attention.right), offset=0)
    return _results(_shared(form), attention, tensors, band)


def _set(bound: int | None) -> int | None:
    return None if bound is None else 0


def _results(
    function: Callable[..., tuple[Tensor, Tensor]], attention: Attention, tensors: Mapping[str, Tensor], band: Band
) -> tuple[Tensor, ...]:
    block_mask = attention.block_mask(tensors, band, attention.sparse)
    if not attention.backward:
        with torch.no_grad():
            return function(attention, _without_dout(tensors), band, block_mask)
    leaves, out = differentiable(function, attention, tensors, band, block_mask)
    return torch.autograd.grad(out, leaves, tensors["dout"])


def differentiable(
    function: Callable[..., tuple[Tensor, Tensor]],
    attention: Attention, tensors: Mapping[str, Tensor], band: Band, block_mask: Any,
) -> tuple[tuple[Tensor, ...], Tensor]:  # fmt: skip
    """Leaves q, k and v, and the out that was computed of them, of which gradients may be asked more than once."""
    import torch._functorch.config

    leaves = tuple(tensors[name].detach().requires_grad_() for name in ("q", "k", "v"))
    # A backward pass that may write over what the forward pass left can run once only.
    with torch._functorch.config.patch(donated_buffer=False), torch.enable_grad():
        out, _ = function(
            attention, _without_dout(tensors) | dict(zip(("q", "k", "v"), leaves, strict=True)), band, block_mask
        )
    return leaves, out


def _without_dout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "dout"}


def _prepared(attention: Attention, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """What is timed of a forward pass."""
    function = compiled_once()
    block_mask = attention.block_mask(tensors, attention.band, attention.sparse)

    def run() -> None:
        with torch.no_grad():
            function(attention, tensors, attention.band, block_mask)

    return run


_numbers = itertools.count()


def compiled_once(dynamic: bool | None = False) -> Callable[..., tuple[Tensor, Tensor]]:
    """`Attention.forward`, compiled for just the shapes that it is given, as for speed.

    Dynamo keeps what it compiled, and counts how often, by code object: each function has one of its own.
    """

    def attend(attention: Attention, tensors: dict[str, Tensor], band: Band, block_mask: Any) -> tuple[Tensor, Tensor]:
        return attention.forward(tensors, band, block_mask)

    own = types.FunctionType(
        attend.__code__.replace(co_name=f"attend_{next(_numbers)}"), attend.__globals__, attend.__name__
    )
    found: Callable[..., tuple[Tensor, Tensor]] = torch.compile(own, dynamic=dynamic, fullgraph=True)
    return found


@functools.lru_cache(maxsize=_KEPT)
def _shared(form: Attention) -> Callable[..., tuple[Tensor, Tensor]]:
    compiled = compiled_once(dynamic=None)

    def function(
        attention: Attention, tensors: dict[str, Tensor], band: Band, block_mask: Any
    ) -> tuple[Tensor, Tensor]:
        return compiled(form, tensors, band, block_mask)

    return function


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.double() if one.is_floating_point() else one for name, one in tensors.items()}


@contextlib.contextmanager
def _reference() -> Iterator[None]:
    """Within it FlexAttention is its reference, which also has gradients on a CPU, although it refuses them there."""
    known: Any = flex
    kept = known._validate_device, known._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    known._validate_device, known._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = (lambda *tensors: None), True
    try:
        yield
    finally:
        known._validate_device, known._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = kept
