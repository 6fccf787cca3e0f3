"""torch 2.13.0 CPU: scaled_dot_product_attention(is_causal=True) gives NaN where scale <= 0, by default and with FLASH_ATTENTION.

The CPU kernel writes -inf over hidden scores, then multiplies by the scale: -inf * 0 is NaN, -inf * -0.5 is +inf.
The same mask as attn_mask, or the backend MATH, is right.
"""

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

print("torch", torch.__version__)
torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
mask = torch.ones(4, 4, dtype=torch.bool).tril()
for scale in (0.5, 0.0, -0.5):
    # Independent: one element after the other, in Python's fp64.
    want = torch.zeros(4, 8, dtype=torch.float64)
    for i in range(4):
        s = [scale * math.fsum(float(a) * float(b) for a, b in zip(q[0, 0, i], k[0, 0, j])) for j in range(i + 1)]
        p = [math.exp(x - max(s)) for x in s]
        for d in range(8):
            want[i, d] = math.fsum(w * float(v[0, 0, j, d]) for j, w in enumerate(p)) / math.fsum(p)
    rows = {"default, is_causal": sdpa(q, k, v, is_causal=True, scale=scale)}
    rows["default, attn_mask"] = sdpa(q, k, v, attn_mask=mask, scale=scale)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            rows[f"{backend.name}, is_causal"] = sdpa(q, k, v, is_causal=True, scale=scale)
    for name, out in rows.items():
        print(f"scale {scale:+.1f}  {name:28} NaN {int(out.isnan().sum()):2d}   max error {(out[0, 0] - want).abs().max().item():.2g}")
