"""Rivals on the CPU: how they are called, and what they refuse."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from harness import beside, timing
from harness.errors import RefusedError
from harness.problem import parse_problem

FORWARD = parse_problem("b2 h4/2 s16 d16 fp32 causal fwd")


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> Any:
    """FlashAttention 3 as its package has it: axes batch, length, head, dim."""
    assert q.shape == (2, 16, 4, 16) and k.shape == (2, 16, 2, 16)
    by_head = [one.transpose(1, 2) for one in (q, k, v)]
    out = scaled_dot_product_attention(*by_head, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("installed", [True, False])
def test_flash_attention_3_is_called_in_its_own_axes_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    found = SimpleNamespace(flash_attn_func=flash) if installed else None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", found)
    if not installed:
        with pytest.raises(RefusedError, match="FlashAttention 3 is not installed here"):
            beside._flash_attention_3(FORWARD)
        return
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 16, 16), torch.randn(2, 2, 16, 16), torch.randn(2, 2, 16, 16)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(beside._flash_attention_3(FORWARD)(q, k, v), expected)


@pytest.mark.parametrize(("problem", "why"), [
    ("b1 h2 s16 d16 fp16 causal softcap=2.0 fwd", "softcap"), ("b1 h2 s16 d16 fp16 window=3:3 fwd", "windows"),
    ("b1 h2 q4 k16 d16 fp16 causal fwd", "another alignment"),
])  # fmt: skip
def test_what_not_every_rival_can_say_is_not_compared(problem: str, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        beside._library("sdpa:flash", parse_problem(problem), {})


def test_standard_attention_that_would_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "free_bytes", lambda: 1 << 20)
    with pytest.raises(RefusedError, match="standard attention would hold 1 GiB"):
        beside._library("sdpa:math", parse_problem("b1 h4 s4096 d64 bf16 fwd"), {})


def test_memory_is_what_a_run_takes_and_keeps_and_not_what_compiling_took(monkeypatch: pytest.MonkeyPatch) -> None:
    held = SimpleNamespace(now=100, peak=0, runs=0)

    def begin() -> int:
        held.peak = held.now
        return int(held.now)

    def run() -> None:
        held.runs += 1
        held.peak = held.now + (5000 if held.runs == 1 else 30)

    def make() -> Any:
        held.now += 7
        return run

    monkeypatch.setattr(timing, "begin_peak", begin)
    monkeypatch.setattr(timing, "peak_bytes", lambda: held.peak)
    assert beside._prepared(make) == (run, 37)
