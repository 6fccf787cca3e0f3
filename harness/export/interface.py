"""How others call attention: as `flash_attn_func` of flash-attention, and as an attention of transformers. Needs torch.

Refuses what the kernels cannot say, by name, and to change transformers before it is asked to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Attention = Callable[..., Any]


class Interface:
    """Both ways to call `attention` (of `kernels/attention.py`), with `lookup` for its configs."""

    def __init__(self, attention: Attention, lookup: Callable[[Any], Any]) -> None:
        self._attention, self._lookup = attention, lookup

    def flash_attn_func(  # noqa: PLR0913
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        """Attention of q (batch, queries, heads, head_dim), k and v (batch, keys, kv_heads, head_dim): out like q, or with
        `return_attn_probs` (out, log-sum-exp, None). `causal` and windows count from the last query and key; -1 is no bound."""
        self._require_plain(return_attn_probs, dropout_p)
        found = self._attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=softmax_scale, return_lse=return_attn_probs,
            slopes=alibi_slopes, deterministic=deterministic, lookup=self._lookup,
            **_band(causal, window_size), **_changes(softcap, dropout_p),
        )  # fmt: skip
        return (found[0].transpose(1, 2), found[1], None) if return_attn_probs else found.transpose(1, 2)

    def flash_attn_varlen_func(  # noqa: PLR0913
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        """The same of sequences that lie one behind the other: q (all queries, heads, head_dim), k and v (all keys, kv_heads,
        head_dim); `cu_seqlens_*` (int32) say where each begins, and the end. The longest lengths are not needed."""
        self._require_plain(return_attn_probs, dropout_p)
        q, k, v = (each[None].transpose(1, 2) for each in (q, k, v))
        found = self._attention(
            q, k, v, scale=softmax_scale, slopes=alibi_slopes, deterministic=deterministic, lookup=self._lookup,
            q_starts=cu_seqlens_q.to(torch.int32), kv_starts=cu_seqlens_k.to(torch.int32),
            return_lse=return_attn_probs, **_band(causal, window_size), **_changes(softcap, dropout_p),
        )  # fmt: skip
        if return_attn_probs:
            return found[0].transpose(1, 2)[0], found[1][0], None
        return found.transpose(1, 2)[0]

    def register_transformers(self, name: str = "tuned_attention") -> None:
        """Let models of transformers take `attn_implementation=name`: inference and training, grouped heads, padding, windows,
        soft caps and sinks. A query that may see no key, which padding makes, gets 0, where eager attention averages.

        Raises `ValueError` for a name with `flash` in it, which transformers takes for flash-attention's own.
        """
        if "flash" in name:
            raise ValueError(
                f"`{name}` has `flash` in it, and transformers would look for flash-attention: take another name"
            )
        from transformers import AttentionInterface, AttentionMaskInterface  # type: ignore[import-untyped, unused-ignore]
        from transformers.masking_utils import sdpa_mask  # type: ignore[import-untyped, unused-ignore]

        AttentionInterface.register(name, self.transformers_forward)
        AttentionMaskInterface.register(name, sdpa_mask)

    def transformers_forward(  # noqa: PLR0913
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """query (batch, heads, queries, head_dim), key and value with their own heads -> (batch, queries, heads, head_dim).

        `attention_mask` says what is seen where it is there: bool (true is visible) or added to the scores. Else the module says
        whether it is causal, beginning with the first key."""
        for name in ("cache", "output_attentions"):
            if others.get(name):
                raise NotImplementedError(f"`{name}` is not supported by this attention")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        said: dict[str, Any] = {"bias": position_bias}
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            said["mask"] = attention_mask
        elif attention_mask is not None:
            said["bias"] = attention_mask if position_bias is None else attention_mask + position_bias
        if causal and key.shape[2] > query.shape[2]:
            # Keys that a cache has room for, and that nobody has written yet.
            key, value = (each[:, :, : query.shape[2]] for each in (key, value))
            if said["bias"] is not None:
                said["bias"] = said["bias"][..., : query.shape[2]]
        out = self._attention(
            query, key, value, scale=scaling, causal=causal, sinks=s_aux, lookup=self._lookup, **said,
            **_changes(softcap or 0.0, dropout),
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    def _require_plain(self, probabilities: bool, dropout: float) -> None:
        if probabilities and dropout:
            raise NotImplementedError("which weights were dropped is not given back")


def _band(causal: bool, window: tuple[int, int]) -> dict[str, Any]:
    left, right = (None if side < 0 else side for side in window)
    if left is None and right is None:
        return {"causal": causal}
    return {"window": (left, 0 if causal else right)}


def _changes(softcap: float, dropout: float) -> dict[str, Any]:
    found: dict[str, Any] = {"softcap": softcap} if softcap else {}
    if dropout:
        # Of PyTorch's own generator, so that a run can be repeated.
        found |= {"dropout": dropout, "dropout_seed": int(torch.randint(1 << 62, ()))}
    return found
