"""Small random problems, and configs of the stock kernels, whose tiles are crossed by their lengths."""

from typing import Any

import numpy as np

from harness.problem import Problem

LENGTHS = (1, 2, 7, 15, 16, 17, 24, 31, 32, 33, 40)


def random_problem(rng: np.random.Generator, pass_: str, dtype: str | None = None) -> Problem:
    """One to four heads, lengths around multiples of 16, every kind of mask."""
    kv_heads, group = int(rng.integers(1, 3)), int(rng.choice([1, 1, 2, 3]))
    q_len, kv_len = (int(rng.choice(LENGTHS)) for _ in range(2))
    if rng.integers(2):
        kv_len = q_len
    mask: dict[str, Any] = {}
    kind = int(rng.integers(5))
    if kind in (1, 2):
        mask["causal"] = True
    if kind == 3:
        mask["window_right"] = int(rng.integers(1, 20))
    if kind in (2, 3, 4):
        mask["window_left"] = int(rng.integers(0, 24))
    head_dim = int(rng.choice([3, 8, 16, 20, 32]))
    return Problem(
        batch=int(rng.choice([1, 1, 2])), q_heads=kv_heads * group, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len,
        head_dim=head_dim, v_head_dim=int(rng.choice([head_dim, 8, 16, 24])),
        dtype=dtype or str(rng.choice(["fp16", "bf16", "fp32"])), top_left=bool(rng.integers(2)),
        scale=None if rng.integers(2) else float(rng.choice([0.5, 0.3, 1.0, -0.25])),
        layout=str(rng.choice(["bhsd", "bshd", "sbhd"])), pass_=pass_, **mask,
    )  # fmt: skip


def config_of(pass_: str, rng: np.random.Generator) -> dict[str, Any]:
    """A config of the stock kernel of this pass."""
    sides = [int(rng.choice([16, 32])) for _ in range(4)]
    if pass_ == "fwd":
        return {
            "block_m": sides[0], "block_n": sides[1], "num_warps": 4, "num_stages": 1, "load": "pointer",
            "loops": str(rng.choice(["split", "single"])), "masked_stages": 1,
            "head_order": str(rng.choice(["outer", "inner"])), "warp_specialize": False, "waves_per_eu": 0,
        }  # fmt: skip
    return {
        "dkdv_block_m": sides[0], "dkdv_block_n": sides[1], "dkdv_warps": 4, "dkdv_stages": 1, "dkdv_load": "pointer",
        "dq_block_m": sides[2], "dq_block_n": sides[3], "dq_warps": 4, "dq_stages": 1, "dq_load": "pointer",
        "waves_per_eu": 0,
    }  # fmt: skip
