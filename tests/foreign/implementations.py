"""Small correct implementations of attention, one for each signature, in fp32 inside."""

import math

import torch


def core(q, k, v, scale, visible):
    """(out, lse); axes batch, head, length, dim; `visible` (Sq, Skv) or None."""
    group = q.shape[1] // k.shape[1]
    key, value = (tensor.float().repeat_interleave(group, 1) for tensor in (k, v))
    scores = q.float() @ key.mT * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    highest = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    # A row without keys has no maximum; its weights are 0.
    weights = torch.exp(scores - highest.masked_fill(highest == -math.inf, 0.0).detach())
    total = weights.sum(-1, keepdim=True)
    out = (weights / total.masked_fill(total == 0, 1.0)) @ value
    return out.to(q.dtype), (highest + total.log()).squeeze(-1)


def scale_of(q, scale):
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def band(q_len, kv_len, left, right, offset):
    diagonal = torch.arange(q_len)[:, None] + offset
    key = torch.arange(kv_len)[None, :]
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    if left is not None:
        seen &= key >= diagonal - left
    if right is not None:
        seen &= key <= diagonal + right
    return seen


def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    if is_causal:
        assert attn_mask is None
        attn_mask = band(q.shape[2], k.shape[2], None, 0, 0)
    return core(q, k, v, scale_of(q, scale), attn_mask)[0]


def flash(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    left, right = (None if side < 0 else side for side in window_size)
    right = 0 if causal else right
    seen = band(q.shape[1], k.shape[1], left, right, k.shape[1] - q.shape[1])
    out, lse = core(*(tensor.transpose(1, 2) for tensor in (q, k, v)), scale_of(q, softmax_scale), seen)
    return out.transpose(1, 2), lse, None


def flex(q, k, v, score_mod=None, block_mask=None, scale=None, enable_gqa=False, return_lse=False):
    seen = None
    if block_mask is not None:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        seen = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), rows, keys)
    out, lse = core(q, k, v, scale_of(q, scale), seen)
    return (out, lse) if return_lse else out


def ours(q, k, v, *, scale, window_left, window_right, top_left):
    offset = 0 if top_left else k.shape[2] - q.shape[2]
    return core(q, k, v, scale, band(q.shape[2], k.shape[2], window_left, window_right, offset))


def top_left_flash(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """Wrong: the causal diagonal of FlashAttention before 2.1."""
    left, right = (None if side < 0 else side for side in window_size)
    seen = band(q.shape[1], k.shape[1], left, 0 if causal else right, 0)
    out, _ = core(*(tensor.transpose(1, 2) for tensor in (q, k, v)), scale_of(q, softmax_scale), seen)
    return out.transpose(1, 2)


NOT_CALLABLE = 3


class Module:
    @staticmethod
    def forward(q, k, v, **keywords):
        return sdpa(q, k, v, **keywords)
