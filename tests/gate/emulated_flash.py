"""A flash kernel emulated in torch, block by block and rounding by rounding, with the contract of a kernel file.

`defect` plants what a gate must see: a precision that the contract does not allow, or ill behaviour in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Emulated:
    PASS: str
    defect: str = ""
    calls: int = field(default=0, init=False)

    def workspaces(self, **inputs: torch.Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"delta": (tuple(inputs["lse"].shape), torch.float32)} if self.PASS == "bwd" else {}

    def launches(self, **arguments: object) -> list["EmulatedLaunch"]:
        self.calls += 1
        if self.defect == "never launched":
            return []
        return [EmulatedLaunch(lambda: _misbehave(self, arguments))]


@dataclass
class EmulatedLaunch:
    run: Callable[[], None]


def _misbehave(kernel: Emulated, arguments: dict) -> None:
    if kernel.defect == "unwritten":
        return
    run = run_forward if kernel.PASS == "fwd" else run_backward
    run(kernel.defect, **arguments)
    first = arguments["out" if kernel.PASS == "fwd" else "dq"]
    if kernel.defect == "input written":
        arguments["k"][0, 0, 0, 0] += 1
    if kernel.defect == "stray write":
        torch.as_strided(first, (1,), (1,), first.storage_offset() - 3).fill_(0.0)
    if kernel.defect == "not a number":
        first[0, 0, -1, -1] = torch.nan
    if kernel.defect == "different every time" and arguments["q"].any():
        first[0, 0, 0, 0] *= 1 + 2.0**-10 * (kernel.calls % 2)


def _visible(q, k, window_left, window_right, top_left):
    row = torch.arange(q.shape[2])[:, None] + (0 if top_left else k.shape[2] - q.shape[2])
    key = torch.arange(k.shape[2])[None, :]
    left = key >= row - window_left if window_left is not None else key >= 0
    return left & (key <= row + window_right) if window_right is not None else left & (key >= 0)


def _cut(x: torch.Tensor, defect: str) -> torch.Tensor:
    """To tf32, by truncation."""
    return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32) if defect == "tf32" else x.float()


def run_forward(defect, *, q, k, v, out, lse, scale, window_left, window_right, top_left, block_m, block_n):
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    seen = _visible(q, k, window_left, window_right, top_left)
    m = torch.full(lse.shape, -torch.inf)
    total, acc = torch.zeros(lse.shape), torch.zeros(out.shape)
    factor = torch.tensor(scale * 1.4426950408889634, dtype=torch.float32)
    for start in range(0, k.shape[2], block_n):
        block = slice(start, start + block_n)
        s = (_cut(q, defect) @ _cut(keys[:, :, block], defect).mT * factor).masked_fill(~seen[:, block], -torch.inf)
        grown = torch.maximum(m, s.amax(-1))
        shift = grown.masked_fill(grown == -torch.inf, 0.0)
        p = torch.exp2(s - shift[..., None])
        shrink = torch.exp2(m - shift)
        total = total * shrink + p.sum(-1)
        p = p.to(torch.float8_e4m3fn) if defect == "fp8 weights" else p.to(v.dtype)
        acc = acc * shrink[..., None] + _cut(p, defect) @ _cut(values[:, :, block], defect)
        if defect == "16-bit accumulator":
            acc = acc.to(out.dtype).float()
        m = grown
    result = acc / total.masked_fill(total == 0, 1.0)[..., None]
    out.copy_(result * (1 + 2.0**-8) if defect == "one in 256" else result)
    found = torch.where(total > 0, (m + total.log2()) * 0.6931471805599453, -torch.inf)
    lse.copy_(found.to(q.dtype).float() if defect == "16-bit lse" else found)


def run_backward(
    defect, *, q, k, v, out, lse, dout, dq, dk, dv, delta, scale, window_left, window_right, top_left, block_m, block_n
):
    group, dtype = q.shape[1] // k.shape[1], q.dtype
    keys, values = (x.repeat_interleave(group, 1).float() for x in (k, v))
    seen = _visible(q, k, window_left, window_right, top_left)
    delta.copy_((out.float() * dout.float()).sum(-1))
    base = torch.where(lse == -torch.inf, torch.inf, lse * 1.4426950408889634)
    dq_sum = torch.zeros(q.shape)
    dk_sum, dv_sum = torch.zeros(k.shape), torch.zeros(v.shape)
    factor = torch.tensor(scale * 1.4426950408889634, dtype=torch.float32)
    for start in range(0, k.shape[2], block_n):
        block = slice(start, start + block_n)
        s = (q.float() @ keys[:, :, block].mT * factor - base[..., None]).masked_fill(~seen[:, block], -torch.inf)
        p = torch.exp2(s)
        ds = p * (dout.float() @ values[:, :, block].mT - delta[..., None])
        rounded = (ds.to(torch.float8_e4m3fn) if defect == "fp8 dS" else ds.to(dtype)).float()
        dq_sum += rounded @ keys[:, :, block]
        by_group = (q.shape[0], k.shape[1], group, *p.mT.shape[2:3], -1)
        dk_sum[:, :, block] = (rounded.mT @ q.float()).view(by_group).sum(2)
        dv_sum[:, :, block] = (p.to(dtype).float().mT @ dout.float()).view(by_group).sum(2)
    dq.copy_(dq_sum * scale)
    dk.copy_(dk_sum * scale)
    dv.copy_(dv_sum)
