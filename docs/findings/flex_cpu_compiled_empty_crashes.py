"""torch 2.13.0 CPU: torch.compile(flex_attention) without queries, or without keys, ends the process with SIGFPE.

Expected: an empty output for no queries; zeros for no keys (as scaled_dot_product_attention gives); or an exception.
usage: flex_cpu_compiled_empty_crashes.py [QUERIES KEYS]
"""

import subprocess
import sys

if len(sys.argv) == 3:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    rows, keys = map(int, sys.argv[1:])
    q, k, v = (torch.randn(1, 2, length, 16) for length in (rows, keys, keys))
    print(torch.compile(flex_attention)(q, k, v).shape)
    sys.exit(0)

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

print("torch", torch.__version__)
for rows, keys in ((4, 4), (0, 17), (17, 0)):
    q, k, v = (torch.randn(1, 2, length, 16) for length in (rows, keys, keys))
    print(f"{rows} queries, {keys} keys: sdpa gives {tuple(sdpa(q, k, v).shape)}, max {sdpa(q, k, v).abs().sum().item():.3g}")
    try:
        print("   flex_attention, eager:", tuple(flex_attention(q, k, v).shape))
    except (RuntimeError, IndexError) as error:
        print("   flex_attention, eager:", type(error).__name__, str(error).splitlines()[0])
    child = subprocess.run([sys.executable, "-W", "ignore", __file__, str(rows), str(keys)], capture_output=True, text=True)
    print(f"   flex_attention, compiled: exit {child.returncode}", child.stdout.strip())
